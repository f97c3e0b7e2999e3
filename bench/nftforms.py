"""First match in nftables without asking rule after rule: `layers` of verdict maps, and a `tree` of them. See nftpeers.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from nftwords import Unfit, addresses, between, protocols_and_ports
from rulesets import ANY_PORT

from loopback.modules.firewall.model import Action, PortRange, Prefix, Rule
from loopback.modules.firewall.policy_fields import WITH_PORTS, show

LEAF: Final = 4  # rules in a row that cost no more than another map
LONG: Final = 16  # rules in a row from which ports and protocol are split as well; below, trees grow out of all proportion
MAX_RULES: Final = 1_000_000  # rules and elements of a tree; a larger one takes minutes to load
_FIELDS: Final = ("source", "destination", "source_ports", "ports")
_PORTED: Final = ", ".join(map(str, sorted(WITH_PORTS)))


class Words(NamedTuple):
    """How verdicts are written: as the end of a rule (its index, None for the default), in a map, what chains that needs."""

    rule: Callable[[Action, int | None], str] = lambda action, _: action.name.lower()
    element: Callable[[Action], str] = lambda action: action.name.lower()
    chains: str = ""


class Box(NamedTuple):
    """A rule over the five fields. `family` None is both; `protocols` empty is any."""

    number: int
    action: Action
    family: int | None
    source: Prefix | None
    destination: Prefix | None
    source_ports: PortRange
    ports: PortRange
    protocols: tuple[int, ...]


def box(index: int, rule: Rule) -> Box:
    """The rule as a box. Raises Unfit where it is none."""
    several = (rule.sources, rule.destinations, rule.source_ports, rule.ports)
    others = (rule.source_sets, rule.destination_sets, rule.icmp, rule.states, rule.interfaces, rule.limit)
    source, destination = (values[0] if values else None for values in (rule.sources, rule.destinations))
    families = {p.family for p in (source, destination) if p is not None}
    if any(len(values) > 1 for values in several) or any(others) or len(families) > 1:
        raise Unfit(f"rule {rule.name!r} is not over the five fields")
    return Box(
        number=index,
        action=rule.action,
        family=families.pop() if families else None,
        source=source if source and source.length else None,
        destination=destination if destination and destination.length else None,
        source_ports=rule.source_ports[0] if rule.source_ports else ANY_PORT,
        ports=rule.ports[0] if rule.ports else ANY_PORT,
        protocols=tuple(sorted(set(rule.protocols))),
    )


def _span(one: Box, field: str, family: int) -> tuple[int, int]:
    """First and last value of a field other than the protocol."""
    value = getattr(one, field)
    if isinstance(value, PortRange):
        return value.low, value.high
    width = 32 if family == 4 else 128
    if value is None:
        return 0, (1 << width) - 1
    return value.address, value.address | ((1 << (width - value.length)) - 1)


def _places(mask: int) -> Iterator[int]:
    """The bits that are set, from the lowest."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def layering(boxes: Sequence[Box], family: int) -> list[list[Box]]:
    """Boxes in layers: none overlaps another of its layer, and of two that overlap the earlier one is in an earlier layer.

    A box that an earlier one repeats is left out. Asked in turn, the layers so give the first match.
    """
    unique: dict[tuple[object, ...], Box] = {}
    for one in boxes:
        unique.setdefault(one[3:], one)
    kept = list(unique.values())
    meeting: list[dict[object, int]] = [_meeting([_span(one, f, family) for one in kept]) for f in _FIELDS]
    protocols = {one.protocols for one in kept}
    by_protocol = {
        mine: sum(
            1 << at
            for at, one in enumerate(kept)
            if not mine or not one.protocols or set(mine) & set(one.protocols)
        )
        for mine in protocols
    }
    layers: list[list[Box]] = []
    masks: list[int] = []
    for at, one in enumerate(kept):
        overlapping = by_protocol[one.protocols] & ((1 << at) - 1)
        for field, masks_of in zip(_FIELDS, meeting, strict=True):
            overlapping &= masks_of[_span(one, field, family)]
        place = len(masks)
        while place and not overlapping & masks[place - 1]:
            place -= 1
        if place == len(masks):
            masks.append(0)
            layers.append([])
        masks[place] |= 1 << at
        layers[place].append(one)
    return layers


