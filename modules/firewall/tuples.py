"""Entries grouped so that a packet asks few groups: the tuple space behind `struct fw_classifier`. Pure.

The tuple space search of Srinivasan, Suri and Varghese (SIGCOMM 1999) with two changes. Lengths of prefixes are rounded down to
a coarse grid, and only groups of more than a handful of entries are split by a finer one, so that there are never more than 64
tuples; and a packet asks only the tuples that tables of its fields leave over (see tables.py), the best rule first.

A group is known by its key: the number of its tuple above the 64-bit hash that the program computes for its packets. Should two
groups of a tuple ever share all of a hash they are one chain, which they would be in the table of heads anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

import msgspec

MAX_TUPLES: Final = 64
FEWEST: Final = 16  # tuples that are always enough, if chains may be long
PROTOCOL, PORT, SOURCE_PORT = 1, 2, 4  # bits of a kind
_M64: Final = (1 << 64) - 1
_K1: Final = (
    0xFF51AFD7ED558CCD  # odd constants that spread bits: MurmurHash3's finaliser and the golden ratio
)
_K2: Final = 0x9E3779B97F4A7C15

#: Grids of prefix lengths, coarse to fine. None tells very short prefixes apart: so many packets match them that a chain of
#: them ends at once, where tuples of them would all be asked (measured: 6 probes instead of 1 on fw1_10k).
_GRIDS: Final[Mapping[int, Sequence[Sequence[int]]]] = {
    4: (range(0, 33, 16), range(0, 33, 8), (0, *range(8, 33, 4)), (0, *range(8, 33))),
    6: ((0, 32, 48, 64, 128), (0, *range(16, 129, 8)), (0, *range(16, 129))),
}
#: Grids alone, for what no limit of those below makes few enough: at most 27 and 12 tuples of IPv4, 48 and 12 of IPv6.
_ALONE: Final[Mapping[int, Sequence[Sequence[int]]]] = {
    4: ((0, 16, 32), (0, 16)),
    6: ((0, 48, 64, 128), (0, 64)),
}
#: How many entries a group may have before it is split. The first that needs no more than 64 tuples is taken; what is not split
#: any more is a longer chain. 4 costs more tuples than 8 saves steps (measured on the published ClassBench sets).
_LIMITS: Final = (8, 16, 32, 64, 256, 1024)


class Entry(msgspec.Struct, gc=False):
    """What one entry matches, and its bytes.

    A prefix is address << 8 | length and a range of ports first << 16 | last: plain integers sort and hash quickest.
    `keys` are those of its groups, level by level, as far as somebody asked; entries that differ only in order share them.
    """

    order: int
    source: int
    destination: int
    protocol: int  # -1: any
    ports: int
    source_ports: int
    packed: bytes  # struct fw_entry4 or fw_entry6, not marked as the last of a chain
    keys: list[int]


class Tuple(NamedTuple):
    """The bits that the entries of one tuple are found by."""

    source_length: int
    destination_length: int
    kind: int  # PROTOCOL, PORT, SOURCE_PORT

    @property
    def seed(self) -> int:
        """Its number, of 19 bits: the same in every policy, so that hashes are worth remembering."""
        return self.source_length << 11 | self.destination_length << 3 | self.kind

    @classmethod
    def of(cls, seed: int) -> Tuple:
        """The tuple of a number."""
        return cls(seed >> 11, seed >> 3 & 0xFF, seed & 7)


class Grouped(NamedTuple):
    """Entries by the key of their group. Each chain is sorted by order, and so are the tuples by their best."""

    chains: dict[int, list[Entry]]
    best: dict[Tuple, int]


def group(entries: Sequence[Entry], family: int, most: int = MAX_TUPLES) -> Grouped:
    """Group the entries of one classifier into at most `most` tuples, which is FEWEST or more."""
    for limit in _LIMITS:
        chains = _group(entries, family, limit)
        if len({key >> 64 for key in chains}) <= most:
            break
    else:
        for grid in _ALONE[family]:
            down = _rounded(grid, family)
            chains = _chains(entries, (key_of(entry, down, False, family) for entry in entries))
            if len({key >> 64 for key in chains}) <= most:
                break
    best: dict[int, int] = {}
    for key, chain in chains.items():
        if len(chain) > 1:
            chain.sort(key=_order)
        seed, order = key >> 64, chain[0].order
        if order < best.get(seed, order + 1):
            best[seed] = order
    # two tuples may have the same best, when one rule has entries in both
    return Grouped(chains, {Tuple.of(seed): best[seed] for seed in sorted(best, key=lambda s: (best[s], s))})


_order: Final = attrgetter("order")


def _group(entries: Sequence[Entry], family: int, limit: int) -> dict[int, list[Entry]]:
    """Chains by key: groups over the limit are split level by level, as far as there are levels."""
    placed: dict[int, list[Entry]] = {}
    rest = entries
    levels = _LEVELS[family]
    for level, down in enumerate(levels):
        for entry in rest:
            if len(entry.keys) == level:
                entry.keys.append(key_of(entry, down, level > 0, family))
        groups = _chains(rest, (entry.keys[level] for entry in rest))
        most = limit if level + 1 < len(levels) else len(rest)
        over = [key for key, chain in groups.items() if len(chain) > most]
        rest = [entry for key in over for entry in groups.pop(key)]
        for key in groups.keys() & placed.keys():
            groups[key] = placed[key] + groups[key]
        placed |= groups
        if not rest:
            break
    return placed


def _chains(entries: Iterable[Entry], keys: Iterable[int]) -> dict[int, list[Entry]]:
    found: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry, key in zip(entries, keys, strict=True):
        found[key].append(entry)
    return dict(found)


def _rounded(grid: Iterable[int], family: int) -> list[int]:
    """Each length rounded down to the grid."""
    width = 32 if family == 4 else 128
    down = [0] * (width + 1)
    for length in grid:
        down[length:] = [length] * (width + 1 - length)
    return down


_LEVELS: Final = {family: [_rounded(grid, family) for grid in grids] for family, grids in _GRIDS.items()}
_MASKS: Final = {
    family: [(full := (1 << width) - 1) ^ (full >> length) for length in range(width + 1)]
    for family, width in ((4, 32), (6, 128))
}


def key_of(entry: Entry, down: Sequence[int], fine: bool, family: int) -> int:
    """The key of an entry's group, by lengths rounded as `down` says; `fine` looks at all of the transport header."""
    a, b = down[entry.source & 0xFF], down[entry.destination & 0xFF]
    kind = transport = 0
    protocol = entry.protocol
    if protocol >= 0:
        low = entry.ports >> 16
        if low == entry.ports & 0xFFFF:
            kind, transport = PROTOCOL | PORT, protocol << 32 | low
        low = entry.source_ports >> 16
        if low == entry.source_ports & 0xFFFF and (fine or not kind):
            kind |= PROTOCOL | SOURCE_PORT
            transport |= protocol << 32 | low << 16
        if fine and not kind:
            kind, transport = PROTOCOL, protocol << 32
    masks = _MASKS[family]
    seed = a << 11 | b << 3 | kind  # Tuple.seed
    source, destination = entry.source >> 8 & masks[a], entry.destination >> 8 & masks[b]
    return seed << 64 | hash_of(source, destination, transport, seed, family)


