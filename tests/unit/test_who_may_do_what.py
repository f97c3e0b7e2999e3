"""Every verb and every role: who may do what, written down a second time by hand."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import pytest

from loopback.contracts import messages, verbs
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.services._runtime import commands

KEY = SigningKey.from_raw(bytes(range(32)))
GOLDENS = Path(messages.__file__).parent / "goldens"
#: Besides admins.
MAY: Final = {
    "workspace.put": set(),
    "entitlement.put": set(),
    "host.put": set(),
    "host.invite": set(),
    "host.move": set(),
    "pool.put": {Role.BALANCER},
    "release.publish": {Role.RELEASER},
    "metadata.publish": set(),
    "rollout.start": {Role.RELEASER},
    "rollout.approve": {Role.APPROVER},
    "rollout.pause": {Role.RELEASER},
    "rollout.resume": {Role.RELEASER},
    "rollout.abort": {Role.RELEASER},
}


def trust(roles: dict[str, tuple[Role, ...]]) -> Trust:
    return Trust(
        TrustDocument(version=1, operators=(Operator("ann", KEY.public.text, roles, ("pool",)),), services={})
    )


def command(kind: str, workspace: str) -> Any:
    found = messages.decode_command((GOLDENS / f"{kind}.json").read_bytes())
    at = datetime(2026, 11, 25, tzinfo=UTC)
    return msgspec.structs.replace(
        found, workspace=workspace, issued_at=at, expires_at=at + timedelta(hours=1)
    )


def allowed(kind: str, roles: dict[str, tuple[Role, ...]], workspace: str = "prod") -> bool:
    try:
        found = commands.authorised(trust(roles), (KEY.keyid,), command(kind, workspace))
    except Refused as refused:
        assert refused.code is Code.COMMAND_UNAUTHORISED
        assert refused.next_step
        return False
    assert found == ("ann",)
    return True


@pytest.mark.parametrize(("kind", "role"), list(itertools.product(MAY, Role)))
def test_a_role_may_do_exactly_what_is_written(kind: str, role: Role) -> None:
    may = role is Role.ADMIN or role in MAY[kind]
    assert allowed(kind, {"prod": (role,)}) is may
    assert allowed(kind, {"*": (role,)}) is may
    assert not allowed(kind, {"lab": (role,)}), "a role elsewhere is none here"
    assert not allowed(kind, {"prod": tuple(set(Role) - {role, Role.ADMIN} - MAY[kind])})


@pytest.mark.parametrize("kind", MAY)
def test_nobody_without_a_role_may_do_anything(kind: str) -> None:
    assert not allowed(kind, {})
    with pytest.raises(Refused):
        commands.authorised(trust({"*": (Role.ADMIN,)}), ("f" * 64,), command(kind, "prod"))


def test_every_command_is_in_the_table() -> None:
    assert set(verbs.VERBS) == set(get_args(messages.AnyCommand))
    assert {verbs.kind(c) for c in verbs.VERBS} == set(MAY)


def test_the_manual_shows_the_table() -> None:
    manual = Path(__file__).parents[2] / "docs" / "operate.md"
    assert verbs.table() in manual.read_text()
