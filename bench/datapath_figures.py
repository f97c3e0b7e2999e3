"""The figures that are times and rates of packets. Each has a function of its own, named like its key."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

import datapath_ours as ours
import datapath_sets as sets
import rulegen
import rulesets
from datapath_ours import Task
from datapath_run import (
    PREFIXES,
    CannotMeasure,
    Flows,
    Goal,
    Run,
    mean_figure,
    median,
    median_figure,
    progress,
    ratio,
    spread,
)
from report import Figure

from loopback.modules.firewall.policy_fields import show

GROWTH_OF: Final = "acl1"  # the kind that the 100k policy is made like
CURVE: Final = (10, 100, 1_000, 10_000, 100_000)
#: Rules that nftables is drawn with: more take minutes to load.
CURVE_NFT: Final = (10, 100, 1_000, 10_000)


def new_flow_vs_lpm(run: Run, goal: Goal) -> Figure:
    """The new-flow path at 10k rules ÷ two kernel LPM look-ups over 10k prefixes."""
    found = [run.new_flows(kind) for kind in run.kinds]
    runs = [ratio(one.side("many"), one.side("lpm")) for one in found]
    words = "; ".join(
        f"{one.name} {median(one.side('many')):.0f} ns {spread(one.side('many'))} ÷ LPM {median(one.side('lpm')):.0f} ns"
        f" {spread(one.side('lpm'))}"
        for one in found
    )
    return mean_figure(goal, runs, words)


def growth_10k(run: Run, goal: Goal) -> Figure:
    """The new-flow path at 10k rules ÷ at ten."""
    found = [run.new_flows(kind) for kind in run.kinds]
    runs = [ratio(one.side("many"), one.side("few")) for one in found]
    words = "; ".join(f"{one.name}: ten rules {median(one.side('few')):.0f} ns" for one in found)
    return mean_figure(goal, runs, words)


def growth_100k(run: Run, goal: Goal) -> Figure:
    """The new-flow path at a generated 100k policy ÷ at ten rules of it."""
    found = run.large(GROWTH_OF)
    runs = [a / b for a, b in zip(found.side("many"), found.side("few"), strict=True)]
    return median_figure(goal, runs, f"{found.name}: {median(found.side('many')):.0f} ns")


def established_growth(run: Run, goal: Goal) -> Figure:
    """A packet of a flow that stands, at 10k rules ÷ at ten."""
    found = [run.established(kind) for kind in run.kinds]
    runs = [ratio(one.side("many"), one.side("few")) for one in found]
    words = f"{sets.FLOWS} flows, " + "; ".join(
        f"{one.name} {median(one.side('many')):.0f} ns" for one in found
    )
    return mean_figure(goal, runs, words)


def vs_bare(run: Run, goal: Goal) -> Figure:
    """Packets a second of the whole product at 10k rules ÷ bare XDP_DROP."""
    found = [run.veth(kind) for kind in run.kinds]
    runs = [one.median("ours") / one.median("bare") for one in found]
    words = "; ".join(
        f"{one.name} {one.median('ours'):.2f} of {one.median('bare'):.2f} Mpps: the firewall's own "
        f"{1000 / one.median('ours') - 1000 / one.median('bare'):.0f} ns may be "
        f"{(1 / goal.goal - 1) * 1000 / one.median('bare'):.0f}"
        for one in found
        if goal.goal
    )
    return mean_figure(goal, runs, words)


def vs_nft_best(run: Run, goal: Goal) -> Figure:
    """Packets a second at 10k rules ÷ the best nftables form of the same policy."""
    found = [run.veth(kind) for kind in run.kinds]
    runs = [one.median("ours") / one.median(one.best()) for one in found]
    words = "; ".join(
        f"{one.name} "
        + ", ".join(f"{side} {median(rates):.3f}" for side, rates in one.mpps.items() if side != "bare")
        + " Mpps"
        for one in found
    )
    return mean_figure(goal, runs, words)


def vs_nft_linear(run: Run, goal: Goal) -> Figure:
    """Packets a second, 1k simple rules of which none matches ÷ the same in linear nftables."""
    found = run.linear()
    found.median("ours")
    runs = [a / b for a, b in zip(found.mpps["ours"], found.mpps["nft linear"], strict=True)]
    return median_figure(
        goal,
        runs,
        f"{found.median('ours'):.2f} ÷ {found.median('nft linear'):.4f} Mpps; bare {found.median('bare'):.2f}",
    )


def million_added_ns(run: Run, goal: Goal) -> Figure:
    """ns that a set of a million prefixes adds to a packet with uniformly random addresses."""
    count = 20_000 if run.quick else 1_000_000
    files = {"with": million_file(run, count), "without": run.shelf.put("nothing denied", rulesets.simple(0))}
    progress(f"a set of {count} prefixes: ns")
    found = run.limited(ours.new_flows, Task(run.program, files, run.rounds))
    if found.refused:
        raise CannotMeasure("; ".join(found.refused.values()))
    runs = [a - b for a, b in zip(found.above["with"], found.above["without"], strict=True)]
    return median_figure(
        goal,
        runs,
        f"{median(found.above['with']):.0f} − {median(found.above['without']):.0f} ns {spread(runs)}",
    )


def million_file(run: Run, count: int) -> Path:
    """A policy that drops what comes from any of so many prefixes."""
    held = [show(p) for p in rulesets.million(count)]
    return run.shelf.put(
        f"{count} denied",
        rulesets.simple(0),
        {"sets": {"denied": held}, "rules": [{"name": "denied", "from": ["@denied"], "action": "drop"}]},
    )


def memory_mib(run: Run, goal: Goal) -> Figure:
    """MiB that the kernel accounts to maps and programs at 10k rules in both slots, without the connection table."""
    progress("memory")
    runs = []
    for kind in run.kinds:
        name, fives = run.set10k(kind)
        runs.append(run.limited(ours.memory, run.program, run.shelf.put(name, sets.dropping(fives))))
    return mean_figure(goal, runs, "maps and programs, from the kernel's own accounts")


# ── what explains the others ──────────────────────────────────────────────────────────────────────────────────────────────


def new_flow_ns(run: Run, goal: Goal) -> Figure:
    """ns above the bare program of the new-flow path at 10k rules."""
    found = [run.new_flows(kind) for kind in run.kinds]
    return mean_figure(goal, [median(one.side("many")) for one in found], "above the bare program")


def lpm_ns(run: Run, goal: Goal) -> Figure:
    """ns above the bare program of two LPM look-ups."""
    found = [run.new_flows(kind) for kind in run.kinds]
    return mean_figure(goal, [median(one.side("lpm")) for one in found], "above the bare program")


def trace_vs_lpm(run: Run, goal: Goal) -> Figure:
    """The same as `new_flow_vs_lpm` with packets at the corners of the rules in place of uniformly random ones."""
    runs, words = [], []
    for kind in run.kinds:
        name, fives = run.set10k(kind)
        progress(f"packets at the corners of rules: {name}")
        policy = sets.dropping(fives)
        task = Task(
            run.program, {"many": run.shelf.put(name, policy)}, run.rounds, tuples=sets.corner_tuples(policy),
            prefixes={"lpm": sets.prefixes(kind, PREFIXES, fives)},
        )  # fmt: skip
        found = Flows(name, run.limited(ours.new_flows, task))
        runs.append(ratio(found.side("many"), found.side("lpm")))
        words.append(f"{name} {median(found.side('many')):.0f} ÷ {median(found.side('lpm')):.0f} ns")
    return mean_figure(goal, runs, "; ".join(words))


def ipv6_vs_lpm(run: Run, goal: Goal) -> Figure:
    """The same as `new_flow_vs_lpm` on generated IPv6 policies of 10k rules."""
    runs, words = [], []
    for kind in run.kinds:
        fives = rulegen.generate(kind, 1_000 if run.quick else 10_000, family=6)
        name = f"{kind} IPv6 {len(fives)}"
        progress(f"new flows: {name}")
        files = {"many": run.shelf.put(name, sets.dropping(fives))}
        peer = {"lpm": sets.prefixes(kind, PREFIXES, fives)}
        found = Flows(
            name, run.limited(ours.new_flows, Task(run.program, files, run.rounds, family=6, prefixes=peer))
        )
        runs.append(ratio(found.side("many"), found.side("lpm")))
        words.append(f"{name} {median(found.side('many')):.0f} ÷ {median(found.side('lpm')):.0f} ns")
    return mean_figure(goal, runs, "; ".join(words))


def ten_rules_ns(run: Run, goal: Goal) -> Figure:
    """ns above the bare program of the new-flow path at ten rules."""
    found = [run.new_flows(kind) for kind in run.kinds]
    return mean_figure(goal, [median(one.side("few")) for one in found], "above the bare program")


def vary_ns(run: Run, goal: Goal) -> Figure:
    """ns that making each packet another one costs; it is part of no other figure."""
    found = [run.new_flows(kind).times for kind in run.kinds]
    return mean_figure(
        goal,
        [one.vary for one in found],
        f"the bare program alone takes {statistics.mean(t.bare for t in found):.0f} ns",
    )


def curve(run: Run) -> dict[str, dict[int, float]]:
    """For the plot: ns per packet by number of rules, for ours, the kernel's LPM and forms of nftables; Mpps by side."""
    found: dict[str, dict[int, float]] = {}
    rounds = max(1, run.rounds // 3)
    for count in CURVE[:3] if run.quick else CURVE:
        fives = rulegen.generate(GROWTH_OF, count)
        policy = sets.dropping(fives)
        name = f"{GROWTH_OF} generated {count}"
        progress(f"curve: {count} rules")
        task = Task(
            run.program, {"ours": run.shelf.put(name, policy)}, rounds,
            prefixes={"2 × kernel LPM": sets.prefixes(GROWTH_OF, count, fives)},
        )  # fmt: skip
        for side, times in run.limited(ours.new_flows, task).above.items():
            found.setdefault(side, {})[count] = median(times)
        if count in CURVE_NFT:
            forms = ("linear", "layered", "tree") if count <= 1_000 else ("layered", "tree")
            race = run.race(name, policy, forms, rounds)
            for side, rates in race.mpps.items():
                found.setdefault(f"Mpps {side}", {})[count] = median(rates)
                if side.startswith("nft "):
                    found.setdefault(side, {})[count] = 1e3 / median(rates) - 1e3 / race.median("bare")
    return found
