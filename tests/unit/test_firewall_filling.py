"""Sets that others fill: bounds hold for any content, and a set is taken whole or not at all."""

from __future__ import annotations

import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts.abi import Filled
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.filling import filled, lent
from loopback.modules.firewall.model import FirewallPolicy, Prefix

WITHIN = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "192.0.2.128/25", "fd00::/16")]
ADDRESSES = st.one_of(
    st.integers(0x0A000000 - 2, 0x0A000002).map(lambda n: str(ipaddress.ip_address(n))),
    st.integers(0xC000027E, 0xC0000282).map(lambda n: str(ipaddress.ip_address(n))),
    st.sampled_from(
        ["fd00::1", "fd01::1", "10.0.0.0/7", "10.0.0.0/8", "10.4.0.0/16", "192.0.2.0/24", "::/0"]
    ),
)


def policy(most: int = 5, **more: object) -> FirewallPolicy:
    web = {"labels": {"role": "web"}, "within": [str(w) for w in WITHIN], "max": most, **more}
    document = {"version": 1, "default": {"ingress": "drop", "egress": "accept"}, "sets": {"web": web}}
    return policies.parse(json.dumps(document).encode(), "policy.json")


def web(*addresses: str) -> dict[str, Filled]:
    return {"web": Filled(labels={"role": "web"}, addresses=list(addresses))}


def inside(text: str) -> bool:
    network = ipaddress.ip_network(text, strict=False)
    return any(
        network.version == outer.version and network.subnet_of(outer)  # type: ignore[arg-type]
        for outer in WITHIN
    )


@given(st.lists(ADDRESSES, max_size=8))
def test_what_is_taken_lies_within_and_is_no_more_than_max(addresses: list[str]) -> None:
    distinct = {ipaddress.ip_network(text, strict=False) for text in addresses}
    try:
        found = filled(policy(), web(*addresses))
    except Refused as refused:
        beyond = not all(map(inside, addresses))
        assert refused.code is (Code.SET_OUTSIDE if beyond else Code.SET_TOO_LARGE)
        assert beyond or len(distinct) > 5
        assert refused.next_step
    else:
        assert all(map(inside, addresses)) and len(found.sets["web"]) == len(distinct) <= 5


def test_its_own_prefixes_are_always_in_it_and_count() -> None:
    base = policy(2, prefixes=["10.0.0.1"])
    assert set(filled(base, web()).sets["web"]) == {Prefix(4, 0x0A000001, 32)}
    assert len(filled(base, web("10.0.0.2")).sets["web"]) == 2
    with pytest.raises(Refused, match="more than its 'max'"):
        filled(base, web("10.0.0.2", "10.0.0.3"))
    assert len(filled(base, {}).sets["web"]) == 1, (
        "signed when nothing filled sets: its own are what was meant"
    )


def test_refilled_it_forgets_what_was_in_it() -> None:
    once = filled(policy(), web("10.0.0.1"))
    assert set(filled(once, web("10.0.0.2")).sets["web"]) == {Prefix(4, 0x0A000002, 32)}


def test_for_a_comparison_a_new_policy_has_the_sets_of_the_one_in_force() -> None:
    now = filled(policy(), web("10.0.0.1"))
    new = policy(9)
    assert not len(lent(new, None).sets["web"])
    assert set(lent(new, now).sets["web"]) == {Prefix(4, 0x0A000001, 32)}
    other = policy(labels={"role": "db"})
    assert not len(lent(other, now).sets["web"]), "of another source it knows nothing"
