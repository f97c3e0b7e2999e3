"""Stories about rollouts that go wrong, or that somebody stops: how they are judged, and how hosts return."""

from __future__ import annotations

import pytest
from activation_world import World, upgraded

from loopback.contracts import journal
from loopback.contracts.codes import Code
from loopback.contracts.desired import Running
from loopback.contracts.messages import Gates, Wave
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutstate import Standing, State, WaveState

V1 = Running("1.0.0", "a" * 64, "d" * 64, 1)
V2 = Running("1.1.0", "b" * 64, "d" * 64, 1)


@pytest.mark.parametrize(
    "phase", [Phase.ROLLED_BACK, Phase.ROLLBACK_FAILED, Phase.REJECTED, Phase.QUARANTINED, Phase.LOOP_ABORTED]
)  # fmt: skip
def test_a_canary_that_fails_halts_the_rollout_and_nobody_else_is_touched(phase: Phase) -> None:
    world = upgraded()
    rollout = world.begin("r1", version="1.1.0")
    (canary,) = world.assigned("r1")
    world.report(canary, phase, V1, code=Code.KERNEL_REFUSED)
    made = [e.name for e in world.decide()]
    assert made[:3] == ["wave-failed", "halted", "rolling-back"]
    assert rollout.waves[0].state is WaveState.FAILED
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.KERNEL_REFUSED
    entry = world.desired[canary][-1].modules[0]
    assert entry.returning and entry.running == V1
    world.report(canary, Phase.PROMOTED, V1)
    world.decide()
    assert rollout.state is State.ROLLED_BACK
    assert all(world.wanted(h) == V1 for h in world.labels)
    assert sum(len(d) for d in world.desired.values()) == 4 + 2


def test_every_updated_host_goes_back_to_what_it_came_from() -> None:
    world = upgraded(6)
    rollout = world.begin("r1", version="1.1.0")
    world.obey()
    world.decide()
    hosts = world.assigned("r1")
    assert len(hosts) == 5
    world.obey(*hosts[:3])
    world.report(hosts[3], Phase.ROLLED_BACK, V1, code=Code.MODULE_UNHEALTHY)
    world.decide()
    assert rollout.state is State.ROLLING_BACK
    for host in rollout.hosts:
        last = world.desired[host][-1].modules[0]
        assert last.returning
        assert last.not_after is None, "also a host that is away for days finds its way back"
        assert last.running == V1
        assert last.rollout == "r1"
    assert world.desired[hosts[0]][-1].modules[0].expected == V2
    world.obey()
    world.decide()
    assert rollout.state is State.ROLLED_BACK
    assert [w.state for w in rollout.waves] == [WaveState.ROLLED_BACK, WaveState.FAILED]


def test_hosts_that_had_nothing_go_back_to_nothing() -> None:
    world = World(3)
    rollout = world.begin()
    world.obey()
    world.decide()
    first, second = world.assigned()
    world.obey(first)
    world.report(second, Phase.ROLLED_BACK, None, code=Code.MODULE_DIED)
    world.decide()
    assert all(world.wanted(h) is None for h in world.labels)
    world.obey()
    world.decide()
    assert rollout.state is State.ROLLED_BACK


def test_a_host_that_does_not_come_back_leaves_the_rollback_incomplete_and_names_it() -> None:
    world = upgraded(2)
    rollout = world.begin("r1", version="1.1.0", waves=(Wave(name="all", percent=100),))
    good, bad = world.assigned("r1")
    world.obey(good)
    world.report(bad, Phase.ROLLED_BACK, V1)
    world.decide()
    world.report(bad, Phase.PROMOTED, V1)
    made = world.wait(300)
    assert rollout.state is State.ROLLBACK_INCOMPLETE
    assert made[-1] == journal.RollbackIncomplete(hosts=(good,))
    world.report(good, Phase.PROMOTED, V1)  # later, it does after all
    assert rollout.hosts[good].standing is Standing.RETURNED
    assert world.decide() == []


def test_on_failure_halt_stops_and_leaves_hosts_as_they_are() -> None:
    world = upgraded(3)
    rollout = world.begin("r1", version="1.1.0", on_failure="halt")
    (canary,) = world.assigned("r1")
    world.report(canary, Phase.ROLLED_BACK, V1)
    world.decide()
    assert rollout.state is State.HALTED
    assert len(world.desired[canary]) == 2
    assert "r1" not in world.workspace.attention


def test_a_silent_host_fails_at_its_deadline() -> None:
    world = World(2)
    rollout = world.begin(host_deadline_s=60.0)
    (canary,) = world.assigned()
    world.report(canary, Phase.TRIAL, None)
    assert world.wait(59) == []
    made = [e.name for e in world.wait(1)]
    assert made[:4] == ["expired", "wave-failed", "halted", "rolling-back"]
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.HOST_DEADLINE


