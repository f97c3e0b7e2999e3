"""Chains of entries with very short prefixes, told apart by classes of addresses. Pure.

No grid tells prefixes shorter than a byte apart (see tuples.py), so nearly every packet that meets no better rule walked the
chain of all of them: 17 entries in acl1_10k, 24 in fw1_10k. As in Recursive Flow Classification (Gupta and McKeown, SIGCOMM
1999) addresses are put into classes, by which of these prefixes they can be in; here by their first byte only, so that a class
is one read from 256 bytes. Each pair of classes has a chain of its own: the entries that can match there, and none behind one
that always does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Final, NamedTuple

from loopback.bpf import layout
from loopback.modules.firewall.tuples import PORT, PROTOCOL, SOURCE_PORT, Entry, hash_of

#: Chains of pairs of classes that there may be, each a place in the table of heads. Tuples of more chains are left as they are.
MOST: Final = 1 << 12
#: Entries of a tuple that is told apart: each is compared with all behind it. The largest of 100,000 generated rules has 475.
MOST_ENTRIES: Final = 1 << 11
#: Entries in the chains of all pairs, each counted wherever it stands: chains that are alike are copied too, where their heads
#: meet others. Else thirty sources and destinations before a thousand ranges of ports fill a slot. 100,000 rules have 1808.
MOST_LAID: Final = 1 << 15
_BYTE: Final = 8  # bits that a class is known by
_ANY: Final = 65535
_order: Final = attrgetter("order")


class Classes(NamedTuple):
    """`table` has the class of each first byte, of sources and then of destinations; `seeds` are the tuples that ask for them.

    `chains` are theirs, by key as in tuples.py; those that are alike are one object.
    """

    table: bytes
    seeds: frozenset[int]
    chains: dict[int, list[Entry]]

    def within(self, every: Mapping[int, list[Entry]]) -> dict[int, list[Entry]]:
        """All chains of a classifier, with these in the place of the whole ones."""
        return {key: chain for key, chain in every.items() if key >> 64 not in self.seeds} | self.chains


class Known(NamedTuple):
    """What was told apart last: the key and length of each chain, the entries of all, and what became of them."""

    shape: list[tuple[int, int]]
    entries: list[Entry]
    found: Classes | None


def told_apart(chains: Mapping[int, list[Entry]], family: int, known: Known | None = None) -> Known:
    """The chains of the tuples that look at no address, by pairs of classes; None where there is nothing to tell apart."""
    short = {key: chain for key, chain in chains.items() if not key >> 64 >> 3}
    every = [entry for chain in short.values() for entry in chain]
    shape = [(key, len(chain)) for key, chain in short.items()]
    if known is not None and shape == known.shape and all(map(is_, every, known.entries)):
        return known
    return Known(shape, every, _told_apart(short, family))


def _told_apart(short: Mapping[int, list[Entry]], family: int) -> Classes | None:
    by_seed: dict[int, list[list[Entry]]] = {}
    for key, chain in short.items():
        by_seed.setdefault(key >> 64, []).append(chain)
    if not by_seed or all(len(chain) == 1 for chain in short.values()):
        return None
    # the most chains are those of exact ports, which few packets meet
    seeds = sorted(
        (seed for seed, chains in by_seed.items() if sum(map(len, chains)) <= MOST_ENTRIES),
        key=lambda seed: (len(by_seed[seed]), seed),
    )
    while seeds:
        every = [entry for seed in seeds for chain in by_seed[seed] for entry in chain]
        sources, of_source = _classes({entry.source for entry in every}, family)
        destinations, of_destination = _classes({entry.destination for entry in every}, family)
        if len(sources) * len(destinations) * sum(len(by_seed[seed]) for seed in seeds) <= MOST:
            break
        seeds.pop()
    else:
        return None
    found: dict[int, list[Entry]] = {}
    left = MOST_LAID
    for seed in seeds:
        for transport, entries in _by_transport(by_seed[seed], seed & 7).items():
            reached = _Reached(entries, family)
            by_source = [_members(entries, "source", held) for held in sources]
            by_destination = [_members(entries, "destination", held) for held in destinations]
            for a, first in enumerate(by_source):
                for b, second in enumerate(by_destination):
                    if members := first & second:
                        key = seed << 64 | hash_of(0, a | b << 8, transport, seed, family)
                        chain, met = reached.of(members), found.get(key)
                        found[key] = chain if met is None else sorted([*met, *chain], key=_order)
                        left -= len(chain)
                if left < 0:
                    return None
    return Classes(bytes(of_source + of_destination), frozenset(seeds), found)


def _classes(prefixes: Iterable[int], family: int) -> tuple[list[frozenset[int]], list[int]]:
    """Which prefixes (address << 8 | length) the addresses of each class may be in, and the class of each first byte."""
    width = 32 if family == 4 else 128
    holds: list[set[int]] = [set() for _ in range(256)]
    for prefix in prefixes:
        first = prefix >> 8 >> width - _BYTE
        for byte in range(first, first + (1 << max(_BYTE - (prefix & 0xFF), 0))):
            holds[byte].add(prefix)
    numbers: dict[frozenset[int], int] = {}
    of_byte = [numbers.setdefault(frozenset(held), len(numbers)) for held in holds]
    return list(numbers), of_byte


def _by_transport(chains: Iterable[list[Entry]], kind: int) -> dict[int, list[Entry]]:
    """The entries by what their tuple's hash takes from the transport header, in order."""
    found: dict[int, list[Entry]] = {}
    for chain in chains:
        for entry in chain:
            value = (
                (entry.protocol << 32 if kind & PROTOCOL else 0)
                | (entry.ports & 0xFFFF if kind & PORT else 0)
                | ((entry.source_ports & 0xFFFF) << 16 if kind & SOURCE_PORT else 0)
            )
            found.setdefault(value, []).append(entry)
    return {value: sorted(entries, key=_order) for value, entries in found.items()}


def _members(entries: Sequence[Entry], field: str, held: frozenset[int]) -> int:
    """A bit for each entry whose prefix a class may be in."""
    of = attrgetter(field)
    found = 0
    for place, entry in enumerate(entries):
        if of(entry) in held:
            found |= 1 << place
    return found


class _Reached:
    """What packets of a class can meet of some entries: nothing behind one that matches whatever they match."""

    def __init__(self, entries: Sequence[Entry], family: int) -> None:
        self._entries = entries
        self._known: dict[int, list[Entry]] = {}
        self._behind = [0] * len(entries)  # those that an entry leaves nothing for
        for place, one in enumerate(entries):
            if (
                one.source & 0xFF <= _BYTE
                and one.destination & 0xFF <= _BYTE
                and not _byte(one, _FLAGS, family) & layout.MORE
            ):
                for other in range(place + 1, len(entries)):
                    self._behind[place] |= _covers(one, entries[other], family) << other

    def of(self, members: int) -> list[Entry]:
        """Those of a class, given a bit for each that its packets may match. The same list for the same bits."""
        if (found := self._known.get(members)) is None:
            found, left = [], members
            while left:
                bit = left & -left
                place = bit.bit_length() - 1
                found.append(self._entries[place])
                left &= ~(bit | self._behind[place])
            self._known[members] = found
        return found


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
