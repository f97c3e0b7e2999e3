"""A seeded generator of policies that look like the published ClassBench sets, in any size, for IPv4 and IPv6.

`measure` takes the statistics of a rule set; those of the six published sets are in classbench_profiles.json (running
this file measures them anew). `generate` makes rules that have them:

* pairs of prefix lengths, pairs of port kinds with the protocol, and port values are drawn from the measured distributions;
* how many different prefixes of each length there are grows with the size as it grows between the published 1k and 10k set
  of the family, and beyond 10k at most in proportion;
* prefixes nest as often, and lie in as many /16 and /24 blocks, as the measured ones; rules share as many address pairs;
* more specific rules stand first, as ClassBench orders them.

IPv6: the same structure with prefix lengths of IPv6 address plans in place of IPv4's (table V6_LENGTHS), in the
blocks that the regional registries allocate from. The same arguments give the same rules on every machine and Python.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import rulesets
from rulesets import ANY_PORT, Bits, Five

from loopback.modules.firewall.model import PortRange, Prefix

PROFILES: Final = Path(__file__).with_name("classbench_profiles.json")
FAMILIES: Final = ("acl1", "fw1", "ipc1")
MILLION: Final = 1_000_000
COARSE: Final = 2  # prefixes up to this length hold nearly everything; nesting is counted without them
SPECIFIC: Final = 8  # from this length on both sides, an address pair that comes twice is no accident
BOUNDED: Final = (
    16  # bits; there are no more prefixes shorter than this in a larger set than in the published 10k
)
DEEPER: Final = 150_000  # in a million nested prefixes: those that may nest in another nested one
TRIES: Final = 16  # at a free place for a prefix, before one that is taken is good enough

#: The IPv6 length that stands for an IPv4 length: registries hold /12 and give /19 … /32 (RIPE-738, ARIN NRPM 6.5),
#: /48 and /56 are sites (RFC 6177), /64 subnets (RFC 4291), /127 links between routers (RFC 6164), /128 hosts.
V6_LENGTHS: Final = (
    0, 3, 12, 19, 20, 22, 23, 24, 26, 28, 29, 29, 30, 31, 32, 32, 32, 36, 40, 40, 44, 48, 48, 48,
    56, 56, 60, 64, 64, 64, 64, 127, 128,
)  # fmt: skip
#: The /12 blocks of the five registries (IANA, IPv6 Global Unicast Address Assignments), by their first 12 bits.
V6_REGISTRIES: Final = (0x240, 0x260, 0x280, 0x2A0, 0x2C0)


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """The prefixes of one side of a rule set. `lengths`: different prefixes by length; `depths`: by how many others hold it."""

    lengths: dict[int, int]
    depths: dict[int, int]
    nested: int  # in a million prefixes longer than /2: those inside another such one
    blocks16: int  # different /16 (IPv6: /32) that hold the longer ones
    blocks24: int  # different /24 (IPv6: /64)

    @property
    def distinct(self) -> int:
        """Different prefixes."""
        return sum(self.lengths.values())

    @property
    def depth(self) -> float:
        """How many others hold a prefix, on average."""
        return sum(depth * count for depth, count in self.depths.items()) / self.distinct


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of a rule set. Port kinds are any, exact, range; keys of mappings are text, as JSON wants it."""

    rules: int
    duplicates: int
    tuples: dict[str, int]  # "source length,destination length": rules
    kinds: dict[str, int]  # "protocol or any,kind of source ports,kind of ports": rules
    ports: dict[str, int]  # "low-high": rules, without any
    source_ports: dict[str, int]
    source: Side
    destination: Side
    pairs: int  # different address pairs
    repeated: (
        int  # in a million rules of specific addresses: those whose address pair another rule has already
    )
    specificity: tuple[int, ...]  # mean sum of both lengths, by fifth of the rules, in tenths of bits

    def share(self, place: int, value: str) -> float:
        """The share of rules whose part of `kinds` at a place (0 protocol, 1 source ports, 2 ports) has a value."""
        return sum(n for kind, n in self.kinds.items() if kind.split(",")[place] == value) / self.rules


def kind_of(ports: PortRange) -> str:
    """any, exact or range."""
    return "any" if ports == ANY_PORT else "exact" if ports.low == ports.high else "range"


