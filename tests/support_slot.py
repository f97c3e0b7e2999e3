"""A slot's bytes, read as classify.h reads them: written after the program, and knowing nothing of the compiler.

Everything is found by offsets through the structures of layout. It also counts what a packet costs: chains entered (probes)
and entries compared (scanned).
"""

from __future__ import annotations

import ctypes as ct
import hashlib
import ipaddress
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import pytest

from loopback.bpf import layout
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import oracle
from loopback.modules.firewall.compile import Compiled, Memory, compile_policy
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Packet, Rule
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS

M64 = (1 << 64) - 1
BIT_OF = {1 << place: place for place in range(64)}
T = TypeVar("T", bound=ct.Structure)


class Answer(NamedTuple):
    """What the program answers, and what it took."""

    action: Action
    order: int | None
    identity: int
    probes: int
    scanned: int


class Asked(NamedTuple):
    """A packet as the program has it in hand."""

    family: int
    source: int
    destination: int
    transport: int  # protocol << 32 | source port << 16 | destination port, or ICMP type and code
    flags: int


def asked(packet: Packet) -> Asked:
    """What parsing the packet gives."""
    source, destination = ipaddress.ip_address(packet.src), ipaddress.ip_address(packet.dst)
    transport, flags = packet.protocol << 32, 0
    if packet.protocol in WITH_PORTS:
        flags |= layout.HAS_PORTS
        transport |= packet.sport << 16 | packet.dport
    if packet.protocol == (ICMP if source.version == 4 else ICMPV6):
        flags |= layout.HAS_ICMP
        transport |= packet.icmp_type << 8 | packet.icmp_code
    return Asked(source.version, int(source), int(destination), transport, flags)


def scramble(a: int, b: int) -> int:
    """`scramble` of classify.h."""
    a = ((a ^ (b >> 29) ^ b) * 0x9E3779B97F4A7C15) & M64
    return a ^ a >> 32


def spread(a: int) -> int:
    """`spread` of classify.h."""
    a = a * 0xFF51AFD7ED558CCD & M64
    return a ^ a >> 32


