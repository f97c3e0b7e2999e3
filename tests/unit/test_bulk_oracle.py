"""The evaluator for many packets says what the plainest one says, over the whole language."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_firewall import anywhere, on_corners, plain_policies
from support_bulk import Bulk

from loopback.modules.firewall import oracle, policy


@given(plain_policies(), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, database=None)
def test_bulk_agrees_with_the_oracle(plain: dict[str, Any], seed: int) -> None:
    found = policy.parse(policy.to_json(plain))
    choose = random.Random(seed).choice
    made = [on_corners(rule, found, choose) for rule in found.rules for _ in range(4)]
    packets = [packet for packet in made if packet is not None] + [anywhere(choose) for _ in range(30)]
    index = {rule.name: number for number, rule in enumerate(found.rules)}
    judged = (oracle.judge(found, packet) for packet in packets)
    assert Bulk(found).judge(packets) == [(v, None if r is None else index[r]) for v, r in judged]
