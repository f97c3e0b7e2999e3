"""An attacker who has activation's key and everything that activation ever saw, and a host that has only its own checks.

Each attack is tried twice: first with exactly one defence taken out, which shows that it reaches its target; then as the
host is, which must refuse it with the right code and be left as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import msgspec
import pytest
from support_decide import NEW, NOW, OLD, Host
from support_host import WORKSPACE

from loopback.contracts import envelope, hostrecord, messages
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import DesiredModule, DesiredState, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.contracts.messages import HostInvite, RolloutApprove
from loopback.contracts.trustdoc import Operator, Role, Trust, WorkspaceRules
from loopback.host import decide, scope, transitions
from loopback.host.scope import Answer
from loopback.host.state import ModuleState

OTHER = Running(version="1.2", package="e" * 64, policy="f" * 64, policy_serial=3)

#: Takes one defence out.
Removal = Callable[[pytest.MonkeyPatch], None]


def nothing(*arguments: Any, **keywords: Any) -> None:
    """What a check says that was taken out."""


def without(module: ModuleType, check: str) -> Removal:
    """Without this one function's refusals."""
    return lambda patch: patch.setattr(module, check, nothing)


def without_field(field: str) -> Removal:
    """Without the one comparison of this field."""
    within = scope._within

    def lenient(name: str, holds: bool, *otherwise: Any) -> None:
        within(name, holds or name == field, *otherwise)

    return lambda patch: patch.setattr(scope, "_within", lenient)


def without_signatures(patch: pytest.MonkeyPatch) -> None:
    """Every signature holds, whoever made it."""
    patch.setattr(PublicKey, "verifies", lambda self, signature, message: True)


def without_keys(patch: pytest.MonkeyPatch) -> None:
    """Any key is as good as an operator's with every role."""
    opened = envelope.open_envelope

    def anybody(signed: Envelope, kind: str, keys: Any) -> tuple[bytes, tuple[str, ...]]:
        try:
            return opened(signed, kind, keys)
        except Refused as refused:
            if refused.code is not Code.SIGNATURE_UNKNOWN_KEY or not isinstance(keys, dict):
                raise
            return envelope.payload_of(signed), tuple(keys)[:1]

    patch.setattr(envelope, "open_envelope", anybody)


def without_roles(patch: pytest.MonkeyPatch) -> None:
    """Whoever is known may do everything."""
    patch.setattr(Trust, "authorise", lambda self, keyids, role, workspace: ("somebody",))


class Thief(Host):
    """Signs as activation, and remembers every document that it was ever shown."""

    def __init__(self) -> None:
        super().__init__()
        #: A releaser, an approver, an author and nobody's friend, whom the trust document gives no other role.
        self.people = {name: SigningKey.generate() for name in ("rob", "eve", "max")}
        roles = {"rob": Role.RELEASER, "eve": Role.APPROVER, "max": Role.AUTHOR}
        self.people["ada"] = self.signers.operator
        document = msgspec.structs.replace(
            self.signers.document,
            operators=(
                *self.signers.document.operators,
                *(
                    Operator(n, self.people[n].public.text, {WORKSPACE: (role,), "lab": (role,)})
                    for n, role in roles.items()
                ),
            ),
        )
        self.signers.document, self.signers.trust = document, Trust(document)

    def rules(self, **rules: Any) -> None:
        """The workspace's rules from now on."""
        document = msgspec.structs.replace(
            self.signers.trust.document, workspaces={WORKSPACE: WorkspaceRules(**rules)}
        )
        self.signers.trust = Trust(document)

    def approval(self, entry: DesiredModule, by: str, **changes: Any) -> Envelope:
        """An approval of an entry's start, signed by one of the people."""
        start = hashlib.sha256(envelope.payload_of(entry.scope)).hexdigest()
        fields = self.signers.times() | {"rollout": entry.rollout, "start": start}
        return self.signers.command(RolloutApprove(**fields | changes), self.people[by])

    def promote(self, entry: DesiredModule) -> DesiredModule:
        """Have the host make this change; the way back from it."""
        came_from = self.own.promoted
        self.own = transitions.promote(
            transitions.begin_trial(transitions.accept(self.own, entry), entry.trial_s)
        )
        return msgspec.structs.replace(
            entry,
            running=came_from,
            expected=entry.running,
            generation=entry.generation + 1,
            returning=True,
        )

    def come_back(self, entry: DesiredModule) -> DesiredModule:
        """Have the host make this change and its way back; the same entry once more, as it could be asked for now."""
        back = self.promote(entry)
        if back.running is None:
            self.own = transitions.removed(transitions.accept(self.own, back))
        else:
            self.promote(back)
        return msgspec.structs.replace(entry, generation=back.generation + 1)


