"""What every bench shares: measuring sides in turn, saying on what machine, writing figures, printing whether goals hold."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One measured value: the median of `runs`, not a number where it could not be measured (`words` say why).

    `goal` is the most it may be, with `at_least` the least, and None where it only explains another.
    """

    value: float
    unit: str
    runs: list[float]
    goal: float | None = None
    words: str = ""
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether it reaches its goal."""
        if self.goal is None:
            return True
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def figure(runs: list[float], unit: str, goal: float | None = None, words: str = "") -> Figure:
    """A figure from its runs."""
    return Figure(statistics.median(runs), unit, runs, goal, words)


def in_turn(sides: Mapping[str, Callable[[int], object]], rounds: int, each: int) -> dict[str, list[float]]:
    """Milliseconds of one call, by side: the median of `each` calls in each of so many rounds.

    The sides alternate call by call, so that what the machine does besides meets them alike. A side is called with the
    number of the call, from 0, and may use it to find something that it did not see before.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(at * each, (at + 1) * each):
            for name, call in sides.items():
                began = time.perf_counter_ns()
                call(number)
                taken[name].append((time.perf_counter_ns() - began) / 1e6)
        for name, times in taken.items():
            found[name].append(statistics.median(times))
    return found


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def machine() -> dict[str, Any]:
    """Where this was measured."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def write(path: Path, figures: Mapping[str, Figure]) -> None:
    """The figures as JSON: {"machine": …, "figures": {key: {"value", "goal", "unit", "runs"}}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine(),
        "figures": {
            key: {
                "value": None if math.isnan(f.value) else round(f.value, 4), "goal": f.goal, "unit": f.unit,
                "runs": [round(r, 4) for r in f.runs],
            }
            for key, f in figures.items()
        },
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1) + "\n")


def table(title: str, figures: Mapping[str, Figure]) -> str:
    """The same for people."""
    about = machine()
    lines = [f"{title} · {about['cpus']} × {about['cpu']} · load {about['load']}"]
    for key, f in figures.items():
        goal = "" if f.goal is None else f"goal ≤ {f.goal:g}  {'holds' if f.holds else 'MISSED'}"
        lines.append(
            f"  {key:<26} {f.value:>8.3f} {f.unit:<3} [{min(f.runs):.3f} … {max(f.runs):.3f}]  {goal:<22} {f.words}"
        )
    return "\n".join(lines)
