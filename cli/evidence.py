"""What an audit rests on: the signed bytes themselves, read from the bus once, or from a file without any bus.

Nothing in here is believed for having been stored. `trusted` verifies the trust documents against the pinned root; the rest is
verified by whoever reads it (`auditing`, `witnessing`).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import nats.js.errors
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]  # tuf says no __all__

from loopback.cli import context, trustpublish
from loopback.contracts import subjects, trustdoc, view
from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.messages import Record, Release
from loopback.contracts.trustdoc import Trust
from loopback.trust import repository, signing
from loopback.trust.repository import TargetInfo, TrustedRepository

MAX_FILE: Final = (
    2 * 1024**3
)  # bytes of an evidence file that is read at all; 10,000 links and 1,000 hosts make about 60 MB
MAX_EARLIER: Final = (
    64  # trust documents before the current one; a signature by a key of one further back is not verifiable
)


class Stored(msgspec.Struct, frozen=True):
    """One stored message; `time` is the broker's stamp."""

    subject: str
    data: bytes
    sequence: int
    time: datetime


class Stream(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the broker says of a stream. `deleted` counts messages that are gone from its middle."""

    name: str
    created: datetime | None = None
    first: int = 0
    last: int = 0
    deleted: int = 0


class Evidence(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="evidence"):
    """Everything about one workspace, as stored. Version 1; `at` is when reading began.

    `journal` has services' entries and results, those of the reserved workspace `global` (releases) too; `reports` the newest
    signed status and inventory of each host, `views` telemetry's. `metadata` holds TUF files by name, `documents` trust
    documents by SHA-256.
    """

    version: int = 1
    workspace: str
    at: datetime
    streams: tuple[Stream, ...] = ()
    reports: tuple[Stored, ...] = ()
    views: tuple[Stored, ...] = ()
    records: tuple[Stored, ...] = ()
    commands: tuple[Stored, ...] = ()
    journal: tuple[Stored, ...] = ()
    links: tuple[Stored, ...] = ()
    catalog: tuple[Stored, ...] = ()
    metadata: dict[str, bytes] = {}
    documents: dict[str, bytes] = {}

    def stream(self, name: str) -> Stream | None:
        """What was read of a stream."""
        return next((s for s in self.streams if s.name == name), None)


RECORDS: Final = Decoder(msgspec.json.Decoder(Record))
_RELEASES: Final = Decoder(msgspec.json.Decoder(Release))
_EVIDENCE: Final = Decoder(msgspec.json.Decoder(Evidence))


async def gather(session: context.Session, workspace: str, at: datetime) -> Evidence:
    """Read everything, each stream once. What hosts witnessed is read before the journal, which has only grown since."""
    place, everywhere = subjects.token(workspace), subjects.GLOBAL_WORKSPACE
    own, general = subjects.workspace_stream(workspace), subjects.workspace_stream(everywhere)
    said = [subjects.from_host(workspace, "*", what) for what in ("status", "inventory")]
    reports = await _read(session, subjects.STREAM_REPORTS, said, last=True)
    views = await _read(session, view.STREAM, [f"$KV.{subjects.BUCKET_VIEW}.{place}.*"], last=True)
    prefix = f"lb.ws.{place}"
    decided = await _read(session, own, [f"{prefix}.rollout.>", f"{prefix}.journal.>", f"{prefix}.result.*"])
    elsewhere = f"lb.ws.{everywhere}"
    released = (
        await _read(session, general, [f"{elsewhere}.journal.>", f"{elsewhere}.result.*"])
        if own != general
        else ()
    )
    asked = [f"{prefix}.cmd.>"] + ([f"{elsewhere}.cmd.>"] if own != general else [])
    metadata = await trustpublish.stored_files(session)
    return Evidence(
        workspace=workspace,
        at=at,
        streams=tuple([await _stream(session, name) for name in (own, subjects.STREAM_COMMANDS)]),
        reports=reports,
        views=views,
        records=await _read(session, subjects.STREAM_FLEET, [f"{prefix}.record.>"]),
        commands=await _read(session, subjects.STREAM_COMMANDS, asked),
        journal=(*(m for m in decided if not m.subject.startswith(f"{prefix}.rollout.")), *released),
        links=tuple(m for m in decided if m.subject.startswith(f"{prefix}.rollout.")),
        catalog=await _read(session, subjects.STREAM_CATALOG, ["lb.catalog.>"], last=True),
        metadata=metadata,
        documents=await _documents(session, metadata),
    )


async def _read(
    session: context.Session, stream: str, filters: list[str], *, last: bool = False
) -> tuple[Stored, ...]:
    return tuple(
        Stored(m.subject, m.data, m.sequence, m.time) for m in await session.read(stream, filters, last=last)
    )


async def _stream(session: context.Session, name: str) -> Stream:
    try:
        found = await session.js.stream_info(name)
    except nats.js.errors.NotFoundError:
        return Stream(name)
    state = found.state
    return Stream(name, found.created, state.first_seq, state.last_seq, state.num_deleted or 0)


async def _documents(session: context.Session, metadata: dict[str, bytes]) -> dict[str, bytes]:
    """The content of every trust document that stored targets metadata names, as far as it is stored."""
    found: dict[str, bytes] = {}
    for _, targets in _targets(metadata)[: MAX_EARLIER + 1]:
        info = targets.signed.targets.get(trustdoc.TARGET)
        digest = str(info.hashes.get("sha256", "")) if info else ""
        if info is None or digest in found or info.length > repository.MAX_TRUST_DOCUMENT:
            continue
        try:
            found[digest] = await session.blob(digest, info.length)
        except Refused:
            continue  # the current one is missed by `trusted`, an earlier one by those who ask for its keys
    return found


def _targets(metadata: dict[str, bytes]) -> list[tuple[int, Metadata[Targets]]]:
    """Stored versions of the top-level targets, newest first; nothing of them is verified."""
    found = []
    for name, data in metadata.items():
        number, _, rest = name.partition(".")
        if rest == "targets.json" and number.isdecimal():
            try:
                found.append((int(number), Metadata[Targets].from_bytes(data)))
            except RepositoryError:
                continue
    return sorted(found, key=lambda one: -one[0])


# Files


def save(evidence: Evidence, path: Path) -> None:
    """Write a file that `load` reads. Raises OSError."""
    path.write_bytes(msgspec.json.encode(evidence))


def load(path: Path) -> Evidence:
    """Read such a file. Raises Refused(CONFIG_INVALID) where it is none, OSError."""
    if path.stat().st_size > MAX_FILE:
        raise Refused(
            Code.CONFIG_INVALID, f"{path} has more than {MAX_FILE} bytes", "it is no evidence of ours"
        )
    try:
        found = _EVIDENCE.decode(path.read_bytes())
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(
            Code.CONFIG_INVALID,
            f"{path} is no evidence file: {error}",
            "make one with 'loopback audit --export FILE'",
        ) from None
    if found.version != 1:
        raise Refused(
            Code.CONFIG_INVALID, f"{path} is evidence of version {found.version}; this command reads version 1",
            "use the command line that wrote it",
        )  # fmt: skip
    return found


# Trust


class Role(msgspec.Struct, frozen=True, kw_only=True):
    """One role of the TUF repository: how many of its keys must sign, which did, and until when that counts."""

    name: str
    version: int
    threshold: int
    keyids: tuple[str, ...]
    signers: tuple[str, ...]
    expires: datetime


class Trusted(NamedTuple):
    """The verified trust document, those before it (newest first), and what the repository says of releases.

    `targets` has the verified target of each release in the catalog, None where nobody entitled to has signed it; `roles` every
    role that the current metadata names. `expired` says why metadata was judged at the time of the evidence, where it was.
    """

    trust: Trust
    earlier: tuple[Trust, ...]
    targets: dict[str, TargetInfo | None]
    roles: tuple[Role, ...]
    expired: str = ""


def trusted(evidence: Evidence, root: bytes, memory: Path, now: datetime, *, offline: bool) -> Trusted:
    """Verify the trust documents in the evidence. `memory` is the folder of the TUF client.

    Metadata in a file may have expired since it was read: then it counts as of that time, and that is said. Blocking.
    Raises Refused(TUF_*).
    """
    expired = ""
    try:
        found = _repository(evidence, root, memory, now)
    except Refused as refused:
        if not (offline and refused.code is Code.TUF_EXPIRED):
            raise
        expired = refused.reason
        found = _repository(evidence, root, memory, evidence.at)
    trust = found.trust_document(lambda sha256, _: _document(evidence, sha256))
    targets: dict[str, TargetInfo | None] = {}
    for release in releases(evidence):
        targets[release.target] = found.find(release.target)
    modules = sorted({release.module for release in releases(evidence)})
    return Trusted(
        trust, tuple(_earlier(evidence, root, trust)), targets, tuple(_roles(found, modules)), expired
    )


def releases(evidence: Evidence) -> list[Release]:
    """What the catalog has; what does not read as a release is left out."""
    found = []
    for stored in evidence.catalog:
        try:
            found.append(_RELEASES.decode(stored.data))
        except (msgspec.MsgspecError, RecursionError):
            continue
    return found


def _roles(found: TrustedRepository, modules: Iterable[str]) -> Iterable[Role]:
    root = signing.parse(Root, found.metadata("root"))
    targets = signing.parse(Targets, found.metadata("targets"))
    delegators: list[tuple[str, Root | Targets]] = [
        (name, root) for name in ("root", "targets", "snapshot", "timestamp")
    ]
    known = targets.delegations.roles if targets.delegations and targets.delegations.roles else {}
    delegators += [(role, targets) for m in modules if (role := signing.delegated_role(m)) in known]
    for name, delegator in delegators:
        try:
            data = found.metadata(name)
        except Refused:
            continue
        signed = Metadata[Any].from_bytes(data).signed
        needed = signing.role_keys(delegator, name)
        yield Role(
            name=name,
            version=signed.version,
            threshold=needed.threshold,
            keyids=tuple(sorted({key.keyid for key in needed.keys.values()})),
            signers=tuple(sorted({needed.keys[k].keyid for k in signing.signed_by(data, delegator, name)})),
            expires=signed.expires,
        )


def _repository(evidence: Evidence, root: bytes, memory: Path, now: datetime) -> TrustedRepository:
    TrustedRepository.pin(memory, root)
    found = TrustedRepository(memory, evidence.metadata.get, now=lambda: now)
    found.refresh()
    return found


def _document(evidence: Evidence, sha256: str) -> bytes:
    found = evidence.documents.get(sha256)
    if found is None:
        raise Refused(
            Code.BLOB_MISSING, f"the trust document {sha256[:12]} is not stored", "publish it again"
        )
    return found


def _earlier(evidence: Evidence, pinned: bytes, current: Trust) -> Iterable[Trust]:
    """Trust documents of before, each under targets metadata that a root of the pinned chain's targets keys signed."""
    roots = [Metadata[Root].from_bytes(pinned)]
    while (data := evidence.metadata.get(f"{roots[-1].signed.version + 1}.root.json")) is not None:
        try:
            new = Metadata[Root].from_bytes(data)
            for signer in (roots[-1].signed, new.signed):
                signer.verify_delegate(Root.type, new.signed_bytes, new.signatures)
        except RepositoryError:
            break
        roots.append(new)
    known = {msgspec.json.encode(current.document)}
    for _, targets in _targets(evidence.metadata):
        info = targets.signed.targets.get(trustdoc.TARGET)
        if info is None or not any(_signed(root.signed, targets) for root in roots):
            continue
        data = evidence.documents.get(str(info.hashes.get("sha256", "")))
        try:
            if data is None:
                continue
            info.verify_length_and_hashes(data)
            found = Trust.decode(data)
        except (RepositoryError, Refused):
            continue
        same = msgspec.json.encode(found.document)
        if same not in known:
            known.add(same)
            yield found


def _signed(root: Root, targets: Metadata[Targets]) -> bool:
    try:
        root.verify_delegate(Targets.type, targets.signed_bytes, targets.signatures)
    except RepositoryError:
        return False
    return True


async def verified(evidence: Evidence, root: bytes, memory: Path | None, now: datetime) -> Trusted:
    """`trusted`, in a thread; without a `memory` in a passing folder, as for evidence from a file."""

    def run() -> Trusted:
        if memory is not None:
            return trusted(evidence, root, memory, now, offline=False)
        with tempfile.TemporaryDirectory(prefix="loopback-audit-") as folder:
            return trusted(evidence, root, Path(folder), now, offline=True)

    return await asyncio.to_thread(run)
