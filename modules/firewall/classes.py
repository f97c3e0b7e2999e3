"""Chains of entries with very short prefixes, told apart by classes of addresses. Pure.

No grid tells prefixes shorter than a byte apart (see tuples.py), so nearly every packet that meets no better rule walked the
chain of all of them: 17 entries in acl1_10k, 24 in fw1_10k. As in Recursive Flow Classification (Gupta and McKeown, SIGCOMM
1999) addresses are put into classes, by which of these prefixes they can be in; here by their first byte only, so that a class
is one read from 256 bytes. Each pair of classes has a chain of its own: the entries that can match there, and none behind one
that always does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

from loopback.bpf import layout
from loopback.modules.firewall.tuples import PORT, PROTOCOL, SOURCE_PORT, Entry, hash_of

#: What all pairs of classes may have in entries, beside those that there were: 256 KiB of them.
MOST: Final = 1 << 13
_BYTE: Final = 8  # bits that a class is known by
_ANY: Final = 65535
_order: Final = attrgetter("order")


class Classes(NamedTuple):
    """`table` has the class of each first byte, of sources and then of destinations; `chains` are by key, as in tuples.py."""

    table: bytes
    chains: dict[int, list[Entry]]


def told_apart(chains: Mapping[int, list[Entry]], family: int) -> Classes | None:
    """The chains of the tuples that look at no address, by pairs of classes; None when that would be too many entries."""
    short = {key: chain for key, chain in chains.items() if not key >> 64 >> 3}
    if all(len(chain) == 1 for chain in short.values()):
        return None
    every = [entry for chain in short.values() for entry in chain]
    width = 32 if family == 4 else 128
    sources, of_source = _classes({entry.source for entry in every}, width)
    destinations, of_destination = _classes({entry.destination for entry in every}, width)
    if len(sources) * len(destinations) > MOST:
        return None
    found: dict[int, list[Entry]] = {}
    room = len(every) + MOST
    for key, chain in short.items():
        seed = key >> 64
        for transport, entries in _by_transport(chain, seed & 7).items():
            by_source = [_members(entries, "source", held) for held in sources]
            by_destination = [_members(entries, "destination", held) for held in destinations]
            for a, first in enumerate(by_source):
                for b, second in enumerate(by_destination):
                    if not (members := first & second):
                        continue
                    kept = _reached(entries, members, family)
                    room -= len(kept)
                    if room < 0:
                        return None
                    found.setdefault(seed << 64 | hash_of(0, a | b << 8, transport, seed, family), []).extend(
                        kept
                    )
    for chain in found.values():
        chain.sort(key=_order)
    rest = {key: chain for key, chain in chains.items() if key >> 64 >> 3}
    return Classes(bytes(of_source + of_destination), rest | found)


def _classes(prefixes: Iterable[int], width: int) -> tuple[list[frozenset[int]], list[int]]:
    """Which prefixes (address << 8 | length) the addresses of each class may be in, and the class of each first byte."""
    holds: list[set[int]] = [set() for _ in range(256)]
    for prefix in prefixes:
        first = prefix >> 8 >> width - _BYTE
        for byte in range(first, first + (1 << max(_BYTE - (prefix & 0xFF), 0))):
            holds[byte].add(prefix)
    numbers: dict[frozenset[int], int] = {}
    of_byte = [numbers.setdefault(frozenset(held), len(numbers)) for held in holds]
    return list(numbers), of_byte


def _by_transport(chain: Iterable[Entry], kind: int) -> dict[int, list[Entry]]:
    """The entries by what their tuple's hash takes from the transport header: one value, but for a collision."""
    found: dict[int, list[Entry]] = {}
    for entry in chain:
        value = (
            (entry.protocol << 32 if kind & PROTOCOL else 0)
            | (entry.ports & 0xFFFF if kind & PORT else 0)
            | ((entry.source_ports & 0xFFFF) << 16 if kind & SOURCE_PORT else 0)
        )
        found.setdefault(value, []).append(entry)
    return found


def _members(entries: Sequence[Entry], field: str, held: frozenset[int]) -> int:
    """A bit for each entry whose prefix a class may be in."""
    of = attrgetter(field)
    found = 0
    for place, entry in enumerate(entries):
        if of(entry) in held:
            found |= 1 << place
    return found


def _reached(entries: Sequence[Entry], members: int, family: int) -> list[Entry]:
    """Those of the members that a packet of the class may meet: none behind one that matches whatever they match."""
    kept: list[Entry] = []
    certain: list[Entry] = []
    while members:
        bit = members & -members
        members ^= bit
        entry = entries[bit.bit_length() - 1]
        if any(_covers(one, entry, family) for one in certain):
            continue
        kept.append(entry)
        if (
            entry.source & 0xFF <= _BYTE
            and entry.destination & 0xFF <= _BYTE
            and not _byte(entry, _FLAGS, family) & layout.MORE
        ):
            certain.append(entry)
    return kept


_NEEDS: Final = layout.Match.needs.offset
_FLAGS: Final = layout.Match.flags.offset
_MATCH: Final = {4: layout.Entry4.match.offset, 6: layout.Entry6.match.offset}


def _byte(entry: Entry, offset: int, family: int) -> int:
    return entry.packed[_MATCH[family] + offset]


def _covers(one: Entry, other: Entry, family: int) -> bool:
    """Whether `one`, which asks for nothing but its transport, matches every packet of their class that `other` does."""
    return (
        one.protocol in (-1, other.protocol)
        and _within(other.ports, one.ports)
        and _within(other.source_ports, one.source_ports)
        and not _byte(one, _NEEDS, family) & ~_byte(other, _NEEDS, family)
    )


def _within(inner: int, outer: int) -> bool:
    return outer >> 16 <= inner >> 16 and inner & _ANY <= outer & _ANY
