"""What a policy says of a packet, evaluated as plainly as possible: the measure that the real program is held to.

It looks at each rule in turn and compares each field; nothing is prepared, cached or reordered. Token buckets are taken to be
full, as in a dry run of the program: a limit never stops a rule here.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from loopback.modules.firewall.model import (
    Action,
    FirewallPolicy,
    Packet,
    PacketTest,
    PortRange,
    Prefix,
    Rule,
)
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS


class Judgement(NamedTuple):
    """A verdict, and the name of the rule that gave it; None for the default and for packets of a known flow."""

    verdict: Action
    rule: str | None


def judge(policy: FirewallPolicy, packet: Packet, *, flow_known: bool = False) -> Judgement:
    """Judge a packet by the first rule that matches it.

    `flow_known`: an earlier packet of its flow, in whichever direction, was accepted by this policy; then the packet is return
    traffic or a later packet, and passes without any rule being asked.
    """
    if flow_known:
        return Judgement(Action.ACCEPT, None)
    for rule in policy.rules:
        if matches(rule, packet, policy):
            return Judgement(rule.action, rule.name)
    return Judgement(policy.default[packet.direction], None)


def matches(rule: Rule, packet: Packet, policy: FirewallPolicy) -> bool:
    """Whether every field of the rule matches."""
    return (
        rule.direction == packet.direction
        and _address(packet.src, rule.sources, rule.source_sets, policy)
        and _address(packet.dst, rule.destinations, rule.destination_sets, policy)
        and (not rule.protocols or packet.protocol in rule.protocols)
        and _port(packet.dport, packet, rule.ports)
        and _port(packet.sport, packet, rule.source_ports)
        and _icmp(rule, packet)
        and (not rule.states or packet.state in rule.states)
        and (not rule.interfaces or packet.iface in rule.interfaces)
    )


def failing(policy: FirewallPolicy) -> list[tuple[PacketTest, Judgement]]:
    """The policy's own tests that do not hold, with what it says instead."""
    judged = ((test, judge(policy, test.packet)) for test in policy.tests)
    return [(test, judgement) for test, judgement in judged if judgement.verdict != test.expect]


def _address(text: str, prefixes: tuple[Prefix, ...], sets: tuple[str, ...], policy: FirewallPolicy) -> bool:
    if not prefixes and not sets:
        return True
    address = ipaddress.ip_address(text)
    return any(_inside(address, prefix) for prefix in prefixes) or any(
        _inside(address, prefix) for name in sets for prefix in policy.sets[name]
    )


def _inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address, prefix: Prefix) -> bool:
    if address.version != prefix.family:
        return False
    beyond = address.max_prefixlen - prefix.length
    return int(address) >> beyond == prefix.address >> beyond


def _port(port: int, packet: Packet, ranges: tuple[PortRange, ...]) -> bool:
    if not ranges:
        return True
    return packet.protocol in WITH_PORTS and any(r.low <= port <= r.high for r in ranges)


def _icmp(rule: Rule, packet: Packet) -> bool:
    if not rule.icmp:
        return True
    return packet.protocol in (ICMP, ICMPV6) and any(
        packet.icmp_type == kind and (code is None or packet.icmp_code == code) for kind, code in rule.icmp
    )
