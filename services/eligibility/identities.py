"""Hosts' identities: invitations, claims to them, and renewed credentials.

Claims and renewals are no commands: they come as plain requests, and what they lead to is either a record, stored under
compare-and-set, or an answer that may be given any number of times.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

import msgspec
import nats.errors
from nats.aio.msg import Msg
from opentelemetry import metrics

from loopback.contracts import envelope, events, hostrecord, identity, reports, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.hostrecord import Claim
from loopback.contracts.identity import Granted
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import HostInvite, HostMove, JournalEntry, Record, decode_command
from loopback.services._runtime.bus import Bus, Conflict, Outgoing, Stored, Unavailable
from loopback.services._runtime.commands import Accepted, CommandContext
from loopback.services._runtime.settings import Issuer, Settings
from loopback.services._runtime.wire import ApiError
from loopback.services.eligibility.handlers import NAME, Handlers, check_place, event
from loopback.services.eligibility.issuing import Issuing
from loopback.services.eligibility.store import Fleet, Source

log = logging.getLogger(__name__)

ATTEMPTS: Final = 10  # times that a claim is judged again after somebody else's write
BURST: Final = 20  # requests of one token or host that are worked on at once; an honest one sends one and waits for its answer
PER_S: Final = 2  # and then in each second: an honest one asks again after half a second or more
SENDERS: Final = 4096  # whose pace is remembered; forgotten ones begin anew


class Pace:
    """A bucket of tokens for each sender. Requests are worked on in turn, so without it one sender keeps all others waiting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # and when that was counted

    def __len__(self) -> int:
        return len(self._left)

    def admits(self, sender: str) -> bool:
        """Whether a request of this sender is worked on now; the broker says who that is."""
        now = self._clock()
        left, at = self._left.pop(sender, (float(BURST), now))
        left = min(float(BURST), left + (now - at) * PER_S)
        self._left[sender] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > SENDERS:
            self._left.popitem(last=False)
        return left >= 1


