"""Eligibility on a real broker, with its own credentials: offers and verdicts, each said once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support import Place, eventually
from support_fleet import OPERATOR, WORKSPACE, World, fields, world

from loopback.contracts import envelope, journal, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import (
    EntitlementPut,
    HostPut,
    Offer,
    Record,
    RolloutStart,
    Scope,
    Selector,
    Verdict,
    Wave,
    WorkspacePut,
)
from loopback.contracts.trustdoc import Floor, Trust, TrustDocument, WorkspaceRules
from loopback.services._runtime.bus import Bus, Outgoing, Stored
from loopback.services._runtime.commands import CommandContext
from loopback.services._runtime.settings import Settings
from loopback.services._runtime.wire import Unavailable
from loopback.services.eligibility import app
from loopback.services.eligibility.handlers import Handlers
from loopback.services.eligibility.identities import Identities
from loopback.services.eligibility.moves import Moves
from loopback.services.eligibility.store import Fleet, Source

pytestmark = pytest.mark.broker
DEADLINE_S = 60.0


class FixedTrust:
    """A TrustSource whose document changes when the test says so."""

    def __init__(self) -> None:
        self.document = TrustDocument(version=1, operators=(), services={})

    def floor(self, version: str) -> None:
        rules = {WORKSPACE: WorkspaceRules(floors={"firewall": Floor(version)})}
        self.document = msgspec.structs.replace(self.document, workspaces=rules)

    async def current(self) -> Trust:
        return Trust(self.document)

    async def look_again(self) -> bool:
        return False


class Replica:
    """Eligibility without its command desk: everything that follows from what is stored."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        self.bus = bus
        self.spans = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.fleet = Fleet(logging.getLogger("test"), self._appeared)
        tracer = self.provider.get_tracer("test")
        self.trust = FixedTrust()
        meter = NoOpMeterProvider().get_meter("test")
        self.handlers = Handlers(bus, self.fleet, self.trust, tracer, meter)
        identities = Identities(bus, self.fleet, self.handlers, settings, meter)
        self.moves = Moves(bus, self.fleet, self.handlers, identities, self.trust)
        self._group = asyncio.TaskGroup()

    def _appeared(self, workspace: str) -> None:
        self._group.create_task(app.follow_rollouts(self.bus, workspace, self.handlers))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        """While it works."""
        ready = {source: asyncio.Event() for source in Source}
        try:
            async with self._group as group:
                for fold in self.fleet.folds(self.bus, ready):
                    group.create_task(fold)
                async with asyncio.timeout(DEADLINE_S):
                    for event in ready.values():
                        await event.wait()
                for work in app.follow_changes(self.bus, self.handlers, self.moves):
                    group.create_task(work)
                group.create_task(self.handlers.follow_rules(every_s=0.05))
                yield self
                raise _Stop
        except* _Stop:
            self.provider.shutdown()


class _Stop(Exception):
    """The replica is no longer needed."""


@pytest.fixture
async def place(broker: Place) -> AsyncIterator[World]:
    async with world(broker) as made:
        yield made


@pytest.fixture
async def replica(place: World) -> AsyncIterator[Replica]:
    async with Replica(
        await place.bus("eligibility"), place.place.settings("eligibility")
    ).running() as running:
        yield running


async def offer_of(bus: Bus, host: str, good: Callable[[Offer], bool], workspace: str = WORKSPACE) -> Offer:
    """The host's stored offer, once it is as wanted."""

    async def wanted() -> Offer | None:
        found = await bus.last(subjects.STREAM_FLEET, subjects.offer(workspace, host))
        seen = msgspec.json.decode(found.data, type=Offer) if found else None
        assert seen is not None, f"{host} has no offer"
        assert good(seen), seen
        return seen

    found = await eventually(wanted)
    assert found is not None
    return found


def refusals(offer: Offer) -> dict[str, Code | None]:
    return {v.version: v.refusal.code if v.refusal else None for v in offer.versions}


