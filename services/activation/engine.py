"""Drives the rollouts of one workspace: takes in what was reported, decides, writes, sleeps until something is due.

Every replica runs one for every workspace. All may wake for the same reason; compare-and-set lets one write, and the others
find that nothing is left to decide.

What goes wrong in one rollout sets that rollout aside for a while, and nothing else: `_apart`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from opentelemetry import metrics, propagate, trace

from loopback.contracts import journal, subjects
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Presence, Verdict
from loopback.contracts.reports import Status
from loopback.contracts.rolloutstate import Rollout
from loopback.services._runtime import tracing
from loopback.services._runtime.bus import Bus, Conflict, Unavailable
from loopback.services._runtime.wire import TooLarge
from loopback.services.activation import decide as rules
from loopback.services.activation import documents, facts, sizes
from loopback.services.activation.documents import Chain, Draft
from loopback.services.activation.fleet import Fleet
from loopback.services.activation.setbacks import Setbacks
from loopback.services.activation.store import MAX_LINK, Store, heed_cancellation

log = logging.getLogger(__name__)
IDLE_S: Final = 30.0  # with nothing due it looks again this often
INBOX: Final = 4096  # reports that wait to be journaled; beyond it their consumers wait
AGAIN_S: Final = 1.0  # after the broker did not answer

_EVERYTHING: Final = ""  # in the place of a rollout's id: the workspace's own work failed

Input = Status | Presence | Verdict


class _Waiting(NamedTuple):
    what: Input
    done: asyncio.Future[None]


class SetAside(Exception):
    """A report speaks of rollouts that are left alone now: hand it in again later."""


class Engine:
    """One workspace. `setbacks` holds the rollouts that are not decided on for now, `unwritten` those without new facts."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        fleet: Fleet,
        key: SigningKey,
        tracer: trace.Tracer,
        failures: metrics.Counter,
    ) -> None:
        self.bus = bus
        self.store = store
        self.fleet = fleet
        self.key = key
        self.tracer = tracer
        self.failures = failures
        self.setbacks = Setbacks()
        self.unwritten = Setbacks()
        self._inbox: asyncio.Queue[_Waiting] = asyncio.Queue(INBOX)

    async def run(self) -> None:
        """Fold and drive until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.store.run())
            group.create_task(self._drive())

    async def report(self, what: Input) -> None:
        """Hand in something that was verified; returns once it is journaled, or known to be no news.

        Raises SetAside, and whatever this one report cannot be worked on for.
        """
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
            except Exception as error:
                if self.bus.nc.is_closed:
                    raise
                await asyncio.sleep(self._set_aside(self.setbacks, _EVERYTHING, error))
                continue
            self.setbacks.went_well(_EVERYTHING)
            if not wrote:
                await self._sleep()

    async def _sleep(self) -> None:
        state = self.store.state
        times = []
        for name in [n for n in state.attention if not self.setbacks.waits(n)]:
            try:
                if (due := rules.due(state.rollouts[name])) is not None:
                    times.append(due)
            except Exception as error:
                self._set_aside(self.setbacks, name, error)
        seconds = self.setbacks.seconds(IDLE_S)
        if times:
            seconds = min(seconds, (min(times) - await self.bus.now()).total_seconds())
        seconds = max(0.02, seconds)
        try:
            async with asyncio.timeout(seconds):
                await self.store.changed.wait()
        except TimeoutError:
            return

    # Setbacks

    async def _apart(self, setbacks: Setbacks, name: str, work: Awaitable[None]) -> None:
        """Do something for one rollout, whose failure is its own. Raises Conflict, and Unavailable while nothing works."""
        try:
            await work
        except Conflict:
            raise
        except Exception as error:
            # What is too large stays so, but a broker that is away is away for everybody.
            if isinstance(error, Unavailable) and not isinstance(error, TooLarge):
                raise
            self._set_aside(setbacks, name, error)
        else:
            setbacks.went_well(name)

    def _set_aside(self, setbacks: Setbacks, name: str, error: Exception) -> float:
        seconds = setbacks.failed(name)
        log.error(
            "rollout %s/%s failed here and is left alone for %.0f s",
            self.store.workspace, name or "(all)", seconds, exc_info=error,
        )  # fmt: skip
        self.failures.add(1, {"error": type(error).__name__})
        return seconds

    # Facts

    async def _take_in(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Journal what is news; returns what is still to be taken in (nothing, unless it raises)."""
        if not waiting:
            return []
        # A report may answer a desired state that another replica wrote a moment ago.
        await self.store.synced()
        written: dict[str, list[journal.AnyEvent]] = {}
        while True:
            waiting[:] = [w for w in waiting if not w.done.done()]
            found = self._news(waiting)
            ready = [name for name in found if not self.unwritten.waits(name)]
            if not ready:
                break
            name = ready[0]
            events = [sizes.bounded(event, MAX_LINK) for event in found[name]]
            await self._apart(self.unwritten, name, self._journal(name, events, written.get(name)))
            written[name] = events
        for one in waiting:
            if found and (left := self._news([one])):
                one.done.set_exception(SetAside(", ".join(left)))
            elif not one.done.done():
                one.done.set_result(None)
        return []

    def _news(self, waiting: Sequence[_Waiting]) -> dict[str, list[journal.AnyEvent]]:
        """What they have to say, by rollout. One that cannot be worked on fails alone."""
        try:
            return dict(
                facts.events(
                    self.store.state,
                    [w.what for w in waiting if isinstance(w.what, Status)],
                    [w.what for w in waiting if isinstance(w.what, Presence)],
                    [w.what for w in waiting if isinstance(w.what, Verdict)],
                )
            )
        except Exception as error:
            if len(waiting) == 1:
                if not waiting[0].done.done():
                    waiting[0].done.set_exception(error)
                return {}
        found: dict[str, list[journal.AnyEvent]] = {}
        for one in waiting:
            found |= self._news([one])
        return found

    async def _journal(
        self, name: str, events: list[journal.AnyEvent], before: list[journal.AnyEvent] | None
    ) -> None:
        if events == before:
            raise RuntimeError(f"what was journaled is news again: {[e.name for e in events]}")
        await self._write(self.store.state.rollouts[name], events)

    # Decisions

    async def _decide(self) -> bool:
        """One step of every rollout that has one to take; whether there was any."""
        wrote = False
        for name in list(self.store.state.attention):
            if self.setbacks.waits(name):
                continue
            before = self.store.revision
            await self._apart(self.setbacks, name, self._step(name))
            wrote = wrote or self.store.revision != before
        return wrote

    async def _step(self, name: str) -> None:
        now = await self.bus.now()
        rollout = self.store.state.rollouts[name]
        hosts = self.fleet.hosts.get(self.store.workspace, {})
        events = rules.decide(self.store.state, rollout, now, hosts)
        if events:
            await self._write(rollout, [sizes.bounded(event, MAX_LINK) for event in events])

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
        desired: list[Draft] = []
        workspace = self.store.workspace
        links = [chain.seal(event, now, traceparent) for event in events]
        count, head = documents.extended(self.store.state, links)
        for event in events:
            if isinstance(event, journal.Assigned):
                states = documents.desired(
                    self.store.state,
                    rollout,
                    event,
                    head=head,
                    links=count,
                    records=self._record,
                    environment=self.fleet.environments.get(workspace, "production"),
                    at=now,
                )
                desired.extend(documents.sealed(state, self.key, traceparent) for state in states)
        return desired + links

    def _record(self, host: str) -> documents.Word | None:
        found = self.fleet.hosts.get(self.store.workspace, {}).get(host)
        return (found.envelope, found.claim) if found else None
