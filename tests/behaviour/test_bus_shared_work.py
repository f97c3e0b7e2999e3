"""How replicas share work over the bus, against the embedded server and against NATS in a container."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from support import Place, background, eventually

from loopback.services._runtime.bus import Bus, Forbidden, Outgoing, Stored

pytestmark = pytest.mark.broker


def worker(bus: Bus, handle: Callable[[Stored], Awaitable[None]], parallel: int = 1) -> Awaitable[None]:
    return bus.consume("LB_FROM", "activation-status", ["lb.ws.w.from.*.status"], handle, parallel=parallel)


async def report(bus: Bus, number: int) -> None:
    await bus.publish(Outgoing(f"lb.ws.w.from.h{number}.status", b"%d" % number))


@pytest.mark.parametrize("parallel", [1, 8])
async def test_replicas_share_work_and_each_message_is_handled_once(any_broker: Place, parallel: int) -> None:
    admin = await any_broker.bus("admin")
    handled: dict[str, list[bytes]] = {"one": [], "two": []}

    def handler(name: str) -> Callable[[Stored], Awaitable[None]]:
        async def handle(stored: Stored) -> None:
            handled[name].append(stored.data)
            await admin.nc.flush()  # some work, so that the other gets its turn

        return handle

    replicas = [worker(await any_broker.bus("activation"), handler(name), parallel) for name in handled]
    async with background(*replicas):
        await asyncio.gather(*(report(admin, n) for n in range(200)))
        await eventually(lambda: sum(map(len, handled.values())) == 200)
        info = await eventually(lambda: _settled(admin))
    assert sorted(handled["one"] + handled["two"]) == sorted(b"%d" % n for n in range(200))
    assert all(handled.values()), "one replica did everything"
    assert info["num_redelivered"] == 0


async def _settled(admin: Bus) -> dict[str, int] | None:
    info = await admin.api("CONSUMER.INFO.LB_FROM.activation-status")
    return info if info["num_ack_pending"] == info["num_pending"] == 0 else None


async def test_one_worker_handles_in_order(any_broker: Place) -> None:
    admin = await any_broker.bus("admin")
    seen: list[bytes] = []

    async def handle(stored: Stored) -> None:
        seen.append(stored.data)

    for number in range(50):
        await report(admin, number)
    async with background(worker(await any_broker.bus("activation"), handle)):
        await eventually(lambda: len(seen) == 50)
    assert seen == [b"%d" % n for n in range(50)]


async def test_a_failing_handler_gets_its_message_again_until_it_succeeds(
    any_broker: Place, caplog: pytest.LogCaptureFixture
) -> None:
    admin = await any_broker.bus("admin")
    deliveries: list[tuple[bytes, int]] = []

    async def handle(stored: Stored) -> None:
        deliveries.append((stored.data, stored.delivered))
        if stored.data == b"1" and stored.delivered < 4:
            raise RuntimeError("not yet")

    async with background(worker(await any_broker.bus("activation"), handle)):
        for number in range(3):
            await report(admin, number)
        await eventually(lambda: (b"1", 4) in deliveries)
        await eventually(lambda: _settled(admin))
    assert sorted(deliveries) == [(b"0", 1), (b"1", 1), (b"1", 2), (b"1", 3), (b"1", 4), (b"2", 1)]
    assert sum("not yet" in str(record.exc_info) for record in caplog.records) == 3


async def test_a_worker_that_vanishes_leaves_its_message_to_another(any_broker: Place) -> None:
    admin = await any_broker.bus("admin")
    first, second = await any_broker.bus("activation"), await any_broker.bus("activation")
    taken = asyncio.Event()
    finished: list[int] = []

    async def hang(stored: Stored) -> None:
        taken.set()
        await asyncio.Event().wait()

    async def finish(stored: Stored) -> None:
        finished.append(stored.delivered)

    await report(admin, 1)
    gone = asyncio.ensure_future(worker(first, hang))
    await asyncio.wait_for(taken.wait(), 60)
    first.nc._transport.close()  # its connection breaks, as when its machine does
    first.nc._max_reconnect = 0
    await first.close()
    async with background(worker(second, finish)):
        await eventually(lambda: finished)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert finished == [2]


async def test_a_handler_that_takes_long_keeps_its_message(any_broker: Place) -> None:
    """Longer than the broker waits for an acknowledgement: the other replica must not get it."""
    admin = await any_broker.bus("admin")
    release = asyncio.Event()
    deliveries: list[int] = []

    async def handle(stored: Stored) -> None:
        deliveries.append(stored.delivered)
        await release.wait()

    async with background(*[worker(await any_broker.bus("activation"), handle) for _ in range(2)]):
        await report(admin, 1)
        await eventually(lambda: deliveries)
        stop_at = asyncio.get_running_loop().time() + 6.5  # the broker's wait is 5 s
        await eventually(lambda: asyncio.get_running_loop().time() > stop_at)
        assert deliveries == [1]
        release.set()
        await eventually(lambda: _settled(admin))
    assert deliveries == [1]


async def test_a_worker_told_to_stop_finishes_what_it_handles(any_broker: Place) -> None:
    admin = await any_broker.bus("admin")
    started, release = asyncio.Event(), asyncio.Event()
    finished: list[bytes] = []

    async def handle(stored: Stored) -> None:
        started.set()
        await release.wait()
        finished.append(stored.data)

    await report(admin, 1)
    work = asyncio.ensure_future(worker(await any_broker.bus("activation"), handle))
    await asyncio.wait_for(started.wait(), 60)
    work.cancel()
    asyncio.get_running_loop().call_soon(release.set)
    await asyncio.gather(work, return_exceptions=True)
    assert finished == [b"1"]
    await eventually(lambda: _settled(admin))


async def test_work_goes_on_after_the_broker_was_killed(any_broker: Place) -> None:
    admin = await any_broker.bus("admin")
    seen = Counter[bytes]()

    async def handle(stored: Stored) -> None:
        seen[stored.data] += 1

    replicas = [worker(await any_broker.bus("activation"), handle, 4) for _ in range(2)]
    async with background(*replicas):
        await asyncio.gather(*(report(admin, n) for n in range(50)))
        await eventually(lambda: len(seen) == 50)
        await eventually(lambda: _settled(admin))
        await any_broker.kill()
        await any_broker.start()
        await asyncio.gather(*(report(admin, n) for n in range(50, 100)))
        await eventually(lambda: len(seen) == 100)
        await eventually(lambda: _settled(admin))


async def test_what_credentials_do_not_allow_fails_with_words(any_broker: Place) -> None:
    bus = await any_broker.bus("telemetry")
    with pytest.raises(Forbidden, match="telemetry may not"):
        await bus.publish(Outgoing("lb.ws.w.desired.h1", b"mine"))
