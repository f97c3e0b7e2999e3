"""What a rule becomes: one entry per combination of its prefixes, protocols and port ranges, and a record. Pure.

Many prefixes of one field are a set, which an entry names, in the place of entries of their own.
"""

from __future__ import annotations

import ctypes as ct
import itertools
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

import msgspec

from loopback.bpf import layout
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.model import Action, FirewallPolicy, PortRange, Prefix, Rule
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS
from loopback.modules.firewall.prefixes import PrefixTable
from loopback.modules.firewall.tuples import Entry

MAX_ENTRIES: Final = 1 << 20  # of one policy
SPELT_OUT: Final = 64  # prefixes of one field that become entries of their own; more are a set
MAX_PRODUCT: Final = 1024  # entries of one rule, beyond which its longer list of prefixes becomes a set
NO_RECORD: Final = bytes(ct.sizeof(layout.Rule))  # of a rule whose entries say it all
_NS: Final = 1_000_000_000
_ANY: Final = (0, 65535)
_MATCH: Final = "IIHHHHBBBBBBBB"
_ENTRY: Final = {4: struct.Struct(f"<II{_MATCH}"), 6: struct.Struct(f"<QQQQ{_MATCH}8x")}
_WHOSE: Final = struct.Struct("<II")  # order and identity, where struct fw_match begins
_MATCH_AT: Final = {4: layout.Entry4.match.offset, 6: layout.Entry6.match.offset}
_M64: Final = (1 << 64) - 1


class Made(msgspec.Struct, frozen=True):
    """What one rule became at one place of a policy."""

    rule: Rule
    order: int
    identity: int
    entries4: list[Entry]
    entries6: list[Entry]
    record: bytes
    places: tuple[int, ...]  # bits of its interfaces
    alone: bool  # nothing else of the policy had a say in it but its interfaces' places

    def moved(self, order: int, identity: int) -> Made:
        """The same rule at another place."""
        parts = []
        for family, entries in ((4, self.entries4), (6, self.entries6)):
            at, whose = _MATCH_AT[family], _WHOSE.pack(order, identity)
            parts.append(
                [
                    Entry(
                        order, e.source, e.destination, e.protocol, e.ports, e.source_ports,
                        e.packed[:at] + whose + e.packed[at + _WHOSE.size :], e.keys,
                    )
                    for e in entries
                ]
            )  # fmt: skip
        return Made(self.rule, order, identity, parts[0], parts[1], self.record, self.places, self.alone)


def made_of(rule: Rule, order: int, identity: int, sets: Sets, places: Mapping[str, int]) -> Made:
    """What one rule becomes; its record is zeros when it has nothing to say."""
    return _plain(rule, order, identity) or _any(rule, order, identity, sets, places)


_ANYWHERE: Final = (0, 0, 0)  # a place, in both families


def _plain(rule: Rule, order: int, identity: int) -> Made | None:
    """The same as `_any` for a rule that is one entry in each family, as nearly all of a long policy are; else None."""
    sources, destinations, protocols = rule.sources, rule.destinations, rule.protocols
    ports, source_ports = rule.ports, rule.source_ports
    if (
        len(sources) > 1 or len(destinations) > 1 or len(protocols) > 1 or len(ports) > 1 or len(source_ports) > 1
        or rule.source_sets or rule.destination_sets or rule.icmp or rule.states or rule.interfaces
        or rule.log_sample or rule.limit is not None
    ):  # fmt: skip
        return None
    needs, protocol = 0, protocols[0] if protocols else -1
    low, high = s_low, s_high = _ANY
    if ports or source_ports:
        if protocol not in WITH_PORTS:
            return None  # any of them, or none
        needs = layout.HAS_PORTS
        if ports:
            low, high = ports[0].low, ports[0].high
        if source_ports:
            s_low, s_high = source_ports[0].low, source_ports[0].high
    transport = (protocol, low, high, s_low, s_high, needs)
    shown = layout.ACCEPTS if rule.action is Action.ACCEPT else 0
    source = destination = _ANYWHERE
    in4 = in6 = True
    if sources:
        one = sources[0]
        in4, in6 = one.family == 4, one.family == 6
        source = (one.address, one.length, 0)
    if destinations:
        one = destinations[0]
        in4, in6 = in4 and one.family == 4, in6 and one.family == 6
        destination = (one.address, one.length, 0)
    return Made(
        rule, order, identity,
        [_entry(4, order, identity, source, destination, transport, shown)] if in4 else [],
        [_entry(6, order, identity, source, destination, transport, shown)] if in6 else [],
        NO_RECORD, (), True,
    )  # fmt: skip


