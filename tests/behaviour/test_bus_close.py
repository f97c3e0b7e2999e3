"""A bus that is closed while it reconnects is closed: at once, for good, and with nothing left running."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support import EmbeddedPlace, eventually

from loopback.cli import creds
from loopback.services._runtime import bus as bus_module
from loopback.services._runtime.bus import Bus

pytestmark = pytest.mark.broker
TIMES = 30
SOON_S = 30.0  # a close takes milliseconds, on a busy machine some seconds, and without an end of the reconnection for ever


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[EmbeddedPlace]:
    made = EmbeddedPlace(tmp_path / "home")
    creds.init_home(made.home)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def others(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if not task.done()} - before


async def closed_at_the_worst_moment(
    place: EmbeddedPlace, monkeypatch: pytest.MonkeyPatch
) -> tuple[Bus, set[asyncio.Task[Any]], float]:
    """A bus whose broker is killed, and which is closed just as its socket is connected again.

    The socket is connected, and the wait for it has not been told yet: a cancellation that comes between is forgotten.
    """
    before = set(asyncio.all_tasks())
    bus = await Bus.connect(place.settings("activation"))
    await place.kill()
    await eventually(lambda: bus.nc.is_reconnecting)
    closing: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()
    began = 0.0

    def close() -> None:
        nonlocal began
        began = time.monotonic()
        closing.set_result(asyncio.create_task(bus.close()))

    async def connect(*arguments: Any, **options: Any) -> Any:
        found = await real(*arguments, **options)
        if not closing.done():
            # Runs before this coroutine's waiter is told; its task before the waiter runs.
            asyncio.get_running_loop().call_soon(close)
        return found

    real = asyncio.open_connection
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "open_connection", connect)
        await place.start()
        await (await asyncio.wait_for(closing, 60))
        took = time.monotonic() - began
    return bus, others(before), took


async def ended(tasks: set[asyncio.Task[Any]]) -> None:
    while any(not t.done() for t in tasks):
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=0.1)


async def once(nc: Any, *_: object) -> bool:
    """As it was: whatever the library does."""
    await nc.close()
    return True


async def test_a_reconnection_forgets_that_it_was_cancelled_where_nobody_insists(
    place: EmbeddedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "disconnect", once)
    bus, left, _ = await closed_at_the_worst_moment(place, monkeypatch)
    print(f"\n{[t.get_coro().__qualname__ for t in left]} left; connected: {bus.nc.is_connected}")
    await ended(left)
    assert left or sys.version_info >= (3, 12), "its wait_for heeds the cancellation"


async def test_a_bus_closed_just_as_it_is_connected_again_is_closed_for_good(
    place: EmbeddedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0.0
    for _ in range(TIMES):
        bus, left, took = await closed_at_the_worst_moment(place, monkeypatch)
        await ended(left)
        longest = max(longest, took)
        assert bus.nc.is_closed and not left and took < SOON_S, (left, took)
    print(f"\n{TIMES} times; the longest close took {longest * 1000:.0f} ms")


async def away(place: EmbeddedPlace, bus: Bus) -> None:
    """The broker is killed and stays away."""
    await place.kill()
    await eventually(lambda: bus.nc.is_reconnecting)


async def back(place: EmbeddedPlace, bus: Bus) -> None:
    """The broker is killed and starts again meanwhile."""
    await away(place, bus)
    await place.start()


@pytest.mark.parametrize("how", [away, back])
async def test_a_bus_is_closed_whenever_its_broker_was_killed(
    place: EmbeddedPlace, how: Callable[[EmbeddedPlace, Bus], Awaitable[None]]
) -> None:
    for _ in range(5):
        before = set(asyncio.all_tasks())
        bus = await Bus.connect(place.settings("activation"))
        await how(place, bus)
        began = time.monotonic()
        await bus.close()
        took, left = time.monotonic() - began, others(before)
        await ended(left)
        assert bus.nc.is_closed and not left and took < SOON_S, (left, took)
        await place.kill()
        await place.start()