class Reader:
    """One compiled policy."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.bytes = compiled.slot
        self.slot = layout.Slot.from_buffer_copy(compiled.slot)

    def classifier(self, direction: int, family: int) -> layout.Classifier:
        """That of one direction and family."""
        return self.slot.classifiers[direction][family == 6]

    def tuples(self, direction: int, family: int) -> list[layout.Tuple4 | layout.Tuple6]:
        """Its tuples, best first."""
        one = self.classifier(direction, family)
        kind = layout.Tuple4 if family == 4 else layout.Tuple6
        return [self._at(kind, one.tuple + n * ct.sizeof(kind)) for n in range(one.tuples)]

    def entries(self, direction: int, family: int) -> list[layout.Entry4 | layout.Entry6]:
        """All entries, as they lie."""
        one = self.classifier(direction, family)
        return [self._entry(one, family, n + 1) for n in range(one.count)]

    def heads(self, direction: int, family: int) -> list[int]:
        """The heads of its chains."""
        one = self.classifier(direction, family)
        if not one.tuples:
            return []
        return list(struct.unpack_from(f"<{one.heads_mask + 1}I", self.bytes, one.heads))

    def chain(self, direction: int, family: int, first: int) -> Iterator[layout.Entry4 | layout.Entry6]:
        """The entries of a chain that begins at entry `first`, counted from 1."""
        one = self.classifier(direction, family)
        while True:
            assert 1 <= first <= one.count, "a chain runs out of its classifier"
            entry = self._entry(one, family, first)
            yield entry
            if entry.match.flags & layout.LAST:
                return
            first += 1

    def rule(self, order: int) -> layout.Rule:
        """The record of a rule."""
        return self._at(layout.Rule, self.slot.rules + order * ct.sizeof(layout.Rule))

    def judge(self, packet: Packet) -> Answer:
        """The program's answer, token buckets taken to be full."""
        what = asked(packet)
        direction = int(packet.direction)
        one = self.classifier(direction, what.family)
        best, identity, flags, probes, scanned = layout.NO_RULE, layout.NO_RULE, 0, 0, 0
        starts = self._starts(one, what, direction)
        for best_of_tuple, first in starts:
            if best_of_tuple >= best:
                break
            probes += 1
            if not first:
                continue
            for entry in self.chain(direction, what.family, first):
                match = entry.match
                scanned += 1
                if match.order >= best:
                    break
                if entry_matches(entry, what) and (
                    not match.flags & layout.MORE
                    or (self._sets_hold(match, what) and self._record_holds(match.order, packet))
                ):
                    best, identity, flags = match.order, match.identity, match.flags
                    break
        if best == layout.NO_RULE:
            return Answer(Action(self.slot.defaults[direction]), None, identity, probes, scanned)
        verdict = Action.ACCEPT if flags & layout.ACCEPTS else Action.DROP
        return Answer(verdict, best, identity, probes, scanned)

    def _starts(self, one: layout.Classifier, what: Asked, direction: int) -> Iterator[tuple[int, int]]:
        """(best of the tuple, first entry + 1) in the order in which chains are entered."""
        if not one.tuples:
            if one.first:
                yield -1, one.first
            return
        tuples = self.tuples(direction, what.family)
        candidates = self.candidates(one, what)
        while candidates:
            bit = candidates & -candidates
            candidates ^= bit
            assert BIT_OF[bit] < one.tuples, "a tuple that is not there"
            kind = tuples[BIT_OF[bit]]
            hashed = self._hash(kind, what, self._classes(one, what))
            [head] = struct.unpack_from("<I", self.bytes, one.heads + (hashed & one.heads_mask) * 4)
            tag = head >> 24
            yield kind.best, head & 0xFFFFFF if not tag or tag == (hashed >> 56 | 1) else 0

    def candidates(self, one: layout.Classifier, what: Asked) -> int:
        """The tuples that can hold an entry for the packet."""
        [found] = struct.unpack_from("<Q", self.bytes, one.protocols + (what.transport >> 32) * 8)
        for field, number in ((0, what.source), (1, what.destination)):
            found &= table_says(self.bytes, one.fields[field], number, wide=what.family == 6)
        if what.family == 4 and not found & (found - 1):
            return int(found)  # one is asked in less time than the tables of ports are
        for field, number in ((2, what.transport & 0xFFFF), (3, what.transport >> 16 & 0xFFFF)):
            found &= table_says(self.bytes, one.fields[field], number, wide=False)
        return int(found)

    def _classes(self, one: layout.Classifier, what: Asked) -> int:
        beyond = 24 if what.family == 4 else 120
        table = self.bytes[one.classes : one.classes + 512]
        return table[what.source >> beyond] | table[256 + (what.destination >> beyond)] << 8

    @staticmethod
    def _hash(kind: layout.Tuple4 | layout.Tuple6, what: Asked, classes: int) -> int:
        classes &= kind.class_mask
        last = (what.transport & kind.transport_mask) + (kind.seed << 40) & M64
        if what.family == 4:
            addresses = (what.source & kind.source_mask) << 32 | what.destination & kind.destination_mask
            return scramble(spread(addresses | classes), last)
        found = scramble(
            spread(what.source >> 64 & kind.source_mask[0]), what.source & M64 & kind.source_mask[1]
        )
        found = scramble(found, what.destination >> 64 & kind.destination_mask[0])
        found = scramble(found, what.destination & M64 & kind.destination_mask[1] | classes)
        return scramble(found, last)

    def _sets_hold(self, match: layout.Match, what: Asked) -> bool:
        return all(
            not number or self.in_set(number, what.family, address)
            for number, address in (
                (match.source_set, what.source),
                (match.destination_set, what.destination),
            )
        )

    def _record_holds(self, order: int, packet: Packet) -> bool:
        rule = self.rule(order)
        if rule.states and not rule.states & layout.STATES[packet.state]:
            return False
        if rule.flags & layout.INTERFACES:
            known = self.compiled.interfaces if self.slot.flags & layout.USES_INTERFACES else ()
            if packet.iface not in known or not rule.interfaces >> known.index(packet.iface) & 1:
                return False
        return True

    def in_set(self, number: int, family: int, address: int) -> bool:
        """Whether an address is in a set."""
        head = self._at(layout.Set, self.slot.sets + (number * 2 + (family == 6)) * ct.sizeof(layout.Set))
        return set_says(self.bytes, head, address, wide=family == 6)

    def _entry(self, one: layout.Classifier, family: int, number: int) -> layout.Entry4 | layout.Entry6:
        kind = layout.Entry4 if family == 4 else layout.Entry6
        return self._at(kind, one.entries + (number - 1) * ct.sizeof(kind))

    def _at(self, kind: type[T], offset: int) -> T:
        assert offset + ct.sizeof(kind) <= len(self.bytes), "a structure runs out of the slot"
        return kind.from_buffer_copy(self.bytes, offset)


