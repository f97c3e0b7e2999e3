"""What the figures of the datapath's bench share: one run, its folder, and measurements that several figures use."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import datapath_ours as ours
import datapath_sets as sets
import nftpeers
import rulegen
import rulesets
from datapath_limited import Limited, Unfit, limited
from datapath_ours import Task, Times
from datapath_sets import Shelf
from datapath_veth import Side
from report import Figure

from loopback.cli.firewall_judge import object_file
from loopback.contracts.codes import Refused
from loopback.modules.firewall.model import FirewallPolicy

T = TypeVar("T")
PREFIXES: Final = 10_000
WANTED: Final = {
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "clang": "clang",
    "mount": "mount",
}


class CannotMeasure(Exception):
    """Why a figure has no value."""


class Goal(NamedTuple):
    """What a figure must reach."""

    goal: float | None
    unit: str
    at_least: bool = False


class Flows(NamedTuple):
    """The new-flow path on one 10k set, ns above the bare program: at 10k rules, at ten, and two LPM look-ups."""

    name: str
    times: Times

    def side(self, name: str) -> list[float]:
        """One side's rounds. Raises CannotMeasure."""
        if name in self.times.refused:
            others = ", ".join(f"{side} {median(ns):.0f}" for side, ns in self.times.above.items())
            raise CannotMeasure(f"{self.name}: {self.times.refused[name]}; ns: {others}")
        return self.times.above[name]


class Veth(NamedTuple):
    """Mpps by side, one per round; what a peer said that could not take part; seconds that each peer took to load."""

    name: str
    mpps: dict[str, list[float]]
    absent: dict[str, str]
    load_s: dict[str, float]

    def median(self, side: str) -> float:
        """Mpps. Raises CannotMeasure."""
        if side not in self.mpps:
            others = ", ".join(f"{name} {statistics.median(rates):.3f}" for name, rates in self.mpps.items())
            raise CannotMeasure(
                f"{self.name}: {self.absent.get(side, f'{side} did not run')}; Mpps: {others}"
            )
        return statistics.median(self.mpps[side])

    def best(self) -> str:
        """The fastest nftables form. Raises CannotMeasure."""
        forms = [side for side in self.mpps if side.startswith("nft ")]
        if not forms:
            raise CannotMeasure(f"{self.name}: no nftables form could be loaded: {self.absent}")
        return max(forms, key=self.median)


def require() -> None:
    """Raises SystemExit naming what to install where a peer or tool is not there."""
    missing = sorted(package for tool, package in WANTED.items() if shutil.which(tool) is None)
    if missing:
        raise SystemExit(f"bench-datapath: missing; install it as root: apt-get install {' '.join(missing)}")


def progress(words: str) -> None:
    """A line on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def median(values: Sequence[float]) -> float:
    """The median, and not a number of nothing."""
    return statistics.median(values) if values else math.nan


def spread(values: Sequence[float]) -> str:
    """Half of the middle half of the values, in percent of their median: how noisy they are."""
    if len(values) < 4:
        return "±?"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"±{(high - low) / 2 / middle:.0%}" if middle else "±?"


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios, as both sides of a round meet the same machine."""
    return statistics.median([a / b for a, b in zip(above, below, strict=True)])


