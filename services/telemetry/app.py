"""Wiring: what telemetry listens to, and the fleet's figures as metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import aiohttp
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from loopback.contracts import subjects
from loopback.services._runtime.service import Service
from loopback.services.telemetry import decide
from loopback.services.telemetry.handlers import NAME, Handlers
from loopback.services.telemetry.otlp import Forwarder
from loopback.services.telemetry.store import FleetStore

PARALLEL_REPORTS = 16
PARALLEL_OTLP = 4
REPORTS = [f"lb.ws.*.from.*.{kind}" for kind in ("inventory", "status", "heartbeat")]
OTLP = ["lb.ws.*.from.*.otlp"]


async def start(service: Service) -> None:
    """Fold records and views first, since a report means nothing without its host's key; then work."""
    bus, group = service.bus, service.group
    store = FleetStore(service.log)
    ready: list[asyncio.Event] = []

    def event() -> asyncio.Event:
        ready.append(asyncio.Event())
        return ready[-1]

    for fold in store.folds(bus, event):
        group.create_task(fold)
    for one in ready:
        await one.wait()
    register_figures(service.meter, store)
    group.create_task(_work(service, store))


async def _work(service: Service, store: FleetStore) -> None:
    """Reports, OTLP and presence, with one HTTP session for as long as the service runs."""
    bus = service.bus
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        forwarder = Forwarder(service.settings.otlp_endpoint, session)
        handlers = Handlers(bus, store, service.tracer, service.meter, forwarder, time.monotonic)
        group.create_task(
            bus.consume(
                subjects.STREAM_REPORTS,
                f"{NAME}-reports",
                REPORTS,
                handlers.on_report,
                parallel=PARALLEL_REPORTS,
            )
        )
        group.create_task(
            bus.consume(subjects.STREAM_OTLP, f"{NAME}-otlp", OTLP, handlers.on_otlp, parallel=PARALLEL_OTLP)
        )
        group.create_task(handlers.watch_presence())


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