def _any(rule: Rule, order: int, identity: int, sets: Sets, places: Mapping[str, int]) -> Made:
    transports4, transports6 = _transports(rule)
    sources, destinations, alone = _sides(rule, max(len(transports4), len(transports6)), sets)
    interval, tolerance, flags = _limit(rule)
    bits = 0
    for name in rule.interfaces:
        bits |= places[name]
    if bits:
        flags |= layout.INTERFACES
    states = sum(layout.STATES[word] for word in rule.states)
    shown = (
        (layout.ACCEPTS if rule.action is Action.ACCEPT else 0)
        | (layout.MORE | layout.CONDITIONS if flags or states else 0)
        | (layout.SAMPLES if rule.log_sample else 0)
    )
    made: list[list[Entry]] = []
    family: Literal[4, 6]
    for family, transports in ((4, transports4), (6, transports6)):
        pairs = list(itertools.product(_of(sources, family, sets), _of(destinations, family, sets)))
        if len(pairs) * len(transports) > MAX_ENTRIES:
            raise too_many(rule)
        made.append(
            [
                _entry(family, order, identity, source, destination, transport, shown)
                for source, destination in pairs
                for transport in transports
            ]
        )
    record = layout.Rule(
        log_sample=rule.log_sample,
        states=states,
        flags=flags,
        interfaces=bits,
        limit_interval=interval,
        limit_tolerance=tolerance,
    )
    return Made(
        rule,
        order,
        identity,
        made[0],
        made[1],
        bytes(record),
        tuple(places[name] for name in rule.interfaces),
        alone,
    )


#: Protocol (-1: any), ports from and to, source ports from and to, packet flags that it needs.
Transport = tuple[int, int, int, int, int, int]


def _entry(
    family: int,
    order: int,
    identity: int,
    source: Place,
    destination: Place,
    transport: Transport,
    flags: int,
) -> Entry:
    """One entry."""
    (address, length, s_set), (d_address, d_length, d_set) = source, destination
    if s_set or d_set:
        flags |= layout.MORE
    protocol, low, high, s_low, s_high, needs = transport
    asked = (protocol, 255) if protocol >= 0 else (0, 0)
    said = (order, identity, low, high, s_low, s_high)
    if family == 4:
        packed = _ENTRY[4].pack(
            address, d_address, *said, 32 - length, 32 - d_length, *asked, needs, flags, s_set, d_set
        )
    else:
        packed = _ENTRY[6].pack(
            address >> 64, address & _M64, d_address >> 64, d_address & _M64,
            *said, length, d_length, *asked, needs, flags, s_set, d_set,
        )  # fmt: skip
    return Entry(
        order, address << 8 | length, d_address << 8 | d_length, protocol, low << 16 | high, s_low << 16 | s_high,
        packed, [],
    )  # fmt: skip


def _transports(rule: Rule) -> tuple[list[Transport], list[Transport]]:
    """What the rule says of transport headers, one by one, for IPv4 and for IPv6."""
    protocols: Iterable[int] = dict.fromkeys(rule.protocols)
    if rule.icmp:
        if rule.ports or rule.source_ports:
            return [], []  # nothing has both
        found = []
        for own in (ICMP, ICMPV6):
            fits = not rule.protocols or own in rule.protocols
            types = {
                (kind << 8 | (code or 0), kind << 8 | (255 if code is None else code))
                for kind, code in rule.icmp
            }
            found.append(
                [(own, low, high, *_ANY, layout.HAS_ICMP) for low, high in sorted(types)] if fits else []
            )
        return found[0], found[1]
    if rule.ports or rule.source_ports:
        wanted = sorted(WITH_PORTS) if not rule.protocols else [p for p in protocols if p in WITH_PORTS]
        ports = [(one.low, one.high) for one in _coalesced(rule.ports)] or [_ANY]
        source_ports = [(one.low, one.high) for one in _coalesced(rule.source_ports)] or [_ANY]
        if len(wanted) * len(ports) * len(source_ports) > MAX_ENTRIES:
            raise too_many(rule)
        every = [
            (protocol, *port, *source_port, layout.HAS_PORTS)
            for protocol in wanted
            for port in ports
            for source_port in source_ports
        ]
    else:
        every = [(protocol, *_ANY, *_ANY, 0) for protocol in (protocols if rule.protocols else (-1,))]
    return every, every


class Sets:
    """The sets of a policy that are not spelt out as entries, by number from 1."""

    def __init__(self, policy: FirewallPolicy) -> None:
        self.named = {name: PrefixTable.of(prefixes) for name, prefixes in policy.sets.items()}
        self.numbered: list[PrefixTable] = []
        self._numbers: dict[str | frozenset[Prefix], int] = {}

    def number(self, key: str | frozenset[Prefix], prefixes: PrefixTable) -> int | None:
        """The number of a set, which `key` tells from others; None when no number is left."""
        if key not in self._numbers:
            if len(self.numbered) == layout.MAX_SETS:
                return None
            self.numbered.append(prefixes)
            self._numbers[key] = len(self.numbered)
        return self._numbers[key]


