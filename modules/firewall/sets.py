"""Sets of prefixes too many to be entries, and the tables that say whether an address is in one. Pure.

A set is the ascending list of addresses at which "in the set" changes, so an address is in it when an odd number of them is not
above it. A root, indexed by the upper bits, leads to the few that a binary search has to look at. See struct fw_set.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from loopback.modules.firewall.prefixes import PrefixTable

_MAX_ROOT: Final = 16  # bits
#: From so many changes on the root has them all, and the changes shrink to their lower 16 bits. Memory is what a lookup among a
#: million prefixes costs: with 32 bits and a larger root it took twice as long.
_NARROW: Final = 1 << 13
_HEAD: Final = struct.Struct("<IIIIQQ")
_M64: Final = (1 << 64) - 1


class SetTable(NamedTuple):
    """One set in one family. The two parts go anywhere; `head` says where they are."""

    root: bytes
    changes: bytes
    shift: int
    base: int
    limit: int
    narrow: bool = False

    def head(self, root: int, changes: int) -> bytes:
        """struct fw_set, given where the parts lie."""
        return _HEAD.pack(root, changes, self.shift, self.narrow, self.base, self.limit)


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
    """The table of IPv4 addresses."""
    narrow = len(changes) >= _NARROW
    bits = 16 if narrow else max(len(changes).bit_length() - 3, 0)
    shift = 32 - bits
    packed = array("I", changes)
    root = array("I", [bisect_left(packed, place << shift) for place in range(1 << bits)])
    root.append(len(packed))
    # the lower half of each little-endian u32 is every second u16
    parts = array("H", packed.tobytes())[::2] if narrow else packed
    return SetTable(root.tobytes(), parts.tobytes(), shift, 0, len(root) - 2, narrow)


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
