"""What a frame says, read as plainly as it can be said: the second opinion on the parser of the eBPF programs.

Written from the module's README and the RFCs (791, 8200, 4443, 3128, 3810, 6980), with slices and no cleverness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Prefix, Rule

Kind = Literal["parsed", "essential", "truncated", "unparsed"]
VLANS, MOST_VLANS = (0x8100, 0x88A8), 2
EXTENSIONS, MOST_EXTENSIONS = (0, 43, 44, 51, 60), 8
WITH_PORTS = (6, 17, 33, 132, 136)


class Said(NamedTuple):
    """What rules can ask of a packet; `icmp` is (type, code), `ports` (source, destination)."""

    family: int
    source: int
    destination: int
    protocol: int
    ports: tuple[int, int] | None = None
    icmp: tuple[int, int] | None = None


class Not(Exception):
    """The frame is something else than a packet that can be judged."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.kind = kind


def read(frame: bytes, *, network: bool = False) -> tuple[Kind, Said | None]:
    """What kind of frame it is, and what it says where it is a packet."""
    try:
        return "parsed", _frame(frame, network)
    except Not as reason:
        return reason.kind, None


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size])


def _need(data: bytes, size: int) -> None:
    if len(data) < size:
        raise Not("truncated")


def _frame(frame: bytes, network: bool) -> Said:
    if network:
        _need(frame, 1)
        kind, packet = {4: 0x0800, 6: 0x86DD}.get(frame[0] >> 4, 0), frame
    else:
        _need(frame, 14)
        kind, packet = _number(frame, 12, 2), frame[14:]
        for _ in range(MOST_VLANS):
            if kind in VLANS:
                _need(packet, 4)
                kind, packet = _number(packet, 2, 2), packet[4:]
    if kind == 0x0800:
        return _ipv4(packet)
    if kind == 0x86DD:
        return _ipv6(packet)
    raise Not("essential" if kind == 0x0806 else "unparsed")


def _ipv4(packet: bytes) -> Said:
    _need(packet, 20)
    header, total = (packet[0] & 15) * 4, _number(packet, 2, 2) or len(packet)
    if packet[0] >> 4 != 4 or header < 20 or total < header:
        raise Not("truncated")
    _need(packet, total)
    said = Said(4, _number(packet, 12, 4), _number(packet, 16, 4), packet[9])
    behind = _number(packet, 6, 2) & 0x1FFF
    if behind:
        if said.protocol == 6 and behind == 1:  # it would write over the flags of the first fragment
            raise Not("truncated")
        return said
    return _transport(said, packet[header:total], own=1, hop_limit=0)


def _ipv6(packet: bytes) -> Said:
    _need(packet, 40)
    if packet[0] >> 4 != 6:
        raise Not("truncated")
    length = _number(packet, 4, 2) or len(packet) - 40
    _need(packet, 40 + length)
    following, rest, first, later = packet[6], packet[40:], False, False
    left = length
    for _ in range(MOST_EXTENSIONS):
        if following not in EXTENSIONS or later:
            break
        _need(rest, 8)
        size = 8 if following == 44 else (rest[1] + 2) * 4 if following == 51 else (rest[1] + 1) * 8
        place = _number(rest, 2, 2) if following == 44 else 0
        first, later = first or place & 0xFFF9 == 1, place & 0xFFF8 != 0
        following, rest, left = rest[0], rest[size:], left - size
    if left < 0:
        raise Not("truncated")
    said = Said(6, _number(packet, 8, 16), _number(packet, 24, 16), following)
    if later:
        return said
    if following in EXTENSIONS:
        raise Not("unparsed")
    return _transport(said, rest[:left], own=58, hop_limit=0 if first else packet[7])


def _transport(said: Said, data: bytes, *, own: int, hop_limit: int) -> Said:
    if said.protocol in WITH_PORTS:
        _need(data, 20 if said.protocol == 6 else 8)
        return said._replace(ports=(_number(data, 0, 2), _number(data, 2, 2)))
    if said.protocol != own:
        return said
    _need(data, 8)
    kind, code = data[0], data[1]
    if own == 58:
        discovery = 133 <= kind <= 137 and code == 0 and hop_limit == 255
        near = said.source >> 118 == 0xFE80 >> 6 or said.source == 0
        listening = (130 <= kind <= 132 or kind == 143) and hop_limit == 1 and near
        if discovery or listening:
            raise Not("essential")
    return said._replace(icmp=(kind, code))


def judge(policy: FirewallPolicy, said: Said, direction: Direction) -> tuple[Action, int | None]:
    """The first rule that matches a packet of no known device and of a new flow, by its place."""
    for place, rule in enumerate(policy.rules):
        if rule.direction is direction and _matches(rule, said):
            return rule.action, place
    return policy.default[direction], None


def _matches(rule: Rule, said: Said) -> bool:
    return (
        _within(rule.sources, said.family, said.source)
        and _within(rule.destinations, said.family, said.destination)
        and (not rule.protocols or said.protocol in rule.protocols)
        and all(
            not ranges
            or (said.ports is not None and any(r.low <= said.ports[which] <= r.high for r in ranges))
            for which, ranges in enumerate((rule.source_ports, rule.ports))
        )
        and (
            not rule.icmp
            or (
                said.icmp is not None
                and any(said.icmp[0] == kind and code in (None, said.icmp[1]) for kind, code in rule.icmp)
            )
        )
    )


def _within(prefixes: Sequence[Prefix], family: int, address: int) -> bool:
    bits = 32 if family == 4 else 128
    return not prefixes or any(
        p.family == family and (address ^ p.address) >> (bits - p.length) == 0 for p in prefixes
    )
