"""A module served by the SDK, spoken to over a real socket pair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused
from loopback.modules.sdk import Module
from loopback.modules.sdk.module import MAX_EVENTS, serve


class Recorder(Module):
    name = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.hold = asyncio.Event()

    async def configure(self, request: abi.Configure) -> None:
        self.calls.append(f"configure {request.host}")
        self.adopted, self.policy = True, "p0"

    async def stage(self, request: abi.Stage) -> dict[str, str]:
        if request.content == b"bad":
            raise Refused(Code.POLICY_INVALID, "rules[0].ports: empty", "name a port")
        if request.content == b"crash":
            raise ZeroDivisionError("one over nothing")
        if request.content == b"slow":
            await self.hold.wait()
        self.calls.append(f"stage {request.digest}")
        return {"rules": "3"}

    async def commit(self, request: abi.Commit) -> None:
        self.calls.append(f"commit {request.digest}")

    async def stop(self, *, remove: bool) -> None:
        self.calls.append(f"stop remove={remove}")


class Agent:
    """The other end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.next = reader, writer, 1

    async def read(self) -> abi.Frame:
        return abi.decode(await self.reader.readexactly(abi.length_of(await self.reader.readexactly(4))))

    def write(self, body: abi.Body) -> int:
        self.next += 1
        self.writer.write(abi.encode(abi.Frame(id=self.next, body=body)))
        return self.next

    async def ask(self, body: abi.Body) -> abi.Body:
        number = self.write(body)
        frame = await self.read()
        assert frame.id == number
        return frame.body


@asynccontextmanager
async def served(module: Module) -> AsyncIterator[tuple[Agent, asyncio.Task[None]]]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        task = group.create_task(serve(module, theirs))
        try:
            yield Agent(reader, writer), task
        finally:
            writer.close()
            await writer.wait_closed()


async def test_a_module_speaks_first_and_answers_each_request_under_its_id() -> None:
    module = Recorder()
    async with served(module) as (agent, _):
        hello = (await agent.read()).body
        assert isinstance(hello, abi.Hello)
        assert (hello.module, hello.abi) == ("recorder", abi.ABI_VERSION)
        configured = await agent.ask(abi.Configure(host="h1", workspace="w", state_dir="/x"))
        assert configured == abi.Done(detail={"adopted": "true", "policy": "p0"})
        assert await agent.ask(abi.Stage(digest="d", serial=1, content=b"{}")) == abi.Done(
            detail={"rules": "3"}
        )
        health = await agent.ask(abi.Health())
        assert isinstance(health, abi.Done)
        assert health.health == abi.HealthReport(state="ok", policy="p0")
        assert module.calls == ["configure h1", "stage d"]


async def test_a_refusal_becomes_failed_with_its_code_and_next_step() -> None:
    async with served(Recorder()) as (agent, _):
        await agent.read()
        answer = await agent.ask(abi.Stage(digest="d", serial=1, content=b"bad"))
        assert answer == abi.Failed(
            code=Code.POLICY_INVALID, reason="rules[0].ports: empty", next_step="name a port"
        )


async def test_a_modules_own_mistake_becomes_failed_and_the_module_lives_on() -> None:
    async with served(Recorder()) as (agent, _):
        await agent.read()
        answer = await agent.ask(abi.Stage(digest="d", serial=1, content=b"crash"))
        assert isinstance(answer, abi.Failed)
        assert "ZeroDivisionError: one over nothing" in answer.reason
        assert isinstance(await agent.ask(abi.Health()), abi.Done)


async def test_health_answers_while_a_stage_is_still_working() -> None:
    module = Recorder()
    async with served(module) as (agent, _):
        await agent.read()
        stage = agent.write(abi.Stage(digest="d", serial=1, content=b"slow"))
        health = agent.write(abi.Health())
        assert (await agent.read()).id == health
        module.hold.set()
        assert (await agent.read()).id == stage


async def test_lifecycle_requests_are_done_in_the_order_they_came() -> None:
    module = Recorder()
    async with served(module) as (agent, _):
        await agent.read()
        agent.write(abi.Stage(digest="d", serial=1, content=b"slow"))
        agent.write(abi.Commit(digest="d", trial_s=1))
        assert isinstance(await agent_health(agent), abi.Done)
        assert module.calls == []
        module.hold.set()
        await agent.read()
        await agent.read()
        assert module.calls == ["stage d", "commit d"]


async def agent_health(agent: Agent) -> abi.Body:
    number = agent.write(abi.Health())
    frame = await agent.read()
    assert frame.id == number
    return frame.body


async def test_a_vanished_agent_ends_the_module_and_leaves_the_kernel_alone() -> None:
    module = Recorder()
    async with served(module) as (agent, task):
        await agent.read()
        agent.writer.close()
        await task
    assert module.calls == ["stop remove=False"]


async def test_stop_with_remove_is_answered_and_then_the_module_ends() -> None:
    module = Recorder()
    async with served(module) as (agent, task):
        await agent.read()
        assert await agent.ask(abi.Stop(remove=True)) == abi.Done()
        await task
    assert module.calls == ["stop remove=True"]


async def test_a_verb_from_the_future_is_refused_under_its_own_id() -> None:
    async with served(Recorder()) as (agent, _):
        await agent.read()
        body = msgspec.msgpack.encode({"id": 77, "body": {"verb": "teleport", "to": "moon"}})
        agent.writer.write(len(body).to_bytes(4, "big") + body)
        frame = await agent.read()
        assert frame.id == 77
        assert isinstance(frame.body, abi.Failed)
        assert frame.body.code == Code.MODULE_ABI


async def test_fields_from_the_future_are_ignored() -> None:
    async with served(Recorder()) as (agent, _):
        await agent.read()
        body = msgspec.msgpack.encode({"id": 5, "body": {"verb": "health", "deep": True}})
        agent.writer.write(len(body).to_bytes(4, "big") + body)
        assert isinstance((await agent.read()).body, abi.Done)


async def test_garbage_ends_the_conversation_and_the_kernel_is_left_alone() -> None:
    module = Recorder()
    async with served(module) as (agent, task):
        await agent.read()
        agent.writer.write(b"\x00\x00\x00\x03\xc1\xc1\xc1")
        await task
    assert module.calls == ["stop remove=False"]


async def test_a_flood_of_events_is_bounded_and_counted() -> None:
    module = Recorder()
    for number in range(MAX_EVENTS + 10):
        module.event("drop", number=number)
    assert module.dropped_events == 10
    async with served(module) as (agent, _):
        await agent.read()
        first = (await agent.read()).body
        assert isinstance(first, abi.Event)
        assert first.attributes == {"number": 10}


@pytest.mark.parametrize("value", ["", "seven"])
def test_a_module_started_by_hand_says_so(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from loopback.modules.sdk import run

    monkeypatch.setenv(abi.FD_VARIABLE, value)
    with pytest.raises(SystemExit, match="started by the agent"):
        run(Recorder)
