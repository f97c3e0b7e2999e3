"""A rollout in a regulated workspace: it waits for another operator, and what happens when rules or people change."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from activation_world import APPROVER, OPERATOR, T0, World, approval_command, start_command

from loopback.contracts import journal
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import Running
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import Rollout, Standing, State, WaveState, Workspace
from loopback.contracts.trustdoc import Floor, Operator, Role, Trust, TrustDocument, WorkspaceRules
from loopback.services.activation import checks
from loopback.services.activation import decide as rules

V1 = Running("1.0.0", "a" * 64, "d" * 64, 1)
SECOND_KEY, THIRD = SigningKey.from_raw(b"2" * 32), SigningKey.from_raw(b"3" * 32)
REGULATED = WorkspaceRules(regulated=True, publishers={"firewall": ("f" * 64,)})


def trust(*, regulated: bool = True, approver: tuple[Role, ...] = (Role.APPROVER,)) -> Trust:
    return Trust(
        TrustDocument(
            version=1,
            operators=(
                Operator("ada", OPERATOR.public.text, {"prod": (Role.ADMIN,)}),
                Operator("ada", SECOND_KEY.public.text, {"prod": (Role.APPROVER,)}),
                Operator("ben", APPROVER.public.text, {"prod": approver}),
                Operator("cyd", THIRD.public.text, {"*": (Role.APPROVER,)}),
            ),
            services={},
            workspaces={"prod": REGULATED} if regulated else {},
        )
    )


def waiting(**changes: Any) -> tuple[World, Rollout]:
    world = World(4)
    rollout = world.create(approvals_needed=1, **changes)
    world.decide()
    return world, rollout


def refused(rollout: Rollout, found: Trust, at: Any = T0, **changes: Any) -> Refused:
    key = changes.pop("key", APPROVER)
    with pytest.raises(Refused) as caught:
        checks.may_approve(rollout, approval_command(rollout, T0, key, **changes), found, at)
    assert caught.value.reason
    assert caught.value.next_step
    return caught.value


def test_it_waits_and_asks_nobody_before_another_operator_has_signed() -> None:
    world, rollout = waiting()
    assert rollout.state is State.AWAITING_APPROVAL
    world.verdict()
    assert world.decide() == []
    assert rollout.state is State.AWAITING_APPROVAL
    assert world.desired == {}
    world.approve()
    assert rollout.state is State.READY
    assert world.decide()
    assert rollout.state is State.RUNNING
    assert world.finish() is State.DONE


def test_approval_and_verdicts_may_come_in_any_order() -> None:
    world, rollout = waiting()
    world.approve()
    assert rollout.state is State.DRAFT
    assert world.decide() == []
    world.verdict()
    assert rollout.state is State.READY
    world.decide()
    assert rollout.state is State.RUNNING


def test_every_desired_state_carries_the_approval_also_on_the_way_back() -> None:
    world, rollout = waiting()
    world.verdict()
    world.approve()
    world.decide()
    (canary,) = world.assigned()
    assert world.desired[canary][-1].modules[0].approvals == rollout.approvals != ()
    world.report(canary, Phase.ROLLED_BACK, None, code=Code.MODULE_DIED)
    world.decide()
    back = world.desired[canary][-1].modules[0]
    assert back.returning
    assert back.approvals == rollout.approvals


def test_a_rollout_that_needs_none_carries_none() -> None:
    world = World(1)
    rollout = world.begin()
    assert rollout.approvals == ()
    assert world.desired["h0"][-1].modules[0].approvals == ()


def test_nobody_approves_in_time_and_it_is_canceled_saying_so() -> None:
    world, rollout = waiting()
    world.verdict()
    assert rules.due(rollout) == rollout.start.scope.not_after
    world.now = rollout.start.scope.not_after
    world.decide()
    assert rollout.state is State.CANCELED
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.ROLLOUT_UNAPPROVED
    assert "nobody approved it" in rollout.refusal.reason
    assert world.desired == {}


def test_a_verdict_against_it_ends_it_while_it_waits() -> None:
    world, rollout = waiting()
    world.verdict(delivery=Refusal(Code.PACKAGE_UNKNOWN, "no such release"))
    world.decide()
    assert rollout.state is State.CANCELED


def test_silent_services_end_it_while_it_waits() -> None:
    world, rollout = waiting()
    assert rules.due(rollout) == world.now + rules.VERDICTS_WITHIN
    world.wait(3600)
    assert rollout.state is State.CANCELED


def test_taking_a_module_away_waits_too() -> None:
    world, rollout = waiting(absent=True, version="", policy=None, policy_serial=0)
    world.wait(2 * 3600)
    assert rollout.state is State.AWAITING_APPROVAL
    world.approve()
    world.decide()
    assert rollout.state is State.RUNNING


def test_while_it_waits_nobody_else_may_take_its_hosts() -> None:
    world, _ = waiting()
    with pytest.raises(Refused) as caught:
        checks.peers(world.workspace, start_command("r2", T0), world.labels)
    assert caught.value.code is Code.COMMAND_CONFLICT
    assert "AWAITING_APPROVAL" in caught.value.reason


def test_it_can_be_aborted_and_not_paused_while_it_waits() -> None:
    _, rollout = waiting()
    checks.may_abort(rollout)
    with pytest.raises(Refused):
        checks.may_pause(rollout)
    with pytest.raises(Refused):
        checks.may_resume(rollout, T0)


def test_another_operators_approval_is_taken() -> None:
    _, rollout = waiting()
    assert checks.may_approve(rollout, approval_command(rollout, T0), trust(), T0) == ("ben",)


def test_the_one_who_started_it_cannot_approve_it_with_either_key() -> None:
    _, rollout = waiting()
    for key in (OPERATOR, SECOND_KEY):
        found = refused(rollout, trust(), key=key)
        assert found.code is Code.ROLLOUT_UNAPPROVED
        assert "ada signed the start too" in found.reason


def test_an_approval_of_another_start_is_refused() -> None:
    _, rollout = waiting()
    assert refused(rollout, trust(), start="0" * 64).code is Code.ROLLOUT_UNAPPROVED


def test_a_second_approval_is_refused_unless_the_first_lost_its_signer() -> None:
    world, rollout = waiting()
    world.approve()
    found = refused(rollout, trust(), key=THIRD)
    assert found.code is Code.ROLLOUT_STATE
    assert "ben approved it already" in found.reason
    without_ben = trust(approver=(Role.VIEWER,))
    assert checks.may_approve(rollout, approval_command(rollout, T0, THIRD), without_ben, T0) == ("cyd",)


def test_an_approval_after_the_end_of_the_scope_or_of_the_rollout_is_refused() -> None:
    world, rollout = waiting()
    late = rollout.start.scope.not_after
    assert refused(rollout, trust(), at=late).code is Code.SCOPE_EXPIRED
    world.now = late
    world.decide()
    assert refused(rollout, trust(), at=late).code is Code.ROLLOUT_STATE


def test_where_nothing_is_regulated_nothing_is_to_be_approved() -> None:
    world = World(2)
    rollout = world.begin()
    found = refused(rollout, trust(regulated=False))
    assert found.code is Code.ROLLOUT_STATE
    assert "not regulated" in found.reason


def test_a_workspace_that_becomes_regulated_pauses_the_rollout_and_an_approval_lets_it_go_on() -> None:
    world = World(3)
    rollout = world.begin()
    (canary,) = world.assigned()
    world.report(canary, Phase.REJECTED, None, code=Code.ROLLOUT_UNAPPROVED)
    world.decide()
    assert rollout.state is State.PAUSED
    assert rollout.waves[0].state is WaveState.INCONCLUSIVE
    assert "loopback rollout approve r1" in rollout.reason
    assert checks.may_approve(rollout, approval_command(rollout, T0), trust(), T0) == ("ben",)
    world.approve()
    assert rollout.state is State.PAUSED
    checks.may_resume(rollout, world.now)
    world.write("r1", journal.Resumed(operators=("ada",)))
    world.decide()
    assert rollout.hosts[canary].standing is Standing.ASSIGNED
    assert world.desired[canary][-1].modules[0].approvals == rollout.approvals
    assert world.finish() is State.DONE


def test_a_workspace_that_stops_being_regulated_leaves_it_waiting_and_approvable() -> None:
    _, rollout = waiting()
    free = trust(regulated=False)
    assert checks.may_approve(rollout, approval_command(rollout, T0), free, T0) == ("ben",)


def test_whoever_folds_the_journal_sees_who_approved() -> None:
    world, rollout = waiting()
    world.approve()
    other = Workspace("prod")
    for link in (*world.log, *world.log):
        fold(other, link)
    found = other.rollouts["r1"]
    assert (found.state, list(found.approved_by), found.approvals) == (
        State.DRAFT,
        ["ben"],
        rollout.approvals,
    )


# Early answers by the workspace's rules


def test_a_version_below_the_floor_is_refused_at_the_start() -> None:
    floors = WorkspaceRules(floors={"firewall": Floor("1.1.0")})
    with pytest.raises(Refused) as caught:
        checks.rules(start_command("r1", T0), floors)
    assert caught.value.code is Code.HOST_BELOW_FLOOR
    assert "1.1.0" in caught.value.next_step
    checks.rules(start_command("r1", T0, version="1.1.0"), floors)
    checks.rules(start_command("r1", T0, absent=True, version="", policy=None, policy_serial=0), floors)


def test_a_regulated_workspace_without_pinned_publishers_takes_no_rollout() -> None:
    for found in ({}, {"firewall": ()}, {"edge": ("f" * 64,)}):
        with pytest.raises(Refused) as caught:
            checks.rules(start_command("r1", T0), WorkspaceRules(regulated=True, publishers=found))
        assert caught.value.code is Code.HOST_PUBLISHER
    checks.rules(start_command("r1", T0), REGULATED)
    checks.rules(start_command("r1", T0), WorkspaceRules())


# Older scopes


def test_a_start_signed_before_one_that_its_hosts_were_asked_to_obey_is_refused() -> None:
    world = World(2)
    world.begin("r1")
    world.finish("r1")
    early = start_command("r0", T0 - timedelta(seconds=1))
    with pytest.raises(Refused) as caught:
        checks.order(world.workspace, early, ["h0"])
    assert caught.value.code is Code.COMMAND_CONFLICT
    assert caught.value.next_step == "sign it again"
    checks.order(world.workspace, start_command("r0", T0), ["h0"])
    checks.order(world.workspace, early, ["h7"])
    checks.order(world.workspace, start_command("r0", T0 - timedelta(seconds=1), module="edge"), ["h0"])


def test_a_start_that_nobody_was_asked_to_obey_does_not_stand_in_the_way_of_an_older_one() -> None:
    world = World(2)
    world.begin("r1", not_before=T0 + timedelta(hours=2))
    checks.order(world.workspace, start_command("r0", T0 - timedelta(seconds=1)), ["h0"])
