"""A stolen activation: what it cannot do, field by field, and that nothing which a host obeys lies outside a scope.

The thief has activation's real key, the bus, and every document that activation ever saw. `FIELDS` names, for each field of
each thing that a host reads, what holds it; a field that is new and not named there fails `test_every_field_…`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_attacks import ATTACKS, HOUR, abort
from support_stolen import (
    NEW,
    NOW,
    OLD,
    OTHER,
    Thief,
    forgetful,
    outcome,
    without,
    without_keys,
    without_roles,
    without_signatures,
)  # fmt: skip

from loopback.contracts import approvals, envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import DesiredModule, DesiredState, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.messages import RolloutStart, Scope, Selector
from loopback.contracts.trustdoc import Trust
from loopback.host import policies
from loopback.host.scope import Answer

_replace = msgspec.structs.replace

#: What holds each field of what a host reads: attacks by name, or, where a field decides nothing here, why none is needed.
FIELDS: Final[dict[type[msgspec.Struct], dict[str, tuple[str, ...] | str]]] = {
    DesiredState: {
        "host": ("other-hosts-document",),
        "workspace": ("other-workspaces-document",),
        "generation": ("huge-generation", "impossible-generation", "replayed-document", "second-content"),
        "modules": ("too-many-modules",),
        "issued_at": ("before-the-wipe",),
        "record": ("record-by-activation", "record-by-a-releaser", "record-of-another-key", "older-record"),
        "claim": ("forged-claim",),
        "journal_head": ("cut-journal",),
        "journal_links": ("cut-journal",),
        "incarnation": ("other-incarnation", "before-the-wipe"),
        "environment": "a word for people; no host decides by it (test_the_environment_decides_nothing)",
    },
    DesiredModule: {
        "module": ("another-module", "module-not-allowed"),
        "running": ("removal", "removal-unapproved", "back-to-what-never-ran", "back-to-nothing"),
        "generation": ("resumed-as-another", "above-its-document"),
        "rollout": ("other-rollout",),
        "scope": ("scope-by-activation", "scope-by-the-host", "scope-by-an-author", "scope-by-one-who-left"),
        "expected": ("wrong-expectation",),
        "size": ("huge-size",),
        "trial_s": ("no-trial", "endless-trial", "endless-way-back"),
        "not_after": ("after-the-scope", "after-its-deadline", "clock-set-back"),
        "returning": ("back-by-another-command", "back-too-late", "back-against-halt", "back-below-the-floor"),
        "abort": ("abort-by-activation", "abort-by-an-author", "abort-of-another-rollout", "start-as-abort"),
        "approvals": (
            "unapproved", "approved-by-the-releaser", "approved-by-an-author", "approved-under-another-name",
            "approved-elsewhere", "approval-of-another-start",
        ),
    },
    Running: {
        "version": ("other-version", "below-the-floor"),
        "package": ("swapped-package", "what-failed-here"),
        "policy": ("other-policy", "no-policy"),
        "policy_serial": ("other-serial", "replayed-policy"),
    },
    # Of a start: what a host compares with it, or what it remembers; and the signature, which holds the start together.
    RolloutStart: {
        "id": ("start.id",),
        "workspace": ("other-workspaces-start", "start.workspace"),
        "issued_at": ("older-rollout", "removed-module", "start.issued_at"),
        "expires_at": ("start.expires_at",),
        "rollout": ("other-rollout", "start.rollout"),
        "module": ("other-modules-start", "start.module"),
        "version": ("other-version", "start-of-another-version", "start.version"),
        "waves": ("start.waves",),
        "scope": ("back-by-another-command", "scope.packages"),
        "gates": ("start.gates",),
        "max_unavailable": ("start.max_unavailable",),
        "host_deadline_s": ("start.host_deadline_s",),
        "trial_s": ("no-trial", "longer-trials-start", "start.trial_s"),
        "policy_name": ("start.policy_name",),
    },
    Scope: {
        "workspace": ("other-workspaces-scope", "scope.workspace"),
        "module": ("other-modules-scope", "another-module", "scope.module"),
        "packages": ("scope-of-another-version", "swapped-package", "scope.packages"),
        "policy": ("other-policys-scope", "other-policy", "no-policy", "scope.policy"),
        "policy_serial": ("other-serials-scope", "other-serial", "scope.policy_serial"),
        "selector": ("other-hosts-scope", "other-labels-scope", "scope.selector"),
        "not_before": ("before-the-scope", "scope.not_before"),
        "not_after": ("after-the-scope", "back-too-late", "scope.not_after"),
        "on_failure": ("back-against-halt", "scope.on_failure"),
        "absent": ("removal", "removals-scope", "scope.absent"),
    },
}  # fmt: skip

#: Fields of a start with which a host compares nothing: activation's own business, which a thief of its key ignores as it
#: likes (`rollout plan` says so: skip-pacing). The operator's signature is the only thing that holds them.
BY_THE_SIGNATURE_ALONE: Final = {
    "id", "expires_at", "waves", "gates", "max_unavailable", "host_deadline_s", "policy_name"
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_reaches_its_target_without_the_one_defence_and_fails_with_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ATTACKS[name].run(monkeypatch)


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_every_field_of_what_a_host_reads_is_held_by_something(kind: type[msgspec.Struct]) -> None:
    assert set(FIELDS[kind]) == set(kind.__struct_fields__)
    for field, attacks in FIELDS[kind].items():
        assert attacks, field
        if not isinstance(attacks, str):
            assert set(attacks) <= set(ATTACKS), field


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind in (RolloutStart, Scope) for field in kind.__struct_fields__]
)
def test_a_field_of_a_start_is_held_by_its_own_check_and_by_the_signature(
    kind: type[msgspec.Struct], field: str
) -> None:
    """Each attack has one defence removed: so one that fails by the host's own comparison fails with every signature right."""
    removed = [ATTACKS[name].removed for name in FIELDS[kind][field]]
    assert (without_signatures,) in removed, "changed after it was signed"
    assert any(without_signatures not in one for one in removed) == (field not in BY_THE_SIGNATURE_ALONE)


