"""Hypothesis strategies for firewall policies and packets, made so that packets fall on the corners of rules.

Values are drawn from small pools, and each packet field from the pool's edges (first, last, one beside), because a random
address or port would hardly ever meet a rule.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from hypothesis import strategies as st

from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.model import (
    Action,
    Direction,
    FirewallPolicy,
    Packet,
    PortRange,
    Prefix,
    Rule,
)

V4 = [
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "192.0.2.128/25",
    "198.51.100.0/31",
    "0.0.0.0/0",
    "128.0.0.0/1",
]
V6 = [
    "2001:db8::/32",
    "2001:db8:1::/48",
    "2001:db8:1:2::/64",
    "2001:db8:1:2::3/128",
    "::/0",
    "8000::/1",
    "2001:db8::/127",
]
PORTS: list[int | str] = [22, 53, 80, 443, "1024-65535", "8000-8100", "0-1023", 0, 65535, "53-54"]
INTERFACES = ["lb0", "lb1", "lb2"]
TCP, UDP, ICMP, ICMPV6, GRE = 6, 17, 1, 58, 47


@st.composite
def plain_rules(draw: st.DrawFn, index: int, sets: dict[str, list[str]], stateful: bool) -> dict[str, Any]:
    """One rule as plain values; always one that the parser takes."""
    rule: dict[str, Any] = {
        "name": f"rule-{index}",
        "direction": draw(st.sampled_from(["ingress", "egress"])),
        "action": draw(st.sampled_from(["accept", "drop"])),
    }
    family = draw(st.sampled_from([4, 6]))
    pool = V4 if family == 4 else V6
    usable = [
        f"@{name}"
        for name, held in sets.items()
        if not held or any((":" in p) == (family == 6) for p in held)
    ]
    for key in ("from", "to"):
        if draw(st.booleans()):
            rule[key] = draw(st.lists(st.sampled_from(pool + usable), min_size=1, max_size=3, unique=True))
    kind = draw(st.sampled_from(["any", "ports", "icmp", "other"]))
    if kind == "ports":
        rule["proto"] = draw(st.sampled_from(["tcp", "udp", ["tcp", "udp"]]))
        for key in ("ports", "source_ports"):
            if draw(st.booleans()):
                rule[key] = draw(st.lists(st.sampled_from(PORTS), min_size=1, max_size=3, unique=True))
    elif kind == "icmp":
        rule["proto"] = "icmp" if family == 4 else "icmpv6"
        if draw(st.booleans()):
            names = list(fields.ICMP_TYPES[fields.PROTOCOLS[rule["proto"]]])
            rule["icmp"] = draw(
                st.lists(st.sampled_from([*names, 8, "3/4", "128/0"]), min_size=1, max_size=3, unique_by=str)
            )
    elif kind == "other":
        rule["proto"] = draw(
            st.sampled_from(["gre", 47, ["tcp", "gre"], "icmp" if family == 4 else "icmpv6"])
        )
    if draw(st.integers(0, 3)) == 0:
        rule["iface"] = draw(st.lists(st.sampled_from(INTERFACES), min_size=1, max_size=2, unique=True))
    if stateful and draw(st.integers(0, 3)) == 0:
        rule["state"] = draw(st.lists(st.sampled_from(fields.STATES), min_size=1, max_size=2, unique=True))
    return rule


@st.composite
def plain_policies(draw: st.DrawFn, *, most: int = 12, stateful: bool = True) -> dict[str, Any]:
    """A policy as plain values."""
    names = draw(st.lists(st.sampled_from(["office", "web", "empty", "mixed"]), unique=True))
    sets = {
        name: []
        if name == "empty"
        else draw(st.lists(st.sampled_from(V4 + V6), min_size=1, max_size=4, unique=True))
        for name in names
    }
    count = draw(st.integers(0, most))
    return {
        "version": 1,
        "default": {side: draw(st.sampled_from(["accept", "drop"])) for side in ("ingress", "egress")},
        "sets": sets,
        "rules": [draw(plain_rules(index, sets, stateful)) for index in range(count)],
    }


def _edges(prefix: Prefix) -> list[int]:
    bits = 32 if prefix.family == 4 else 128
    last = prefix.address | ((1 << (bits - prefix.length)) - 1)
    return [n for n in (prefix.address, last, prefix.address - 1, last + 1) if 0 <= n < 1 << bits]


def _usable(family: int, number: int) -> bool:
    """Addresses that packets carry. A v4-mapped IPv6 address is one that no packet on a wire may have."""
    return family == 4 or number >> 32 != 0xFFFF


_POOL = {
    family: sorted({n for text in texts for n in _edges(fields.prefix(text)) if _usable(family, n)})
    for family, texts in ((4, V4), (6, V6))
}
_PORT_POOL = sorted(
    {
        n
        for p in PORTS
        for r in [fields.port(p)]
        for n in (r.low, r.high, r.low - 1, r.high + 1)
        if 0 <= n <= 65535
    }
)


def _address(family: int, number: int) -> str:
    return str(ipaddress.IPv4Address(number) if family == 4 else ipaddress.IPv6Address(number))


@st.composite
def packets(draw: st.DrawFn, *, stateful: bool = True) -> Packet:
    """A packet on the corners of what `plain_rules` draws from."""
    return anywhere(lambda values: draw(st.sampled_from(list(values))), stateful=stateful)


def anywhere(choose: Any, *, stateful: bool = True) -> Packet:
    """A packet on the corners of what `plain_rules` draws from; `choose(sequence)` picks."""
    family = choose([4, 6])
    protocol = choose([TCP, TCP, UDP, UDP, ICMP if family == 4 else ICMPV6, GRE])
    ported = protocol in (TCP, UDP)
    icmp = protocol in (ICMP, ICMPV6)
    kinds = sorted(
        {kind for kind, _ in fields.ICMP_TYPES.get(protocol, {"none": (0, None)}).values()} | {8, 3}
    )
    return Packet(
        direction=choose(list(Direction)),
        src=_address(family, choose(_POOL[family])),
        dst=_address(family, choose(_POOL[family])),
        protocol=protocol,
        sport=choose(_PORT_POOL) if ported else 0,
        dport=choose(_PORT_POOL) if ported else 0,
        icmp_type=choose(kinds) if icmp else 0,
        icmp_code=choose([0, 1, 3, 4]) if icmp else 0,
        iface=choose(["", *INTERFACES]),
        state=choose(fields.STATES) if stateful else "new",
    )


def on_corners(rule: Rule, policy: FirewallPolicy, choose: Any) -> Packet | None:
    """A packet on the corners of one rule; `choose(sequence)` picks. None for a rule whose addresses have no family in common.

    A side that only an empty set fills is taken for "any": such a rule must match nothing, least of all everything.
    """
    sources = [*rule.sources, *(p for name in rule.source_sets for p in policy.sets[name])]
    targets = [*rule.destinations, *(p for name in rule.destination_sets for p in policy.sets[name])]
    families = [
        f for f in (4, 6)
        if (not sources or any(p.family == f for p in sources)) and (not targets or any(p.family == f for p in targets))
    ]  # fmt: skip
    if not families:
        return None
    family = choose(families)

    def one(prefixes: list[Prefix]) -> str:
        fitting = [p for p in prefixes if p.family == family] or [Prefix(family, 0, 0)]
        edges = [n for n in _edges(choose(fitting)) if _usable(family, n)]
        return _address(family, choose(edges or [1]))

    def port(ranges: tuple[PortRange, ...]) -> int:
        if not ranges:
            return int(choose(_PORT_POOL))
        found = choose(ranges)
        return int(
            choose([n for n in (found.low, found.high, found.low - 1, found.high + 1) if 0 <= n <= 65535])
        )

    fitting = {ICMP, ICMPV6} - {ICMP if family == 4 else ICMPV6}
    protocol = choose([p for p in rule.protocols if p not in fitting] or [TCP, UDP])
    kind, code = choose(rule.icmp) if rule.icmp else (8, None)
    icmp = protocol in (ICMP, ICMPV6)
    ported = protocol in (TCP, UDP)
    return Packet(
        direction=rule.direction,
        src=one(sources),
        dst=one(targets),
        protocol=protocol,
        sport=port(rule.source_ports) if ported else 0,
        dport=port(rule.ports) if ported else 0,
        icmp_type=choose([kind, min(kind + 1, 255)]) if icmp else 0,
        icmp_code=(code if code is not None else choose([0, 1])) if icmp else 0,
        iface=choose([*rule.interfaces, ""]),
        state=choose([*sorted(rule.states), "new"]),
    )


def other(action: Action) -> Action:
    """The opposite verdict."""
    return Action.DROP if action is Action.ACCEPT else Action.ACCEPT


def meets_nothing(rule: Rule, policy: FirewallPolicy) -> bool:
    """Whether a side of the rule is filled by empty sets alone."""
    return any(
        names and not prefixes and not any(policy.sets[name] for name in names)
        for prefixes, names in ((rule.sources, rule.source_sets), (rule.destinations, rule.destination_sets))
    )
