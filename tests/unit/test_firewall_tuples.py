"""Tuples: few enough for one word, sorted, found by the hash that the program computes, and short to scan."""

from __future__ import annotations

import itertools
import random
import statistics
from typing import Any, Literal

import pytest
import rulegen
import rulesets
from strategies_firewall import on_corners
from support_slot import Reader, agree, compiled, policy_of, rule, scramble, spread

from loopback.bpf import layout
from loopback.modules.firewall import classifier, tables, tuples
from loopback.modules.firewall.compile import Memory
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Packet, PortRange, Prefix

Family = Literal[4, 6]
EXACT, RANGE, ANY = 7 << 16 | 7, 1024 << 16 | 65535, 65535
KINDS = [
    (-1, ANY, ANY),
    (6, ANY, ANY),
    (6, EXACT, ANY),
    (6, ANY, EXACT),
    (6, EXACT, EXACT),
    (17, RANGE, EXACT),
]


Place = tuple[int, int]


def entry(
    order: int, source: Place, destination: Place, kind: tuple[int, int, int], family: Family
) -> tuples.Entry:
    width = 32 if family == 4 else 128

    def key(address: int, length: int) -> int:
        return (address >> (width - length) << (width - length)) << 8 | length

    protocol, ports, source_ports = kind
    return tuples.Entry(order, key(*source), key(*destination), protocol, ports, source_ports, b"", [])


def is_in_order(grouped: tuples.Grouped, entries: list[tuples.Entry]) -> None:
    assert sorted(e.order for chain in grouped.chains.values() for e in chain) == sorted(
        e.order for e in entries
    )
    assert all(a.order <= b.order for chain in grouped.chains.values() for a, b in itertools.pairwise(chain))
    assert list(grouped.best.values()) == sorted(grouped.best.values())
    best: dict[int, int] = {}
    for key, chain in grouped.chains.items():
        best[key >> 64] = min(best.get(key >> 64, 1 << 32), *(e.order for e in chain), 1 << 32)
    assert {kind.seed: order for kind, order in grouped.best.items()} == best


# ── few, whatever the policy ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("most", [tuples.MAX_TUPLES, tuples.FEWEST])
@pytest.mark.parametrize(("family", "step"), [(4, 1), (6, 4)])
@pytest.mark.parametrize("each", [1, 9])
def test_every_pair_of_lengths_and_every_kind_still_make_few_tuples(
    family: Family, step: int, each: int, most: int
) -> None:
    width = 32 if family == 4 else 128
    chance = random.Random(1)
    pairs = itertools.product(range(0, width + 1, step), repeat=2)
    made = [
        entry(0, (chance.getrandbits(width), a), (chance.getrandbits(width), b), kind, family)
        for a, b in pairs
        for kind in KINDS
        for _ in range(each if (a + b) % 8 == 0 else 1)
    ]
    chance.shuffle(made)
    for order, one in enumerate(made):
        one.order = order
    grouped = tuples.group(made, family, most)
    assert 1 < len(grouped.best) <= most
    is_in_order(grouped, made)


@pytest.mark.parametrize("family", [4, 6])
def test_entries_that_only_the_finest_grid_tells_apart_still_make_few_tuples(family: Family) -> None:
    width = 32 if family == 4 else 128
    lengths = range(9, 33) if family == 4 else range(17, 129)
    chance = random.Random(2)
    made = [
        entry(
            at,
            (10 << (width - 8) | n << (width - a), a),
            (10 << (width - 8), b),
            chance.choice(KINDS),
            family,
        )
        for at, (a, b, n) in enumerate(itertools.product(lengths[::2], lengths[::5], range(4)))
    ]
    grouped = tuples.group(made, family)
    assert len(grouped.best) <= tuples.MAX_TUPLES
    is_in_order(grouped, made)


def test_a_tuple_is_its_number_and_no_other_has_it() -> None:
    every = [tuples.Tuple(a, b, kind) for a in range(129) for b in range(129) for kind in range(8)]
    assert len({one.seed for one in every}) == len(every) and max(one.seed for one in every) < 1 << 24
    assert all(tuples.Tuple.of(one.seed) == one for one in every[::101])


