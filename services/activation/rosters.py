"""Rosters: what fills the sets of policies, kept true while host records and pools change (ADR 0020).

One roster for each workspace and source, the same for every host: a change costs this service one message and one slice,
however many hosts follow it. Nothing is decided here that a host would have to believe: the slices hold what operators signed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final

import msgspec
from opentelemetry import metrics

from loopback.contracts import envelope, events, roster, subjects
from loopback.contracts.codes import Refused
from loopback.contracts.desired import START_SKEW
from loopback.contracts.keys import SigningKey
from loopback.contracts.roster import Member, Roster, Source
from loopback.services._runtime.bus import Bus, Conflict, Outgoing, Stored, Unavailable
from loopback.services._runtime.wire import ApiError
from loopback.services.activation.fleet import Fleet
from loopback.services.activation.workspaces import Workspaces

SETTLE_S: Final = 0.5  # after a change: a fleet that is recorded in one go is published in few steps
LOOK_S: Final = 30.0  # without a change it looks again this often whether everything is published

log = logging.getLogger(__name__)


def members(fleet: Fleet, workspace: str, source: Source) -> dict[str, Member]:
    """Who is in it, by name; pure. Hosts without an address fill nothing."""
    if source.pool:
        found = fleet.pools.get(workspace, {}).get(source.pool)
        return {source.pool: Member(found)} if found is not None else {}
    return {
        name: Member(host.envelope, host.claim)
        for name, host in fleet.hosts.get(workspace, {}).items()
        if host.addresses and all(host.labels.get(k) == v for k, v in source.labels.items())
    }


def issued(now: datetime, before: Roster | None) -> datetime:
    """The time of the next roster: later than that of the last, unless hosts do not believe that one either."""
    if before is None or before.issued_at - now > START_SKEW:
        return now
    return max(now, before.issued_at + timedelta(microseconds=1))


class Rosters:
    """Publishes them; every replica does, and compare-and-set lets one write."""

    def __init__(
        self, bus: Bus, fleet: Fleet, workspaces: Workspaces, key: SigningKey, meter: metrics.Meter
    ) -> None:
        self._bus, self._fleet, self._workspaces, self._key = bus, fleet, workspaces, key
        self._published = meter.create_counter("loopback_rosters", description="Rosters published")
        self._true: dict[tuple[str, str], int] = {}  # workspace and source → version of its records

    async def run(self) -> None:
        """Publish what changed, until cancelled."""
        await self._fleet.caught_up.wait()
        wake = self._workspaces.news
        while True:
            wake.clear()
            if not await self._look():
                await asyncio.sleep(SETTLE_S)
                continue
            try:
                async with asyncio.timeout(LOOK_S):
                    await wake.wait()
            except TimeoutError:
                self._true.clear()  # perhaps their stream was wiped
            await asyncio.sleep(SETTLE_S)

    async def _look(self) -> bool:
        """Publish every roster that may have changed; whether all went well. One that cannot be holds up no other."""
        well = True
        for workspace, source in self._stale():
            version = self._fleet.versions.get(workspace, 0)
            try:
                await self._refresh(workspace, source)
            except (Conflict, Unavailable, ApiError, TimeoutError) as error:
                if self._bus.nc.is_closed:
                    raise
                log.info("roster of %s in %s: %s; looking again", source.words, workspace, error)
                well = False
            else:
                self._true[workspace, source.key] = version
        return well

    def _stale(self) -> Iterable[tuple[str, Source]]:
        for workspace, engine in list(self._workspaces.engines.items()):
            version = self._fleet.versions.get(workspace, 0)
            for key, source in list(engine.store.state.sources.items()):
                if self._true.get((workspace, key)) != version:
                    yield workspace, source

    async def _refresh(self, workspace: str, source: Source) -> None:
        """Publish one roster where it is not what is stored.

        The stored one is read first and then the fold catches up: so a replica that knows less never replaces what one that
        knows more has written. Raises Conflict.
        """
        subject = subjects.roster(workspace, source.key)
        stored = await self._bus.last(subjects.STREAM_ROSTERS, subject)
        await self._fleet.catch_up(self._bus, workspace)
        before = _read(stored)
        slices = roster.cut(members(self._fleet, workspace, source))
        if too_large := [len(data) for data in slices if len(data) > roster.MAX_SLICE]:
            log.error(
                "roster of %s in %s is not published: a slice has %d bytes",
                source.words,
                workspace,
                max(too_large),
            )
            return
        digests = roster.digests(slices)
        if before is not None and (before.workspace, before.source, before.slices) == (
            workspace,
            source,
            digests,
        ):
            return
        at = issued(await self._bus.now(), before)
        made = Roster(workspace=workspace, source=source, slices=digests, issued_at=at)
        known = dict(enumerate(before.slices)) if before is not None else {}
        changed = {n: data for n, data in enumerate(slices) if data and known.get(n) != digests[n]}
        await self._bus.batch(
            [*self._slices(made, changed), self._head(made, stored.sequence if stored else 0)]
        )
        self._published.add(1)
        log.info(
            "roster of %s in %s: %d of %d slices are new", source.words, workspace, len(changed), len(slices)
        )

    def _slices(self, made: Roster, changed: Mapping[int, bytes]) -> Iterable[Outgoing]:
        for number, data in changed.items():
            subject = subjects.slice_of(made.workspace, made.source.key, number)
            yield Outgoing(
                subject, data, self._headers(made, f"{number}/{made.slices[number][:16]}", "slice")
            )

    def _head(self, made: Roster, expected: int) -> Outgoing:
        data = envelope.seal_bytes(envelope.ROSTER, msgspec.json.encode(made), self._key)
        subject = subjects.roster(made.workspace, made.source.key)
        return Outgoing(subject, data, self._headers(made, "roster", "roster"), expected)

    @staticmethod
    def _headers(made: Roster, what: str, kind: str) -> dict[str, str]:
        name = f"{subjects.token(made.workspace)}/{made.source.key}/{made.issued_at.timestamp():.6f}/{what}"
        return events.headers(
            event_id=name, source="activation", event_type=kind, subject=made.source.key, at=made.issued_at
        )


def _read(stored: Stored | None) -> Roster | None:
    """The roster that is stored; None for what nobody could read."""
    if stored is None:
        return None
    try:
        return roster.decode(envelope.payload_of(envelope.parse(stored.data)))
    except (Refused, msgspec.MsgspecError, RecursionError):
        return None
