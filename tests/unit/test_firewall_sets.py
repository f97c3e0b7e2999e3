"""Sets: the bytes, read as the program reads them, hold the addresses of their prefixes and no other."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_slot import Reader, agree, compiled, policy_of, refused, rule, set_says

from loopback.bpf import layout
from loopback.modules.firewall.entries import SPELT_OUT
from loopback.modules.firewall.model import Action, Packet, PortRange, Prefix, PrefixTable
from loopback.modules.firewall.sets import SetTable, changes_of, tables_of

LAST = {4: (1 << 32) - 1, 6: (1 << 128) - 1}
WIDTH = {4: 32, 6: 128}


def read(table: SetTable, address: int, family: int) -> bool:
    whole = bytes(64) + table.root + bytes(-len(table.root) % 64) + table.changes
    changes, filters = len(whole) - len(table.changes), len(whole)
    whole += table.filter
    head = layout.Set.from_buffer_copy(table.head(64, changes, filters))
    return set_says(whole, head, address, wide=family == 6)


def inside(prefixes: Iterable[Prefix], address: int, family: int) -> bool:
    shifts = ((p, WIDTH[family] - p.length) for p in prefixes if p.family == family)
    return any(address >> beyond == p.address >> beyond for p, beyond in shifts)


def prefix(family: int, address: int, length: int) -> Prefix:
    beyond = WIDTH[family] - length
    return Prefix(family, (address & LAST[family]) >> beyond << beyond, length)  # type: ignore[arg-type]


def holds(prefixes: list[Prefix], others: Iterable[int] = ()) -> None:
    for family, table in zip((4, 6), tables_of(PrefixTable.of(prefixes)), strict=True):
        near = {0, LAST[family], *(n & LAST[family] for n in others)}
        for one in prefixes:
            if one.family == family:
                last = one.address | (1 << WIDTH[family] - one.length) - 1
                near |= {max(one.address - 1, 0), one.address, last, min(last + 1, LAST[family])}
        for address in near:
            assert read(table, address, family) == inside(prefixes, address, family), hex(address)


@st.composite
def lists(draw: st.DrawFn) -> list[Prefix]:
    family = st.sampled_from([4, 6])
    places = st.sampled_from([0, 1 << 31, 1 << 64, -1])
    near = st.builds(lambda f, a, n: prefix(f, a + n, WIDTH[f] - n % 9), family, places, st.integers(-40, 40))
    anywhere = st.builds(
        lambda f, a, n: prefix(f, a, n % (WIDTH[f] + 1)), family, st.integers(0, LAST[6]), st.integers(0, 128)
    )
    return draw(st.lists(st.one_of(near, anywhere), max_size=80))


@given(lists(), st.lists(st.integers(0, LAST[6]), max_size=8))
def test_an_address_is_in_a_set_when_a_prefix_holds_it(prefixes: list[Prefix], others: list[int]) -> None:
    holds(prefixes, others)


@pytest.mark.parametrize(
    "prefixes",
    [
        [],
        [prefix(4, 0, 0)],
        [prefix(6, 0, 0)],
        [prefix(4, 0, 32), prefix(4, -1, 32), prefix(6, 0, 128), prefix(6, -1, 128)],
        [prefix(4, n, 32) for n in range(100)],
        [prefix(6, 1 << 70 | n << 1, 128) for n in range(500)],
        [prefix(4, 10 << 24, n) for n in range(33)],
    ],
    ids=["nothing", "all of IPv4", "all of IPv6", "first and last", "neighbours", "one /64", "nested"],
)
def test_corners_of_the_address_space(prefixes: list[Prefix]) -> None:
    holds(prefixes, [1, 10 << 24, (11 << 24) - 1])


def test_overlapping_and_neighbouring_prefixes_are_one_range() -> None:
    keys = [10 << 32 | 8, 10 << 32 | 9, 11 << 32 | 8, 13 << 32 | 8]
    assert changes_of(keys, 32) == [10 << 24, 12 << 24, 13 << 24, 14 << 24]
    assert changes_of([255 << 32 | 8], 32) == [255 << 24], "the end of the space is no change"


@pytest.mark.parametrize("count", [4_000, 60_000])  # as whole addresses, and as their lower halves
def test_large_sets_hold_what_they_should(count: int) -> None:
    chance = random.Random(count)
    prefixes = [
        prefix(4, chance.getrandbits(32), chance.choice([20, 24, 24, 32, 32, 32])) for _ in range(count)
    ]
    table = tables_of(PrefixTable.of(prefixes))[0]
    assert bool(table.filter) == (count > 10_000)
    known = {(p.address, p.length) for p in prefixes}
    asked = [chance.getrandbits(32) for _ in range(1000)]
    for one in prefixes[:1000]:
        asked += [one.address, one.address | (1 << 32 - one.length) - 1, max(one.address - 1, 0)]
    for address in asked:
        wanted = any((address >> 32 - n << 32 - n, n) in known for n in (20, 24, 32))
        assert read(table, address, 4) == wanted, hex(address)


# ── sets of policies ──────────────────────────────────────────────────────────────────────────────────────────────────────
MANY = tuple(Prefix(4, 10 << 24 | n << 9, 24) for n in range(SPELT_OUT + 1))


def sets_of(policy_reader: Reader) -> list[tuple[int, int]]:
    return sorted({(e.match.source_set, e.match.destination_set) for e in policy_reader.entries(0, 4)})


def packet(src: str, dst: str = "192.0.2.2") -> Packet:
    return Packet(direction=rule().direction, src=src, dst=dst, protocol=6)


def test_few_prefixes_are_entries_and_many_a_set() -> None:
    policy = policy_of(rule("few", sources=MANY[:SPELT_OUT]), rule("many", sources=MANY))
    reader = Reader(compiled(policy))
    assert sorted(e.match.source_set for e in reader.entries(0, 4)) == [0] * SPELT_OUT + [1]
    assert agree(policy, reader, packet("10.0.0.1")).order == 0
    assert agree(policy, reader, packet("10.0.128.1")).order == 1
    assert agree(policy, reader, packet("10.0.1.1")).order is None


def test_equal_lists_share_a_set_and_so_does_a_name() -> None:
    policy = policy_of(
        rule("a", sources=MANY), rule("b", destinations=MANY[::-1]), rule("c", source_sets=("s",)),
        rule("d", destination_sets=("s",), sources=MANY), sets={"s": MANY},
    )  # fmt: skip
    assert sets_of(Reader(compiled(policy))) == [(0, 1), (1, 0), (1, 2), (2, 0)]


def test_a_set_and_a_list_are_alternatives_of_one_field() -> None:
    policy = policy_of(
        rule("r", sources=(Prefix(4, 172 << 24, 8),), source_sets=("s", "t")), sets={"s": MANY, "t": MANY[:2]}
    )
    reader = Reader(compiled(policy))
    for address in ("172.1.2.3", "10.0.0.9", "10.0.128.1"):
        assert agree(policy, reader, packet(address)).action is Action.ACCEPT
    assert agree(policy, reader, packet("11.0.0.1")).action is Action.DROP


def test_an_empty_set_matches_nothing_but_its_rule_stays() -> None:
    policy = policy_of(rule("nobody", source_sets=("empty",)), rule("all"), sets={"empty": ()})
    one = compiled(policy)
    assert agree(policy, Reader(one), packet("192.0.2.1")).order == 1
    assert one.names == ("nobody", "all")


def test_long_lists_on_both_sides_become_a_set_before_they_multiply() -> None:
    two = [tuple(Prefix(4, side << 24 | n << 8, 24) for n in range(60)) for side in (10, 11)]
    policy = policy_of(rule("both", sources=two[0], destinations=two[1]))
    one = compiled(policy)
    reader = Reader(one)
    assert one.entries == 60 and sets_of(reader) == [(1, 0)]
    assert agree(policy, reader, packet("10.0.59.1", "11.0.59.1")).order == 0
    assert agree(policy, reader, packet("10.0.60.1", "11.0.59.1")).order is None
    ports = tuple(PortRange(n, n) for n in range(1, 99, 2))
    ported = compiled(policy_of(rule("ports", sources=MANY[:40], ports=ports, protocols=(6,))))
    assert ported.entries == len(ports) and sets_of(Reader(ported)) == [(1, 0)]


def test_a_set_makes_no_entry_for_a_family_that_it_has_no_prefix_of() -> None:
    reader = Reader(compiled(policy_of(rule("four", sources=MANY))))
    assert (reader.classifier(0, 4).count, reader.classifier(0, 6).count) == (1, 0)


def long_lists(count: int) -> list[tuple[Prefix, ...]]:
    return [tuple(Prefix(4, n << 16 | at << 1, 32) for at in range(SPELT_OUT + 1)) for n in range(count)]


def test_long_lists_are_refused_where_set_numbers_run_out() -> None:
    rules = [rule(f"r{n}", sources=one, line=n + 1) for n, one in enumerate(long_lists(layout.MAX_SETS + 1))]
    assert (
        "line 256: rule 'r255': from: the policy has more than 255 sets" in refused(policy_of(*rules)).reason
    )
    assert len(compiled(policy_of(*rules[:-1])).names) == 255


def test_lists_that_would_multiply_become_entries_all_the_same_where_set_numbers_run_out() -> None:
    rules = [rule(f"r{n}", sources=one) for n, one in enumerate(long_lists(layout.MAX_SETS))]
    both = rule("both", sources=MANY[:40], destinations=MANY[:40])
    policy = policy_of(both, *rules), policy_of(*rules, both)
    assert [compiled(one).entries for one in policy[1:]] == [255 + 1600]
    assert "rule 'r254'" in refused(policy[0]).reason
