"""A policy as the bytes of a slot: pure, and the same for the same policy.

A rule becomes one entry, or several with the same identity where its lists are longer than an entry holds; in the order
of the policy, so the first match stays the first. Every source or destination field of several prefixes is a numbered set, and
an address's sets are one bit mask, found by its longest prefix: that of a prefix holds the bits of all that cover it.
"""

from __future__ import annotations

import ctypes as ct
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from loopback.bpf import layout
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, PortRange, Prefix, Rule

DEFAULT_SAMPLE: Final = 1000  # one in so many packets that the default dropped is reported
MAX_PREFIXES: Final = 1_000_000  # of one slot, and of one family
SPELT_OUT: Final = 64  # prefixes of a group that may become one entry each when set numbers run out
_V4_MAPPED: Final = 0xFFFF << 32
_FULL: Final = (1 << 128) - 1
_NS: Final = 1_000_000_000

T = TypeVar("T")


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """A slot's content but for its epoch. Keys and values of the sets lie one after the other, for a batch update."""

    slot: bytes
    set_keys4: bytes
    set_values4: bytes
    set_keys6: bytes
    set_values6: bytes
    interfaces: tuple[str, ...]  # the bit of a name is its place
    names: tuple[str, ...]  # of rules, by order
    entries: int

    def with_epoch(self, epoch: int) -> bytes:
        """The slot's bytes for an epoch."""
        return epoch.to_bytes(4, "little") + self.slot[4:]


def assign(
    known: Mapping[str, int], names: Sequence[str], capacity: int = layout.MAX_COUNTERS
) -> dict[str, int]:
    """Counter slots by rule name: known names keep theirs, new ones get free ones, lowest first.

    Names that no rule has any more keep theirs as long as there is room. Raises Refused(POLICY_INVALID) beyond `capacity`.
    """
    if len(names) > capacity:
        raise Refused(
            Code.POLICY_INVALID,
            f"{len(names)} rules are more than the {capacity} counters",
            "join rules that differ only in their addresses into one with a set",
        )
    wanted = set(names)
    kept = dict(known)
    surplus = len(kept.keys() | wanted) - capacity
    for name in [n for n in kept if n not in wanted][: max(surplus, 0)]:
        del kept[name]
    used = set(kept.values())
    free = (slot for slot in range(capacity) if slot not in used)
    return kept | {name: next(free) for name in names if name not in kept}


def compile_policy(
    policy: FirewallPolicy, identities: Mapping[str, int], digest: bytes = bytes(32)
) -> Compiled:
    """Compile. `identities` has every rule's counter slot. Raises Refused(POLICY_INVALID) naming rule and field."""
    sets = _Sets(policy)
    interfaces = _interfaces(policy)
    entries: dict[Direction, list[layout.Rule]] = {Direction.INGRESS: [], Direction.EGRESS: []}
    for order, rule in enumerate(policy.rules):
        place = entries[rule.direction]
        # cut off: the lists of one rule can multiply to millions
        made = _entries(rule, order, identities[rule.name], sets, interfaces)
        place.extend(itertools.islice(made, layout.MAX_RULES + 1))
        if sum(map(len, entries.values())) > layout.MAX_RULES:
            raise Refused(
                Code.POLICY_INVALID,
                f"{_at(rule)}: with this rule the policy needs more than {layout.MAX_RULES} entries",
                "shorten the rules' lists of ports, protocols and types, or use fewer rules",
            )
    slot = layout.Slot()
    at = 0
    for direction, found in entries.items():
        slot.first[direction], slot.count[direction] = at, len(found)
        for entry in found:
            slot.rules[at] = entry
            at += 1
        slot.defaults[direction] = int(policy.default[direction])
    slot.default_sample = DEFAULT_SAMPLE
    slot.digest[:] = digest
    keys4, values4 = sets.table(4)
    keys6, values6 = sets.table(6)
    slot.flags = (
        (layout.USES_SETS4 if keys4 else 0)
        | (layout.USES_SETS6 if keys6 else 0)
        | (layout.USES_INTERFACES if interfaces else 0)
    )
    return Compiled(
        slot=bytes(slot),
        set_keys4=keys4,
        set_values4=values4,
        set_keys6=keys6,
        set_values6=values6,
        interfaces=interfaces,
        names=tuple(rule.name for rule in policy.rules),
        entries=at,
    )