def measure(fives: Sequence[Five]) -> Profile:
    """The statistics of a rule set that is not empty."""
    pairs = Counter((five.source, five.destination) for five in fives)
    specific = {p: n for p, n in pairs.items() if min(p[0].length, p[1].length) >= SPECIFIC}
    sums = [five.source.length + five.destination.length for five in fives]
    fifths = [sums[len(sums) * at // 5 : len(sums) * (at + 1) // 5] or sums for at in range(5)]
    return Profile(
        rules=len(fives),
        duplicates=len(fives) - len(set(fives)),
        tuples=_count(f"{five.source.length},{five.destination.length}" for five in fives),
        kinds=_count(
            f"{'any' if five.protocol is None else five.protocol},{kind_of(five.source_ports)},{kind_of(five.ports)}"
            for five in fives
        ),
        ports=_count(f"{f.ports.low}-{f.ports.high}" for f in fives if f.ports != ANY_PORT),
        source_ports=_count(
            f"{f.source_ports.low}-{f.source_ports.high}" for f in fives if f.source_ports != ANY_PORT
        ),
        source=_side({five.source for five in fives}),
        destination=_side({five.destination for five in fives}),
        pairs=len(pairs),
        repeated=(sum(specific.values()) - len(specific)) * MILLION // max(1, sum(specific.values())),
        specificity=tuple(round(10 * sum(part) / len(part)) for part in fifths),
    )


def _count(values: object) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))  # type: ignore[call-overload]  # an iterable of text


def _side(prefixes: set[Prefix]) -> Side:
    family = next(iter(prefixes)).family
    width, wide, narrow = (32, 16, 24) if family == 4 else (128, 32, 64)
    there = {(p.length, p.address >> (width - p.length)) for p in prefixes}
    lengths = sorted({p.length for p in prefixes})
    depths: Counter[int] = Counter()
    longer = inside = 0
    for p in prefixes:
        around = [
            at for at in lengths if at < p.length and (at, p.address >> (width - at) if at else 0) in there
        ]
        depths[len(around)] += 1
        if p.length > _coarse(family):
            longer += 1
            inside += any(at > _coarse(family) for at in around)
    return Side(
        lengths=dict(sorted(Counter(p.length for p in prefixes).items())),
        depths=dict(sorted(depths.items())),
        nested=inside * MILLION // max(1, longer),
        blocks16=len({p.address >> (width - wide) for p in prefixes if p.length >= wide}),
        blocks24=len({p.address >> (width - narrow) for p in prefixes if p.length >= narrow}),
    )


def _coarse(family: int) -> int:
    return COARSE if family == 4 else V6_LENGTHS[COARSE]


def profiles() -> dict[str, Profile]:
    """Those of the published sets, as recorded, by name."""
    return msgspec.json.decode(PROFILES.read_bytes(), type=dict[str, Profile])


def generate(kind: str, count: int, *, seed: int = 1, family: Literal[4, 6] = 4) -> list[Five]:
    """So many rules like those of a family of published sets (acl1, fw1, ipc1). 100,000 take a few seconds."""
    recorded = profiles()
    small, large = recorded[f"{kind}_1k"], recorded[f"{kind}_10k"]
    like = small if count * count <= small.rules * large.rules else large
    source = Bits(seed * 0x1_0001 + count * 31 + FAMILIES.index(kind) * 7 + family)
    lengths = [
        (_length(int(a), family), _length(int(b), family))
        for a, b in (pair.split(",") for pair in _evenly(like.tuples, count, source))
    ]
    first = {pair: at for at, pair in reversed(list(enumerate(lengths)))}
    repeats = [
        source.chance(like.repeated) and min(pair) >= SPECIFIC and first[pair] < at
        for at, pair in enumerate(lengths)
    ]
    ends = []
    for at, (one, other) in enumerate(((small.source, large.source), (small.destination, large.destination))):
        side = one if like is small else other

        def scale(less: int, more: int) -> float:
            return _scale(less, more, small.rules, large.rules, like.rules, count)

        grown = scale(one.distinct, other.distinct)
        wanted: Counter[int] = Counter()
        for length, different in side.lengths.items():
            # the address space does not grow with the rules: there are only so many short prefixes
            bounded = 1.0 if length <= COARSE else min(grown, 1.0) if length < BOUNDED else grown
            wanted[_length(length, family)] += max(1, round(different * bounded))
        uses = Counter(pair[at] for pair, repeat in zip(lengths, repeats, strict=True) if not repeat)
        blocks = (
            max(1, round(side.blocks16 * scale(one.blocks16, other.blocks16))),
            max(1, round(side.blocks24 * scale(one.blocks24, other.blocks24))),
        )
        ends.append(
            _Ends(family, side.nested, {n: min(wanted[n], used) for n, used in uses.items()}, blocks, source)
        )
    draw = _Fields(like, family, source)
    before: dict[tuple[int, int], list[tuple[Prefix, Prefix]]] = {}
    found: list[Five] = []
    seen: set[Five] = set()
    for pair, repeat in zip(lengths, repeats, strict=True):
        known = before.setdefault(pair, [])
        if repeat:
            addresses = known[source.below(len(known))]
        else:
            addresses = (ends[0].take(pair[0]), ends[1].take(pair[1]))
            known.append(addresses)
        for _ in range(TRIES):
            sport, dport, protocol = draw()
            five = Five(*addresses, sport, dport, protocol)
            if five not in seen:
                break
        seen.add(five)
        found.append(five)
    return _ordered(found, source)


