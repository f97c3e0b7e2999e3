"""What telemetry knows: host records (for their keys), the fleet view in its bucket, and what was said of presence.

The bucket is the truth; this is every replica's copy of it, folded from the bucket's stream. Writes compare and set on the
bucket's revision, so replicas share the work without knowing of each other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, Protocol

import msgspec

from loopback.contracts import hostrecord, subjects, view
from loopback.contracts.codes import Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import Presence, Record
from loopback.contracts.view import HostView
from loopback.services._runtime.wire import Outgoing, Stored

Host = tuple[str, str]  # workspace, host

OPERATION: Final = "KV-Operation"  # NATS's own header of a bucket's deletions
ROLLUP: Final = "Nats-Rollup"
RECORDS: Final = "lb.ws.*.record.>"
PRESENCES: Final = "lb.ws.*.presence.*"


class Reader(Protocol):
    """The part of the bus that folds."""

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


class Known(msgspec.Struct, frozen=True):
    """A host's view at a revision of the bucket; `view` is None where its key was never there or was purged."""

    revision: int
    view: HostView | None


class FleetStore:
    """The fold. `changed` is called with each newer view, and with None where a host's record was withdrawn."""

    def __init__(self, log: logging.Logger) -> None:
        self.workspaces: set[str] = set()
        self.keys: dict[Host, PublicKey] = {}
        self.withdrawn: set[Host] = set()
        self.known: dict[Host, Known] = {}
        self.said: dict[Host, Presence] = {}
        self.changed: Callable[[HostView | None], None] = lambda _: None
        self._record_sequence: dict[Host, int] = {}
        self._log = log

    def folds(self, bus: Reader, ready: Callable[[], asyncio.Event]) -> Iterable[Coroutine[Any, Any, None]]:
        """The coroutines that keep this up to date; each runs forever and sets its event when it has caught up."""
        for stream, subject, on in (
            (subjects.STREAM_FLEET, RECORDS, self.fold_record),
            (subjects.STREAM_FLEET, PRESENCES, self.fold_presence),
            (view.STREAM, view.EVERY_SUBJECT, self.fold_view),
        ):
            yield bus.fold(stream, [subject], on, caught_up=ready(), last_per_subject=True)

    def fold_record(self, stored: Stored) -> None:
        """Take a record in: keys of hosts, names of workspaces."""
        try:
            record = msgspec.json.decode(stored.data, type=Record)
            if record.kind == "workspace":
                self.workspaces.add(record.workspace)
            elif record.kind == hostrecord.KIND:
                found = hostrecord.of(record)
                host = (record.workspace, record.name)
                if stored.sequence < self._record_sequence.get(host, 0):
                    return
                self._record_sequence[host] = stored.sequence
                if found.absent:
                    self.keys.pop(host, None)
                    self.withdrawn.add(host)
                    self.changed(None)
                else:
                    self.keys[host] = PublicKey.parse(found.public_key)
                    self.withdrawn.discard(host)
        except (msgspec.MsgspecError, Refused) as error:
            self._log.warning("%s #%d left out: %s", stored.subject, stored.sequence, error)

    def fold_presence(self, stored: Stored) -> None:
        """Take in what was said of a host's presence."""
        try:
            presence = msgspec.json.decode(stored.data, type=Presence)
        except msgspec.MsgspecError as error:
            self._log.warning("%s #%d left out: %s", stored.subject, stored.sequence, error)
            return
        self.said[presence.workspace, presence.host] = presence

    def fold_view(self, stored: Stored) -> None:
        """Take in one revision of one host's view."""
        try:
            _, _, workspace, host = stored.subject.split(".")
            key = (subjects.untoken(workspace), subjects.untoken(host))
            self.learn(key, read_view(stored))
        except (ValueError, msgspec.MsgspecError, Refused) as error:
            self._log.warning("%s #%d left out: %s", stored.subject, stored.sequence, error)

    def learn(self, host: Host, known: Known) -> None:
        """Remember a revision, unless a newer one is known."""
        if known.revision > self.revision(host):
            self.known[host] = known
            if known.view is not None:
                self.changed(known.view)

    def revision(self, host: Host) -> int:
        """The newest known revision of a host's key; 0 where it was never there."""
        known = self.known.get(host)
        return known.revision if known else 0

    def view(self, host: Host) -> HostView | None:
        """A host's view."""
        known = self.known.get(host)
        return known.view if known else None

    def views(self) -> list[HostView]:
        """Every host's view. A copy, so that another thread (metrics) may walk through it."""
        return [known.view for known in list(self.known.values()) if known.view is not None]

    def owner(self, keyid: str) -> Host | None:
        """The host whose recorded key has this id."""
        return next((host for host, key in self.keys.items() if key.keyid == keyid), None)


def read_view(stored: Stored) -> Known:
    """A revision as the bucket's stream holds it. Raises msgspec.ValidationError."""
    gone = stored.headers.get(OPERATION) in ("DEL", "PURGE")
    return Known(stored.sequence, None if gone else view.decode(stored.data))


def write_view(host: Host, after: HostView, revision: int) -> Outgoing:
    """The message that stores a view over exactly this revision."""
    return Outgoing(view.subject(*host), msgspec.json.encode(after), expected_subject_seq=revision)


def purge_view(host: Host, revision: int) -> Outgoing:
    """The message that takes a host's view out of the bucket, if it is still at this revision."""
    return Outgoing(
        view.subject(*host), b"", {OPERATION: "PURGE", ROLLUP: "sub"}, expected_subject_seq=revision
    )
