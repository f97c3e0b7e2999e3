"""Commands: verified in numbered steps, decided once, and answered from the stream.

A command may come again: the broker redelivers it when a replica dies, and somebody may replay its bytes. Its outcome, stored
in the same atomic batch as whatever it decided, tells both apart: the same id at the same place in LB_CMD was redelivered
and is done; the same id at another place is a replay and is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Final, NamedTuple, Protocol

import msgspec
from opentelemetry import metrics, trace

from loopback.contracts import envelope, events, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import Envelope
from loopback.contracts.messages import AnyCommand, Command, JournalEntry, PoolPut, Result, decode_command
from loopback.contracts.trustdoc import Trust
from loopback.contracts.verbs import VERBS
from loopback.services._runtime import tracing, wire
from loopback.services._runtime.bus import Bus, Conflict, Outgoing, Stored
from loopback.services._runtime.service import Service
from loopback.services._runtime.wire import ApiError

MAX_VALIDITY: Final = timedelta(hours=24)
SKEW: Final = timedelta(seconds=60)  # operators' clocks may be off by this much
DECISIONS: Final = 100  # times that a command is decided again at once; then it comes again later
PARALLEL: Final = 4
_UNVERIFIED: Final = "unverified"  # detail of an outcome whose command was signed by nobody known

log = logging.getLogger(__name__)


class Accepted(msgspec.Struct, frozen=True):
    """What a handler decided. `also` is stored in the same atomic batch as the result, in the workspace's stream.

    `expected_last` is the revision of that stream on which the decision rests; None: it rests on none.
    """

    detail: dict[str, str] = {}
    also: tuple[Outgoing, ...] = ()
    expected_last: int | None = None


class CommandContext(NamedTuple):
    """A verified command: who signed it, where and when the broker stored it, and the broker's time now."""

    command: AnyCommand
    envelope: Envelope
    keyids: tuple[str, ...]
    operators: tuple[str, ...]
    stored: Stored
    now: datetime


#: Raises Refused where the answer is no, and Conflict where what it looked at has changed: it is called again then.
Handler = Callable[[CommandContext], Awaitable[Accepted]]
Handlers = Mapping[type[Command], Handler]


class Trusts(Protocol):
    """What is needed of a TrustSource."""

    async def current(self) -> Trust:
        """The trust document."""

    async def look_again(self) -> bool:
        """Whether there may be a newer one now."""


async def serve_commands(service: Service, handlers: Handlers) -> None:
    """Work on this service's commands, for ever, together with its other replicas."""
    await service.trust.wait()
    desk = Desk(service.name, service.bus, service.trust, handlers, service.tracer, service.meter)
    service.ready.set()
    await service.bus.consume(
        subjects.STREAM_COMMANDS,
        f"{service.name}-commands",
        [subjects.commands_for(service.name)],
        desk.handle,
        parallel=PARALLEL,
    )


def authorised(trust: Trust, keyids: tuple[str, ...], command: AnyCommand) -> tuple[str, ...]:
    """The operators by whose role a command may be: `verbs.VERBS` says which. Raises Refused(COMMAND_UNAUTHORISED)."""
    if isinstance(command, PoolPut):
        return trust.authorise_pool(keyids, command.pool, command.workspace)
    return trust.authorise(keyids, VERBS[type(command)].role, command.workspace)


