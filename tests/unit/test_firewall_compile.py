"""The compiler: the bytes of a slot, read as classify.h reads them, give the oracle's verdicts, and are always the same."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rulegen
import rulesets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies_firewall import INTERFACES, PORTS, V4, V6, anywhere, on_corners, packets, plain_policies
from support_slot import DIGEST, Reader, agree, compiled, policy_of, rule

from loopback.bpf import layout
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.compile import DEFAULT_SAMPLE, Memory, assign, compile_policy, foresee
from loopback.modules.firewall.model import (
    Action,
    Direction,
    FirewallPolicy,
    Limit,
    Packet,
    PortRange,
    Prefix,
    Rule,
)
from loopback.modules.firewall.policy import parse, to_json

RELAXED = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ROOT = Path(__file__).resolve().parents[2]


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def corners(policy: FirewallPolicy, chance: random.Random, times: int = 1) -> list[Packet]:
    found = [on_corners(one, policy, chance.choice) for one in policy.rules for _ in range(times)]
    return [packet for packet in found if packet]


def all_agree(policy: FirewallPolicy, some: list[Packet]) -> None:
    reader = Reader(compiled(policy))
    for packet in some:
        agree(policy, reader, packet)
        agree(policy, reader, msgspec.structs.replace(packet, icmp_code=packet.icmp_code ^ 1))


@RELAXED
@given(
    plain_policies(most=60), st.lists(packets(), min_size=1, max_size=15), st.randoms(use_true_random=False)
)
def test_a_slot_gives_the_oracles_verdicts(plain: Any, some: list[Packet], chance: random.Random) -> None:
    policy = parse(to_json(plain), "policy.json")
    all_agree(policy, [*some, *corners(policy, chance)])


LARGE4 = tuple(Prefix(4, 10 << 24 | n << 9, 24) for n in range(70))
LARGE6 = tuple(Prefix(6, 0x20010DB8 << 96 | n << 66, 64) for n in range(70))


@st.composite
def whole_rules(draw: st.DrawFn, index: int) -> Rule:
    """A rule over every field of the language, of both families, whether or not that makes sense."""
    ranges = st.lists(st.sampled_from(PORTS).map(fields.port), unique=True, max_size=10).map(tuple)
    pool = st.lists(st.sampled_from(V4 + V6).map(fields.prefix), unique=True, max_size=4).map(tuple)
    addresses = st.one_of(pool, pool, st.sampled_from([LARGE4, LARGE4 + LARGE6]))
    named = st.lists(
        st.sampled_from(["empty", "mixed", "web", "large", "huge"]), unique=True, max_size=2
    ).map(tuple)
    types = st.tuples(st.sampled_from([0, 3, 8, 128, 133]), st.sampled_from([None, 0, 1, 3, 4]))
    kind = draw(st.sampled_from(["any", "ports", "protocols", "icmp"]))
    numbers = st.lists(st.sampled_from([1, 6, 17, 47, 50, 58, 89, 132]), unique=True).map(tuple)
    protocols: tuple[int, ...] = ()
    if kind == "ports":
        protocols = draw(st.sampled_from([(), (6,), (6, 17), (6, 47)]))
    elif kind == "protocols":
        protocols = draw(numbers)
    elif kind == "icmp":
        protocols = draw(st.sampled_from([(), (1,), (58,), (1, 6), (1, 58), (6,)]))
    return Rule(
        name=f"rule-{index}",
        direction=draw(st.sampled_from(Direction)),
        action=draw(st.sampled_from(Action)),
        sources=draw(addresses),
        destinations=draw(addresses),
        source_sets=draw(named),
        destination_sets=draw(named),
        protocols=protocols,
        ports=draw(ranges) if kind == "ports" else (),
        source_ports=draw(ranges) if kind == "ports" else (),
        icmp=draw(st.lists(types, max_size=9).map(tuple)) if kind == "icmp" else (),
        states=draw(st.frozensets(st.sampled_from(fields.STATES))) if draw(st.booleans()) else frozenset(),
        interfaces=tuple(draw(st.lists(st.sampled_from(INTERFACES), max_size=3))),
        log_sample=draw(st.sampled_from([0, 0, 7])),
        limit=draw(st.sampled_from([None, None, Limit(rate=4.0, burst=3, per="source")])),
    )


@st.composite
def whole_policies(draw: st.DrawFn, most: int = 6) -> FirewallPolicy:
    some = st.lists(st.sampled_from(V4 + V6).map(fields.prefix), max_size=5).map(tuple)
    return FirewallPolicy(
        default={side: draw(st.sampled_from(Action)) for side in Direction},
        sets={
            "empty": (),
            "mixed": draw(some),
            "web": draw(some),
            "large": LARGE4,
            "huge": LARGE6 + LARGE4[::2],
        },
        rules=tuple(draw(whole_rules(at)) for at in range(draw(st.integers(1, most)))),
    )


@RELAXED
@given(
    whole_policies(),
    st.lists(packets(), min_size=1, max_size=15),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_rules_over_every_field_stay_exactly_themselves(
    policy: FirewallPolicy, some: list[Packet], chance: random.Random, linear: bool
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        if not linear:  # even the shortest policy is a tuple space
            patched.setattr("loopback.modules.firewall.classifier.LINEAR", 0)
        all_agree(policy, [*some, *corners(policy, chance, 3)])


def seeded_policy(seed: int, count: int) -> FirewallPolicy:
    """So many rules over every field, with addresses and ports that lie in and on each other."""
    chance = random.Random(seed)

    def prefix(family: int) -> Prefix:
        width = 32 if family == 4 else 128
        usual = [15, 16, 17, 22, 24, 28, 31, 32] if family == 4 else [32, 47, 48, 56, 64, 127, 128]
        length = chance.choice(usual) if chance.random() < 0.97 else chance.choice([0, 8])
        base, place = (10 << 24, 14) if family == 4 else (0x20010DB8 << 96, 70)
        address = base | chance.getrandbits(10) << place | chance.getrandbits(2)
        return Prefix(family, address >> (width - length) << (width - length), length)  # type: ignore[arg-type]

    def several(family: int, most: int) -> tuple[Prefix, ...]:
        return tuple(dict.fromkeys(prefix(family) for _ in range(chance.choice([0] + [1] * 14 + [most]))))

    def ports() -> tuple[PortRange, ...]:
        lows = sorted(chance.choices([0, 22, 53, 80, 443, 1024, 8000, 65535], k=chance.choice([1, 1, 1, 3])))
        return tuple(
            PortRange(low, min(65535, low + chance.choice([0, 0, 0, 1, 100, 60000]))) for low in lows
        )

    rules = []
    for number in range(count):
        family = chance.choice([4, 4, 6])
        kind = chance.choice(["ports", "ports", "any", "other", "icmp"])
        rules.append(
            rule(
                f"r{number}",
                direction=chance.choice([Direction.INGRESS, Direction.INGRESS, Direction.EGRESS]),
                action=chance.choice(list(Action)),
                sources=several(family, 3),
                destinations=several(family, 2),
                source_sets=chance.choice([()] * 20 + [("small",), ("large",)]),
                destination_sets=chance.choice([()] * 20 + [("large",)]),
                protocols={"ports": chance.choice([(6,), (17,), (6, 17)]), "any": (), "other": (47,)}.get(
                    kind, (1,) if family == 4 else (58,)
                ),
                ports=ports() if kind == "ports" else (),
                source_ports=ports() if kind == "ports" and chance.random() < 0.2 else (),
                icmp=((chance.choice([3, 8, 128]), chance.choice([None, 0, 4])),) if kind == "icmp" else (),
                states=frozenset(chance.sample(fields.STATES, 2)) if chance.random() < 0.1 else frozenset(),
                interfaces=(chance.choice(INTERFACES),) if chance.random() < 0.1 else (),
            )
        )  # fmt: skip
    # as people write them, the broad ones last: else few others would ever be met
    rules.sort(key=lambda r: min((p.length for p in (*r.sources, *r.destinations)), default=0) < 16)
    return policy_of(*rules, sets={"small": (LARGE4[3], LARGE6[3]), "large": LARGE4 + LARGE6})


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_thousands_of_rules_over_every_field_stay_exactly_themselves(seed: int) -> None:
    policy = seeded_policy(seed, 2000)
    reader, chance = Reader(compiled(policy)), random.Random(seed)
    assert reader.tuples(0, 4) and reader.tuples(0, 6) and reader.tuples(1, 4)
    some = [on_corners(chance.choice(policy.rules), policy, chance.choice) for _ in range(250)]
    met = {agree(policy, reader, packet).order for packet in [*filter(None, some), anywhere(chance.choice)]}
    assert len(met) > 40, "the packets meet too few rules to say anything"


@pytest.mark.parametrize(("set_family", "family"), [("acl1", 4), ("fw1", 4), ("ipc1", 4), ("fw1", 6)])
def test_generated_policies_like_the_published_ones_stay_exactly_themselves(
    set_family: Any, family: Any
) -> None:
    policy = rulesets.policy(rulegen.generate(set_family, 2000, seed=5, family=family))
    reader, chance = Reader(compiled(policy)), random.Random(7)
    some = [on_corners(chance.choice(policy.rules), policy, chance.choice) for _ in range(200)]
    met = {agree(policy, reader, packet).order for packet in filter(None, some)}
    assert len(met) > 40


def test_packets_anywhere_get_the_default_of_an_empty_policy() -> None:
    policy = policy_of(default={Direction.INGRESS: Action.DROP, Direction.EGRESS: Action.ACCEPT})
    chance = random.Random(1)
    all_agree(policy, [anywhere(chance.choice) for _ in range(50)])


# ── the same bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────
@RELAXED
@given(plain_policies())
def test_compiling_twice_gives_the_same_bytes(plain: Any) -> None:
    policy = parse(to_json(plain), "policy.json")
    assert compiled(policy) == compiled(policy)


SAYS_DIGEST = """
import hashlib, sys
sys.path[:0] = ["tests", "tests/unit", "bench"]
from test_firewall_compile import compiled, seeded_policy
print(hashlib.sha256(compiled(seeded_policy(4, 300)).slot).hexdigest())
"""


def test_the_seed_of_pythons_hashes_changes_no_byte() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", SAYS_DIGEST], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "01"
    }  # fmt: skip
    assert said == {hashlib.sha256(compiled(seeded_policy(4, 300)).slot).hexdigest() + "\n"}


def changed(policy: FirewallPolicy, chance: random.Random) -> FirewallPolicy:
    """The policy with one change, most of its rules the same objects as before."""
    rules = list(policy.rules)
    at = chance.randrange(len(rules)) if rules else 0
    sets = dict(policy.sets)
    kind = chance.choice(["action", "prefix", "remove", "move", "sets", "interface", "add", "limit"])
    if kind == "sets":
        for name in ("mixed", "web", "large"):
            sets[name] = chance.choice([(), LARGE4[:2], LARGE4, LARGE6 + LARGE4[:5]])
    elif kind == "add" or not rules:
        rules.insert(at, rule(f"new-{chance.getrandbits(60)}", interfaces=("new",) * chance.randrange(2)))
    elif kind == "remove":
        del rules[at]
    elif kind == "move":
        rules.insert(chance.randrange(len(rules)), rules.pop(at))
    else:
        new = {
            "action": {"action": Action(1 - rules[at].action)},
            "prefix": {"sources": chance.choice([(), LARGE4[:1], LARGE4, LARGE6[:60]])},
            "interface": {"interfaces": chance.choice([(), ("lb0",), ("lb2", "new")])},
            "limit": {"limit": Limit(rate=2.0, burst=1, per="rule")},
        }[kind]
        rules[at] = msgspec.structs.replace(rules[at], **new)
    return msgspec.structs.replace(policy, rules=tuple(rules), sets=sets)


@RELAXED
@given(whole_policies(most=12), st.randoms(use_true_random=False), st.booleans())
def test_what_was_compiled_before_changes_no_byte(
    policy: FirewallPolicy, chance: random.Random, few: bool
) -> None:
    memory = Memory()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("loopback.modules.firewall.classifier.LINEAR", 0)
        if few:  # whether a number is left for a set depends on the other rules
            patched.setattr(layout, "MAX_SETS", 5)
            patched.setattr("loopback.modules.firewall.entries.MAX_PRODUCT", 3)
        for _ in range(5):
            try:
                afresh = compiled(policy)
            except Refused as refused:
                with pytest.raises(Refused) as caught:
                    compiled(policy, memory)
                assert caught.value.reason == refused.reason
            else:
                assert compiled(policy, memory) == afresh
            policy = changed(policy, chance)


def test_a_large_policy_is_compiled_after_one_change_as_from_scratch() -> None:
    policy, memory, chance = seeded_policy(9, 1500), Memory(), random.Random(2)
    for _ in range(6):
        assert compiled(policy, memory) == compiled(policy)
        policy = changed(policy, chance)


def test_what_was_foreseen_is_what_is_compiled_in_earnest_whatever_came_between() -> None:
    policy = seeded_policy(9, 200)
    other = changed(policy, random.Random(2))
    names = [r.name for r in policy.rules]
    known = assign({}, names)
    numbered = {name: 900 - at for at, name in enumerate(names)}
    for asked, identities in (
        (policy, known),
        (policy, numbered),
        (other, assign({}, [r.name for r in other.rules])),
    ):
        memory = Memory()
        foresee(policy, memory)
        expected = compile_policy(asked, identities, DIGEST)
        for _ in range(2):
            assert compile_policy(asked, identities, DIGEST, memory) == expected
        assert memory.foreseen is None, "it would be held as long as the firewall runs"


def test_a_policy_that_cannot_be_compiled_is_refused_in_earnest_only() -> None:
    policy, memory = policy_of(*(rule(f"r{n}", interfaces=(f"eth{n}",)) for n in range(99))), Memory()
    foresee(policy, memory)
    with pytest.raises(Refused, match="interfaces"):
        compiled(policy, memory)


def test_a_rule_in_another_policy_with_other_counters_and_sets_says_nothing_of_the_first() -> None:
    shared = [rule("x", source_sets=("s",)), rule("y", sources=LARGE4[:2], interfaces=("b",)), rule("z")]
    one = policy_of(*shared, sets={"s": LARGE4})
    other = policy_of(rule("a", interfaces=("a",), sources=LARGE6), *shared[::-1], sets={"s": LARGE6[:3]})
    memory = Memory()
    for policy in (one, other, one):
        assert compiled(policy, memory) == compiled(policy)
        numbered = {r.name: 900 - at for at, r in enumerate(policy.rules)}
        assert compile_policy(policy, numbered, DIGEST, memory) == compile_policy(policy, numbered, DIGEST)


# ── the head, and what does not fit ───────────────────────────────────────────────────────────────────────────────────────
def test_the_head_of_a_slot_says_what_it_is() -> None:
    one = compiled(
        policy_of(
            rule("out", direction=Direction.EGRESS),
            rule("in", sources=LARGE4[:1]),
            default={Direction.INGRESS: Action.DROP, Direction.EGRESS: Action.ACCEPT},
        )
    )
    slot = layout.Slot.from_buffer_copy(one.slot)
    assert (slot.epoch, bytes(slot.digest), slot.default_sample, slot.flags) == (0, DIGEST, DEFAULT_SAMPLE, 0)
    assert list(slot.defaults) == [0, 1]
    reader = Reader(one)
    assert [[reader.classifier(d, f).count for f in (4, 6)] for d in (0, 1)] == [[1, 0], [1, 1]]
    assert one.entries == 3
    assert [(e.match.identity, e.match.order) for e in reader.entries(1, 6)] == [(100, 0)]
    assert [(e.match.identity, e.match.order) for e in reader.entries(0, 4)] == [(101, 1)]


def test_every_part_begins_at_a_cache_line_and_lies_within_the_slot() -> None:
    one = compiled(seeded_policy(1, 400))
    reader = Reader(one)
    for direction in (0, 1):
        for family in (4, 6):
            found = reader.classifier(direction, family)
            parts = [found.entries, found.tuple, found.heads, found.protocols]
            parts += [place for table in found.fields for place in (table.root, table.blocks, table.classes)]
            assert all(place % 64 == 0 and place < len(one.slot) for place in parts)


def test_a_policy_larger_than_its_slot_is_refused_instead_of_written_beyond_it() -> None:
    policy = policy_of(*(rule(f"r{n}", sources=(Prefix(4, n << 8, 24),)) for n in range(500)))
    size = len(compiled(policy).slot)
    numbers = {one.name: at for at, one in enumerate(policy.rules)}
    assert len(compile_policy(policy, numbers, room=size).slot) == size
    with pytest.raises(Refused, match=f"takes {size} bytes of the {size - 1} that a slot has") as caught:
        compile_policy(policy, numbers, room=size - 1)
    assert caught.value.code is Code.POLICY_INVALID and caught.value.next_step


# ── counters ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=4), max_size=6), st.integers(4, 10)
)
def test_a_rule_keeps_its_counter_for_as_long_as_it_is_there(policies: list[list[str]], room: int) -> None:
    known: dict[str, int] = {}
    for names in policies:
        after = assign(known, names, room)
        assert set(names) <= set(after)
        assert all(after[name] == known[name] for name in names if name in known)
        assert sorted(after.values()) == sorted(set(after.values())), "two rules share a counter"
        assert all(0 <= slot < room for slot in after.values())
        if len(known.keys() | set(names)) <= room:
            assert known.items() <= after.items(), "a counter was given up although there was room"
        known = after


def test_more_rules_than_counters_are_refused() -> None:
    with pytest.raises(Refused, match="3 rules are more than the 2 counters"):
        assign({}, ["a", "b", "c"], 2)
