"""The agent with a real broker, real module processes and a real watchdog."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Place, eventually
from support_host import World

from loopback.contracts import envelope, subjects
from loopback.contracts.codes import Code
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import Phase
from loopback.host import decide, proc, trial

pytestmark = pytest.mark.broker


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


def kernel(world: World) -> dict[str, object] | None:
    path = world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
    return json.loads(path.read_text()) if path.exists() else None


def module_pid(world: World) -> int:
    pid, start = json.loads((world.config.state_dir / "modules" / "tiny" / "process.json").read_text())
    return pid if proc.started_at(pid) == start else 0


async def test_a_host_joins_installs_a_signed_module_and_enforces_its_policy(world: World) -> None:
    target = await world.release("1.0", policy=1)
    async with world.agent():
        generation = await world.desire(target)
        found = await world.reached(generation)
        assert (found.phase, found.promoted, found.refusal) == (Phase.PROMOTED, target, None)
        assert (found.enforcing, found.health) == (True, "ok")
        phases = await world.phases(generation)
        assert phases == [
            Phase.ACCEPTED, Phase.DOWNLOADING, Phase.VERIFYING, Phase.STAGED, Phase.TRIAL, Phase.PROMOTED
        ]  # fmt: skip
        assert kernel(world) == {"policy": target.policy}
        statuses = await world.statuses()
        assert [s.seq for s in statuses] == sorted({s.seq for s in statuses})
        inventory = await world.bus.last(
            subjects.STREAM_REPORTS, subjects.from_host("prod", world.host, "inventory")
        )
        assert inventory is not None
    assert module_pid(world) == 0, "the agent's end is its modules' end"
    assert kernel(world) == {"policy": target.policy}, "but not the end of what they enforce"


async def test_a_broken_release_is_undone_and_the_old_one_enforces_again(world: World) -> None:
    good = await world.release("1.0", policy=1)
    bad = await world.with_policy(await world.release("1.1", "unhealthy"), 2)
    async with world.agent():
        await world.reached(await world.desire(good))
        generation = await world.desire(bad, expected=good, rollout="r2")
        found = await world.reached(generation)
        assert (found.phase, found.promoted) == (Phase.ROLLED_BACK, good)
        assert found.refusal is not None
        assert (found.refusal.code, "does not feel well" in found.refusal.reason) == (
            Code.MODULE_UNHEALTHY,
            True,
        )
        assert kernel(world) == {"policy": good.policy}
        assert Phase.ROLLING_BACK in await world.phases(generation)

        again = await world.reached(await world.desire(bad, expected=good, rollout="r3"))
        assert again.phase is Phase.QUARANTINED
        assert again.refusal is not None
        assert again.refusal.code == Code.HOST_QUARANTINED

        back = await world.reached(await world.desire(good, expected=good, returning=True, rollout="r2"))
        assert (back.phase, back.promoted, back.health) == (Phase.PROMOTED, good, "ok")


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("dies-at-commit", Code.MODULE_DIED),
        ("dies-after-commit", Code.MODULE_DIED),
        ("dies-at-configure", Code.MODULE_DIED),
        ("ends-at-once", Code.MODULE_START),
        ("wrong-abi", Code.MODULE_ABI),
        ("no-kernel", Code.KERNEL_UNSUPPORTED),
    ],
)
async def test_a_first_release_that_fails_leaves_nothing_and_the_agent_degraded(
    world: World, how: str, code: Code
) -> None:
    target = await world.release("1.0", how, policy=1)
    async with world.agent():
        found = await world.reached(await world.desire(target))
        assert (found.phase, found.promoted) == (Phase.ROLLED_BACK, None)
        assert found.refusal is not None
        assert found.refusal.code == code
        assert (await world.statuses())[-1].agent == "degraded"
        heard = len(
            await world.bus.read(subjects.STREAM_REPORTS, [subjects.from_host("*", "*", "heartbeat")])
        )
        await eventually(lambda: beats_beyond(world, heard))
        assert module_pid(world) == 0


async def beats_beyond(world: World, count: int) -> bool:
    found = await world.bus.read(subjects.STREAM_REPORTS, [subjects.from_host("*", "*", "heartbeat")])
    return len(found) > count


async def test_a_policy_that_the_module_refuses_quarantines_only_the_pair(world: World) -> None:
    good = await world.release("1.0", policy=1)
    bad = await world.with_policy(good, 2, refuse=True)
    better = await world.with_policy(good, 3)
    async with world.agent():
        await world.reached(await world.desire(good))
        pid = module_pid(world)
        found = await world.reached(await world.desire(bad, expected=good, rollout="r2"))
        assert (found.phase, found.refusal and found.refusal.code) == (Phase.ROLLED_BACK, Code.POLICY_INVALID)
        assert found.promoted == good
        found = await world.reached(await world.desire(better, expected=good, rollout="r3"))
        assert (found.phase, found.promoted) == (Phase.PROMOTED, better)
        assert module_pid(world) == pid, "a policy alone needs no new process"


async def test_absent_removes_the_module_and_what_it_left_in_the_kernel(world: World) -> None:
    target = await world.release("1.0", policy=1)
    async with world.agent():
        await world.reached(await world.desire(target))
        scope = world.signers.command(world.signers.rollout(None, "r2"))
        found = await world.reached(await world.desire(None, expected=target, rollout="r2", scope=scope))
        assert (found.phase, found.promoted) == (Phase.REMOVED, None)
        assert kernel(world) is None
        assert module_pid(world) == 0
        back = await world.reached(await world.desire(target, returning=True, rollout="r2", scope=scope))
        assert (back.phase, back.promoted) == (Phase.PROMOTED, target)
        assert kernel(world) == {"policy": target.policy}


async def test_a_module_that_is_killed_comes_back_and_adopts(world: World) -> None:
    target = await world.release("1.0", policy=1)
    async with world.agent():
        await world.reached(await world.desire(target))
        pid = module_pid(world)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: module_pid(world) not in (0, pid))

        async def recovered() -> bool:
            statuses = await world.statuses()
            module = statuses[-1].modules[0]
            died = any(s.agent == "degraded" and s.modules[0].refusal is not None for s in statuses)
            return died and module.adopted and module.health == "ok" and statuses[-1].agent == "ok"

        await eventually(recovered)
        assert kernel(world) == {"policy": target.policy}


async def test_a_restart_without_a_broker_runs_what_was_promoted(world: World) -> None:
    target = await world.release("1.0", policy=1)
    async with world.agent():
        await world.reached(await world.desire(target))
    await world.place.kill()
    async with world.agent() as agent:
        await eventually(lambda: module_pid(world))
        await eventually(lambda: agent.supervisors["tiny"].health)
        assert agent.supervisors["tiny"].adopted
        await world.place.start()

        async def told() -> bool:
            module = (await world.statuses())[-1].modules[0]
            return module.adopted and module.health == "ok" and module.promoted == target

        await eventually(told)


async def test_a_host_that_was_away_reads_what_it_missed(world: World) -> None:
    target = await world.release("1.0", policy=1)
    generation = await world.desire(target)
    async with world.agent():
        assert (await world.reached(generation)).phase is Phase.PROMOTED


async def test_an_unreachable_control_plane_leaves_a_change_unconfirmed_and_not_quarantined(
    world: World,
) -> None:
    good = await world.release("1.0", policy=1)
    other = await world.with_policy(good, 2)
    async with world.agent() as agent:
        await world.reached(await world.desire(good))

        async def nobody(seconds: float) -> bool:
            return False

        reachable, agent.link.probe = agent.link.probe, nobody  # type: ignore[method-assign]
        found = await world.reached(await world.desire(other, expected=good, rollout="r2"))
        assert (found.phase, found.promoted) == (Phase.UNCONFIRMED, good)
        assert kernel(world) == {"policy": good.policy}
        agent.link.probe = reachable  # type: ignore[method-assign]
        found = await world.reached(await world.desire(other, expected=good, rollout="r2"))
        assert (found.phase, found.promoted) == (Phase.PROMOTED, other)


async def test_repeats_and_late_documents_change_nothing(world: World) -> None:
    one = await world.release("1.0", policy=1)
    two = await world.with_policy(one, 2)
    async with world.agent() as agent:
        await world.reached(await world.desire(one))
        late = await world.bus.last(world.stream, subjects.desired("prod", world.host))
        assert late is not None
        await world.reached(await world.desire(two, expected=one, rollout="r2"))
        before = agent.store.module("tiny").read()
        for _ in range(3):
            await agent._on_desired(late.data, {})
        await eventually(lambda: agent._arrived.empty())
        await world.reached(await world.desire(two, expected=two, rollout="r3"))
        after = agent.store.module("tiny").read()
        assert (after.promoted, after.phase) == (before.promoted, Phase.PROMOTED)
        assert kernel(world) == {"policy": two.policy}


async def test_a_host_on_which_nothing_changes_still_says_what_it_is_and_has_witnessed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus keeps reports for a week; without a newer one nobody could verify its word after that."""
    monkeypatch.setattr("loopback.host.voice.AGAIN_S", 0.5)
    monkeypatch.setattr("loopback.host.voice.FIGURES_S", 1e9)
    target = await world.release("1.0")
    async with world.agent():
        await world.reached(await world.desire(target))
        before = len(await world.statuses())
        inventories = subjects.from_host("prod", world.host, "inventory")

        async def said_again() -> bool:
            found = await world.bus.read(subjects.STREAM_REPORTS, [inventories])
            return len(found) >= 3 and len(await world.statuses()) >= before + 2

        await eventually(said_again)
        last, earlier = (await world.statuses())[-1], (await world.statuses())[-2]
        assert last.seq > earlier.seq
        assert last.modules == earlier.modules