def set_says(whole: bytes, head: layout.Set, address: int, *, wide: bool) -> bool:
    """`in_set4` and `in_set6` of sets.h."""
    if wide:
        upper = address >> 64
        index = 0 if upper < head.base else min((upper - head.base >> head.shift) + 1, head.limit)
    else:
        index = address >> head.shift
    if head.narrow:
        block = address >> head.filter_shift
        [word] = struct.unpack_from("<I", whole, head.filter + (block >> 5) * 4)
        if not word >> (block & 31) & 1:
            return False
    place, end = struct.unpack_from("<II", whole, head.root + index * 4)
    count, rounds = end - place, 0
    while count:
        middle = (count + 1) >> 1
        if wide:
            upper, lower = struct.unpack_from("<QQ", whole, head.changes + (place + middle - 1) * 16)
            change = upper << 64 | lower
        elif head.narrow:
            [change] = struct.unpack_from("<H", whole, head.changes + (place + middle - 1) * 2)
        else:
            [change] = struct.unpack_from("<I", whole, head.changes + (place + middle - 1) * 4)
        if (address & 0xFFFF if head.narrow else address) < change:
            count = middle - 1
        else:
            count -= middle
            place += middle
        rounds += 1
    assert rounds <= 22, "more steps than the program makes"
    return bool(place & 1)


def table_says(whole: bytes, table: layout.Table, number: int, *, wide: bool) -> int:
    """`tuples4` and `tuples6` of fields.h."""
    if wide:
        upper = number >> 64
        index = 0 if upper < table.base else (upper - table.base >> table.shift) + 1
        index = min(index, table.limit)
    else:
        index = number >> table.shift
    [root] = struct.unpack_from("<I", whole, table.root + index * 4)
    if root & 1 << 31:
        kind = root & 0xFFFF
    else:
        steps, block, size = root >> 26, table.blocks + (root & 0x3FFFFFF) * 4, 16 if wide else 4
        assert steps <= 20, "more steps than the program makes"
        place, step = 0, 1 << steps
        for _ in range(steps):
            step >>= 1
            at = block + (place + step - 1) * size
            if wide:
                upper, lower = struct.unpack_from("<QQ", whole, at)
                start = upper << 64 | lower
            else:
                [start] = struct.unpack_from("<I", whole, at)
            place += step if start <= number else 0
        [kind] = struct.unpack_from("<H", whole, block + (size << steps) + place * 2)
    [found] = struct.unpack_from("<Q", whole, table.classes + kind * 8)
    return int(found)


def entry_matches(entry: layout.Entry4 | layout.Entry6, what: Asked) -> bool:
    """What an entry says of a packet."""
    match = entry.match
    if what.family == 4:
        own = (entry.source, entry.destination)
        beyond = (match.source_shift, match.destination_shift)
    else:
        own = tuple(half[0] << 64 | half[1] for half in (entry.source, entry.destination))
        beyond = (128 - match.source_shift, 128 - match.destination_shift)
    for address, wanted, shift in zip((what.source, what.destination), own, beyond, strict=True):
        if (address ^ wanted) >> shift:
            return False
    if (what.transport >> 32 ^ match.protocol) & match.protocol_mask or match.needs & ~what.flags:
        return False
    low, high = match.ports
    s_low, s_high = match.source_ports
    return low <= what.transport & 0xFFFF <= high and s_low <= what.transport >> 16 & 0xFFFF <= s_high


def agree(policy: FirewallPolicy, reader: Reader, packet: Packet) -> Answer:
    """Assert that slot and oracle say the same of a packet."""
    answer = reader.judge(packet)
    name = None if answer.order is None else reader.compiled.names[answer.order]
    assert (answer.action, name) == oracle.judge(policy, packet), packet
    return answer


# ── small policies ────────────────────────────────────────────────────────────────────────────────────────────────────────
DIGEST = hashlib.sha256(b"policy").digest()
CLOSED = {Direction.INGRESS: Action.DROP, Direction.EGRESS: Action.DROP}


def rule(name: str = "r", **given: Any) -> Rule:
    """A rule that accepts what comes in, but for what is given."""
    return Rule(**{"name": name, "direction": Direction.INGRESS, "action": Action.ACCEPT, **given})


def policy_of(*rules: Rule, **given: Any) -> FirewallPolicy:
    """A policy that drops what no rule accepts."""
    return FirewallPolicy(**{"default": CLOSED, "rules": rules, **given})


def compiled(policy: FirewallPolicy, memory: Memory | None = None) -> Compiled:
    """Rule n has counter 100 + n."""
    return compile_policy(policy, {r.name: 100 + at for at, r in enumerate(policy.rules)}, DIGEST, memory)


def refused(policy: FirewallPolicy) -> Refused:
    """The compiler's refusal, which says what to do next."""
    with pytest.raises(Refused) as caught:
        compiled(policy)
    assert caught.value.code is Code.POLICY_INVALID
    assert caught.value.next_step
    return caught.value
