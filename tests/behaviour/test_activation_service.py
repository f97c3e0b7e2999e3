"""Activation on a real broker: replicas, hosts that sign what they say, and commands of any NATS client."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from activation_fleet import Fleet, fleet, until
from activation_world import APPROVER, approval_command, start_command
from support import Place, eventually
from support_fleet import OPERATOR, WORKSPACE

from loopback.contracts import approvals, desired, envelope, journal, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import (
    JournalEntry,
    Policy,
    Presence,
    RolloutAbort,
    RolloutApprove,
    RolloutPause,
    RolloutResume,
    RolloutStart,
    Selector,
    Wave,
    decode_command,
)
from loopback.contracts.reports import Phase, Status
from loopback.contracts.rolloutstate import Rollout, Standing
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument, WorkspaceRules
from loopback.services._runtime.bus import Outgoing
from loopback.services.activation import decide as rules
from loopback.services.activation import facts, handlers

pytestmark = pytest.mark.broker

HOSTS = ("h0", "h1", "h2", "h3")
V1 = Running("1.0.0", "a" * 64)
V2 = Running("1.1.0", "b" * 64)


@pytest.fixture
async def place(any_broker: Place) -> AsyncIterator[Fleet]:
    async with fleet(any_broker, *HOSTS) as found:
        yield found


def start(name: str, **changes: Any) -> RolloutStart:
    return start_command(name, datetime.now(UTC), **{"policy": None, "policy_serial": 0, **changes})


def fields(command_id: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    known = start_command("x", now)
    return {"id": command_id, "workspace": WORKSPACE, "issued_at": now, "expires_at": known.expires_at}


async def stored(found: Fleet, subject: str) -> list[Any]:
    return await found.admin.read(subjects.workspace_stream(WORKSPACE), [subject])


async def heads(found: Fleet) -> list[str]:
    """The workspace's chain after each number of links, from none."""
    chain = [""]
    for message in await stored(found, subjects.rollout(WORKSPACE, "*", "*")):
        chain.append(journal.chained(chain[-1], journal.digest(message.data)))
    return chain


async def put_policy(found: Fleet, serial: int, key: SigningKey = OPERATOR, **changes: Any) -> str:
    signed = {
        "workspace": WORKSPACE, "module": "firewall", "name": "web", "serial": serial,
        "content": msgspec.Raw(b'{"version":1}'), "issued_at": datetime.now(UTC), **changes,
    }  # fmt: skip
    data = envelope.seal_bytes(envelope.POLICY, msgspec.json.encode(Policy(**signed)), key)
    digest = hashlib.sha256(data).hexdigest()
    headers = {"Lb-Size": str(len(data)), "Lb-Chunks": "1"}
    await found.admin.publish(Outgoing(subjects.blob(digest, 0), data, headers))
    return digest


async def test_a_rollout_reaches_every_host_wave_by_wave(place: Fleet) -> None:
    result = await place.send(
        start("r1", waves=(Wave(name="canary", count=1, soak_s=0.2), Wave(name="b", percent=100)))
    )
    assert result.ok, result.refusal
    assert result.detail == {"rollout": "r1", "hosts": "4"}
    rollout = await place.ended("r1", "DONE")
    assert all(host.promoted["firewall"] == V1 for host in place.hosts.values())
    names = [link.event.name for link in place.links]
    assert (
        names.index("wave-soaking")
        < names.index("wave-done")
        < len(names) - 1 - names[::-1].index("assigned")
    )
    assert rollout.counts[Standing.PROMOTED] == 4
    # What each host was told names its scope, its record and the journal up to the link that told it.
    chain = await heads(place)
    for host in place.hosts.values():
        state = host.states[-1]
        assert state.journal_head == chain[state.journal_links]
        assigned = place.links[state.journal_links - 1]
        assert any(a.host == host.name for a in assigned.event.hosts)
        assert state.environment == "sandbox"
        assert state.record is not None
        (module,) = state.modules
        assert module.scope == rollout.created.envelope
        assert (module.size, module.expected) == (10, None)


async def test_a_failing_canary_ends_rolled_back_with_every_host_at_the_old_version(place: Fleet) -> None:
    await place.send(start("r1"))
    await place.ended("r1", "DONE")
    for host in place.hosts.values():
        host.behave = lambda host, module: (Phase.ROLLED_BACK, Code.MODULE_DIED)
    await place.send(start("r2", version="1.1.0"))
    rollout = await place.ended("r2", "ROLLED_BACK")
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.MODULE_DIED
    assert all(host.promoted["firewall"] == V1 for host in place.hosts.values())
    assert Counter(len(host.states) for host in place.hosts.values()) == {1: 3, 3: 1}
    (canary,) = [host for host in place.hosts.values() if len(host.states) == 3]
    entry = canary.states[-1].modules[0]
    assert entry.returning
    assert entry.running == V1


