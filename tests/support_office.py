"""A service with one handler on a real broker, its operators, and what it was asked."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import msgspec
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support import Place, eventually

from loopback.contracts import subjects
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import (
    JournalEntry,
    Result,
    RolloutPause,
    WorkspacePut,
)
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.services._runtime.bus import Bus, Outgoing, Stored
from loopback.services._runtime.commands import Accepted, CommandContext, Desk

ADA, VERA, STRANGER, LATER = (SigningKey.generate() for _ in range(4))
SERVICE = "activation"


def trust(*operators: Operator) -> Trust:
    return Trust(TrustDocument(version=1, operators=operators, services={}))


def operator(name: str, key: SigningKey, *roles: Role, workspace: str = "prod") -> Operator:
    return Operator(name, key.public.text, {workspace: roles})


class FixedTrust:
    """A trust document, and the one that comes after it."""

    def __init__(self, *documents: Trust) -> None:
        self._documents = list(documents)

    async def current(self) -> Trust:
        return self._documents[0]

    async def look_again(self) -> bool:
        if len(self._documents) == 1:
            return False
        del self._documents[0]
        return True


class Office:
    """A service with one handler, and what it was asked."""

    def __init__(self, place: Place, admin: Bus) -> None:
        self.place = place
        self.admin = admin
        self.asked: list[str] = []
        self.answer: Callable[[CommandContext], Awaitable[Accepted]] = self._yes
        self.trust = FixedTrust(
            trust(operator("ada", ADA, Role.RELEASER), operator("vera", VERA, Role.VIEWER)),
            trust(
                operator("ada", ADA, Role.RELEASER),
                operator("vera", VERA, Role.VIEWER),
                operator("new", LATER, Role.ADMIN),
            ),
        )
        self.spans = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self._tasks: list[asyncio.Future[None]] = []

    async def _yes(self, context: CommandContext) -> Accepted:
        self.asked.append(context.command.id)
        return Accepted({"by": ",".join(context.operators)})

    async def _handle(self, context: CommandContext) -> Accepted:
        return await self.answer(context)

    async def open(self) -> Desk:
        """One more replica."""
        bus = await self.place.bus(SERVICE)
        meter = NoOpMeterProvider().get_meter("test")
        handlers = {
            RolloutPause: self._handle,
            WorkspacePut: self._handle,
        }
        desk = Desk(SERVICE, bus, self.trust, handlers, self.provider.get_tracer("test"), meter)
        self._tasks.append(
            asyncio.ensure_future(
                bus.consume(
                    subjects.STREAM_COMMANDS,
                    f"{SERVICE}-commands",
                    [subjects.commands_for(SERVICE)],
                    desk.handle,
                    parallel=4,
                )
            )
        )
        return desk

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.provider.shutdown()

    async def publish(
        self, data: bytes, *, subject: str = "", event_id: str = "", headers: dict[str, str] | None = None
    ) -> int:
        """Put a command's bytes on the bus, always as a new message; its place."""
        subject = subject or subjects.command("prod", SERVICE, "rollout-pause")
        found = {"ce-id": event_id or "x", "Nats-Msg-Id": str(uuid.uuid4()), **(headers or {})}
        return await self.admin.publish(Outgoing(subject, data, found))

    async def outcome(self, command: str, workspace: str = "prod", place: str = "prod") -> Result:
        """The stored result of a command."""

        async def look() -> Stored | None:
            return await self.admin.last(subjects.workspace_stream(place), subjects.result(place, command))

        return msgspec.json.decode((await eventually(look)).data, type=Result)

    async def journal(self, event: str, place: str = "prod") -> list[JournalEntry]:
        found = await self.admin.read(
            subjects.workspace_stream(place), [subjects.journal(place, SERVICE, event)]
        )
        return [msgspec.json.decode(s.data, type=JournalEntry) for s in found]

    async def done(self) -> None:
        """Until no command is waiting or being worked on."""

        async def idle() -> bool:
            info = await self.admin.api(f"CONSUMER.INFO.LB_CMD.{SERVICE}-commands")
            return bool(info["num_ack_pending"] == info["num_pending"] == 0)

        await eventually(idle)