def masks_of(kind: Tuple, family: int) -> tuple[int, int, int]:
    """The bits of source, destination, and protocol << 32 | source port << 16 | destination port that a tuple is found by."""
    return (
        _MASKS[family][kind.source_length],
        _MASKS[family][kind.destination_length],
        (0xFF << 32 if kind.kind & PROTOCOL else 0)
        | (0xFFFF if kind.kind & PORT else 0)
        | (0xFFFF << 16 if kind.kind & SOURCE_PORT else 0),
    )


def hash_of(source: int, destination: int, transport: int, seed: int, family: int) -> int:
    """The hash that the program computes for a packet with these bits: 64 bits. See classify.h."""
    last = transport + (seed << 40)
    if family == 4:  # the same as below, without a call
        first = (source << 32 | destination) * _K1 & _M64
        found = ((first ^ first >> 32 ^ last >> 29 ^ last) * _K2) & _M64
        return found ^ found >> 32
    found = _scramble(_spread(source >> 64), source & _M64)
    found = _scramble(found, destination >> 64)
    found = _scramble(found, destination & _M64)
    return _scramble(found, last)


def _spread(a: int) -> int:
    a = a * _K1 & _M64
    return a ^ a >> 32


def _scramble(a: int, b: int) -> int:
    a = ((a ^ (b >> 29) ^ b) * _K2) & _M64
    return a ^ a >> 32


def heads(chains: Mapping[int, list[Entry]]) -> tuple[list[int], list[list[Entry]]]:
    """The table that leads from a hash to a chain, and the chains: place + 1 of the first entry beside an 8-bit tag.

    Keys of several groups may meet at one head; their chains are then one, in order, and where their tags differ it is 0.
    Several keys may lead to one chain, if it is one object.
    """
    size = 1 << max(2 * len(chains) - 1, 1).bit_length()
    met = [0] * size  # the number of the head's chain, from 1
    led: list[list[Entry]] = []
    tags: list[int] = []
    for key, chain in chains.items():
        at = key & size - 1
        tag = key >> 56 & 0xFF | 1
        number = met[at]
        if not number:
            led.append(chain)
            tags.append(tag)
            met[at] = len(led)
        else:
            led[number - 1] = sorted([*led[number - 1], *chain], key=_order)
            if tags[number - 1] != tag:
                tags[number - 1] = 0
    firsts = [0]
    places: dict[int, int] = {}  # by the chain's id: several heads may lead to one
    laid: list[list[Entry]] = []
    place = 1
    for tag, chain in zip(tags, led, strict=True):
        if (begins := places.get(id(chain))) is None:
            begins = places[id(chain)] = place
            laid.append(chain)
            place += len(chain)
        firsts.append(tag << 24 | begins)
    return [firsts[number] for number in met], laid
