"""What `loopback keys show` says: every role's keys and expiry, key files, operators, services, rules of workspaces."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import nats.errors
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]  # re-exported, unsaid

from loopback.cli import context, keyring, trustpublish
from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.trustdoc import Trust, WorkspaceRules
from loopback.trust import signing
from loopback.trust.repository import TrustedRepository

_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


class RoleShown(msgspec.Struct, frozen=True):
    """One role. `keyids` are our key ids; `warning`: somebody must act soon."""

    role: str
    version: int
    expires: datetime
    days_left: float
    threshold: int
    keyids: tuple[str, ...]
    warning: bool


class FileShown(msgspec.Struct, frozen=True):
    """One key file. `keyid` and `key` are empty where the file does not say; `counts_for` are the roles that name the key."""

    file: str
    key: str
    keyid: str
    encrypted: bool
    counts_for: tuple[str, ...]


class OperatorShown(msgspec.Struct, frozen=True):
    """One operator."""

    name: str
    keyid: str
    key: str
    roles: dict[str, tuple[str, ...]]
    pools: tuple[str, ...]


class Shown(msgspec.Struct, frozen=True):
    """Everything. `source` says where the metadata was read; `problem` why no client accepts it, if none does.

    `unencrypted`: a person's key lies here in the clear. `published`: it comes from the bus.
    """

    root: dict[str, str | int]
    source: str
    problem: str
    roles: tuple[RoleShown, ...]
    files: tuple[FileShown, ...]
    operators: tuple[OperatorShown, ...]
    services: dict[str, tuple[str, ...]]
    workspaces: dict[str, WorkspaceRules]
    unencrypted: bool
    published: bool


def look(home: Path, now: datetime) -> Shown:
    """Look at the bus, or where none answers at what was verified last, or at the first repository. Raises Refused."""
    if not (home / "tuf" / "root.json").exists():
        raise Refused(Code.TUF_INVALID, f"there are no keys in {home}", "make them with 'loopback keys init'")
    pinned = trustpublish.pinned_root(home)
    published, source, files, trust_bytes = _source(home)
    problem = ""
    signed: dict[str, Root | Targets | Snapshot | Timestamp] = {}
    trust: Trust | None = None
    with tempfile.TemporaryDirectory(prefix="loopback-keys-") as folder:
        # A memory of its own, and no clock: signatures and versions are checked, and what has expired is shown as well.
        place = Path(folder)
        TrustedRepository.pin(place, pinned)
        repository = TrustedRepository(place, files.get, now=lambda: _BEGINNING)
        try:
            repository.refresh()
            signed = _signed(repository)
            info = repository.find(trustdoc.TARGET)
            content = trust_bytes.get(info.sha256) if info else None
            trust = Trust.decode(content) if content is not None else None
        except Refused as refused:
            problem = refused.reason
    if not signed:
        signed = {"root": signing.parse(Root, pinned)}
    roles = tuple(_role(role, item, signed, now) for role, item in signed.items())
    key_files = tuple(_files(home, signed, trust))
    return Shown(
        root={
            "sha256": hashlib.sha256(pinned).hexdigest(),
            "version": signing.parse(Root, pinned).version,
        },
        source=source,
        problem=problem,
        roles=roles,
        files=key_files,
        operators=tuple(
            OperatorShown(o.name, PublicKey.parse(o.public_key).keyid, o.public_key, dict(o.roles), o.pools)
            for o in (trust.document.operators if trust else ())
        ),
        services={name: tuple(keys) for name, keys in trust.service_keys.items()} if trust else {},
        workspaces=dict(trust.document.workspaces) if trust else {},
        unencrypted=any(not f.encrypted and not f.file.startswith("keys/online/") for f in key_files),
        published=published,
    )


def warnings(shown: Shown) -> list[str]:
    """What somebody must do something about."""
    found = [shown.problem] if shown.problem else []
    for role in shown.roles:
        # The first repository's timestamp lives a day; delivery renews it as soon as it publishes that.
        if role.warning and (shown.published or role.role not in signing.ONLINE):
            what = (
                "delivery should have renewed it: look at its log"
                if role.role in signing.ONLINE
                else f"'loopback keys renew {role.role}'"
            )
            left = f"expires in {role.days_left:.1f} days" if role.days_left > 0 else "has expired"
            found.append(f"{role.role} {left}; {what}")
    return found


def as_json(shown: Shown) -> str:
    """For programs."""
    return msgspec.json.encode(shown).decode()


def as_text(shown: Shown) -> list[str]:
    """For people; key ids are printed whole, since pins are written with them."""
    lines = [
        f"root.json  version {shown.root['version']}, pinned here and on hosts  sha256 {shown.root['sha256']}",
        f"metadata   from {shown.source}",
        "",
        f"{'role':<18} {'version':>7}  {'until':<10} {'left':>9}  keys",
    ]
    for role in shown.roles:
        left = f"{role.days_left:.1f} d" + (" !" if role.warning else "")
        lines.append(
            f"{role.role:<18} {role.version:>7}  {role.expires:%Y-%m-%d} {left:>9}  {role.threshold} of {len(role.keyids)}"
        )
        lines += [f"{'':<20}{keyid}" for keyid in role.keyids]
    lines += ["", "key files here"]
    for file in shown.files:
        state = "encrypted" if file.encrypted else "NOT ENCRYPTED"
        lines.append(f"  {file.file:<34} {state:<14} {', '.join(file.counts_for) or 'counts for nothing'}")
        lines.append(f"    key {file.key or 'unknown'}  id {file.keyid or 'unknown'}")
    if shown.unencrypted:
        lines.append(
            "  These keys are for trying out: whoever reads this disk has them. For more: a new --home and 'keys init'."
        )
    if shown.operators:
        lines += ["", "operators"]
    for operator in shown.operators:
        lines.append(f"  {operator.name}  id {operator.keyid}")
        lines += [f"    {workspace}: {', '.join(roles)}" for workspace, roles in operator.roles.items()]
        if operator.pools:
            lines.append(f"    pools: {', '.join(operator.pools)}")
    for service, keyids in shown.services.items():
        lines += ["", f"{service} signs with"] + [f"  {keyid}" for keyid in keyids]
    if shown.workspaces:
        lines += ["", "rules of workspaces"]
    for workspace, rules in shown.workspaces.items():
        lines.append(f"  {workspace}: {'regulated' if rules.regulated else 'not regulated'}")
        for module, keys in rules.publishers.items():
            lines += [f"    {module} only signed by {keyid}" for keyid in keys]
        for module, floor in rules.floors.items():
            since = f", reported from {floor.not_before.isoformat()}" if floor.not_before else ""
            lines.append(f"    {module} not below {floor.version}{since}")
    return lines


def _source(home: Path) -> tuple[bool, str, Mapping[str, bytes], Mapping[str, bytes]]:
    """Whether metadata is published, where it comes from, its files by name, and trust documents by digest."""
    if (home / "context.toml").exists():
        try:
            files, content = asyncio.run(_from_bus())
            if files:
                return True, f"the bus at {context.load().url}", files, content
        except (nats.errors.Error, OSError):
            pass  # nobody listens; what lies here is shown, and said to be that
    seed = home / "tuf" / "seed"
    blobs = {path.name: path.read_bytes() for path in seed.glob("blobs/*")}
    files = {path.name: path.read_bytes() for path in seed.glob("*.json")}
    return False, f"{seed}: the first repository, since no bus answers", files, blobs


async def _from_bus() -> tuple[dict[str, bytes], dict[str, bytes]]:
    async with context.connect() as session:
        files = await trustpublish.stored_files(session)
        content: dict[str, bytes] = {}
        for name, data in files.items():
            if not name.endswith(".targets.json"):
                continue
            try:
                target = signing.parse(Targets, data).targets.get(trustdoc.TARGET)
                if target is not None and f"{name.split('.')[0]}.targets.json" == _newest(files):
                    digest = target.hashes.get("sha256", "")
                    content[digest] = await session.blob(digest, target.length)
            except (RepositoryError, ValueError, KeyError, Refused):
                continue  # the verification says what is wrong with it
        return files, content


def _newest(files: Mapping[str, bytes]) -> str:
    """The targets file that the stored snapshot names."""
    version = signing.parse(Timestamp, files["timestamp.json"]).snapshot_meta.version
    meta = signing.parse(Snapshot, files[signing.filename("snapshot", version)]).meta
    return signing.filename("targets", meta["targets.json"].version)


def _signed(repository: TrustedRepository) -> dict[str, Root | Targets | Snapshot | Timestamp]:
    targets = signing.parse(Targets, repository.metadata("targets"))
    found: dict[str, Root | Targets | Snapshot | Timestamp] = {
        "root": signing.parse(Root, repository.metadata("root")),
        "targets": targets,
        "snapshot": signing.parse(Snapshot, repository.metadata("snapshot")),
        "timestamp": signing.parse(Timestamp, repository.metadata("timestamp")),
    }
    for role in (targets.delegations.roles if targets.delegations else None) or {}:
        found[role] = signing.parse(Targets, repository.metadata(role))
    return found


def _keys(role: str, signed: Mapping[str, Root | Targets | Snapshot | Timestamp]) -> signing.RoleKeys:
    delegator = signed["root"] if role in signing.TOP_ROLES else signed["targets"]
    assert isinstance(delegator, Root | Targets)
    return signing.role_keys(delegator, role)


def _role(
    role: str,
    item: Root | Targets | Snapshot | Timestamp,
    signed: Mapping[str, Root | Targets | Snapshot | Timestamp],
    now: datetime,
) -> RoleShown:
    threshold, keys = _keys(role, signed)
    left: timedelta = item.expires - now
    return RoleShown(
        role=role,
        version=item.version,
        expires=item.expires,
        days_left=round(left / timedelta(days=1), 2),
        threshold=threshold,
        keyids=tuple(key.keyid for key in keys.values()),
        warning=left < signing.warning(role),
    )


def _files(
    home: Path, signed: Mapping[str, Root | Targets | Snapshot | Timestamp], trust: Trust | None
) -> list[FileShown]:
    counts: dict[str, list[str]] = {}
    for role in signed:
        for key in _keys(role, signed).keys.values():
            counts.setdefault(key.keyid, []).append(role)
    for keyid, operator in (trust.operators if trust else {}).items():
        counts.setdefault(keyid, []).append(f"operator {operator.name}")
    folders = [*keyring.offline_folders(home), home / "keys" / "online", home / "keys" / "operators"]
    found = []
    for file in keyring.key_files(folders):
        inside = file.path.is_relative_to(home)
        name = file.path.relative_to(home).as_posix() if inside else str(file.path)
        keyid = file.public.keyid if file.public else ""
        text = file.public.text if file.public else ""
        found.append(FileShown(name, text, keyid, file.encrypted, tuple(counts.get(keyid, ()))))
    return found
