"""Modules as releases: `loopback module build | publish | verify | list`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import context, keys, moduleverify, printing, trustpublish
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import Release, ReleasePublish
from loopback.trust import package, signing
from loopback.trust.package import PackageInfo
from loopback.trust.repository import TrustedRepository, target_path

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Build, publish, verify and list modules' releases.",
)


@app.command("build")
def build_command(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The module's folder, with module.toml.")],
    version: Annotated[str | None, typer.Option(help="Instead of the manifest's version.")] = None,
    out: Annotated[Path, typer.Option(help="Folder, or file ending in .lbm.")] = Path("build"),
    overlay: Annotated[
        Path | None, typer.Option(help="Folder whose files replace those of the package, for experiments.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile and pack a module. The same sources and compiler give the same bytes."""
    from loopback.modules.build import build_module  # only building needs the compiler's side

    built = build_module(source, version=version, overlay=overlay, out=out)
    found = {
        "module": built.manifest.name,
        "version": built.manifest.version,
        "digest": built.digest,
        "size": built.size,
        "path": str(built.path),
    }
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    typer.echo(str(built.path))
    typer.echo(
        f"{built.manifest.name} {built.manifest.version}: {built.size} bytes, sha256 {built.digest}\n"
        f"Next: loopback module publish {built.path}",
        err=True,
    )


@app.command("publish")
def publish_command(
    file: Annotated[Path, typer.Argument(help="A package.")],
    channel: Annotated[str, typer.Option(help="Entitlements name it.")] = "stable",
) -> None:
    """Sign a package with its family's key and have delivery publish it."""
    info = asyncio.run(_publish(file, channel))
    typer.echo(
        f"published {info.manifest.name} {info.manifest.version} ({channel}), sha256 {info.digest}", err=True
    )


async def _publish(file: Path, channel: str) -> PackageInfo:
    package.check_described(file, package.inspect(file))  # before anything is asked of a server
    async with context.connect() as session:
        return await publish(session, file, channel)


async def publish(session: context.Session, file: Path, channel: str = "stable") -> PackageInfo:
    """Verify and sign a package with its family's key, store it, and have delivery publish it. Raises Refused.

    One without SBOM or provenance is not published, by delivery neither.
    """
    info = await asyncio.to_thread(package.inspect, file)
    await asyncio.to_thread(package.check_described, file, info)
    trusted = await keys.repository(session)
    metadata = await asyncio.to_thread(sign_release, session.context.home, trusted, info, channel)
    digest = await session.put_blob(await asyncio.to_thread(file.read_bytes))
    if digest != info.digest:
        raise Refused(Code.PACKAGE_DIGEST, f"{file} changed while it was published", "publish it again")
    await session.send(
        ReleasePublish(
            **context.new_command_fields(subjects.GLOBAL_WORKSPACE),
            module=info.manifest.name,
            version=info.manifest.version,
            digest=info.digest,
            size=info.size,
            metadata=keys.encode(metadata),
            channel=channel,
        ),
        "delivery",
    )
    return info


def sign_release(
    home: Path,
    trusted: TrustedRepository,
    info: PackageInfo,
    channel: str = "stable",
    now: datetime | None = None,
) -> dict[str, bytes]:
    """The module's delegated targets metadata with this release in it, signed with the family's key.

    Raises Refused where the family has no key, or this version is out with other content.
    """
    name, version = info.manifest.name, info.manifest.version
    role = signing.delegated_role(name)
    path = target_path(name, version)
    known = trusted.find(path)
    if known is not None and known.sha256 != info.digest:
        raise Refused(
            Code.TUF_CONFLICT,
            f"{name} {version} is published already, with the digest {known.sha256[:12]}",
            "a version never changes: build it under a new one",
        )
    entitled = signing.role_keys(signing.parse(Targets, trusted.metadata("targets")), role)
    signers = trustpublish.opened_or_refuse(
        home,
        entitled,
        f"releases of {name}",
        f"plug in the medium that has it (--offline, LOOPBACK_OFFLINE), or make one: 'loopback keys family {name}'",
    )
    targets = signing.parse(Targets, trusted.metadata(role))
    targets.version += 1
    targets.expires = ((now or datetime.now(UTC)) + signing.TARGETS_LIFE).replace(microsecond=0)
    targets.targets[path] = signing.release(path, info.digest, info.size, version, channel)
    return {signing.filename(role, targets.version): signing.sign(targets, *signers)}


@app.command("verify")
def verify_command(
    file: Annotated[Path, typer.Argument(help="A package.")],
    root: Annotated[
        Path | None, typer.Option(metavar="ROOT.json", help="Trust this root, without an installation.")
    ] = None,
    metadata: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the TUF metadata is, with --root.")
    ] = None,
    reproduce: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Build it again from the module's folder and compare.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make every check of a package that a host or publisher makes, and say what each found.

    ok: it holds · no: it does not · --: not checked. Exit code 0: nothing is wrong · 1: something is · 2: not to be checked.
    """
    if (root is None) != (metadata is None):
        raise typer.BadParameter("--root and --metadata go together")
    if not file.is_file():
        package.inspect(file)  # a mistake in the call, and no package that is found wanting
    if root is not None and metadata is not None:
        find, why = moduleverify.offline(root, metadata), ""
    elif (context.home() / "context.toml").exists():
        find, why = moduleverify.online(), ""
    else:
        find, why = None, "not checked: no installation here; name --root and --metadata"
    found = moduleverify.verify(file, find, why, reproduce)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        for check in found.checks:
            code = f"  [{check.code}]" if check.code else ""
            typer.echo(f"{check.answer:<2}  {check.name:<10}  {printing.printable(check.said)}{code}")
        for check in found.checks:
            if check.next_step:
                typer.echo(f"next: {printing.printable(check.next_step)}", err=True)
    if not found.ok:
        raise typer.Exit(1)
    if found.unasked:
        raise typer.Exit(2)


@app.command("list")
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what was published."""
    releases = asyncio.run(_releases())
    if as_json:
        typer.echo(msgspec.json.encode(releases).decode())
        return
    if not releases:
        typer.echo("nothing was published yet; next: loopback module build modules/firewall", err=True)
        return
    typer.echo(f"{'module':<16} {'version':<12} {'channel':<10} {'kernel':<8} {'size':>9}  digest")
    for release in releases:
        typer.echo(
            f"{release.module:<16} {release.version:<12} {release.channel:<10} "
            f"{release.requirements.kernel or 'any':<8} {release.size:>9}  {release.digest[:16]}"
        )


async def _releases() -> list[Release]:
    async with context.connect() as session:
        stored = await session.read(subjects.STREAM_CATALOG, [subjects.catalog("*", "*")], last=True)
    found = [msgspec.json.decode(message.data, type=Release) for message in stored]
    return sorted(found, key=lambda r: (r.module, r.published_at))