def _interfaces(policy: FirewallPolicy) -> tuple[str, ...]:
    """Every interface that rules name, in the order of the policy."""
    found: dict[str, None] = {}
    for rule in policy.rules:
        found |= dict.fromkeys(rule.interfaces)
        if len(found) > layout.MAX_INTERFACES:
            raise Refused(
                Code.POLICY_INVALID,
                f"{_at(rule)}: iface: with this rule the policy names more than {layout.MAX_INTERFACES} interfaces",
                "leave iface out where any interface will do, or name fewer",
            )
    return tuple(found)


class _Sets:
    """Numbers for groups of prefixes, and the tables that tell an address its groups."""

    def __init__(self, policy: FirewallPolicy) -> None:
        self._named = policy.sets
        self._numbers: dict[tuple[frozenset[Prefix], frozenset[str]], int] = {}

    def number(self, prefixes: Iterable[Prefix], names: Iterable[str]) -> int | None:
        """The set that is their union; None when no number is left."""
        group = (frozenset(prefixes), frozenset(names))
        if group not in self._numbers:
            if len(self._numbers) == layout.MAX_SETS:
                return None
            self._numbers[group] = len(self._numbers) + 1
        return self._numbers[group]

    def prefixes(self, names: Iterable[str]) -> Iterable[Prefix]:
        """What named sets hold."""
        return itertools.chain.from_iterable(self._named[name] for name in names)

    def table(self, family: int) -> tuple[bytes, bytes]:
        """Keys and values of the family's trie, sorted. Raises Refused(POLICY_INVALID) over MAX_PREFIXES."""
        own: dict[tuple[int, int], int] = {}
        by_name: dict[str, int] = {}
        for (prefixes, names), number in self._numbers.items():
            for prefix in prefixes:
                if prefix.family == family:
                    key = (prefix.address, prefix.length)
                    own[key] = own.get(key, 0) | 1 << number
            for name in names:
                by_name[name] = by_name.get(name, 0) | 1 << number
        for name, bits in by_name.items():
            for prefix in self._named[name]:
                if prefix.family == family:
                    key = (prefix.address, prefix.length)
                    own[key] = own.get(key, 0) | bits
        if len(own) > MAX_PREFIXES:
            raise Refused(
                Code.POLICY_INVALID,
                f"sets: {len(own)} prefixes of IPv{family} are more than the {MAX_PREFIXES} allowed",
                "write wider prefixes",
            )
        width = 32 if family == 4 else 128
        keys, values = bytearray(), bytearray()
        covering: list[tuple[int, int]] = []  # last address and bits of each prefix around the present one
        for (address, length), bits in sorted(own.items()):
            while covering and covering[-1][0] < address:
                covering.pop()
            if covering:
                if not bits & ~covering[-1][1]:
                    continue  # it says nothing that its cover does not
                bits |= covering[-1][1]
            covering.append((address | ((1 << (width - length)) - 1), bits))
            keys += length.to_bytes(4, "little") + address.to_bytes(width // 8, "big")
            values += bits.to_bytes(8 * layout.SET_WORDS, "little")
        return bytes(keys), bytes(values)


def _entries(
    rule: Rule, order: int, identity: int, sets: _Sets, interfaces: tuple[str, ...]
) -> Iterable[layout.Rule]:
    """The entries of one rule."""
    sources = _address_field(rule, "from", rule.sources, rule.source_sets, sets)
    destinations = _address_field(rule, "to", rule.destinations, rule.destination_sets, sets)
    interval, tolerance, limit_flag = _limit(rule)
    bits = sum(1 << interfaces.index(name) for name in set(rule.interfaces))
    pairs = [pair for pair in itertools.product(sources, destinations) if _families(*pair)]
    for (source, destination), protocols, ports, source_ports, icmp in itertools.product(
        pairs,
        _chunks(rule.protocols, layout.RULE_PROTOCOLS),
        _chunks(_coalesced(rule.ports), layout.RULE_PORTS),
        _chunks(_coalesced(rule.source_ports), layout.RULE_SOURCE_PORTS),
        _chunks(rule.icmp, layout.RULE_ICMP),
    ):
        entry = layout.Rule(
            identity=identity,
            order=order,
            action=int(rule.action),
            families=_families(source, destination),
            states=sum(layout.STATES[word] for word in rule.states),
            flags=limit_flag | (layout.INTERFACES if bits else 0),
            interfaces=bits,
            limit_interval=interval,
            limit_tolerance=tolerance,
            log_sample=rule.log_sample,
            protocol_count=len(protocols),
            port_count=len(ports),
            source_port_count=len(source_ports),
            icmp_count=len(icmp),
        )
        for place, protocol in enumerate(_filled(protocols, layout.RULE_PROTOCOLS)):
            entry.protocols[place] = protocol
        for place, port in enumerate(_filled(ports, layout.RULE_PORTS)):
            entry.ports[place][0], entry.ports[place][1] = port.low, port.high
        for place, port in enumerate(_filled(source_ports, layout.RULE_SOURCE_PORTS)):
            entry.source_ports[place][0], entry.source_ports[place][1] = port.low, port.high
        for place, (kind, code) in enumerate(_filled(icmp, layout.RULE_ICMP)):
            entry.icmp[place][0], entry.icmp[place][1] = kind, layout.ANY_CODE if code is None else code
        if isinstance(source, Prefix):
            entry.flags |= layout.SOURCE_PREFIX
            _prefix(source, entry.source, entry.source_mask)
        elif source:
            entry.flags |= layout.SOURCE_SET
            entry.source_set = source
        if isinstance(destination, Prefix):
            entry.flags |= layout.DESTINATION_PREFIX
            _prefix(destination, entry.destination, entry.destination_mask)
        elif destination:
            entry.flags |= layout.DESTINATION_SET
            entry.destination_set = destination
        yield entry


def _families(*sides: Prefix | int) -> int:
    """The families that all of them allow; a set leaves it to its own table."""
    found = layout.IPV4 | layout.IPV6
    for side in sides:
        if isinstance(side, Prefix):
            found &= layout.IPV4 if side.family == 4 else layout.IPV6
    return found


def _address_field(
    rule: Rule, field: str, prefixes: tuple[Prefix, ...], names: tuple[str, ...], sets: _Sets
) -> Sequence[Prefix | int]:
    """What an entry compares: one prefix, the number of a set, or 0 for anything. Several mean one entry each."""
    if not prefixes and not names:
        return (0,)
    if len(prefixes) == 1 and not names:
        return prefixes
    number = sets.number(prefixes, names)
    if number is not None:
        return (number,)
    # Out of numbers: a short list can still be one entry per prefix.
    everything = sorted({*prefixes, *sets.prefixes(names)})
    if len(everything) > SPELT_OUT:
        raise Refused(
            Code.POLICY_INVALID,
            f"{_at(rule)}: {field}: the policy has more than {layout.MAX_SETS} different groups of prefixes,"
            f" and this one, of {len(everything)}, is too long to do without a number of its own",
            "let rules share sets: groups of the same sets and prefixes count once",
        )
    return everything


def _prefix(prefix: Prefix, address: ct.Array[ct.c_uint8], mask: ct.Array[ct.c_uint8]) -> None:
    """Write a prefix into an entry."""
    if prefix.family == 4:
        whole, length = _V4_MAPPED | prefix.address, 96 + prefix.length
    else:
        whole, length = prefix.address, prefix.length
    bits = _FULL ^ (_FULL >> length)
    address[:] = list((whole & bits).to_bytes(16, "big"))
    mask[:] = list(bits.to_bytes(16, "big"))


def _limit(rule: Rule) -> tuple[int, int, int]:
    """(ns between packets, tolerance in ns, flag)."""
    limit = rule.limit
    if limit is None:
        return 0, 0, 0
    if not math.isfinite(limit.rate) or limit.rate <= 0 or limit.burst < 1:
        raise Refused(Code.POLICY_INVALID, f"{_at(rule)}: limit: rate and burst must be positive")
    interval = max(1, round(_NS / limit.rate))
    tolerance = interval * (limit.burst - 1)
    if tolerance >= 1 << 62:
        raise Refused(
            Code.POLICY_INVALID,
            f"{_at(rule)}: limit: rate {limit.rate} and burst {limit.burst} take centuries",
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


def _chunks(values: tuple[T, ...], size: int) -> list[tuple[T, ...]]:
    """The list in pieces that an entry can hold; an empty one is one empty piece."""
    return [values[at : at + size] for at in range(0, len(values), size)] or [()]


def _filled(values: tuple[T, ...], size: int) -> tuple[T, ...]:
    """The program compares every place: fill up with the first."""
    return values + values[:1] * (size - len(values)) if values else ()


def _at(rule: Rule) -> str:
    return f"line {rule.line}: rule {rule.name!r}" if rule.line else f"rule {rule.name!r}"


__all__ = ["DEFAULT_SAMPLE", "Action", "Compiled", "assign", "compile_policy"]