class Run:
    """One run. Measurements are made when a figure first asks for them, and kept for the next."""

    def __init__(self, folder: Path, *, rounds: int, quick: bool) -> None:
        self.folder = folder
        self.rounds = rounds
        self.quick = quick
        self.shelf = Shelf(folder)
        self.limited: Callable[..., Any] = limited
        self.kinds = sets.KINDS[:1] if quick else sets.KINDS

    @cached_property
    def program(self) -> bytes:
        """The firewall's object, compiled as a package has it."""
        return object_file()

    def set10k(self, kind: str) -> tuple[str, tuple[Any, ...]]:
        """(name, rules) of a 10k set; with --quick its first thousand."""
        name, fives = sets.ten_thousand(kind)
        return (f"{name} first 1000", fives[:1000]) if self.quick else (name, fives)

    @cache  # noqa: B019  # a run lives as long as the process
    def new_flows(self, kind: str) -> Flows:
        """The new-flow path on a set. Raises Refused, Unfit."""
        name, fives = self.set10k(kind)
        progress(f"new flows: {name}, {len(fives)} rules")
        files = {
            "many": self.shelf.put(name, sets.dropping(fives)),
            "few": self.shelf.put(f"{name} few", sets.dropping(sets.a_few(fives))),
        }
        peer = sets.prefixes(kind, PREFIXES, fives)
        found = self.limited(ours.new_flows, Task(self.program, files, self.rounds, prefixes={"lpm": peer}))
        return Flows(name, found)

    @cache  # noqa: B019
    def large(self, kind: str, family: int = 4) -> Flows:
        """The same on a generated set of 100k rules."""
        count = 5_000 if self.quick else sets.LARGE
        progress(f"new flows: generated {kind}, {count} rules")
        fives = rulegen.generate(kind, count, family=4 if family == 4 else 6)
        files = {
            "many": self.shelf.put(f"{kind} {count} v{family}", sets.dropping(fives)),
            "few": self.shelf.put(f"{kind} {count} v{family} few", sets.dropping(sets.a_few(fives))),
        }
        return Flows(
            f"{kind} {count}",
            self.limited(ours.new_flows, Task(self.program, files, self.rounds, family=family)),
        )

    @cache  # noqa: B019
    def established(self, kind: str) -> Flows:
        """Packets of flows that stand, at 10k rules and at ten."""
        name, fives = self.set10k(kind)
        progress(f"established flows: {name}")
        front = {"rules": [sets.flow_rule()]}
        files = {
            "many": self.shelf.put(f"{name} flows", sets.dropping(fives), front),
            "few": self.shelf.put(f"{name} few flows", sets.dropping(sets.a_few(fives)), front),
        }
        task = Task(self.program, files, self.rounds, tuples=sets.flows())
        return Flows(name, self.limited(ours.established, task))

    @cache  # noqa: B019
    def veth(self, kind: str) -> Veth:
        """Packets a second at 10k rules: bare, ours, and the forms of nftables."""
        name, fives = self.set10k(kind)
        return self.race(name, sets.dropping(fives), ("layered", "tree"))

    @cache  # noqa: B019
    def linear(self) -> Veth:
        """1000 rules of a /24 source and one port, none matching."""
        return self.race("1000 simple rules", rulesets.simple(1000), ("linear",))

    def race(
        self, name: str, policy: FirewallPolicy, forms: Sequence[str], rounds: int | None = None
    ) -> Veth:
        """The same policy behind veth pairs: bare XDP_DROP, ours with everything on, and stateful nftables in these forms."""
        absent: dict[str, str] = {}
        load_s: dict[str, float] = {}
        with ExitStack() as stack:
            there: dict[str, Side] = {}
            bare = stack.enter_context(Side("bare"))
            bare.drop_bare()
            there["bare"] = bare
            own = stack.enter_context(Side("ours"))
            process = stack.enter_context(Limited(own.host))
            try:
                hooks = process(ours.attach, self.program, own.root, own.state, self.shelf.put(name, policy))
                if hooks != {"eth0": "native"}:
                    raise RuntimeError(f"ours is not attached as it should be: {hooks}")
                there["ours"] = own
            except Refused as refusal:
                absent["ours"] = refusal.reason
            for form in forms:
                peer = stack.enter_context(Side(f"nft {form}"))
                try:
                    progress(f"veth: {name}: loading nft {form}")
                    load_s[peer.name] = peer.nft(self.nft_text(name, policy, form), self.folder)
                    there[peer.name] = peer
                except (nftpeers.Unfit, RuntimeError) as problem:
                    absent[peer.name] = str(problem)
            progress(f"veth: {name}: {', '.join(there)}")
            mpps: dict[str, list[float]] = {side: [] for side in there}
            for side, one in there.items():
                before, came = one.snmp(), one.received()
                one.sample()
                after, came = one.snmp(), one.received() - came
                _check_reached(side, {k: after[k] - before[k] for k in after}, came)
            for _ in range(rounds or self.rounds):
                for side, one in there.items():
                    mpps[side].append(one.sample().mpps)
            if "ours" in there:
                seen = process(ours.seen)
                if not seen or any(not word.endswith(".drop") for word in seen):
                    raise RuntimeError(f"ours let packets pass: {seen}")
        return Veth(name, mpps, absent, load_s)

    def nft_text(self, name: str, policy: FirewallPolicy, form: str) -> str:
        """A policy for nftables in one of its forms, stateful, behind an atomic removal of what was there."""
        text = nftpeers.ruleset(policy, form, stateful=True)  # type: ignore[arg-type]
        return replacing(text)


def replacing(text: str) -> str:
    """An nft file that replaces the table of the one before, in one transaction."""
    return f"table inet {nftpeers.TABLE} {{}}\ndelete table inet {nftpeers.TABLE}\n{text}"


def _check_reached(side: str, gained: Mapping[str, int], arrived: int) -> None:
    """A peer must have judged what it is timed on, and dropped it. Raises RuntimeError."""
    beyond = sum(gained[key] for key in ("InDelivers", "ForwDatagrams", "InAddrErrors", "OutNoRoutes"))
    expected = arrived if side.startswith("nft ") else 0
    if beyond or abs(gained["InReceives"] - expected) > 0.01 * arrived:
        raise RuntimeError(
            f"{side}: of {arrived} packets {gained['InReceives']} reached IP, and {beyond} passed it"
        )


def each(kinds: Sequence[str], of: Callable[[str], float]) -> list[float]:
    """The value for each kind of set."""
    return [of(kind) for kind in kinds]


def mean_figure(goal: Goal, runs: Sequence[float], words: str) -> Figure:
    """A figure that is the mean over rule sets."""
    return Figure(statistics.mean(runs), goal.unit, list(runs), goal.goal, words, goal.at_least)


def median_figure(goal: Goal, runs: Sequence[float], words: str) -> Figure:
    """A figure that is the median of its rounds."""
    return Figure(statistics.median(runs), goal.unit, list(runs), goal.goal, words, goal.at_least)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what keeps a figure from being measured into CannotMeasure."""
    try:
        yield
    except Refused as refusal:
        raise CannotMeasure(refusal.reason) from None
    except ExceptionGroup as group:
        first = group.exceptions[0]
        raise CannotMeasure(first.reason if isinstance(first, Refused) else str(first)) from group
    except Unfit as problem:
        raise CannotMeasure(str(problem).strip().splitlines()[-1]) from None
    except (RuntimeError, nftpeers.Unfit) as problem:
        raise CannotMeasure(str(problem)) from None
