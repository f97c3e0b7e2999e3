"""A policy as the bytes of a slot: pure, and the same for the same policy.

A rule becomes entries with one identity, in the order of the policy, so the first match stays the first; what entries cannot
say (states, interfaces, limits) stands in the rule's record. See entries.py for rules, tuples.py for how entries are found,
and classifier.py for the bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from loopback.bpf import layout
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import classifier
from loopback.modules.firewall.classifier import KnownSets, KnownTables, Parts
from loopback.modules.firewall.entries import (
    MAX_ENTRIES,
    NO_RECORD,
    Made,
    RuleRefused,
    Sets,
    made_of,
    too_many,
)
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy
from loopback.modules.firewall.prefixes import no_collection
from loopback.modules.firewall.tuples import Entry

DEFAULT_SAMPLE: Final = 1000  # one in so many packets that the default dropped is reported


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """A slot's content but for its epoch."""

    slot: bytes
    interfaces: tuple[str, ...]  # the bit of a name is its place
    names: tuple[str, ...]  # of rules, by order
    entries: int


def assign(
    known: Mapping[str, int], names: Sequence[str], capacity: int = layout.MIN_COUNTERS
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
    if not known:
        return {name: slot for slot, name in enumerate(dict.fromkeys(names))}
    wanted = set(names)
    kept = dict(known)
    surplus = len(kept.keys() | wanted) - capacity
    for name in [n for n in kept if n not in wanted][: max(surplus, 0)]:
        del kept[name]
    used = set(kept.values())
    free = (slot for slot in range(capacity) if slot not in used)
    return kept | {name: next(free) for name in names if name not in kept}


class Memory:
    """What was compiled last: a rule or a set that is the same object needs no second look, nor does a table like the last."""

    def __init__(self) -> None:
        self.rules: dict[int, Made] = {}  # by the rule's id; the rule is held, so that no other can get it
        self.sets: KnownSets = {}
        self.tables = KnownTables()
        #: A policy that was compiled before anybody asked, for these identities; whatever is compiled next takes it away.
        self.foreseen: tuple[FirewallPolicy, dict[str, int], Compiled] | None = None


def foresee(policy: FirewallPolicy, memory: Memory) -> None:
    """Compile a firewall's first policy for `memory` alone; what is wrong with it is told when it is compiled in earnest."""
    names = [rule.name for rule in policy.rules]
    with contextlib.suppress(Refused):
        identities = assign({}, names, layout.counters_for(len(names)))
        memory.foreseen = policy, identities, compile_policy(policy, identities, memory=memory)


def compile_policy(
    policy: FirewallPolicy,
    identities: Mapping[str, int],
    digest: bytes = bytes(32),
    memory: Memory | None = None,
    room: int = layout.MAX_HALF,
) -> Compiled:
    """Compile. `identities` has every rule's counter slot; `memory` makes the next policy with most of the same rules cheaper.

    `room` is the size of a slot in bytes. Raises Refused(POLICY_INVALID) naming rule and field.
    """
    memory = memory or Memory()
    foreseen, memory.foreseen = memory.foreseen, None
    if foreseen and foreseen[0] is policy and foreseen[1] == identities and len(foreseen[2].slot) <= room:
        return _named(foreseen[2], digest)
    with no_collection():
        return _compiled(policy, identities, digest, memory, room)


def _named(compiled: Compiled, digest: bytes) -> Compiled:
    """The same by the name of another digest."""
    at, slot = layout.Slot.digest.offset, compiled.slot
    return msgspec.structs.replace(compiled, slot=slot[:at] + digest + slot[at + len(digest) :])


def _compiled(
    policy: FirewallPolicy, identities: Mapping[str, int], digest: bytes, memory: Memory, room: int
) -> Compiled:
    sets = Sets(policy)
    interfaces = _interfaces(policy)
    places = {name: 1 << place for place, name in enumerate(interfaces)}
    entries: dict[tuple[int, int], list[Entry]] = {(d, f): [] for d in (0, 1) for f in (4, 6)}
    entries4, entries6 = ([entries[direction, family] for direction in (0, 1)] for family in (4, 6))
    records: list[bytes] = []
    known = memory.rules
    kept: dict[int, Made] = {}
    count = 0
    for order, rule in enumerate(policy.rules):
        identity = identities[rule.name]
        made = known.get(id(rule))
        if made is None or (rule.interfaces and made.places != tuple(places[n] for n in rule.interfaces)):
            made = made_of(rule, order, identity, sets, places)
        elif made.order != order or made.identity != identity:
            made = made.moved(order, identity)
        if made.alone:
            kept[id(rule)] = made
        records.append(made.record)
        count += len(made.entries4) + len(made.entries6)
        if count > MAX_ENTRIES:
            raise too_many(rule)
        entries4[rule.direction] += made.entries4
        entries6[rule.direction] += made.entries6
    memory.rules = kept
    slot = layout.Slot(default_sample=DEFAULT_SAMPLE)
    slot.digest[:] = digest
    slot.flags = layout.USES_INTERFACES if interfaces else 0
    if any(rule.limit for rule in policy.rules):
        slot.flags |= layout.USES_LIMITS
    parts = Parts(layout.Slot)
    while records and records[-1] == NO_RECORD:
        records.pop()  # the program asks only for records that say something
    slot.rules = parts.add(b"".join(records))
    slot.sets, memory.sets = classifier.lay_sets(sets.numbered, parts, memory.sets)
    for direction in Direction:
        slot.defaults[direction] = int(policy.default[direction])
        for family in (4, 6):
            at = slot.classifiers[direction][family == 6]
            classifier.lay_entries(at, entries[direction, family], (direction, family), parts, memory.tables)
    whole = bytes(slot) + parts.whole()
    if len(whole) > room:
        raise Refused(
            Code.POLICY_INVALID,
            f"the policy takes {len(whole)} bytes of the {room} that a slot has",
            "use fewer rules, or sets in the place of long lists of prefixes and ports",
        )
    return Compiled(
        slot=whole,
        interfaces=interfaces,
        names=tuple(rule.name for rule in policy.rules),
        entries=count,
    )


def _interfaces(policy: FirewallPolicy) -> tuple[str, ...]:
    """Every interface that rules name, in the order of the policy."""
    found: dict[str, None] = {}
    for rule in policy.rules:
        if not rule.interfaces:
            continue
        found |= dict.fromkeys(rule.interfaces)
        if len(found) > layout.MAX_INTERFACES:
            raise RuleRefused(
                rule,
                "iface",
                f"with this rule the policy names more than {layout.MAX_INTERFACES} interfaces",
                "leave iface out where any interface will do, or name fewer",
            )
    return tuple(found)


__all__ = ["DEFAULT_SAMPLE", "Action", "Compiled", "Memory", "assign", "compile_policy"]
