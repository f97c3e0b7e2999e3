"""What services rely on in the bus, against the embedded server and against NATS in a container."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest
from support import Place, eventually, settled

from loopback.services._runtime.bus import Bus, Conflict, Forbidden, Outgoing, Stored, StreamReplaced

pytestmark = pytest.mark.broker
STREAM = "LB_WS_w"
DESIRED = "lb.ws.w.desired"


@pytest.fixture
async def place(any_broker: Place) -> Place:
    await any_broker.workspace("w")
    return any_broker


@contextlib.asynccontextmanager
async def background(*work: Awaitable[None]) -> AsyncIterator[None]:
    """Run what runs for ever, until the block ends."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def desired(host: str, data: bytes = b"x", expected: int | None = None) -> Outgoing:
    return Outgoing(f"{DESIRED}.{host}", data, expected_subject_seq=expected)


async def contents(bus: Bus) -> list[tuple[str, bytes]]:
    return [(s.subject.rpartition(".")[2], s.data) for s in await bus.read(STREAM, [f"{DESIRED}.*"])]


async def test_a_batch_is_stored_whole_and_in_order(place: Place) -> None:
    bus = await place.bus("activation")
    last = await bus.batch([desired(f"h{n}", b"%d" % n) for n in range(1000)], expected_last=0)
    assert last == 1000 == await bus.revision(STREAM)
    assert await contents(bus) == [(f"h{n}", b"%d" % n) for n in range(1000)]


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_a_batch_on_an_old_revision_stores_nothing(place: Place, size: int) -> None:
    bus = await place.bus("activation")
    assert await bus.publish(desired("a")) == 1
    with pytest.raises(Conflict):
        await bus.batch([desired(f"h{n}") for n in range(size)], expected_last=0)
    assert await contents(bus) == [("a", b"x")]


async def test_one_message_with_a_wrong_expectation_refuses_its_whole_batch(place: Place) -> None:
    bus = await place.bus("activation")
    await bus.publish(desired("a"))
    with pytest.raises(Conflict):
        await bus.batch([desired("b"), desired("a", b"new", expected=0), desired("c")])
    assert await contents(bus) == [("a", b"x")]
    assert await bus.batch([desired("b"), desired("a", b"new", expected=1)], expected_last=1) == 3


async def test_a_repeated_message_id_in_one_batch_is_a_mistake_of_the_caller(place: Place) -> None:
    bus = await place.bus("activation")
    same = {"Nats-Msg-Id": "one"}
    with pytest.raises(ValueError, match="twice"):
        await bus.batch(
            [Outgoing(f"{DESIRED}.a", b"", headers=same), Outgoing(f"{DESIRED}.b", b"", headers=same)]
        )
    with pytest.raises(ValueError, match="1 to 1000"):
        await bus.batch([])


async def test_the_same_message_id_is_stored_once(place: Place) -> None:
    bus = await place.bus("activation")
    out = Outgoing(f"{DESIRED}.a", b"x", {"Nats-Msg-Id": "event-1"})
    assert await bus.publish(out) == await bus.publish(out) == 1
    with pytest.raises(Conflict):  # a batch tells, so that its caller looks at what was stored
        await bus.batch([out, desired("b")])
    assert await contents(bus) == [("a", b"x")]


async def test_an_id_whose_message_was_refused_can_be_used_again(place: Place) -> None:
    bus = await place.bus("activation")
    out = [Outgoing(f"{DESIRED}.a", b"x", {"Nats-Msg-Id": "event-1"}), desired("b")]
    with pytest.raises(Conflict):
        await bus.batch(out, expected_last=9)
    assert await bus.batch(out, expected_last=0) == 2


async def test_desired_states_reach_their_host_only_once_stored(place: Place) -> None:
    bus = await place.bus("activation")
    host = await place.bus(place.host("w", "h1"))
    seen: list[bytes] = []

    async def receive(message: object) -> None:
        seen.append(message.data)  # type: ignore[attr-defined]

    await host.nc.subscribe("lb.ws.w.to.h1.desired", cb=receive)
    await settled(host.nc)
    await bus.publish(desired("h1", b"1"))
    with pytest.raises(Conflict):
        await bus.publish(desired("h1", b"refused", expected=0))
    with pytest.raises(Conflict):
        await bus.batch([desired("h1", b"refused"), desired("h2", b"refused")], expected_last=0)
    await bus.batch([desired("h2", b"not for h1"), desired("h1", b"2")], expected_last=1)
    await bus.publish(desired("h1", b"3"))
    await eventually(lambda: b"3" in seen)
    assert seen == [b"1", b"2", b"3"]