class Side(NamedTuple):
    """What one address of a rule is compared with: alternatives. Without any it matches nothing, if `asked`, else anything."""

    sets: list[int]
    prefixes: tuple[Prefix, ...]
    asked: bool

    @property
    def ways(self) -> int:
        """Alternatives; anything is one."""
        return len(self.sets) + len(self.prefixes) if self.asked else 1


def _sides(rule: Rule, transports: int, sets: Sets) -> tuple[Side, Side, bool]:
    """What the rule's two addresses are compared with: few prefixes become entries of their own, many a set.

    And whether the rule alone decided that: what sets there are depends on the policy.
    """
    found = [
        _side(rule, "from", rule.sources, rule.source_sets, sets),
        _side(rule, "to", rule.destinations, rule.destination_sets, sets),
    ]
    alone = not (rule.source_sets or rule.destination_sets or found[0].sets or found[1].sets)
    if found[0].ways * found[1].ways * transports > MAX_PRODUCT:
        alone = False
        longer = 0 if found[0].ways >= found[1].ways else 1
        prefixes = found[longer].prefixes
        number = sets.number(frozenset(prefixes), PrefixTable.of(prefixes)) if len(prefixes) > 1 else None
        if number is not None:  # without a number left, they are short enough to be entries
            found[longer] = Side([*found[longer].sets, number], (), True)
    return found[0], found[1], alone


def _side(rule: Rule, word: str, prefixes: tuple[Prefix, ...], names: tuple[str, ...], sets: Sets) -> Side:
    if not prefixes and not names:
        return Side([], (), False)
    numbers: list[int | None] = []
    spelt = dict.fromkeys(prefixes)
    for name in dict.fromkeys(names):
        if len(sets.named[name]) <= SPELT_OUT:
            spelt |= dict.fromkeys(sets.named[name])
        else:
            numbers.append(sets.number(name, sets.named[name]))
    left = tuple(spelt)
    if len(left) > SPELT_OUT:
        numbers.append(sets.number(frozenset(left), PrefixTable.of(left)))
        left = ()
    found = [number for number in numbers if number is not None]
    if len(found) < len(numbers):
        raise RuleRefused(
            rule,
            word,
            f"the policy has more than {layout.MAX_SETS} sets or lists of over {SPELT_OUT} prefixes",
            "let rules share sets: each counts once",
        )
    return Side(found, left, True)


#: Address, length, and the number of a set or 0.
Place = tuple[int, int, int]


def _of(side: Side, family: Literal[4, 6], sets: Sets) -> list[Place]:
    """The alternatives of a family."""
    if not side.asked:
        return [(0, 0, 0)]
    return [(0, 0, number) for number in side.sets if family in sets.numbered[number - 1].families] + [
        (one.address, one.length, 0) for one in side.prefixes if one.family == family
    ]


def _limit(rule: Rule) -> tuple[int, int, int]:
    """(ns between packets, tolerance in ns, flag)."""
    limit = rule.limit
    if limit is None:
        return 0, 0, 0
    if not math.isfinite(limit.rate) or limit.rate <= 0 or limit.burst < 1:
        raise RuleRefused(rule, "limit", "rate and burst must be positive")
    interval = max(1, round(_NS / limit.rate))
    tolerance = interval * (limit.burst - 1)
    if tolerance >= 1 << 62:
        raise RuleRefused(
            rule,
            "limit",
            f"rate {limit.rate} and burst {limit.burst} take centuries",
            "write a smaller burst",
        )
    return interval, tolerance, layout.LIMIT_SOURCE if limit.per == "source" else layout.LIMIT_RULE


def _coalesced(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """The same ports in the fewest ranges."""
    found: list[PortRange] = []
    for part in sorted(ranges):
        if found and part.low <= found[-1].high + 1:
            found[-1] = PortRange(found[-1].low, max(found[-1].high, part.high))
        else:
            found.append(part)
    return tuple(found)


class RuleRefused(Refused):
    """A rule for which the programs have no room or no meaning, with its `field`, empty where it is the rule as a whole."""

    def __init__(self, rule: Rule, field: str, what: str, hint: str = "") -> None:
        super().__init__(Code.POLICY_INVALID, f"{place_of(rule)}: {field}{': ' * bool(field)}{what}", hint)
        self.rule, self.field, self.what = rule, field, what


def too_many(rule: Rule) -> Refused:
    """What a rule is told with which a policy has more than MAX_ENTRIES."""
    return RuleRefused(
        rule,
        "",
        f"with this rule the policy needs more than {MAX_ENTRIES} entries",
        "shorten the rules' lists of ports, protocols and types, or use fewer rules",
    )


def place_of(rule: Rule) -> str:
    """Line and name of a rule, as messages begin."""
    return f"line {rule.line}: rule {rule.name!r}" if rule.line else f"rule {rule.name!r}"
