"""A change of trust from its making to its publication: the verified present, signatures at hand, a file for the others.

What is published was checked here first: every file has the signatures that clients ask for. Delivery checks the same again,
and hosts once more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import typer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import context, keyring
from loopback.contracts import subjects, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import MetadataPublish
from loopback.contracts.trustdoc import Trust
from loopback.trust import changes, signing, standing
from loopback.trust.changes import Change
from loopback.trust.repository import MAX_TRUST_DOCUMENT, Fetch, TrustedRepository, write_durably
from loopback.trust.updater import HISTORY

SUFFIX: Final = ".change"


#: Where these keep a client from the present state, what people signed of it may still be built upon.
_STANDS_BY_ITSELF: Final = frozenset(
    {Code.TUF_INVALID, Code.TUF_EXPIRED, Code.TUF_UNREACHABLE, Code.BLOB_MISSING, Code.BLOB_DIGEST}
)


class Present(NamedTuple):
    """The published state on which a change builds: root, targets and each family's releases as files, and the trust document.

    `files` are all stored metadata files by name. `verified` says whether a client accepts the state; where it does not
    (expired, or written by a thief of the online keys), it is what people's signatures vouch for. `versions` are the published
    versions of those roles that are here as of an earlier one.
    """

    root: bytes
    targets: bytes
    families: dict[str, bytes]
    trust: Trust
    files: Mapping[str, bytes] = {}
    verified: bool = True
    versions: Mapping[str, int] = {}

    @property
    def base(self) -> dict[str, bytes]:
        """What a change says it builds on."""
        return {"root": self.root, "targets": self.targets}


def seed_fetch(home: Path) -> Fetch:
    """Fetches from the repository that `init_keys` made, for work before anything runs."""

    def fetch(name: str) -> bytes | None:
        path = home / "tuf" / "seed" / name
        return path.read_bytes() if path.is_file() else None

    return fetch


def repository_at(home: Path, fetch: Fetch) -> TrustedRepository:
    """The operator's own verified view of the repository; its memory is `<home>/tuf/client`. Raises Refused."""
    place = home / "tuf" / "client"
    TrustedRepository.pin(place, pinned_root(home))
    repository = TrustedRepository(place, fetch)
    repository.refresh()
    return repository


def pinned_root(home: Path) -> bytes:
    """The root that this home trusts from the start. Raises Refused where there is none."""
    try:
        return (home / "tuf" / "root.json").read_bytes()
    except FileNotFoundError:
        raise Refused(
            Code.TUF_INVALID, f"there is no root.json in {home / 'tuf'}", "make one with 'loopback keys init'"
        ) from None


async def repository(session: context.Session) -> TrustedRepository:
    """The same, fetched from the bus."""
    files = await stored_files(session)
    return await asyncio.to_thread(repository_at, session.context.home, files.get)


async def stored_files(session: context.Session) -> dict[str, bytes]:
    """Every metadata file on the bus, by name."""
    stored = await session.read(subjects.STREAM_TUF, ["lb.tuf.>"], last=True)
    named = ((subjects.tuf_name(message.subject), message.data) for message in stored)
    return {name: data for name, data in named if name is not None}


def present_of(repository: TrustedRepository, read_blob: Callable[[str, int], bytes]) -> Present:
    """The present state as a client verified it. Raises Refused."""
    trust = repository.trust_document(read_blob)
    targets = repository.metadata("targets")
    parsed = signing.parse(Targets, targets)
    roles = parsed.delegations.roles if parsed.delegations else None
    families = {role: repository.metadata(role) for role in roles or {}}
    return Present(repository.metadata("root"), targets, families, trust)


