"""One memory serves policy after policy: whatever changed between them, the slot is what a first compile would give."""

from __future__ import annotations

import random

import pytest
from support_slot import compiled, policy_of, rule

from loopback.modules.firewall.compile import Memory
from loopback.modules.firewall.model import Action, Direction, PortRange, Prefix, Rule

ROUNDS = 30


def made(chance: random.Random, number: int) -> Rule:
    """A rule of a few fields: many with prefixes shorter than a byte, some with conditions or a set of its own."""

    def prefixes() -> tuple[Prefix, ...]:
        length = chance.choice([0, 1, 2, 5, 7, 8, 9, 15, 16, 24, 32])
        if chance.random() < 0.05:
            return tuple(Prefix(4, n << 9 | chance.getrandbits(3) << 24, 24) for n in range(70))
        return (Prefix(4, chance.getrandbits(32) >> 32 - length << 32 - length, length),)

    protocol = chance.choice([6, 17, 1, 47])
    port = chance.choice([22, 80, 1024])
    return rule(
        f"r{number}",
        direction=chance.choice([Direction.INGRESS, Direction.INGRESS, Direction.EGRESS]),
        action=chance.choice([Action.ACCEPT, Action.DROP]),
        sources=prefixes() if chance.random() < 0.8 else (),
        destinations=prefixes() if chance.random() < 0.5 else (),
        protocols=(protocol,) if chance.random() < 0.7 else (),
        ports=(PortRange(port, chance.choice([port, 2048])),) if protocol in (6, 17) and chance.random() < 0.4 else (),
        states=frozenset({"new"}) if chance.random() < 0.1 else frozenset(),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_after_any_change_the_slot_is_what_a_first_compile_gives(seed: int) -> None:
    chance = random.Random(seed)
    rules = [made(chance, n) for n in range(120)]
    memory = Memory()
    for number in range(120, 120 + ROUNDS):
        change = chance.choice(["replace", "replace", "insert", "remove", "swap", "nothing"])
        at, other = chance.randrange(len(rules)), chance.randrange(len(rules))
        if change == "replace":
            rules[at] = made(chance, number)
        elif change == "insert":
            rules.insert(at, made(chance, number))
        elif change == "remove":
            del rules[at]
        elif change == "swap":
            rules[at], rules[other] = rules[other], rules[at]
        policy = policy_of(*rules)
        assert compiled(policy, memory).slot == compiled(policy).slot, change
