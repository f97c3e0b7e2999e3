"""What happens on a host's report, on its OTLP, and on its silence."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

import msgspec
from opentelemetry import metrics, trace

from loopback.contracts import envelope, events, reports, subjects
from loopback.contracts import view as views
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import JournalEntry, Presence
from loopback.contracts.reports import AnyReport, ModuleStatus
from loopback.contracts.view import HostView
from loopback.services._runtime import tracing
from loopback.services._runtime.bus import Bus, Conflict, Outgoing, Stored
from loopback.services.telemetry import decide, otlp
from loopback.services.telemetry.store import FleetStore, Host, Known, purge_view, read_view, write_view

log = logging.getLogger(__name__)

NAME: Final = "telemetry"
JOURNAL_EVERY_S: Final = 60.0  # per host and reason: a hostile host fills counters, not the journal
SHORTEST_WAIT_S: Final = 0.25
LONGEST_WAIT_S: Final = 5.0


class Handlers:
    """The service's hands; every method bears being called again with the same message. `clock` is monotonic seconds."""

    def __init__(
        self,
        bus: Bus,
        store: FleetStore,
        tracer: trace.Tracer,
        meter: metrics.Meter,
        forwarder: otlp.Forwarder,
        clock: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._store = store
        self._tracer = tracer
        self._forwarder = forwarder
        self._clock = clock
        self._journalled: dict[tuple[Host, Code], float] = {}
        self._look = asyncio.Event()
        self._next_look: datetime | None = None
        store.changed = self._look_sooner
        self._reports = meter.create_counter(
            "loopback_telemetry_reports", description="Reports, by kind and outcome"
        )
        self._otlp = meter.create_counter(
            "loopback_telemetry_otlp", description="Hosts' OTLP requests, by kind and outcome"
        )
        self._lost = meter.create_counter("loopback_telemetry_presence", description="Hosts lost and back")

    # Reports

    async def on_report(self, stored: Stored) -> None:
        """Verify a report and fold it into its host's view."""
        kind = stored.subject.rpartition(".")[2]
        try:
            host = _host_of(stored)
            await self._key(host)
            report = await self._verified(stored, host)
        except Refused as refused:
            self._reports.add(1, {"kind": kind, "outcome": str(refused.code)})
            await self._journal(stored, refused)
            return
        self._reports.add(1, {"kind": kind, "outcome": "ok"})
        before, after = await self._fold(host, report, stored.time)
        if after is None:
            return
        for module in decide.changed_phases(before, after, report):
            self._trace(stored, report, module)
        if after.cloned and not (before is not None and before.cloned):
            await self._say_cloned(stored, after)
        if before is not None and before.lost_at is not None and after.lost_at is None:
            await self._say_presence(host)

    async def _say_cloned(self, stored: Stored, view: HostView) -> None:
        """Two machines speak under one key; only an operator can tell which is which."""
        runs = ", ".join(f"{run.id[:8]} (incarnation {run.incarnation[:8]})" for run in view.runs)
        refused = Refused(
            Code.HOST_CLONED,
            f"two agents speak as {view.host!r} at once: its key is on two machines; runs {runs}",
            f"revoke it ('loopback host revoke {view.host}') and enrol both machines anew, each with a name of its own",
        )
        log.warning("%s: %s", view.workspace, refused)
        await self._journal(stored, refused)

    async def _fold(
        self, host: Host, report: AnyReport, at: datetime
    ) -> tuple[HostView | None, HostView | None]:
        """The view before and after; after is None where the report said nothing new."""
        while True:
            revision, before = self._store.revision(host), self._store.view(host)
            after = decide.fold_view(before, report, at)
            if after is None:
                return before, None
            try:
                stored = await self._bus.publish(write_view(host, after, revision))
            except Conflict:
                await self._read_view(host)
                continue
            self._store.learn(host, Known(stored, after))
            return before, after

    async def _read_view(self, host: Host) -> Known:
        """A host's view as the leader has it now."""
        found = await self._bus.last(views.STREAM, views.subject(*host))
        known = read_view(found) if found else Known(0, None)
        self._store.learn(host, known)
        return known

    def _trace(self, stored: Stored, report: AnyReport, module: ModuleStatus) -> None:
        """One span, in the rollout's own trace, for a host's step; heartbeats and repetitions make none."""
        if "traceparent" not in stored.headers:
            return
        with tracing.consume_span(
            self._tracer,
            stored,
            group=NAME,
            attributes={
                "loopback.rollout.id": module.rollout,
                "loopback.module": module.module,
                "loopback.phase": str(module.phase),
                "loopback.generation": module.generation,
                "loopback.workspace": report.workspace,
                "loopback.host": report.host,
            },
        ) as span:
            if module.refusal is not None:
                span.set_attribute("error.type", str(module.refusal.code))

    # Who sent it

    async def _verified(self, stored: Stored, host: Host) -> AnyReport:
        try:
            return self._open(stored)
        except Refused as refused:
            if refused.code is not Code.REPORT_IMPERSONATION or not await self._renewed(host):
                raise
        return self._open(stored)

    def _open(self, stored: Stored) -> AnyReport:
        return reports.open_report(stored.data, stored.subject, lambda w, h: self._store.keys.get((w, h)))

    async def _key(self, host: Host) -> PublicKey | None:
        """The recorded key; the leader is asked before a host counts as unknown, as its record may be seconds old."""
        if host not in self._store.keys:
            await self._renewed(host)
        return self._store.keys.get(host)

    async def _renewed(self, host: Host) -> bool:
        """Read a host's record from the leader; whether that brought another key."""
        before = self._store.keys.get(host)
        found = await self._bus.last(subjects.STREAM_FLEET, subjects.record(host[0], "host", host[1]))
        if found is not None:
            self._store.fold_record(found)
        after = self._store.keys.get(host)
        return after is not None and (before is None or before.keyid != after.keyid)

    async def _journal(self, stored: Stored, refused: Refused) -> None:
        """Write a refused report down for people, where there is a workspace to write to, and not too often."""
        try:
            host = _host_of(stored)
        except Refused:
            return
        now = self._clock()
        last = self._journalled.get((host, refused.code))
        if host[0] not in self._store.workspaces or (last is not None and now - last < JOURNAL_EVERY_S):
            return
        self._journalled = {k: t for k, t in self._journalled.items() if now - t < JOURNAL_EVERY_S}
        self._journalled[host, refused.code] = now
        at = await self._bus.now()
        entry = JournalEntry(
            service=NAME,
            event="refused",
            at=at,
            refusal=refused.refusal,
            subject=stored.subject,
            detail={"sequence": str(stored.sequence), **self._signer(stored)},
        )
        event_id = f"report-{stored.stream}-{stored.sequence}"
        await self._bus.publish(
            Outgoing(
                subjects.journal(host[0], NAME, "refused"),
                msgspec.json.encode(entry),
                events.headers(
                    event_id=event_id,
                    source=NAME,
                    event_type="journal",
                    subject=subjects.token(host[1]),
                    at=at,
                ),
            )
        )

    def _signer(self, stored: Stored) -> dict[str, str]:
        """Whose key the envelope names, where it is a known host's: a hint, since its signature may not hold."""
        try:
            signatures = envelope.parse(stored.data).signatures
        except Refused:
            return {}
        owners = (self._store.owner(s.keyid) for s in signatures[: envelope.MAX_SIGNATURES])
        return {"signed_as": ", ".join(f"{o[0]}/{o[1]}" for o in owners if o)}

    # Presence

    async def watch_presence(self) -> None:
        """Notice hosts that fell silent, for ever: one timer for all of them."""
        while True:
            self._look.clear()
            now = await self._bus.now()
            for view in self._store.views():
                host = (view.workspace, view.host)
                if host in self._store.withdrawn:
                    await self._forget(host)
                elif decide.mark_lost(view, now) is not None:
                    await self.declare_lost(host, now)
                elif (view.lost_at is not None) != self._said_lost(host):
                    await self._say_presence(host)
            now = await self._bus.now()
            latest = now + timedelta(seconds=LONGEST_WAIT_S)
            self._next_look = min(decide.next_deadline(self._store.views()) or latest, latest)
            await asyncio.sleep(
                SHORTEST_WAIT_S
            )  # however many hosts come and go, this costs a bounded share of time
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), max((self._next_look - now).total_seconds(), 0.0))

    def _look_sooner(self, view: HostView | None) -> None:
        """Wake the timer where a host may be lost before it would have looked, or was withdrawn."""
        if view is None or (
            view.lost_at is None and self._next_look is not None and view.lost_after < self._next_look
        ):
            self._look.set()

    def _said_lost(self, host: Host) -> bool:
        said = self._store.said.get(host)
        return said is not None and said.lost

    async def declare_lost(self, host: Host, now: datetime) -> None:
        """Mark a silent host as lost, unless something it said is stored and only waits to be folded."""
        newest = await self._bus.last(subjects.STREAM_REPORTS, subjects.from_host(*host, "*"))
        known = self._store.known.get(host)
        if known is None or known.view is None:
            return
        if newest is not None and newest.time > known.view.last_at and self._believed(newest):
            return
        lost = decide.mark_lost(known.view, now)
        if lost is None:
            return
        try:
            revision = await self._bus.publish(write_view(host, lost, known.revision))
        except Conflict:
            await self._read_view(host)
            return
        self._store.learn(host, Known(revision, lost))
        await self._say_presence(host)

    def _believed(self, stored: Stored) -> bool:
        try:
            self._open(stored)
        except Refused:
            return False
        return True

    async def _say_presence(self, host: Host) -> None:
        """Publish that a host is lost or back, if that is not what was said last. Of several replicas one says it.

        What was said is read before the view, and stored over exactly that: so a replica that knows less cannot speak
        over one that knows more.
        """
        while True:
            subject = subjects.presence(*host)
            said = await self._bus.last(subjects.STREAM_FLEET, subject)
            view = (await self._read_view(host)).view
            lost_before = msgspec.json.decode(said.data, type=Presence).lost if said else False
            if said is not None:
                self._store.fold_presence(said)
            if view is None or (view.lost_at is not None) == lost_before:
                return
            at = view.lost_at or view.last_at
            presence = Presence(
                host=host[1],
                workspace=host[0],
                lost=view.lost_at is not None,
                at=at,
                silent_s=(view.lost_at - view.last_at).total_seconds() if view.lost_at else 0.0,
            )
            place = said.sequence if said else 0
            event_id = f"presence-{subjects.token(host[0])}-{subjects.token(host[1])}-{place}-{presence.lost}"
            try:
                await self._bus.publish(
                    Outgoing(
                        subject,
                        msgspec.json.encode(presence),
                        events.headers(
                            event_id=event_id,
                            source=NAME,
                            event_type="presence",
                            subject=subjects.token(host[1]),
                            at=at,
                        ),
                        expected_subject_seq=place,
                    )
                )
            except Conflict:
                continue
            self._store.said[host] = presence
            self._lost.add(1, {"lost": presence.lost})
            return

    async def _forget(self, host: Host) -> None:
        """Take the view of a host whose record was withdrawn out of the bucket."""
        known = self._store.known[host]
        try:
            revision = await self._bus.publish(purge_view(host, known.revision))
        except Conflict:
            await self._read_view(host)
            return
        self._store.learn(host, Known(revision, None))

    # OTLP

    async def on_otlp(self, stored: Stored) -> None:
        """Verify a host's OTLP, stamp it with who sent it, and pass it on. What cannot be delivered is counted, and gone."""
        kind = "unknown"
        try:
            host = _host_of(stored)
            payload_type = envelope.parse(stored.data).payloadType
            if payload_type not in otlp.PATHS:
                raise Refused(
                    Code.REPORT_MALFORMED, f"{host[1]!r} sent {payload_type[:80]!r} on its OTLP subject"
                )
            kind = otlp.PATHS[payload_type].rpartition("/")[2]
            payload = await self._open_otlp(stored, host, payload_type)
            stamped = otlp.stamp(payload, payload_type, host[1], host[0])
        except Refused as refused:
            self._otlp.add(1, {"kind": kind, "outcome": str(refused.code)})
            await self._journal(stored, refused)
            return
        self._otlp.add(1, {"kind": kind, "outcome": await self._forwarder.forward(stamped, payload_type)})

    async def _open_otlp(self, stored: Stored, host: Host, payload_type: str) -> bytes:
        key = await self._key(host)
        try:
            return reports.open_signed(stored.data, stored.subject, payload_type, key)
        except Refused as refused:
            if refused.code is not Code.REPORT_IMPERSONATION or not await self._renewed(host):
                raise
        return reports.open_signed(stored.data, stored.subject, payload_type, self._store.keys.get(host))


def _host_of(stored: Stored) -> Host:
    workspace, host, _ = reports.sender(stored.subject)
    return workspace, host
