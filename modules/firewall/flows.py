"""The connection table as user space sees it: flows as values, and which of them a staged policy would judge otherwise.

The table is shared memory that packets write to at the same time; programs/table.h says how an entry is read whole.
"""

from __future__ import annotations

import mmap
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from loopback.bpf import layout
from loopback.modules.firewall.model import Action, Direction, Packet
from loopback.modules.firewall.packets import Verdict

_ENTRY: Final = struct.Struct("=4QHHBB2xQIIBBBBI8IQB23x")  # struct fw_flow
_SEQUENCE: Final = layout.Flow.sequence.offset
_TRIES: Final = 1000  # at an entry that is being written, which takes nanoseconds
_ICMP: Final = (1, 58)


class Side(msgspec.Struct, frozen=True):
    """What one hook direction last said about a flow's first packet: the epochs in which a policy allowed and denied it (0:
    never), the rule that decided (None: the default), and the device's number."""

    allowed: int
    denied: int
    rule: str | None
    ifindex: int


class Flow(msgspec.Struct, frozen=True):
    """A live flow, named by the packet that began it. ICMP has its identifier in both ports.

    `direction` is that of the hook that saw it first, `stage` one of layout.FLOW_STAGES, `proof` of layout.FLOW_PROOFS; ages in
    seconds, since the first and the last packet (the last is noted once a second).
    """

    src: str
    dst: str
    protocol: int
    sport: int
    dport: int
    icmp_type: int
    direction: Direction
    stage: str
    proof: str
    age_s: float
    idle_s: float
    sides: dict[Direction, Side]


class Change(msgspec.Struct, frozen=True):
    """Flows that one rule judges now and another would judge otherwise; None is the default."""

    direction: Direction
    before: Action
    rule_before: str | None
    after: Action
    rule_after: str | None
    flows: tuple[Flow, ...]


def read(
    tags: memoryview, entries: memoryview, now: int, rate: int, names: Mapping[int, str]
) -> Iterator[Flow]:
    """The live flows of a table. `now` in jiffies, of which there are `rate` in a second; `names` are rules by counter slot."""
    for place, tag in enumerate(tags.cast("H")):
        if not tag:
            continue
        data = _entry(entries, place * _ENTRY.size)
        if data is None:
            continue
        flow = _flow(data, now, rate, names)
        if flow is not None:
            yield flow


def at_key(key: bytes, entries: memoryview, now: int, rate: int, names: Mapping[int, str]) -> Flow | None:
    """The live flow with a key, as it stands in the table (struct fw_flow_key); None where there is none."""
    at = -1
    while (at := _find(entries, key, at + 1)) >= 0:
        if at % _ENTRY.size == 0 and (data := _entry(entries, at)) is not None and data.startswith(key):
            return _flow(data, now, rate, names)
    return None


def _find(entries: memoryview, key: bytes, start: int) -> int:
    table = entries.obj
    assert isinstance(table, mmap.mmap)
    return table.find(key, start)


def _flow(data: bytes, now: int, rate: int, names: Mapping[int, str]) -> Flow | None:
    (
        low0, low1, high0, high1, low_port, high_port, protocol, family,
        seen, _sequence, life, swapped, direction, stage, proof, _number, *sides, born, icmp_type,
    ) = _ENTRY.unpack(data)  # fmt: skip
    idle = max(now - seen, 0)
    if idle > life:
        return None
    low, high = (_address(low0, low1, family), low_port), (_address(high0, high1, family), high_port)
    (src, sport), (dst, dport) = (high, low) if swapped else (low, high)
    return Flow(
        src=src,
        dst=dst,
        protocol=protocol,
        sport=sport,
        dport=dport,
        icmp_type=icmp_type if protocol in _ICMP else 0,
        direction=Direction(direction),
        stage=layout.FLOW_STAGES[stage],
        proof=layout.FLOW_PROOFS[proof],
        age_s=max(now - born, 0) / rate,
        idle_s=idle / rate,
        sides={
            one: Side(sides[4 * one], sides[4 * one + 1], names.get(sides[4 * one + 2]), sides[4 * one + 3])
            for one in Direction
            if sides[4 * one]
        },
    )


def _entry(entries: memoryview, at: int) -> bytes | None:
    """An entry as it was at one moment; None where somebody does not stop writing to it."""
    number = slice(at + _SEQUENCE, at + _SEQUENCE + 4)
    for _ in range(_TRIES):
        before = bytes(entries[number])
        data = bytes(entries[at : at + _ENTRY.size])
        if not int.from_bytes(before, sys.byteorder) & 1 and before == bytes(entries[number]):
            return data
    return None


def _address(upper: int, lower: int, family: int) -> str:
    if family == 4:
        return socket.inet_ntop(socket.AF_INET, struct.pack(">I", lower & 0xFFFFFFFF))
    return socket.inet_ntop(socket.AF_INET6, struct.pack(">QQ", upper, lower))


def changes(
    flows: Iterable[Flow],
    epoch: int,
    devices: Mapping[int, str],
    now: Callable[[Sequence[Packet]], list[Verdict]],
    then: Callable[[Sequence[Packet]], list[Verdict]],
) -> list[Change]:
    """Which flows would change their verdict, by rules, the most flows first.

    `epoch` is the one in force; `now` and `then` ask the policies in force and staged about packets. A flow that was not judged
    again since the last change of policy is judged now, as its next packet would be.
    """
    asked = [(flow, direction, side) for flow in flows for direction, side in flow.sides.items()]
    packets = [original(flow, direction, devices.get(side.ifindex, "")) for flow, direction, side in asked]
    stale = [place for place, (_, _, side) in enumerate(asked) if epoch not in (side.allowed, side.denied)]
    judged = dict(zip(stale, now([packets[place] for place in stale]), strict=True))
    found: dict[tuple[Direction, Action, str | None, Action, str | None], list[Flow]] = {}
    for place, ((flow, direction, side), after) in enumerate(zip(asked, then(packets), strict=True)):
        if place in judged:
            before, rule = judged[place].action, judged[place].rule
        else:
            before, rule = Action.ACCEPT if side.allowed == epoch else Action.DROP, side.rule
        if before is not after.action:
            found.setdefault((direction, before, rule, after.action, after.rule), []).append(flow)
    grouped = [Change(*key, flows=tuple(those)) for key, those in found.items()]
    return sorted(grouped, key=lambda change: len(change.flows), reverse=True)


def original(flow: Flow, direction: Direction, device: str) -> Packet:
    """The packet that began a flow, as a hook judges it again after a change of policy."""
    return Packet(
        direction=direction,
        src=flow.src,
        dst=flow.dst,
        protocol=flow.protocol,
        sport=flow.sport,
        dport=flow.dport,
        icmp_type=flow.icmp_type,
        iface=device,
    )
