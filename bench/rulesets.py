"""Rule sets for tests and benches: the published ClassBench files as policies, and policies as the text that hosts read.

A line of the published format is `@source/len destination/len lo : hi lo : hi proto/mask flags/mask`; the order of lines is
their priority. What it means here:

* Direction is ingress; the first line that matches decides. Ports 0–65535 are any, and so is a protocol whose mask is 0.
* The flags column is left out of account, as the published trace generators do.
* Lines are about IPv4. So a line whose addresses are both 0.0.0.0/0 keeps one of them as a prefix: it is not about IPv6.
* A line with ports and any protocol is about the protocols that have ports, for no other packet has any.
* A line with ports and a protocol without them matches nothing and is left out. The published sets have neither.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, PortRange, Prefix, Rule
from loopback.modules.firewall.policy_fields import PROTOCOL_NAMES, WITH_PORTS, address_text, show

ROOT: Final = Path(__file__).resolve().parents[1]
PUBLISHED: Final = ("acl1_1k", "fw1_1k", "ipc1_1k", "acl1_10k", "fw1_10k", "ipc1_10k")
ANY_PORT: Final = PortRange(0, 65535)
_LINE: Final = re.compile(
    r"@([\d.]+)/(\d+)\s+([\d.]+)/(\d+)\s+(\d+)\s*:\s*(\d+)\s+(\d+)\s*:\s*(\d+)\s+0x([0-9a-fA-F]{2})/0x([0-9a-fA-F]{2})\b"
)
Actions = Literal["random", "accept", "drop"]


class Five(NamedTuple):
    """A rule over the five fields. `protocol` None is any; a port range of 0–65535 is any."""

    source: Prefix
    destination: Prefix
    source_ports: PortRange
    ports: PortRange
    protocol: int | None


class Bits:
    """Deterministic numbers, the same on every machine and Python: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""

    def __init__(self, seed: int) -> None:
        self._state = seed & 0xFFFFFFFFFFFFFFFF

    def next64(self) -> int:
        """64 bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return z ^ (z >> 31)

    def below(self, limit: int) -> int:
        """A number from 0 to limit − 1; its bias, limit ÷ 2⁶⁴, is below anything these tests see."""
        return (self.next64() * limit) >> 64

    def bits(self, count: int) -> int:
        """So many bits, at most 128."""
        return ((self.next64() << 64) | self.next64()) >> (128 - count)

    def chance(self, of_a_million: int) -> bool:
        """True in so many of a million cases."""
        return self.below(1_000_000) < of_a_million

    def shuffle(self, values: list[Any]) -> None:
        """Fisher and Yates, in place."""
        for at in range(len(values) - 1, 0, -1):
            other = self.below(at + 1)
            values[at], values[other] = values[other], values[at]


def folder() -> Path | None:
    """Where the published sets are: LOOPBACK_CLASSBENCH, else beside the repository. None, said on stderr, where not."""
    named = os.environ.get("LOOPBACK_CLASSBENCH")
    place = Path(named) if named else ROOT.parent / "shared" / "data" / "classbench"
    if place.is_dir():
        return place
    print(f"ClassBench: {place} does not exist, so nothing runs on the published sets", file=sys.stderr)
    return None


def published() -> dict[str, Path]:
    """The published sets that are there, by name."""
    place = folder()
    return {name: place / name for name in PUBLISHED if (place / name).is_file()} if place else {}


def read(path: Path) -> list[Five]:
    """The rules of a file. Raises OSError, and ValueError naming the line that is not in the format."""
    prefixes: dict[tuple[str, str], Prefix] = {}
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"{path}:{number}: not a ClassBench rule: {line[:80]!r}")
        a = match.groups()
        for host in ((a[0], a[1]), (a[2], a[3])):
            if host not in prefixes:
                prefixes[host] = _prefix(*host)
        low, high, dlow, dhigh = map(int, a[4:8])
        protocol = int(a[8], 16) if int(a[9], 16) else None
        found.append(
            Five(
                prefixes[a[0], a[1]],
                prefixes[a[2], a[3]],
                PortRange(low, high),
                PortRange(dlow, dhigh),
                protocol,
            )
        )
    return found


def _prefix(host: str, length: str) -> Prefix:
    number = 0
    for octet in host.split("."):
        number = number << 8 | int(octet)
    beyond = 32 - int(length)
    return Prefix(4, number >> beyond << beyond, int(length))


def policy(
    fives: Iterable[Five], *, default: Action = Action.DROP, actions: Actions = "random", seed: int = 1
) -> FirewallPolicy:
    """A policy of these rules, named r0, r1 … by their place among them; egress is accepted.

    `actions`: what they do, each drawn by the seed (half accept), or all alike.
    """
    source = Bits(seed)
    fixed = {"accept": Action.ACCEPT, "drop": Action.DROP}.get(actions)
    any_ports, any_protocol, ported = (), (), tuple(sorted(WITH_PORTS))
    rules = []
    for number, (src, dst, sport, dport, protocol) in enumerate(fives):
        action = Action(source.next64() >> 63) if fixed is None else fixed
        has_ports = sport != ANY_PORT or dport != ANY_PORT
        if has_ports and protocol is not None and protocol not in WITH_PORTS:
            continue
        rules.append(
            Rule(
                name=f"r{number}",
                direction=Direction.INGRESS,
                sources=(src,) if src.length else (),
                destinations=(dst,) if dst.length or not src.length else (),
                protocols=(protocol,) if protocol is not None else ported if has_ports else any_protocol,
                source_ports=(sport,) if sport != ANY_PORT else any_ports,
                ports=(dport,) if dport != ANY_PORT else any_ports,
                action=action,
            )
        )
    return FirewallPolicy(
        default={Direction.INGRESS: default, Direction.EGRESS: Action.ACCEPT}, rules=tuple(rules)
    )


def plain(found: FirewallPolicy) -> dict[str, Any]:
    """A policy as the plain values that the language is written in. Parsing its text gives the same policy, but for lines."""
    return {
        "version": 1,
        "default": {d.name.lower(): a.name.lower() for d, a in found.default.items()},
        "sets": {name: [show(p) for p in held] for name, held in found.sets.items()},
        "rules": [_plain_rule(rule) for rule in found.rules],
        "tests": [
            {
                "packet": {
                    "direction": t.packet.direction.name.lower(), "src": t.packet.src, "dst": t.packet.dst,
                    "proto": t.packet.protocol, "sport": t.packet.sport, "dport": t.packet.dport,
                    "icmp_type": t.packet.icmp_type, "icmp_code": t.packet.icmp_code, "tcp_flags": t.packet.tcp_flags,
                    "iface": t.packet.iface or None, "state": t.packet.state,
                },
                "expect": t.expect.name.lower(),
            }
            for t in found.tests
        ],
    }  # fmt: skip


def _plain_rule(rule: Rule) -> dict[str, Any]:
    said: dict[str, Any] = {"name": rule.name, "action": rule.action.name.lower()}
    if rule.direction is Direction.EGRESS:
        said["direction"] = "egress"
    for key, prefixes, sets in (
        ("from", rule.sources, rule.source_sets),
        ("to", rule.destinations, rule.destination_sets),
    ):
        if prefixes or sets:
            said[key] = [*map(show, prefixes), *(f"@{name}" for name in sets)]
    if rule.protocols:
        said["proto"] = [PROTOCOL_NAMES.get(p, p) for p in rule.protocols]
    for key, ranges in (("ports", rule.ports), ("source_ports", rule.source_ports)):
        if ranges:
            said[key] = [r.low if r.low == r.high else f"{r.low}-{r.high}" for r in ranges]
    if rule.icmp:
        said["icmp"] = [kind if code is None else f"{kind}/{code}" for kind, code in rule.icmp]
    if rule.states:
        said["state"] = sorted(rule.states)
    if rule.interfaces:
        said["iface"] = list(rule.interfaces)
    if rule.log_sample:
        said["log"] = {"sample": rule.log_sample}
    if rule.limit:
        said["limit"] = {"rate": rule.limit.rate, "burst": rule.limit.burst, "per": rule.limit.per}
    return said


def text(found: FirewallPolicy) -> bytes:
    """A policy as canonical JSON, our native form."""
    return policies.to_json(plain(found))


def simple(
    count: int, *, default: Action = Action.DROP, action: Action = Action.DROP, family: Literal[4, 6] = 4
) -> FirewallPolicy:
    """So many rules of a /24 source (IPv6: a /64) and one TCP port each; none matches a packet from 192.0.2.0/24."""
    rules = []
    for number in range(count):
        prefix = (
            Prefix(4, (10 << 24) + (number << 8), 24)
            if family == 4
            else Prefix(6, (0x20010DB8 << 96) + (number << 64), 64)
        )
        port = 1024 + number % 60000
        rules.append(
            Rule(
                name=f"r{number}", direction=Direction.INGRESS, sources=(prefix,), protocols=(6,),
                ports=(PortRange(port, port),), action=action,
            )
        )  # fmt: skip
    return FirewallPolicy(
        default={Direction.INGRESS: default, Direction.EGRESS: Action.ACCEPT}, rules=tuple(rules)
    )


def million(count: int = 1_000_000, *, seed: int = 1) -> list[Prefix]:
    """So many different, disjoint IPv4 prefixes of the lengths that deny lists have, mostly /32 and /24, sorted.

    Shares: 70 % /32, 22 % /24, the rest /23 down to /20.
    """
    source = Bits(seed)
    taken: set[tuple[int, int]] = set()  # every prefix chosen, as (length, number)
    found: list[Prefix] = []
    shares = ((20, 5_000), (21, 10_000), (22, 25_000), (23, 40_000), (24, 220_000))
    plan = [(length, count * share // 1_000_000) for length, share in shares]
    plan.append((32, count - sum(n for _, n in plan)))
    for length, wanted in plan:
        shorter = [other for other, _ in plan if other < length]
        made = 0
        while made < wanted:
            number = source.below(0xDF000000 - 0x01000000) + 0x01000000 >> (32 - length)
            if (length, number) in taken or any(
                (other, number >> (length - other)) in taken for other in shorter
            ):
                continue
            taken.add((length, number))
            found.append(Prefix(4, number << (32 - length), length))
            made += 1
    return sorted(found)


def describe(fives: Sequence[Five]) -> str:
    """One line about a rule set."""
    tuples = len({(f.source.length, f.destination.length) for f in fives})
    return f"{len(fives)} rules, {tuples} length tuples"


__all__ = [
    "ANY_PORT", "PUBLISHED", "Bits", "Five", "address_text", "describe", "folder", "million", "plain", "policy", "published",
    "read", "simple", "text",
]  # fmt: skip
