"""What the programs counted, added up over CPUs."""

from __future__ import annotations

import ctypes as ct
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loopback.bpf import layout, libbpf
from loopback.bpf.objects import Map
from loopback.modules.firewall.model import Action, Direction

#: Counters of struct fw_totals that stand by themselves.
_PLAIN: Final = (
    "flows_created", "flows_failed", "flows_evicted", "revalidated", "past_deadline", "events_lost",
)  # fmt: skip


def of_rules(maps: Sequence[Map], identities: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(packets, bytes) by rule name. `maps` are the counters in use and those of smaller sets, which lack the last slots."""
    cpus = libbpf.possible_cpus()
    size = ct.sizeof(layout.Counter)
    found = {}
    for name, identity in identities.items():
        key = struct.pack("=I", identity)
        data = b"".join(one.lookup(key, size * cpus) or b"" for one in maps)
        each = [layout.Counter.from_buffer_copy(data, at) for at in range(0, len(data), size)]
        found[name] = (sum(c.packets for c in each), sum(c.bytes for c in each))
    return found


def forget(maps: Sequence[Map], slots: Iterable[int]) -> None:
    """Have these counter slots begin at nothing. Raises Refused."""
    nothing = bytes(ct.sizeof(layout.Counter) * libbpf.possible_cpus())
    for slot in slots:
        for one in maps:
            if slot < one.max_entries:
                one.update(struct.pack("=I", slot), nothing)


def totals(one: Map) -> dict[str, int]:
    """Packets by `direction.reason.verdict`, by `slot.<n>.<verdict>`, and the plain counters."""
    size = ct.sizeof(layout.Totals)
    data = one.lookup(bytes(4), size * libbpf.possible_cpus()) or b""
    found: dict[str, int] = {}
    for at in range(0, len(data), size):
        part = layout.Totals.from_buffer_copy(data, at)
        for direction in Direction:
            for place, reason in enumerate(layout.REASONS):
                for action in Action:
                    name = f"{direction.name.lower()}.{reason}.{action.name.lower()}"
                    found[name] = found.get(name, 0) + part.packets[direction][place][action]
        for slot in range(layout.SLOTS):
            for action in Action:
                name = f"slot.{slot}.{action.name.lower()}"
                found[name] = found.get(name, 0) + part.by_slot[slot][action]
        for name in _PLAIN:
            found[name] = found.get(name, 0) + getattr(part, name)
    return found
