"""The signed records that eligibility accepted, as far as activation needs them: which workspaces and hosts there are."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from loopback.contracts import hostrecord, subjects
from loopback.contracts.codes import Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.envelope import Envelope, payload_of
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import PoolPut, Record, WorkspacePut, decode_command
from loopback.services._runtime.bus import Bus, Stored
from loopback.services.activation.documents import Environment

log = logging.getLogger(__name__)
FILTERS: Final = tuple(subjects.record("*", kind, "*") for kind in ("host", "workspace", "pool"))
CATCH_UP_S: Final = 60.0  # then it is tried again
_RECORDS: Final = Decoder(msgspec.json.Decoder(Record))


class Host(msgspec.Struct, frozen=True):
    """One host's record; `envelope` and `claim` are what it was read from."""

    envelope: Envelope
    labels: dict[str, str]
    key: PublicKey
    claim: Envelope | None = None
    addresses: tuple[str, ...] = ()


class Fleet:
    """Records, folded. `hosts[workspace][host]` and `environments[workspace]` hold what is there and not withdrawn.

    `pools[workspace][pool]` is the newest word on a pool, also one that takes it away; `versions[workspace]` counts changes.
    """

    def __init__(self) -> None:
        self.pools: dict[str, dict[str, Envelope]] = {}
        self.versions: dict[str, int] = {}
        self.hosts: dict[str, dict[str, Host]] = {}
        self.environments: dict[str, Environment] = {}
        self.caught_up = asyncio.Event()
        self.changed = asyncio.Event()
        self._sequences: dict[str, int] = {}
        self._folded = 0
        self._tick = asyncio.Event()

    async def run(self, bus: Bus) -> None:
        """Fold until cancelled."""
        await bus.fold(
            subjects.STREAM_FLEET,
            FILTERS,
            self.fold,
            caught_up=self.caught_up,
            last_per_subject=True,
            after=self._after,
        )

    def _after(self) -> None:
        self.changed.set()
        self._tick.set()
        self._tick = asyncio.Event()

    async def catch_up(self, bus: Bus, workspace: str) -> None:
        """Wait until every record of hosts and pools that the leader has now is folded. Raises TimeoutError."""
        async with asyncio.timeout(CATCH_UP_S):
            for kind in ("host", "pool"):
                newest = await bus.last(subjects.STREAM_FLEET, subjects.record(workspace, kind, "*"))
                while newest is not None and self._folded < newest.sequence:
                    await self._tick.wait()

    def fold(self, stored: Stored) -> None:
        """Take the stream's next record in."""
        self._know(stored)
        self._folded = max(self._folded, stored.sequence)

    def _know(self, stored: Stored) -> None:
        """Take in a record, perhaps ahead of its turn; an older one than is known for its subject changes nothing."""
        if stored.sequence <= self._sequences.get(stored.subject, 0):
            return
        self._sequences[stored.subject] = stored.sequence
        try:
            record = _RECORDS.decode(stored.data)
            self._take(record)
        except (msgspec.MsgspecError, RecursionError, Refused) as error:
            log.error(
                "the record on %s (sequence %d) does not read: %s", stored.subject, stored.sequence, error
            )

    def _take(self, record: Record) -> None:
        self.versions[record.workspace] = self.versions.get(record.workspace, 0) + 1
        if record.kind == hostrecord.KIND:
            found = hostrecord.of(record)
            if found.absent:
                self.hosts.get(found.workspace, {}).pop(found.host, None)
            else:
                self.hosts.setdefault(found.workspace, {})[found.host] = Host(
                    record.envelope,
                    found.labels,
                    PublicKey.parse(found.public_key),
                    record.claim,
                    found.addresses,
                )
            return
        command = decode_command(payload_of(record.envelope))
        if isinstance(command, WorkspacePut):
            self.environments[command.workspace] = command.environment
        elif isinstance(command, PoolPut):
            self.pools.setdefault(command.workspace, {})[command.pool] = record.envelope
        else:
            log.error("a record of kind %r holds a %s", record.kind, type(command).__name__)

    async def refresh(self, bus: Bus, workspace: str, host: str) -> None:
        """Read one host's record from the stream's leader: the fold may be a moment behind."""
        found = await bus.last(subjects.STREAM_FLEET, subjects.record(workspace, "host", host))
        if found is not None:
            self._know(found)

    async def refresh_workspace(self, bus: Bus, workspace: str) -> bool:
        """The same for a workspace's record; whether it exists."""
        if workspace not in self.environments:
            found = await bus.last(subjects.STREAM_FLEET, subjects.record(workspace, "workspace", workspace))
            if found is not None:
                self._know(found)
        return workspace in self.environments

    def key(self, workspace: str, host: str) -> PublicKey | None:
        """The key that the record names."""
        found = self.hosts.get(workspace, {}).get(host)
        return found.key if found else None