def test_a_signed_command_of_another_kind_is_no_scope() -> None:
    """Nothing is reached without this check either, since no other command has a scope; it is refused in words."""
    thief = Thief()
    assert thief.ask(thief.entry(scope=abort(thief))) == Code.SCOPE_VIOLATION


@pytest.mark.parametrize("environment", ["production", "staging", "sandbox"])
def test_the_environment_decides_nothing(environment: str) -> None:
    assert Thief().ask(environment=environment) is Answer.CHANGE
    assert Thief().ask(environment=environment, host="h1", record=None) == Code.ELIGIBILITY_NO_RECORD


# Policies: what a scope names by digest must itself be signed by an author of this workspace


def judged(data: bytes, digest: str, trust: Trust, serial: int = 2) -> Code | None:
    target = Running(version="1.1", package="c" * 64, policy=digest, policy_serial=serial)
    try:
        policies.check_policy(data, target, "tiny", "prod", trust)
    except Refused as refused:
        return refused.code
    return None


@pytest.mark.parametrize(
    ("changes", "code", "check"),
    [
        ({"workspace": "lab"}, Code.POLICY_MALFORMED, "_check_place"),
        ({"module": "edge"}, Code.POLICY_MALFORMED, "_check_place"),
        ({"serial": 1}, Code.POLICY_SERIAL, "_check_serial"),
    ],
)
def test_another_workspaces_or_modules_policy_or_another_serial_does_not_pass(
    changes: dict[str, Any], code: Code, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief = Thief()
    fields = {"serial": 2, "workspace": "prod", "module": "tiny"} | changes
    data, digest = thief.signers.policy(**fields)
    with monkeypatch.context() as lenient:
        without(policies, check)(lenient)
        assert judged(data, digest, thief.signers.trust) is None
    assert judged(data, digest, thief.signers.trust) == code


@pytest.mark.parametrize(
    ("who", "code", "removal"),
    [
        ("rob", Code.COMMAND_UNAUTHORISED, without_roles),
        ("activation", Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    ],
)
def test_a_policy_by_somebody_who_is_no_author_does_not_pass(
    who: str, code: Code, removal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief = Thief()
    thief.signers.operator = thief.people.get(who) or thief.signers.activation
    data, digest = thief.signers.policy(2)
    with monkeypatch.context() as lenient:
        removal(lenient)
        assert judged(data, digest, thief.signers.trust) is None
    assert judged(data, digest, thief.signers.trust) == code


def test_a_policy_by_an_author_who_left_does_not_pass_any_more() -> None:
    thief = Thief()
    before = thief.signers.trust
    thief.signers.operator = thief.people["max"]
    data, digest = thief.signers.policy(2)
    assert judged(data, digest, before) is None
    staying = tuple(o for o in before.document.operators if o.name != "max")
    after = Trust(_replace(before.document, operators=staying, version=9))
    assert judged(data, digest, after) == Code.SIGNATURE_UNKNOWN_KEY


# Whatever a thief puts together of what it has: what is obeyed lies inside


class Oracle:
    """What may be obeyed at all, said as sets, apart from the code that decides."""

    def __init__(self, thief: Thief, starts: dict[bytes, RolloutStart], approved: set[bytes]) -> None:
        self.thief, self.starts, self.approved = thief, starts, approved

    def permits(self, entry: DesiredModule, now: datetime) -> bool:
        start = self.starts.get(envelope.payload_of(entry.scope))
        if start is None or start.scope.workspace != "prod" or start.module != entry.module != "":
            return False
        own = self.thief.own
        if entry.returning:
            return entry.running in (own.promoted, own.previous)
        wanted = (
            None
            if start.scope.absent
            else Running(
                version=start.version,
                package=start.scope.packages[start.version],
                policy=start.scope.policy,
                policy_serial=start.scope.policy_serial,
            )
        )
        hosts, labels = start.scope.selector.hosts, start.scope.selector.labels
        return (
            entry.running == wanted
            and now < start.scope.not_after
            and (not hosts or "h1" in hosts)
            and labels.items() <= {"role": "web"}.items()
            and envelope.payload_of(entry.scope) in self.approved
            and entry.trial_s >= start.trial_s
            and (own.scope_at is None or start.issued_at >= own.scope_at)
        )


@given(st.data())
def test_whatever_a_thief_puts_together_is_obeyed_only_inside_a_scope(data: st.DataObject) -> None:
    thief = Thief()
    thief.rules(regulated=True)
    signers = thief.signers
    wants: list[tuple[Running | None, dict[str, Any]]] = [
        (NEW, {}),
        (OTHER, {}),
        (None, {}),
        (OLD, {"scope": {"not_after": NOW - HOUR}}),
        (NEW, {"scope": {"selector": Selector(hosts=("h2",))}}),
        (NEW, {"scope": {"workspace": "lab"}}),
        (OTHER, {"scope": {"on_failure": "halt"}, "trial_s": 5.0}),
        (OTHER, {"issued_at": NOW - HOUR / 2}),
        (NEW, {"scope": {"packages": {NEW.version: NEW.package, OTHER.version: OTHER.package}}}),
    ]
    starts, sealed, approved, said = {}, [], set(), []
    for number, (target, changes) in enumerate(wants):
        start = signers.rollout(target, f"r{number % 3}", **changes)
        signed = signers.command(start)
        payload = envelope.payload_of(signed)
        starts[payload] = start
        sealed.append(signed)
        if data.draw(st.booleans(), "approved"):
            approved.add(payload)
            said.append(thief.approval(_replace(thief.entry(), scope=signed, rollout=start.rollout), "eve"))
    if data.draw(st.booleans(), "the host made a change before"):
        thief.promote(_replace(thief.entry(), scope=sealed[0], rollout="r0"))
    aborts = [None, abort(thief, rollout="r0"), abort(thief, rollout="r1"), abort(thief, "activation")]
    pick = st.sampled_from
    entry = DesiredModule(
        module="tiny",
        running=data.draw(pick([OLD, NEW, OTHER, None, _replace(NEW, policy_serial=7)])),
        expected=data.draw(pick([thief.own.promoted, OLD, NEW, None])),
        generation=data.draw(pick([4, 5, 6, 7])),
        rollout=data.draw(pick(["r0", "r1", "r2"])),
        scope=data.draw(pick([*sealed, signers.command(signers.rollout(OTHER), signers.activation)])),
        trial_s=data.draw(pick([0.0, 0.3, 5.0, 1e9])),
        not_after=data.draw(pick([None, NOW - HOUR, NOW + HOUR])),
        returning=data.draw(st.booleans()),
        abort=data.draw(pick(aborts)),
        approvals=tuple(data.draw(st.lists(pick(said), max_size=9))) if said else (),
    )
    at = data.draw(pick([timedelta(), HOUR / 2, 2 * HOUR]))
    answer, _ = outcome(thief, signers.sealed(thief.document(entry, generation=7)), at)
    if answer is Answer.CHANGE:
        assert Oracle(thief, starts, approved).permits(entry, NOW + at)


@given(st.data())
def test_one_field_changed_of_a_good_document_is_refused_or_lies_inside(data: st.DataObject) -> None:
    """Any field of the entry, set to what the thief saw in that place anywhere else."""
    thief = Thief()
    good, other = thief.entry(), thief.entry(OTHER, generation=6, rollout="r2", trial_s=5.0, size=1)
    back = thief.entry(OLD, generation=5, returning=True, approvals=(thief.approval(good, "eve"),))
    field = data.draw(st.sampled_from(DesiredModule.__struct_fields__))
    value = getattr(data.draw(st.sampled_from([other, back])), field)
    entry = _replace(good, **{field: value})
    answer, _ = outcome(thief, thief.signers.sealed(thief.document(entry, generation=6)))
    if answer is Answer.CHANGE:
        assert entry.running == NEW


def test_what_is_remembered_of_a_signature_belongs_to_its_bytes_and_its_trust_document() -> None:
    """Else the second document of a thief would pass on the first one's good name."""
    thief = Thief()
    assert thief.ask() is Answer.CHANGE
    entry = thief.entry()
    assert thief.ask(entry) is Answer.CHANGE
    forged = thief.signers.command(thief.signers.rollout(OTHER))
    stolen = Envelope(forged.payload, forged.payloadType, entry.scope.signatures)
    assert thief.ask(_replace(entry, scope=stolen, running=OTHER)) == Code.SIGNATURE_INVALID
    nobody = _replace(thief.signers.trust.document, operators=(), version=9)
    thief.signers.trust = Trust(nobody)
    assert thief.ask(entry) == Code.SIGNATURE_UNKNOWN_KEY


def test_a_thief_gets_no_further_with_more_approvals_than_are_looked_at() -> None:
    thief = Thief()
    thief.rules(regulated=True)
    entry = thief.entry()
    many = (thief.approval(entry, "ada"),) * approvals.MAX_APPROVALS + (thief.approval(entry, "eve"),)
    with forgetful():
        _, why = outcome(thief, thief.signers.sealed(thief.document(_replace(entry, approvals=many))))
    assert why is not None
    assert why.code == Code.ENVELOPE_MALFORMED
