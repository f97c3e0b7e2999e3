"""The bytes of a slot's parts: entries in their chains, the tables that lead to them, and sets. Pure.

See programs/firewall.h.
"""

from __future__ import annotations

import ctypes as ct
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loopback.bpf import layout
from loopback.modules.firewall import tables, tuples
from loopback.modules.firewall.classes import Known, told_apart
from loopback.modules.firewall.prefixes import PrefixTable
from loopback.modules.firewall.sets import SetTable, tables_of
from loopback.modules.firewall.tables import Table
from loopback.modules.firewall.tuples import Entry, Grouped

LINEAR: Final = 32  # entries that are one chain
_ALIGN: Final = 64  # a cache line
_TUPLE: Final = {4: struct.Struct("<IIQIII4x"), 6: struct.Struct("<QQQQQIII4x")}
_ENTRY: Final[Mapping[int, type[layout.Entry4 | layout.Entry6]]] = {4: layout.Entry4, 6: layout.Entry6}
_M64: Final = (1 << 64) - 1

KnownSets = dict[
    int, tuple[PrefixTable, tuple[SetTable, SetTable]]
]  # by the id of the prefixes, which are held


class KnownTables:
    """What the last policy's classifiers were made of: a part that would be the same is not made again."""

    def __init__(self) -> None:
        #: By direction, family and field: what its table says of each value, and the table.
        self.fields: dict[tuple[int, int, int], tuple[dict[int, int], Table]] = {}
        #: By direction and family.
        self.apart: dict[tuple[int, int], Known] = {}


class Parts:
    """What follows the head of a slot, each part at the beginning of a cache line."""

    def __init__(self, head: type[layout.Slot]) -> None:
        self._at = ct.sizeof(head)
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> int:
        """Its offset in the slot."""
        gap = -self._at % _ALIGN
        self._parts += (bytes(gap), part)
        self._at += gap + len(part)
        return self._at - len(part)

    def whole(self) -> bytes:
        """Everything behind the head."""
        return b"".join(self._parts)


def lay_entries(
    at: layout.Classifier, entries: list[Entry], whose: tuple[int, int], parts: Parts, known: KnownTables
) -> None:
    """Lay out the entries of one direction and family, which are `whose`."""
    family = whose[1]
    if not entries:
        return
    if len(entries) <= LINEAR:
        at.count = len(entries)
        at.first = 1
        at.entries = parts.add(_packed([entries], family))
        return
    grouped = tuples.group(entries, family)
    try:
        protocols, found = _tables(grouped, whose, known)
    except tables.TooManyClasses:
        # so few tuples have no more than MAX_CLASSES combinations
        grouped = tuples.group(entries, family, tuples.FEWEST)
        protocols, found = _tables(grouped, whose, known)
    known.apart[whose] = told_apart(grouped.chains, family, known.apart.get(whose))
    apart = known.apart[whose].found
    heads, chains = tuples.heads(apart.within(grouped.chains) if apart else grouped.chains)
    at.tuples = len(grouped.best)
    at.count = sum(map(len, chains))
    at.entries = parts.add(_packed(chains, family))
    packed = bytearray()
    for kind, best in grouped.best.items():
        *addresses, transport = tuples.masks_of(kind, family)
        halves = (
            addresses if family == 4 else [half for mask in addresses for half in (mask >> 64, mask & _M64)]
        )
        mask = 0xFFFF if apart and kind.seed in apart.seeds else 0
        packed += _TUPLE[family].pack(*halves, transport, best, kind.seed, mask)
    at.tuple = parts.add(bytes(packed))
    at.heads = parts.add(array("I", heads).tobytes())
    at.heads_mask = len(heads) - 1
    at.classes = parts.add(apart.table if apart else b"")
    at.protocols = parts.add(array("Q", protocols).tobytes())
    for place, table in enumerate(found):
        root, blocks, classes = parts.add(table.root), parts.add(table.blocks), parts.add(table.classes)
        at.fields[place] = layout.Table.from_buffer_copy(table.head(root, blocks, classes))


def _tables(grouped: Grouped, whose: tuple[int, int], known: KnownTables) -> tuple[list[int], list[Table]]:
    """The tuples of each protocol, and the four tables. Raises TooManyClasses."""
    by_tuple: dict[int, list[Entry]] = {kind.seed: [] for kind in grouped.best}
    for key, chain in grouped.chains.items():
        by_tuple[key >> 64] += chain
    protocols = [0] * 256
    everywhere = 0
    fields: tuple[dict[int, int], ...] = ({}, {}, {}, {})
    for place, these in enumerate(by_tuple.values()):
        bit = 1 << place
        for protocol in {entry.protocol for entry in these}:
            if protocol < 0:
                everywhere |= bit
            else:
                protocols[protocol] |= bit
        for found, values in zip(
            fields,
            (
                {entry.source for entry in these},
                {entry.destination for entry in these},
                {entry.ports for entry in these},
                {entry.source_ports for entry in these},
            ),
            strict=True,
        ):
            for value in values:
                found[value] = found.get(value, 0) | bit
    made = []
    for field, found in enumerate(fields):
        before = known.fields.get((*whose, field))
        if before is None or before[0] != found:
            before = known.fields[*whose, field] = (found, _table(field, whose[1], found))
        made.append(before[1])
    return [found | everywhere for found in protocols], made


def _table(field: int, family: int, found: Mapping[int, int]) -> Table:
    if field > 1:  # ports
        return tables.narrow(tables.of_ranges(found), 16)
    if family == 4:
        return tables.narrow(tables.of_prefixes(found, 32), 32)
    return tables.wide(tables.of_prefixes(found, 128))


def _packed(chains: Iterable[list[Entry]], family: int) -> bytes:
    """Entries chain by chain."""
    found = bytearray(b"".join([entry.packed for chain in chains for entry in chain]))
    kind = _ENTRY[family]
    size = ct.sizeof(kind)
    flags = kind.match.offset + layout.Match.flags.offset - size
    end = 0
    for chain in chains:
        end += size * len(chain)
        found[end + flags] |= layout.LAST
    return bytes(found)


def lay_sets(numbered: Sequence[PrefixTable], parts: Parts, known: KnownSets) -> tuple[int, KnownSets]:
    """Lay out every numbered set: the offset of their heads, and what is known now."""
    if not numbered:
        return 0, {}
    kept: KnownSets = {}
    heads = []
    for prefixes in (PrefixTable(), *numbered):  # number 0 is no set
        before = known.get(id(prefixes))
        if before is None or before[0] is not prefixes:
            before = prefixes, tables_of(prefixes)
        kept[id(prefixes)] = before
        heads += [
            one.head(parts.add(one.root), parts.add(one.changes), parts.add(one.filter)) for one in before[1]
        ]
    return parts.add(b"".join(heads)), kept