def test_a_vanished_host_counts_as_failed_in_flight_and_while_soaking() -> None:
    for soak in (0.0, 60.0):
        world = World(2)
        rollout = world.begin(
            waves=(Wave(name="canary", count=1, soak_s=soak), Wave(name="rest", percent=100))
        )
        (canary,) = world.assigned()
        if soak:
            world.obey()
            world.decide()
        world.lose(canary)
        world.decide()
        assert rollout.waves[0].state is WaveState.FAILED
        assert rollout.refusal is not None
        assert rollout.refusal.code is Code.HOST_LOST


def test_a_host_that_degrades_while_soaking_fails_the_wave() -> None:
    world = upgraded(3)
    rollout = world.begin(
        "r1", version="1.1.0", waves=(Wave(name="canary", count=1, soak_s=60), Wave(name="rest", percent=100))
    )
    (canary,) = world.assigned("r1")
    world.obey()
    world.decide()
    world.report(canary, Phase.PROMOTED, V2, health="degraded")
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED
    assert rollout.state is State.ROLLING_BACK
    assert world.wanted(canary) == V1


def test_a_host_of_an_earlier_wave_that_fails_later_still_stops_the_rollout() -> None:
    world = upgraded(4)
    rollout = world.begin("r1", version="1.1.0")
    (canary,) = world.assigned("r1")
    world.obey()
    world.decide()
    world.report(canary, Phase.ROLLED_BACK, V1, code=Code.MODULE_DIED)
    world.decide()
    assert rollout.state is State.ROLLING_BACK


def test_promoted_to_something_else_than_the_target_is_no_success() -> None:
    world = upgraded(2)
    rollout = world.begin("r1", version="1.1.0")
    (canary,) = world.assigned("r1")
    world.report(canary, Phase.PROMOTED, V1)
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED


def test_few_enough_failures_are_tolerated() -> None:
    world = World(10)
    rollout = world.begin(waves=(Wave(name="all", percent=100),), gates=Gates(max_failed=0.2))
    hosts = world.assigned()
    for host in hosts[:2]:
        world.report(host, Phase.ROLLED_BACK, None)
    world.decide()
    assert rollout.state is State.RUNNING
    world.obey(*hosts[2:])
    world.decide()
    assert rollout.state is State.DONE
    assert rollout.counts[Standing.FAILED] == 2


def test_one_failure_too_many_halts_at_once() -> None:
    world = World(10)
    rollout = world.begin(waves=(Wave(name="all", percent=100),), gates=Gates(max_failed=0.2))
    for host in world.assigned()[:3]:
        world.report(host, Phase.ROLLED_BACK, None)
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED


def test_no_verdict_below_the_minimum_sample() -> None:
    world = World(10)
    rollout = world.begin(
        waves=(Wave(name="all", percent=100),), gates=Gates(max_failed=0.1, min_sample=5), max_unavailable=0.2
    )
    for _ in range(2):
        for host in world.assigned():
            world.report(host, Phase.ROLLED_BACK, None)
        world.decide()
    assert rollout.counts[Standing.FAILED] == 4
    assert rollout.state is State.RUNNING
    world.report(world.assigned()[0], Phase.ROLLED_BACK, None)
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED


def test_a_wave_smaller_than_the_sample_is_judged_when_all_of_it_answered() -> None:
    world = World(4)
    rollout = world.begin(gates=Gates(min_sample=3))
    world.report(world.assigned()[0], Phase.ROLLED_BACK, None)
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED


def test_a_wave_of_errors_is_never_complete_however_many_may_fail() -> None:
    world = World(4)
    rollout = world.begin(gates=Gates(max_failed=1.0))
    world.report(world.assigned()[0], Phase.ROLLED_BACK, None)
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED


def test_an_unconfirmed_canary_is_inconclusive_and_is_asked_again_on_resume() -> None:
    world = upgraded(3)
    rollout = world.begin("r1", version="1.1.0")
    (canary,) = world.assigned("r1")
    world.report(canary, Phase.UNCONFIRMED, V1, code=Code.HOST_UNCONFIRMED)
    world.decide()
    assert rollout.state is State.PAUSED
    assert rollout.waves[0].state is WaveState.INCONCLUSIVE
    generation = world.desired[canary][-1].generation
    world.write("r1", journal.Resumed(operators=("ada",)))
    world.decide()
    assert world.assigned("r1") == [canary]
    assert world.desired[canary][-1].generation == generation + 1
    assert world.finish("r1") is State.DONE