async def test_every_change_of_a_rule_changes_the_offer_and_says_which_rule_it_was(place, replica):
    bus = replica.bus
    host = await place.host("web-1", labels={"role": "web"})
    await place.release("1.0.0", kernel="5.17")
    await offer_of(bus, "web-1", lambda o: refusals(o) == {"1.0.0": Code.ELIGIBILITY_NO_ENTITLEMENT})
    await place.entitle("fw-prod", versions=">=1,<2", labels={"role": "web"})
    await offer_of(bus, "web-1", lambda o: refusals(o) == {"1.0.0": Code.ELIGIBILITY_NO_INVENTORY})
    await host.say(host.inventory(kernel="5.10"))
    await offer_of(bus, "web-1", lambda o: refusals(o) == {"1.0.0": Code.ELIGIBILITY_KERNEL})
    await host.say(host.inventory(kernel="6.1"))
    good = await offer_of(bus, "web-1", lambda o: refusals(o) == {"1.0.0": None})
    assert 'entitlement "fw-prod"' in good.versions[0].rule and "kernel ≥ 5.17" in good.versions[0].rule
    await place.release("2.0.0", digest="cd" * 32)
    both = await offer_of(bus, "web-1", lambda o: len(o.versions) == 2)
    assert refusals(both) == {"2.0.0": Code.ELIGIBILITY_VERSION, "1.0.0": None}
    await host.put(labels={"role": "db"})
    await offer_of(bus, "web-1", lambda o: set(refusals(o).values()) == {Code.ELIGIBILITY_LABELS})
    await host.put(absent=True)
    await offer_of(bus, "web-1", lambda o: o.versions == ())


async def test_a_floor_in_the_trust_document_changes_offers_and_verdicts_and_is_named(place, replica):
    bus = replica.bus
    host = await place.host("web-1")
    await place.entitle()
    await place.release("1.0.0")
    await place.release("1.1.0", digest="cd" * 32)
    await host.say(host.inventory())
    await offer_of(bus, "web-1", lambda o: refusals(o) == {"1.0.0": None, "1.1.0": None})
    replica.trust.floor("1.1.0")
    offer = await offer_of(
        bus, "web-1", lambda o: refusals(o) == {"1.0.0": Code.HOST_BELOW_FLOOR, "1.1.0": None}
    )
    low = next(v for v in offer.versions if v.version == "1.0.0")
    assert low.rule == "floor: ≥ 1.1.0 (release is 1.0.0)"
    await (await place.bus("activation")).publish(created(("web-1",)))
    verdict, _ = await verdict_of(bus)
    assert verdict.refused["web-1"].code is Code.HOST_BELOW_FLOOR
    replica.trust.floor("0.9")
    await offer_of(bus, "web-1", lambda o: refusals(o) == {"1.0.0": None, "1.1.0": None})


async def test_rules_are_judged_again_after_the_bus_failed_amid_it(place, replica, monkeypatch):
    host = await place.host("web-1")
    await place.entitle()
    await place.release()
    await host.say(host.inventory())
    await offer_of(replica.bus, "web-1", lambda o: refusals(o) == {"1.0.0": None})
    failed = 0

    async def unavailable(event: Outgoing) -> None:
        nonlocal failed
        failed += 1
        raise Unavailable("no answer")

    with monkeypatch.context() as broken:
        broken.setattr(replica.bus, "publish", unavailable)
        replica.trust.floor("1.1.0")
        following = asyncio.create_task(replica.handlers.follow_rules(every_s=0.01))
        await eventually(lambda: failed > 10 or following.done())
        assert not following.done(), "it looks again, as for any other fault of the bus"
    following.cancel()
    await offer_of(replica.bus, "web-1", lambda o: refusals(o) == {"1.0.0": Code.HOST_BELOW_FLOOR})


async def test_many_changes_seen_by_two_replicas_give_each_different_offer_once(place, replica):
    async with Replica(await place.bus("eligibility"), place.place.settings("eligibility")).running():
        hosts = [await place.host(f"web-{n}") for n in range(4)]
        async with asyncio.TaskGroup() as group:
            group.create_task(place.entitle())
            for number, digest in enumerate(("aa", "bb", "cc")):
                group.create_task(place.release(f"1.{number}.0", digest=digest * 32))
            for host in hosts:
                group.create_task(host.say(host.inventory()))
        for host in hosts:
            await offer_of(
                replica.bus, host.name, lambda o: refusals(o) == dict.fromkeys(("1.2.0", "1.1.0", "1.0.0"))
            )
        # Nothing is left to do, and no offer repeats the one before it.
        await host.say(host.inventory())
        await place.entitle("another", versions="==99")
        await place.release("1.3.0", digest="dd" * 32)
        for host in hosts:
            await offer_of(replica.bus, host.name, lambda o: len(o.versions) == 4)
            stored = await replica.bus.read(subjects.STREAM_FLEET, [subjects.offer(WORKSPACE, host.name)])
            contents = [msgspec.json.decode(s.data, type=Offer).versions for s in stored]
            assert all(one != next_one for one, next_one in itertools.pairwise(contents))


