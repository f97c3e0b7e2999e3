"""What a thief of activation's key tries on one host, by name: see `test_stolen_activation`.

Each builder prepares a host and says what is sent to it; `ATTACKS` adds the code that must come back and the one defence
without which the attack reaches its target.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import msgspec
from support_stolen import (
    NEW,
    NOW,
    OLD,
    OTHER,
    Attack,
    Thief,
    decide,
    scope,
    without,
    without_claims,
    without_clock_floor,
    without_field,
    without_keys,
    without_kinds,
    without_owner,
    without_roles,
    without_signatures,
)  # fmt: skip

from loopback.contracts import envelope, hostrecord
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import DesiredModule, DesiredState, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Gates, HostInvite, HostPut, RolloutAbort, Selector
from loopback.contracts.reports import Witness
from loopback.contracts.trustdoc import Floor, Trust
from loopback.host import transitions, witness
from loopback.host.state import HostState, ModuleState, Quarantined

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
_replace = msgspec.structs.replace


def asks(**changes: Any) -> Any:
    """The thief asks for something else than the start that an operator signed for NEW."""
    return lambda thief: thief.entry(**changes)


def running(**changes: Any) -> Any:
    return asks(running=_replace(NEW, **changes))


def two_versions(thief: Thief) -> DesiredModule:
    """The scope names the digest of another version too; the command is for one."""
    packages = {NEW.version: NEW.package, OTHER.version: OTHER.package}
    asked = _replace(NEW, version=OTHER.version, package=OTHER.package)
    return thief.entry(running=asked, start={"scope": {"packages": packages}})


def start_of(**changes: Any) -> Any:
    """An operator did sign this start: for something else, elsewhere, or at another time."""
    return lambda thief: thief.entry(start=changes)


def another_module(thief: Thief) -> DesiredModule:
    """The owner allows both modules; the operator signed for one."""
    thief.modules = ("tiny", "edge")
    return _replace(thief.entry(expected=None), module="edge")


def not_allowed(thief: Thief) -> DesiredModule:
    thief.modules = ("other",)
    return thief.entry()


def signed_by(who: str) -> Any:
    def build(thief: Thief) -> DesiredModule:
        key = {"activation": thief.signers.activation, "host": thief.key}.get(who) or thief.people[who]
        return thief.entry(scope=thief.signers.command(thief.signers.rollout(NEW), key))

    return build


def released_by_one_who_left(thief: Thief) -> DesiredModule:
    entry = thief.entry(scope=thief.signers.command(thief.signers.rollout(NEW), thief.people["rob"]))
    staying = tuple(o for o in thief.signers.trust.document.operators if o.name != "rob")
    thief.signers.trust = Trust(_replace(thief.signers.trust.document, operators=staying, version=9))
    return entry


def changed_after_signing(**changes: Any) -> Any:
    """The operator's own signature under a start that says something else."""

    def build(thief: Thief) -> DesiredModule:
        start = thief.signers.rollout(NEW)
        wider = _replace(start, **changes)
        signed, forged = thief.signers.command(start), thief.signers.command(wider)
        return thief.entry(
            running=_replace(NEW, version=wider.version, package=wider.scope.packages[wider.version]),
            trial_s=wider.trial_s,
            rollout=wider.rollout,
            scope=Envelope(forged.payload, forged.payloadType, signed.signatures),
        )

    return build


def changed_scope(**changes: Any) -> Any:
    def build(thief: Thief) -> DesiredModule:
        changed = _replace(thief.signers.rollout(NEW).scope, **changes)
        entry = changed_after_signing(scope=changed)(thief)
        target = _replace(entry.running, policy=changed.policy, policy_serial=changed.policy_serial)
        return _replace(entry, running=None if changed.absent else target)

    return build


def signed_as(**changes: Any) -> Any:
    """The operator's own signature under a start for elsewhere or something else, which the thief made one for here."""

    def build(thief: Thief) -> DesiredModule:
        signed = thief.signers.command(thief.signers.rollout(NEW, **changes))
        ours = thief.signers.command(thief.signers.rollout(NEW))
        return thief.entry(scope=Envelope(ours.payload, ours.payloadType, signed.signatures))

    return build


