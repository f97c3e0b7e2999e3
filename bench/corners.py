"""Packets for a policy, by seed: at the corners of its rules (first and last address and port, and just outside), and anywhere.

Two forms: `Raw` tuples, fast, for benches; and `Packet` model objects, for judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rulesets import Bits

from loopback.modules.firewall.model import Direction, FirewallPolicy, Packet, PortRange, Prefix, Rule
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, TCP, UDP, WITH_PORTS, address_text

OUTSIDE = 125_000  # in a million fields: those just outside what the rule says
GRE, ESP = 47, 50
ECHO = {ICMP: 8, ICMPV6: 128}


class Raw(NamedTuple):
    """A packet. Of ICMP `sport` is the type and `dport` the code; of other protocols without ports both are 0."""

    family: Literal[4, 6]
    src: int
    dst: int
    protocol: int
    sport: int
    dport: int


def packet(raw: Raw, direction: Direction = Direction.INGRESS, iface: str = "", state: str = "new") -> Packet:
    """The model object."""
    family, src, dst, protocol, one, other = raw
    src_text, dst_text = address_text(family, src), address_text(family, dst)
    if protocol in ECHO:
        return Packet(
            direction=direction, src=src_text, dst=dst_text, protocol=protocol, icmp_type=one, icmp_code=other,
            iface=iface, state=state,
        )  # fmt: skip
    return Packet(
        direction=direction, src=src_text, dst=dst_text, protocol=protocol, sport=one, dport=other, iface=iface,
        state=state,
    )  # fmt: skip


def raw_corners(policy: FirewallPolicy, count: int, seed: int = 1) -> Iterator[tuple[Rule, Raw]]:
    """So many packets at the corners of its rules, each with its rule: every rule in turn, in an order drawn by the seed.

    Each field of a packet is the first or last that its rule allows, in one of eight cases the one just outside; where the
    rule allows any, the value is random.
    """
    source = Bits(seed)
    rules = [rule for rule in policy.rules if _families(rule, policy)]
    order = list(range(len(rules)))
    source.shuffle(order)
    for number in range(count if rules else 0):
        rule = rules[order[number % len(rules)]]
        yield rule, _corner(rule, policy, source)


def raw_anywhere(count: int, seed: int = 1, family: Literal[4, 6] = 4) -> Iterator[Raw]:
    """So many packets with uniformly random fields: TCP, UDP, and one in eight of others. IPv6: inside 2000::/3."""
    source = Bits(seed)
    protocols = (TCP, UDP) * 7 + (ICMP if family == 4 else ICMPV6, GRE)
    for _ in range(count):
        protocol = protocols[source.below(16) % len(protocols)]
        yield Raw(family, _address(family, source), _address(family, source), *_rest(protocol, source))


def corners(policy: FirewallPolicy, count: int, seed: int = 1) -> list[Packet]:
    """The same as `raw_corners`, as model objects, with the direction, an interface and a state of their rules."""
    source = Bits(seed + 1)
    return [
        packet(
            raw,
            rule.direction,
            _one(("", *rule.interfaces), source),
            _one(("new", *sorted(rule.states)), source),
        )
        for rule, raw in raw_corners(policy, count, seed)
    ]


def anywhere(count: int, seed: int = 1, family: Literal[4, 6] = 4) -> list[Packet]:
    """The same as `raw_anywhere`, as model objects that arrive."""
    return [packet(raw) for raw in raw_anywhere(count, seed, family)]


def _one(values: Sequence[str], source: Bits) -> str:
    return values[source.below(len(values))]


def _families(rule: Rule, policy: FirewallPolicy) -> list[Literal[4, 6]]:
    found: list[Literal[4, 6]] = []
    for family in (4, 6):
        sides = (
            _held(rule.sources, rule.source_sets, policy),
            _held(rule.destinations, rule.destination_sets, policy),
        )
        if all(held is None or any(p.family == family for p in held) for held in sides) and (
            not rule.protocols or any(p != (ICMPV6 if family == 4 else ICMP) for p in rule.protocols)
        ):
            found.append(family)
    return found


def _held(
    prefixes: tuple[Prefix, ...], sets: tuple[str, ...], policy: FirewallPolicy
) -> Sequence[Prefix] | None:
    """Its prefixes; None for any."""
    if not sets:
        return prefixes or None
    return [*prefixes, *(p for name in sets for p in policy.sets[name])]


def _corner(rule: Rule, policy: FirewallPolicy, source: Bits) -> Raw:
    families = _families(rule, policy)
    family = families[source.below(len(families))]
    src = _edge(_held(rule.sources, rule.source_sets, policy), family, source)
    dst = _edge(_held(rule.destinations, rule.destination_sets, policy), family, source)
    foreign = ICMPV6 if family == 4 else ICMP
    fitting = [p for p in rule.protocols if p != foreign]
    if not fitting or source.chance(OUTSIDE):
        fitting = [TCP, TCP, UDP, UDP, ICMPV6 if family == 6 else ICMP, GRE]
    protocol = fitting[source.below(len(fitting))]
    if protocol in ECHO:
        if not rule.icmp:
            return Raw(family, src, dst, *_rest(protocol, source))
        kind, code = rule.icmp[source.below(len(rule.icmp))]
        beside = source.chance(OUTSIDE)
        return Raw(
            family,
            src,
            dst,
            protocol,
            min(kind + 1, 255) if beside else kind,
            source.below(4) if code is None else code,
        )
    if protocol not in WITH_PORTS:
        return Raw(family, src, dst, protocol, 0, 0)
    return Raw(family, src, dst, protocol, _port(rule.source_ports, source), _port(rule.ports, source))


def _rest(protocol: int, source: Bits) -> tuple[int, int, int]:
    if protocol in ECHO:
        return protocol, ECHO[protocol], 0
    if protocol not in WITH_PORTS:
        return protocol, 0, 0
    return protocol, source.below(65536), source.below(65536)


def _address(family: Literal[4, 6], source: Bits) -> int:
    return source.bits(32) if family == 4 else 1 << 125 | source.bits(125)


def _edge(held: Sequence[Prefix] | None, family: Literal[4, 6], source: Bits) -> int:
    fitting = [p for p in held if p.family == family] if held is not None else []
    if not fitting:
        return _address(family, source)
    chosen = fitting[source.below(len(fitting))]
    width = 32 if family == 4 else 128
    first, last = chosen.address, chosen.address | ((1 << (width - chosen.length)) - 1)
    if chosen.length and source.chance(OUTSIDE):
        return (first - 1 if source.below(2) else last + 1) & ((1 << width) - 1)
    return first if source.below(2) else last


def _port(ranges: tuple[PortRange, ...], source: Bits) -> int:
    if not ranges:
        return source.below(65536)
    chosen = ranges[source.below(len(ranges))]
    if source.chance(OUTSIDE):
        return (chosen.low - 1 if source.below(2) else chosen.high + 1) & 65535
    return chosen.low if source.below(2) else chosen.high
