"""Pools: who may speak for one, and that an older word is none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import PoolPut, Record
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.services.eligibility import decide

NOW = datetime(2026, 11, 26, tzinfo=UTC)
KEY = SigningKey.from_raw(bytes(range(32)))


def pool(**changed: object) -> PoolPut:
    known = {
        "id": "c1", "workspace": "prod", "issued_at": NOW, "expires_at": NOW + timedelta(hours=1),
        "pool": "shop", "serial": 1, "addresses": ("10.0.0.1",),
    }  # fmt: skip
    return PoolPut(**{**known, **changed})


def record(command: PoolPut) -> Record:
    sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), KEY)
    return Record(kind="pool", name=command.pool, workspace="prod", envelope=sealed, at=NOW, sequence=1)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"pool": "a b"}, "a b"),
        ({"serial": 0}, "serial"),
        ({"serial": 2**53}, "serial"),
        ({"addresses": ("10.0.0.300",)}, "10.0.0.300"),
        ({"addresses": ("10.0.0.1/8",)}, "host bits"),
        ({"addresses": ("10.0.0.1",) * 4097}, "4097"),
        ({"absent": True}, "taken away"),
    ],
)
def test_a_pool_that_could_not_be_used_is_refused_naming_the_field(
    changed: dict[str, object], word: str
) -> None:
    with pytest.raises(Refused) as caught:
        decide.check_pool(pool(**changed))
    assert caught.value.code is Code.COMMAND_MALFORMED and word in caught.value.reason


def test_both_families_prefixes_and_an_empty_pool_are_fine() -> None:
    decide.check_pool(pool(addresses=("10.0.0.1", "10.1.0.0/16", "2001:db8::7", "2001:db8::/64")))
    decide.check_pool(pool(addresses=()))
    decide.check_pool(pool(addresses=(), absent=True))


@given(st.integers(1, 2**53 - 1), st.integers(1, 2**53 - 1))
def test_only_a_higher_serial_is_news(before: int, after: int) -> None:
    try:
        decide.check_serial(pool(serial=after), record(pool(serial=before)))
    except Refused as refused:
        assert after <= before and refused.code is Code.POOL_SERIAL and str(before + 1) in refused.next_step
    else:
        assert after > before


@pytest.mark.parametrize(
    ("roles", "pools", "may"),
    [
        ({"prod": (Role.BALANCER,)}, ("shop",), True),
        ({"*": (Role.BALANCER,)}, ("blog", "shop"), True),
        ({"prod": (Role.BALANCER,)}, ("*",), True),
        ({"prod": (Role.ADMIN,)}, (), True),
        ({"prod": (Role.BALANCER,)}, (), False),
        ({"prod": (Role.BALANCER,)}, ("blog",), False),
        ({"lab": (Role.BALANCER,)}, ("shop",), False),
        ({"prod": (Role.BALANCER,), "lab": (Role.ADMIN,)}, ("blog",), False),
        ({"prod": (Role.RELEASER, Role.AUTHOR)}, ("shop",), False),
    ],
)
def test_a_balancer_speaks_for_its_own_pools_and_for_nothing_else(
    roles: dict[str, tuple[Role, ...]], pools: tuple[str, ...], may: bool
) -> None:
    trust = Trust(
        TrustDocument(version=1, operators=(Operator("lb", KEY.public.text, roles, pools),), services={})
    )
    if may:
        assert trust.authorise_pool((KEY.keyid,), "shop", "prod") == ("lb",)
    else:
        with pytest.raises(Refused) as caught:
            trust.authorise_pool((KEY.keyid,), "shop", "prod")
        assert caught.value.code is Code.COMMAND_UNAUTHORISED and caught.value.next_step


def test_an_operator_without_pools_is_written_as_agents_of_before_read_it() -> None:
    assert b"pools" not in msgspec.json.encode(Operator("ann", KEY.public.text, {}))