def test_an_inconclusive_answer_within_what_may_fail_does_not_pause() -> None:
    world = World(10)
    rollout = world.begin(waves=(Wave(name="all", percent=100),), gates=Gates(max_failed=0.1))
    first, *others = world.assigned()
    world.report(first, Phase.UNCONFIRMED, None)
    world.obey(*others)
    world.decide()
    assert rollout.state is State.DONE


def test_a_host_that_has_something_else_is_asked_once_more_on_that_ground_and_then_fails() -> None:
    world = World(2)
    other = Running("0.9.0", "e" * 64)
    rollout = world.begin(waves=(Wave(name="all", percent=100),))
    first, second = world.assigned()
    world.report(first, Phase.REJECTED, other, code=Code.HOST_EXPECTED)
    world.decide()
    entry = world.desired[first][-1].modules[0]
    assert entry.expected == other
    assert entry.generation == 2
    world.report(first, Phase.REJECTED, other, code=Code.HOST_EXPECTED)
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED
    assert world.wanted(first) == other, "the way back leads to what it really had"
    assert world.wanted(second) is None


def test_other_rejections_are_failures() -> None:
    world = World(2)
    rollout = world.begin()
    world.report(world.assigned()[0], Phase.REJECTED, None, code=Code.HOST_NOT_ALLOWED)
    world.decide()
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.HOST_NOT_ALLOWED


def test_while_paused_no_host_is_newly_assigned_but_failures_still_count() -> None:
    world = upgraded(5)
    rollout = world.begin("r1", version="1.1.0", waves=(Wave(name="all", percent=100),), max_unavailable=0.4)
    first, second = world.assigned("r1")
    world.write("r1", journal.Paused(reason="lunch", operators=("ada",)))
    world.obey(first)
    assert world.decide() == []
    assert world.assigned("r1") == [second]
    world.report(second, Phase.ROLLED_BACK, V1)
    world.decide()
    assert rollout.state is State.ROLLING_BACK


def test_resume_goes_on_where_it_stopped() -> None:
    world = World(5)
    rollout = world.begin()
    world.write("r1", journal.Paused(reason="lunch", operators=("ada",)))
    world.obey()
    assert world.decide() == []
    world.write("r1", journal.Resumed(operators=("ada",)))
    assert world.decide() != []
    assert world.finish() is State.DONE
    assert rollout.counts[Standing.PROMOTED] == 5


def test_abort_takes_the_updated_hosts_back() -> None:
    world = upgraded(4)
    rollout = world.begin("r1", version="1.1.0")
    world.obey()
    world.decide()
    world.write("r1", journal.RollingBack(reason="second thoughts", operators=("ada",)))
    assert world.finish("r1") is State.ROLLED_BACK
    assert all(world.wanted(h) == V1 for h in rollout.hosts)


def test_hosts_in_flight_when_it_fails_are_told_to_return_too() -> None:
    world = upgraded(5)
    rollout = world.begin("r1", version="1.1.0", waves=(Wave(name="all", percent=100),))
    failing, *others = world.assigned("r1")
    world.report(failing, Phase.ROLLED_BACK, V1)
    world.decide()
    flying = others[0]
    assert world.desired[flying][-1].modules[0].returning
    # It had promoted before the way back reached it, so what it is believed to have is wrong: asked again.
    world.report(flying, Phase.REJECTED, V2, code=Code.HOST_EXPECTED)
    world.decide()
    assert world.desired[flying][-1].modules[0].expected == V2
    assert world.finish("r1") is State.ROLLED_BACK
    assert rollout.hosts[flying].standing is Standing.RETURNED


def test_a_host_without_a_record_fails_instead_of_being_told() -> None:
    world = World(2)
    rollout = world.create()
    world.verdict()
    first = rollout.created.members[0].host
    world.records.discard(first)
    world.decide()
    assert rollout.waves[0].state is WaveState.FAILED
    assert rollout.state is State.ROLLED_BACK
    assert world.desired == {}


def test_a_host_whose_record_went_away_is_named_when_the_others_return() -> None:
    world = upgraded(3)
    rollout = world.begin("r1", version="1.1.0", waves=(Wave(name="all", percent=100),))
    gone, failing, good = world.assigned("r1")
    world.obey(gone, good)
    world.records.discard(gone)
    world.report(failing, Phase.ROLLED_BACK, V1)
    world.decide()
    world.obey(failing, good)
    world.decide()
    assert rollout.state is State.ROLLBACK_INCOMPLETE
    assert rollout.hosts[gone].standing is Standing.STRANDED
