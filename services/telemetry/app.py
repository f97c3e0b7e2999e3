"""Wiring: what telemetry listens to, and the fleet's figures as metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from typing import Any, Final

import aiohttp
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from loopback.contracts import subjects
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.service import Service
from loopback.services.telemetry import decide
from loopback.services.telemetry.handlers import NAME, Handlers
from loopback.services.telemetry.otlp import Forwarder
from loopback.services.telemetry.store import FleetStore

PARALLEL_REPORTS: Final = 16  # each waits for the broker once, to store the view
PARALLEL_OTLP: Final = 4
REPORTS: Final = [f"lb.ws.*.from.*.{kind}" for kind in ("inventory", "status", "heartbeat")]
OTLP: Final = ["lb.ws.*.from.*.otlp"]


async def start(service: Service) -> None:
    """Fold records and views first, since a report means nothing without its host's key; then work, for ever."""
    store = FleetStore(service.log)
    await fold(service.bus, store, service.group)
    register_figures(service.meter, store)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        forwarder = Forwarder(service.settings.otlp_endpoint, session)
        handlers = Handlers(service.bus, store, service.tracer, service.meter, forwarder, time.monotonic)
        for one in work(service.bus, handlers):
            group.create_task(one)
        service.ready.set()


async def fold(bus: Bus, store: FleetStore, group: asyncio.TaskGroup) -> None:
    """Start folding, and return once everything that was stored is known."""
    ready: list[asyncio.Event] = []

    def event() -> asyncio.Event:
        ready.append(asyncio.Event())
        return ready[-1]

    for one in store.folds(bus, event):
        group.create_task(one)
    for caught_up in ready:
        await caught_up.wait()


def work(bus: Bus, handlers: Handlers) -> Iterable[Coroutine[Any, Any, None]]:
    """Reports, OTLP and presence: one coroutine for each, which runs for ever."""
    reports, otlp = f"{NAME}-reports", f"{NAME}-otlp"
    yield bus.consume(
        subjects.STREAM_REPORTS, reports, REPORTS, handlers.on_report, parallel=PARALLEL_REPORTS
    )
    yield bus.consume(subjects.STREAM_OTLP, otlp, OTLP, handlers.on_otlp, parallel=PARALLEL_OTLP)
    yield handlers.watch_presence()


def register_figures(meter: Meter, store: FleetStore) -> None:
    """Gauges of the fleet. Every replica shows the whole fleet: take one of them, or the maximum."""

    def hosts(_: CallbackOptions) -> Iterable[Observation]:
        for (workspace, state), count in decide.figures(store.views()).hosts.items():
            yield Observation(count, {"workspace": workspace, "state": state})

    def modules(_: CallbackOptions) -> Iterable[Observation]:
        for by, count in decide.figures(store.views()).modules.items():
            yield Observation(count, by._asdict())

    def metrics(_: CallbackOptions) -> Iterable[Observation]:
        for (module, metric), value in decide.figures(store.views()).metrics.items():
            yield Observation(value, {"module": module, "metric": metric})

    def cloned(_: CallbackOptions) -> Iterable[Observation]:
        for workspace, count in decide.figures(store.views()).cloned.items():
            yield Observation(count, {"workspace": workspace})

    meter.create_observable_gauge(
        "loopback_fleet_cloned_hosts",
        [cloned],
        description="Hosts whose key speaks from two machines at once",
    )
    meter.create_observable_gauge(
        "loopback_fleet_hosts", [hosts], description="Hosts, by workspace and state"
    )
    meter.create_observable_gauge(
        "loopback_fleet_modules",
        [modules],
        description="Modules on hosts that are there, by version and health",
    )
    meter.create_observable_gauge(
        "loopback_fleet_module_metric", [metrics], description="Modules' own metrics, summed over the hosts"
    )