def without_owner(patch: pytest.MonkeyPatch) -> None:
    """Every module is one that the owner allows."""
    patch.setattr(Thief, "modules", property(lambda self: ("tiny",), lambda self, value: None), raising=False)


def without_clock_floor(patch: pytest.MonkeyPatch) -> None:
    """The host's own clock is all it goes by."""
    patch.setattr(scope, "_time", lambda now, *signed: now)


def without_claims(patch: pytest.MonkeyPatch) -> None:
    """Whoever claims an invitation is whom it was meant for."""

    def believed(signed: Envelope, invite: HostInvite) -> hostrecord.Claim:
        return msgspec.json.decode(envelope.payload_of(signed), type=hostrecord.Claim)

    patch.setattr(hostrecord, "open_claim", believed)


def without_kinds(patch: pytest.MonkeyPatch) -> None:
    """Any signed command is an abort."""
    patch.setattr(messages, "RolloutAbort", messages.Command)


Built = DesiredModule | DesiredState | Envelope


class Attack:
    """What the thief sends, and what happens then."""

    def __init__(
        self, build: Callable[[Thief], Built], code: Code, *removed: Removal, at: timedelta = timedelta()
    ) -> None:
        self.build, self.code, self.removed, self.at = build, code, removed, at

    def run(self, patch: pytest.MonkeyPatch) -> None:
        """Reach the target without the defence; fail with it."""
        thief = Thief()
        built = self.build(thief)
        if isinstance(built, DesiredModule):
            built = thief.document(built)
        signed = built if isinstance(built, Envelope) else thief.signers.sealed(built)
        with patch.context() as lenient, forgetful():
            for remove in self.removed:
                remove(lenient)
            reached, why = outcome(thief, signed, self.at)
            assert reached is Answer.CHANGE, f"the attack does not reach its target: {why}"
        before = thief.state, thief.own
        with forgetful():
            refused, why = outcome(thief, signed, self.at)
        assert why is not None, f"it is obeyed: {refused}"
        assert why.code == self.code
        assert why.reason
        assert (thief.state, thief.own) == before


def outcome(thief: Thief, signed: Envelope, at: timedelta = timedelta()) -> tuple[Answer, Refusal | None]:
    """The answer to a document's last entry, and why it is refused where it is. A refusal leaves the module as it was."""
    try:
        accepted = thief.check(signed, NOW + at)
    except Refused as refused:
        return Answer.REFUSED, refused.refusal
    checked = accepted.entries[-1]
    if checked.refusal is not None:
        after = transitions.reject(thief.own, checked.refusal, checked.entry)
        assert kept(after) == kept(thief.own)
    return checked.answer, checked.refusal


def kept(state: ModuleState) -> tuple[Any, ...]:
    """What a module is and was, as opposed to what was last said to it."""
    return (
        state.promoted, state.previous, state.previous_rollout, state.previous_scope, state.trial, state.quarantine,
        state.serial_floor, state.floor_policy, state.scope_at, state.signers,
    )  # fmt: skip


@contextmanager
def forgetful() -> Iterator[None]:
    """What was verified by one set of checks is not remembered by another."""
    remembered = (scope.record_of, scope._check_approved, scope._command)
    for one in remembered:
        one.cache_clear()
    try:
        yield
    finally:
        for one in remembered:
            one.cache_clear()


__all__ = [
    "NEW",
    "NOW",
    "OLD",
    "OTHER",
    "Attack",
    "Thief",
    "decide",
    "forgetful",
    "nothing",
    "outcome",
    "scope",
    "without",
    "without_claims",
    "without_clock_floor",
    "without_field",
    "without_keys",
    "without_kinds",
    "without_owner",
    "without_roles",
    "without_signatures",
]  # fmt: skip
