"""What a host obeys: one story per check of `check_desired`, each with everything else in order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_decide import NEW, NOW, OLD, Host
from support_host import WORKSPACE, Signers

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import WAY_BACK, DesiredModule, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Policy, RolloutAbort, Selector
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.host import transitions
from loopback.host.plan import StepName, Undo, plan
from loopback.host.policies import check_policy
from loopback.host.scope import Answer
from loopback.host.state import ModuleState, Quarantined


@pytest.fixture
def host() -> Host:
    return Host()


def test_what_lies_inside_the_scope_is_obeyed(host: Host) -> None:
    accepted = host.check(host.signers.sealed(host.document(host.entry())))
    assert [c.answer for c in accepted.entries] == [Answer.CHANGE]
    assert (accepted.state.generation, accepted.doubt) == (5, None)
    assert accepted.state.record_at is not None
    assert accepted.state.clock_floor is not None


def with_role(host: Host, *roles: Role) -> None:
    """Everything is signed by an operator who has only these roles; the record by an admin as before."""
    limited = SigningKey.generate()
    host.signers.trust = Trust(
        TrustDocument(
            version=2,
            operators=(
                Operator("ada", host.signers.operator.public.text, {"*": (Role.ADMIN,)}),
                Operator("ben", limited.public.text, {WORKSPACE: roles}),
            ),
            services=host.signers.document.services,
        )
    )
    host.signers.operator = limited


# 7–10


def test_7_what_was_handled_is_not_handled_again(host: Host) -> None:
    assert host.ask(host.entry(generation=3), generation=5) is Answer.STALE
    assert host.ask(host.entry(OLD, generation=4, rollout="r0")) is Answer.STALE
    assert host.ask(host.entry(NEW, generation=4, rollout="r0")) == Code.HOST_GENERATION


def test_7_an_entry_in_hand_goes_on_even_when_its_time_is_over(host: Host) -> None:
    entry = host.entry(not_after=NOW + timedelta(minutes=1))
    host.own = transitions.accept(host.own, entry)
    assert host.ask(entry, now=NOW + timedelta(days=30)) is Answer.CHANGE


def test_8_the_owner_of_the_host_decides_which_modules_may_run(host: Host) -> None:
    host.modules = ("other",)
    assert host.ask() == Code.HOST_NOT_ALLOWED


def test_9_the_scope_is_signed_by_a_releaser(host: Host) -> None:
    start = host.signers.rollout(NEW)
    for key in (SigningKey.generate(), host.signers.activation, host.key):
        entry = host.entry(scope=host.signers.command(start, key))
        assert host.ask(entry) == Code.SIGNATURE_UNKNOWN_KEY
    assert host.ask(host.entry(scope=host.record)) == Code.SCOPE_VIOLATION
    record = host.record
    with_role(host, Role.AUTHOR, Role.APPROVER, Role.VIEWER)
    assert host.ask(host.entry(), record=record) == Code.COMMAND_UNAUTHORISED
    with_role(host, Role.RELEASER)
    assert host.ask(host.entry(), record=record) == Code.SIGNATURE_UNKNOWN_KEY, (
        "ben is not ada, who signed the record"
    )


def test_9_a_releaser_needs_no_more_than_that_role(host: Host) -> None:
    record, ada = host.record, host.signers.operator
    limited = SigningKey.generate()
    host.signers.trust = Trust(
        TrustDocument(
            version=2,
            operators=(
                Operator("ada", ada.public.text, {"*": (Role.ADMIN,)}),
                Operator("ben", limited.public.text, {WORKSPACE: (Role.RELEASER,)}),
            ),
            services=host.signers.document.services,
        )
    )
    entry = host.entry(scope=host.signers.command(host.signers.rollout(NEW), limited))
    assert host.ask(entry, record=record) is Answer.CHANGE


@pytest.mark.parametrize(
    "start",
    [
        {"scope": {"workspace": "lab"}},
        {"scope": {"module": "other"}},
        {"module": "other"},
        {"workspace": "lab"},
    ],
)
def test_10_scope_and_command_are_for_this_workspace_and_module(host: Host, start: dict[str, Any]) -> None:
    assert host.ask(host.entry(start=start)) == Code.SCOPE_VIOLATION


def test_10_the_entry_names_the_scopes_own_rollout(host: Host) -> None:
    scope = host.signers.command(host.signers.rollout(NEW, "r9"))
    assert host.ask(host.entry(scope=scope)) == Code.SCOPE_VIOLATION


# 11: every field inside the scope


@pytest.mark.parametrize(
    "target",
    [
        msgspec.structs.replace(NEW, version="1.2"),
        msgspec.structs.replace(NEW, package="e" * 64),
        msgspec.structs.replace(NEW, policy="e" * 64),
        msgspec.structs.replace(NEW, policy=None),
        msgspec.structs.replace(NEW, policy_serial=3),
        None,
        OLD,
    ],
)
def test_11_no_field_lies_outside_the_scope(host: Host, target: Running | None) -> None:
    assert host.ask(host.entry(running=target)) == Code.SCOPE_VIOLATION


def test_11_only_the_version_of_the_command_not_any_the_scope_names(host: Host) -> None:
    packages = {NEW.version: NEW.package, "1.2": "e" * 64}
    entry = host.entry(start={"scope": {"packages": packages}})
    assert host.ask(entry) is Answer.CHANGE
    other = msgspec.structs.replace(NEW, version="1.2", package="e" * 64)
    assert host.ask(msgspec.structs.replace(entry, running=other)) == Code.SCOPE_VIOLATION


def test_11_nobody_shortens_a_trial_or_stretches_it_without_end(host: Host) -> None:
    assert host.ask(host.entry(trial_s=0.0)) == Code.SCOPE_VIOLATION
    assert host.ask(host.entry(trial_s=1e6)) == Code.SCOPE_VIOLATION


def test_11_a_module_is_taken_away_only_by_a_scope_that_says_so(host: Host) -> None:
    assert host.ask(host.entry(None)) is Answer.CHANGE
    assert host.ask(host.entry(None, start={"scope": {"absent": False}})) == Code.SCOPE_VIOLATION
    assert host.ask(host.entry(NEW, start={"scope": {"absent": True}})) == Code.SCOPE_VIOLATION


def test_11_the_way_back_leads_only_to_what_this_host_ran_before_this_very_rollout(host: Host) -> None:
    host.own = msgspec.structs.replace(
        host.own, promoted=NEW, previous=OLD, previous_rollout="r1", target=NEW, serial_floor=2
    )
    back = host.entry(running=OLD, expected=NEW, returning=True)
    assert host.ask(back) is Answer.CHANGE
    assert host.ask(msgspec.structs.replace(back, running=NEW)) is Answer.SAME
    invented = msgspec.structs.replace(OLD, version="0.9")
    assert host.ask(msgspec.structs.replace(back, running=invented)) == Code.SCOPE_VIOLATION
    assert host.ask(msgspec.structs.replace(back, running=None)) == Code.SCOPE_VIOLATION
    later = host.entry(NEW, rollout="r2", running=OLD, expected=NEW, returning=True)
    assert host.ask(later) == Code.SCOPE_VIOLATION, "another rollout's way back is not this one's"
    assert host.ask(msgspec.structs.replace(back, expected=None)) == Code.HOST_EXPECTED


def test_11_where_nothing_ran_before_the_way_back_is_absence(host: Host) -> None:
    host.own = msgspec.structs.replace(
        host.own, promoted=NEW, previous=None, previous_rollout="r1", target=NEW
    )
    assert host.ask(host.entry(running=None, expected=NEW, returning=True)) is Answer.CHANGE


def came(host: Host, to: DesiredModule) -> DesiredModule:
    """Have the host promote this entry; the way back from there, by the same command."""
    came_from = host.own.promoted
    moved = transitions.begin_trial(transitions.accept(host.own, to), 1.0)
    host.own = transitions.promote(moved)
    return msgspec.structs.replace(
        to, running=came_from, expected=to.running, generation=to.generation + 1, returning=True
    )


def abort_of(
    host: Host, rollout: str = "r1", *, at: datetime = NOW, key: SigningKey | None = None
) -> Envelope:
    command = RolloutAbort(**host.signers.times() | {"issued_at": at}, rollout=rollout)
    return host.signers.command(command, *([key] if key else []))


END = NOW + timedelta(hours=1)  # of the scope


def test_11_the_way_back_closes_a_day_after_the_scopes_end(host: Host) -> None:
    back = came(host, host.entry())
    assert host.ask(back, now=END + WAY_BACK - timedelta(seconds=1)) is Answer.CHANGE
    assert host.ask(back, now=END + WAY_BACK) == Code.SCOPE_EXPIRED
    host.state = msgspec.structs.replace(host.state, clock_floor=END + WAY_BACK)
    assert host.ask(back, now=NOW) == Code.SCOPE_EXPIRED, "a clock set back opens nothing"


def test_11_activation_alone_cannot_take_a_first_installation_away_later(host: Host) -> None:
    host.own = ModuleState(module="tiny")
    back = came(host, host.entry(expected=None))
    assert back.running is None
    assert host.ask(back, now=NOW + timedelta(days=60)) == Code.SCOPE_EXPIRED


def test_11_a_way_back_in_hand_is_gone_to_the_end(host: Host) -> None:
    back = came(host, host.entry())
    host.own = transitions.accept(host.own, back)
    assert host.ask(back, now=NOW + timedelta(days=30)) is Answer.CHANGE


def test_11_an_operators_abort_opens_the_way_back_for_a_day(host: Host) -> None:
    back = came(host, host.entry())
    late = NOW + timedelta(days=30)
    aborted = msgspec.structs.replace(back, abort=abort_of(host, at=late))
    assert host.ask(aborted, now=late + timedelta(hours=23)) is Answer.CHANGE
    assert host.ask(aborted, now=late + WAY_BACK) == Code.SCOPE_EXPIRED


def test_11_where_the_scope_says_halt_only_an_operators_abort_leads_back(host: Host) -> None:
    back = came(host, host.entry(start={"scope": {"on_failure": "halt"}}))
    assert host.ask(back) == Code.SCOPE_VIOLATION

    def with_abort(signed: Envelope) -> Answer | Code:
        return host.ask(msgspec.structs.replace(back, abort=signed))

    assert with_abort(abort_of(host)) is Answer.CHANGE
    assert with_abort(abort_of(host, "r2")) == Code.SCOPE_VIOLATION, "another rollout's abort"
    assert with_abort(abort_of(host, key=host.signers.activation)) == Code.SIGNATURE_UNKNOWN_KEY
    assert with_abort(host.record) == Code.SCOPE_VIOLATION
    elsewhere = RolloutAbort(**host.signers.times() | {"workspace": "lab"}, rollout="r1")
    assert with_abort(host.signers.command(elsewhere)) == Code.SCOPE_VIOLATION


def test_11_an_abort_needs_a_releaser(host: Host) -> None:
    back = came(host, host.entry(start={"scope": {"on_failure": "halt"}}))
    author, ada = SigningKey.generate(), host.signers.operator
    operators = (
        Operator("ada", ada.public.text, {"*": (Role.ADMIN,)}),
        Operator("ben", author.public.text, {WORKSPACE: (Role.AUTHOR, Role.APPROVER)}),
    )
    host.signers.trust = Trust(
        TrustDocument(version=2, operators=operators, services=host.signers.document.services)
    )
    assert host.ask(msgspec.structs.replace(back, abort=abort_of(host))) is Answer.CHANGE
    signed = abort_of(host, key=author)
    assert host.ask(msgspec.structs.replace(back, abort=signed)) == Code.COMMAND_UNAUTHORISED


def test_11_the_way_back_is_that_of_the_very_command_that_led_here(host: Host) -> None:
    back = came(host, host.entry())
    longer = host.signers.rollout(NEW, scope={"not_after": NOW + timedelta(days=90)})
    other = msgspec.structs.replace(back, scope=host.signers.command(longer))
    assert host.ask(other) == Code.SCOPE_VIOLATION


# 12–20


def test_12_the_selector_looks_at_the_signed_labels(host: Host) -> None:
    def select(**fields: Any) -> Answer | Code:
        return host.ask(host.entry(start={"scope": {"selector": Selector(**fields)}}))

    assert select(labels={"role": "web"}) is Answer.CHANGE
    assert select(labels={"role": "db"}) == Code.SCOPE_VIOLATION
    assert select(labels={"role": "web", "site": "a"}) == Code.SCOPE_VIOLATION
    assert select(hosts=("h2", "h1")) is Answer.CHANGE
    assert select(hosts=("h2",)) == Code.SCOPE_VIOLATION


def test_15_what_holds_already_never_expires(host: Host) -> None:
    entry = host.entry(OLD, rollout="r2", expected=None, not_after=NOW - timedelta(days=1))
    assert host.ask(entry, now=NOW + timedelta(days=400)) is Answer.SAME


def test_16_a_change_starts_only_within_the_scopes_time(host: Host) -> None:
    assert host.ask(now=NOW + timedelta(hours=2)) == Code.SCOPE_EXPIRED
    later = {"scope": {"not_before": NOW + timedelta(minutes=30)}}
    assert host.ask(host.entry(start=later)) == Code.SCOPE_EXPIRED
    assert host.ask(host.entry(start=later), now=NOW + timedelta(minutes=31)) is Answer.CHANGE


def test_16_times_at_the_calendars_edges_are_compared_like_all_others(host: Host) -> None:
    first, last = datetime(1, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    assert host.ask(host.entry(start={"scope": {"not_before": first, "not_after": last}})) is Answer.CHANGE
    assert (
        host.ask(host.entry(start={"scope": {"not_before": last, "not_after": last}})) == Code.SCOPE_EXPIRED
    )
    assert host.ask(host.entry(start={"issued_at": last})) == Code.SCOPE_EXPIRED
    back = came(host, host.entry(start={"scope": {"not_before": first, "not_after": last}}))
    assert host.ask(back) is Answer.CHANGE


def test_16_a_change_starts_only_before_its_deadline(host: Host) -> None:
    assert host.ask(host.entry(not_after=NOW + timedelta(seconds=5))) is Answer.CHANGE
    late = host.entry(not_after=NOW + timedelta(seconds=5))
    assert host.ask(late, now=NOW + timedelta(seconds=6)) == Code.HOST_DEADLINE


def test_16_a_clock_set_back_revives_nothing(host: Host) -> None:
    entry = host.entry(start={"scope": {"not_after": NOW + timedelta(minutes=5)}})
    host.state = msgspec.structs.replace(host.state, clock_floor=NOW + timedelta(minutes=6))
    assert host.ask(entry, now=NOW - timedelta(days=3650)) == Code.SCOPE_EXPIRED


def test_16_a_clock_that_is_years_behind_still_starts_what_is_signed_now(host: Host) -> None:
    assert host.ask(now=NOW - timedelta(days=3650)) is Answer.CHANGE


def test_18_the_sender_must_know_what_the_host_runs(host: Host) -> None:
    assert host.ask(host.entry(expected=None)) == Code.HOST_EXPECTED
    assert host.ask(host.entry(expected=NEW)) == Code.HOST_EXPECTED


def test_19_policy_serials_only_grow(host: Host) -> None:
    for serial in (0, 1):
        target = msgspec.structs.replace(NEW, policy_serial=serial)
        assert host.ask(host.entry(target)) == Code.POLICY_SERIAL
    same_policy = msgspec.structs.replace(NEW, policy=OLD.policy, policy_serial=OLD.policy_serial)
    assert host.ask(host.entry(same_policy)) is Answer.CHANGE, "another version with the promoted policy"


def test_20_what_failed_here_is_not_tried_again(host: Host) -> None:
    why = Refusal(Code.MODULE_DIED, "it died")
    host.own = msgspec.structs.replace(host.own, quarantine=(Quarantined(package=NEW.package, refusal=why),))
    assert host.ask() == Code.HOST_QUARANTINED
    pair = Quarantined(package=NEW.package, policy=NEW.policy, refusal=why)
    host.own = msgspec.structs.replace(host.own, quarantine=(pair,))
    assert host.ask() == Code.HOST_QUARANTINED
    better = msgspec.structs.replace(NEW, policy="e" * 64, policy_serial=3)
    assert host.ask(host.entry(better)) is Answer.CHANGE


def test_20_what_was_interrupted_too_often_is_not_tried_again(host: Host) -> None:
    host.own = msgspec.structs.replace(host.own, target=NEW, attempts=transitions.MAX_ATTEMPTS)
    assert host.ask() == Code.HOST_LOOP


def test_one_refused_entry_does_not_stop_another(host: Host) -> None:
    host.modules = ("tiny", "edge")
    bad = msgspec.structs.replace(host.entry(trial_s=0.0), module="edge")
    accepted = host.check(host.signers.sealed(host.document(bad, host.entry())))
    assert [c.answer for c in accepted.entries] == [Answer.REFUSED, Answer.CHANGE]


@given(st.data())
def test_no_change_of_a_signed_document_is_obeyed(data: st.DataObject) -> None:
    host = Host()
    signed = host.signers.sealed(host.document(host.entry()))
    payload = bytearray(envelope.payload_of(signed))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    forged = envelope.seal(envelope.DESIRED, bytes(payload))
    assert (
        host.refused(Envelope(forged.payload, forged.payloadType, signed.signatures))
        == Code.SIGNATURE_INVALID
    )


@given(st.binary(max_size=200))
def test_nothing_that_activation_signs_by_mistake_crashes_the_host(payload: bytes) -> None:
    host = Host()
    assert (
        host.refused(envelope.seal(envelope.DESIRED, payload, host.signers.activation))
        == Code.ENVELOPE_MALFORMED
    )


# policies


def test_a_policy_needs_its_digest_an_author_and_the_signed_serial() -> None:
    signers = Signers()

    def check(data: bytes, digest: str, serial: int = 2, trust: Trust = signers.trust) -> Policy | Code:
        try:
            target = msgspec.structs.replace(NEW, policy=digest, policy_serial=serial)
            return check_policy(data, target, "tiny", WORKSPACE, trust)
        except Refused as refused:
            return refused.code

    data, digest = signers.policy(2)
    good = check(data, digest)
    assert isinstance(good, Policy)
    assert good.serial == 2
    assert check(data + b" ", digest) == Code.BLOB_DIGEST
    assert check(data, digest, serial=3) == Code.POLICY_SERIAL
    for change in ({"module": "edge"}, {"workspace": "lab"}):
        assert check(*signers.policy(2, **change)) == Code.POLICY_MALFORMED
    assert check(data, digest, trust=Signers().trust) == Code.SIGNATURE_UNKNOWN_KEY
    releaser = TrustDocument(
        version=1,
        operators=(Operator("ada", signers.operator.public.text, {"*": (Role.RELEASER,)}),),
        services={},
    )
    assert check(data, digest, trust=Trust(releaser)) == Code.COMMAND_UNAUTHORISED


# plans


def names(*arguments: Any, **keywords: Any) -> list[StepName]:
    return [step.name for step in plan(*arguments, **keywords)]


def test_a_plan_goes_from_what_is_promoted_to_what_is_wanted() -> None:
    fresh = ModuleState(module="tiny")
    assert names(fresh, NEW, unpacked=False, policy_here=False) == [
        StepName.DOWNLOAD, StepName.VERIFY, StepName.STAGE, StepName.START_TRIAL, StepName.CONFIGURE,
        StepName.STAGE_POLICY, StepName.COMMIT, StepName.WATCH_TRIAL, StepName.CONFIRM, StepName.PROMOTE, StepName.COLLECT,
    ]  # fmt: skip
    promoted = ModuleState(module="tiny", promoted=OLD)
    only_policy = msgspec.structs.replace(OLD, policy="e" * 64, policy_serial=2)
    assert names(promoted, only_policy, unpacked=True, policy_here=True) == [
        StepName.VERIFY, StepName.START_TRIAL, StepName.STAGE_POLICY, StepName.COMMIT, StepName.WATCH_TRIAL,
        StepName.CONFIRM, StepName.PROMOTE, StepName.COLLECT,
    ]  # fmt: skip
    assert names(promoted, None, unpacked=True, policy_here=True) == [StepName.REMOVE, StepName.COLLECT]


@given(
    st.sampled_from([None, OLD, NEW]), st.sampled_from([OLD, NEW, msgspec.structs.replace(NEW, policy=None)]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_every_plan_verifies_before_it_runs_and_can_undo_from_the_trial_on(
    promoted: Running | None, target: Running, unpacked: bool, policy_here: bool
) -> None:
    steps = plan(
        ModuleState(module="tiny", promoted=promoted), target, unpacked=unpacked, policy_here=policy_here
    )
    order = [s.name for s in steps]
    assert order.index(StepName.VERIFY) < order.index(StepName.START_TRIAL)
    for step in steps:
        before_trial = order.index(step.name) < order.index(StepName.START_TRIAL)
        after = step.name is StepName.COLLECT
        assert (step.undo is Undo.NOTHING) == (before_trial or after)
    assert (StepName.COMMIT in order) == (target.policy is not None) == (StepName.CONFIRM in order)
    assert order[-2:] == [StepName.PROMOTE, StepName.COLLECT]
