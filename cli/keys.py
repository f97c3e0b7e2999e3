"""Keys of an installation and the trust they found: `loopback keys`.

Makes the offline root and targets keys, a key per module family, the online snapshot and timestamp keys, the operators' keys,
and with them the first TUF repository, which delivery imports into an empty bus (`<home>/tuf/seed`). Later changes of trust
are signed here and published by delivery, which checks them like any client.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import nats.js.errors
import typer
from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import context, creds
from loopback.contracts import subjects, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.contracts.messages import MetadataPublish
from loopback.contracts.trustdoc import EVERY_WORKSPACE, Operator, Role, TrustDocument
from loopback.services._runtime.settings import read_identity
from loopback.trust import blobs, manifest, signing
from loopback.trust.repository import Fetch, TrustedRepository

FIRST_FAMILY: Final = "firewall"
OFFLINE: Final = ("root", "targets")
ONLINE: Final = ("snapshot", "timestamp")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Keys, and who may do what: the root of all trust.",
)


class Change(NamedTuple):
    """A signed change of trust, ready to be published: metadata files by name, and content that they name."""

    metadata: dict[str, bytes]
    blobs: tuple[bytes, ...] = ()


def offline_key(home: Path, name: str) -> Path:
    """Where the key `root`, `targets` or `module-<family>` is. It belongs on a medium that is usually unplugged."""
    return home / "keys" / "offline" / f"{name}.pem"


def online_key(home: Path, name: str) -> Path:
    """Where delivery's key `snapshot` or `timestamp` is."""
    return home / "keys" / "online" / f"{name}.pem"


def operator_key(home: Path, name: str) -> Path:
    """Where an operator's key is."""
    return home / "keys" / "operators" / f"{subjects.token(name)}.pem"


