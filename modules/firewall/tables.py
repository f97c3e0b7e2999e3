"""From numbers to the tuples that may hold an entry for them: the tables behind `struct fw_table`. Pure.

A table divides the numbers of one field into intervals with the same tuples. A root, indexed by the upper bits, leads to the
class of all numbers there or to a block, in which a binary search finds the interval. Roots are kept small on purpose: how
much of the cache a table takes costs more than one step of a search (measured by `make bench-datapath`).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

DIRECT: Final = 1 << 31
MAX_CLASSES: Final = 1 << 16
_MAX_ROOT: Final = 16  # bits
_FILL4: Final = (1 << 32) - 1
_HEAD: Final = struct.Struct("<IIIIQQ")

Intervals = Sequence[tuple[int, int]]  # (first number, tuples as bits), ascending, the first one from 0 on


class TooManyClasses(Exception):
    """More different sets of tuples than a class number holds: group the entries more coarsely."""


def of_prefixes(found: Mapping[int, int], width: int) -> Intervals:
    """Intervals of addresses of `width` bits. `found` has the tuples of each prefix, address << 8 | length."""
    starts: list[tuple[int, int]] = [(0, 0)]
    # where each prefix around the present one ends, and its tuples
    around: list[tuple[int, int]] = [(1 << width, 0)]
    end, covering = around[0]
    for prefix in sorted(found):
        address = prefix >> 8
        while end <= address:
            around.pop()
            starts.append((end, around[-1][1]))
            end, covering = around[-1]
        end, covering = address + (1 << (width - (prefix & 0xFF))), covering | found[prefix]
        around.append((end, covering))
        starts.append((address, covering))
    while len(around) > 1:
        end, _ = around.pop()
        starts.append((end, around[-1][1]))
    return _joined(starts, 1 << width)


def of_ranges(found: Mapping[int, int]) -> Intervals:
    """Intervals of ports. `found` has the tuples of each range, first << 16 | last."""
    begin: dict[int, list[int]] = {0: []}
    end: dict[int, list[int]] = {}
    for ports, tuples in found.items():
        begin.setdefault(ports >> 16, []).append(tuples)
        end.setdefault((ports & 0xFFFF) + 1, []).append(tuples)
    counts = [0] * 64  # of ranges around the present port, by tuple
    present = 0
    starts = []
    for at in sorted(begin.keys() | end.keys()):
        for change, ranges in ((1, begin), (-1, end)):
            for tuples in ranges.get(at, ()):
                while tuples:
                    bit = tuples & -tuples
                    tuples ^= bit
                    counts[bit.bit_length() - 1] += change
                    present = present | bit if counts[bit.bit_length() - 1] else present & ~bit
        starts.append((at, present))
    return _joined(starts, 1 << 16)


def _joined(starts: Iterable[tuple[int, int]], end: int) -> Intervals:
    """Of several starts at one number the last holds; what is beyond the end, or like its predecessor, goes."""
    found: list[tuple[int, int]] = []
    for start, tuples in starts:
        if start >= end:
            continue
        if found and found[-1][0] == start:
            found.pop()
        if not found or found[-1][1] != tuples:
            found.append((start, tuples))
    return found


class Table:
    """One table as bytes. The four parts go anywhere; `head` says where they are."""

    def __init__(self, root: array[int], shift: int, blocks: bytes, classes: bytes, base: int = 0) -> None:
        self.root = root.tobytes()
        self.blocks = blocks
        self.classes = classes
        self._shift, self._base, self._limit = shift, base, len(root) - 1

    def head(self, root: int, blocks: int, classes: int) -> bytes:
        """struct fw_table, given where the parts lie."""
        return _HEAD.pack(root, self._shift, blocks, classes, self._base, self._limit)


def narrow(intervals: Intervals, width: int) -> Table:
    """The table of numbers of up to 32 bits. Raises TooManyClasses."""
    bits = min(max(len(intervals).bit_length() - 1, 0), _MAX_ROOT, width)
    shift = width - bits
    classes, numbered = _classes(intervals)
    root = array("I")
    blocks = array("I")
    place, count = 1, len(intervals)
    present = numbered[0]
    while len(root) < 1 << bits:
        upto = (len(root) + 1) << shift
        first = place
        if place < count and intervals[place][0] == len(root) << shift:
            present = numbered[place]
            first = place = place + 1
        while place < count and intervals[place][0] < upto:
            place += 1
        if place == first:
            # nothing begins in this one, nor in any before the one where the next interval begins
            until = intervals[place][0] >> shift if place < count else 1 << bits
            root.extend(array("I", [DIRECT | present]) * (until - len(root)))
            continue
        steps = (place - first).bit_length()
        room = 1 << steps
        root.append(len(blocks) | steps << 26)
        inside = [intervals[i][0] for i in range(first, place)]
        blocks.extend(inside + [_FILL4] * (room - len(inside)))
        sorts = [present, *numbered[first:place]]
        sorts += sorts[-1:] * (room - len(sorts))
        if room == 1:  # pragma: no cover - a block holds at least one start
            sorts.append(sorts[-1])
        blocks.extend(low | high << 16 for low, high in zip(sorts[::2], sorts[1::2], strict=True))
        present = numbered[place - 1]
    return Table(root, shift, blocks.tobytes(), classes)


def wide(intervals: Intervals) -> Table:
    """The table of IPv6 addresses. The root begins where they do: most of the space is empty. Raises TooManyClasses."""
    classes, numbered = _classes(intervals)
    uppers = [start >> 64 for start, _ in intervals[1:]] or [0]
    base = uppers[0]
    bits = min(max(len(intervals).bit_length() - 1, 0), _MAX_ROOT)
    shift = max((uppers[-1] - base).bit_length() - bits, 0)
    root = array("I")
    blocks = bytearray()
    place, count = 1, len(intervals)
    present = numbered[0]
    last = ((uppers[-1] - base) >> shift) + 1
    while len(root) <= last:
        # place 0 is all that lies below the base
        begins = (base + ((len(root) - 1) << shift)) << 64 if root else 0
        upto = (base + (len(root) << shift)) << 64
        first = place
        if place < count and intervals[place][0] == begins:
            present = numbered[place]
            first = place = place + 1
        while place < count and intervals[place][0] < upto:
            place += 1
        if place == first:
            until = ((intervals[place][0] >> 64) - base >> shift) + 1 if place < count else last + 1
            root.extend(array("I", [DIRECT | present]) * max(until - len(root), 1))
            continue
        steps = (place - first).bit_length()
        room = 1 << steps
        root.append(len(blocks) >> 2 | steps << 26)
        for i in range(first, place):
            blocks += struct.pack("<QQ", intervals[i][0] >> 64, intervals[i][0] & (1 << 64) - 1)
        blocks += b"\xff" * 16 * (room - (place - first))
        sorts = [present, *numbered[first:place]]
        sorts += sorts[-1:] * (room - len(sorts))
        blocks += array("H", sorts).tobytes()
        blocks += bytes(-len(blocks) % 16)
        present = numbered[place - 1]
    return Table(root, shift, bytes(blocks), classes, base)


def _classes(intervals: Intervals) -> tuple[bytes, list[int]]:
    """The tuples of each class, and the class of each interval."""
    numbers: dict[int, int] = {}
    numbered = [numbers.setdefault(tuples, len(numbers)) for _, tuples in intervals]
    if len(numbers) > MAX_CLASSES:
        raise TooManyClasses
    return array("Q", numbers).tobytes(), numbered