async def test_updated_hosts_return_when_a_later_one_fails(place: Fleet) -> None:
    await place.send(start("r1"))
    await place.ended("r1", "DONE")
    turn = iter(range(100))
    for host in place.hosts.values():
        host.behave = lambda host, module: (
            (Phase.PROMOTED, None) if next(turn) < 2 else (Phase.ROLLED_BACK, Code.MODULE_UNHEALTHY)
        )
    await place.send(start("r2", version="1.1.0", max_unavailable=0.25))
    await place.ended("r2", "ROLLED_BACK")
    assert all(host.promoted["firewall"] == V1 for host in place.hosts.values())


async def test_a_lost_host_and_a_silent_host_count_as_failed(place: Fleet) -> None:
    for host in place.hosts.values():
        host.behave = lambda host, module: (Phase.IDLE, None)
    await place.send(start("r1", host_deadline_s=60.0))
    await until(lambda: place.state.rollouts and place.rollout("r1").in_flight, "the canary is assigned")
    canary = next(iter(h for h, p in place.rollout("r1").hosts.items() if p.standing is Standing.ASSIGNED))
    lost = Presence(host=canary, workspace=WORKSPACE, lost=True, at=datetime.now(UTC), silent_s=30)
    await place.admin.publish(Outgoing(subjects.presence(WORKSPACE, canary), msgspec.json.encode(lost)))
    rollout = await place.ended("r1", "ROLLED_BACK")
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.HOST_LOST

    await place.send(start("r2", host_deadline_s=1.0, trial_s=0.5))
    rollout = await place.ended("r2", "ROLLED_BACK")
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.HOST_DEADLINE


async def test_operators_pause_resume_and_abort(place: Fleet) -> None:
    for host in place.hosts.values():
        host.behave = lambda host, module: (Phase.IDLE, None)
    await place.send(start("r1"))
    await until(lambda: place.state.rollouts and place.rollout("r1").in_flight, "the canary is assigned")
    assert (await place.send(RolloutPause(**fields("p1"), rollout="r1", reason="lunch"))).ok
    await place.ended("r1", "PAUSED")
    refused = await place.send(RolloutPause(**fields("p2"), rollout="r1"))
    assert refused.refusal is not None
    assert refused.refusal.code is Code.ROLLOUT_STATE
    assert (await place.send(RolloutResume(**fields("p3"), rollout="r1"))).ok
    await place.ended("r1", "RUNNING")
    assert (await place.send(RolloutAbort(**fields("p4"), rollout="r1", reason="enough"))).ok
    rollout = await place.ended("r1", "ROLLED_BACK")
    assert rollout.by == ("ada",)
    (canary,) = [host for host in place.hosts.values() if host.states]
    abort = canary.states[-1].modules[0].abort
    assert abort is not None, "the host asks to see the operator's own signature"
    assert decode_command(envelope.payload_of(abort)).id == "p4"
    unknown = await place.send(RolloutAbort(**fields("p5"), rollout="nobody"))
    assert unknown.refusal is not None
    assert unknown.refusal.code is Code.ROLLOUT_UNKNOWN


