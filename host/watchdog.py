"""The dead-man timer of a trial: a process of its own that undoes what the agent does not finish.

    python -m loopback.host.watchdog MODULE_FOLDER MODULE GENERATION SECONDS

It says "ready" on its output before the agent commits, outlives the agent, and at the deadline, if the state on disk still
says that this generation is on trial, ends the process on trial and undoes the trial on disk, under the lock that the agent
takes as well. It starts nothing: the datapath falls back by itself, and a running or restarted agent brings back
what was promoted. Whatever happens first, the other finds nothing left to do.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

from loopback.contracts.codes import Code, Refusal, Refused
from loopback.host import proc, transitions
from loopback.host.disk import Disk
from loopback.host.state import ModuleState, ModuleStore

POLL_S: Final = 0.25
RETRY_S: Final = 1.0  # between attempts when the disk refuses


def undo_trial(store: ModuleStore, generation: int) -> bool:
    """End a trial that nobody finished; whether there was one. Raises Refused(HOST_DISK)."""
    found: list[ModuleState] = []

    def decide(state: ModuleState) -> ModuleState:
        trial = state.trial
        if trial is None or trial.generation != generation:
            return state
        found.append(state)
        # First the process: after the write nobody would know it any more.
        proc.kill_group(trial.pid, trial.pid_start)
        return transitions.undo(
            state,
            reason=Refusal(
                Code.HOST_UNCONFIRMED,
                "the agent did not finish the trial in time, so the watchdog undid it",
                "see the agent's log; it is tried again when the rollout asks again",
            ),
        )

    store.change(decide)
    return bool(found)


def still_on_trial(store: ModuleStore, generation: int) -> bool:
    """Whether this generation is on trial, as far as the disk can be read."""
    try:
        trial = store.read().trial
    except Refused:
        return True
    return trial is not None and trial.generation == generation


def main(arguments: list[str]) -> int:
    """Wait, and act at the deadline. Exit code 0: the trial was finished without it, 3: it undid it."""
    folder, module, generation, seconds = (
        Path(arguments[0]),
        arguments[1],
        int(arguments[2]),
        float(arguments[3]),
    )
    deadline = time.monotonic() + seconds
    store = ModuleStore(Disk(), folder, module)
    print("ready", flush=True)
    while time.monotonic() < deadline:
        if not still_on_trial(store, generation):
            return 0
        time.sleep(POLL_S)
    while True:
        try:
            return 3 if undo_trial(store, generation) else 0
        except Refused:
            time.sleep(RETRY_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