def init_keys(
    home: Path,
    activation_public_hex: str,
    operator: str = "admin",
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> None:
    """Make every key and the first, signed repository below `home`; `operator` gets every role everywhere.

    The pinned root is written last, so a run that was interrupted is simply done again. Raises Refused where there is one.
    """
    pinned = home / "tuf" / "root.json"
    if pinned.exists():
        raise Refused(
            Code.NAME_INVALID,
            f"{home} has keys already; they are never overwritten",
            "use them, or name another --home",
        )
    PublicKey.parse(activation_public_hex)
    keys = {name: _keep(offline_key(home, name)) for name in OFFLINE}
    keys |= {name: _keep(online_key(home, name)) for name in ONLINE}
    family = _keep(offline_key(home, signing.delegated_role(FIRST_FAMILY)))
    person = _keep(operator_key(home, operator))
    document = TrustDocument(
        version=1,
        operators=(Operator(operator, person.public.text, {EVERY_WORKSPACE: tuple(Role)}),),
        services={"activation": (activation_public_hex,)},
    )
    trust = msgspec.json.encode(document)
    at = now()
    root = signing.sign(
        signing.new_root(
            at,
            root=keys["root"],
            targets=keys["targets"],
            snapshot=keys["snapshot"],
            timestamp=keys["timestamp"],
        ),
        keys["root"],
    )
    targets = signing.new_targets(
        at, version=1, files={trustdoc.TARGET: signing.target(trustdoc.TARGET, trust)}
    )
    signing.delegate(targets, FIRST_FAMILY, family)
    role = signing.delegated_role(FIRST_FAMILY)
    signed = {
        "targets": signing.sign(targets, keys["targets"]),
        role: signing.sign(signing.new_targets(at, version=1, files={}), family),
    }
    snapshot = signing.sign(signing.new_snapshot(at, version=1, files=signed), keys["snapshot"])
    timestamp = signing.sign(signing.new_timestamp(at, version=1, snapshot=snapshot), keys["timestamp"])
    seed = home / "tuf" / "seed"
    (seed / "blobs").mkdir(parents=True, exist_ok=True)
    files = {"root": root, **signed, "snapshot": snapshot, "timestamp": timestamp}
    for name, data in files.items():
        (seed / signing.filename(name, 1)).write_bytes(data)
    (seed / "blobs" / hashlib.sha256(trust).hexdigest()).write_bytes(trust)
    pinned.write_bytes(root)


def add_operator(
    home: Path,
    name: str,
    roles: Mapping[str, Iterable[Role]],
    *,
    repository: TrustedRepository,
    read_blob: Callable[[str, int], bytes],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Change:
    """A new trust document in which `name` has these roles by workspace, signed with the offline targets key.

    An operator of that name gets these roles instead of the earlier ones and keeps the key; a new one gets a key in
    `home`. `repository` is the verified present state. Raises Refused.
    """
    document = repository.trust_document(read_blob).document
    granted = {workspace: tuple(dict.fromkeys(given)) for workspace, given in roles.items()}
    known = next((o for o in document.operators if o.name == name), None)
    public = known.public_key if known else _keep(operator_key(home, name)).public.text
    others = tuple(o for o in document.operators if o.name != name)
    trust = msgspec.json.encode(
        msgspec.structs.replace(
            document,
            version=document.version + 1,
            operators=(*others, Operator(name, public, granted)),
        )
    )
    targets = _next_targets(repository, now())
    targets.targets[trustdoc.TARGET] = signing.target(trustdoc.TARGET, trust)
    return Change(_sign_targets(home, targets), (trust,))


def add_family(
    home: Path,
    module: str,
    *,
    repository: TrustedRepository,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Change:
    """Let a new key in `home` sign the releases of the module `module`. Raises Refused where it has one already."""
    role = signing.delegated_role(module)
    targets = _next_targets(repository, now())
    if targets.delegations is not None and role in (targets.delegations.roles or {}):
        raise Refused(Code.NAME_INVALID, f"the module {module!r} has a key already")
    key = _keep(offline_key(home, role))
    signing.delegate(targets, module, key)
    empty = signing.sign(signing.new_targets(now(), version=1, files={}), key)
    return Change({**_sign_targets(home, targets), signing.filename(role, 1): empty})


def seed_fetch(home: Path) -> Fetch:
    """Fetches from the repository that `init_keys` made, for work before anything runs."""

    def fetch(name: str) -> bytes | None:
        path = home / "tuf" / "seed" / name
        return path.read_bytes() if path.is_file() else None

    return fetch


def repository_at(home: Path, fetch: Fetch) -> TrustedRepository:
    """The operator's own verified view of the repository; its memory is `<home>/tuf/client`. Raises Refused."""
    try:
        root = (home / "tuf" / "root.json").read_bytes()
    except FileNotFoundError:
        raise Refused(
            Code.TUF_INVALID, f"there is no root.json in {home / 'tuf'}", "make one with 'loopback keys init'"
        ) from None
    place = home / "tuf" / "client"
    TrustedRepository.pin(place, root)
    repository = TrustedRepository(place, fetch)
    repository.refresh()
    return repository


async def repository(session: context.Session) -> TrustedRepository:
    """The same, fetched from the bus."""
    stored = await session.read(subjects.STREAM_TUF, ["lb.tuf.>"], last=True)
    files = {message.subject: message.data for message in stored}
    return await asyncio.to_thread(
        repository_at, session.context.home, lambda name: files.get(subjects.tuf(name))
    )


def encode(metadata: Mapping[str, bytes]) -> dict[str, str]:
    """Metadata files as commands carry them."""
    return {name: base64.b64encode(data).decode() for name, data in metadata.items()}


def _keep(path: Path) -> SigningKey:
    """The key in this file, made where there is none."""
    if path.exists():
        return SigningKey.load(path)
    key = SigningKey.generate()
    fresh = path.with_name(path.name + ".new")
    key.save(fresh)
    fresh.replace(path)
    return key


def _next_targets(repository: TrustedRepository, at: datetime) -> Targets:
    targets = signing.parse(Targets, repository.metadata("targets"))
    targets.version += 1
    targets.expires = (at + signing.TARGETS_LIFE).replace(microsecond=0)
    return targets


def _sign_targets(home: Path, targets: Targets) -> dict[str, bytes]:
    key = SigningKey.load(offline_key(home, "targets"))
    return {signing.filename("targets", targets.version): signing.sign(targets, key)}


async def publish(session: context.Session, change: Change) -> None:
    """Store the content and have delivery publish the metadata. Raises Refused."""
    for data in change.blobs:
        await session.put_blob(data)
    await session.send(
        MetadataPublish(
            **context.new_command_fields(subjects.GLOBAL_WORKSPACE), metadata=encode(change.metadata)
        ),
        "delivery",
    )


@app.command("init")
def init_command(
    operator: Annotated[
        str, typer.Option(help="Name of the first operator, who may do everything.")
    ] = "admin",
) -> None:
    """Make every key, and the repository that everything else is trusted by."""
    home = context.home()
    path = home / "creds" / "activation.creds"
    if not path.exists():
        creds.init_home(home)
    init_keys(home, SigningKey.from_nkey(read_identity(path).seed).public.text, operator)
    typer.echo(f"Made the keys of this installation below {home / 'keys'}:\n", err=True)
    typer.echo(
        "  offline/root.pem        says which keys count at all; used only to replace keys\n"
        "  offline/targets.pem     signs who may do what, and which key signs which module\n"
        f"  offline/module-{FIRST_FAMILY}.pem  signs releases of the {FIRST_FAMILY}\n"
        "  online/snapshot.pem     delivery signs the set of current files with it\n"
        "  online/timestamp.pem    delivery says daily with it that nothing newer was hidden\n"
        f"  operators/{subjects.token(operator)}.pem     signs your commands\n",
        err=True,
    )
    typer.echo(
        "Whoever has the offline keys can make every host run anything: move the folder 'offline' to a medium that you\n"
        "unplug, and keep a copy. Hosts need only tuf/root.json, which is no secret.\n"
        "Next: 'loopback up'.",
        err=True,
    )


@app.command("show")
def show_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the pinned root and the keys that lie here. Compare the root's digest with what hosts have."""
    home = context.home()
    path = home / "tuf" / "root.json"
    if not path.exists():
        raise Refused(Code.TUF_INVALID, f"there are no keys in {home}", "make them with 'loopback keys init'")
    data = path.read_bytes()
    root = signing.parse(Root, data)
    roles = {role: sorted(root.roles[role].keyids) for role in (*OFFLINE, *ONLINE)}
    folder = home / "keys"
    files = [
        {"file": str(p.relative_to(home)), "key": SigningKey.load(p).public.text}
        for p in sorted(folder.glob("*/*.pem"))
    ]
    digest = hashlib.sha256(data).hexdigest()
    if as_json:
        found = {
            "root": {"sha256": digest, "version": root.version, "expires": root.expires, "roles": roles},
            "files": files,
        }
        typer.echo(msgspec.json.encode(found).decode())
        return
    typer.echo(f"root.json  version {root.version}  expires {root.expires:%Y-%m-%d}  sha256 {digest}")
    for role, ids in roles.items():
        typer.echo(f"  {role:<10} {', '.join(i[:16] for i in ids)}")
    for entry in files:
        typer.echo(f"{entry['file']:<36} {entry['key']}")


@app.command("operator")
def operator_command(
    name: Annotated[str, typer.Argument(help="The operator's name.")],
    role: Annotated[list[Role], typer.Option(help="May be given several times.")],
    workspace: Annotated[
        list[str] | None, typer.Option(help="Where; may be given several times. Everywhere without it.")
    ] = None,
) -> None:
    """Give an operator roles (instead of earlier ones); a new operator gets a key."""
    asyncio.run(_operator(name, role, workspace or [EVERY_WORKSPACE]))
    typer.echo(
        f"{name} now has {', '.join(role)} in {', '.join(workspace or ['every workspace'])}; "
        f"the key is {operator_key(context.home(), name)}",
        err=True,
    )


async def _operator(name: str, roles: list[Role], workspaces: list[str]) -> None:
    async with context.connect() as session:
        trusted = await repository(session)
        info = await asyncio.to_thread(trusted.find, trustdoc.TARGET)
        if info is None:
            raise Refused(Code.TUF_INVALID, f"the repository has no {trustdoc.TARGET}")
        content = await read_blob(session, info.sha256, info.length)
        change = await asyncio.to_thread(
            lambda: add_operator(
                session.context.home,
                name,
                dict.fromkeys(workspaces, roles),
                repository=trusted,
                read_blob=lambda _digest, _size: content,
            )
        )
        await publish(session, change)


async def read_blob(session: context.Session, sha256: str, size: int) -> bytes:
    """A blob's verified content from the bus. Raises Refused(BLOB_*)."""

    async def get(subject: str) -> tuple[bytes, dict[str, str]] | None:
        try:
            found = await session.js.get_last_msg(subjects.STREAM_BLOBS, subject)
        except nats.js.errors.NotFoundError:
            return None
        return found.data or b"", dict(found.headers or {})

    return await blobs.read(get, sha256, max_size=size, size=size)


@app.command("family")
def family_command(
    module: Annotated[str, typer.Argument(help="The module's name.")],
) -> None:
    """Make a key for another module, so that its releases can be published."""
    asyncio.run(_family(module))
    typer.echo(
        f"releases of {module} are now signed with "
        f"{offline_key(context.home(), signing.delegated_role(module))}",
        err=True,
    )


async def _family(module: str) -> None:
    manifest.check_module_name(module)
    async with context.connect() as session:
        trusted = await repository(session)
        change = await asyncio.to_thread(lambda: add_family(session.context.home, module, repository=trusted))
        await publish(session, change)
