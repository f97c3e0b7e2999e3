"""A second plain evaluator, for many packets against many rules: field by field, which rules match, as one bit per rule.

It shares no code with the evaluator it stands in for, nor with the program: for each value of a packet's field it notes the
rules whose field matches, the packet's rules are the intersection over its fields, and the lowest of them decides.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loopback.modules.firewall.model import Action, FirewallPolicy, Packet, PortRange, Prefix

PORTED = frozenset({6, 17, 33, 132, 136})


class Bulk:
    """Judges packets of one policy, new connections all: `judge` gives verdict and index of the rule, None for the default."""

    def __init__(self, policy: FirewallPolicy) -> None:
        self._policy = policy
        self._size = len(policy.rules) // 8 + 1
        self._memory: dict[tuple[object, ...], int] = {}
        self._fields: dict[str, dict[Any, int]] = {}
        for field in ("protocols", "ports", "source_ports", "icmp", "direction", "states", "interfaces"):
            places: dict[Any, list[int]] = {}
            for at, rule in enumerate(policy.rules):
                places.setdefault(getattr(rule, field), []).append(at)
            self._fields[field] = {held: self._mask(found) for held, found in places.items()}
        self._ends = []
        for prefixes, sets in (("sources", "source_sets"), ("destinations", "destination_sets")):
            by_prefix: dict[tuple[int, int, int], list[int]] = {}
            anywhere: list[int] = []
            for at, rule in enumerate(policy.rules):
                held: list[Prefix] = [*getattr(rule, prefixes)]
                for name in getattr(rule, sets):
                    held += policy.sets[name]
                if not getattr(rule, prefixes) and not getattr(rule, sets):
                    anywhere.append(at)
                for p in held:
                    width = 32 if p.family == 4 else 128
                    by_prefix.setdefault((p.family, p.length, p.address >> (width - p.length)), []).append(at)
            lengths = {(family, length) for family, length, _ in by_prefix}
            self._ends.append((by_prefix, sorted(lengths), anywhere))

    def judge(self, packets: Iterable[Packet]) -> list[tuple[Action, int | None]]:
        """One after another."""
        return [self._one(packet) for packet in packets]

    def _one(self, p: Packet) -> tuple[Action, int | None]:
        ports = p.protocol in PORTED
        icmp = (p.icmp_type, p.icmp_code) if p.protocol in (1, 58) else None
        left = (
            self._end(0, p.src)
            & self._end(1, p.dst)
            & self._rules("protocols", p.protocol, lambda held: not held or p.protocol in held)
            & self._rules("ports", p.dport if ports else None, lambda held: _port(held, p.dport, ports))
            & self._rules(
                "source_ports", p.sport if ports else None, lambda held: _port(held, p.sport, ports)
            )
            & self._rules("icmp", icmp, lambda held: not held or any(_kind(pair, icmp) for pair in held))
            & self._rules("direction", p.direction, lambda held: held == p.direction)
            & self._rules("states", p.state, lambda held: not held or p.state in held)
            & self._rules("interfaces", p.iface, lambda held: not held or p.iface in held)
        )
        if not left:
            return self._policy.default[p.direction], None
        first = (left & -left).bit_length() - 1
        return self._policy.rules[first].action, first

    def _known(self, key: tuple[object, ...], make: Callable[[], int]) -> int:
        found = self._memory.get(key)
        if found is None:
            found = self._memory[key] = make()
        return found

    def _rules(self, field: str, value: object, holds: Callable[[Any], bool]) -> int:
        def make() -> int:
            found = 0
            for held, mask in self._fields[field].items():
                if holds(held):
                    found |= mask
            return found

        return self._known((field, value), make)

    def _mask(self, places: Iterable[int]) -> int:
        bits = bytearray(self._size)
        for at in places:
            bits[at >> 3] |= 1 << (at & 7)
        return int.from_bytes(bits, "little")

    def _end(self, side: int, text: str) -> int:
        address = ipaddress.ip_address(text)
        by_prefix, lengths, anywhere = self._ends[side]
        found = self._known((side,), lambda: self._mask(anywhere))
        for family, length in lengths:
            if family == address.version:
                key = (family, length, int(address) >> (address.max_prefixlen - length))
                if places := by_prefix.get(key):
                    found |= self._known((side, *key), lambda places=places: self._mask(places))  # type: ignore[misc]
        return found


def _port(ranges: Sequence[PortRange], port: int, ported: bool) -> bool:
    return not ranges or (ported and any(r.low <= port <= r.high for r in ranges))


def _kind(pair: tuple[int, int | None], icmp: tuple[int, int] | None) -> bool:
    return icmp is not None and pair[0] == icmp[0] and pair[1] in (None, icmp[1])