class Identities:
    """The service's hands for everything that leads to a JWT."""

    def __init__(
        self, bus: Bus, fleet: Fleet, handlers: Handlers, settings: Settings, meter: metrics.Meter
    ) -> None:
        self._bus = bus
        self._fleet = fleet
        self._handlers = handlers
        self._path = settings.issuer
        self._known: Issuing | None = None
        self._pace = Pace()
        self._count = meter.create_counter(
            "loopback_eligibility_identities", description="Claims and renewals, by outcome"
        )

    def _issuing(self) -> Issuing:
        """The keys, read when they are first needed: everything else works without. Raises Refused(SIGNATURE_INVALID)."""
        if self._known is None:
            self._known = Issuing(Issuer.load(self._path))
        return self._known

    async def listen(self) -> None:
        """Answer claims and renewals from now on, together with the other replicas."""
        await self._bus.nc.subscribe("lb.enrol.*", queue=NAME, cb=self._guarded("claim", self.on_claim))
        renewals = subjects.from_host("*", "*", "renew")
        await self._bus.nc.subscribe(renewals, queue=NAME, cb=self._guarded("renew", self.on_renew))

    def _guarded(
        self, kind: str, handle: Callable[[Msg], Awaitable[str]]
    ) -> Callable[[Msg], Awaitable[None]]:
        """Count what comes of it. Where nothing can, the sender gets no answer and asks again."""

        async def run(message: Msg) -> None:
            # Each may be sent on its sender's own subject alone, whatever stands inside.
            if not self._pace.admits(message.subject):
                self._count.add(1, {"kind": kind, "outcome": "too-fast"})
                return
            try:
                outcome = await handle(message)
            except (
                Conflict,
                Refused,
                Unavailable,
                ApiError,
                nats.errors.Error,
                msgspec.MsgspecError,
                TimeoutError,
            ) as error:
                log.warning("%s on %s is left: %s", kind, message.subject, error or type(error).__name__)
                outcome = "failed"
            self._count.add(1, {"kind": kind, "outcome": outcome})

        return run

    # Invitations

    async def invite(self, context: CommandContext) -> Accepted:
        """Keep an invitation, or take one back; the outcome carries the JWT that goes into its token."""
        command = context.command
        assert isinstance(command, HostInvite)
        check_invite(command, context.now)
        await self._handlers.require_workspace(command.workspace)
        detail = {} if command.absent else {"jwt": self._issuing().guest(command, context.now)}
        return await self._handlers.put(context, hostrecord.INVITE, command.host, detail)

    async def on_claim(self, message: Msg) -> str:
        """Somebody with a token claims to be its host; the outcome in a word."""
        keyid = message.subject.rpartition(".")[2]
        if not message.reply.startswith(f"{subjects.enrol_inbox(keyid)}."):
            # The broker does not check reply subjects: an answer must not land where only this service may write.
            log.warning("a claim on %s wants its answer on %s, and gets none", message.subject, message.reply)
            return "foreign-reply"
        try:
            granted = await self._claimed(keyid, message.data)
            outcome = "ok"
        except Refused as refused:
            log.info("a claim on %s is refused: %s", message.subject, refused)
            granted = Granted(at=await self._bus.now(), refusal=refused.refusal)
            outcome = str(refused.code)
        await self._bus.nc.publish(message.reply, msgspec.json.encode(granted))
        return outcome

    async def _claimed(self, keyid: str, data: bytes) -> Granted:
        request = _decoded(data)
        said = hostrecord.peek(request.claim)
        root = await self._root(request.root)
        issuing = self._issuing()
        for _ in range(ATTEMPTS):
            invited = await self.record(said.workspace, hostrecord.INVITE, said.host)
            known = await self.record(said.workspace, hostrecord.KIND, said.host)
            now = await self._bus.now()
            claim, again = judge_claim(keyid, request.claim, _body(invited), _body(known), now)
            key = PublicKey.parse(claim.public_key)
            if not again:
                assert invited is not None
                await self._alone(claim)
                record = msgspec.structs.replace(
                    _decoded_record(invited), kind=hostrecord.KIND, claim=request.claim, at=now
                )
                place = known.sequence if known else 0
                try:
                    await self._store(record, claim, key, place, now)
                except Conflict:
                    continue
            await self._journal(claim, now)
            return Granted(at=now, jwt=issuing.host(claim.workspace, claim.host, key, now), root=root)
        raise Conflict(f"the record of {said.host!r} changed {ATTEMPTS} times")

    async def _alone(self, claim: Claim) -> None:
        """One key is one host's. Raises Refused(COMMAND_CONFLICT)."""
        await self._fleet.caught_up(self._bus, Source.RECORDS)
        owner = self._fleet.owner(claim.public_key.lower())
        if owner is not None and owner != (claim.workspace, claim.host):
            raise Refused(
                Code.COMMAND_CONFLICT,
                f"it is already the key of {owner[1]!r} in {owner[0]!r}",
                "enrol with an empty --out folder",
            )

    async def _store(self, record: Record, claim: Claim, key: PublicKey, place: int, now: datetime) -> None:
        subject = subjects.record(claim.workspace, hostrecord.KIND, claim.host)
        await self._bus.publish(event(subject, record, f"claim-{claim.invite}-{key.keyid}", now, place))
        log.info("%s in %s took its invitation", claim.host, claim.workspace)

    async def _journal(self, claim: Claim, now: datetime) -> None:
        entry = JournalEntry(
            service=NAME,
            event="enrolled",
            at=now,
            command=claim.invite,
            subject=subjects.record(claim.workspace, hostrecord.KIND, claim.host),
            detail={"host": claim.host, "public_key": claim.public_key},
        )
        event_id = f"enrolled-{claim.invite}"  # the broker drops repeats
        await self._bus.publish(
            Outgoing(
                subjects.journal(claim.workspace, NAME, "enrolled"),
                msgspec.json.encode(entry),
                events.headers(
                    event_id=event_id,
                    source=NAME,
                    event_type="journal",
                    subject=subjects.token(claim.host),
                    at=now,
                ),
            )
        )

    async def _root(self, version: int) -> str:
        found = await self._bus.last(subjects.STREAM_TUF, subjects.tuf(f"{version}.root.json"))
        if found is None:
            raise Refused(
                Code.TUF_UNREACHABLE,
                f"the bus has no root.json of version {version}",
                "ask for a new invitation",
            )
        return found.data.decode()

    async def record(self, workspace: str, kind: str, name: str) -> Stored | None:
        """A record of this kind, from the leader."""
        return await self._bus.last(subjects.STREAM_FLEET, subjects.record(workspace, kind, name))

    # Renewals

    async def on_renew(self, message: Msg) -> str:
        """A host asks for new credentials; the outcome in a word. It is answered on its own subject, wherever it asked from."""
        try:
            workspace, host, _ = reports.sender(message.subject)
            stored = await self.record(workspace, hostrecord.KIND, host)
            if stored is None:
                raise Refused(Code.REPORT_UNKNOWN_HOST, f"no record names the host {host!r}")
            record = hostrecord.of(_decoded_record(stored))
            self._check_renewal(message, workspace, host, PublicKey.parse(record.public_key))
        except Refused as refused:
            log.info("%s is not answered: %s", message.subject, refused)
            return str(refused.code)
        now = await self._bus.now()
        command = decode_command(envelope.payload_of(_decoded_record(stored).envelope))
        if record.absent and isinstance(command, HostMove):
            await self.tell_move(workspace, host, command, _decoded_record(stored).envelope)
            return "moved"
        if record.absent:
            granted = Granted(
                at=now,
                refusal=Refused(
                    Code.IDENTITY_REVOKED,
                    f"an operator took {host!r} out of {workspace!r}",
                    "enrol it with a new invitation ('loopback host invite') where that was not meant",
                ).refusal,
            )
        else:
            key = PublicKey.parse(record.public_key)
            granted = Granted(at=now, jwt=self._issuing().host(workspace, host, key, now))
        await self.tell(workspace, host, granted)
        return "ok" if granted.refusal is None else str(granted.refusal.code)

    def _check_renewal(self, message: Msg, workspace: str, host: str, key: PublicKey) -> None:
        if len(message.data) > identity.MAX_RENEW:
            raise Refused(Code.REPORT_MALFORMED, f"{len(message.data)} bytes are too many")
        payload = reports.open_signed(message.data, message.subject, envelope.RENEW, key)
        try:
            asked = identity.decode_renew(payload)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise Refused(Code.REPORT_MALFORMED, f"{host!r} sent no renewal: {error}") from None
        if (asked.host, asked.workspace) != (host, workspace):
            raise Refused(
                Code.REPORT_IMPERSONATION, f"{host!r} asks for {asked.host!r} in {asked.workspace!r}"
            )

    async def tell_move(
        self, workspace: str, host: str, command: HostMove, signed: envelope.Envelope
    ) -> None:
        """Tell a host, where it was, that it belongs elsewhere now; unless an operator took it out there as well."""
        stored = await self.record(command.to, hostrecord.KIND, host)
        if stored is None:
            return
        there = hostrecord.of(_decoded_record(stored))
        gone = there.absent and not isinstance(
            decode_command(envelope.payload_of(_decoded_record(stored).envelope)), HostMove
        )
        if gone or there.public_key.lower() != command.public_key.lower():
            log.info("%s moved from %s to %s, where it is no more", host, workspace, command.to)
            return
        now = await self._bus.now()
        key = PublicKey.parse(command.public_key)
        granted = Granted(at=now, jwt=self._issuing().host(command.to, host, key, now), move=signed)
        await self.tell(workspace, host, granted)

    async def tell(self, workspace: str, host: str, granted: Granted) -> None:
        """Put an answer on the host's own subject. Nothing keeps it: a host that missed it asks again."""
        await self._bus.nc.publish(
            subjects.to_host(workspace, host, "identity"), msgspec.json.encode(granted)
        )


