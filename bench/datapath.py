"""What the firewall's datapath costs and what it holds, beside the kernel's own LPM and nftables, in one run on one machine.

Writes the figures as JSON and a picture, and prints a table with every goal. Needs root, for its namespaces and for nftables;
our own side runs with the capabilities of the module's manifest. Docs: bench/README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import datapath_figures as figures
import datapath_live as live
import datapath_plot
from datapath_run import CannotMeasure, Goal, Run, explained, progress, require
from report import Figure, machine, write

Measure = Callable[[Run, Goal], Figure]
#: In the order in which they are measured and printed: what it is, its goal, and its function.
FIGURES: Final[dict[str, tuple[Goal, Measure]]] = {
    "new_flow_vs_lpm": (Goal(1.25, "×"), figures.new_flow_vs_lpm),
    "growth_10k": (Goal(2, "×"), figures.growth_10k),
    "growth_100k": (Goal(4, "×"), figures.growth_100k),
    "established_growth": (Goal(1.1, "×"), figures.established_growth),
    "vs_bare": (Goal(0.5, "×", at_least=True), figures.vs_bare),
    "vs_nft_best": (Goal(3, "×", at_least=True), figures.vs_nft_best),
    "vs_nft_linear": (Goal(100, "×", at_least=True), figures.vs_nft_linear),
    "change_vs_nft": (Goal(1, "×"), live.change_vs_nft),
    "change_ms": (Goal(100, "ms"), live.change_ms),
    "million_load_vs_nft": (Goal(0.25, "×"), live.million_load_vs_nft),
    "million_added_ns": (Goal(80, "ns"), figures.million_added_ns),
    "mixed": (Goal(0, "packets"), live.mixed),
    "leaked": (Goal(0, "packets"), live.leaked),
    "memory_mib": (Goal(64, "MiB"), figures.memory_mib),
    "start_s": (Goal(0.5, "s"), live.start_s),
    "new_flow_ns": (Goal(None, "ns"), figures.new_flow_ns),
    "lpm_ns": (Goal(None, "ns"), figures.lpm_ns),
    "trace_vs_lpm": (Goal(None, "×"), figures.trace_vs_lpm),
    "ipv6_vs_lpm": (Goal(None, "×"), figures.ipv6_vs_lpm),
    "ten_rules_ns": (Goal(None, "ns"), figures.ten_rules_ns),
    "vary_ns": (Goal(None, "ns"), figures.vary_ns),
}
ROUNDS, QUICK_ROUNDS = 9, 2
CURVE: Final = "curve"  # the picture's measurements, as a word for --only


def measured(run: Run, key: str) -> Figure:
    """One figure; without a value, and with the reason, where it cannot be measured."""
    goal, measure = FIGURES[key]
    try:
        with explained():
            return measure(run, goal)
    except CannotMeasure as reason:
        return Figure(math.nan, goal.unit, [], goal.goal, f"cannot be measured: {reason}", goal.at_least)


def verdict(figure: Figure) -> str:
    """Whether it holds, and by how much it misses."""
    if figure.goal is None:
        return ""
    if figure.holds:
        return "holds"
    if math.isnan(figure.value):
        return "MISSED"
    if not figure.goal:
        return f"MISSED by {figure.value:g}"
    by = figure.goal / figure.value if figure.at_least else figure.value / figure.goal
    return f"MISSED {by:.2f}-fold" if by >= 1.2 else f"MISSED by {by - 1:.1%}"


def table(found: dict[str, Figure]) -> str:
    """The figures for people."""
    about = machine()
    lines = [f"datapath · {about['cpus']} × {about['cpu']} · kernel {about['kernel']} · load {about['load']}"]
    for key, one in found.items():
        goal = "" if one.goal is None else f"{'≥' if one.at_least else '≤'} {one.goal:g}"
        value = (
            "–"
            if math.isnan(one.value)
            else f"{one.value:.3f}"
            if abs(one.value) < 1000
            else f"{one.value:.0f}"
        )
        span = f"[{min(one.runs):.3g} … {max(one.runs):.3g}]" if len(one.runs) > 1 else ""
        lines.append(
            f"  {key:<20} {value:>9} {one.unit:<7} {span:<18} {goal:<7} {verdict(one):<16} {one.words}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure, write, print. 0 whether goals hold or not; 1 where it cannot run at all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="KEY", choices=[*FIGURES, CURVE], help="these figures and no others"
    )
    parser.add_argument(
        "--rounds", type=int, help=f"rounds in which sides take turns ({ROUNDS}; --quick: {QUICK_ROUNDS})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sets and few packets: shows that the bench works, no more"
    )
    parser.add_argument("--json", action="store_true", help="print the file instead of the table")
    parser.add_argument("--out", type=Path, default=Path("build/bench/datapath.json"))
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        raise SystemExit("bench-datapath: only root may make namespaces and nftables rules; run it as root")
    require()
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # leave no namespace behind, also where a shell had it ignored
        signal.signal(number, signal.default_int_handler)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    wanted = options.only or [*FIGURES, CURVE]
    found: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(prefix="datapath-", dir=options.out.parent) as folder:
        run = Run(Path(folder).resolve(), rounds=rounds, quick=options.quick)
        for key in [key for key in FIGURES if key in wanted]:
            found[key] = measured(run, key)
            write(options.out, found)  # as far as it came, should somebody end it
            progress(f"{key}: {found[key].value:.3f} {found[key].unit}  {verdict(found[key])}")
        if CURVE in wanted:
            about = machine()
            picture = options.out.with_suffix(".png")
            try:
                with explained():
                    datapath_plot.draw(
                        figures.curve(run),
                        picture,
                        f"{about['cpus']} × {about['cpu']}, kernel {about['kernel']}",
                    )
                progress(f"picture: {picture}")
            except CannotMeasure as reason:
                progress(f"no picture: {reason}")
    write(options.out, found)
    print(options.out.read_text() if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