def back_to(target: Running | None, **start: Any) -> Any:
    """The host made the change; the thief takes it back to something that it never ran."""

    def build(thief: Thief) -> DesiredModule:
        back = thief.promote(thief.entry(start=start))
        return _replace(back, running=target)

    return build


def the_way_back(thief: Thief, **start: Any) -> DesiredModule:
    return thief.promote(thief.entry(start=start))


def by_another_command(thief: Thief) -> DesiredModule:
    """Two starts of one name: the way back of the second is not that of the first."""
    back = the_way_back(thief)
    longer = thief.signers.rollout(NEW, scope={"not_after": NOW + 90 * DAY})
    return _replace(back, scope=thief.signers.command(longer))


def abort(thief: Thief, who: str = "ada", **changes: Any) -> Envelope:
    key = thief.signers.activation if who == "activation" else thief.people[who]
    command = RolloutAbort(**thief.signers.times() | {"rollout": "r1"} | changes)
    return thief.signers.command(command, key)


def halted(who: str = "", **changes: Any) -> Any:
    def build(thief: Thief) -> DesiredModule:
        back = the_way_back(thief, scope={"on_failure": "halt"})
        return _replace(back, abort=abort(thief, who, **changes)) if who else back

    return build


def start_as_abort(thief: Thief) -> DesiredModule:
    """An operator signed that hosts halt; the thief passes the start itself off as the operator's word to go back."""
    back = the_way_back(thief, scope={"on_failure": "halt"})
    return _replace(back, abort=back.scope)


def resumed_as_another(thief: Thief) -> DesiredModule:
    """What a host has begun it may finish after the scope's end; the thief has it finish something else."""
    thief.own = transitions.accept(thief.own, thief.entry())
    return thief.entry(OTHER)


def regulated(*approvers: str, **changes: Any) -> Any:
    def build(thief: Thief) -> DesiredModule:
        thief.rules(regulated=True)
        entry = thief.entry(**changes.get("entry", {}))
        said = tuple(thief.approval(entry, who, **changes.get("approval", {})) for who in approvers)
        return _replace(entry, approvals=said)

    return build


def approved_for_another(thief: Thief) -> DesiredModule:
    """eve approved one start of this name; the thief has another, which an operator signed as well."""
    thief.rules(regulated=True)
    approved, other = thief.entry(), thief.entry(OTHER)
    return _replace(other, approvals=(thief.approval(approved, "eve"),))


def removal_unapproved(thief: Thief) -> DesiredModule:
    thief.rules(regulated=True)
    return thief.entry(None)


def older_rollout(thief: Thief) -> DesiredModule:
    """An operator rolled NEW out, then went on to OTHER; both scopes still hold, and the policy is that promoted now."""
    older = thief.entry(
        _replace(NEW, policy=OTHER.policy, policy_serial=3), start={"issued_at": NOW - HOUR / 4}
    )
    thief.promote(thief.entry(OTHER, generation=6, rollout="r2"))
    return _replace(older, generation=7, expected=OTHER)


def removed_module(thief: Thief) -> DesiredModule:
    """An operator took the module away; the thief installs it again by the start with which it once came."""
    came = thief.entry(start={"issued_at": NOW - HOUR / 4})
    thief.promote(came)
    gone = thief.entry(None, generation=6, rollout="r2", expected=NEW)
    thief.own = transitions.removed(transitions.accept(thief.own, gone))
    return _replace(came, generation=7, expected=None)


def replayed_policy(thief: Thief) -> DesiredModule:
    """A start whose policy is older than what ran here since."""
    thief.own = _replace(thief.own, serial_floor=5, floor_policy="9" * 64)
    return thief.entry()


def below_floor(thief: Thief) -> DesiredModule:
    thief.rules(floors={"tiny": Floor("1.1.5")})
    return thief.entry()


def back_below_floor(thief: Thief) -> DesiredModule:
    back = the_way_back(thief)
    thief.rules(floors={"tiny": Floor("1.1", NOW - HOUR)})
    return back


def failed_before(thief: Thief) -> DesiredModule:
    why = Refusal(Code.MODULE_DIED, "it died")
    thief.own = _replace(thief.own, quarantine=(Quarantined(package=NEW.package, refusal=why),))
    return thief.entry()