async def present(session: context.Session) -> Present:
    """The present state from the bus; where no client accepts it, what people signed of it, with a warning on stderr."""
    files = await stored_files(session)
    home = session.context.home
    try:
        trusted = await asyncio.to_thread(repository_at, home, files.get)
        info = await asyncio.to_thread(trusted.find, trustdoc.TARGET)
        if info is None:
            raise Refused(Code.TUF_INVALID, f"the repository has no {trustdoc.TARGET}")
        content = await session.blob(info.sha256, info.length)
        found = await asyncio.to_thread(present_of, trusted, lambda _digest, _size: content)
        return found._replace(files=files)
    except Refused as refused:
        if refused.code not in _STANDS_BY_ITSELF:
            raise
        typer.echo(
            f"warning: no host accepts the repository as it is now: {refused.reason}\n"
            "  this builds on what people signed of it; look closely at what it says it does",
            err=True,
        )
    return await salvage(session, files)


async def salvage(session: context.Session, files: Mapping[str, bytes]) -> Present:
    """What stands by people's signatures alone, and by nothing older than this home's client has verified. Raises Refused."""
    home = session.context.home
    files = {**files, **await asyncio.to_thread(remembered, home)}
    found = standing.standing(pinned_root(home), files)
    content = await _document(session, found.targets)
    return Present(found.root, found.targets, found.families, Trust.decode(content), files, verified=False)


def remembered(home: Path) -> dict[str, bytes]:
    """What this home's client verified and kept of what people sign, by name: nobody can withhold that from it."""
    place = home / "tuf" / "client"
    found = {path.name: path.read_bytes() for path in (place / HISTORY).glob("*.root.json") if path.is_file()}
    for path in (place / "targets.json", *place.glob("module-*.json")):
        with contextlib.suppress(RepositoryError, ValueError, FileNotFoundError):  # damaged, or none
            data = path.read_bytes()
            found[signing.filename(path.stem, signing.parse(Targets, data).version)] = data
    return found


async def as_of(session: context.Session, present: Present, versions: Mapping[str, int]) -> Present:
    """The present state with these roles as they were in an earlier version, before somebody else signed a later one.

    Raises Refused where no such version is stored, or it was not signed by the keys that count.
    """
    root, targets = signing.parse(Root, present.root), signing.parse(Targets, present.targets)
    for role, version in versions.items():
        delegator = root if role == "targets" else targets
        data = present.files.get(signing.filename(role, version), b"")
        if not standing.verifies(delegator, role, data, version):
            raise Refused(
                Code.TUF_INVALID,
                f"there is no version {version} of {role} that its keys signed",
                "name one that 'loopback keys show' showed before",
            )
        now = present.targets if role == "targets" else present.families[role]
        known = {**present.versions, role: signing.parse(Targets, now).version}
        if role == "targets":
            content = await _document(session, data)
            newest = present.trust.document.version
            document = msgspec.structs.replace(
                Trust.decode(content).document, version=max(newest, Trust.decode(content).document.version)
            )
            present = present._replace(targets=data, trust=Trust(document), versions=known)
        else:
            present = present._replace(families={**present.families, role: data}, versions=known)
    return present


async def _document(session: context.Session, targets: bytes) -> bytes:
    """The trust document that these targets name. Raises Refused."""
    target = signing.parse(Targets, targets).targets.get(trustdoc.TARGET)
    if target is None or target.length > MAX_TRUST_DOCUMENT:
        raise Refused(Code.TUF_INVALID, f"the targets name no usable {trustdoc.TARGET}")
    return await session.blob(target.hashes.get("sha256", ""), target.length)


def sign_at_hand(home: Path, change: Change) -> Change:
    """Add signatures of keys at hand until nothing is missing, or no key is left; only keys that are needed are opened."""
    for key in keyring.ring().opened():
        change = changes.sign(change, key)
    tried: set[Path] = set()
    while True:
        lacking = [need for need in changes.needs(change) if need.missing]
        absent = [key for need in lacking for i, key in need.keys.items() if i not in need.have]
        paths = [p for p in keyring.files_of(home, absent) if p not in tried]
        if not paths:
            return change
        tried.add(paths[0])
        change = changes.sign(change, keyring.ring().open(paths[0]))


def encode(metadata: Mapping[str, bytes]) -> dict[str, str]:
    """Metadata files as commands carry them."""
    return {name: base64.b64encode(data).decode() for name, data in metadata.items()}


