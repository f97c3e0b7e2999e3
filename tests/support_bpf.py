"""What tests of the loader and the hooks share: a frame, few rights, waiting, and asking the tiny object."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loopback.bpf import libbpf
from loopback.bpf.loader import Loaded

TINY = Path(__file__).parent / "kernel" / "tiny.bpf.c"
WITHOUT_BPF = Path(__file__).parent / "e2e" / "without_bpf.py"
#: UDP from 192.0.2.1 to 192.0.2.2 without a checksum, in 64 bytes; its ports are at 34 and 36.
FRAME = (
    b"\xff" * 6 + b"\2" * 6 + b"\x08\0"
    + bytes.fromhex("4500003200004000401100 00c0000201c0000202".replace(" ", ""))
    + struct.pack("!HHHH", 4096, 8192, 30, 0)
    + bytes(22)
)  # fmt: skip
ONLY_THREE = [
    "setpriv", "--no-new-privs", "--bounding-set=-all,+bpf,+net_admin,+perfmon",
    "--inh-caps=-all,+bpf,+net_admin,+perfmon", "--",
]  # fmt: skip


def key(number: int) -> bytes:
    return struct.pack("=I", number)


def value(number: int) -> bytes:
    return struct.pack("=Q", number)


def counts(there: Loaded) -> list[int]:
    cpus = libbpf.possible_cpus()
    found = []
    for index in range(4):
        each = there.maps["seen"].lookup(key(index), 8 * cpus)
        assert each is not None
        found.append(sum(struct.unpack(f"={cpus}Q", each)))
    return found


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "not within 60 s"
        time.sleep(0.002)  # a waiter that spins takes a core from whom it waits for


def in_process(script: str, *words: object, wrapper: list[str] | None = None) -> str:
    """Run Python code in a process of its own, in this namespace; what it printed."""
    done = subprocess.run(
        [*(wrapper or []), sys.executable, "-W", "error", "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