async def test_racing_writers_give_each_generation_one_content(place: Place) -> None:
    """A thousand compare-and-set writes by two writers: no generation is lost, none has two contents."""
    writers = {name: await place.bus("activation") for name in ("a", "b")}
    won: dict[str, list[int]] = {name: [] for name in writers}
    conflicts = Counter[str]()

    async def write(name: str, bus: Bus) -> None:
        for number in range(500):
            while True:
                found = await bus.last(STREAM, f"{DESIRED}.h")
                generation = int(found.data.split(b":")[0]) + 1 if found else 1
                try:
                    await bus.publish(
                        desired(
                            "h",
                            b"%d:%s:%d" % (generation, name.encode(), number),
                            found.sequence if found else 0,
                        )
                    )
                except Conflict:
                    conflicts[name] += 1
                    continue
                won[name].append(generation)
                break

    await asyncio.gather(*(write(name, bus) for name, bus in writers.items()))
    stored = [data for _, data in await contents(writers["a"])]
    assert [int(data.split(b":")[0]) for data in stored] == list(range(1, 1001))
    by_writer = {
        name: [g for g, d in enumerate(stored, 1) if d.split(b":")[1] == name.encode()] for name in won
    }
    assert by_writer == won
    assert conflicts.total() > 0, "the writers never met: the test proved nothing"


async def test_racing_batches_interleave_whole(place: Place) -> None:
    buses = [await place.bus("activation") for _ in range(2)]

    async def write(name: int, bus: Bus) -> None:
        for _ in range(25):
            while True:
                revision = await bus.revision(STREAM)
                with contextlib.suppress(Conflict):
                    await bus.batch([desired(f"{name}-{n}") for n in range(5)], expected_last=revision)
                    break

    await asyncio.gather(*(write(n, bus) for n, bus in enumerate(buses)))
    hosts = [host for host, _ in await contents(buses[0])]
    assert len(hosts) == 250
    for start in range(0, 250, 5):
        writer = hosts[start].partition("-")[0]
        assert hosts[start : start + 5] == [f"{writer}-{n}" for n in range(5)]


async def test_last_reads_own_writes(place: Place) -> None:
    bus = await place.bus("activation")
    assert await bus.last(STREAM, f"{DESIRED}.a") is None
    assert await bus.last("LB_WS_none", f"{DESIRED}.a") is None
    for number in range(20):
        sequence = await bus.publish(Outgoing(f"{DESIRED}.a", b"%d" % number, {"x-word": "a: b"}))
        found = await bus.last(STREAM, f"{DESIRED}.a")
        assert found is not None
        assert (found.data, found.sequence, found.stream) == (b"%d" % number, sequence, STREAM)
        assert found.headers["x-word"] == "a: b"


async def test_read_returns_everything_that_is_stored(place: Place) -> None:
    bus = await place.bus("activation")
    assert await bus.read(STREAM, [f"{DESIRED}.*"]) == []
    assert await bus.read("LB_WS_none", [f"{DESIRED}.*"]) == []
    await bus.batch([desired(f"h{n}") for n in range(1000)])
    await bus.batch([desired(f"i{n}") for n in range(700)])
    assert len(await bus.read(STREAM, [f"{DESIRED}.*"])) == 1700
    two = await bus.read(STREAM, [f"{DESIRED}.h7", f"{DESIRED}.i9"])
    assert [s.subject for s in two] == [f"{DESIRED}.h7", f"{DESIRED}.i9"]


async def test_the_clock_is_the_brokers_and_never_goes_back(place: Place) -> None:
    bus = await place.bus("activation")
    times = [await bus.now() for _ in range(50)]
    assert times == sorted(times)
    assert all(t.tzinfo is UTC for t in times)
    assert abs(times[0] - datetime.now(UTC)) < timedelta(seconds=5)  # it is this machine's, here
    before = await bus.now()
    await bus.publish(desired("a"))
    found = await bus.last(STREAM, f"{DESIRED}.a")
    assert found is not None
    assert abs(found.time - before) < timedelta(seconds=2)


async def test_a_fold_sees_what_was_and_what_comes_once_and_in_order(place: Place) -> None:
    bus = await place.bus("activation")
    await bus.batch([desired("a", b"%d" % n) for n in range(1000)])
    seen: list[int] = []
    at_rest: list[int] = []
    caught_up = asyncio.Event()
    fold = bus.fold(
        STREAM,
        [f"{DESIRED}.*"],
        lambda s: seen.append(s.sequence),
        caught_up=caught_up,
        after=lambda: at_rest.append(len(seen)),
    )
    async with background(fold):
        await asyncio.wait_for(caught_up.wait(), 10)
        assert seen == list(range(1, 1001))
        assert at_rest == [1000]
        for _ in range(30):
            await bus.publish(desired("b"))
        await eventually(lambda: at_rest[-1] == 1030)
    assert seen == list(range(1, 1031))


async def test_a_fold_of_nothing_is_caught_up_at_once(place: Place) -> None:
    bus = await place.bus("activation")
    caught_up = asyncio.Event()
    after: list[int] = []
    async with background(
        bus.fold(
            STREAM, ["lb.ws.w.rollout.>"], lambda s: None, caught_up=caught_up, after=lambda: after.append(1)
        )
    ):
        await asyncio.wait_for(caught_up.wait(), 10)
    assert after == [1]


