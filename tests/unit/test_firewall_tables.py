"""Tables from numbers to tuples: the bytes, read as the program reads them, say what looking at every prefix and range says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_slot import table_says

from loopback.bpf import layout
from loopback.modules.firewall import tables
from loopback.modules.firewall.tables import Table

LAST = {32: (1 << 32) - 1, 128: (1 << 128) - 1}


def read(table: Table, number: int, *, wide: bool = False) -> int:
    """What the program reads, with the three parts one after the other."""
    parts = [bytes(64)]  # offset 0 is no part's
    places = []
    for part in (table.root, table.blocks, table.classes):
        places.append(sum(map(len, parts)))
        parts += [part, bytes(-len(part) % 64)]
    head = layout.Table.from_buffer_copy(table.head(*places))
    return table_says(b"".join(parts), head, number, wide=wide)


def key(address: int, length: int, width: int) -> int:
    beyond = width - length
    return (address >> beyond << beyond) << 8 | length


def said_of(found: Mapping[int, int], address: int, width: int) -> int:
    """By looking at every prefix."""
    bits = 0
    for prefix, tuples in found.items():
        beyond = width - (prefix & 0xFF)
        if address >> beyond == prefix >> 8 >> beyond:
            bits |= tuples
    return bits


def edges(found: Mapping[int, int], width: int) -> set[int]:
    """The first and last address of every prefix, and those beside them."""
    near = {0, LAST[width]}
    for prefix in found:
        first = prefix >> 8
        last = first | (1 << (width - (prefix & 0xFF))) - 1
        near |= {first - 1, first, last, last + 1}
    return {n for n in near if 0 <= n <= LAST[width]}


def holds(found: Mapping[int, int], width: int, others: list[int]) -> None:
    intervals = tables.of_prefixes(found, width)
    assert intervals[0][0] == 0
    assert all(a[0] < b[0] and a[1] != b[1] for a, b in itertools.pairwise(intervals))
    table = tables.narrow(intervals, 32) if width == 32 else tables.wide(intervals)
    for address in {*edges(found, width), *others}:
        assert read(table, address, wide=width == 128) == said_of(found, address, width), hex(address)


TUPLES = st.integers(1, (1 << 64) - 1)


@st.composite
def prefixes(draw: st.DrawFn, width: int) -> dict[int, int]:
    """Prefixes that lie beside, in and on each other, in a few places of the space."""
    places = [*draw(st.lists(st.integers(0, LAST[width]), min_size=1, max_size=4)), 0, LAST[width]]
    lengths = [0, 1, 8, 16, 17, width // 2, width // 2 + 1, width - 9, width - 1, width]
    one = st.builds(
        lambda place, near, length: key(max(0, min(LAST[width], place + near)), length, width),
        st.sampled_from(places),
        st.integers(-40, 40),
        st.sampled_from(lengths),
    )
    return draw(st.dictionaries(one, TUPLES, max_size=60))


@given(prefixes(32), st.lists(st.integers(0, LAST[32]), max_size=10))
def test_ipv4_addresses_have_the_tuples_of_all_their_prefixes(
    found: dict[int, int], others: list[int]
) -> None:
    holds(found, 32, others)


@given(prefixes(128), st.lists(st.integers(0, LAST[128]), max_size=10))
def test_ipv6_addresses_have_the_tuples_of_all_their_prefixes(
    found: dict[int, int], others: list[int]
) -> None:
    holds(found, 128, others)


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize(
    "found",
    [
        [],
        [(0, 0)],
        [(0, None)],
        [(-1, None)],
        [(0, None), (-1, None)],
        [(0, 1), (-1, 1)],  # adjacent halves of everything
        [(0, 0), (0, 1), (0, 8), (0, None)],  # nested from the first address on
        [(-1, 0), (-1, 1), (-1, 8), (-1, None)],  # and up to the last
        [(n, None) for n in range(70)],
        [(n << 1, None) for n in range(1000)],  # one place of an IPv6 root
        [(~n, None) for n in range(70)],  # the fill value is among the starts
    ],
    ids=str,
)
def test_corners_of_the_address_space(width: int, found: list[tuple[int, int | None]]) -> None:
    mapped = {
        key(address & LAST[width], width if length is None else length, width): 1 << at % 64
        for at, (address, length) in enumerate(found)
    }
    holds(mapped, width, [1 << (width - 1), LAST[width] - 1])


def test_neighbours_of_the_same_tuples_are_one_interval() -> None:
    halves = {key(0, 9, 32): 4, key(1 << 23, 9, 32): 4}
    assert tables.of_prefixes(halves, 32) == [(0, 4), (1 << 24, 0)]
    assert tables.of_prefixes({**halves, key(0, 8, 32): 4}, 32) == [(0, 4), (1 << 24, 0)]


def test_a_table_of_one_interval_has_a_root_of_one_place() -> None:
    table = tables.narrow([(0, 5)], 32)
    assert len(table.root) == 4 and not table.blocks
    assert read(table, 0) == read(table, LAST[32]) == 5


def test_a_root_is_no_larger_than_the_cache_can_afford() -> None:
    many = {key(n << 13, 20, 32): 1 + n % 7 for n in range(1 << 18)}
    table = tables.narrow(tables.of_prefixes(many, 32), 32)
    assert len(table.root) == 4 << 16
    for address in (0, (1 << 13) - 1, 1 << 12, 77 << 13, (77 << 13) + 4095, (77 << 13) + 4096, LAST[32]):
        inside = not address >> 12 & 1
        assert read(table, address) == (1 + (address >> 13) % 7 if inside else 0)


ENDS = st.one_of(st.integers(0, 65535), st.sampled_from([0, 1, 65534, 65535]))


@given(
    st.dictionaries(st.tuples(ENDS, ENDS).map(lambda two: min(two) << 16 | max(two)), TUPLES, max_size=40),
    st.lists(ENDS, max_size=10),
)
def test_ports_have_the_tuples_of_all_ranges_around_them(found: dict[int, int], others: list[int]) -> None:
    table = tables.narrow(tables.of_ranges(found), 16)
    near = {0, 65535, *others}
    for ports in found:
        low, high = ports >> 16, ports & 0xFFFF
        near |= {low, high, max(low - 1, 0), min(high + 1, 65535)}
    for port in near:
        wanted = 0
        for ports, tuples in found.items():
            wanted |= tuples if ports >> 16 <= port <= ports & 0xFFFF else 0
        assert read(table, port) == wanted, port


def test_every_port_may_have_a_class_of_its_own() -> None:
    table = tables.narrow(tables.of_ranges({port << 16 | port: port + 1 for port in range(65536)}), 16)
    assert [read(table, port) for port in (0, 1, 4095, 65534, 65535)] == [1, 2, 4096, 65535, 65536]


def test_more_classes_than_a_number_of_16_bits_holds_are_noticed() -> None:
    fits = [(n, n) for n in range(tables.MAX_CLASSES)]
    assert read(tables.narrow(fits, 32), tables.MAX_CLASSES - 1) == tables.MAX_CLASSES - 1
    for make in (lambda found: tables.narrow(found, 32), tables.wide):
        with pytest.raises(tables.TooManyClasses):
            make([*fits, (tables.MAX_CLASSES, tables.MAX_CLASSES)])
