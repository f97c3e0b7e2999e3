"""What eligibility knows: records, releases, inventories and offers, folded from their streams by every replica alike.

Nothing is kept anywhere else. A decision that must not miss anything calls `caught_up` first: it asks the leader for the
newest message of each kind and waits until the fold has it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from enum import Enum
from typing import Any, Final, Protocol

import msgspec

from loopback.contracts import hostrecord, reports, subjects
from loopback.contracts.codes import Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.envelope import Envelope, payload_of
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import (
    EntitlementPut,
    HostMove,
    Offer,
    Record,
    Release,
    WorkspacePut,
    decode_command,
)
from loopback.contracts.reports import Inventory
from loopback.services._runtime.wire import Stored

Host = tuple[str, str]  # workspace, host
CATCH_UP_S: Final = (
    60.0  # then the message is handled again later; twice the bus's own patience with the broker
)
_RECORDS: Final[Decoder[Record]] = Decoder(msgspec.json.Decoder(Record))
_OFFERS: Final[Decoder[Offer]] = Decoder(msgspec.json.Decoder(Offer))
_RELEASES: Final[Decoder[Release]] = Decoder(msgspec.json.Decoder(Release))


class Source(Enum):
    """What is folded: a stream and a filter."""

    RECORDS = (subjects.STREAM_FLEET, "lb.ws.*.record.>")
    OFFERS = (subjects.STREAM_FLEET, "lb.ws.*.offer.*")
    RELEASES = (subjects.STREAM_CATALOG, "lb.catalog.>")
    INVENTORIES = (subjects.STREAM_REPORTS, "lb.ws.*.from.*.inventory")

    @property
    def stream(self) -> str:
        """The stream's name."""
        return self.value[0]

    @property
    def filter(self) -> str:
        """The subjects within it."""
        return self.value[1]


INPUTS: Final = (Source.RECORDS, Source.RELEASES, Source.INVENTORIES)