async def test_an_inventory_from_another_host_is_not_believed(place, replica):
    good, bad = await place.host("web-1"), await place.host("web-2")
    await place.entitle()
    await place.release()
    await offer_of(replica.bus, "web-1", lambda o: refusals(o) == {"1.0.0": Code.ELIGIBILITY_NO_INVENTORY})
    false = msgspec.structs.replace(bad.inventory(), host="web-1")
    await bad.say(false)  # on its own subject, in the other's name
    await bad.say(
        false, to=subjects.from_host(WORKSPACE, "web-1", "inventory")
    )  # the broker refuses this one
    await bad.say(bad.inventory())
    await offer_of(replica.bus, "web-2", lambda o: refusals(o) == {"1.0.0": None})
    assert ("prod", "web-1") not in replica.fleet.inventories
    assert any("ermissions" in e for e in bad.errors)
    await good.say(good.inventory())
    await offer_of(replica.bus, "web-1", lambda o: refusals(o) == {"1.0.0": None})


def created(
    members: tuple[str, ...], version: str = "1.0.0", digest: str = "ab" * 32, workspace: str = WORKSPACE
):
    now = datetime.now(UTC)
    start = RolloutStart(
        **fields(workspace),
        rollout="r1",
        module="firewall",
        version=version,
        waves=(Wave(name="all", percent=100),),
        scope=Scope(
            workspace=workspace, module="firewall", packages={version: digest}, policy=None, policy_serial=0,
            selector=Selector(), not_before=now, not_after=now,
        ),
    )  # fmt: skip
    event = journal.Created(
        envelope=envelope.seal(envelope.COMMAND, msgspec.json.encode(start), OPERATOR),
        command="c1",
        keyids=(),
        operators=("ann",),
        members=tuple(journal.Member(m) for m in members),
        module="firewall",
        version=version,
        package=digest,
    )
    link = journal.Link(rollout="r1", workspace=workspace, seq=1, prev="", at=now, event=event)
    return Outgoing(
        subjects.rollout(workspace, "r1", "created"),
        journal.encode(link),
        {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
    )


async def verdict_of(bus: Bus, workspace: str = WORKSPACE) -> tuple[Verdict, Stored]:
    found = await eventually(
        lambda: bus.last(subjects.STREAM_FLEET, subjects.verdict(workspace, "r1", "eligibility"))
    )
    assert found is not None
    return msgspec.json.decode(found.data, type=Verdict), found


async def test_a_rollout_gets_one_verdict_in_its_own_trace_that_names_each_refused_host(place, replica):
    host = await place.host("web-1")
    await place.host("web-2")
    await place.entitle()
    await place.release()
    await host.say(host.inventory())
    activation = await place.bus("activation")
    message = created(("web-1", "web-2", "never-heard-of"))
    async with Replica(await place.bus("eligibility"), place.place.settings("eligibility")).running():
        await activation.publish(message)
        verdict, stored = await verdict_of(replica.bus)
        assert verdict.refusal is None
        assert {h: r.code for h, r in verdict.refused.items()} == {
            "web-2": Code.ELIGIBILITY_NO_INVENTORY,
            "never-heard-of": Code.ELIGIBILITY_NO_RECORD,
        }
        assert "-0af7651916cd43dd8448eb211c80319c-" in stored.headers["traceparent"]
        # A repeat changes nothing: the verdict is stored over nothing at all, once.
        await replica.handlers.on_created(
            Stored(message.subject, message.data, message.headers, 1, stored.time, "LB_WS_prod")
        )
        found = await replica.bus.read(
            subjects.STREAM_FLEET, [subjects.verdict(WORKSPACE, "r1", "eligibility")]
        )
        assert len(found) == 1


async def test_a_rollout_of_a_package_that_nobody_published_is_refused_as_a_whole(place, replica):
    await place.host("web-1")
    await place.release()
    await (await place.bus("activation")).publish(created(("web-1",), digest="ef" * 32))
    verdict, _ = await verdict_of(replica.bus)
    assert verdict.refusal is not None and verdict.refusal.code is Code.ELIGIBILITY_NO_RELEASE


async def test_taking_a_module_away_needs_no_entitlement(place, replica):
    await (await place.bus("activation")).publish(created(("web-1",), digest=""))
    verdict, _ = await verdict_of(replica.bus)
    assert (verdict.refusal, verdict.refused) == (None, {})


def context(command, sequence: int) -> CommandContext:
    now = datetime.now(UTC)
    sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), OPERATOR)
    stored = Stored("lb.ws.prod.cmd.eligibility.x", b"", {}, sequence, now, subjects.STREAM_COMMANDS)
    return CommandContext(command, sealed, (OPERATOR.keyid,), ("ann",), stored, now)