def test_too_many_classes_of_addresses_group_more_coarsely_instead_of_failing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    original = tuples.group

    def group(entries: Any, family: int, most: int = tuples.MAX_TUPLES) -> tuples.Grouped:
        asked.append(most)
        return original(entries, family, most)

    def narrow(intervals: Any, width: int) -> tables.Table:
        if len(asked) == 1 and width == 32:
            raise tables.TooManyClasses
        return tables.narrow(intervals, width)

    chance = random.Random(3)
    policy = policy_of(
        *(
            rule(f"r{n}", sources=(Prefix(4, chance.getrandbits(length) << 32 - length, length),),
                 destinations=(Prefix(4, chance.getrandbits(12) << 20, 12),))
            for n, length in enumerate(chance.choices(range(1, 33), k=600))
        )
    )  # fmt: skip
    monkeypatch.setattr(classifier.tuples, "group", group)
    patched = type("Patched", (), {**vars(tables), "narrow": staticmethod(narrow)})
    monkeypatch.setattr(classifier, "tables", patched)
    reader = Reader(compiled(policy))
    assert asked == [tuples.MAX_TUPLES, tuples.FEWEST]
    assert len(reader.tuples(0, 4)) <= tuples.FEWEST
    for one in chance.choices(policy.rules, k=100):
        packet = on_corners(one, policy, chance.choice)
        assert packet
        agree(policy, reader, packet)


def test_the_fewest_tuples_have_no_more_combinations_than_classes_have_numbers() -> None:
    assert 1 << tuples.FEWEST <= tables.MAX_CLASSES


# ── hashes and heads ──────────────────────────────────────────────────────────────────────────────────────────────────────
#: From `spread` and `scramble` of classify.h compiled by a C compiler: source, destination, transport, seed → hash.
VECTORS4 = [
    (0x0, 0x0, 0x0, 0x0, 0x0),
    (0xA000000, 0x0, 0x600000000, 0x8000, 0x33A17A2E685639DE),
    (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFF, 0x7FFFF, 0xFED4DA8D38F12FBA),
    (0xF7AF9F4E, 0xA26406F4, 0x3E5B59747B, 0x5FFD7, 0xE1CEC922E87BB4FB),
    (0xE6A34447, 0x80C3FBD5, 0x9F64D9A9B1, 0x1A036, 0x9F32511B51794857),
    (0xA72D74AB, 0x87B1BBB0, 0x8CBC97BCE6, 0x4F90D, 0x2FD724241A85ABB),
]
VECTORS6 = [
    (0x0, 0x0,
     0x0, 0x0, 0x0),
    (0x20010db8000000000000000000000000, 0x0,
     0x8A16B91D10, 0x1FC71, 0xA35925DBFFB1F3A8),
    (0xffffffffffffffffffffffffffffffff, 0xffffffffffffffffffffffffffffffff,
     0x398C09FFA4, 0x51A23, 0x86FFBA6BA68C5C16),
    (0xfc9f95141c437e9c5bd74371f423b295, 0x94ec3b9a4c312ef549ad8a2cf73a8f31,
     0x2FA1B5E83A, 0x47A0A, 0x722A4BD1147F9BC6),
    (0x362e25f817fe1432eaa4545236d5ae9, 0x7568c7544a1cb8d449abc9d1969a7c9d,
     0xA2A5B6F815, 0x751, 0x9F3DD57583B8F647),
    (0x98d1a83bab32650ff94aa2517b0fde51, 0x5b1ddbad77722d42eff80167287ec7e0,
     0xD61092EE22, 0x95DA, 0x16315AE912F589B5),
]  # fmt: skip


@pytest.mark.parametrize(("family", "vectors"), [(4, VECTORS4), (6, VECTORS6)])
def test_hashes_are_those_of_the_program(family: Family, vectors: list[tuple[int, ...]]) -> None:
    for *given, wanted in vectors:
        assert tuples.hash_of(*given, family) == wanted
    source, destination, transport, seed, wanted = VECTORS4[-1]
    assert scramble(spread(source << 32 | destination), transport + (seed << 40)) == wanted