def _meeting(spans: Sequence[tuple[int, int]]) -> dict[object, int]:
    """For every interval, which of them meet it: all but those that end before it or begin behind it."""
    everything = (1 << len(spans)) - 1
    distinct: dict[tuple[int, int], int] = {}
    for at, one in enumerate(spans):
        distinct[one] = distinct.get(one, 0) | 1 << at
    found: dict[object, int] = dict.fromkeys(distinct, everything)
    by_end = sorted(distinct, key=lambda one: one[1])
    ended, at = 0, 0
    for one in sorted(distinct):
        while at < len(by_end) and by_end[at][1] < one[0]:
            ended |= distinct[by_end[at]]
            at += 1
        found[one] &= ~ended
    by_begin = sorted(distinct, key=lambda one: -one[0])
    later, at = 0, 0
    for one in reversed(by_end):
        while at < len(by_begin) and by_begin[at][0] > one[1]:
            later |= distinct[by_begin[at]]
            at += 1
        found[one] &= ~later
    return found


def layers(boxes: Sequence[Box], family: int, default: Action, words: Words) -> Iterator[str]:
    """Maps and the chain judge4 or judge6."""
    word, kind = ("ip", "ipv4_addr") if family == 4 else ("ip6", "ipv6_addr")
    made = layering(boxes, family)
    for number, layer in enumerate(made):
        elements = []
        for one in layer:
            ends = [addresses(family, *_span(one, side, family)) for side in ("source", "destination")]
            ports = [between(*_span(one, side, family)) for side in ("source_ports", "ports")]
            elements += [
                " . ".join([*ends, str(protocol), *ports]) + f" : {words.element(one.action)}"
                for protocol in one.protocols or ("0-255",)
            ]
        yield (
            f" map m{family}_{number} {{ type {kind} . {kind} . inet_proto . inet_service . inet_service : verdict;"
            f" flags interval; elements = {{ {', '.join(elements)} }} }}"
        )
    yield f" chain judge{family} {{"
    key = f"{word} saddr . {word} daddr . meta l4proto . th sport . th dport"
    yield from (f"  {key} vmap @m{family}_{number}" for number in range(len(made)))
    yield f"  {words.rule(default, None)}"
    yield " }"


# ── tree ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────
PROTOCOL: Final = "protocols"
_SPLITS: Final = (*_FIELDS, PROTOCOL)


class _Split(NamedTuple):
    """A field split: the values that lead to each mask of rules, and the mask for all other values."""

    field: str
    parts: list[tuple[str, int]]
    other: int


