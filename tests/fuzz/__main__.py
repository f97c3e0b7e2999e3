"""`python -m tests.fuzz`: how many inputs each parser was tried with, how fast, and what came of it.

    --executions N   of each target (default 10,000)     --target NAME   only these (may be repeated)
    --seed S         the same inputs again               --json          for programs
    --engine guided  by coverage, with atheris; `mutation` without it    --jobs N   targets at a time

Exit code 0: no crash · 1: a crash. Inputs that crash are in the JSON, and of a guided run in build/fuzz/ too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' helpers

from . import engine, guided, targets

OUT = Path("build/fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--target", action="append", choices=targets.names())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutation", "guided"), default="mutation")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a job runs
    options = parser.parse_args()
    if options.engine == "guided" and find_spec("atheris") is None:
        parser.error("atheris is not installed here; use --engine mutation")
    if options.one:
        print(json.dumps(_one(options.one, options)))
        return 0
    wanted = options.target or targets.names()
    with ThreadPoolExecutor(options.jobs) as jobs:
        found = []
        for outcome in jobs.map(lambda name: _job(name, options), wanted):
            found.append(outcome)
            if not options.json:
                print(_line(outcome), flush=True)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        total = sum(o["executions"] for o in found)
        print(f"{'all':<18} {total:>12,} executions  {sum(len(o['crashes']) for o in found)} crashes")
        for outcome in found:
            for crash in outcome["crashes"]:
                print(
                    f"CRASH {outcome['target']}: {crash['what']}\n  at {crash['where']}\n  input {crash['input'][:400]}"
                )
    return 1 if any(o["crashes"] for o in found) else 0


def _line(outcome: dict[str, Any]) -> str:
    return (
        f"{outcome['target']:<18} {outcome['executions']:>12,} executions {outcome['rate']:>9,} /s "
        f"{outcome['seconds']:>7.0f} s  {outcome['taken']:>9,} taken  {len(outcome['crashes'])} crashes"
    )


def _job(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One target in a process of its own, so that memory is its own too."""
    if options.engine == "guided":
        return guided.start(name, options.executions, options.seed, OUT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.fuzz",
            f"--one={name}",
            f"--executions={options.executions}",
            f"--seed={options.seed}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        crash = {
            "what": f"the process ended with {done.returncode}: {done.stderr[-400:]}",
            "where": "process",
            "input": "",
        }
        return {"target": name, "executions": 0, "seconds": 0, "rate": 0, "taken": 0, "crashes": [crash]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    return engine.plain(engine.run(targets.make(name), options.executions, options.seed))


if __name__ == "__main__":
    sys.exit(main())
