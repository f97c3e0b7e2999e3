"""Eligibility with a real broker, and machines that enrol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client
from support import Place, eventually
from support_host import World as HostWorld

from loopback.cli import context, enrol, keys, supervise
from loopback.cli.token import Token
from loopback.contracts import subjects
from loopback.contracts.codes import Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Command, HostPut, JournalEntry, Record, Result, WorkspacePut
from loopback.services._runtime import service
from loopback.services._runtime.settings import read_identity
from loopback.services._runtime.wire import Outgoing
from loopback.services.eligibility import app as eligibility


class Enrolling:
    """An operator's session in a world with the workspace `prod`."""

    def __init__(self, place: Place, session: context.Session, stack: AsyncExitStack) -> None:
        self.place = place
        self.session = session
        self._stack = stack

    async def invite(self, host: str, workspace: str = "prod", **options: Any) -> Token:
        """An invitation's token."""
        known = {"labels": {"role": "web"}, "addresses": []}
        made, _ = await enrol.invite(self.session, host=host, workspace=workspace, **known | options)
        return made

    async def enrol(self, given: Token, out: Path, **options: Any) -> Path:
        """Take one."""
        return await enrol.enrol(given, out, **{"wait_s": 60.0} | options)

    async def put(self, host: str, key: SigningKey, workspace: str = "prod", **changes: Any) -> None:
        """Record a host by its key."""
        command = HostPut(
            **context.new_command_fields(workspace), host=host, public_key=key.public.text, **changes
        )
        await self.session.send(command, "eligibility")

    async def workspace(self, name: str) -> None:
        """Make a workspace."""
        await self.session.send(
            WorkspacePut(**context.new_command_fields(name), environment="sandbox"), "eligibility"
        )

    async def record(self, host: str, workspace: str = "prod", kind: str = "host") -> Record | None:
        """What is recorded of a host."""
        found = await self.session.last(subjects.STREAM_FLEET, subjects.record(workspace, kind, host))
        return msgspec.json.decode(found, type=Record) if found else None

    async def journal(self, event: str, workspace: str = "prod") -> list[JournalEntry]:
        """Eligibility's journal."""
        stream, subject = (
            subjects.workspace_stream(workspace),
            subjects.journal(workspace, "eligibility", event),
        )
        return [
            msgspec.json.decode(m.data, type=JournalEntry) for m in await self.session.read(stream, [subject])
        ]

    async def connect(self, creds: Path, **options: Any) -> Client:
        """A bare connection with these credentials, closed in the end."""
        nc = Client()
        name = subjects.untoken(read_identity(creds).name)
        known = {
            "user_credentials": str(creds),
            "inbox_prefix": subjects.inbox(name),
            "allow_reconnect": False,
        }
        await nc.connect(self.place.url, **known | options)
        self._stack.push_async_callback(nc.close)
        return nc


@asynccontextmanager
async def enrolling(place: Place, replicas: int = 1) -> AsyncIterator[Enrolling]:
    """Keys, trust and a running eligibility."""
    seed = read_identity(place.settings("activation").creds).seed
    keys.init_keys(place.home, SigningKey.from_nkey(seed).public.text)
    context.save(
        place.home, url=place.url, creds="creds/operator.creds", operator_key="keys/operators/admin.pem"
    )
    await supervise.seed_repository(await place.bus(), place.home)
    stop = asyncio.Event()
    context.set_home(place.home)
    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        for number in range(1, replicas + 1):
            settings = place.settings("eligibility", instance=str(number))
            group.create_task(service.run("eligibility", settings, eligibility.start, stop=stop))
        try:
            session = await stack.enter_async_context(context.connect())
            made = Enrolling(place, session, stack)
            await made.workspace("prod")
            yield made
        finally:
            stop.set()
            context.set_home(None)


@asynccontextmanager
async def eligible(
    world: HostWorld, *workspaces: str
) -> AsyncIterator[Callable[[Command], Awaitable[Result]]]:
    """A running eligibility in the world of `support_host`, with these workspaces; yields how to send it a command."""
    bus = world.bus

    async def send(command: Command) -> Result:
        kind = str(command.__struct_config__.tag)
        subject = subjects.command(command.workspace, "eligibility", kind.replace(".", "-"))
        data = msgspec.json.encode(world.signers.command(command))
        await bus.publish(Outgoing(subject, data, {"Nats-Msg-Id": command.id}))

        async def outcome() -> Result | None:
            for place in (command.workspace, subjects.GLOBAL_WORKSPACE):
                found = await bus.last(subjects.workspace_stream(place), subjects.result(place, command.id))
                if found is not None:
                    return msgspec.json.decode(found.data, type=Result)
            return None

        result = await eventually(outcome)
        assert result is not None
        if result.refusal is not None:
            raise Refused(result.refusal.code, result.refusal.reason, result.refusal.next_step)
        return result

    stop = asyncio.Event()
    settings = world.place.settings("eligibility", root=world.config.root)
    async with asyncio.TaskGroup() as group:
        group.create_task(service.run("eligibility", settings, eligibility.start, stop=stop))
        try:
            for name in workspaces:
                fields = world.signers.times() | {"workspace": name}
                await send(WorkspacePut(**fields, environment="sandbox"))
            yield send
        finally:
            stop.set()
