"""Modules as releases: `loopback module build | publish | verify | list`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import context, keys
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
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
    package.inspect(file)  # before anything is asked of a server
    async with context.connect() as session:
        return await publish(session, file, channel)


async def publish(session: context.Session, file: Path, channel: str = "stable") -> PackageInfo:
    """Verify and sign a package with its family's key, store it, and have delivery publish it. Raises Refused."""
    info = await asyncio.to_thread(package.inspect, file)
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
    key_file = keys.offline_key(home, role)
    if not key_file.exists():
        raise Refused(
            Code.SIGNATURE_INVALID,
            f"there is no key for releases of {name}: {key_file}",
            f"make one with 'loopback keys family {name}', or plug in the medium that has it",
        )
    targets = signing.parse(Targets, trusted.metadata(role))
    targets.version += 1
    targets.expires = ((now or datetime.now(UTC)) + signing.TARGETS_LIFE).replace(microsecond=0)
    targets.targets[path] = signing.release(path, info.digest, info.size, version, channel)
    return {signing.filename(role, targets.version): signing.sign(targets, SigningKey.load(key_file))}


@app.command("verify")
def verify_command(file: Annotated[Path, typer.Argument(help="A package.")]) -> None:
    """Check a package as a host does before it unpacks it; where the repository is at hand, its signature too."""
    info = package.inspect(file)
    manifest = info.manifest
    typer.echo(f"ok  archive     canonical, {len(info.members)} plain files, {info.size} bytes")
    typer.echo(f"ok  contents    every file has the digest that {package.DIGESTS} says")
    typer.echo(
        f"ok  manifest    {manifest.name} {manifest.version}, ABI {manifest.module.abi[0]}–{manifest.module.abi[1]}"
    )
    typer.echo(f"ok  asks for    {', '.join(manifest.module.capabilities) or 'no capabilities'}")
    typer.echo(f"    sha256      {info.digest}")
    if not (context.home() / "context.toml").exists():
        typer.echo("--  signature   not checked: there is no installation here")
        return
    signed = asyncio.run(_signed(manifest.name, manifest.version))
    if signed is None:
        typer.echo("no  signature   not published: no key that counts has signed this version")
        raise typer.Exit(1)
    if signed != info.digest:
        raise Refused(
            Code.PACKAGE_DIGEST,
            f"{manifest.name} {manifest.version} was published with the digest {signed[:12]}, this is {info.digest[:12]}",
            "do not install it",
        )
    typer.echo(f"ok  signature   signed for {target_path(manifest.name, manifest.version)}")


async def _signed(module: str, version: str) -> str | None:
    async with context.connect() as session:
        trusted = await keys.repository(session)
        found = await asyncio.to_thread(trusted.find, target_path(module, version))
        return found.sha256 if found else None


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
