"""Sets of prefixes too many to be entries, and the tables that say whether an address is in one. Pure.

A set is the ascending list of addresses at which "in the set" changes, so an address is in it when an odd number of them is not
above it. A root, indexed by the upper bits, leads to the few that a binary search has to look at, and a filter spares most
addresses even that. See struct fw_set.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final, NamedTuple

from loopback.modules.firewall.prefixes import PrefixTable

_MAX_ROOT: Final = 16  # bits
#: From so many changes on the root has them all, and the changes shrink to their lower 16 bits. Memory is what a lookup among a
#: million prefixes costs: with 32 bits and a larger root it took twice as long.
_NARROW: Final = 1 << 13
#: Blocks of a filter, as a power of two: 512 KiB, which the second-level caches of today's processors hold. A million prefixes,
#: mostly single addresses, touch a fifth of so many blocks; the others are answered by one bit.
_MAX_BLOCKS: Final = 22
_HEAD: Final = struct.Struct("<IIIIIIQQ")
_M64: Final = (1 << 64) - 1


class SetTable(NamedTuple):
    """One set in one family. The three parts go anywhere; `head` says where they are."""

    root: bytes
    changes: bytes
    shift: int
    base: int
    limit: int
    filter: bytes = b""  # only a large set of IPv4 has one
    filter_shift: int = 0

    def head(self, root: int, changes: int, filter_: int) -> bytes:
        """struct fw_set, given where the parts lie."""
        narrow = bool(self.filter)
        return _HEAD.pack(
            root, changes, self.shift, narrow, filter_, self.filter_shift, self.base, self.limit
        )


def changes_of(keys: Iterable[int], width: int) -> list[int]:
    """Where membership changes. `keys` are address << 8 | length, ascending; what overlaps or touches is joined."""
    found: list[int] = []
    add = found.append
    ends = -1
    sizes = [1 << (width - length) for length in range(width + 1)]
    for key in keys:
        address = key >> 8
        if address > ends:
            add(ends)
            add(address)
            ends = address + sizes[key & 0xFF]
        else:
            end = address + sizes[key & 0xFF]
            if end > ends:
                ends = end
    if ends < 1 << width:
        add(ends)
    return found[1:]


def table4(changes: Sequence[int]) -> SetTable:
    """The table of IPv4 addresses. One that is narrow has a filter."""
    narrow = len(changes) >= _NARROW
    bits = 16 if narrow else max(len(changes).bit_length() - 3, 0)
    shift = 32 - bits
    packed = array("I", changes)
    root = array("I", [bisect_left(packed, place << shift) for place in range(1 << bits)])
    root.append(len(packed))
    # the lower half of each little-endian u32 is every second u16
    parts = array("H", packed.tobytes())[::2] if narrow else packed
    blocks = min(len(changes).bit_length() + 1, _MAX_BLOCKS) if narrow else 0
    filtered = _filter(changes, 32 - blocks) if narrow else b""
    return SetTable(root.tobytes(), parts.tobytes(), shift, 0, len(root) - 2, filtered, 32 - blocks)


def _filter(changes: Sequence[int], shift: int) -> bytes:
    """A bit for every 2^shift addresses, little-endian u32 by u32: 0 where none of them is in the set."""
    words = array("I", bytes(1 << 32 - shift >> 3))
    bit = [1 << place for place in range(32)]
    ends = iter(changes)
    for start, end in zip(ends, chain(ends, (1 << 32,)), strict=False):
        first, last = start >> shift, end - 1 >> shift
        words[first >> 5] |= bit[first & 31]
        if last != first:
            for block in range(first + 1, last + 1):
                words[block >> 5] |= bit[block & 31]
    return words.tobytes()


def table6(changes: Sequence[int]) -> SetTable:
    """The table of IPv6 addresses. The root begins where they do: most of the space is empty."""
    base = changes[0] >> 64 if changes else 0
    above = (changes[-1] >> 64) - base if changes else 0
    bits = min(max(len(changes).bit_length() - 3, 0), _MAX_ROOT)
    shift = max(above.bit_length() - bits, 0)
    last = (above >> shift) + 1
    # place 0 is all that lies below the base
    root = array("I", [0])
    root.extend(bisect_left(changes, (base + (place << shift)) << 64) for place in range(last))
    root.append(len(changes))
    packed = array("Q")
    for change in changes:
        packed.append(change >> 64)
        packed.append(change & _M64)
    return SetTable(root.tobytes(), packed.tobytes(), shift, base, last)


def tables_of(prefixes: PrefixTable) -> tuple[SetTable, SetTable]:
    """The tables of one set, IPv4 and IPv6."""
    return table4(changes_of(prefixes.keys4(), 32)), table6(changes_of(prefixes.keys6(), 128))
