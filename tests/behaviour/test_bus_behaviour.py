"""What services rely on in the bus, against the embedded server and against NATS in a container."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from support import Place, background, eventually, settled

from loopback.services._runtime.bus import Bus, Conflict, Outgoing, StreamReplaced

pytestmark = pytest.mark.broker
STREAM = "LB_WS_w"
DESIRED = "lb.ws.w.desired"


@pytest.fixture
async def place(any_broker: Place) -> Place:
    await any_broker.workspace("w")
    return any_broker


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
        await asyncio.wait_for(caught_up.wait(), 60)
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
        await asyncio.wait_for(caught_up.wait(), 60)
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
        await asyncio.wait_for(caught_up.wait(), 60)
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
        await asyncio.wait_for(caught_up.wait(), 60)
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
            await eventually(lambda before=before: len(acknowledged) > before + 20)
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
    await asyncio.wait_for(caught_up.wait(), 60)
    await bus.api(f"STREAM.DELETE.{STREAM}")
    await place.workspace("w")
    with pytest.raises(StreamReplaced):
        await asyncio.wait_for(fold, 60)