def clock_set_back(thief: Thief) -> DesiredModule:
    """The scope is over, as the host knows from what was signed since; its clock says otherwise."""
    thief.state = _replace(thief.state, clock_floor=NOW + DAY)
    return thief.entry()


def whole(**changes: Any) -> Any:
    """A document that is wrong as a whole."""
    return lambda thief: thief.document(thief.entry(), **changes)


def of_generation(generation: int) -> Any:
    return lambda thief: thief.document(thief.entry(generation=generation))


def replayed_document(thief: Thief) -> DesiredState:
    """What this host obeyed a while ago, before it went on."""
    old = thief.document(thief.entry(generation=4, expected=OLD))
    thief.state = _replace(thief.state, generation=6)
    thief.own = _replace(thief.own, generation=3)
    return old


def second_content(thief: Thief) -> DesiredState:
    document = thief.document(thief.entry(generation=5))
    thief.state = _replace(thief.state, generation=5, document="0" * 64)
    return document


def too_many_modules(thief: Thief) -> DesiredState:
    many = (_replace(thief.entry(), module=f"m{n}") for n in range(100))
    return thief.document(*many, thief.entry())


def before_the_wipe(thief: Thief) -> DesiredState:
    """Made for the host before it lost its state, when activation had never heard of it."""
    thief.state = HostState(incarnation="i2", since=NOW + HOUR)
    thief.own = ModuleState(module="tiny")
    return thief.document(thief.entry(expected=None))


def record(who: str = "", **changes: Any) -> Any:
    """Another record of the host, signed by somebody or by nobody who may."""

    def build(thief: Thief) -> DesiredState:
        fields = {"host": "h1", "public_key": thief.key.public.text, "labels": {"role": "web"}} | changes
        key = thief.people.get(who) or thief.signers.activation
        signed = thief.signers.command(HostPut(**thief.signers.times() | fields), key)
        entry = thief.entry(start={"scope": {"selector": Selector(labels={"role": "web"})}})
        return thief.document(entry, record=signed)

    return build


def older_record(thief: Thief) -> DesiredState:
    """An admin took the label away that the scope selects; the thief shows the record of before."""
    thief.state = _replace(thief.state, record_at=NOW + HOUR)
    entry = thief.entry(start={"scope": {"selector": Selector(labels={"role": "web"})}})
    return thief.document(entry)


def forged_claim(thief: Thief) -> DesiredState:
    """An operator invited the host; the thief claims the invitation with a token of its own, for the host's own key."""
    token, forged = SigningKey.generate(), SigningKey.generate()
    invite = HostInvite(
        **thief.signers.times(), host="h1", claim_key=token.public.text, claim_before=NOW + DAY
    )
    claim = hostrecord.Claim(
        invite=invite.id, host="h1", workspace=invite.workspace, public_key=thief.key.public.text, at=NOW
    )
    signed = envelope.seal(hostrecord.envelope.CLAIM, msgspec.json.encode(claim), forged, thief.key)
    return thief.document(thief.entry(), record=thief.signers.command(invite), claim=signed)


def cut_journal(thief: Thief) -> DesiredState:
    thief.state = _replace(thief.state, witnesses=(Witness(50, "5" * 64, NOW),))
    return thief.document(thief.entry(), journal_links=49, journal_head="4" * 64)


def signed_by_no_activation(thief: Thief) -> Envelope:
    return thief.signers.sealed(thief.document(thief.entry()), thief.signers.operator)


def by_the_key_of_before(thief: Thief) -> Envelope:
    """Activation was given another key, by a trust document that the host has."""
    document = _replace(thief.signers.document, services={"activation": (SigningKey.generate().public.text,)})
    stolen = thief.signers.sealed(thief.document(thief.entry()))
    thief.signers.trust = Trust(document)
    return stolen


within = without_field
signature = without_signatures
approval = without(scope, "_check_approved")

