"""What happens on a message: an operator's command, a host's status, another service's word.

Commands answer through the runtime, which stores their outcome in the same atomic batch as the link they lead to. Everything
else is handed to the workspace's engine, and is acknowledged once it is journaled.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable
from typing import Final

import msgspec
import nats.errors

from loopback.contracts import events, journal, reports, rolloutplan, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.messages import (
    JournalEntry,
    Presence,
    Release,
    RolloutAbort,
    RolloutApprove,
    RolloutPause,
    RolloutResume,
    RolloutStart,
    Verdict,
)
from loopback.contracts.reports import Status
from loopback.services._runtime import tracing
from loopback.services._runtime.bus import Conflict, Forbidden, Outgoing, Stored, Unavailable
from loopback.services._runtime.commands import Accepted, CommandContext
from loopback.services._runtime.trustsource import TrustSource
from loopback.services._runtime.wire import ApiError
from loopback.services.activation import checks, sizes
from loopback.services.activation.documents import Chain
from loopback.services.activation.engine import Engine
from loopback.services.activation.store import MAX_LINK
from loopback.services.activation.workspaces import Workspaces

log = logging.getLogger(__name__)
REFUSALS_EACH_S: Final = (
    10.0  # one journal entry per host in this time, so that a bad host cannot fill the stream
)
REFUSERS: Final = 10_000
DELIVERIES: Final = (
    8  # of a report that cannot be worked on, over some 25 s; then it is dropped and journaled
)
_TRANSIENT: Final = (Unavailable, Conflict, ApiError, Forbidden, nats.errors.Error, OSError)
MAX_POLICY_CHUNKS: Final = 8  # a signed policy is at most envelope.MAX_ENVELOPE, six chunks of 128 KiB
_FACTS: Final[Decoder[Verdict | Presence]] = Decoder(msgspec.json.Decoder(Verdict | Presence))
_RELEASES: Final[Decoder[Release]] = Decoder(msgspec.json.Decoder(Release))


class Handlers:
    """The service's handlers, all on one set of workspaces."""

    def __init__(self, workspaces: Workspaces, trust: TrustSource) -> None:
        self.workspaces = workspaces
        self.bus = workspaces.bus
        self.fleet = workspaces.fleet
        self.trust = trust
        self.tracer = workspaces.tracer
        self._refused: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    # Commands

    async def start(self, context: CommandContext) -> Accepted:
        """RolloutStart: everything that can be known now is checked now; eligibility and delivery have the next word."""
        command = context.command
        assert isinstance(command, RolloutStart)
        engine = await self.workspaces.engine(command.workspace)
        rolloutplan.check(command)
        trust = await self.trust.current()
        rules = trust.rules(command.workspace)
        checks.rules(command, rules)
        size, blob = 0, None
        if not command.scope.absent:
            size = checks.release(command, await self._release(command))
            blob = await self._policy(command.scope.policy) if command.scope.policy else None
        await engine.store.synced()
        state, revision = engine.store.state, engine.store.revision  # from here on nothing waits
        checks.new(state, command, context.now)
        hosts = {name: h.labels for name, h in self.fleet.hosts.get(command.workspace, {}).items()}
        members = rolloutplan.members(command, hosts)
        checks.peers(state, command, (m.host for m in members))
        checks.order(state, command, (m.host for m in members))
        sources = checks.policy(state, command, blob, trust)
        traceparent = context.stored.headers.get("traceparent") or tracing.traceparent()
        created = journal.Created(
            envelope=context.envelope,
            command=command.id,
            keyids=context.keyids,
            operators=context.operators,
            members=members,
            module=command.module,
            version=command.version,
            package="" if command.scope.absent else command.scope.packages[command.version],
            size=size,
            policy=command.scope.policy,
            policy_serial=command.scope.policy_serial,
            traceparent=traceparent,
            approvals_needed=1 if rules.regulated else 0,
            sources=sources,
        )
        link = self._link(Chain(command.workspace, command.rollout, 0, ""), created, context)
        if len(link.data) > MAX_LINK:
            raise Refused(
                Code.ROLLOUT_INVALID,
                f"scope.selector: {len(members)} hosts with the labels that waves ask for are too many for one rollout",
                "split the rollout, or ask for fewer labels in its waves",
            )
        detail = {"rollout": command.rollout, "hosts": str(len(members))}
        if created.approvals_needed:
            detail["approvals_needed"] = str(created.approvals_needed)
        return Accepted(detail=detail, also=(link,), expected_last=revision)

    async def approve(self, context: CommandContext) -> Accepted:
        """RolloutApprove: another operator's signature under the very command that was accepted."""
        command = context.command
        assert isinstance(command, RolloutApprove)
        trust = await self.trust.current()
        engine = await self._at(command.workspace)
        rollout = checks.find(engine.store.state, command.rollout)
        names = checks.may_approve(rollout, context.envelope, trust, context.now)
        event = journal.Approved(envelope=context.envelope, keyids=context.keyids, operators=names)
        return self._next(engine, command.rollout, event, context)

    async def pause(self, context: CommandContext) -> Accepted:
        """RolloutPause."""
        command = context.command
        assert isinstance(command, RolloutPause)
        engine = await self._at(command.workspace)
        checks.may_pause(checks.find(engine.store.state, command.rollout))
        reason = command.reason or "asked by an operator"
        return self._next(
            engine, command.rollout, journal.Paused(reason=reason, operators=context.operators), context
        )

    async def resume(self, context: CommandContext) -> Accepted:
        """RolloutResume."""
        command = context.command
        assert isinstance(command, RolloutResume)
        engine = await self._at(command.workspace)
        checks.may_resume(checks.find(engine.store.state, command.rollout), context.now)
        event = journal.Resumed(reason=command.reason, operators=context.operators)
        return self._next(engine, command.rollout, event, context)

    async def abort(self, context: CommandContext) -> Accepted:
        """RolloutAbort: back with the hosts that were assigned; where there is none, it is merely canceled."""
        command = context.command
        assert isinstance(command, RolloutAbort)
        engine = await self._at(command.workspace)
        rollout = checks.find(engine.store.state, command.rollout)
        checks.may_abort(rollout)
        reason = command.reason or "aborted by an operator"
        event: journal.AnyEvent = journal.Canceled(reason=reason, operators=context.operators)
        if any(progress.generation for progress in rollout.hosts.values()):
            event = journal.RollingBack(reason=reason, operators=context.operators, envelope=context.envelope)
        return self._next(engine, command.rollout, event, context)

    async def _at(self, workspace: str) -> Engine:
        engine = await self.workspaces.engine(workspace)
        await engine.store.synced()
        return engine

    def _next(self, engine: Engine, name: str, event: journal.AnyEvent, context: CommandContext) -> Accepted:
        chain = Chain.of(engine.store.state.rollouts[name])
        link = self._link(chain, event, context)
        return Accepted(detail={"rollout": name}, also=(link,), expected_last=engine.store.revision)

    @staticmethod
    def _link(chain: Chain, event: journal.AnyEvent, context: CommandContext) -> Outgoing:
        draft = chain.seal(event, context.now, tracing.traceparent())
        return Outgoing(draft.subject, draft.data, draft.headers)

    async def _release(self, command: RolloutStart) -> Release | None:
        digest = command.scope.packages[command.version]
        found = await self.bus.last(subjects.STREAM_CATALOG, subjects.catalog(command.module, digest))
        try:
            return _RELEASES.decode(found.data) if found else None
        except (msgspec.MsgspecError, RecursionError) as error:
            raise Refused(
                Code.PACKAGE_UNKNOWN,
                f"what the catalog has of {command.module} {command.version} does not read: {error}",
                "publish it again with 'loopback module publish'",
            ) from None

    async def _policy(self, digest: str) -> bytes | None:
        """The stored policy; None where a chunk is missing. Bounded by MAX_POLICY_CHUNKS."""
        data = b""
        chunks = 1
        for number in range(MAX_POLICY_CHUNKS):
            if number >= chunks:
                break
            found = await self.bus.last(subjects.STREAM_BLOBS, subjects.blob(digest, number))
            if found is None:
                return None
            data += found.data
            stated = found.headers.get("Lb-Chunks", "1")
            chunks = int(stated) if stated.isdecimal() else 1
        return data

    # Reports and facts

    async def status(self, stored: Stored) -> None:
        """A host's status: verified, then handed to its workspace. What does not verify is dropped and journaled."""
        await self._patiently(stored, self._status(stored))

    async def fact(self, stored: Stored) -> None:
        """Eligibility's or delivery's verdict, telemetry's presence. The bus's permissions say who may write these."""
        await self._patiently(stored, self._fact(stored))

    async def _patiently(self, stored: Stored, work: Awaitable[None]) -> None:
        """Let a message that fails come again, but not for ever: it would take the place of others."""
        try:
            await work
        except _TRANSIENT:
            raise
        except Exception as error:
            if stored.delivered < DELIVERIES:
                raise
            log.error("%s (sequence %d) is dropped", stored.subject, stored.sequence, exc_info=error)
            said = (
                f"it could not be worked on in {stored.delivered} deliveries: {type(error).__name__}: {error}"
            )
            await self._refuse(stored, Refused(Code.ROLLOUT_STATE, said, "see activation's log"))

    async def _status(self, stored: Stored) -> None:
        try:
            workspace, host, _ = reports.sender(stored.subject)
            await self.fleet.caught_up.wait()
            if self.fleet.key(workspace, host) is None:
                await self.fleet.refresh(self.bus, workspace, host)
            report = reports.open_report(stored.data, stored.subject, self.fleet.key)
        except Refused as refused:
            await self._refuse(stored, refused)
            return
        assert isinstance(report, Status)  # open_report compared it with the subject's last token
        try:
            engine = await self.workspaces.engine(workspace)
        except Refused as refused:
            log.warning("a status of %r was dropped: %s", host, refused)
            return
        rollouts = sorted({m.rollout for m in report.modules if m.rollout})
        about = {"loopback.rollout.id": rollouts[0]} if len(rollouts) == 1 else {}
        with tracing.consume_span(self.tracer, stored, group="activation-status", attributes=about):
            await engine.report(report)

    async def _fact(self, stored: Stored) -> None:
        try:
            found = _FACTS.decode(stored.data)
            workspace, named = _speaker(stored.subject)
            said = found.service if isinstance(found, Verdict) else found.host
            if (workspace, named) != (found.workspace, said):
                raise Refused(
                    Code.REPORT_IMPERSONATION, f"{stored.subject} speaks of {found.workspace}/{said}"
                )
            engine = await self.workspaces.engine(found.workspace)
        except (msgspec.MsgspecError, RecursionError, Refused) as error:
            log.error("what is on %s (sequence %d) was dropped: %s", stored.subject, stored.sequence, error)
            if not isinstance(error, Refused):
                error = Refused(Code.REPORT_MALFORMED, f"it does not decode: {error}")
            await self._refuse(stored, error)
            return
        about = {"loopback.rollout.id": found.rollout} if isinstance(found, Verdict) else {}
        with tracing.consume_span(self.tracer, stored, group="activation-facts", attributes=about):
            await engine.report(found)

    async def _refuse(self, stored: Stored, refused: Refused) -> None:
        try:
            workspace, host = _speaker(stored.subject)
        except Refused:
            log.error("what is on %s was dropped: %s", stored.subject, refused)
            return
        now = time.monotonic()
        last, count = self._refused.pop((workspace, host), (float("-inf"), 0))
        due = now - last >= REFUSALS_EACH_S
        self._refused[workspace, host] = (now, 0) if due else (last, count + 1)
        if len(self._refused) > REFUSERS:
            self._refused.popitem(last=False)
        if not due or not await self.fleet.refresh_workspace(self.bus, workspace):
            return
        at = await self.bus.now()
        entry = JournalEntry(
            service="activation",
            event="refused",
            at=at,
            refusal=sizes.refusal(refused.refusal),
            subject=stored.subject,
            detail={"sequence": str(stored.sequence), "left_out_before": str(count)},
        )
        await self.bus.publish(
            Outgoing(
                subjects.journal(workspace, "activation", "refused"),
                msgspec.json.encode(entry),
                events.headers(
                    event_id=f"refused/{stored.stream}/{stored.sequence}",
                    source="activation",
                    event_type="journal.refused",
                    subject=host,
                    at=at,
                    traceparent=stored.headers.get("traceparent", ""),
                ),
            )
        )


def _speaker(subject: str) -> tuple[str, str]:
    """The workspace that a message is about, and who speaks in it, or is spoken of. Raises Refused."""
    parsed = subjects.parse(subject)
    return parsed.workspace, parsed.rest[-1] if parsed.area == "verdict" else parsed.rest[0]
