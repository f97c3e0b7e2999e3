"""A service that is told to stop while it waits for an answer of the broker stops, also when the answer comes just then."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loopback.contracts import subjects
from loopback.services._runtime.bus import Bus, Outgoing


class Client:
    """Waits for answers as nats-py does."""

    is_connected, is_closed = True, False

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked = asyncio.Event()

    def jetstream(self, **_: object) -> None:
        """The bus keeps a handle that this test does not use."""

    async def request(self, *_: object, **__: object) -> Any:
        self.asked.set()
        return await asyncio.wait_for(self.answer, 60)


class Answer:
    data = b'{"stream":"LB_TUF","seq":7}'


@pytest.mark.parametrize("what", ["publish", "batch", "api"])
async def test_a_cancellation_that_meets_the_answer_is_not_forgotten(what: str) -> None:
    client = Client()
    bus = Bus(client, "test")  # type: ignore[arg-type]  # as much of a client as it asks for
    out = Outgoing(subjects.tuf("1.root.json"), b"")
    work = {
        "publish": lambda: bus.publish(out),
        "batch": lambda: bus.batch([out, out]),
        "api": lambda: bus.api("INFO"),
    }
    reached = False

    async def service() -> None:
        nonlocal reached
        await work[what]()
        reached = True

    task = asyncio.create_task(service())
    await client.asked.wait()
    client.answer.set_result(Answer)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not reached
