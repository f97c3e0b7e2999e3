"""How much the verifier walks for each program: what makes it walk much more is seen here, before a kernel refuses it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import support_stack
from support_datapath import program

from loopback.bpf import build, layout
from loopback.modules.firewall.pins import PROGRAMS, Pins

pytestmark = pytest.mark.kernel

TABLE = Path(build.__file__).parent / "programs" / "verified.txt"
TOLERANCE = 0.2  # of the recorded number; another compiler or kernel differs by less
MOST = 1_000_000  # what the kernel allows; the programs stay far below it


def test_the_verifier_walks_what_is_recorded() -> None:
    opened = Pins(None, program()).open(64)
    found = {name: opened.programs[name].verified for name in PROGRAMS}
    opened.close()
    assert all(found.values()), "the kernel is too old to tell"
    major = os.uname().release.split(".")[0]
    table = "".join(f"{name} {count}\n" for name, count in found.items())
    words = [line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    recorded_for = next(one for name, one in words if name == "kernel").split(".")[0]
    recorded = {name: int(count) for name, count in words if name != "kernel"}
    assert recorded.keys() == found.keys(), f"record this:\n{table}"
    assert max(found.values()) < MOST / 4
    if major == recorded_for:
        off = {n: c for n, c in found.items() if abs(c - recorded[n]) > TOLERANCE * recorded[n] + 10}
        assert not off, f"{off}: if that is meant, record this in {TABLE.name}:\n{table}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_older_kernels_have_the_stack_for_every_way_of_calls(name: str) -> None:
    """Linux before 6.8 rounds each frame up to 32 bytes where later ones round to 16."""
    found = support_stack.of_program(program(), name)
    assert found.bytes <= support_stack.LIMIT
    assert found.calls <= support_stack.DEEPEST


def test_the_programs_are_verified_for_the_largest_slots_too() -> None:
    """Offsets into slots of 64 MiB leave the verifier no room for anything that is added after they were masked."""
    opened = Pins(None, program(), layout.MAX_HALF).open(64)
    assert set(opened.programs) >= set(PROGRAMS)
    opened.close()
