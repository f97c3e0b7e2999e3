"""Judges that share no code give one verdict: the plain evaluator, the real program, and nftables in a namespace.

Policies are made by hypothesis; packets lie on the corners of their rules, and anywhere in the pools that rules draw from.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies_firewall import anywhere, on_corners, plain_policies
from support_nft import NftJudge

from loopback.cli.firewall_judge import Kind, object_file, open_judge
from loopback.modules.firewall import oracle, policy
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Packet

pytestmark = pytest.mark.kernel

POLICIES = 120
RANDOM_PACKETS = 40
CORNER_PACKETS = 8  # for each rule
AT_LEAST = 4000  # packets that a run must have compared


#: A set that holds nothing must never be taken for "any": too rare a corner to be left to chance.
EMPTY = {
    "version": 1,
    "default": {"ingress": "drop", "egress": "drop"},
    "sets": {"empty": [], "office": ["10.0.0.0/8"]},
    "rules": [
        {"name": "from-nobody", "from": "@empty", "action": "accept"},
        {"name": "to-nobody", "direction": "egress", "to": "@empty", "action": "accept"},
        {"name": "from-office", "from": ["@empty", "@office"], "action": "accept"},
    ],
}


@pytest.fixture(scope="module")
def nft() -> Iterator[NftJudge]:
    judge = NftJudge()
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def program() -> Iterator[Datapath]:
    """A private firewall: its programs are loaded, and attached to nothing."""
    datapath = Datapath(object_file(), flows=64)
    yield datapath
    datapath.close()


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
    @example(plain=EMPTY, seed=1)
    def compare(plain: dict[str, Any], seed: int) -> None:
        nonlocal compared
        found = policy.parse(policy.to_json(plain))
        packets = probes(found, seed, stateful=False)
        nft.load(found)
        assert differences(packets, nft.judge(packets), expected(found, packets)) == []
        compared += len(packets)

    compare()
    assert compared >= AT_LEAST


def test_the_real_program_agrees_with_the_oracle_on_verdict_and_rule(program: Datapath) -> None:
    compared = 0

    @given(plain_policies(), st.integers(0, 2**32))
    @settings(
        max_examples=POLICIES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @example(plain=EMPTY, seed=1)
    def compare(plain: dict[str, Any], seed: int) -> None:
        nonlocal compared
        found = policy.parse(policy.to_json(plain))
        packets = probes(found, seed, stateful=True)
        index = {rule.name: number for number, rule in enumerate(found.rules)}
        program.stage(found)
        verdicts = program.explain(packets)
        said = [(v.action, None if v.rule is None else index[v.rule]) for v in verdicts]
        assert differences(packets, said, expected(found, packets)) == []
        compared += len(packets)

    compare()
    assert compared >= AT_LEAST


def test_check_and_explain_ask_the_real_program_where_they_can() -> None:
    found = policy.parse(policy.to_json({"version": 1, "default": {"ingress": "drop", "egress": "accept"}}))
    with open_judge(found, Kind.AUTO) as judge:
        assert (judge.name, judge.why) == ("the kernel's program", "")
        (verdict,) = judge.judge(
            [Packet(direction=Direction.EGRESS, src="10.0.0.1", dst="10.0.0.2", protocol=6)]
        )
    assert verdict == (Action.ACCEPT, None, verdict.generation)
    assert verdict.generation > 0
