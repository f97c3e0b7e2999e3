"""Hosts that stand above what activation ever told them: somebody had its key. It learns, and goes on above."""

from __future__ import annotations

from typing import Any

import pytest
from activation_world import World
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback.contracts import journal
from loopback.contracts.codes import Code
from loopback.contracts.desired import MAX_GENERATION, MAX_LEARNT_GENERATION, Running
from loopback.contracts.messages import Wave
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import MAX_OVERTAKEN, Standing, State, Workspace

V1 = Running("1.0.0", "a" * 64, "d" * 64, 1)
PUSHED = 70_000
ALL = (Wave(name="all", percent=100),)


def stands_at(world: World, host: str, document: int, **more: Any) -> bool:
    """The host reports that it obeyed a document which no link speaks of."""
    return world.report(host, Phase.PROMOTED, V1, generation=document, document=document, **more)


def test_a_host_that_was_pushed_up_is_told_again_above_where_it_stands() -> None:
    world = World(1)
    rollout = world.begin(waves=ALL)
    assert world.desired["h0"][-1].generation == 1
    assert stands_at(world, "h0", PUSHED)
    world.decide()
    last = world.desired["h0"][-1]
    assert last.generation == PUSHED + 1 == last.modules[0].generation
    assert last.modules[0].expected == V1, "it is asked on the ground of what it said it has"
    world.obey()
    world.decide()
    assert rollout.state is State.DONE


def test_without_learning_the_host_would_never_hear_of_a_rollout_again(monkeypatch: Any) -> None:
    monkeypatch.setattr("loopback.services.activation.facts.MAX_LEARNT_GENERATION", 0)
    world = World(1)
    world.begin(waves=ALL)
    stands_at(world, "h0", PUSHED)
    world.decide()
    assert world.desired["h0"][-1].generation == 1, "which the host takes for old"


def test_a_push_between_rollouts_is_learnt_before_the_next_one() -> None:
    world = World(1)
    world.begin("r1", waves=ALL)
    assert world.finish("r1") is State.DONE
    assert stands_at(world, "h0", PUSHED)
    assert not stands_at(world, "h0", PUSHED), "it is no news twice"
    world.begin("r2", version="1.1.0", waves=ALL)
    assert world.desired["h0"][-1].generation == PUSHED + 1


def test_a_host_that_was_never_told_anything_is_told_again_when_it_says_where_it_stands() -> None:
    """It has no module at all, only a document that somebody else signed with activation's key."""
    world = World(1)
    rollout = world.begin(waves=ALL)
    assert world.report("h0", Phase.IDLE, None, empty=True, document=PUSHED)
    world.decide()
    assert world.desired["h0"][-1].generation == PUSHED + 1
    assert world.finish() is State.DONE
    assert rollout.hosts["h0"].overtaken == 1


def test_a_host_to_which_another_document_of_the_same_generation_came_first_is_told_again() -> None:
    world = World(1)
    rollout = world.begin(waves=ALL)
    taken = world.report(
        "h0", Phase.IDLE, None, generation=0, empty=True, document=1, doubt=Code.HOST_GENERATION
    )
    assert taken
    world.decide()
    assert world.desired["h0"][-1].generation == 2
    assert not world.report("h0", Phase.IDLE, None, generation=0, empty=True, document=1), "that is known now"
    assert world.finish() is State.DONE
    assert rollout.hosts["h0"].overtaken == 1


def test_a_host_on_its_way_back_is_told_again_too() -> None:
    world = World(2)
    rollout = world.begin(waves=ALL)
    world.obey("h0")
    world.write("r1", journal.RollingBack(reason="no", operators=("ada",)))
    world.decide()
    assert rollout.hosts["h0"].standing is Standing.RETURNING
    stands_at(world, "h0", PUSHED)
    world.decide()
    last = world.desired["h0"][-1]
    assert (last.generation, last.modules[0].returning) == (PUSHED + 1, True)
    world.obey()
    world.decide()
    assert rollout.state is State.ROLLED_BACK


