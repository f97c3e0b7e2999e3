"""Telemetry on a real broker, with its own credentials and real hosts' credentials: views, presence, OTLP, impersonation."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import aiohttp
import msgspec
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support import Place
from support_fleet import WORKSPACE, World, world
from support_otlp import OtlpReceiver, metrics_request, traces_request

from loopback.contracts import envelope, subjects
from loopback.contracts import view as views
from loopback.contracts.codes import Code
from loopback.contracts.desired import Running
from loopback.contracts.messages import JournalEntry, Presence
from loopback.contracts.reports import ModuleStatus, Phase
from loopback.contracts.view import HostView
from loopback.services._runtime.bus import Bus
from loopback.services.telemetry import app
from loopback.services.telemetry.handlers import Handlers
from loopback.services.telemetry.otlp import Forwarder
from loopback.services.telemetry.store import FleetStore

pytestmark = pytest.mark.broker
DEADLINE_S = 60.0
TRACE = "0af7651916cd43dd8448eb211c80319c"
T = TypeVar("T")


class _Stop(Exception):
    """The replica is no longer needed."""


class Replica:
    """One telemetry process, as `app` wires it."""

    def __init__(self, bus: Bus, endpoint: str = "") -> None:
        self.bus = bus
        self.endpoint = endpoint
        self.store = FleetStore(logging.getLogger("test"))
        self.spans = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        """While it works."""
        meter = self.meters.get_meter("test")
        try:
            async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
                await app.fold(self.bus, self.store, group)
                app.register_figures(meter, self.store)
                handlers = Handlers(
                    self.bus,
                    self.store,
                    self.tracers.get_tracer("test"),
                    meter,
                    Forwarder(self.endpoint, session),
                    itertools.count().__next__,
                )
                for work in app.work(self.bus, handlers):
                    group.create_task(work)
                yield self
                raise _Stop
        except* _Stop:
            self.tracers.shutdown()
            self.meters.shutdown()

    def points(self, name: str) -> list[tuple[dict[str, object], float]]:
        """The data points of one metric now."""
        data = self.reader.get_metrics_data()
        return [
            (dict(point.attributes), point.value)
            for group in (data.resource_metrics if data else ())
            for scope in group.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


async def until(look: Callable[[], T], good: Callable[[T], bool] = bool) -> T:
    """What `look` finds, once that is good."""
    found = look()
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not good(found):
                await asyncio.sleep(0.02)
                found = look()
    except TimeoutError:
        raise AssertionError(f"it stayed {found!r}") from None
    return found


@pytest.fixture
async def place(broker: Place) -> AsyncIterator[World]:
    async with world(broker) as made:
        yield made


@pytest.fixture
async def receiver() -> AsyncIterator[OtlpReceiver]:
    async with OtlpReceiver() as running:
        yield running


@pytest.fixture
async def replica(place: World, receiver: OtlpReceiver) -> AsyncIterator[Replica]:
    async with Replica(await place.bus("telemetry"), receiver.endpoint).running() as running:
        yield running


def view_of(replica: Replica, host: str) -> Callable[[], HostView | None]:
    return lambda: replica.store.view((WORKSPACE, host))


async def presences(bus: Bus, host: str) -> list[bool]:
    stored = await bus.read(subjects.STREAM_FLEET, [subjects.presence(WORKSPACE, host)])
    return [msgspec.json.decode(s.data, type=Presence).lost for s in stored]


def firewall(phase: Phase, **more: object) -> ModuleStatus:
    return ModuleStatus(module="firewall", phase=phase, generation=1, rollout="r1", **more)


async def test_what_hosts_say_becomes_the_view_that_everybody_reads(place, replica):
    host = await place.host("web-1")
    runs = Running(version="1.2.0", package="ab" * 32, policy="cd" * 32, policy_serial=7)
    await host.say(host.inventory(kernel="6.9"))
    await host.say(host.status(firewall(Phase.PROMOTED, promoted=runs, enforcing=True, health="ok")))
    await host.say(host.heartbeat(interval_s=30))
    view = await until(view_of(replica, "web-1"), lambda v: v is not None and v.current.heartbeat is not None)
    assert view.inventory.kernel == "6.9"
    assert view.modules[0].promoted == runs
    assert (view.state, view.interval_s) == ("ok", 30)
    stored = await replica.bus.last(views.STREAM, views.subject(WORKSPACE, "web-1"))
    assert stored is not None and views.decode(stored.data) == view
    assert replica.points("loopback_fleet_hosts") == [({"workspace": WORKSPACE, "state": "ok"}, 1)]
    assert replica.points("loopback_fleet_modules") == [
        ({"module": "firewall", "version": "1.2.0", "health": "ok", "enforcing": True}, 1)
    ]


async def test_two_replicas_share_the_work_and_agree(place, replica):
    async with Replica(await place.bus("telemetry")).running() as other:
        hosts = [await place.host(f"web-{n}") for n in range(4)]
        for _ in range(20):
            for host in hosts:
                await host.say(host.heartbeat())
        for host in hosts:
            for one in (replica, other):
                view = await until(
                    view_of(one, host.name),
                    lambda v: (
                        v is not None and v.current.heartbeat is not None and v.current.heartbeat.seq == 20
                    ),
                )
            assert view == replica.store.view((WORKSPACE, host.name))


async def test_a_silent_host_is_lost_and_its_next_word_brings_it_back_each_said_once(place, replica):
    async with Replica(await place.bus("telemetry")).running() as other:
        host = await place.host("web-1")
        await host.say(host.heartbeat(interval_s=0.2))
        for one in (replica, other):
            await until(view_of(one, "web-1"), lambda v: v is not None and v.state == "lost")
        await until(lambda: replica.store.said.get((WORKSPACE, "web-1")), lambda p: p is not None and p.lost)
        await host.say(host.heartbeat(interval_s=100))
        for one in (replica, other):
            await until(view_of(one, "web-1"), lambda v: v is not None and v.state == "ok")
            await until(lambda one=one: one.store.said[WORKSPACE, "web-1"].lost, lambda lost: not lost)
    assert await presences(replica.bus, "web-1") == [True, False]


async def test_a_backlog_of_reports_is_no_silence(place, receiver):
    bus = await place.bus("telemetry")
    async with Replica(bus).running() as first:
        host = await place.host("web-1")
        await host.say(host.heartbeat(interval_s=0.1))
        await until(view_of(first, "web-1"), lambda v: v is not None and v.state == "lost")
        await host.say(host.heartbeat(interval_s=100))
        await until(view_of(first, "web-1"), lambda v: v is not None and v.state == "ok")
    # Nobody folds now; the host goes on, and what it says is only stored.
    await host.say(host.heartbeat(interval_s=100))
    store = FleetStore(logging.getLogger("test"))
    for message in await bus.read(subjects.STREAM_FLEET, ["lb.ws.*.record.>"]):
        store.fold_record(message)
    for message in await bus.read(views.STREAM, [views.EVERY_SUBJECT]):
        store.fold_view(message)
    known = store.known[WORKSPACE, "web-1"]
    assert known.view is not None
    async with aiohttp.ClientSession() as session:
        meters = MeterProvider()
        handlers = Handlers(
            bus,
            store,
            TracerProvider().get_tracer("t"),
            meters.get_meter("t"),
            Forwarder("", session),
            lambda: 0.0,
        )
        await handlers.declare_lost((WORKSPACE, "web-1"), known.view.lost_after)
        meters.shutdown()
    stored = await bus.last(views.STREAM, views.subject(WORKSPACE, "web-1"))
    assert stored is not None and views.decode(stored.data).lost_at is None


async def test_only_steps_of_a_rollout_appear_in_its_trace(place, replica):
    host = await place.host("web-1")
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    await host.say(host.status(firewall(Phase.DOWNLOADING)), headers=headers)
    await host.say(host.status(firewall(Phase.DOWNLOADING, health="ok")), headers=headers)
    await host.say(host.heartbeat(), headers=headers)
    await host.say(host.status(firewall(Phase.TRIAL)), headers=headers)
    await until(
        view_of(replica, "web-1"), lambda v: v is not None and v.status is not None and v.status.seq == 4
    )
    spans = await until(lambda: replica.spans.get_finished_spans(), lambda found: len(found) >= 2)
    assert [s.attributes["loopback.phase"] for s in spans] == ["downloading", "trial"]
    for span in spans:
        assert f"{span.context.trace_id:032x}" == TRACE
        assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
        assert span.attributes["loopback.rollout.id"] == "r1"


async def test_a_stolen_host_cannot_speak_for_another(place, replica):
    good, stolen = await place.host("web-1"), await place.host("web-2")
    await good.say(good.heartbeat())
    before = await until(view_of(replica, "web-1"))
    lie = msgspec.structs.replace(stolen.heartbeat(), host="web-1", seq=99, agent="degraded")
    # In the other's name on its own subject: signed by itself, dropped.
    await stolen.say(lie)
    # On the other's subject: the broker refuses it.
    await stolen.say(lie, to=subjects.from_host(WORKSPACE, "web-1", "heartbeat"))
    await until(lambda: stolen.errors, lambda errors: any("ermissions" in e for e in errors))
    # Where it gets there nevertheless, as a reply can: somebody with every permission plays the confused deputy.
    admin = await place.bus("admin")
    data = envelope.seal_bytes(envelope.REPORT, msgspec.json.encode(lie), stolen.key)
    await admin.nc.publish(subjects.from_host(WORKSPACE, "web-1", "heartbeat"), data)
    await stolen.say(stolen.heartbeat())
    await until(view_of(replica, "web-2"))
    entries = await refusals_of(place, 2)
    assert {e.refusal.code for e in entries} == {Code.REPORT_IMPERSONATION}
    assert {e.detail["signed_as"] for e in entries} == {"prod/web-2"}
    assert replica.store.view((WORKSPACE, "web-1")) == before
    outcomes = {a["outcome"]: v for a, v in replica.points("loopback_telemetry_reports")}
    assert outcomes[str(Code.REPORT_IMPERSONATION)] == 2


async def refusals_of(place: World, count: int) -> list[JournalEntry]:
    """What the workspace's journal holds of refused reports, once that is this much."""
    bus, subject = await place.bus("admin"), subjects.journal(WORKSPACE, "telemetry", "refused")
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await bus.read(subjects.workspace_stream(WORKSPACE), [subject])
            if len(found) >= count:
                return [msgspec.json.decode(s.data, type=JournalEntry) for s in found]
            await asyncio.sleep(0.02)