async def test_whoever_sends_an_older_document_is_told_where_the_host_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So activation finds its way again after somebody pushed the generation with its key."""
    monkeypatch.setattr("loopback.host.voice.REPEAT_S", 0.0)
    monkeypatch.setattr("loopback.host.voice.FIGURES_S", 1e9)  # or counters alone would have it say more
    target = await world.release("1.0", policy=1)

    async def said() -> int:
        return sum(s.generation == 70_001 for s in await world.statuses())

    async with world.agent():
        world.generation = 70_000
        await world.reached(await world.desire(target))
        world.generation = 4
        for number in range(3):  # each of them: one more word could be about something else
            before = await said()
            await world.desire(target, expected=target, rollout=f"late{number}")

            async def again(before: int = before) -> bool:
                return await said() > before

            await eventually(again)


async def test_what_the_owner_does_not_allow_never_runs(world: World) -> None:
    greedy = await world.release("1.0", capabilities=("CAP_SYS_ADMIN",))
    async with world.agent():
        found = await world.reached(await world.desire(greedy))
        assert (found.phase, found.refusal and found.refusal.code) == (
            Phase.REJECTED,
            Code.MANIFEST_CAPABILITY,
        )
    allow = msgspec.structs.replace(world.config.allow, modules=())
    async with world.agent(allow=allow):
        found = await world.reached(await world.desire(greedy, rollout="r2"))
        assert (found.phase, found.refusal and found.refusal.code) == (Phase.REJECTED, Code.HOST_NOT_ALLOWED)
    assert not (world.config.state_dir / "modules" / "tiny" / "process.json").exists()


async def test_a_module_outside_the_allow_list_is_answered_for_and_leaves_nothing(world: World) -> None:
    target = await world.release("1.0", policy=1)
    allow = msgspec.structs.replace(world.config.allow, modules=())
    async with world.agent(allow=allow):
        found = await world.reached(await world.desire(target))
        assert (found.phase, found.refusal and found.refusal.code) == (Phase.REJECTED, Code.HOST_NOT_ALLOWED)
        again = await world.reached(await world.desire(target, rollout="r2"))
        assert (again.rollout, again.phase) == ("r2", Phase.REJECTED)
    assert list((world.config.state_dir / "modules").iterdir()) == []


async def test_a_module_that_talks_without_end_does_not_silence_its_host(world: World) -> None:
    target = await world.release("1.0", "talkative", policy=1)
    async with world.agent():
        await world.reached(await world.desire(target))

        async def figures() -> dict[str, float]:
            found = await world.module()
            return found.metrics if found else {}

        found = await eventually(figures)
        assert found["tiny_packets_total"] == 7.0
        assert len(found) <= 256
        assert all(len(name) <= 200 for name in found)
        await world.reached(await world.desire(None, expected=target, rollout="r2"))


def on_disk(world: World, policy: str, data: bytes) -> None:
    path = world.config.state_dir / "policies" / f"{policy}.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


async def test_a_policy_on_disk_is_trusted_no_more_than_one_that_comes(world: World) -> None:
    target = await world.release("1.0", policy=1)
    data, _ = world.signers.policy(1)
    stranger = envelope.seal_bytes(
        envelope.POLICY, envelope.payload_of(envelope.parse(data)), SigningKey.generate()
    )
    digest = hashlib.sha256(stranger).hexdigest()
    on_disk(world, digest, stranger)
    async with world.agent():
        found = await world.reached(await world.desire(msgspec.structs.replace(target, policy=digest)))
        assert (found.phase, found.promoted) == (Phase.REJECTED, None)
        assert found.refusal is not None
        assert found.refusal.code == Code.SIGNATURE_UNKNOWN_KEY


async def test_a_damaged_policy_on_disk_is_fetched_again(world: World) -> None:
    target = await world.release("1.0", policy=1)
    assert target.policy is not None
    on_disk(world, target.policy, b"half of it")
    async with world.agent():
        found = await world.reached(await world.desire(target))
        assert (found.phase, found.promoted) == (Phase.PROMOTED, target)


async def test_a_document_that_the_agent_fails_at_does_not_keep_it_from_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await world.release("1.0", policy=1)
    check, calls = decide.check_desired, 0

    def fails_once(*arguments: Any) -> decide.Accepted:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError("of the agent's own")
        return check(*arguments)

    monkeypatch.setattr(decide, "check_desired", fails_once)
    async with world.agent():
        await world.desire(target)

        async def said() -> bool:
            return any(s.refusal and s.refusal.code == Code.HOST_FAULT for s in await world.statuses())

        await eventually(said)
        found = await world.reached(await world.desire(target, rollout="r2"))
        assert found.promoted == target
        assert (await world.statuses())[-1].refusal is None


async def test_a_fault_on_trial_ends_in_what_was_promoted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await world.release("1.0", policy=1)
    new = await world.with_policy(await world.release("1.1"), 2)

    async def fault(*arguments: Any) -> None:
        raise ZeroDivisionError("of the agent's own")

    async with world.agent():
        await world.reached(await world.desire(old))
        with monkeypatch.context() as patched:
            patched.setattr(trial, "watch", fault)
            found = await world.reached(await world.desire(new, expected=old, rollout="r2"))
        assert (found.phase, found.promoted) == (Phase.ROLLED_BACK, old)
        assert found.refusal is not None
        assert found.refusal.code == Code.HOST_FAULT
        assert kernel(world) == {"policy": old.policy}
        again = await world.reached(await world.desire(new, expected=old, rollout="r3"))
        assert again.promoted == new, "it was not the release's fault"


async def test_two_contents_of_one_generation_are_reported(world: World) -> None:
    target = await world.release("1.0", policy=1)
    async with world.agent():
        generation = await world.desire(target)
        await world.reached(generation)
        world.generation -= 1
        await world.desire(target, rollout="r2")

        async def said() -> bool:
            return any(s.refusal and s.refusal.code == Code.HOST_GENERATION for s in await world.statuses())

        await eventually(said)


async def test_a_package_that_nobody_entitled_signed_never_runs(world: World) -> None:
    good = await world.release("1.0")
    unsigned = msgspec.structs.replace(good, version="6.6")
    async with world.agent():
        found = await world.reached(await world.desire(unsigned))
        assert (found.phase, found.refusal and found.refusal.code) == (Phase.REJECTED, Code.PACKAGE_UNKNOWN)
        swapped = msgspec.structs.replace(good, package=await world.blob(b"another content"))
        found = await world.reached(await world.desire(swapped, rollout="r2"))
        assert (found.phase, found.refusal and found.refusal.code) == (Phase.REJECTED, Code.PACKAGE_DIGEST)
    assert not (world.config.state_dir / "modules" / "tiny" / "process.json").exists()


async def test_one_trace_leads_from_the_message_to_the_attach(world: World) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from loopback.contracts import envelope

    target = await world.release("1.0", policy=1)
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with world.agent():
        await eventually(lambda: heard(world))
        entry = world.signers.entry(target, 1)
        document = world.signers.desired(world.host, world.record, entry)
        await world.publish(world.signers.sealed(document), traceparent=f"00-{trace_id}-{parent}-01")
        await world.reached(1)

        async def spans() -> dict[str, tuple[str, str]]:
            found = {}
            for stored in await world.bus.read(subjects.STREAM_OTLP, ["lb.ws.*.from.*.otlp"]):
                signed = envelope.parse(stored.data)
                if signed.payloadType != envelope.OTLP_TRACES:
                    continue
                payload, _ = envelope.open_envelope(
                    signed, envelope.OTLP_TRACES, {world.key.keyid: world.key.public}
                )
                for resource in ExportTraceServiceRequest.FromString(payload).resource_spans:
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            assert span.trace_id.hex() == trace_id
                            found[span.name] = (span.span_id.hex(), span.parent_span_id.hex())
            return found

        async def complete() -> dict[str, tuple[str, str]] | None:
            found = await spans()
            return found if "apply tiny" in found else None

        found = await eventually(complete)
        assert found is not None
        assert found["apply tiny"][1] == parent
        for child in (
            "download",
            "verify",
            "stage",
            "start",
            "attach",
            "commit",
            "trial",
            "confirm",
            "promote",
        ):
            assert found[child][1] == found["apply tiny"][0], child
        last = await world.bus.last(subjects.STREAM_REPORTS, subjects.from_host("prod", world.host, "status"))
        assert last is not None
        stored = [
            s
            for s in await world.bus.read(
                subjects.STREAM_REPORTS, [subjects.from_host("prod", world.host, "status")]
            )
            if "traceparent" in s.headers
        ]
        assert {s.headers["traceparent"].split("-")[1] for s in stored} == {trace_id}


async def heard(world: World) -> bool:
    return bool(await world.bus.read(subjects.STREAM_REPORTS, [subjects.from_host("*", "*", "heartbeat")]))