class Reader(Protocol):
    """The part of the bus that this needs."""

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The last stored message of a subject or filter, from the leader."""

    def fold(
        self,
        stream: str,
        filters: list[str],
        on: Callable[[Stored], None],
        *,
        caught_up: asyncio.Event,
        last_per_subject: bool = False,
    ) -> Coroutine[Any, Any, None]:
        """Call `on` for everything stored, and then for everything that comes; forever."""


class Fleet:
    """The fold. `workspace_appeared` is called once for each workspace, as soon as its record is known."""

    def __init__(
        self, log: logging.Logger, workspace_appeared: Callable[[str], None] = lambda _: None
    ) -> None:
        self.workspaces: dict[str, WorkspacePut] = {}
        self.hosts: dict[Host, HostRecord] = {}
        self.moved: dict[
            Host, tuple[HostMove, Envelope]
        ] = {}  # by where they were, with the command that took them away
        self.entitlements: dict[tuple[str, str], EntitlementPut] = {}
        self.releases: dict[tuple[str, str], Release] = {}  # by module and digest
        self.inventories: dict[Host, Inventory] = {}
        self.offers: dict[Host, tuple[int, Offer]] = {}  # with the sequence under which it is stored
        self._unverified: dict[Host, Stored] = {}
        self._log = log
        self._workspace_appeared = workspace_appeared
        self._folded = dict.fromkeys(Source, 0)
        self._waiting: list[tuple[Source, int, asyncio.Future[None]]] = []

    def folds(self, bus: Reader, ready: dict[Source, asyncio.Event]) -> Iterable[Coroutine[Any, Any, None]]:
        """The coroutines that keep this up to date; each runs forever and sets its event when it has caught up."""
        for source in Source:
            yield bus.fold(
                source.stream,
                [source.filter],
                lambda stored, source=source: self.fold(source, stored),  # type: ignore[misc]  # a default binds it now
                caught_up=ready[source],
                last_per_subject=True,
            )

    def fold(self, source: Source, stored: Stored) -> None:
        """Take one message in. What does not decode is logged and left out: nobody but services writes there."""
        try:
            match source:
                case Source.RECORDS:
                    self._record(_RECORDS.decode(stored.data))
                case Source.OFFERS:
                    offer = _OFFERS.decode(stored.data)
                    self.offers[offer.workspace, offer.host] = (stored.sequence, offer)
                case Source.RELEASES:
                    release = _RELEASES.decode(stored.data)
                    self.releases[release.module, release.digest] = release
                case Source.INVENTORIES:
                    workspace, host, _ = reports.sender(stored.subject)
                    self._unverified[workspace, host] = stored
                    self._inventory((workspace, host))
        except (msgspec.MsgspecError, RecursionError, Refused) as error:
            self._log.warning("%s #%d left out: %s", stored.subject, stored.sequence, error)
        self._advance(source, stored.sequence)

    async def caught_up(self, bus: Reader, *sources: Source) -> None:
        """Wait until everything of these sources that the leader has now is folded. Raises TimeoutError."""
        async with asyncio.timeout(CATCH_UP_S):
            for source in sources:
                newest = await bus.last(source.stream, source.filter)
                if newest is not None and self._folded[source] < newest.sequence:
                    arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiting.append((source, newest.sequence, arrived))
                    await arrived

    def entitlements_of(self, workspace: str) -> list[EntitlementPut]:
        """Every entitlement of a workspace."""
        return [e for (place, _), e in self.entitlements.items() if place == workspace]

    def hosts_of(self, workspace: str) -> list[Host]:
        """Every host of a workspace that has, or had, a record."""
        return [key for key in self.hosts if key[0] == workspace]

    def owner(self, public_key: str) -> Host | None:
        """The host whose record holds this key."""
        return next(
            (key for key, h in self.hosts.items() if not h.absent and h.public_key.lower() == public_key),
            None,
        )

    def _record(self, record: Record) -> None:
        if record.kind == hostrecord.KIND:
            self._host(record)
            return
        if record.kind in (hostrecord.INVITE, "pool"):
            return  # nobody's yet, and nothing that offers depend on
        command = decode_command(payload_of(record.envelope))
        match command:
            case WorkspacePut():
                subjects.workspace_stream(record.name)  # refuses a name that no stream can have
                self.workspaces[record.name] = command
                self._workspace_appeared(record.name)
            case EntitlementPut():
                self.entitlements[record.workspace, record.name] = command
            case _:
                self._log.warning("a record of kind %r holds another command", record.kind)

    def _host(self, record: Record) -> None:
        after = hostrecord.of(record)
        key = (record.workspace, record.name)
        before = self.hosts.get(key)
        self.hosts[key] = after
        self.moved.pop(key, None)
        command = decode_command(payload_of(record.envelope))
        if isinstance(command, HostMove) and after.absent:
            self.moved[key] = command, record.envelope
        if before is None or (before.public_key, before.absent) != (after.public_key, after.absent):
            self.inventories.pop(key, None)
            self._inventory(key)

    def _inventory(self, key: Host) -> None:
        """Believe the newest inventory if the recorded key signed it; records and inventories come in any order."""
        stored, record = self._unverified.get(key), self.hosts.get(key)
        if stored is None or record is None or record.absent:
            return
        public_key = PublicKey.parse(record.public_key)
        try:
            report = reports.open_report(stored.data, stored.subject, lambda *_: public_key)
        except Refused as error:
            self._log.warning("%s #%d is not believed: %s", stored.subject, stored.sequence, error)
            return
        known = self.inventories.get(key)
        late = known is not None and known.incarnation == report.incarnation and known.seq > report.seq
        if isinstance(report, Inventory) and not late:
            self.inventories[key] = report

    def _advance(self, source: Source, sequence: int) -> None:
        self._folded[source] = max(self._folded[source], sequence)
        still = []
        for waiting in self._waiting:
            if waiting[0] is source and waiting[1] <= self._folded[source]:
                if not waiting[2].done():
                    waiting[2].set_result(None)
            elif not waiting[2].done():
                still.append(waiting)
        self._waiting = still