ATTACKS: Final = {
    # each field of what runs
    "other-version": Attack(two_versions, Code.SCOPE_VIOLATION, within("version")),
    "swapped-package": Attack(running(package="e" * 64), Code.SCOPE_VIOLATION, within("package")),
    "other-policy": Attack(running(policy="e" * 64), Code.SCOPE_VIOLATION, within("policy")),
    "no-policy": Attack(running(policy=None), Code.SCOPE_VIOLATION, within("policy")),
    "other-serial": Attack(running(policy_serial=9), Code.SCOPE_VIOLATION, within("policy_serial")),
    # each field of an entry
    "another-module": Attack(another_module, Code.SCOPE_VIOLATION, within("module")),
    "module-not-allowed": Attack(not_allowed, Code.HOST_NOT_ALLOWED, without_owner),
    "removal": Attack(asks(running=None), Code.SCOPE_VIOLATION, within("running")),
    "removal-unapproved": Attack(removal_unapproved, Code.ROLLOUT_UNAPPROVED, approval),
    "other-rollout": Attack(
        lambda thief: _replace(thief.entry(), rollout="r9"), Code.SCOPE_VIOLATION, within("rollout")
    ),
    "scope-by-activation": Attack(signed_by("activation"), Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    "scope-by-the-host": Attack(signed_by("host"), Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    "scope-by-an-author": Attack(signed_by("max"), Code.COMMAND_UNAUTHORISED, without_roles),
    "scope-by-one-who-left": Attack(released_by_one_who_left, Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    "wrong-expectation": Attack(asks(expected=OTHER), Code.HOST_EXPECTED, without(scope, "_check_expected")),
    "huge-size": Attack(asks(size=2**50), Code.ENVELOPE_MALFORMED, without(decide, "check_form")),
    "no-trial": Attack(asks(trial_s=0.0), Code.SCOPE_VIOLATION, within("trial_s")),
    "endless-trial": Attack(asks(trial_s=1e9), Code.SCOPE_VIOLATION, within("trial_s")),
    "endless-way-back": Attack(
        lambda thief: _replace(the_way_back(thief), trial_s=1e9), Code.SCOPE_VIOLATION, within("trial_s")
    ),
    "after-the-scope": Attack(asks(), Code.SCOPE_EXPIRED, within("not_after"), at=2 * HOUR),
    "before-the-scope": Attack(
        start_of(scope={"not_before": NOW + HOUR / 2}), Code.SCOPE_EXPIRED, within("not_before")
    ),
    "after-its-deadline": Attack(asks(not_after=NOW - HOUR), Code.HOST_DEADLINE, within("deadline")),
    "clock-set-back": Attack(clock_set_back, Code.SCOPE_EXPIRED, without_clock_floor),
    "back-to-what-never-ran": Attack(back_to(OTHER), Code.SCOPE_VIOLATION, within("returning")),
    "back-to-nothing": Attack(back_to(None), Code.SCOPE_VIOLATION, within("returning")),
    "back-by-another-command": Attack(by_another_command, Code.SCOPE_VIOLATION, within("scope")),
    "back-too-late": Attack(the_way_back, Code.SCOPE_EXPIRED, within("way back"), at=2 * DAY),
    "back-against-halt": Attack(halted(), Code.SCOPE_VIOLATION, without(scope, "_check_halt")),
    "back-below-the-floor": Attack(back_below_floor, Code.HOST_BELOW_FLOOR, without(scope, "_check_floor")),
    "abort-by-activation": Attack(halted("activation"), Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    "abort-by-an-author": Attack(halted("max"), Code.COMMAND_UNAUTHORISED, without_roles),
    "abort-of-another-rollout": Attack(halted("ada", rollout="r2"), Code.SCOPE_VIOLATION, within("abort")),
    "start-as-abort": Attack(start_as_abort, Code.SCOPE_VIOLATION, without_kinds),
    "resumed-as-another": Attack(resumed_as_another, Code.HOST_GENERATION, within("generation"), at=2 * HOUR),
    "unapproved": Attack(regulated(), Code.ROLLOUT_UNAPPROVED, approval),
    "approved-by-the-releaser": Attack(regulated("ada"), Code.ROLLOUT_UNAPPROVED, approval),
    "approved-by-an-author": Attack(regulated("max"), Code.ROLLOUT_UNAPPROVED, approval),
    "approved-under-another-name": Attack(
        regulated("eve", approval={"rollout": "r2"}), Code.ROLLOUT_UNAPPROVED, approval
    ),
    "approved-elsewhere": Attack(
        regulated("eve", approval={"workspace": "lab"}), Code.ROLLOUT_UNAPPROVED, approval
    ),
    "approval-of-another-start": Attack(approved_for_another, Code.ROLLOUT_UNAPPROVED, approval),
    # what the host remembers against replays
    "older-rollout": Attack(older_rollout, Code.SCOPE_VIOLATION, without(scope, "_check_order")),
    "removed-module": Attack(removed_module, Code.SCOPE_VIOLATION, without(scope, "_check_order")),
    "replayed-policy": Attack(replayed_policy, Code.POLICY_SERIAL, without(scope, "_check_serial")),
    "below-the-floor": Attack(below_floor, Code.HOST_BELOW_FLOOR, without(scope, "_check_floor")),
    "what-failed-here": Attack(failed_before, Code.HOST_QUARANTINED, without(scope, "_check_quarantine")),
    # each field of the whole document
    "other-hosts-document": Attack(
        whole(host="h2"), Code.HOST_WRONG_HOST, without(decide, "_check_addressee")
    ),
    "other-workspaces-document": Attack(
        whole(workspace="lab"), Code.HOST_WRONG_HOST, without(decide, "_check_addressee")
    ),
    "huge-generation": Attack(
        of_generation(2**53 - 1), Code.HOST_GENERATION, without(decide, "_check_generation")
    ),
    "impossible-generation": Attack(
        of_generation(2**53), Code.ENVELOPE_MALFORMED,
        without(decide, "check_form"), without(decide, "_check_generation"),
    ),
    "above-its-document": Attack(
        lambda thief: thief.document(thief.entry(generation=9), generation=5), Code.ENVELOPE_MALFORMED,
        without(decide, "check_form"),
    ),
    "replayed-document": Attack(
        replayed_document, Code.HOST_GENERATION, without(decide, "_check_generation")
    ),
    "second-content": Attack(second_content, Code.HOST_GENERATION, without(decide, "_check_generation")),
    "too-many-modules": Attack(too_many_modules, Code.ENVELOPE_MALFORMED, without(decide, "check_form")),
    "before-the-wipe": Attack(before_the_wipe, Code.HOST_INCARNATION, without(decide, "_check_incarnation")),
    "other-incarnation": Attack(
        whole(incarnation="i0"), Code.HOST_INCARNATION, without(decide, "_check_incarnation")
    ),
    "record-by-activation": Attack(record(), Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    "record-by-a-releaser": Attack(record("rob"), Code.COMMAND_UNAUTHORISED, without_roles),
    "record-of-another-key": Attack(
        record("ada", public_key="5" * 64), Code.SCOPE_VIOLATION, without(decide, "_check_key")
    ),
    "older-record": Attack(older_record, Code.SCOPE_VIOLATION, without(decide, "_check_newest")),
    "forged-claim": Attack(forged_claim, Code.IDENTITY_CLAIM, without_claims),
    "cut-journal": Attack(cut_journal, Code.JOURNAL_REWRITTEN, without(witness, "contradiction")),
    "not-activations-key": Attack(signed_by_no_activation, Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    "activations-key-of-before": Attack(by_the_key_of_before, Code.SIGNATURE_UNKNOWN_KEY, without_keys),
    # starts that were signed for something else
    "other-hosts-scope": Attack(
        start_of(scope={"selector": Selector(hosts=("h2",))}), Code.SCOPE_VIOLATION, within("selector")
    ),
    "other-labels-scope": Attack(
        start_of(scope={"selector": Selector(labels={"role": "db"})}),
        Code.SCOPE_VIOLATION,
        within("selector"),
    ),
    "other-workspaces-scope": Attack(
        start_of(scope={"workspace": "lab"}), Code.SCOPE_VIOLATION, within("workspace")
    ),
    "other-workspaces-start": Attack(start_of(workspace="lab"), Code.SCOPE_VIOLATION, within("command")),
    "other-modules-scope": Attack(start_of(scope={"module": "edge"}), Code.SCOPE_VIOLATION, within("module")),
    "other-modules-start": Attack(start_of(module="edge"), Code.SCOPE_VIOLATION, within("module")),
    "scope-of-another-version": Attack(
        start_of(scope={"packages": {OTHER.version: NEW.package}}), Code.SCOPE_VIOLATION, within("package")
    ),
    "start-of-another-version": Attack(start_of(version="1.2"), Code.SCOPE_VIOLATION, within("version")),
    "other-policys-scope": Attack(
        start_of(scope={"policy": "e" * 64}), Code.SCOPE_VIOLATION, within("policy")
    ),
    "other-serials-scope": Attack(
        start_of(scope={"policy_serial": 9}), Code.SCOPE_VIOLATION, within("policy_serial")
    ),
    "removals-scope": Attack(start_of(scope={"absent": True}), Code.SCOPE_VIOLATION, within("running")),
    "longer-trials-start": Attack(asks(trial_s=0.3, start={"trial_s": 5.0}), Code.SCOPE_VIOLATION, within("trial_s")),
    # starts that were changed after an operator had signed them, field by field: the operator's signature is what holds
    # a start together, so it is the one defence of all of these. What else holds a field that a host compares is above.
    "start.id": Attack(changed_after_signing(id="c99"), Code.SIGNATURE_INVALID, signature),
    "start.issued_at": Attack(
        changed_after_signing(issued_at=NOW + HOUR / 4), Code.SIGNATURE_INVALID, signature
    ),
    "start.expires_at": Attack(changed_after_signing(expires_at=NOW + DAY), Code.SIGNATURE_INVALID, signature),
    "start.rollout": Attack(changed_after_signing(rollout="r9"), Code.SIGNATURE_INVALID, signature),
    "start.workspace": Attack(signed_as(workspace="lab"), Code.SIGNATURE_INVALID, signature),
    "start.module": Attack(signed_as(module="edge"), Code.SIGNATURE_INVALID, signature),
    "start.version": Attack(signed_as(version="1.0"), Code.SIGNATURE_INVALID, signature),
    "start.gates": Attack(
        changed_after_signing(gates=Gates(max_failed=1.0, min_sample=1)), Code.SIGNATURE_INVALID, signature
    ),
    "start.waves": Attack(changed_after_signing(waves=()), Code.SIGNATURE_INVALID, signature),
    "start.max_unavailable": Attack(
        changed_after_signing(max_unavailable=0.5), Code.SIGNATURE_INVALID, signature
    ),
    "start.host_deadline_s": Attack(
        changed_after_signing(host_deadline_s=9.0), Code.SIGNATURE_INVALID, signature
    ),
    "start.trial_s": Attack(changed_after_signing(trial_s=0.01), Code.SIGNATURE_INVALID, signature),
    "start.policy_name": Attack(changed_after_signing(policy_name="x"), Code.SIGNATURE_INVALID, signature),
    "scope.workspace": Attack(signed_as(scope={"workspace": "lab"}), Code.SIGNATURE_INVALID, signature),
    "scope.module": Attack(signed_as(scope={"module": "edge"}), Code.SIGNATURE_INVALID, signature),
    "scope.packages": Attack(
        changed_scope(packages={NEW.version: "e" * 64}), Code.SIGNATURE_INVALID, signature
    ),
    "scope.policy": Attack(changed_scope(policy="e" * 64), Code.SIGNATURE_INVALID, signature),
    "scope.policy_serial": Attack(changed_scope(policy_serial=9), Code.SIGNATURE_INVALID, signature),
    "scope.selector": Attack(changed_scope(selector=Selector(hosts=("h1",))), Code.SIGNATURE_INVALID, signature),
    "scope.not_before": Attack(changed_scope(not_before=NOW - DAY), Code.SIGNATURE_INVALID, signature),
    "scope.not_after": Attack(
        changed_scope(not_after=NOW + 90 * DAY), Code.SIGNATURE_INVALID, signature, at=30 * DAY
    ),
    "scope.on_failure": Attack(changed_scope(on_failure="halt"), Code.SIGNATURE_INVALID, signature),
    "scope.absent": Attack(changed_scope(absent=True), Code.SIGNATURE_INVALID, signature),
}  # fmt: skip