async def test_a_host_is_believed_with_its_new_key_at_once_and_not_with_its_old_one(place, replica):
    host = await place.host("web-1")
    await host.say(host.heartbeat())
    await until(view_of(replica, "web-1"))
    old, host.key = host.key, type(host.key).generate()
    await host.put()
    await host.say(host.heartbeat())
    await until(view_of(replica, "web-1"), lambda v: v.current.heartbeat.seq == 2)
    host.key = old
    await host.say(host.heartbeat())
    (entry,) = await refusals_of(place, 1)
    assert entry.refusal.code is Code.REPORT_IMPERSONATION


async def test_a_withdrawn_host_leaves_the_view_and_comes_back_with_a_new_record(place, replica):
    host = await place.host("web-1")
    await host.say(host.heartbeat())
    await until(view_of(replica, "web-1"))
    await host.put(absent=True)
    await until(view_of(replica, "web-1"), lambda v: v is None)
    await host.say(host.heartbeat())
    (entry,) = await refusals_of(place, 1)
    assert entry.refusal.code is Code.REPORT_UNKNOWN_HOST
    await host.put()
    await host.say(host.heartbeat())
    await until(view_of(replica, "web-1"))


async def test_hosts_own_telemetry_arrives_under_their_true_names(place, replica, receiver):
    host, other = await place.host("web-1"), await place.host("web-2")
    subject = subjects.from_host(WORKSPACE, "web-1", "otlp")
    lies = {"host__name": "web-2", "loopback__workspace": "staging"}
    await host.publish(
        subject, envelope.seal_bytes(envelope.OTLP_TRACES, traces_request("apply", **lies), host.key)
    )
    await host.publish(
        subject, envelope.seal_bytes(envelope.OTLP_METRICS, metrics_request("load", **lies), host.key)
    )
    # Signed by another host, or as something else: dropped.
    admin = await place.bus("admin")
    for kind, key in ((envelope.OTLP_TRACES, other.key), (envelope.REPORT, host.key)):
        await admin.nc.publish(subject, envelope.seal_bytes(kind, traces_request("false"), key))
    await until(lambda: receiver.spans and receiver.metrics)
    truth = {"host.name": "web-1", "loopback.workspace": WORKSPACE}
    assert receiver.spans[0].resource == receiver.metrics[0].resource == truth
    outcomes = await until(
        lambda: {(a["kind"], a["outcome"]): v for a, v in replica.points("loopback_telemetry_otlp")},
        lambda found: len(found) == 4,
    )
    assert outcomes == {
        ("traces", "forwarded"): 1,
        ("metrics", "forwarded"): 1,
        ("traces", str(Code.REPORT_IMPERSONATION)): 1,
        ("unknown", str(Code.REPORT_MALFORMED)): 1,
    }
    assert [s.name for s in receiver.spans] == ["apply"]