async def test_what_makes_no_sense_is_refused_and_changes_nothing(place: Fleet) -> None:
    good = await put_policy(place, 3)
    stranger = await put_policy(place, 4, SigningKey.generate())
    elsewhere = await put_policy(place, 5, module="edge")
    with_policy = {"policy": good, "policy_serial": 3}
    cases: list[tuple[dict[str, Any], Code]] = [
        ({"waves": ()}, Code.ROLLOUT_INVALID),
        ({"waves": (Wave(name="a", count=1, percent=5),)}, Code.ROLLOUT_INVALID),
        ({"selector": Selector(labels={"role": "web"})}, Code.ROLLOUT_NO_HOSTS),
        ({"packages": {"1.0.0": "c" * 64}}, Code.PACKAGE_UNKNOWN),
        ({"packages": {"1.0.0": "b" * 64}}, Code.SCOPE_VIOLATION),
        ({"policy": "e" * 64, "policy_serial": 1}, Code.BLOB_MISSING),
        ({**with_policy, "policy_serial": 2}, Code.SCOPE_VIOLATION),
        ({"policy": stranger, "policy_serial": 4}, Code.SIGNATURE_UNKNOWN_KEY),
        ({"policy": elsewhere, "policy_serial": 5}, Code.SCOPE_VIOLATION),
    ]
    for number, (changes, code) in enumerate(cases):
        result = await place.send(start(f"bad-{number}", **changes))
        assert result.refusal is not None, (changes, result)
        assert result.refusal.code is code, (changes, result.refusal)
        assert result.refusal.next_step
    assert place.links == []
    assert await stored(place, subjects.desired(WORKSPACE, "*")) == []

    assert (await place.send(start("r1", **with_policy))).ok
    await place.ended("r1", "DONE")
    again = await place.send(start("r1", id="another-command"))
    assert again.refusal is not None
    assert again.refusal.code is Code.ROLLOUT_EXISTS
    old = await place.send(start("r2", policy=await put_policy(place, 2), policy_serial=2))
    assert old.refusal is not None
    assert old.refusal.code is Code.POLICY_SERIAL
    same = await place.send(start("r3", **with_policy))
    assert same.ok, "the very policy that is in use may be rolled out again"
    await place.ended("r3", "DONE")


async def test_a_second_rollout_of_the_module_on_the_same_hosts_is_refused_naming_the_first(
    place: Fleet,
) -> None:
    place.judge = False
    assert (await place.send(start("r1", selector=Selector(hosts=("h0", "h1"))))).ok
    refused = await place.send(start("r2", selector=Selector(hosts=("h1", "h2"))))
    assert refused.refusal is not None
    assert refused.refusal.code is Code.COMMAND_CONFLICT
    assert "'r1'" in refused.refusal.reason
    assert (await place.send(start("r3", selector=Selector(hosts=("h2", "h3"))))).ok


async def test_a_forged_status_changes_nothing_and_is_journaled_once(place: Fleet) -> None:
    for host in place.hosts.values():
        host.behave = lambda host, module: (Phase.IDLE, None)
    await place.send(start("r1"))
    await until(lambda: place.state.rollouts and place.rollout("r1").in_flight, "the canary is assigned")
    name = next(iter(h for h, p in place.rollout("r1").hosts.items() if p.standing is Standing.ASSIGNED))
    victim = place.hosts[name]
    other = next(h for h in place.hosts.values() if h is not victim)
    good = victim.fake.key
    victim.fake.key = other.fake.key  # whoever gets at its subject still lacks its key
    victim.behave = lambda host, module: (Phase.PROMOTED, None)
    victim.done = {}
    for _ in range(3):
        await victim.report()
    subject = subjects.journal(WORKSPACE, "activation", "refused")

    async def entries() -> list[JournalEntry]:
        return [msgspec.json.decode(m.data, type=JournalEntry) for m in await stored(place, subject)]

    await eventually(entries)
    victim.fake.key = good
    victim.fake.seq += 10
    await victim._apply(victim.states[-1], victim.states[-1].modules[0], "")
    await place.ended("r1", "RUNNING")
    await until(
        lambda: place.rollout("r1").hosts[name].standing is Standing.PROMOTED, "the real report counts"
    )
    (entry,) = await entries()
    assert entry.refusal is not None
    assert entry.refusal.code is Code.REPORT_IMPERSONATION


async def test_the_whole_rollout_is_one_trace(place: Fleet) -> None:
    command = start("r1")
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    traceparent = f"00-{trace_id}-00f067aa0ba902b7-01"
    data = envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(command), OPERATOR)
    subject = subjects.command(WORKSPACE, "activation", "rollout-start")
    await place.client.jetstream().publish(subject, data, headers={"traceparent": traceparent})
    rollout = await place.ended("r1", "DONE")
    assert rollout.trace_id == trace_id
    headers = [m.headers for m in await stored(place, subjects.rollout(WORKSPACE, "r1", "*"))]
    headers += [m.headers for m in await stored(place, subjects.desired(WORKSPACE, "*"))]
    assert {h["traceparent"].split("-")[1] for h in headers} == {trace_id}
    spans = [
        s for s in place.replicas[0].spans.get_finished_spans() if s.context.trace_id == int(trace_id, 16)
    ]
    decisions = [s for s in spans if s.name.startswith("decide ")]
    assert decisions
    assert all(s.parent and s.parent.span_id == int("00f067aa0ba902b7", 16) for s in decisions)
    assert all((s.attributes or {}).get("loopback.rollout.id") == "r1" for s in spans)
    # A status is handled below the desired state that led to it.
    ids = {s.context.span_id for s in decisions}
    handled = [s for s in spans if s.name == "process lb.ws.{workspace}.from.{host}.status"]
    assert handled
    assert all(s.parent and s.parent.span_id in ids for s in handled)


