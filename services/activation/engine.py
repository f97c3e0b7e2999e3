"""Drives the rollouts of one workspace: takes in what was reported, decides, writes, sleeps until something is due.

Every replica runs one for every workspace. All may wake for the same reason; compare-and-set lets one write, and the others
find that nothing is left to decide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from opentelemetry import propagate, trace

from loopback.contracts import journal, subjects
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Presence, Verdict
from loopback.contracts.reports import Status
from loopback.contracts.rolloutstate import Rollout
from loopback.services._runtime import tracing
from loopback.services._runtime.bus import Bus, Conflict, Unavailable
from loopback.services.activation import decide as rules
from loopback.services.activation import documents, facts
from loopback.services.activation.documents import Chain, Draft
from loopback.services.activation.fleet import Fleet
from loopback.services.activation.store import Store, heed_cancellation

log = logging.getLogger(__name__)
IDLE_S: Final = 30.0  # with nothing due it looks again this often
INBOX: Final = 4096  # reports that wait to be journaled; beyond it their consumers wait
LINK_HOSTS: Final = 500  # observations in one link: a few hundred KiB at worst
AGAIN_S: Final = 1.0  # after the broker did not answer

Input = Status | Presence | Verdict


class _Waiting(NamedTuple):
    what: Input
    done: asyncio.Future[None]


class Engine:
    """One workspace."""

    def __init__(self, bus: Bus, store: Store, fleet: Fleet, key: SigningKey, tracer: trace.Tracer) -> None:
        self.bus = bus
        self.store = store
        self.fleet = fleet
        self.key = key
        self.tracer = tracer
        self._inbox: asyncio.Queue[_Waiting] = asyncio.Queue(INBOX)

    async def run(self) -> None:
        """Fold and drive until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.store.run())
            group.create_task(self._drive())

    async def report(self, what: Input) -> None:
        """Hand in something that was verified; returns once it is journaled, or known to be no news."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._inbox.put(_Waiting(what, done))
        self.store.changed.set()
        await done

    async def _drive(self) -> None:
        await self.fleet.caught_up.wait()
        await self.store.caught_up.wait()
        waiting: list[_Waiting] = []
        while True:
            heed_cancellation()
            self.store.changed.clear()
            while not self._inbox.empty() and len(waiting) < INBOX:
                waiting.append(self._inbox.get_nowait())
            try:
                waiting = await self._take_in(waiting)
                wrote = await self._decide()
            except Conflict:
                continue  # another replica was first, and what it wrote is folded: look again
            except Unavailable as error:
                log.warning("workspace %s: %s; trying again", self.store.workspace, error)
                await asyncio.sleep(AGAIN_S)
                continue
            if not wrote:
                await self._sleep()

    async def _sleep(self) -> None:
        state = self.store.state
        times = [t for name in state.attention if (t := rules.due(state.rollouts[name])) is not None]
        seconds = IDLE_S
        if times:
            seconds = min(IDLE_S, max(0.02, (min(times) - await self.bus.now()).total_seconds()))
        try:
            async with asyncio.timeout(seconds):
                await self.store.changed.wait()
        except TimeoutError:
            return

    # Facts

    async def _take_in(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Journal what is news; returns what is still to be taken in (nothing, unless it raises)."""
        if not waiting:
            return []
        # A report may answer a desired state that another replica wrote a moment ago.
        await self.store.synced()
        while True:
            waiting[:] = [w for w in waiting if not w.done.cancelled()]
            found = facts.events(
                self.store.state,
                [w.what for w in waiting if isinstance(w.what, Status)],
                [w.what for w in waiting if isinstance(w.what, Presence)],
                [w.what for w in waiting if isinstance(w.what, Verdict)],
            )
            if not found:
                break
            name, events = next(iter(found.items()))
            await self._write(self.store.state.rollouts[name], _bounded(events))
        for one in waiting:
            if not one.done.done():
                one.done.set_result(None)
        return []

    # Decisions

    async def _decide(self) -> bool:
        """One step of every rollout that has one to take; whether there was any."""
        wrote = False
        for name in list(self.store.state.attention):
            rollout = self.store.state.rollouts[name]
            now = await self.bus.now()
            hosts = self.fleet.hosts.get(self.store.workspace, {})
            events = rules.decide(self.store.state, rollout, now, hosts)
            if events:
                await self._write(rollout, events)
                wrote = True
        return wrote

    async def _write(self, rollout: Rollout, events: Sequence[journal.AnyEvent]) -> None:
        """Store links, and before them the desired states that they mean, as a part of the rollout's one trace."""
        revision = self.store.revision
        parent = propagate.extract({"traceparent": rollout.created.traceparent})
        last = events[-1].name
        now = await self.bus.now()
        if self.store.revision != revision:
            raise Conflict("something was folded in between")
        with self.tracer.start_as_current_span(
            f"decide {last}",
            context=parent,
            kind=trace.SpanKind.PRODUCER,
            attributes={
                "loopback.rollout.id": rollout.id,
                "loopback.workspace": rollout.workspace,
                "loopback.rollout.events": [e.name for e in events],
                "loopback.module": rollout.created.module,
                "messaging.system": "nats",
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": subjects.rollout(rollout.workspace, rollout.id, last),
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            drafts = self._drafts(rollout, events, now, tracing.traceparent())
            span.set_attribute("messaging.batch.message_count", len(drafts))
            try:
                await self.store.write(drafts, revision)
            except Conflict:
                # Two replicas that decide the same at once are the normal case, not an error.
                span.set_attribute("loopback.conflict", True)
                raise
        log.info("rollout %s/%s: %s", rollout.workspace, rollout.id, ", ".join(e.name for e in events))

    def _drafts(
        self, rollout: Rollout, events: Sequence[journal.AnyEvent], now: datetime, traceparent: str
    ) -> list[Draft]:
        chain = Chain.of(rollout)
        links: list[Draft] = []
        desired: list[Draft] = []
        workspace = self.store.workspace
        for event in events:
            links.append(chain.seal(event, now, traceparent))
            if isinstance(event, journal.Assigned):
                states = documents.desired(
                    self.store.state,
                    rollout,
                    event,
                    head=chain.head,
                    records=self._record,
                    environment=self.fleet.environments.get(workspace, "production"),
                    at=now,
                )
                desired.extend(documents.sealed(state, self.key, traceparent) for state in states)
        return desired + links

    def _record(self, host: str) -> Envelope | None:
        found = self.fleet.hosts.get(self.store.workspace, {}).get(host)
        return found.envelope if found else None


def _bounded(events: Sequence[journal.AnyEvent]) -> list[journal.AnyEvent]:
    """The same, with at most LINK_HOSTS observations; the rest is still news afterwards."""
    return [
        msgspec.structs.replace(e, hosts=e.hosts[:LINK_HOSTS]) if isinstance(e, journal.Observed) else e
        for e in events
    ]