@pytest.mark.parametrize("length", [8, 12, 16, 20, 24, 32])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_prefixes_of_every_length_spread_over_the_heads(length: int, side: str) -> None:
    count = min(1 << length, 2048)
    addresses = [(n * 977) % (1 << length) << 32 - length for n in range(count)]
    pairs = [(a, 0) if side == "source" else (0, a) for a in addresses]
    used = {tuples.hash_of(*pair, 0, 5, 4) & 2 * count - 1 for pair in pairs}
    # of keys thrown at random into twice as many heads, 79 in 100 heads' worth are met
    assert len(used) > 0.6 * count


def test_heads_lead_to_every_chain_and_tell_strangers_apart() -> None:
    a, b, c = ([entry(order, (0, 0), (0, 0), KINDS[0], 4)] for order in (2, 1, 3))
    head = 0b101  # with three keys there are eight heads
    alone, meeting, unlike = 0xAB << 56 | 0b010, 0x31 << 56 | head, 0x33 << 56 | head
    table, chains = tuples.heads({1 << 64 | alone: a, 1 << 64 | meeting: b, 2 << 64 | unlike: c})
    assert len(table) == 8
    assert chains == [a, [*b, *c]], "the chains of keys that meet are one, in order"
    assert (table[0b010], table[head]) == (0xAB << 24 | 1, 0 << 24 | 2)
    table, chains = tuples.heads({1 << 64 | meeting: a, 2 << 64 | meeting | 1 << 30: b})
    [found] = [one for one in table if one]
    assert (found, [e.order for e in chains[0]]) == (0x31 << 24 | 1, [1, 2]), "of equal tags the tag stays"


def test_every_head_leads_to_a_whole_chain_in_order_and_chains_share_no_entry() -> None:
    policy = rulesets.policy(rulegen.generate("acl1", 1500, seed=2))
    reader = Reader(compiled(policy))
    met = []
    for first in {head & 0xFFFFFF for head in reader.heads(0, 4) if head}:
        orders = [e.match.order for e in reader.chain(0, 4, first)]
        assert orders == sorted(orders)
        met += orders
    assert sorted(met) == sorted(e.match.order for e in reader.entries(0, 4))
    best = [one.best for one in reader.tuples(0, 4)]
    assert best == sorted(best) and len(best) <= layout.Classifier.tuples.size * 16


# ── what a packet costs ───────────────────────────────────────────────────────────────────────────────────────────────────
def cost(policy: FirewallPolicy, family: Family, packets: list[Packet]) -> tuple[float, float]:
    """Mean chains entered, and mean entries compared."""
    reader = Reader(compiled(policy))
    assert reader.classifier(0, family).tuples
    answers = [reader.judge(packet) for packet in packets]
    return statistics.mean(a.probes for a in answers), statistics.mean(a.scanned for a in answers)


def uniform(count: int) -> list[Packet]:
    bits = rulesets.Bits(11)
    return [
        Packet(
            direction=Direction.INGRESS,
            src=".".join(str(bits.bits(8)) for _ in range(4)),
            dst=".".join(str(bits.bits(8)) for _ in range(4)),
            protocol=(6, 17)[bits.bits(1)], sport=bits.bits(16), dport=bits.bits(16),
        )
        for _ in range(count)
    ]  # fmt: skip


#: Rules → mean chains entered and mean entries compared, stated with some room above what was counted.
BOUNDS = {1000: (2.5, 4.0), 10_000: (2.5, 6.0), 100_000: (3.5, 10.0)}
RUNS = [(kind, count, 4) for kind in ("acl1", "fw1", "ipc1") for count in (1000, 10_000)] + [
    ("acl1", 10_000, 6), ("fw1", 10_000, 6), ("acl1", 100_000, 4),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "count", "family"), RUNS)
def test_a_packet_enters_few_chains_and_meets_few_entries(kind: Any, count: int, family: Family) -> None:
    policy = rulesets.policy(rulegen.generate(kind, count, seed=3, family=family))
    chance = random.Random(5)
    corner = [on_corners(one, policy, chance.choice) for one in chance.choices(policy.rules, k=600)]
    probes, scanned = cost(policy, family, [packet for packet in corner if packet])
    assert probes <= BOUNDS[count][0] and scanned <= BOUNDS[count][1], (probes, scanned)
    if family == 4:
        probes, scanned = cost(policy, family, uniform(600))
        assert probes <= BOUNDS[count][0] and scanned <= BOUNDS[count][1], (probes, scanned)