def test_an_answer_to_what_it_was_told_is_an_answer_whatever_else_was_pushed() -> None:
    world = World(1)
    rollout = world.begin(waves=ALL)
    assert world.report("h0", Phase.PROMOTED, world.wanted("h0"), document=PUSHED)
    world.decide()
    assert rollout.state is State.DONE
    assert world.workspace.hosts["h0"].generation == PUSHED


def test_a_host_that_lies_hurts_only_itself_and_not_for_ever() -> None:
    world = World(2)
    rollout = world.begin(waves=ALL)
    for step in range(1, 50):
        stands_at(world, "h0", PUSHED * step)
        world.decide()
    assert rollout.hosts["h0"].overtaken == MAX_OVERTAKEN
    assert len(world.desired["h0"]) == 1 + MAX_OVERTAKEN, "it is not told again at every word of its"
    assert [s.generation for s in world.desired["h1"]] == [1]
    world.obey("h1")
    world.wait(301)
    assert rollout.hosts["h0"].standing is not Standing.ASSIGNED, "its silence counts at its deadline"
    assert rollout.hosts["h1"].promoted == V1


@pytest.mark.parametrize("claimed", [MAX_LEARNT_GENERATION + 1, MAX_GENERATION, 2**63])
def test_what_would_leave_no_room_above_is_not_believed(claimed: int) -> None:
    world = World(1)
    world.begin(waves=ALL)
    stands_at(world, "h0", claimed)
    world.decide()
    assert world.desired["h0"][-1].generation < MAX_GENERATION
    assert world.workspace.hosts["h0"].generation <= 2


def test_the_highest_that_is_believed_leaves_room_for_every_rollout_to_come() -> None:
    world = World(1)
    world.begin(waves=ALL)
    stands_at(world, "h0", MAX_LEARNT_GENERATION)
    world.decide()
    assert world.desired["h0"][-1].generation == MAX_LEARNT_GENERATION + 1
    assert MAX_GENERATION - MAX_LEARNT_GENERATION > 10**9


def test_a_forged_link_with_an_impossible_generation_is_not_believed_by_the_fold_either() -> None:
    world = World(1)
    world.begin(waves=ALL)
    seen = journal.Observation(host="h0", phase=Phase.PROMOTED, generation=1, document=2**60, promoted=V1)
    world.write("r1", journal.Observed(hosts=(seen,)))
    assert world.workspace.hosts["h0"].generation == 1


def test_another_incarnation_starts_below_and_that_is_no_push() -> None:
    world = World(1)
    world.begin(waves=ALL)
    world.obey()
    world.decide()
    before = world.workspace.hosts["h0"].generation
    world.report("h0", Phase.IDLE, None, incarnation="two", empty=True, document=0)
    world.decide()
    assert world.workspace.hosts["h0"].generation == before + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["h0", "h1"]), st.integers(0, 2**54), st.booleans()), max_size=25))
def test_whatever_hosts_claim_generations_only_grow_and_stay_in_bounds(
    claims: list[tuple[str, int, bool]],
) -> None:
    world = World(2)
    rollout = world.begin(waves=ALL)
    for host, document, obeys in claims:
        stands_at(world, host, document)
        world.decide()
        if obeys:
            world.obey(host)
            world.decide()
    while rollout.state not in (State.DONE, State.ROLLED_BACK, State.ROLLBACK_INCOMPLETE):
        world.obey()
        world.wait(301)
    for states in world.desired.values():
        numbers = [s.generation for s in states]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] < MAX_GENERATION
    other = Workspace("prod")
    for link in world.log:
        fold(other, link)
    assert {h: ledger.generation for h, ledger in other.hosts.items()} == {
        h: ledger.generation for h, ledger in world.workspace.hosts.items()
    }