def judge_claim(
    keyid: str, claim: envelope.Envelope, invited: Record | None, known: Record | None, now: datetime
) -> tuple[Claim, bool]:
    """Whether a claim that came with this token (its key id) counts, and whether it was accepted before.

    `invited` is the host's invitation, `known` its record. Raises Refused: IDENTITY_TOKEN where the token opens nothing (any
    more), IDENTITY_CLAIM where the claim does not hold.
    """
    said = hostrecord.peek(claim)
    command = decode_command(envelope.payload_of(invited.envelope)) if invited is not None else None
    if invited is None or not isinstance(command, HostInvite) or command.host != said.host:
        raise _spent(f"nobody invited {said.host!r} to {said.workspace!r}")
    if command.id != said.invite:
        raise _spent("it was withdrawn" if command.absent else "a newer invitation took its place")
    if PublicKey.parse(command.claim_key).keyid != keyid:
        raise _spent("it belongs to another invitation")
    if now >= command.claim_before:
        raise _spent(f"it expired at {command.claim_before.isoformat()}; the broker has {now.isoformat()}")
    found = hostrecord.open_claim(claim, command)
    if known is None or known.sequence < invited.sequence:
        return found, False
    if known.sequence > invited.sequence or known.claim is None:
        raise _spent(f"the record of {said.host!r} is newer than its invitation")
    if hostrecord.open_claim(known.claim, command).public_key.lower() != found.public_key.lower():
        raise _spent("it was used already, with another key")
    return found, True


def _spent(why: str) -> Refused:
    return Refused(
        Code.IDENTITY_TOKEN,
        f"the token opens nothing: {why}",
        "ask an operator for a new one ('loopback host invite')",
    )


def check_invite(command: HostInvite, now: datetime) -> None:
    """Refuse an invitation that nobody could take. Raises Refused(COMMAND_MALFORMED) naming the field."""
    check_place(command.labels, command.addresses)
    try:
        PublicKey.parse(command.claim_key)
    except Refused as error:
        raise Refused(
            Code.COMMAND_MALFORMED, f"claim_key: {error.reason}", "give the token's public key in hex"
        ) from None
    if not command.absent and not now < command.claim_before <= now + hostrecord.MAX_CLAIM:
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"claim_before: {command.claim_before.isoformat()} is not within the {hostrecord.MAX_CLAIM.days} days from now on",
            "choose a shorter --valid",
        )


def _decoded(data: bytes) -> identity.Enrol:
    if len(data) > identity.MAX_ENROL:
        raise Refused(
            Code.IDENTITY_CLAIM, f"{len(data)} bytes are more than the {identity.MAX_ENROL} allowed"
        )
    try:
        return identity.decode_enrol(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.IDENTITY_CLAIM, f"the request does not read: {error}") from None


def _body(stored: Stored | None) -> Record | None:
    return _decoded_record(stored) if stored is not None else None


def _decoded_record(stored: Stored) -> Record:
    return msgspec.json.decode(stored.data, type=Record)
