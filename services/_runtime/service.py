"""One process of a service, from connecting to draining."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import nats.errors
from nats import micro
from nats.micro.service import Service as MicroService
from opentelemetry import metrics, trace

import loopback
from loopback.contracts.keys import SigningKey
from loopback.services._runtime import http, streams, tracing
from loopback.services._runtime.bus import Bus, require_api_level
from loopback.services._runtime.metrics import Metrics
from loopback.services._runtime.settings import Settings, read_identity
from loopback.services._runtime.trustsource import TrustSource

log = logging.getLogger(__name__)

PORT_FILE: Final = "http.port"  # in the replica's state folder: where it serves, for whoever watches it


class BusLost(Exception):
    """The broker closed the connection for good: revoked credentials, or it was told to."""


@dataclass(frozen=True)
class Service:
    """What a service's `start` is given. `group` runs its tasks; `ready` is set once it does its work."""

    name: str
    settings: Settings
    bus: Bus
    trust: TrustSource
    tracer: trace.Tracer
    meter: metrics.Meter
    group: asyncio.TaskGroup
    log: logging.Logger
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> SigningKey:
        """The key of the service's own NATS identity, with which it signs."""
        return SigningKey.from_nkey(read_identity(self.settings.creds).seed)


Start = Callable[[Service], Awaitable[None]]


class _Stop(Exception):
    """The process was asked to end."""


async def run(name: str, settings: Settings, start: Start, *, stop: asyncio.Event | None = None) -> None:
    """Run a service until SIGTERM, SIGINT or `stop`; then let handlers finish, flush spans and leave.

    It begins to work once the streams are there, and waits for whoever makes them.

    Raises what `start` or one of its tasks raises (as a group), Refused for wrong settings, BusLost.
    """
    asked = stop or asyncio.Event()
    if stop is None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
    async with AsyncExitStack() as stack:
        meters = Metrics(name, settings.instance, settings.otlp_endpoint)
        stack.push_async_callback(asyncio.to_thread, meters.shutdown)
        tracers = tracing.setup(name, settings.instance, settings.otlp_endpoint)
        stack.push_async_callback(asyncio.to_thread, tracers.shutdown)
        meter = meters.provider.get_meter(f"loopback.{name}")
        bus = await stack.enter_async_context(await Bus.connect(settings, meter=meter))
        await require_api_level(bus)
        waiting, ready = asyncio.Event(), asyncio.Event()

        def not_ready() -> str:
            if not bus.nc.is_connected:
                return "no connection to the broker"
            if waiting.is_set():
                return "the broker's streams are not there yet: run 'loopback bus init'"
            return "" if ready.is_set() else "starting"

        port = await stack.enter_async_context(
            http.serve(settings.http_host, settings.http_port, ready=not_ready, exposition=meters.exposition)
        )
        state = settings.state(name)
        await asyncio.to_thread(_note_port, settings, name, port)
        endpoint = await micro.add_service(
            bus.nc,
            name=name,
            version=loopback.__version__,
            description=f"Loopback Modules: {name}",
            metadata={"instance": settings.instance, "http": f"{settings.http_host}:{port}"},
        )
        stack.push_async_callback(_leave, endpoint, bus)
        log.info(
            "%s %s serves on %s:%d, state in %s", name, settings.instance, settings.http_host, port, state
        )
        try:
            async with asyncio.TaskGroup() as group:
                trust = TrustSource(bus, settings, name)
                service = Service(
                    name=name,
                    settings=settings,
                    bus=bus,
                    trust=trust,
                    tracer=tracers.get_tracer(f"loopback.{name}"),
                    meter=meter,
                    group=group,
                    log=logging.getLogger(f"loopback.{name}"),
                    ready=ready,
                )
                group.create_task(_start(service, start, waiting))
                await _until(asked, bus)
                raise _Stop
        except* _Stop:
            log.info("%s %s ends", name, settings.instance)


async def _start(service: Service, start: Start, waiting: asyncio.Event) -> None:
    await streams.present(service.bus, waiting)
    service.group.create_task(service.trust.run())
    await start(service)
    service.ready.set()


async def _leave(endpoint: MicroService, bus: Bus) -> None:
    """No longer answer the bus's questions; without a connection there are none."""
    if bus.nc.is_connected:
        try:
            await endpoint.stop()
        except nats.errors.Error as error:
            log.info("left the bus while it was going: %s", error)


async def _until(asked: asyncio.Event, bus: Bus) -> None:
    """Until somebody asks to stop. Raises BusLost."""
    stopping: asyncio.Future[Any] = asyncio.ensure_future(asked.wait())
    failed: asyncio.Future[Any] = bus.failed
    try:
        await asyncio.wait({stopping, failed}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if bus.failed.done():
        raise BusLost(bus.failed.result())


def _note_port(settings: Settings, name: str, port: int) -> None:
    folder = settings.state(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PORT_FILE).write_text(f"{port}\n")
