"""Processes by their identity: a process id together with when it started, since ids are used again."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def started_at(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none (or only its remains)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return 0
    # The command name, in parentheses, may contain anything; fields are counted behind its end (proc(5)).
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def kill_group(pid: int, start: int) -> bool:
    """End a process group with SIGKILL if its leader is still the one that started then; whether it was."""
    if pid <= 1 or start == 0 or started_at(pid) != start:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return True
