"""What happens on a command, on a change that may change offers, and on a rollout."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final

import msgspec
from opentelemetry import metrics, trace

from loopback.contracts import events, journal, subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import EntitlementPut, HostPut, Offer, PoolPut, Record, Verdict, WorkspacePut
from loopback.contracts.together import together
from loopback.contracts.trustdoc import Trust, WorkspaceRules
from loopback.services._runtime import streams, tracing
from loopback.services._runtime.bus import Bus, Conflict, Outgoing, Stored, Unavailable
from loopback.services._runtime.commands import Accepted, CommandContext, Trusts
from loopback.services.eligibility import decide
from loopback.services.eligibility.store import INPUTS, Fleet, Host, Source

log = logging.getLogger(__name__)

NAME: Final = "eligibility"
OFFERS_IN_FLIGHT: Final = 32  # publishes at once while a change is worked through a large fleet
MAX_ADDRESSES: Final = 64  # per host; they travel inside every desired state
RULES_S: Final = 5.0  # between looks at the trust document, which is refreshed every half minute
MAX_VERDICT: Final = 700_000  # bytes, below the broker's message limit; above it reasons give way to codes


class Handlers:
    """The service's hands; every method bears being called again with the same message."""

    def __init__(
        self, bus: Bus, fleet: Fleet, trust: Trusts, tracer: trace.Tracer, meter: metrics.Meter
    ) -> None:
        self._bus = bus
        self._fleet = fleet
        self._trust = trust
        self._tracer = tracer
        self._offers = meter.create_counter("loopback_eligibility_offers", description="Offers published")
        self._verdicts = meter.create_counter(
            "loopback_eligibility_verdicts", description="Verdicts on rollouts, by outcome"
        )

    # Commands

    async def put_workspace(self, context: CommandContext) -> Accepted:
        """A workspace: its stream first, then its record, so that whoever sees the record finds the stream."""
        command = context.command
        assert isinstance(command, WorkspacePut)
        if command.workspace == subjects.GLOBAL_WORKSPACE:
            raise Refused(
                Code.NAME_INVALID, f"{command.workspace!r} belongs to the system", "choose another name"
            )
        stream = subjects.workspace_stream(command.workspace)
        await streams.ensure_workspace(self._bus, command.workspace)
        return await self.put(context, "workspace", command.workspace, {"stream": stream})

    async def put_entitlement(self, context: CommandContext) -> Accepted:
        """An entitlement, new, changed or withdrawn."""
        command = context.command
        assert isinstance(command, EntitlementPut)
        decide.check_entitlement(command)
        await self.require_workspace(command.workspace)
        return await self.put(context, "entitlement", command.name, {"module": command.module})

    async def put_host(self, context: CommandContext) -> Accepted:
        """A host's record. One key names one host, or its reports could be taken for another's."""
        command = context.command
        assert isinstance(command, HostPut)
        check_host(command)
        await self.require_workspace(command.workspace)
        await self._fleet.caught_up(self._bus, Source.RECORDS)
        owner = self._fleet.owner(command.public_key.lower())
        if owner is not None and owner != (command.workspace, command.host) and not command.absent:
            raise Refused(
                Code.COMMAND_CONFLICT,
                f"public_key: it is already the key of {owner[1]!r} in {owner[0]!r}",
                "make a key of its own for each host ('loopback host add')",
            )
        known = await self._earlier(context, "host", command.host)
        if known is not None:
            decide.check_newer(command, known)
        return await self.put(context, "host", command.host, {})

    async def put_pool(self, context: CommandContext) -> Accepted:
        """What a pool has. An older serial is no news: hosts would not take it either."""
        command = context.command
        assert isinstance(command, PoolPut)
        decide.check_pool(command)
        await self.require_workspace(command.workspace)
        known = await self._earlier(context, "pool", command.pool)
        if known is not None:
            decide.check_serial(command, known)
        return await self.put(context, "pool", command.pool, {"serial": str(command.serial)})

    async def _earlier(self, context: CommandContext, kind: str, name: str) -> Record | None:
        """The record that a command is about, as an earlier one left it."""
        subject = subjects.record(context.command.workspace, kind, name)
        stored = await self._bus.last(subjects.STREAM_FLEET, subject)
        record = msgspec.json.decode(stored.data, type=Record) if stored is not None else None
        return record if record is not None and record.sequence < context.stored.sequence else None

    async def require_workspace(self, workspace: str) -> None:
        """Raises Refused(WORKSPACE_UNKNOWN) where nobody made it."""
        if workspace in self._fleet.workspaces:
            return
        await self._fleet.caught_up(self._bus, Source.RECORDS)
        if workspace not in self._fleet.workspaces:
            raise Refused(
                Code.WORKSPACE_UNKNOWN,
                f"there is no workspace {workspace!r}",
                f"make it with 'loopback workspace put {workspace}'",
            )

    async def put(self, context: CommandContext, kind: str, name: str, detail: dict[str, str]) -> Accepted:
        """Store a record, once: a redelivered command finds its record there, and an older one changes nothing.

        Raises Conflict where another command's record came in between: it is decided again.
        """
        subjects.token(name)  # no name that a subject cannot hold, nor one that stands for all
        workspace, place = context.command.workspace, context.stored.sequence
        subject = subjects.record(workspace, kind, name)
        detail = {"kind": kind, "name": name, **detail}
        known = await self._bus.last(subjects.STREAM_FLEET, subject)
        newest = msgspec.json.decode(known.data, type=Record).sequence if known else 0
        if newest > place:
            return Accepted(detail={**detail, "superseded_by": str(newest)})
        if newest < place:
            record = Record(
                kind=kind,
                name=name,
                workspace=workspace,
                envelope=context.envelope,
                at=context.now,
                operators=tuple(context.operators),
                sequence=place,
            )
            await self._bus.publish(
                event(
                    subject,
                    record,
                    f"record-{context.command.id}",
                    context.now,
                    known.sequence if known else 0,
                )
            )
        return Accepted(detail=detail)

    # Offers

    async def on_record(self, stored: Stored) -> None:
        """A host's record or an entitlement changed."""
        parsed = parse(stored)
        if parsed is None:
            return
        kind, name = parsed.rest
        if kind == "host":
            await self._refresh(stored, lambda: [(parsed.workspace, name)])
        elif kind == "entitlement":
            await self._refresh(stored, lambda: self._fleet.hosts_of(parsed.workspace))

    async def on_release(self, stored: Stored) -> None:
        """A release was published."""
        await self._refresh(stored, lambda: list(self._fleet.hosts))

    async def on_inventory(self, stored: Stored) -> None:
        """A host said what it is. Whether it was that host itself is judged when the inventory is folded."""
        parsed = parse(stored)
        if parsed is not None:
            host = parsed.workspace, parsed.rest[0]
            await self._refresh(stored, lambda: [host])

    async def follow_rules(self, every_s: float = RULES_S) -> None:
        """Judge every offer again when the trust document's rules of workspaces have changed, for ever."""
        known: dict[str, WorkspaceRules] | None = None
        while True:
            try:
                rules = (await self._trust.current()).document.workspaces
                if known is None or rules != known:
                    await self._refresh(None, lambda: list(self._fleet.hosts))
                    known = rules
            except (Refused, Unavailable, TimeoutError) as error:
                log.warning("offers are not judged by the newest rules yet: %s", error)
            await asyncio.sleep(every_s)

    async def _refresh(self, stored: Stored | None, affected: Callable[[], Iterable[Host]]) -> None:
        """Publish the offers that a change changes, each once, however many replicas see changes at the same time.

        Why nothing is missed: the offers to be replaced are noted first, then the fold catches up with everything stored
        by now, then each new offer is stored only over the one that was noted. So an offer made from more knowledge is
        never overwritten from less, and of two changes at once the one handled later is judged with both.
        """
        noted = dict(self._fleet.offers)
        await self._fleet.caught_up(self._bus, *INPUTS)
        again = await self._publish_offers(stored, list(affected()), noted)
        while again:
            await self._fleet.caught_up(self._bus, Source.OFFERS)
            noted = dict(self._fleet.offers)
            await self._fleet.caught_up(self._bus, *INPUTS)
            again = await self._publish_offers(stored, again, noted)

    async def _publish_offers(
        self, stored: Stored | None, hosts: Iterable[Host], noted: dict[Host, tuple[int, Offer]]
    ) -> list[Host]:
        """Publish what changed; returns the hosts whose offer somebody else changed meanwhile."""
        now = await self._bus.now()
        trust = await self._trust.current()
        changed = []
        for host in hosts:
            sequence, before = noted.get(host, (0, None))
            offer = self._offer(host, trust, now)
            if offer.versions != (before.versions if before else ()):
                changed.append((host, sequence, offer))
        if not changed:
            return []
        lost: list[Host] = []
        gate = asyncio.Semaphore(OFFERS_IN_FLIGHT)

        async def put(host: Host, sequence: int, offer: Offer) -> None:
            digest = hashlib.sha256(msgspec.json.encode(offer.versions)).hexdigest()[:16]
            event_id = f"offer-{subjects.token(host[0])}-{subjects.token(host[1])}-{sequence}-{digest}"
            async with gate:
                try:
                    await self._bus.publish(event(subjects.offer(*host), offer, event_id, now, sequence))
                except Conflict:
                    lost.append(host)
                else:
                    self._offers.add(1)

        about = {"loopback.offers": len(changed)}
        span = (
            tracing.consume_span(self._tracer, stored, group=NAME, attributes=about)
            if stored is not None
            else self._tracer.start_as_current_span("judge by new rules", attributes=about)
        )
        with span:
            await together(put(*one) for one in changed)
        return lost

    def _offer(self, host: Host, trust: Trust, now: datetime) -> Offer:
        fleet = self._fleet
        return Offer(
            host=host[1],
            workspace=host[0],
            versions=decide.offered(
                fleet.hosts.get(host),
                fleet.inventories.get(host),
                fleet.entitlements_of(host[0]),
                fleet.releases.values(),
                trust.rules(host[0]).floors,
            ),
            at=now,
        )

    # Rollouts

    async def on_created(self, stored: Stored) -> None:
        """A rollout was created: say which of its hosts may not have its version. Said once, whoever says it."""
        try:
            link = journal.decode(stored.data)
        except (msgspec.MsgspecError, RecursionError) as error:
            log.error(
                "%s (sequence %d) is dropped: it is no link: %s", stored.subject, stored.sequence, error
            )
            return
        created = link.event
        if not isinstance(created, journal.Created):
            return
        subject = subjects.verdict(link.workspace, link.rollout, NAME)
        with tracing.consume_span(
            self._tracer,
            stored,
            group=NAME,
            attributes={
                "loopback.rollout.id": link.rollout,
                "loopback.module": created.module,
                "loopback.module.version": created.version,
                "feature_flag.key": created.module,
            },
        ) as span:
            await self._fleet.caught_up(self._bus, *INPUTS)
            now = await self._bus.now()
            verdict = fitting(self._verdict(link, created, await self._trust.current(), now))
            span.set_attribute("loopback.hosts", len(created.members))
            span.set_attribute("loopback.hosts.refused", len(verdict.refused))
            event_id = f"verdict-{subjects.token(link.workspace)}-{subjects.token(link.rollout)}-{NAME}"
            try:
                await self._bus.publish(event(subject, verdict, event_id, now, 0))
            except Conflict:
                return
            self._verdicts.add(1, {"outcome": "refused" if verdict.refusal else "given"})

    def _verdict(self, link: journal.Link, created: journal.Created, trust: Trust, now: datetime) -> Verdict:
        fleet = self._fleet
        given = Verdict(rollout=link.rollout, workspace=link.workspace, service=NAME, at=now)
        if created.target is None:
            return given  # taking a module away needs no entitlement
        release = fleet.releases.get((created.module, created.package))
        if release is None or release.version != created.version:
            return msgspec.structs.replace(given, refusal=decide.no_release(created.module, created.version))
        hosts = [member.host for member in created.members]
        refused = decide.refused_hosts(
            hosts,
            {h: fleet.hosts[link.workspace, h] for h in hosts if (link.workspace, h) in fleet.hosts},
            {
                h: fleet.inventories[link.workspace, h]
                for h in hosts
                if (link.workspace, h) in fleet.inventories
            },
            fleet.entitlements_of(link.workspace),
            release,
            trust.rules(link.workspace).floors.get(created.module),
        )
        return msgspec.structs.replace(given, refused=refused)


