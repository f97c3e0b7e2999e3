"""Prefixes by the million: packed, sorted, and read exactly as one after the other would be."""

from __future__ import annotations

import json
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall import prefixes
from loopback.modules.firewall.prefixes import Prefix, PrefixTable


@st.composite
def texts(draw: st.DrawFn) -> str:
    family = draw(st.sampled_from([4, 4, 6]))
    bits = 32 if family == 4 else 128
    length = draw(st.integers(0, bits))
    address = draw(st.integers(0, (1 << bits) - 1))
    if draw(st.integers(0, 9)):
        address = address >> (bits - length) << (bits - length)
    tail = draw(st.sampled_from([f"/{length}"] * 6 + ["", "/", "/033", "/129", "/-1"]))
    host = fields.address_text(family, address)
    return (
        draw(
            st.sampled_from(
                [host] * 20 + [f"0{host}", f" {host}", host.upper(), host + ".", "", "1.2.3", "@a"]
            )
        )
        + tail
    )


def one_by_one(items: list[str]) -> PrefixTable | None:
    try:
        return PrefixTable.of([fields.prefix(item) for item in items])
    except fields.Wrong:
        return None


@given(st.lists(texts(), min_size=1, max_size=6))
@settings(max_examples=600, deadline=None)
def test_a_list_is_read_as_its_items_are_or_handed_back(items: list[str]) -> None:
    expected = one_by_one(items)
    for found in (prefixes.read_texts(items), prefixes.read_json(json.dumps(items).encode())):
        assert found is None or found == expected


@given(
    st.lists(
        st.integers(0, 32).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, (1 << n) - 1))), max_size=20
    )
)
@settings(max_examples=200, deadline=None)
def test_right_ipv4_lists_need_no_second_reading(pairs: list[tuple[int, int]]) -> None:
    items = [fields.show(Prefix(4, number << (32 - length), length)) for length, number in pairs]
    items = [item.removesuffix("/32") for item in items]
    assert prefixes.read_json(json.dumps(items).encode()) == one_by_one(items)
    assert prefixes.read_texts(items) == one_by_one(items)


HANDED_BACK = [
    '"10.0.0.0 /8"', '"10.0.0.0/8" "10.0.0.0/8"', '"10.0.0.0/8",', "10", '"1.2.3.4/"', '"1.2.3.256"', '"300.0.0.0/8"',
    '"10.0.0.0/33"', '"10.0.0.1/8"', '"1,2,3,4/8"', '"1.2/3.4"', "[]", "null", '"::1/129"', '"::1/8"', '"1::2::3"',
    '"::ffff:1.2.3.4/96"', '"1.2.3.4", 5',
]  # fmt: skip


@pytest.mark.parametrize("inner", HANDED_BACK)
def test_what_is_not_plainly_right_is_handed_back(inner: str) -> None:
    assert prefixes.read_json(f"[{inner}]".encode()) is None


def test_a_long_list_in_any_order_comes_out_sorted_and_each_once() -> None:
    chance = random.Random(5)
    some = [Prefix(4, chance.getrandbits(24) << 8, 24) for _ in range(60_000)]
    items = (
        [fields.show(p) for p in some] + [fields.show(p) for p in some[:100]] + ["2001:db8::/32", "10.0.0.1"]
    )
    found = prefixes.read_texts(items)
    assert found is not None
    assert list(found) == sorted({*some, Prefix(6, 0x20010DB8 << 96, 32), Prefix(4, 0x0A000001, 32)})
    assert found.families == {4, 6}
    assert len(found) == len(list(found))
    assert all(p in found for p in some[:200])
    assert Prefix(4, 1, 32) not in found
    assert prefixes.read_texts([fields.show(p) for p in found]) == found


def test_a_table_is_remembered_on_disk_as_it_is() -> None:
    table = PrefixTable.of([Prefix(4, 0x0A000000, 8), Prefix(6, 1 << 127, 1), Prefix(4, 0x0A000000, 9)])
    assert msgspec.json.decode(msgspec.json.encode(table), type=PrefixTable) == table
    assert PrefixTable.of(table) is table
    assert [hex(key) for key in table.keys4()] == ["0xa00000008", "0xa00000009"]