async def test_a_fold_of_the_last_values_starts_with_those(place: Place) -> None:
    bus = await place.bus("activation")
    await bus.batch([desired(f"h{n % 3}", b"%d" % n) for n in range(99)])
    seen: list[bytes] = []
    caught_up = asyncio.Event()
    async with background(
        bus.fold(
            STREAM,
            [f"{DESIRED}.*"],
            lambda s: seen.append(s.data),
            caught_up=caught_up,
            last_per_subject=True,
        )
    ):
        await asyncio.wait_for(caught_up.wait(), 10)
        assert seen == [b"96", b"97", b"98"]
        await bus.publish(desired("h0", b"new"))
        await eventually(lambda: seen[-1] == b"new")


async def test_a_fold_waits_for_a_stream_that_comes_later(any_broker: Place) -> None:
    bus = await any_broker.bus("activation")
    seen: list[bytes] = []
    caught_up = asyncio.Event()
    async with background(
        bus.fold("LB_WS_later", ["lb.ws.later.desired.*"], lambda s: seen.append(s.data), caught_up=caught_up)
    ):
        await any_broker.workspace("later")
        await asyncio.wait_for(caught_up.wait(), 10)
        await bus.publish(Outgoing("lb.ws.later.desired.h", b"1"))
        await eventually(lambda: seen == [b"1"])


async def test_a_fold_resumes_without_gap_or_repeat_when_the_broker_was_killed(place: Place) -> None:
    writer, reader = await place.bus("activation"), await place.bus("activation")
    seen: list[int] = []
    caught_up = asyncio.Event()
    async with background(
        reader.fold(STREAM, [f"{DESIRED}.*"], lambda s: seen.append(s.sequence), caught_up=caught_up)
    ):
        await writer.batch([desired("a") for _ in range(100)])
        await eventually(lambda: len(seen) == 100)
        for round_ in (1, 2):
            await place.kill()
            await place.start()
            await writer.batch([desired("a") for _ in range(50)])
            await eventually(lambda wanted=100 + 50 * round_: len(seen) == wanted)
    assert seen == list(range(1, 201))


async def test_nothing_acknowledged_is_lost_when_the_broker_is_killed_under_load(place: Place) -> None:
    """Publishers that were cut off mid-way finish by themselves, and each of their messages is there exactly once."""
    writers = [await place.bus("activation") for _ in range(4)]
    acknowledged: list[tuple[int, bytes]] = []
    done = asyncio.Event()

    async def write(name: int, bus: Bus) -> None:
        for number in itertools.count():
            data = b"%d.%d" % (name, number)
            if number % 5 == 4:
                sequence = await bus.batch([desired("x", data + b".0"), desired("y", data)])
            else:
                sequence = await bus.publish(desired("y", data))
            acknowledged.append((sequence, data))
            if done.is_set():
                return

    async def break_it() -> None:
        for wanted in (100, 200):
            await eventually(lambda wanted=wanted: len(acknowledged) > wanted)
            await place.kill()
            before = len(acknowledged)
            await place.start()
            await eventually(lambda before=before: len(acknowledged) > before + 20, timeout=40)
        done.set()

    await asyncio.gather(break_it(), *(write(n, bus) for n, bus in enumerate(writers)))
    stored = await writers[0].read(STREAM, [f"{DESIRED}.*"])
    where = {s.data: s.sequence for s in stored}
    assert len(where) == len(stored), "something was stored twice"
    assert {data: sequence for sequence, data in acknowledged} == {
        data: where[data] for _, data in acknowledged
    }
    for name in range(4):  # and nothing that a writer sent came in another order
        mine = [int(s.data.split(b".")[1]) for s in stored if s.data.startswith(b"%d." % name)]
        assert mine == sorted(mine)


async def test_a_replaced_stream_is_noticed(place: Place) -> None:
    bus = await place.bus("admin")
    await bus.batch([desired("a") for _ in range(10)])
    caught_up = asyncio.Event()
    fold = asyncio.ensure_future(bus.fold(STREAM, [f"{DESIRED}.*"], lambda s: None, caught_up=caught_up))
    await asyncio.wait_for(caught_up.wait(), 10)
    await bus.api(f"STREAM.DELETE.{STREAM}")
    await place.workspace("w")
    with pytest.raises(StreamReplaced):
        await asyncio.wait_for(fold, 20)


# Shared work


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
    await asyncio.wait_for(taken.wait(), 10)
    first.nc._transport.close()  # its connection breaks, as when its machine does
    first.nc._max_reconnect = 0
    await first.close()
    async with background(worker(second, finish)):
        await eventually(lambda: finished, timeout=15)
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
    await asyncio.wait_for(started.wait(), 10)
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
