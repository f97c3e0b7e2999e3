"""The same targets guided by coverage: atheris (libFuzzer) instruments the code under test and keeps what reaches more of it.

Mutations are half libFuzzer's own and half those of `mutate.py`. A target runs in a process of its own, which writes down what
it counted, since libFuzzer ends the process itself.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any, Final

MAX_RUN_S: Final = 10  # seconds for one input, in libFuzzer's own count
MAX_MEMORY: Final = 1024  # MiB of resident memory of the whole process
NEWS: Final = 1000  # executions between two notes of how far it came
_DONE = re.compile(r"stat::number_of_executed_units: (\d+)")  # its last words


def start(name: str, executions: int, seed: int, out: Path) -> dict[str, Any]:
    """Run a target in a process of its own; the outcome as `engine.plain` has it."""
    place = (out / name).absolute()
    shutil.rmtree(place, ignore_errors=True)
    (place / "corpus").mkdir(parents=True)
    started = time.monotonic()
    with (place / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", name, str(executions), str(seed), str(place)],
            stdout=log, stderr=log, check=False,
        )  # fmt: skip
    seconds = time.monotonic() - started
    said = (place / "log").read_text(errors="replace")
    notes = place / "notes.json"
    found: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {"executions": 0, "taken": 0}
    if match := _DONE.search(said):
        found["executions"] = int(match[1])
    crashes = [json.loads(line) for line in (place / "crashes.jsonl").read_text().splitlines()] if (
        place / "crashes.jsonl"
    ).exists() else []  # fmt: skip
    if done.returncode != 0 or match is None:
        crashes.append(
            {
                "what": f"the process ended with {done.returncode}: {said[-400:]}",
                "where": "process",
                "input": "",
            }
        )
    kept = len(list((place / "corpus").iterdir()))
    return {
        "target": name, "seconds": seconds, "rate": round(found["executions"] / seconds), "outcomes": kept, **found,
        "crashes": crashes,
    }  # fmt: skip


def child(name: str, executions: int, seed: int, place: Path) -> None:
    """What the process does: never returns."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import atheris

    with atheris.instrument_imports(include=["loopback"]):
        from . import engine, mutate, targets
    made = targets.make(name)
    for number, data in enumerate(made.seeds):
        (place / "corpus" / f"seed-{number}").write_bytes(data)
    counted = {"executions": 0, "taken": 0}
    seen: set[str] = set()

    def note() -> None:
        (place / "notes.json").write_text(json.dumps(counted))

    def once(data: bytes) -> None:
        signed, crash = engine.attempt(made, data)
        counted["executions"] += 1
        counted["taken"] += signed == "taken"
        if crash is not None and crash.where not in seen:
            seen.add(crash.where)
            with (place / "crashes.jsonl").open("a") as file:
                file.write(json.dumps({"what": crash.what, "where": crash.where, "input": data.hex()}) + "\n")
        if counted["executions"] % NEWS == 0:
            note()

    def mutated(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        if random.random() < 0.5:
            return atheris.Mutate(data, most)  # type: ignore[no-any-return]
        return mutate.mutate(data, made.family, random, made.seeds)[:most]

    longest = max(16384, *(2 * len(data) for data in made.seeds))
    arguments = [
        "fuzz",
        f"-runs={executions}",
        f"-seed={seed + 1}",
        f"-max_len={longest}",
        f"-timeout={MAX_RUN_S}",
        f"-rss_limit_mb={MAX_MEMORY}",
        f"-artifact_prefix={place}/",
        "-verbosity=0",
        "-print_final_stats=1",
        str(place / "corpus"),
    ]
    atheris.Setup(arguments, once, custom_mutator=mutated, internal_libfuzzer=True)
    note()
    atheris.Fuzz()


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