def test_a_thousand_short_sources_cost_no_more_than_others() -> None:
    # they had one head once: the bits of a short prefix never reached the mask
    policy = policy_of(
        *(
            rule(f"r{n}", sources=(Prefix(4, n << 16, 16),), ports=(PortRange(80, 80),), protocols=(6,))
            for n in range(4096)
        )
    )
    chance = random.Random(1)
    corner = [on_corners(one, policy, chance.choice) for one in chance.choices(policy.rules, k=300)]
    probes, scanned = cost(policy, 4, [packet for packet in corner if packet])
    assert probes <= 1 and scanned <= 2, (probes, scanned)


def test_packets_that_no_better_rule_matches_walk_no_long_chain_of_short_prefixes() -> None:
    short = [rule(f"s{n}", sources=(Prefix(4, n << 25, 7),), protocols=(6,)) for n in range(64)]
    policy = policy_of(*short, rule("rest", protocols=(6,)), rule("never met", protocols=(6,)))
    reader = Reader(compiled(policy))
    scanned = [agree(policy, reader, packet).scanned for packet in uniform(200) if packet.protocol == 6]
    assert max(scanned) <= 4, "the only entry of its class, and what meets it at its head"


@pytest.mark.parametrize(("count", "asked"), [(60, (PortRange(5, 9),)), (30, ())])
def test_short_prefixes_before_many_ranges_of_ports_fill_no_slot_with_copies(
    count: int, asked: tuple[PortRange, ...]
) -> None:
    short = [Prefix(4, n << 25, 7) for n in range(count)]
    named = (6,) if asked else ()
    ranges = [
        rule(f"p{n}", ports=(PortRange(1000 + 20 * n, 1009 + 20 * n),), protocols=(6,)) for n in range(1000)
    ]
    policy = policy_of(
        *(
            rule(f"s{n}", sources=(one,), ports=asked, protocols=named, interfaces=("eth0",))
            for n, one in enumerate(short)
        ),
        *(
            rule(f"d{n}", destinations=(one,), ports=asked, protocols=named, interfaces=("eth0",))
            for n, one in enumerate(short)
        ),
        *ranges,
    )
    slot = compiled(policy)
    assert len(slot.slot) < 1 << 20, "each pair of classes would lead to a thousand entries of its own"
    reader = Reader(slot)
    for packet in uniform(200):
        agree(policy, reader, packet)


def test_a_chain_of_thousands_is_not_compared_entry_by_entry() -> None:
    ranges = [rule(f"p{n}", ports=(PortRange(1 + 20 * n, 9 + 20 * n),), protocols=(6,)) for n in range(3000)]
    few = [rule(f"s{n}", sources=(Prefix(4, n << 25, 7),)) for n in range(40)]
    memory = Memory()
    policy = policy_of(*few, *ranges)
    reader = Reader(compiled(policy, memory))
    found = memory.tables.apart[0, 4].found
    assert found is not None, "the others are told apart all the same"
    assert len(found.seeds) == 1 and max(map(len, found.chains.values())) < 3000
    for packet in uniform(200):
        agree(policy, reader, packet)


def test_what_was_told_apart_serves_the_next_policy_and_nothing_else_of_the_last_does() -> None:
    short = [rule(f"s{n}", sources=(Prefix(4, n << 26, 6),)) for n in range(40)]
    memory = Memory()
    found = []
    for action in (Action.ACCEPT, Action.DROP, Action.ACCEPT):
        policy = policy_of(rule("one", sources=(Prefix(4, 10 << 24, 32),), action=action), *short)
        reader = Reader(compiled(policy, memory))
        found.append(memory.tables.apart[0, 4].found)
        met = Packet(direction=Direction.INGRESS, src="10.0.0.0", dst="10.9.9.9", protocol=6)
        assert agree(policy, reader, met).action is action
        for packet in uniform(100):
            agree(policy, reader, packet)
    assert found[0] is not None and found[1] is found[0] and found[2] is found[0]
