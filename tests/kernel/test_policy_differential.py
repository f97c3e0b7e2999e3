"""Judges that share no code give one verdict: the plain evaluator, the real program, and nftables in a namespace.

Policies are made by hypothesis; packets lie on the corners of their rules, and anywhere in the pools that rules draw from.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies_firewall import anywhere, on_corners, plain_policies
from support_nft import NftJudge

from loopback.modules.firewall import oracle, policy
from loopback.modules.firewall.model import Action, FirewallPolicy, Packet

pytestmark = pytest.mark.kernel

POLICIES = 80
RANDOM_PACKETS = 40
CORNER_PACKETS = 8  # for each rule
AT_LEAST = 4000  # packets that a run must have compared


@pytest.fixture(scope="module")
def nft() -> Iterator[NftJudge]:
    judge = NftJudge()
    yield judge
    judge.close()


def probes(found: FirewallPolicy, seed: int, *, stateful: bool) -> list[Packet]:
    choose = random.Random(seed).choice
    corners = [on_corners(rule, found, choose) for rule in found.rules for _ in range(CORNER_PACKETS)]
    made = [anywhere(choose, stateful=stateful) for _ in range(RANDOM_PACKETS)]
    return [probe for probe in corners if probe is not None] + made


def expected(found: FirewallPolicy, packets: Sequence[Packet]) -> list[tuple[Action, int | None]]:
    index = {rule.name: number for number, rule in enumerate(found.rules)}
    judged = (oracle.judge(found, packet) for packet in packets)
    return [(action, None if name is None else index[name]) for action, name in judged]


def differences(
    packets: Sequence[Packet], one: Sequence[Any], two: Sequence[Any]
) -> list[tuple[Packet, Any, Any]]:
    return [(packet, a, b) for packet, a, b in zip(packets, one, two, strict=True) if a != b]


def test_nftables_agrees_with_the_oracle_on_verdict_and_rule(nft: NftJudge) -> None:
    compared = 0

    @given(plain_policies(stateful=False), st.integers(0, 2**32))
    @settings(
        max_examples=POLICIES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    def compare(plain: dict[str, Any], seed: int) -> None:
        nonlocal compared
        found = policy.parse(policy.to_json(plain))
        packets = probes(found, seed, stateful=False)
        nft.load(found)
        assert differences(packets, nft.judge(packets), expected(found, packets)) == []
        compared += len(packets)

    compare()
    assert compared >= AT_LEAST
