"""The second signature: whose counts, and under what."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from activation_world import T0, start_command

from loopback.contracts import approvals, envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import RolloutApprove, RolloutPause
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument

ADA, ADA_TOO, BEN, CYD, VERA, STRANGER = (SigningKey.from_raw(bytes([n]) * 32) for n in range(1, 7))
TRUST = Trust(
    TrustDocument(
        version=1,
        operators=(
            Operator("ada", ADA.public.text, {"prod": (Role.RELEASER, Role.APPROVER)}),
            Operator("ada", ADA_TOO.public.text, {"prod": (Role.APPROVER,)}),
            Operator("ben", BEN.public.text, {"prod": (Role.APPROVER,), "lab": (Role.RELEASER,)}),
            Operator("cyd", CYD.public.text, {"*": (Role.ADMIN,)}),
            Operator("vera", VERA.public.text, {"prod": (Role.VIEWER, Role.RELEASER, Role.AUTHOR)}),
        ),
        services={},
    )
)
START = start_command("r1", T0)
PAYLOAD = msgspec.json.encode(START)


def started(*keys: SigningKey) -> approvals.Start:
    return approvals.start_of(
        envelope.seal(envelope.COMMAND, PAYLOAD, *(keys or (ADA,))), "prod", "r1", TRUST
    )


def approval(*keys: SigningKey, kind: str = envelope.COMMAND, **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "id": "a1",
        "workspace": "prod",
        "issued_at": T0,
        "expires_at": T0,
        "rollout": "r1",
        "start": hashlib.sha256(PAYLOAD).hexdigest(),
    }
    return envelope.seal(kind, msgspec.json.encode(RolloutApprove(**fields | changes)), *(keys or (BEN,)))


def code_of(found: Envelope, start: approvals.Start) -> Code:
    with pytest.raises(Refused) as refused:
        approvals.check(found, start, TRUST)
    return refused.value.code


def test_another_operator_with_the_role_approves() -> None:
    assert approvals.check(approval(BEN), started(ADA), TRUST) == ("ben",)


def test_an_admin_may_approve_what_somebody_else_started() -> None:
    assert approvals.check(approval(CYD), started(ADA), TRUST) == ("cyd",)
    assert code_of(approval(CYD), started(CYD)) is Code.ROLLOUT_UNAPPROVED


def test_nobody_approves_their_own_start_also_not_with_a_second_key() -> None:
    assert code_of(approval(ADA), started(ADA)) is Code.ROLLOUT_UNAPPROVED
    assert code_of(approval(ADA_TOO), started(ADA)) is Code.ROLLOUT_UNAPPROVED
    assert code_of(approval(ADA, ADA_TOO), started(ADA)) is Code.ROLLOUT_UNAPPROVED


def test_two_signatures_under_a_start_are_no_approval_and_a_third_operator_gives_one() -> None:
    both = started(ADA, BEN)
    assert both.signers == {"ada", "ben"}
    assert code_of(approval(BEN), both) is Code.ROLLOUT_UNAPPROVED
    assert approvals.check(approval(CYD), both, TRUST) == ("cyd",)


def test_of_several_signers_one_other_approver_is_enough() -> None:
    assert approvals.check(approval(ADA, BEN), started(ADA), TRUST) == ("ben",)


def test_another_role_does_not_approve_and_a_stranger_even_less() -> None:
    assert code_of(approval(VERA), started(ADA)) is Code.COMMAND_UNAUTHORISED
    assert code_of(approval(STRANGER), started(ADA)) is Code.SIGNATURE_UNKNOWN_KEY


def test_an_approval_of_something_else_does_not_count() -> None:
    other = hashlib.sha256(msgspec.json.encode(start_command("r1", T0, version="1.1.0"))).hexdigest()
    assert code_of(approval(start=other), started()) is Code.ROLLOUT_UNAPPROVED
    assert code_of(approval(rollout="r2"), started()) is Code.ROLLOUT_UNAPPROVED
    assert code_of(approval(workspace="lab"), started()) is Code.ROLLOUT_UNAPPROVED
    assert code_of(approval(kind=envelope.POLICY), started()) is Code.ENVELOPE_TYPE
    pause = RolloutPause(id="p", workspace="prod", issued_at=T0, expires_at=T0, rollout="r1")
    assert code_of(envelope.seal(envelope.COMMAND, msgspec.json.encode(pause), BEN), started()) is (
        Code.ROLLOUT_UNAPPROVED
    )


def test_the_digest_is_that_of_the_payload_whoever_signed_it() -> None:
    assert started(ADA).digest == started(VERA).digest == hashlib.sha256(PAYLOAD).hexdigest()


def test_of_several_approvals_one_that_counts_is_enough_and_none_says_why() -> None:
    assert approvals.approvers([approval(ADA), approval(BEN)], started(), TRUST) == ("ben",)
    with pytest.raises(Refused) as refused:
        approvals.approvers([], started(), TRUST)
    assert refused.value.code is Code.ROLLOUT_UNAPPROVED
    assert "loopback rollout approve r1" in refused.value.next_step
    with pytest.raises(Refused, match="signed the start too"):
        approvals.approvers([approval(VERA), approval(ADA)], started(), TRUST)


def test_a_flood_of_approvals_is_not_worked_through() -> None:
    flood = [approval(ADA)] * approvals.MAX_APPROVALS
    with pytest.raises(Refused) as refused:
        approvals.approvers([*flood, approval(BEN)], started(), TRUST)
    assert refused.value.code is Code.ROLLOUT_UNAPPROVED