class Tree:
    """The chains of one family. A rule is a bit, the first the lowest."""

    def __init__(self, boxes: Sequence[Box], family: int, default: Action, words: Words) -> None:
        self._boxes, self._family, self._default, self._words = boxes, family, default, words
        self._chains: dict[tuple[int, frozenset[str]], str] = {}
        self._lines: list[str] = []
        self.size = 0
        self._any = {field: self._mask(lambda one, f=field: self._is_any(one, f)) for field in _SPLITS}

    def lines(self) -> list[str]:
        """All chains; the root is judge4 or judge6. Raises Unfit where there are too many."""
        root = self._chain((1 << len(self._boxes)) - 1, frozenset())
        return [*self._lines, f" chain judge{self._family} {{", f"  goto {root}", " }"]

    def _mask(self, holds: Callable[[Box], bool]) -> int:
        return sum(1 << at for at, one in enumerate(self._boxes) if holds(one))

    def _is_any(self, one: Box, field: str) -> bool:
        if field == PROTOCOL:
            return not one.protocols
        value = getattr(one, field)
        return value is None or value == ANY_PORT

    def _cut(self, mask: int, known: frozenset[str]) -> int:
        """Without what stands behind a rule that matches everything that still comes."""
        certain = mask
        for field in _SPLITS:
            if field not in known:
                certain &= self._any[field]
        return mask & ((certain & -certain) * 2 - 1) if certain else mask

    def _chain(self, mask: int, known: frozenset[str]) -> str:
        mask = self._cut(mask, known)
        key = (mask, known)
        if key in self._chains:
            return self._chains[key]
        name = self._chains[key] = f"t{self._family}_{len(self._chains)}"
        split = self._best(mask, known) if mask.bit_count() > LEAF else None
        if split is None:
            body = [f"  {self._rule(self._boxes[at], known)}" for at in _places(mask)]
            body.append(f"  {self._words.rule(self._default, None)}")
            self.size += len(body)
        else:
            self.size += len(split.parts) + 2
            if self.size > MAX_RULES:
                raise Unfit(f"its tree is larger than {MAX_RULES} rules and elements")
            inside = known | {split.field}
            parts = [(values, self._chain(part, inside)) for values, part in split.parts]
            other = self._chain(split.other, inside)
            elements = ", ".join(f"{values} : goto {chain}" for values, chain in parts)
            body = [f"  {self._key(split.field, known)} vmap {{ {elements} }}", f"  goto {other}"]
        self._lines += [f" chain {name} {{", *body, " }"]
        return name

    def _key(self, field: str, known: frozenset[str]) -> str:
        word = "ip" if self._family == 4 else "ip6"
        if field == PROTOCOL:
            return "meta l4proto"
        if field in ("source", "destination"):
            return f"{word} {'saddr' if field == 'source' else 'daddr'}"
        return f"meta l4proto {{ {_PORTED} }} th {'sport' if field == 'source_ports' else 'dport'}"

    def _rule(self, one: Box, known: frozenset[str]) -> str:
        word = "ip" if self._family == 4 else "ip6"
        parts = []
        for field, side in (("source", "saddr"), ("destination", "daddr")):
            value = getattr(one, field)
            if field not in known and value is not None:
                parts.append(f"{word} {side} {show(value)}")
        left = [
            () if field in known or getattr(one, field) == ANY_PORT else (getattr(one, field),)
            for field in ("source_ports", "ports")
        ]
        parts += protocols_and_ports(() if PROTOCOL in known else one.protocols, left[0], left[1])
        return " ".join([*parts, self._words.rule(one.action, one.number)])

    def _best(self, mask: int, known: frozenset[str]) -> _Split | None:
        """The split whose largest part is the smallest; None where no part is smaller than the whole."""
        places = list(_places(mask))
        best: tuple[int, int] = (len(places), 0)
        chosen: _Split | None = None
        for field in _SPLITS if len(places) > LONG else _FIELDS[:2]:
            if field in known or not mask & ~self._any[field]:
                continue
            split = self._split(places, mask, field)
            inside = known | {field}
            sizes = [
                self._cut(part, inside).bit_count() for part in {*(m for _, m in split.parts), split.other}
            ]
            score = (max(sizes), sum(sizes))
            if score[0] < len(places) and score < best:
                best, chosen = score, split
        return chosen

    def _split(self, places: Sequence[int], mask: int, field: str) -> _Split:
        other = mask & self._any[field]
        if field == PROTOCOL:
            found: dict[int, int] = {}
            for at in places:
                for protocol in self._boxes[at].protocols:
                    found[protocol] = found.get(protocol, 0) | 1 << at
            return _Split(field, [(str(p), held | other) for p, held in sorted(found.items())], other)
        spans: dict[tuple[int, int], int] = {}
        for at in places:
            if not self._is_any(self._boxes[at], field):
                span = _span(self._boxes[at], field, self._family)
                spans[span] = spans.get(span, 0) | 1 << at
        write = between if "ports" in field else lambda low, high: addresses(self._family, low, high)
        last = 65535 if "ports" in field else (1 << (32 if self._family == 4 else 128)) - 1
        parts = [(write(low, high), held | other) for low, high, held in _sweep(spans, last) if held]
        return _Split(field, parts, other)


def _sweep(spans: Mapping[tuple[int, int], int], last: int) -> list[tuple[int, int, int]]:
    """(first, last, mask) of each stretch between two edges of intervals, neighbours with one mask joined."""
    edges: dict[int, int] = {0: 0}
    for (low, high), mask in spans.items():
        edges[low] = edges.get(low, 0) ^ mask
        if high < last:
            edges[high + 1] = edges.get(high + 1, 0) ^ mask
    found: list[tuple[int, int, int]] = []
    ordered = sorted(edges)
    mask = 0
    for first, following in zip(ordered, [*ordered[1:], last + 1], strict=True):
        mask ^= edges[first]
        if found and found[-1][2] == mask:
            found[-1] = (found[-1][0], following - 1, mask)
        else:
            found.append((first, following - 1, mask))
    return found


def tree(boxes: Sequence[Box], family: int, default: Action, words: Words) -> list[str]:
    """Chains that lead from judge4 or judge6 down to a few rules. Raises Unfit where they are too many."""
    return Tree(boxes, family, default, words).lines()
