"""What changes from one policy to another, by the names of rules; and how that and changed flows look. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from loopback.cli.printing import printable
from loopback.modules.firewall import shadow
from loopback.modules.firewall.flows import Change, Flow
from loopback.modules.firewall.model import Direction, FirewallPolicy, PrefixTable, Rule

EXAMPLES: Final = 3  # flows of each pair of rules
_FIELDS: Final = tuple(name for name in Rule.__struct_fields__ if name not in ("name", "line"))


class Changed(msgspec.Struct, frozen=True):
    """A rule that both policies have, and the fields that differ."""

    rule: str
    fields: tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy changes against another. `moved` rules stand in another order among those that both have."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[Changed, ...]
    moved: tuple[str, ...]
    defaults: dict[str, tuple[str, str]]
    sets_added: tuple[str, ...]
    sets_removed: tuple[str, ...]
    sets_changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not any(getattr(self, name) for name in self.__struct_fields__)


def compare(old: FirewallPolicy, new: FirewallPolicy) -> Comparison:
    """From `old` to `new`."""
    before, after = {rule.name: rule for rule in old.rules}, {rule.name: rule for rule in new.rules}
    changed = []
    for name in before.keys() & after.keys():
        fields = tuple(f for f in _FIELDS if getattr(before[name], f) != getattr(after[name], f))
        if fields:
            changed.append(Changed(name, fields))
    order = {name: place for place, name in enumerate(after)}
    both_old, both_new = ([n for n in one if n in before and n in after] for one in (before, after))
    return Comparison(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=tuple(sorted(changed, key=lambda one: order[one.rule])),
        moved=tuple(_moved(both_old, both_new)),
        defaults={
            way.name.lower(): (old.default[way].name.lower(), new.default[way].name.lower())
            for way in Direction
            if old.default[way] is not new.default[way]
        },
        sets_added=tuple(sorted(new.sets.keys() - old.sets.keys())),
        sets_removed=tuple(sorted(old.sets.keys() - new.sets.keys())),
        sets_changed=tuple(
            sorted(n for n in old.sets.keys() & new.sets.keys() if _set(old.sets, n) != _set(new.sets, n))
        ),
    )


def _set(sets: Mapping[str, Any], name: str) -> Any:
    found = sets[name]
    return found if isinstance(found, PrefixTable) else PrefixTable.of(found)


def _moved(old: list[str], new: list[str]) -> list[str]:
    """The fewest names that must move to make one order of the other: those outside the longest common run of places."""
    place = {name: number for number, name in enumerate(old)}
    tails: list[int] = []  # of increasing runs, by length, the lowest last place
    ends: list[str] = []
    previous: dict[str, str | None] = {}
    for name in new:
        low, high = 0, len(tails)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if tails[middle] < place[name] else (low, middle)
        previous[name] = ends[low - 1] if low else None
        tails[low : low + 1] = [place[name]]
        ends[low : low + 1] = [name]
    stay: set[str] = set()
    at = ends[-1] if ends else None
    while at is not None:
        stay.add(at)
        at = previous[at]
    return [name for name in new if name not in stay]


def lines(found: Comparison) -> list[str]:
    """As text, one line for each difference: + added, - removed, ~ changed, > moved."""
    if found.same:
        return ["the policies say the same"]
    shown = [f"~ default {way}: {old} → {new}" for way, (old, new) in found.defaults.items()]
    shown += [f"+ rule {printable(name)}" for name in found.added]
    shown += [f"- rule {printable(name)}" for name in found.removed]
    shown += [f"~ rule {printable(one.rule)}: {', '.join(one.fields)}" for one in found.changed]
    shown += [f"> rule {printable(name)}" for name in found.moved]
    for sign, names in (("+", found.sets_added), ("-", found.sets_removed), ("~", found.sets_changed)):
        shown += [f"{sign} set {printable(name)}" for name in names]
    return shown


def flows_document(changes: list[Change], total: int) -> dict[str, Any]:
    """Changed flows as values."""
    return {
        "tracked": total,
        "changed": sum(len(one.flows) for one in changes),
        "pairs": [
            {
                **msgspec.to_builtins(_pair(one)),
                "flows": len(one.flows),
                "examples": [_example(flow) for flow in one.flows[:EXAMPLES]],
            }
            for one in changes
        ],
    }


def flow_lines(changes: list[Change], total: int) -> list[str]:
    """The same as text."""
    number = sum(len(one.flows) for one in changes)
    shown = [f"tracked flows: {number} of {total} would be judged otherwise"]
    for one in changes:
        shown.append(f"  {len(one.flows):>6}  {printable(shadow.words(_pair(one)))}")
        shown += [f"          {packet_words(_example(flow))}" for flow in one.flows[:EXAMPLES]]
    return shown


def shadow_lines(report: shadow.Report) -> list[str]:
    """A shadow as text."""
    shown = [f"sampled packets: {report.changed} of {report.judged} would be judged otherwise"]
    if report.unsure or report.unasked:
        shown.append(f"left out: {report.unsure} unsure, {report.unasked} that no rule decides")
    for one in report.differences:
        shown.append(
            f"  {one.samples:>6}  {printable(shadow.words(one.pair))}  (about {one.packets:,} packets)"
        )
        shown += [f"          {packet_words(example)}" for example in one.examples]
    if report.more_pairs:
        shown.append(f"  {report.more_pairs:>6}  of more pairs of rules than are kept apart")
    return shown


def _pair(one: Change) -> shadow.Pair:
    return shadow.Pair(
        one.direction.name.lower(),
        one.before.name.lower(),
        one.rule_before,
        one.after.name.lower(),
        one.rule_after,
    )


def _example(flow: Flow) -> dict[str, str | int]:
    found: dict[str, str | int] = {"src": flow.src, "dst": flow.dst, "proto": flow.protocol}
    if flow.icmp_type or flow.protocol in (1, 58):
        return found | {"icmp_type": flow.icmp_type}
    return found | {"sport": flow.sport, "dport": flow.dport}


_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


def packet_words(example: Mapping[str, str | int]) -> str:
    """A packet that serves as an example, in a few words."""
    kind = _PROTOCOLS.get(int(example["proto"]), f"protocol {example['proto']}")
    if "icmp_type" in example:
        return f"{kind} {example['src']} → {example['dst']} type {example['icmp_type']}"
    ends = [
        f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"
        for address, port in ((example["src"], example["sport"]), (example["dst"], example["dport"]))
    ]
    state = f" ({example['state']})" if "state" in example else ""
    return f"{kind} {ends[0]} → {ends[1]}{state}"
