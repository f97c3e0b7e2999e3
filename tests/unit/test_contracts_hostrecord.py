"""Who a host is: by an operator's word alone, by an invitation that it took, or by a move."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from loopback.contracts import envelope, hostrecord
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Command, HostInvite, HostMove, HostPut, RolloutPause
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument

AT = datetime(2026, 11, 25, 12, tzinfo=UTC)
ADMIN, TOKEN, HOST, THIEF = (SigningKey.from_raw(bytes([n]) * 32) for n in range(1, 5))


def fields(workspace: str = "prod") -> dict[str, Any]:
    return {"id": "i-1", "workspace": workspace, "issued_at": AT, "expires_at": AT + timedelta(hours=1)}


def trust(**roles: tuple[Role, ...]) -> Trust:
    found = roles or {"prod": (Role.ADMIN,)}
    return Trust(
        TrustDocument(version=1, operators=(Operator("ada", ADMIN.public.text, dict(found)),), services={})
    )


def sealed(command: Command) -> Envelope:
    return envelope.seal(envelope.COMMAND, msgspec.json.encode(command), ADMIN)


INVITE = HostInvite(
    **fields(),
    host="web-1",
    claim_key=TOKEN.public.text,
    claim_before=AT + timedelta(days=1),
    labels={"role": "web"},
)


def test_a_record_that_names_the_key_is_taken_as_it_is() -> None:
    put = HostPut(**fields(), host="web-1", public_key=HOST.public.text, labels={"role": "web"})
    found = hostrecord.verify(sealed(put), None, "prod", trust())
    assert (found.public_key, found.labels, found.absent) == (HOST.public.text, {"role": "web"}, False)


def test_an_invitation_names_the_key_that_its_claim_names() -> None:
    claim = hostrecord.claim(INVITE, TOKEN, HOST, AT)
    found = hostrecord.verify(sealed(INVITE), claim, "prod", trust())
    assert (found.public_key, found.labels, found.absent) == (HOST.public.text, {"role": "web"}, False)


def test_an_invitation_that_nobody_took_is_no_host() -> None:
    assert hostrecord.verify(sealed(INVITE), None, "prod", trust()).absent


def test_a_service_that_never_had_the_token_cannot_put_another_key_in_its_place() -> None:
    forged = hostrecord.claim(INVITE, THIEF, THIEF, AT)
    with pytest.raises(Refused) as caught:
        hostrecord.verify(sealed(INVITE), forged, "prod", trust())
    assert caught.value.code is Code.IDENTITY_CLAIM


def test_a_claim_that_the_host_did_not_sign_itself_does_not_hold() -> None:
    honest = hostrecord.claim(INVITE, TOKEN, HOST, AT)
    only_token = msgspec.structs.replace(
        honest, signatures=tuple(s for s in honest.signatures if s.keyid == TOKEN.keyid)
    )
    with pytest.raises(Refused) as caught:
        hostrecord.verify(sealed(INVITE), only_token, "prod", trust())
    assert caught.value.code is Code.IDENTITY_CLAIM


def test_the_token_is_no_host_key() -> None:
    with pytest.raises(Refused) as caught:
        hostrecord.open_claim(hostrecord.claim(INVITE, TOKEN, TOKEN, AT), INVITE)
    assert caught.value.code is Code.IDENTITY_CLAIM


@pytest.mark.parametrize("change", [{"id": "i-2"}, {"host": "web-2"}, {"workspace": "lab"}])
def test_a_claim_to_one_invitation_is_none_to_another(change: dict[str, str]) -> None:
    other = msgspec.structs.replace(INVITE, **change)
    with pytest.raises(Refused) as caught:
        hostrecord.open_claim(hostrecord.claim(INVITE, TOKEN, HOST, AT), other)
    assert caught.value.code is Code.IDENTITY_CLAIM


def test_a_move_takes_the_host_out_of_one_workspace_and_into_the_other() -> None:
    move = HostMove(**fields(), host="web-1", public_key=HOST.public.text, to="lab", labels={"role": "db"})
    both = trust(prod=(Role.ADMIN,), lab=(Role.ADMIN,))
    assert hostrecord.verify(sealed(move), None, "prod", both).absent
    there = hostrecord.verify(sealed(move), None, "lab", both)
    assert (there.workspace, there.public_key, there.labels, there.absent) == (
        "lab",
        HOST.public.text,
        {"role": "db"},
        False,
    )


@pytest.mark.parametrize("only", ["prod", "lab"])
@pytest.mark.parametrize("place", ["prod", "lab"])
def test_an_admin_of_only_one_of_the_two_moves_nobody(only: str, place: str) -> None:
    move = HostMove(**fields(), host="web-1", public_key=HOST.public.text, to="lab")
    with pytest.raises(Refused) as caught:
        hostrecord.verify(sealed(move), None, place, trust(**{only: (Role.ADMIN,)}))
    assert caught.value.code is Code.COMMAND_UNAUTHORISED


def test_a_record_of_another_workspace_or_another_command_is_none() -> None:
    for command in (HostPut(**fields("lab"), host="web-1", public_key=HOST.public.text), INVITE):
        with pytest.raises(Refused) as caught:
            hostrecord.read(command, None, "third")
        assert caught.value.code is Code.SCOPE_VIOLATION
    with pytest.raises(Refused) as caught:
        hostrecord.read(RolloutPause(**fields(), rollout="r"), None, "prod")
    assert caught.value.code is Code.SCOPE_VIOLATION


def test_who_may_not_may_not() -> None:
    with pytest.raises(Refused) as caught:
        hostrecord.verify(sealed(INVITE), None, "prod", trust(prod=(Role.RELEASER,)))
    assert caught.value.code is Code.COMMAND_UNAUTHORISED