async def publish(
    session: context.Session, change: Change, leaves: Callable[[], None] = lambda: None
) -> None:
    """Store the content and have delivery publish the metadata. Raises Refused, also below a threshold.

    `leaves` is called right before the signatures go out: whatever is answered then is the word of whoever has the broker.
    """
    if change.base and (lacking := await asyncio.to_thread(changes.missing, change)):
        raise Refused(Code.TUF_INVALID, lacking, "collect them: 'loopback keys sign FILE' on each machine")
    for data in change.blobs:
        await session.put_blob(data)
    leaves()
    await session.send(
        MetadataPublish(
            **context.new_command_fields(subjects.GLOBAL_WORKSPACE), metadata=encode(change.metadata)
        ),
        "delivery",
    )


async def finish(
    session: context.Session, change: Change, out: Path | None, leaves: Callable[[], None] = lambda: None
) -> bool:
    """Sign with what is at hand and publish; or write it to a file where signatures are missing, or `out` asks for it.

    Whether it was published. `leaves` as for `publish`.
    """
    home = session.context.home
    change = await asyncio.to_thread(sign_at_hand, home, change)
    lacking = await asyncio.to_thread(changes.missing, change)
    if out is None and not lacking:
        await publish(session, change, leaves)
        return True
    path = await asyncio.to_thread(_pending, home, change) if out is None else out
    await asyncio.to_thread(write, path, change)
    typer.echo(f"nothing is published yet: the change is in {path}", err=True)
    typer.echo(next_step(path, lacking), err=True)
    return False


def next_step(path: Path, lacking: str) -> str:
    """What to do with a change's file."""
    if lacking:
        return (
            f"  {lacking}\n"
            f"  next: 'loopback keys sign {path}' where a missing key is, then 'loopback keys publish {path}'"
        )
    return f"  every signature is there; next: 'loopback keys publish {path}'"


def signatures(change: Change) -> int:
    """How many signatures that count a change has."""
    return sum(len(need.have) for need in changes.needs(change))


def write(path: Path, change: Change) -> None:
    """Write a change's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, changes.encode(change), 0o600)


def read(path: Path) -> Change:
    """Read a change's file. Raises Refused."""
    try:
        if path.stat().st_size > changes.MAX_CHANGE:
            raise Refused(Code.TUF_INVALID, f"{path} is too large for a change")
        return changes.decode(path.read_bytes(), str(path))
    except OSError as error:
        raise Refused(
            Code.TUF_INVALID, f"{path} does not read: {error.strerror}", "name the change's file"
        ) from None


def put_into_inbox(home: Path, change: Change, name: str) -> Path:
    """Lay a complete change where delivery of this home picks it up by itself: needs no operator's key. Raises Refused."""
    if lacking := changes.missing(change):
        raise Refused(Code.TUF_INVALID, lacking, "collect them: 'loopback keys sign FILE' on each machine")
    path = home / "tuf" / "inbox" / f"{name.removesuffix(SUFFIX)}{SUFFIX}"
    write(path, change)
    return path


def _pending(home: Path, change: Change) -> Path:
    name = "-".join(sorted(file.removesuffix(".json") for file in change.metadata))
    folder = home / "pending"
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / f"{name}{SUFFIX}", 2
    while os.path.lexists(path):
        path, number = folder / f"{name}-{number}{SUFFIX}", number + 1
    return path


def opened_or_refuse(home: Path, role: signing.RoleKeys, what: str, next_step: str) -> list[SigningKey]:
    """As many keys of a role as must sign. Raises Refused(SIGNATURE_INVALID) where fewer are at hand."""
    found = [key for key in keyring.ring().opened() if key.keyid in {k.keyid for k in role.keys.values()}]
    for path in keyring.files_of(home, role.keys.values()):
        if len(found) >= role.threshold:
            break
        key = keyring.ring().open(path)
        if key not in found:
            found.append(key)
    if len(found) < role.threshold:
        raise Refused(Code.SIGNATURE_INVALID, f"there is no key for {what} at hand", next_step)
    return found[: role.threshold]
