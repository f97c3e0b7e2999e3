"""One rule of a policy in nftables' words."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable

from loopback.modules.firewall.model import FirewallPolicy, PortRange, Prefix, Rule
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, PROTOCOL_NAMES, TCP, UDP, address_text

SPELT_OUT = 64  # prefixes of a named set that are written into the rule instead


class Unfit(ValueError):
    """A policy that cannot be said in this form."""


def rule_matches(
    rule: Rule, policy: FirewallPolicy, family: int, interface: Callable[[str], str] = str
) -> list[str]:
    """The matches that say the rule for one family: none where it cannot match there, several for several ICMP types.

    `interface` names the device that stands for an interface. Raises Unfit for a limit per source.
    """
    word = "ip" if family == 4 else "ip6"
    parts = [f"meta protocol {word}"]
    for side, prefixes, sets in (
        ("saddr", rule.sources, rule.source_sets), ("daddr", rule.destinations, rule.destination_sets),
    ):  # fmt: skip
        if not prefixes and not sets:
            continue
        held = [
            p for p in (*prefixes, *(p for name in sets for p in policy.sets[name])) if p.family == family
        ]
        if not held:
            return []
        if any(not p.length for p in held):
            continue
        if len(held) > SPELT_OUT and not prefixes and len(sets) == 1:
            parts.append(f"{word} {side} @{set_name(sets[0], family)}")
        else:
            parts.append(f"{word} {side} {one_or_set(merged(held))}")
    if rule.protocols or not (rule.ports or rule.source_ports):
        parts += protocols_and_ports(rule.protocols, rule.source_ports, rule.ports)
    if rule.interfaces:
        names = [f'"{interface(name)}"' for name in rule.interfaces]
        parts.append(f"{'iifname' if not rule.direction else 'oifname'} {one_or_set(names)}")
    if rule.states:
        parts.append(f"ct state {{ {', '.join(sorted(rule.states))} }}")
    if rule.limit:
        if rule.limit.per == "source":
            raise Unfit(f"rule {rule.name!r} has a limit per source")
        parts.append(f"limit rate {max(1, round(rule.limit.rate))}/second burst {rule.limit.burst} packets")
    if not rule.icmp:
        return [" ".join(parts)]
    if rule.protocols[0] != (ICMP if family == 4 else ICMPV6):
        return []
    kind = "icmp" if family == 4 else "icmpv6"
    return [
        " ".join([*parts, f"{kind} type {number}", *([f"{kind} code {code}"] if code is not None else [])])
        for number, code in rule.icmp
    ]


def protocols_and_ports(
    protocols: tuple[int, ...], source_ports: tuple[PortRange, ...], ports: tuple[PortRange, ...]
) -> list[str]:
    """Matches for these three; ports come with protocols that have them."""
    word, parts = "th", []
    if protocols:
        if protocols in ((TCP,), (UDP,)) and (source_ports or ports):
            word = PROTOCOL_NAMES[protocols[0]]  # this asks for the protocol by itself
        else:
            parts.append(f"meta l4proto {one_or_set([str(p) for p in sorted(set(protocols))])}")
    for field, ranges in (("sport", source_ports), ("dport", ports)):
        if ranges:
            parts.append(f"{word} {field} {one_or_set(joined(ranges))}")
    return parts


def set_name(name: str, family: int) -> str:
    """A named set of a policy, as nft may call it."""
    return f"s{family}_" + "".join(letter if letter.isalnum() else f"_{ord(letter):x}_" for letter in name)


def one_or_set(values: list[str]) -> str:
    """One value, or several in braces."""
    return values[0] if len(values) == 1 else f"{{ {', '.join(values)} }}"


def merged(held: Iterable[Prefix]) -> list[str]:
    """Prefixes of one family without what others of them cover already: nft takes no overlaps."""
    chosen = list(held)
    kind = ipaddress.IPv4Network if chosen[0].family == 4 else ipaddress.IPv6Network
    return [str(n) for n in ipaddress.collapse_addresses(kind((p.address, p.length)) for p in chosen)]  # type: ignore[type-var]


def joined(ranges: Iterable[PortRange]) -> list[str]:
    """Port ranges without overlaps."""
    found: list[list[int]] = []
    for low, high in sorted((r.low, r.high) for r in ranges):
        if found and low <= found[-1][1] + 1:
            found[-1][1] = max(found[-1][1], high)
        else:
            found.append([low, high])
    return [between(low, high) for low, high in found]


def between(low: int, high: int) -> str:
    """A range of numbers."""
    return str(low) if low == high else f"{low}-{high}"


def addresses(family: int, low: int, high: int) -> str:
    """A range of addresses."""
    first = address_text(family, low)
    return first if low == high else f"{first}-{address_text(family, high)}"