async def test_a_rollout_that_cannot_be_decided_holds_up_no_other(
    place: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True
    decide = rules.decide

    def failing(workspace: Any, rollout: Rollout, *rest: Any) -> Any:
        if rollout.id == "r1" and broken:
            raise OverflowError("date value out of range")
        return decide(workspace, rollout, *rest)

    monkeypatch.setattr(rules, "decide", failing)
    assert (await place.send(start("r1", selector=Selector(hosts=("h0", "h1"))))).ok
    assert (await place.send(start("r2", selector=Selector(hosts=("h2", "h3"))))).ok
    await place.ended("r2", "DONE")
    await place.ended("r1", "READY")  # facts about it are still journaled
    broken = False
    await place.ended("r1", "DONE")


async def test_what_no_report_can_make_of_its_rollout_is_dropped_after_some_deliveries(
    place: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    observations = facts.observations

    def failing(workspace: Any, status: Status) -> Any:
        if status.host == "h0":
            raise KeyError("nobody thought of this")
        return observations(workspace, status)

    monkeypatch.setattr(facts, "observations", failing)
    monkeypatch.setattr(handlers, "DELIVERIES", 3)
    await place.send(start("r1", waves=(Wave(name="all", percent=100),), max_unavailable=1.0))
    await until(
        lambda: place.state.rollouts and place.rollout("r1").counts[Standing.PROMOTED] == 3,
        "the others are journaled",
    )
    subject = subjects.journal(WORKSPACE, "activation", "refused")
    (entry,) = await eventually(lambda: stored(place, subject))
    said = msgspec.json.decode(entry.data, type=JournalEntry)
    assert said.refusal is not None
    assert "KeyError" in said.refusal.reason
    assert said.subject == subjects.from_host(WORKSPACE, "h0", "status")


@pytest.mark.parametrize("poison", [b"\xff", b'{"type":"verdict","rollout":"\xff"}', b"[" * 5000, b"{}"])
async def test_a_fact_that_does_not_decode_is_dropped_and_journaled_once(place: Fleet, poison: bytes) -> None:
    await place.admin.publish(Outgoing(subjects.verdict(WORKSPACE, "r1", "delivery"), poison))
    subject = subjects.journal(WORKSPACE, "activation", "refused")
    (entry,) = await eventually(lambda: stored(place, subject))
    said = msgspec.json.decode(entry.data, type=JournalEntry)
    assert said.refusal is not None
    assert said.refusal.code is Code.REPORT_MALFORMED
    assert (await place.send(start("r1"))).ok
    await place.ended("r1", "DONE")
    durable = await place.admin.api(f"CONSUMER.INFO.{subjects.STREAM_FLEET}.activation-facts")
    assert durable["num_ack_pending"] == 0
    assert len(await stored(place, subject)) == 1


async def test_a_replica_that_is_killed_mid_rollout_leaves_nothing_behind(broker: Place) -> None:
    async with fleet(broker, *(f"h{n}" for n in range(12)), replicas=2) as place:
        await place.send(start("r1", max_unavailable=0.1))
        await until(
            lambda: place.state.rollouts and place.rollout("r1").counts[Standing.PROMOTED] >= 3,
            "three are done",
        )
        await place.replicas.pop(0).stop()
        rollout = await place.ended("r1", "DONE", 60)
        assert rollout.counts[Standing.PROMOTED] == 12
        await place.replicas.pop(0).stop()
        # Nobody is left; whoever comes next goes on from what is stored.
        await place.replica()
        await place.send(start("r2", version="1.1.0"))
        await place.ended("r2", "DONE")
        assert all(host.promoted["firewall"] == V2 for host in place.hosts.values())


async def test_two_replicas_that_race_a_thousand_writes_give_one_content_per_generation(
    broker: Place,
) -> None:
    modules = [f"m{n}" for n in range(25)]
    names = [f"h{n:02}" for n in range(40)]
    async with fleet(broker, *names, replicas=2) as place:
        for module in modules:
            await place.publish_release(module, "1.0.0", "a" * 64)
        commands = [start(f"r-{m}", module=m, max_unavailable=0.5) for m in modules]
        results = await asyncio.gather(*(place.send(command) for command in commands))
        assert all(result.ok for result in results), [r.refusal for r in results if r.refusal]
        for module in modules:
            await place.ended(f"r-{module}", "DONE", 120)
        written = await stored(place, subjects.desired(WORKSPACE, "*"))
        assert len(written) == len(names) * len(modules) == 1000
        for name in names:
            host = place.hosts[name]
            await until(
                lambda host=host: len(host.contents) == len(modules), f"{host.name} saw every generation"
            )
            assert sorted(host.contents) == list(range(1, len(modules) + 1))
            assert all(len(contents) == 1 for contents in host.contents.values())
            assert [s.generation for s in host.states] == sorted(s.generation for s in host.states)
        for message in written:
            payload = envelope.payload_of(envelope.parse(message.data))
            state = desired.decode(payload)
            assert place.hosts[state.host].contents[state.generation] == {
                hashlib.sha256(message.data).hexdigest()
            }
        spans = [s for r in place.replicas for s in r.spans.get_finished_spans()]
        worked = [
            sum(1 for s in r.spans.get_finished_spans() if s.name.startswith("decide"))
            for r in place.replicas
        ]
        assert spans
        assert all(worked), "both replicas did some of the work"


def governed(*, regulated: bool) -> Trust:
    rules = WorkspaceRules(regulated=regulated, publishers={"firewall": ("f" * 64,)})
    return Trust(
        TrustDocument(
            version=2,
            operators=(
                Operator("ada", OPERATOR.public.text, {"*": (Role.ADMIN,)}),
                Operator("ben", APPROVER.public.text, {WORKSPACE: (Role.APPROVER,)}),
            ),
            services={},
            workspaces={WORKSPACE: rules},
        )
    )


def approval(rollout: Rollout) -> RolloutApprove:
    signed = approval_command(rollout, datetime.now(UTC), id=f"approve-{uuid.uuid4()}")
    found = decode_command(envelope.payload_of(signed))
    assert isinstance(found, RolloutApprove)
    return found


async def test_in_a_regulated_workspace_no_host_is_told_anything_before_another_operator_signed(
    place: Fleet,
) -> None:
    place.trust.trust = governed(regulated=True)
    result = await place.send(start("r1"))
    assert result.detail["approvals_needed"] == "1"
    rollout = await place.ended("r1", "AWAITING_APPROVAL")
    await until(lambda: rollout.judged, "both verdicts are in")
    own = await place.send(approval(rollout))
    assert own.refusal is not None
    assert own.refusal.code is Code.ROLLOUT_UNAPPROVED
    assert all(not host.states for host in place.hosts.values())
    given = await place.send(approval(rollout), key=APPROVER)
    assert given.ok, given.refusal
    await place.ended("r1", "DONE")
    for host in place.hosts.values():
        (carried,) = host.states[-1].modules[0].approvals
        found = approvals.start_of(rollout.created.envelope, WORKSPACE, "r1", place.trust.trust)
        assert approvals.check(carried, found, place.trust.trust) == ("ben",)
    twice = await place.send(approval(rollout), key=APPROVER)
    assert twice.refusal is not None
    assert twice.refusal.code is Code.ROLLOUT_STATE


async def test_a_workspace_regulated_on_the_way_pauses_the_rollout_until_it_is_approved_and_resumed(
    place: Fleet,
) -> None:
    place.trust.trust = governed(regulated=False)
    regulated = governed(regulated=True)

    def obeys(_: Any, module: Any) -> tuple[Phase, Code | None]:
        started = approvals.start_of(module.scope, WORKSPACE, module.rollout, regulated)
        try:
            approvals.approvers(module.approvals, started, regulated)
        except Refused as refused:
            return Phase.REJECTED, refused.code
        return Phase.PROMOTED, None

    for host in place.hosts.values():
        host.behave = obeys
    assert (await place.send(start("r1"))).ok
    rollout = await place.ended("r1", "PAUSED")
    assert "loopback rollout approve r1" in rollout.reason
    place.trust.trust = regulated
    assert (await place.send(approval(rollout), key=APPROVER)).ok
    assert (await place.send(RolloutResume(**fields("resume"), rollout="r1"))).ok
    await place.ended("r1", "DONE")
    assert all(host.promoted["firewall"] == V1 for host in place.hosts.values())
