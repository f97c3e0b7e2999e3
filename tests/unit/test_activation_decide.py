"""Stories about rollouts: every rule of services/activation/decide.py, told from the outside (failures: another file)."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest
from activation_world import T0, World, start_command, upgraded

from loopback.contracts import journal, rolloutplan
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import Running
from loopback.contracts.messages import Gates, Selector, Wave
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import Standing, State, WaveState, Workspace
from loopback.services.activation import decide as rules
from loopback.services.activation import facts

V1 = Running("1.0.0", "a" * 64, "d" * 64, 1)
V2 = Running("1.1.0", "b" * 64, "d" * 64, 1)


def test_a_canary_goes_first_and_the_rest_follows_when_it_is_good() -> None:
    world = World(4)
    rollout = world.begin()
    assert rollout.state is State.RUNNING
    (canary,) = world.assigned()
    assert rollout.waves[0].state is WaveState.CANARY
    assert world.desired.keys() == {canary}
    world.obey(canary)
    world.decide()
    assert rollout.waves[0].state is WaveState.DONE
    assert len(world.assigned()) == 3
    world.obey()
    world.decide()
    assert rollout.state is State.DONE
    assert all(world.wanted(h) == V1 for h in world.labels)


def test_the_order_of_hosts_is_the_same_for_everybody_and_another_in_each_rollout() -> None:
    labels = {f"h{n}": {} for n in range(50)}
    first = [m.host for m in rolloutplan.members(start_command("r1", T0), labels)]
    again = [m.host for m in rolloutplan.members(start_command("r1", T0), dict(reversed(labels.items())))]
    other = [m.host for m in rolloutplan.members(start_command("r2", T0), labels)]
    assert first == again
    assert first != other
    assert set(first) == set(other) == set(labels)


def test_nothing_happens_before_both_verdicts_are_in() -> None:
    world = World(2)
    rollout = world.create()
    assert world.decide() == []
    assert rollout.state is State.DRAFT
    world.verdict()
    world.decide()
    assert rollout.state is State.RUNNING


def test_a_missing_release_refuses_the_rollout_with_deliverys_own_words() -> None:
    world = World(2)
    rollout = world.create()
    world.verdict(delivery=Refusal(Code.PACKAGE_UNKNOWN, "no such release"))
    world.decide()
    assert rollout.state is State.CANCELED
    assert rollout.refusal == Refusal(Code.PACKAGE_UNKNOWN, "no such release")
    assert world.desired == {}


def test_hosts_that_may_not_have_it_are_skipped_and_listed() -> None:
    world = World(4)
    rollout = world.create()
    first = rollout.created.members[0].host
    world.verdict(refused={first: Refusal(Code.ELIGIBILITY_KERNEL, "too old")})
    world.decide()
    assert rollout.skipped.keys() == {first}
    assert first not in rollout.hosts
    assert world.finish() is State.DONE
    assert first not in world.desired


def test_a_rollout_without_any_eligible_host_is_refused_with_the_reasons() -> None:
    world = World(2)
    rollout = world.create()
    world.verdict(
        refused={h: Refusal(Code.ELIGIBILITY_KERNEL, "kernel 4.19 is too old") for h in world.labels}
    )
    world.decide()
    assert rollout.state is State.CANCELED
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.ROLLOUT_NO_HOSTS
    assert "kernel 4.19 is too old" in rollout.refusal.reason


def test_a_labelled_canary_without_an_eligible_host_is_never_silently_left_out() -> None:
    world = World({"a": {"role": "web"}, "b": {}, "c": {}})
    waves = (Wave(name="canary", labels={"role": "web"}), Wave(name="rest", percent=100))
    rollout = world.create(waves=waves)
    world.verdict(refused={"a": Refusal(Code.ELIGIBILITY_LABELS, "no")})
    world.decide()
    assert rollout.state is State.CANCELED
    assert rollout.refusal is not None
    assert "canary" in rollout.refusal.reason


def test_percent_counts_cumulatively_over_all_hosts() -> None:
    waves = (
        Wave(name="one", count=1), Wave(name="quarter", percent=25), Wave(name="half", percent=50),
        Wave(name="all", percent=100),
    )  # fmt: skip
    hosts = [journal.Member(f"h{n}") for n in range(20)]
    assert [len(w.hosts) for w in rolloutplan.plan(waves, hosts)] == [1, 4, 5, 10]


def test_waves_take_hosts_by_name_and_label_and_never_one_that_a_later_wave_names() -> None:
    world = World({f"h{n}": {"role": "web" if n % 2 else "db"} for n in range(10)})
    waves = (
        Wave(name="web", count=2, labels={"role": "web"}),
        Wave(name="named", hosts=("h0", "h1")),
        Wave(name="db", labels={"role": "db"}),
        Wave(name="rest", percent=100),
    )
    rollout = world.begin(waves=waves)
    web, named, db, rest = (set(w.hosts) for w in rollout.waves)
    assert len(web) == 2 and all(world.labels[h]["role"] == "web" for h in web)
    assert named == {"h0", "h1"}
    assert db == {"h2", "h4", "h6", "h8"}
    assert web | named | db | rest == set(world.labels)


def test_no_more_hosts_than_max_unavailable_are_in_flight() -> None:
    world = World(20)
    rollout = world.begin(waves=(Wave(name="all", percent=100),), max_unavailable=0.1)
    assert len(world.assigned()) == 2
    world.obey(world.assigned()[0])
    world.decide()
    assert len(world.assigned()) == 2
    assert world.finish() is State.DONE
    assert world.most_in_flight == 2
    assert rollout.counts[Standing.PROMOTED] == 20


def test_one_host_may_always_be_in_flight() -> None:
    world = World(3)
    world.begin(waves=(Wave(name="all", percent=100),), max_unavailable=0.01)
    assert len(world.assigned()) == 1
    assert world.finish() is State.DONE


def test_a_wave_soaks_before_the_next_one_begins() -> None:
    world = World(2)
    rollout = world.begin(waves=(Wave(name="canary", count=1, soak_s=600), Wave(name="rest", percent=100)))
    world.obey()
    world.decide()
    assert rollout.waves[0].state is WaveState.SOAKING
    assert rules.due(rollout) == T0 + timedelta(seconds=600)
    assert world.wait(599) == []
    world.wait(1)
    assert rollout.waves[0].state is WaveState.DONE
    assert len(world.assigned()) == 1


def test_generations_grow_over_rollouts_and_other_modules_stay_in_the_document() -> None:
    world = upgraded(2)
    world.begin("edge-1", module="edge", version="1.2.0", policy=None)
    world.finish("edge-1")
    for host in world.labels:
        assert [d.generation for d in world.desired[host]] == [1, 2]
        edge, firewall = world.desired[host][-1].modules
        assert (edge.module, edge.generation, edge.rollout) == ("edge", 2, "edge-1")
        assert (firewall.module, firewall.generation, firewall.rollout) == ("firewall", 1, "r0")
        assert firewall.scope == world.rollout("r0").created.envelope


def test_taking_a_module_away_is_a_rollout_too() -> None:
    world = upgraded(2)
    rollout = world.create("off", version="", packages={}, policy=None, policy_serial=0, absent=True)
    world.decide()
    assert rollout.state is State.RUNNING
    assert world.finish("off") is State.DONE
    assert all(world.wanted(h) is None for h in world.labels)


def test_a_rollout_waits_for_the_beginning_of_its_scope_and_ends_with_it() -> None:
    world = World(2)
    rollout = world.create(not_before=T0 + timedelta(hours=1), not_after=T0 + timedelta(hours=2))
    world.verdict()
    assert world.decide() == []
    assert rules.due(rollout) == T0 + timedelta(hours=1)
    world.wait(3600)
    assert rollout.state is State.RUNNING
    world.obey()
    world.now += timedelta(hours=1)
    world.decide()
    assert rollout.state is State.HALTED
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.SCOPE_EXPIRED


def test_a_rollout_that_nobody_judged_in_time_is_refused() -> None:
    world = World(2)
    rollout = world.create()
    world.wait(86400)
    assert rollout.state is State.CANCELED


def test_an_agent_that_lost_its_disk_is_told_again_in_its_new_incarnation() -> None:
    world = upgraded(2)
    assert world.report("h0", Phase.IDLE, None, incarnation="two", seq=1, empty=True)
    world.decide()
    state = world.desired["h0"][-1]
    assert (state.generation, state.incarnation) == (2, "two")
    assert state.modules[0].expected is None
    assert state.modules[0].running == V1
    assert not world.report("h0", Phase.PROMOTED, V1, incarnation="one", seq=99), (
        "the old one is gone for good"
    )


def test_one_report_about_two_modules_is_news_for_both_of_their_rollouts() -> None:
    world = World(1)
    world.begin("r1", policy=None)
    world.begin("r2", module="edge", policy=None)
    statuses = [
        world.status("h0", Phase.PROMOTED, Running("1.0.0", "a" * 64), module=m, seq=1)
        for m in ("firewall", "edge")
    ]
    both = msgspec.structs.replace(statuses[0], modules=statuses[0].modules + statuses[1].modules)
    found = facts.events(world.workspace, [both], [], [])
    assert found.keys() == {"r1", "r2"}
    world.write("r1", *found["r1"])
    assert facts.events(world.workspace, [both], [], []) == {"r2": found["r2"]}, (
        "what is not journaled yet stays news"
    )
    world.write("r2", *found["r2"])
    assert facts.events(world.workspace, [both], [], []) == {}


def test_every_module_of_an_agent_that_lost_its_disk_is_told_again() -> None:
    world = upgraded(1)
    world.begin("edge-1", module="edge", policy=None)
    world.finish("edge-1")
    assert world.report("h0", Phase.IDLE, None, incarnation="two", seq=1, empty=True)
    world.decide()
    assert [(m.module, m.expected, m.generation > 2) for m in world.desired["h0"][-1].modules] == [
        ("edge", None, True),
        ("firewall", None, True),
    ]


def test_old_and_repeated_reports_are_no_news() -> None:
    world = World(2)
    world.begin()
    (canary,) = world.assigned()
    status = world.status(canary, Phase.PROMOTED, V1)
    late = world.status(canary, Phase.TRIAL, None, seq=0)
    assert world.say(statuses=[status])
    assert not world.say(statuses=[status])
    assert not world.say(statuses=[late])


def test_a_report_about_an_older_generation_decides_nothing() -> None:
    world = upgraded(2)
    rollout = world.begin("r1", version="1.1.0")
    (canary,) = world.assigned("r1")
    assert not world.report(canary, Phase.ROLLED_BACK, V1, generation=1)
    assert rollout.hosts[canary].standing is Standing.ASSIGNED


def test_a_host_that_flaps_cannot_flood_the_journal() -> None:
    world = World(2)
    world.begin()
    (canary,) = world.assigned()
    before = len(world.log)
    for n in range(500):
        world.report(canary, Phase.TRIAL, V1 if n % 2 else V2)
    assert len(world.log) - before <= 100


def test_a_journal_whose_chain_is_broken_is_not_decided_on() -> None:
    world = World(2)
    world.begin()
    other = Workspace("prod")
    for data in world.log[:2] + world.log[3:]:
        fold(other, data)
    rollout = other.rollouts["r1"]
    assert rollout.broken == "link 4 does not continue link 2"
    assert rules.decide(other, rollout, T0 + timedelta(days=9), world.records) == ()
    assert other.attention == {}


def test_a_changed_link_breaks_the_chain() -> None:
    world = World(2)
    world.begin()
    other = Workspace("prod")
    for data in [world.log[0], world.log[1].replace(b'"seq":2', b'"seq": 2'), *world.log[2:]]:
        fold(other, data)
    assert other.rollouts["r1"].broken


def test_the_rollout_stays_in_the_trace_of_its_command() -> None:
    assert World(1).create().trace_id == "1" * 32


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"waves": ()}, "waves"),
        ({"waves": (Wave(name="", count=1),)}, "waves[0].name"),
        ({"waves": (Wave(name="a", count=1), Wave(name="a", count=1))}, "waves[1].name"),
        ({"waves": (Wave(name="a", count=1, percent=5),)}, "waves[0].percent"),
        ({"waves": (Wave(name="a", count=1, hosts=("h0",)),)}, "waves[0].hosts"),
        ({"waves": (Wave(name="a"),)}, "waves[0]"),
        ({"waves": (Wave(name="a", count=0),)}, "waves[0].count"),
        ({"waves": (Wave(name="a", percent=0),)}, "waves[0].percent"),
        ({"waves": (Wave(name="a", percent=101),)}, "waves[0].percent"),
        ({"waves": (Wave(name="a", percent=50), Wave(name="b", percent=20))}, "waves[1].percent"),
        ({"waves": (Wave(name="a", count=1, soak_s=-1),)}, "waves[0].soak_s"),
        ({"waves": (Wave(name="a", hosts=("h0", "h0")),)}, "waves[0].hosts"),
        ({"waves": (Wave(name="a", hosts=("h0",)), Wave(name="b", hosts=("h0",)))}, "waves[1].hosts"),
        ({"waves": (Wave(name="a", hosts=("nobody",)),)}, "waves[0].hosts"),
        ({"waves": (Wave(name="a", labels={"role": "web"}),)}, "waves[0]"),
        ({"selector": Selector(hosts=("nobody",))}, "scope.selector.hosts"),
        ({"gates": Gates(max_failed=1.1)}, "gates.max_failed"),
        ({"gates": Gates(min_sample=0)}, "gates.min_sample"),
        ({"max_unavailable": 0.0}, "max_unavailable"),
        ({"host_deadline_s": 0.0}, "host_deadline_s"),
        ({"trial_s": 0.0}, "trial_s"),
        ({"packages": {"9.9.9": "a" * 64}}, "scope.packages"),
        ({"packages": {"1.0.0": "zz"}}, "scope.packages[1.0.0]"),
        ({"policy_serial": 0}, "scope.policy_serial"),
        ({"not_before": T0 + timedelta(days=2)}, "scope.not_after"),
    ],
)
def test_a_rollout_that_makes_no_sense_is_refused_by_the_name_of_its_field(
    changes: dict[str, object], field: str
) -> None:
    with pytest.raises(Refused) as caught:
        World(3).create(**changes)
    assert caught.value.reason.startswith(f"{field}: ")
    assert caught.value.code in (Code.ROLLOUT_INVALID, Code.SCOPE_VIOLATION)


def test_a_selector_that_takes_nobody_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        World(3).create(selector=Selector(labels={"role": "web"}))
    assert caught.value.code is Code.ROLLOUT_NO_HOSTS
