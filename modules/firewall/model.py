"""A firewall policy as plain values: what the policy language produces and what the compiler and the oracle read.

Nothing here performs I/O. Addresses are unsigned integers in network order (an IPv4 address has 32 bits). Within a field
several values mean "any of them"; an empty field means "whatever it is"; a rule matches when every field does. The first
matching rule of a packet's direction decides; without one, the direction's default does.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Literal

import msgspec

from loopback.modules.firewall.prefixes import Prefix as Prefix
from loopback.modules.firewall.prefixes import PrefixTable as PrefixTable


class Direction(IntEnum):
    """Seen from the host: INGRESS arrives, EGRESS leaves."""

    INGRESS = 0
    EGRESS = 1


class Action(IntEnum):
    """What happens to a packet."""

    DROP = 0
    ACCEPT = 1


class PortRange(msgspec.Struct, frozen=True, order=True):
    """Ports from `low` to `high`, both included."""

    low: int
    high: int


class Limit(msgspec.Struct, frozen=True):
    """A token bucket: `rate` packets per second, `burst` packets at once, one bucket per rule or per source address."""

    rate: float
    burst: int
    per: Literal["rule", "source"]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule. `sources` and `source_sets` are one field (a source in either matches); destinations likewise.

    `protocols` are IP protocol numbers. `icmp` holds (type, code) pairs, a code of None meaning any. `states` holds words out
    of new, established, related, invalid. `log_sample` N reports one in N packets of this rule (0: never). `line` is
    where the rule stands in its source, 0 when unknown.
    """

    name: str
    direction: Direction
    sources: tuple[Prefix, ...] = ()
    source_sets: tuple[str, ...] = ()
    destinations: tuple[Prefix, ...] = ()
    destination_sets: tuple[str, ...] = ()
    protocols: tuple[int, ...] = ()
    ports: tuple[PortRange, ...] = ()
    source_ports: tuple[PortRange, ...] = ()
    icmp: tuple[tuple[int, int | None], ...] = ()
    states: frozenset[str] = frozenset()
    interfaces: tuple[str, ...] = ()
    action: Action
    log_sample: int = 0
    limit: Limit | None = None
    line: int = 0


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """A packet to judge. `tcp_flags` None means the usual first packet of its protocol (SYN, 0x02, for TCP)."""

    direction: Direction
    src: str
    dst: str
    protocol: int
    sport: int = 0
    dport: int = 0
    icmp_type: int = 0
    icmp_code: int = 0
    tcp_flags: int | None = None
    iface: str = ""
    state: str = "new"


class PacketTest(msgspec.Struct, frozen=True):
    """An assertion of the policy's author, run through the real program before every commit."""

    packet: Packet
    expect: Action
    line: int = 0


class FilledSet(msgspec.Struct, frozen=True, kw_only=True):
    """A set that is filled by the hosts with these labels, or by a pool: its bounds, and the prefixes that it always has."""

    labels: dict[str, str] = {}
    pool: str = ""
    within: tuple[Prefix, ...]
    max: int
    prefixes: PrefixTable = PrefixTable()


class FirewallPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A whole policy. `sets` maps a name to its prefixes: tables, as the parser makes them, or what `PrefixTable.of` takes.

    `filled` has those of them that others fill; until then they hold their own prefixes (see `filling`).
    """

    default: dict[Direction, Action]
    sets: Mapping[str, PrefixTable | tuple[Prefix, ...]] = {}
    rules: tuple[Rule, ...] = ()
    tests: tuple[PacketTest, ...] = ()
    filled: Mapping[str, FilledSet] = {}