class _Progress:
    """How far the verification of one command came: what a refusal can say about it."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        parts = stored.subject.split(".")
        self.workspace = _unescaped(parts[2]) if len(parts) > 2 else subjects.GLOBAL_WORKSPACE
        self.id = _usable(stored.headers.get("ce-id") or stored.headers.get("Nats-Msg-Id", ""), stored)
        self.kind = ""
        self.keyids: tuple[str, ...] = ()
        self.operators: tuple[str, ...] = ()


class Desk:
    """Where one service's commands are worked on."""

    def __init__(
        self,
        name: str,
        bus: Bus,
        trust: Trusts,
        handlers: Handlers,
        tracer: trace.Tracer,
        meter: metrics.Meter,
    ) -> None:
        self._name = name
        self._bus = bus
        self._trust = trust
        self._handlers = handlers
        self._tracer = tracer
        self._count = meter.create_counter("loopback_commands", description="Commands, by type and outcome")

    async def handle(self, stored: Stored) -> None:
        """Work on one command until its outcome is stored. Raises Refused(TUF_*) where there is no trust to judge by."""
        progress = _Progress(stored)
        with tracing.consume_span(self._tracer, stored, group=f"{self._name}-commands") as span:
            refused: Refused | None = None
            context: CommandContext | None = None
            try:
                context = await self._verify(stored, progress)
            except Refused as error:
                refused = error
            if context is not None and isinstance(rollout := getattr(context.command, "rollout", None), str):
                span.set_attribute("loopback.rollout.id", rollout)
            for attempt in range(DECISIONS):
                try:
                    outcome = await self._decide(context, progress, refused)
                    break
                except Conflict as conflict:
                    log.debug("command %s is decided again: %s", progress.id, conflict)
                    await asyncio.sleep(random.uniform(0, 0.01 * min(attempt + 1, 10)))  # noqa: S311 — spreads replicas
            else:
                raise Conflict(f"command {progress.id} met conflicts {DECISIONS} times")
            span.set_attribute("loopback.outcome", outcome)
            self._count.add(1, {"type": progress.kind or "unknown", "outcome": outcome})

    async def _verify(self, stored: Stored, progress: _Progress) -> CommandContext:
        """Steps 1 to 8. Raises Refused; what it learned on the way stays in `progress`."""
        # 1. Size, before anything is decoded.
        if len(stored.data) > envelope.MAX_ENVELOPE:
            raise Refused(
                Code.ENVELOPE_TOO_LARGE,
                f"{len(stored.data)} bytes are more than the {envelope.MAX_ENVELOPE} allowed",
            )
        # 2. It is an envelope.
        sealed = envelope.parse(stored.data)
        # 3. Of a command, and of nothing else that the same key may have signed.
        if sealed.payloadType != envelope.COMMAND:
            raise Refused(
                Code.ENVELOPE_TYPE,
                f"the envelope holds {sealed.payloadType[:80]!r}, not {envelope.COMMAND!r}",
            )
        # 4. Its payload is a command of this version's.
        try:
            command = decode_command(envelope.payload_of(sealed))
        except (msgspec.MsgspecError, RecursionError) as error:
            raise Refused(Code.COMMAND_MALFORMED, f"the command does not decode: {error}") from None
        progress.kind = str(command.__struct_config__.tag)
        progress.id = _usable(command.id, stored)
        _require_plain(command, progress.id)
        # 5. It stands where it says it belongs: a command for one workspace or service is none for another.
        parsed = subjects.parse(stored.subject)
        verb = progress.kind.replace(".", "-")
        if (parsed.workspace, parsed.area, parsed.rest) != (command.workspace, "cmd", (self._name, verb)):
            raise Refused(
                Code.COMMAND_WRONG_SUBJECT,
                f"a {progress.kind} for workspace {command.workspace!r} was sent to {stored.subject}",
                f"send it to {subjects.command(command.workspace, self._name, verb)}",
            )
        if type(command) not in self._handlers:
            raise Refused(Code.COMMAND_UNKNOWN, f"{self._name} does not handle {progress.kind}")
        # 6. Somebody known signed it. 7. That somebody may. An answer of no is given only by the newest trust document.
        try:
            self._authenticate(await self._current_trust(), sealed, command, progress)
        except Refused:
            if not await self._trust.look_again():
                raise
            self._authenticate(await self._current_trust(), sealed, command, progress)
        # 8. It is valid now, by the broker's clock.
        now = await self._bus.now()
        if command.expires_at - command.issued_at > MAX_VALIDITY:
            raise Refused(
                Code.COMMAND_MALFORMED, "expires_at: it is more than a day after issued_at", "sign it again"
            )
        if command.issued_at > now + SKEW:
            raise Refused(
                Code.COMMAND_NOT_YET_VALID,
                f"it was issued at {command.issued_at.isoformat()}, but the broker has {now.isoformat()}",
                "set the operator's clock right and sign the command again",
            )
        if command.expires_at < now - SKEW:
            raise Refused(
                Code.COMMAND_EXPIRED,
                f"it expired at {command.expires_at.isoformat()}; the broker has {now.isoformat()}",
                "sign the command again",
            )
        return CommandContext(command, sealed, progress.keyids, progress.operators, stored, now)

    async def _current_trust(self) -> Trust:
        try:
            return await self._trust.current()
        except Refused as refused:  # our trouble, not the operator's: the command comes again
            raise RuntimeError(f"no trust document to judge by: {refused}") from refused

    def _authenticate(self, trust: Trust, sealed: Envelope, command: AnyCommand, progress: _Progress) -> None:
        _, progress.keyids = envelope.open_envelope(sealed, envelope.COMMAND, trust.operator_keys)
        progress.operators = authorised(trust, progress.keyids, command)

    async def _decide(
        self, context: CommandContext | None, progress: _Progress, refused: Refused | None
    ) -> str:
        """Step 9 and the decision itself, stored as one batch. Returns the outcome. Raises Conflict."""
        place = await self._place(progress.workspace)
        stored = progress.stored
        # 9. It was not decided before: redelivered ones are done, replayed ones are refused.
        subject = subjects.result(place, progress.id)
        known = await self._bus.last(subjects.workspace_stream(place), subject)
        if known is None and place != subjects.GLOBAL_WORKSPACE:
            # It may have been decided when there was no such workspace yet.
            general = subjects.result(subjects.GLOBAL_WORKSPACE, progress.id)
            known = await self._bus.last(subjects.workspace_stream(subjects.GLOBAL_WORKSPACE), general)
            expected = 0
        else:
            expected = known.sequence if known else 0
        if known is not None:
            earlier = msgspec.json.decode(known.data, type=Result)
            if earlier.sequence == stored.sequence:
                return "redelivered"
            if context is None or _UNVERIFIED not in earlier.detail:
                subject, expected = subjects.result(place, f"{progress.id}.{stored.sequence}"), 0
                if await self._bus.last(subjects.workspace_stream(place), subject) is not None:
                    return "redelivered"
                context = None
                refused = refused or Refused(
                    Code.COMMAND_REPLAYED,
                    f"the command {progress.id} was already decided at {earlier.at.isoformat()}",
                    "make a new command where it is meant again",
                )
        accepted = Accepted()
        if context is not None:
            handler = self._handlers[type(context.command)]
            try:
                accepted = await handler(context)
            except Refused as error:
                refused = error
            if (made := await self._place(progress.workspace)) != place:
                # The handler made the workspace's stream, where nothing is known of this command yet.
                place, subject, expected = made, subjects.result(made, progress.id), 0
        now = await self._bus.now()
        if refused is not None:
            detail = {} if progress.keyids else {_UNVERIFIED: "nobody known signed it"}
            log.info("refused %s %s: %s", progress.kind or "command", progress.id, refused)
        else:
            detail = accepted.detail
            log.info("accepted %s %s by %s", progress.kind, progress.id, ", ".join(progress.operators))
        result = Result(
            command=progress.id,
            command_type=progress.kind,
            ok=refused is None,
            at=now,
            service=self._name,
            sequence=stored.sequence,
            refusal=refused.refusal if refused else None,
            detail=detail,
        )
        event = "refused" if refused else "accepted"
        entry = JournalEntry(
            service=self._name,
            event=event,
            at=now,
            command=progress.id,
            command_type=progress.kind,
            keys=progress.keyids,
            operators=progress.operators,
            refusal=result.refusal,
            subject=stored.subject,
            detail=detail,
            sequence=stored.sequence,
            sha256=hashlib.sha256(stored.data).hexdigest(),
        )
        await self._bus.batch(
            (
                *(accepted.also if refused is None else ()),
                self._event(
                    subject,
                    msgspec.json.encode(result),
                    "result",
                    progress,
                    now,
                    expected,
                ),
                self._event(
                    subjects.journal(place, self._name, event),
                    msgspec.json.encode(entry),
                    "journal",
                    progress,
                    now,
                    None,
                ),
            ),
            expected_last=accepted.expected_last if refused is None else None,
        )
        return "accepted" if refused is None else str(refused.code)

    async def _place(self, workspace: str) -> str:
        """The workspace whose stream takes the outcome: its own, or the global one where there is no such workspace."""
        try:
            await self._bus.revision(subjects.workspace_stream(workspace))
        except ApiError as error:
            if error.code != wire.NO_STREAM:
                raise
            return subjects.GLOBAL_WORKSPACE
        return workspace

    def _event(
        self,
        subject: str,
        data: bytes,
        kind: str,
        progress: _Progress,
        now: datetime,
        expected: int | None,
    ) -> Outgoing:
        headers = events.headers(
            event_id=f"{kind}-{progress.id}-{progress.stored.sequence}",
            source=self._name,
            event_type=kind,
            subject=progress.workspace,
            at=now,
            traceparent=tracing.traceparent(),
        )
        return Outgoing(subject, data, headers, expected)


def _require_plain(command: AnyCommand, usable: str) -> None:
    """Raise Refused where the fields that every command has are of no use."""
    if command.id != usable:
        raise Refused(Code.COMMAND_MALFORMED, "id: it is empty or too long", "use a UUID")
    for name, value in (("issued_at", command.issued_at), ("expires_at", command.expires_at)):
        if value.tzinfo is None:
            raise Refused(Code.COMMAND_MALFORMED, f"{name}: it has no time zone", "write times in UTC")


def _usable(event_id: str, stored: Stored) -> str:
    """The event's id, or one made from its place where that cannot be part of a subject."""
    try:
        subjects.result(subjects.GLOBAL_WORKSPACE, f"{event_id}.{stored.sequence}")
    except Refused:
        return f"seq-{stored.sequence}"
    return event_id or f"seq-{stored.sequence}"


def _unescaped(token: str) -> str:
    """The workspace in a subject; the global one where it is none that we could have made."""
    try:
        return subjects.untoken(token)
    except Refused:
        return subjects.GLOBAL_WORKSPACE
