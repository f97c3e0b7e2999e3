"""What activation knows of records: one that was read ahead of its turn says nothing of those before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from loopback.contracts import envelope, subjects
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostPut, Record, WorkspacePut
from loopback.services._runtime.bus import Stored
from loopback.services.activation.fleet import Fleet

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FIELDS = {"id": "c1", "workspace": "prod", "issued_at": NOW, "expires_at": NOW + timedelta(hours=1)}
OPERATOR = SigningKey.generate()


def record(kind: str, name: str, command: HostPut | WorkspacePut, sequence: int) -> Stored:
    sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), OPERATOR)
    body = Record(kind=kind, name=name, workspace="prod", envelope=sealed, at=NOW, sequence=sequence)
    return Stored(subjects.record("prod", kind, name), msgspec.json.encode(body), {}, sequence, NOW, "S")


def host(name: str, sequence: int) -> Stored:
    key = SigningKey.generate().public.text
    return record("host", name, HostPut(**FIELDS, host=name, public_key=key), sequence)  # type: ignore[arg-type]


class Leader:
    """A bus whose leader has everything already, and whose deliveries come when they are told to."""

    def __init__(self, *stored: Stored) -> None:
        self.stored = stored
        self.deliveries: asyncio.Queue[Stored] = asyncio.Queue()

    async def last(self, stream: str, subject: str) -> Stored | None:
        wanted = subject.removesuffix("*")
        return next((one for one in reversed(self.stored) if one.subject.startswith(wanted)), None)

    async def fold(
        self, stream: str, filters: Any, on: Callable[[Stored], None], *, after: Callable[[], None], **_: Any
    ) -> None:
        while True:
            on(await self.deliveries.get())
            after()


@pytest.mark.parametrize("ahead", ["host", "workspace"])
async def test_a_record_read_ahead_of_its_turn_does_not_stand_for_those_before_it(ahead: str) -> None:
    first, second = host("web-1", 1), host("web-2", 2)
    last = (
        host("web-3", 3)
        if ahead == "host"
        else record("workspace", "prod", WorkspacePut(**FIELDS, environment="sandbox"), 3)  # type: ignore[arg-type]
    )
    leader, found = Leader(first, second, last), Fleet()
    bus: Any = leader
    folding = asyncio.create_task(found.run(bus))
    leader.deliveries.put_nowait(first)
    if ahead == "host":
        await found.refresh(bus, "prod", "web-3")
        assert found.key("prod", "web-3")
    else:
        assert await found.refresh_workspace(bus, "prod")
    catching_up = asyncio.create_task(found.catch_up(bus, "prod"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not catching_up.done(), "web-2 is not known yet"
    leader.deliveries.put_nowait(second)
    leader.deliveries.put_nowait(last)
    await asyncio.wait_for(catching_up, 60)
    assert found.hosts["prod"].keys() >= {"web-1", "web-2"}
    folding.cancel()