def _ordered(fives: list[Five], source: Bits) -> list[Five]:
    """More specific first; 2 in 100 rules stand some bits away from where they belong, as in the published sets."""
    keyed = []
    for number, five in enumerate(fives):
        stray = source.below(9) - 4 if source.chance(20_000) else 0
        kinds = (five.protocol is None) + (five.ports == ANY_PORT) + (five.source_ports == ANY_PORT)
        keyed.append((-(five.source.length + five.destination.length + stray), kinds, number))
    return [fives[number] for _, _, number in sorted(keyed)]


def _length(length: int, family: int) -> int:
    return length if family == 4 else V6_LENGTHS[length]


def _scale(small: int, large: int, small_rules: int, large_rules: int, like_rules: int, count: int) -> float:
    """How many times as many `count` rules have as `like_rules` have: a power law, beyond the large set at most in proportion.

    Rounded, so that it is the same wherever logarithms differ in their last digit.
    """

    def grown(rules: int, power: float) -> float:
        return float((rules / large_rules) ** (power if rules < large_rules else min(power, 1.0)))

    power = math.log(large / small) / math.log(large_rules / small_rules)
    return round(grown(count, power) / grown(like_rules, power), 4)


def _table(counts: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Values, and the running sums of their counts."""
    sums, total = [], 0
    for count in counts.values():
        total += count
        sums.append(total)
    return list(counts), sums


def _evenly(counts: Mapping[str, int], wanted: int, source: Bits) -> list[str]:
    """So many values in the measured shares, as exactly as whole numbers allow, shuffled."""
    values, sums = _table(counts)
    start, at, found = source.below(sums[-1]), 0, []
    for number in range(wanted):
        while sums[at] * wanted <= number * sums[-1] + start:
            at += 1
        found.append(values[at])
    source.shuffle(found)
    return found


def _pick(sums: Sequence[int], source: Bits) -> int:
    """A place, as likely as its count."""
    wanted, low, high = source.below(sums[-1]), 0, len(sums) - 1
    while low < high:
        middle = (low + high) // 2
        if sums[middle] <= wanted:
            low = middle + 1
        else:
            high = middle
    return low


class _Fields:
    """Draws ports and protocol."""

    def __init__(self, profile: Profile, family: int, source: Bits) -> None:
        self._source, self._family = source, family
        self._kinds = _table(profile.kinds)
        self._ports: dict[tuple[int, str], tuple[list[str], list[int]]] = {}
        for side, values in ((0, profile.source_ports), (1, profile.ports)):
            for kind in ("exact", "range"):
                fitting = {v: n for v, n in values.items() if kind_of(_range(v)) == kind}
                self._ports[side, kind] = _table(fitting)

    def __call__(self) -> tuple[PortRange, PortRange, int | None]:
        protocol, sport, dport = self._kinds[0][_pick(self._kinds[1], self._source)].split(",")
        number = None if protocol == "any" else int(protocol)
        if self._family == 6:  # AH is no protocol but an extension header there; ESP stands for it
            number = {1: 58, 51: 50}.get(number, number) if number is not None else None
        return self._port(0, sport), self._port(1, dport), number

    def _port(self, side: int, kind: str) -> PortRange:
        if kind == "any":
            return ANY_PORT
        values, sums = self._ports[side, kind]
        return _range(values[_pick(sums, self._source)])


def _range(text: str) -> PortRange:
    low, _, high = text.partition("-")
    return PortRange(int(low), int(high))


class _Ends:
    """The prefixes of one side: made once, then taken, each at least once."""

    def __init__(
        self,
        family: Literal[4, 6],
        nested: int,
        wanted: Mapping[int, int],
        blocks: tuple[int, int],
        source: Bits,
    ) -> None:
        self._family, self._source = family, source
        self._width = 32 if family == 4 else 128
        self._wide, self._narrow = (16, 24) if family == 4 else (32, 64)
        self._nested = nested
        # what nests in something shorter brings its blocks with it; only the others make new ones
        fresh = MILLION - nested // 2
        self._most = {
            self._wide: max(1, blocks[0] * fresh // MILLION),
            self._narrow: max(1, blocks[1] * fresh // MILLION),
        }
        self._blocks: dict[int, list[int]] = {self._wide: [], self._narrow: []}
        self._there: set[tuple[int, int]] = set()
        self._lengths: list[int] = []
        self._parents: list[tuple[int, int]] = []
        self._pools: dict[int, list[Prefix]] = {}
        for length in sorted(wanted):
            self._pools[length] = self._make(length, wanted[length])
        self._next = dict.fromkeys(self._pools, 0)

    def take(self, length: int) -> Prefix:
        """One of this length: each once, then again, some more often than others."""
        pool, at = self._pools[length], self._next[length]
        if at < len(pool):
            self._next[length] = at + 1
            return pool[at]
        return pool[min(self._source.below(len(pool)), self._source.below(len(pool)))]

    def _make(self, length: int, count: int) -> list[Prefix]:
        room = 1 << length if length < 20 else count
        if self._family == 6 and length <= 12:
            room = 1 if length <= 3 else len(V6_REGISTRIES)
        made: list[int] = []
        for _ in range(min(count, room)):
            number = self._number(length)
            for _ in range(TRIES):
                if (length, number) not in self._there:
                    break
                number = self._number(length)
            else:
                continue
            self._there.add((length, number))
            made.append(number)
        self._lengths.append(length)
        if length > _coarse(self._family):
            self._parents += [
                (length, n) for n in made if not self._covers(length, n) or self._source.chance(DEEPER)
            ]
        beyond = self._width - length
        found = [Prefix(self._family, number << beyond, length) for number in made]
        self._source.shuffle(found)
        return found or [Prefix(self._family, self._number(length) << beyond, length)]

    def _number(self, length: int) -> int:
        """A prefix's bits."""
        if self._parents and length > _coarse(self._family) and self._source.chance(self._nested):
            deeper = self._source.chance(DEEPER)
            for _ in range(TRIES):
                parent, number = self._parents[self._source.below(len(self._parents))]
                if parent < length:
                    number = self._extend(number, parent, length)
                    if deeper or self._covers(length, number) == 1:
                        return number
        for _ in range(TRIES):
            number = self._fresh(length)
            if not self._covers(length, number):
                return number
        for block in self._most:  # they are full
            self._most[block] += 1
        return number

    def _covers(self, length: int, number: int) -> int:
        """How many of those that are there hold it, without the coarse ones."""
        return sum(
            (at, number >> (length - at)) in self._there
            for at in self._lengths
            if _coarse(self._family) < at < length
        )

    def _fresh(self, length: int) -> int:
        if length > self._narrow:
            return self._extend(self._block(self._narrow), self._narrow, length)
        if length > self._wide:
            return self._extend(self._block(self._wide), self._wide, length)
        return self._extend(0, 0, length)

    def _block(self, length: int) -> int:
        """A block: a new one while there is room for more, else one that is there."""
        blocks = self._blocks[length]
        if len(blocks) >= self._most[length]:
            return blocks[self._source.below(len(blocks))]
        above = (self._block(self._wide), self._wide) if length == self._narrow else (0, 0)
        made = self._extend(*above, length)
        if not self._covers(length, made):
            blocks.append(made)
        return made

    def _extend(self, number: int, at: int, length: int) -> int:
        """More bits behind a prefix, as addresses are given out."""
        if self._family == 4:
            return number << (length - at) | (self._source.bits(length - at) if length > at else 0)
        for stop in (12, 32, 48, 64, 127, 128):
            if at >= stop or length <= at:
                continue
            end = min(stop, length)
            number = number << (end - at) | self._part(number, at, end, length)
            at = end
        return number

    def _part(self, number: int, at: int, end: int, length: int) -> int:
        count, source = end - at, self._source
        if at == 0:
            return V6_REGISTRIES[source.below(len(V6_REGISTRIES))] >> (12 - end)
        if at >= 64 and length >= 127 and count > 32:  # interface identifiers, roughly as RFC 7707 found them
            habit = source.below(100)
            if habit < 60:
                return source.below(256)  # numbered by hand
            if habit < 75:  # from an EUI-48
                return (source.bits(24) << 40 | 0xFFFE << 24 | source.bits(24)) >> (64 - count)
            return source.bits(count)
        if 32 <= at < 64 and source.chance(500_000):  # sites and subnets are numbered from below
            return source.below(min(1 << count, 256))
        return source.bits(count)


def main() -> None:
    """Measure the published sets and write down what was found."""
    found = {name: measure(rulesets.read(path)) for name, path in rulesets.published().items()}
    if found.keys() != set(rulesets.PUBLISHED):
        sys.exit("rulegen: all six published sets are needed; name their folder in LOOPBACK_CLASSBENCH")
    PROFILES.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


if __name__ == "__main__":
    main()