def parse(stored: Stored) -> subjects.Parsed | None:
    """What a subject names; None, said in the log, where it is none that could have been made."""
    try:
        return subjects.parse(stored.subject)
    except Refused as refused:
        log.error("%s (sequence %d) is dropped: %s", stored.subject, stored.sequence, refused)
        return None


def check_host(command: HostPut) -> None:
    """Refuse a record that would not work. Raises Refused(COMMAND_MALFORMED) naming the field."""
    check_place(command.labels, command.addresses)
    try:
        PublicKey.parse(command.public_key)
    except Refused as error:
        raise Refused(
            Code.COMMAND_MALFORMED, f"public_key: {error.reason}", "give the host's key in hex"
        ) from None


def check_place(labels: dict[str, str], addresses: tuple[str, ...]) -> None:
    """Refuse labels and addresses that a record cannot have. Raises Refused(COMMAND_MALFORMED) naming the field."""
    decide.check_labels(labels)
    if len(addresses) > MAX_ADDRESSES:
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"addresses: {len(addresses)} are more than the {MAX_ADDRESSES} allowed",
            "name fewer",
        )
    for address in addresses:
        try:
            ipaddress.ip_interface(address)
        except ValueError:
            raise Refused(
                Code.COMMAND_MALFORMED,
                f"addresses: {address[:60]!r} is no IP address",
                "write it like 192.0.2.7 or 2001:db8::7",
            ) from None


def fitting(verdict: Verdict) -> Verdict:
    """The verdict, with bare codes where thousands of reasons would not fit into one message."""
    if len(msgspec.json.encode(verdict)) <= MAX_VERDICT:
        return verdict
    return msgspec.structs.replace(
        verdict, refused={host: Refusal(refusal.code, "") for host, refusal in verdict.refused.items()}
    )


def event(subject: str, body: msgspec.Struct, event_id: str, at: datetime, expected: int) -> Outgoing:
    """A message of this service, to be stored over exactly what is at `expected` (0: nothing)."""
    about = ".".join(subject.split(".")[4:])  # escaped, since names may hold what a header may not
    kind = str(body.__struct_config__.tag)
    return Outgoing(
        subject,
        msgspec.json.encode(body),
        events.headers(event_id=event_id, source=NAME, event_type=kind, subject=about, at=at),
        expected_subject_seq=expected,
    )