async def test_a_new_workspace_gets_its_stream_and_its_rollouts_are_judged(place, replica):
    command = WorkspacePut(**fields("fresh"), environment="staging")
    accepted = await replica.handlers.put_workspace(context(command, 1001))
    assert accepted.detail["stream"] == "LB_WS_fresh"
    await (await place.bus("activation")).publish(created(("web-1",), workspace="fresh"))
    verdict, _ = await verdict_of(replica.bus, "fresh")
    assert verdict.workspace == "fresh"


async def test_a_redelivered_command_stores_its_record_once_and_a_late_one_changes_nothing(place, replica):
    def put(sequence: int, versions: str):
        command = EntitlementPut(
            **fields(command_id=f"c{sequence}"), name="fw", module="firewall", versions=versions
        )
        return replica.handlers.put_entitlement(context(command, sequence))

    for sequence, versions in ((2001, "==1"), (2003, "==3"), (2003, "==3"), (2002, "==2")):
        await put(sequence, versions)
    subject = subjects.record(WORKSPACE, "entitlement", "fw")
    stored = await replica.bus.read(subjects.STREAM_FLEET, [subject])
    assert [msgspec.json.decode(s.data, type=Record).sequence for s in stored] == [2001, 2003]
    await replica.fleet.caught_up(replica.bus, Source.RECORDS)
    assert replica.fleet.entitlements[WORKSPACE, "fw"].versions == "==3"


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda key: WorkspacePut(**fields("global"), environment="staging"), Code.NAME_INVALID, "global"),
        (
            lambda key: HostPut(**fields("nowhere"), host="a", public_key="12" * 32),
            Code.WORKSPACE_UNKNOWN,
            "nowhere",
        ),
        (lambda key: HostPut(**fields(), host="a", public_key="12"), Code.COMMAND_MALFORMED, "public_key"),
        (lambda key: HostPut(**fields(), host="a", public_key=key.upper()), Code.COMMAND_CONFLICT, "web-1"),
        (
            lambda key: HostPut(**fields(), host="a", public_key="12" * 32, addresses=("nonsense",)),
            Code.COMMAND_MALFORMED,
            "addresses",
        ),
        (
            lambda key: EntitlementPut(**fields(), name="e", module="m", versions="latest"),
            Code.COMMAND_MALFORMED,
            "versions",
        ),
    ],
)
async def test_a_command_that_cannot_be_carried_out_is_refused_naming_what_is_wrong(
    place, replica, make, code, said
):
    host = await place.host("web-1")
    handler = {
        WorkspacePut: replica.handlers.put_workspace,
        HostPut: replica.handlers.put_host,
        EntitlementPut: replica.handlers.put_entitlement,
    }
    command = make(host.key.public.text)
    with pytest.raises(Refused) as caught:
        await handler[type(command)](context(command, 3001))
    assert caught.value.code is code
    assert said in caught.value.reason


async def test_a_record_signed_before_the_one_that_there_is_is_refused_as_hosts_would(place, replica):
    host = await place.host("web-1")
    known = fields()
    earlier = known["issued_at"] - timedelta(hours=1)  # by an admin whose clock is behind

    def signed(issued_at: datetime) -> HostPut:
        made = {**known, "issued_at": issued_at}
        return HostPut(**made, host="web-1", public_key=host.key.public.text, labels={"role": "db"})

    subject = subjects.record(WORKSPACE, "host", "web-1")
    before = await replica.bus.last(subjects.STREAM_FLEET, subject)
    with pytest.raises(Refused) as caught:
        await replica.handlers.put_host(context(signed(earlier), 3001))
    assert caught.value.code is Code.COMMAND_CONFLICT
    assert earlier.isoformat() in caught.value.reason
    assert await replica.bus.last(subjects.STREAM_FLEET, subject) == before
    await replica.handlers.put_host(context(signed(datetime.now(UTC)), 3002))
    after = await replica.bus.last(subjects.STREAM_FLEET, subject)
    assert after is not None and before is not None and after.sequence > before.sequence
