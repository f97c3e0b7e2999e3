"""Runs a target many times and judges each run: refused or taken is right, anything else is a crash.

A crash is an exception that the target's callers do not expect, a run over MAX_RUN_S, or memory that grows over MAX_GROWTH.
Inputs whose outcome was not seen before are kept and mutated further: guidance for the price of a string.
"""

from __future__ import annotations

import re
import resource
import signal
import time
import traceback
from collections.abc import Callable
from random import Random
from types import FrameType
from typing import Any, Final, NamedTuple

from .mutate import mutate

MAX_RUN_S: Final = 5.0  # one input; the slowest legitimate one takes a few milliseconds
MAX_GROWTH: Final = 256 * 1024 * 1024  # bytes of resident memory that one target may add
MAX_POOL: Final = 512  # inputs kept for their new outcome
_LOOK: Final = 1000  # executions between looks at memory
_VARIABLE = re.compile(r"""'[^']*'|"[^"]*"|\d+|0x[0-9a-f]+|[0-9a-f]{12,}""")


class Target(NamedTuple):
    """A parser: `run` takes one input, `allowed` is what its callers expect it to raise."""

    name: str
    family: str
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    allowed: tuple[type[BaseException], ...]


class Crash(NamedTuple):
    """What one input did, where, and the input itself."""

    what: str
    where: str
    data: bytes


class Outcome(NamedTuple):
    """How a target fared. `taken` counts inputs that were not refused, `outcomes` how many different ones there were."""

    target: str
    executions: int
    seconds: float
    taken: int
    outcomes: int
    crashes: tuple[Crash, ...]

    @property
    def rate(self) -> float:
        """Executions per second."""
        return self.executions / max(self.seconds, 1e-9)


class Hang(BaseException):
    """A run took too long; no handler of the code under test may take it for its own."""


def attempt(target: Target, data: bytes) -> tuple[str, Crash | None]:
    """One run: what came of it, and the crash if it is one."""
    try:
        target.run(data)
    except target.allowed as error:
        return _sign(error), None
    except (Exception, Hang) as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((f for f in reversed(frames) if "/fuzz/" not in f.filename), frames[-1])
        where = f"{last.filename.rpartition('/loopback/')[2]}:{last.lineno} {last.name}"
        return _sign(error), Crash(f"{type(error).__name__}: {str(error)[:200]}", where, data)
    return "taken", None


def _sign(error: BaseException) -> str:
    """The outcome without its particulars."""
    return f"{type(error).__name__} {_VARIABLE.sub('', str(error)[:160])[:80]}"


def run(target: Target, executions: int, seed: int) -> Outcome:
    """Try a target with its seeds and then with mutations of them. Must be called in the main thread, for its timer."""
    random = Random(f"{target.name} {seed}")
    pool = list(target.seeds)
    seen: set[str] = set()
    crashes: dict[str, Crash] = {}
    taken = 0
    before = signal.signal(signal.SIGALRM, _hang)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    try:
        for number in range(executions):
            data = (
                target.seeds[number]
                if number < len(target.seeds)
                else mutate(random.choice(pool), target.family, random, pool)
            )
            signal.setitimer(signal.ITIMER_REAL, MAX_RUN_S)
            signed, crash = attempt(target, data)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if crash is not None:
                crashes.setdefault(crash.where, crash)
            taken += signed == "taken"
            if signed not in seen:
                seen.add(signed)
                if len(pool) < MAX_POOL:
                    pool.append(data)
            if number % _LOOK == 0 or number == executions - 1:
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
                if grown > MAX_GROWTH:
                    crashes.setdefault("memory", Crash(f"memory grew by {grown >> 20} MiB", "memory", data))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.perf_counter() - started
    return Outcome(target.name, executions, seconds, taken, len(seen), tuple(crashes.values()))


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"no end after {MAX_RUN_S:g} s")


def table(outcomes: list[Outcome]) -> str:
    """One line per target, and a sum."""
    lines = [
        f"{'target':<20} {'executions':>11} {'per second':>11} {'taken':>9} {'outcomes':>9} {'crashes':>8}"
    ]
    lines += [
        f"{o.target:<20} {o.executions:>11,} {o.rate:>11,.0f} {o.taken:>9,} {o.outcomes:>9,} {len(o.crashes):>8}"
        for o in outcomes
    ]
    total, seconds = sum(o.executions for o in outcomes), sum(o.seconds for o in outcomes)
    lines.append(f"{'all':<20} {total:>11,} {total / max(seconds, 1e-9):>11,.0f} in {seconds:.0f} s")
    return "\n".join(lines)


def plain(outcome: Outcome) -> dict[str, Any]:
    """The same for a program."""
    crashes = [{"what": c.what, "where": c.where, "input": c.data.hex()} for c in outcome.crashes]
    return {**outcome._asdict(), "rate": round(outcome.rate), "crashes": crashes}
