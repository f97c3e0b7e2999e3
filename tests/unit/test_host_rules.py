"""What a workspace's rules mean on a host: approvals, floors, the order of rollouts, and what is out of line with them."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from support_decide import NEW, NOW, OLD, Host
from support_host import WORKSPACE

from loopback.contracts import envelope
from loopback.contracts.codes import Code
from loopback.contracts.desired import FIRST_GENERATION, MAX_GENERATION_STEP, DesiredModule, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import RolloutApprove
from loopback.contracts.reports import Witness
from loopback.contracts.trustdoc import EVERY_WORKSPACE, Floor, Operator, Role, Trust, WorkspaceRules
from loopback.host import floors, transitions
from loopback.host.scope import Answer
from loopback.host.state import HostState, ModuleState

DAY = timedelta(days=1)


@pytest.fixture
def host() -> Host:
    return Host()


def ruled(host: Host, workspace: str = WORKSPACE, **rules: Any) -> SigningKey:
    """Give the workspace these rules, and an approver, whose key is returned."""
    eve = SigningKey.generate()
    document = msgspec.structs.replace(
        host.signers.trust.document,
        operators=(
            *host.signers.trust.document.operators,
            Operator("eve", eve.public.text, {WORKSPACE: (Role.APPROVER,)}),
        ),
        workspaces={workspace: WorkspaceRules(**rules)},
    )
    host.signers.trust = Trust(document)
    return eve


def approval(host: Host, entry: DesiredModule, *keys: SigningKey, **changes: Any) -> Envelope:
    start = hashlib.sha256(envelope.payload_of(entry.scope)).hexdigest()
    fields = host.signers.times() | {"rollout": entry.rollout, "start": start}
    return host.signers.command(RolloutApprove(**fields | changes), *keys)


def approved(host: Host, entry: DesiredModule, *keys: SigningKey, **changes: Any) -> DesiredModule:
    return msgspec.structs.replace(entry, approvals=(approval(host, entry, *keys, **changes),))


def promoted(host: Host, entry: DesiredModule) -> ModuleState:
    return transitions.promote(transitions.begin_trial(transitions.accept(host.own, entry), 1.0))


def back(entry: DesiredModule, to: Running | None = OLD) -> DesiredModule:
    return msgspec.structs.replace(
        entry, running=to, expected=entry.running, generation=entry.generation + 1, returning=True
    )


# 13: approvals


@pytest.mark.parametrize("workspace", [WORKSPACE, EVERY_WORKSPACE])
def test_13_in_a_regulated_workspace_a_second_operator_must_have_approved(host: Host, workspace: str) -> None:
    eve = ruled(host, workspace, regulated=True)
    entry = host.entry()
    assert host.ask(entry) == Code.ROLLOUT_UNAPPROVED
    assert host.ask(approved(host, entry, eve)) is Answer.CHANGE
    assert host.ask(approved(host, entry)) == Code.ROLLOUT_UNAPPROVED, "ada started it"
    stranger = SigningKey.generate()
    assert host.ask(approved(host, entry, stranger)) == Code.ROLLOUT_UNAPPROVED
    assert host.ask(approved(host, entry, eve, rollout="r2")) == Code.ROLLOUT_UNAPPROVED
    assert host.ask(approved(host, entry, eve, start="0" * 64)) == Code.ROLLOUT_UNAPPROVED
    assert host.ask(approved(host, entry, eve, workspace="lab")) == Code.ROLLOUT_UNAPPROVED


def test_13_another_workspaces_rules_are_its_own(host: Host) -> None:
    ruled(host, "lab", regulated=True)
    assert host.ask() is Answer.CHANGE


def test_13_an_approval_that_counts_is_found_behind_one_that_does_not(host: Host) -> None:
    eve = ruled(host, regulated=True)
    entry = host.entry()
    lost = approval(host, entry, SigningKey.generate())
    both = msgspec.structs.replace(entry, approvals=(lost, approval(host, entry, eve)))
    assert host.ask(both) is Answer.CHANGE


def test_13_taking_a_module_away_needs_approval_as_well(host: Host) -> None:
    eve = ruled(host, regulated=True)
    entry = host.entry(None)
    assert host.ask(entry) == Code.ROLLOUT_UNAPPROVED, "a host without its firewall is open"
    assert host.ask(approved(host, entry, eve)) is Answer.CHANGE


def test_13_the_way_back_waits_for_nobody(host: Host) -> None:
    eve = ruled(host, regulated=True)
    entry = approved(host, host.entry(), eve)
    host.own = promoted(host, entry)
    assert host.ask(msgspec.structs.replace(back(entry), approvals=())) is Answer.CHANGE


def test_13_an_approver_who_lost_the_role_approves_nothing_any_more(host: Host) -> None:
    before = host.signers.trust
    eve = ruled(host, regulated=True)
    entry = approved(host, host.entry(), eve)
    assert host.ask(entry) is Answer.CHANGE
    document = msgspec.structs.replace(
        host.signers.trust.document, operators=before.document.operators, version=2
    )
    host.signers.trust = Trust(document)
    assert host.ask(entry) == Code.ROLLOUT_UNAPPROVED, "what was remembered belongs to another trust document"


# 14: the order of rollouts


def test_14_an_older_rollout_is_not_obeyed_after_a_newer_one(host: Host) -> None:
    older = host.entry(start={"issued_at": NOW - timedelta(minutes=2)}, rollout="r1", expected=NEW)
    newer = host.entry(generation=6, rollout="r2", start={"issued_at": NOW - timedelta(minutes=1)})
    host.own = promoted(host, newer)
    host.own = msgspec.structs.replace(host.own, promoted=OLD)  # whatever brought it back since
    again = msgspec.structs.replace(older, generation=9, expected=OLD)
    assert host.ask(again) == Code.SCOPE_VIOLATION
    assert host.ask(msgspec.structs.replace(newer, generation=9)) is Answer.CHANGE, "the same once more"


def test_14_what_holds_already_counts_as_obeyed(host: Host) -> None:
    same = host.entry(OLD, rollout="r2")
    assert host.ask(same) is Answer.SAME
    host.own = transitions.settle(host.own, same)
    assert host.own.scope_at == NOW
    older = host.entry(generation=6, start={"issued_at": NOW - timedelta(seconds=1)})
    assert host.ask(older) == Code.SCOPE_VIOLATION


def test_14_the_way_back_of_a_rollout_is_its_own(host: Host) -> None:
    entry = host.entry()
    host.own = promoted(host, entry)
    host.own = msgspec.structs.replace(host.own, scope_at=NOW + timedelta(minutes=1))
    returning = back(entry)
    assert host.ask(returning) is Answer.CHANGE
    assert transitions.accept(host.own, returning).scope_at == NOW + timedelta(minutes=1)


def test_14_a_state_of_an_agent_of_before_remembers_no_rollout_and_loads() -> None:
    data = b'{"module": "tiny", "generation": 4, "serial_floor": 1}'
    assert msgspec.json.decode(data, type=ModuleState).scope_at is None
    assert msgspec.json.decode(b'{"incarnation": "i1", "journal_head": "x"}', type=HostState).since is None


# 17: floors


def floor(version: str, since: datetime | None = None) -> dict[str, Any]:
    return {"floors": {"tiny": Floor(version, since)}}


def test_17_nothing_below_the_floor_is_newly_installed(host: Host) -> None:
    ruled(host, **floor("1.1"))
    assert host.ask() is Answer.CHANGE
    ruled(host, **floor("1.1.1"))
    assert host.ask() == Code.HOST_BELOW_FLOOR
    ruled(host, **floor("1.1.1", NOW + 30 * DAY))
    assert host.ask() == Code.HOST_BELOW_FLOOR, "also before it is in force"
    odd = msgspec.structs.replace(NEW, version="tuesday")
    assert host.ask(host.entry(odd)) == Code.HOST_BELOW_FLOOR, "what cannot be compared is below"


def test_17_what_runs_below_the_floor_still_gets_a_policy(host: Host) -> None:
    ruled(host, **floor("2.0"))
    other = msgspec.structs.replace(OLD, policy="e" * 64, policy_serial=2)
    assert host.ask(host.entry(other)) is Answer.CHANGE


def test_17_nor_is_the_way_back_open_below_a_floor_that_is_in_force(host: Host) -> None:
    entry = host.entry()
    host.own = promoted(host, entry)
    ruled(host, **floor("1.1", NOW + timedelta(hours=1)))
    assert host.ask(back(entry)) is Answer.CHANGE
    assert host.ask(back(entry), now=NOW + timedelta(hours=1)) == Code.HOST_BELOW_FLOOR
    host.state = msgspec.structs.replace(host.state, clock_floor=NOW + timedelta(hours=1))
    assert host.ask(back(entry)) == Code.HOST_BELOW_FLOOR, "a clock set back gives no more time"
    ruled(host, **floor("1.1"))
    host.state = msgspec.structs.replace(host.state, clock_floor=None)
    assert host.ask(back(entry)) == Code.HOST_BELOW_FLOOR


def test_17_a_way_back_in_hand_is_gone_to_the_end(host: Host) -> None:
    entry = host.entry()
    host.own = promoted(host, entry)
    host.own = transitions.accept(host.own, back(entry))
    ruled(host, **floor("1.1"))
    assert host.ask(back(entry)) is Answer.CHANGE


def test_17_a_trial_that_fails_goes_back_below_any_floor(host: Host) -> None:
    """No entry is asked for that: the state itself says what held before."""
    tried = transitions.begin_trial(transitions.accept(host.own, host.entry()), 1.0)
    assert transitions.undo(tried).promoted == OLD


# out of line with the rules


def test_what_runs_below_a_floor_in_force_is_said_to_and_goes_on() -> None:
    state = ModuleState(module="tiny", promoted=OLD)

    def said(**rules: Any) -> Code | None:
        found = floors.noncompliant(state, WorkspaceRules(**rules), NOW)
        return found.code if found else None

    assert said() is None
    assert said(**floor("1.1")) == said(**floor("1.1", NOW)) == Code.HOST_BELOW_FLOOR
    assert said(**floor("1.1", NOW + timedelta(seconds=1))) is None
    assert said(**floor("1.0")) is None
    assert said(floors={"other": Floor("9.9")}) is None


def test_what_no_pinned_publisher_signed_is_said_to_and_goes_on() -> None:
    def said(signers: tuple[str, ...], **rules: Any) -> Code | None:
        state = ModuleState(module="tiny", promoted=OLD, signers={OLD.package: signers})
        found = floors.noncompliant(state, WorkspaceRules(**rules), NOW)
        return found.code if found else None

    ada, eve = "a" * 64, "e" * 64
    assert said((ada,), publishers={"tiny": (ada, eve)}) is None
    assert said((ada,), publishers={"tiny": (eve,)}) == Code.HOST_PUBLISHER
    assert said((), publishers={"tiny": (eve,)}) == Code.HOST_PUBLISHER
    assert said((ada,), regulated=True) == Code.HOST_PUBLISHER, "nobody is pinned"
    assert said((ada,), publishers={"other": (eve,)}) is None
    nothing = floors.noncompliant(ModuleState(module="tiny"), WorkspaceRules(regulated=True), NOW)
    assert nothing is None, "nothing runs"


# 3, 4: incarnations and generations


def test_3_a_document_that_names_no_incarnation_is_not_older_than_this_one(host: Host) -> None:
    host.state = HostState(incarnation="i2", since=NOW)
    host.own = ModuleState(module="tiny")
    entry = host.entry(expected=None)
    old = host.document(entry, issued_at=NOW - timedelta(minutes=6))
    assert host.refused(host.signers.sealed(old)) == Code.HOST_INCARNATION
    assert host.ask(entry, issued_at=NOW - timedelta(minutes=4)) is Answer.CHANGE, "clocks differ a little"
    assert host.ask(entry, issued_at=NOW - timedelta(minutes=6), incarnation="i2") is Answer.CHANGE


def test_4_one_document_raises_the_generation_by_a_bounded_step(host: Host) -> None:
    def reach(generation: int) -> None:
        assert host.ask(host.entry(generation=generation)) is Answer.CHANGE

    def refused(generation: int) -> None:
        signed = host.signers.sealed(host.document(host.entry(generation=generation)))
        assert host.refused(signed) == Code.HOST_GENERATION

    refused(host.state.generation + MAX_GENERATION_STEP + 1)
    refused(FIRST_GENERATION)
    refused(2**53 - 1)
    reach(host.state.generation + MAX_GENERATION_STEP)
    host.state = HostState(incarnation="i1")
    refused(FIRST_GENERATION)
    reach(FIRST_GENERATION - 1)


# 21: the journal, once activation has another key


def test_21_a_journal_that_a_lost_key_told_of_binds_nobody_any_more(host: Host) -> None:
    """Whoever had activation's key may have named a journal as long as none will ever be."""
    lie = host.document(host.entry(), journal_links=2**53 - 1, journal_head="f" * 64)
    host.state = host.check(host.signers.sealed(lie)).state
    true = host.document(host.entry(generation=6), journal_links=40, journal_head="a" * 64)
    (checked,) = host.check(host.signers.sealed(true)).entries
    assert checked.refusal is not None
    assert checked.refusal.code == Code.JOURNAL_REWRITTEN

    renewed = SigningKey.generate()
    services = {"activation": (renewed.public.text,)}
    host.signers.trust = Trust(msgspec.structs.replace(host.signers.document, services=services))
    accepted = host.check(host.signers.sealed(true, renewed))
    assert accepted.entries[0].answer is Answer.CHANGE
    assert accepted.doubt is not None, "it is said all the same"
    assert accepted.state.witnesses == (Witness(40, "a" * 64, NOW),)
    assert accepted.state.witnessed_by == (renewed.keyid,)
    host.state = accepted.state
    cut = host.document(host.entry(generation=7), journal_links=39, journal_head="b" * 64)
    (checked,) = host.check(host.signers.sealed(cut, renewed)).entries
    assert checked.answer is Answer.REFUSED
