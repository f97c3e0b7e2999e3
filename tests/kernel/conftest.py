"""Fixtures for tests with a real kernel: the tiny object, a network namespace, and a place for pins."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support_bpf import TINY
from support_table import Table, racer_object

from loopback.bpf import kernel, layout, loader
from loopback.bpf.build import compile_object
from loopback.bpf.loader import Loaded

CLONE_NEWNET = 0x40000000


@pytest.fixture(scope="session")
def tiny_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "tiny.bpf.o"
    compile_object(TINY, out)
    return out


@pytest.fixture
def tiny(tiny_object: Path) -> Iterator[Loaded]:
    there = loader.load(tiny_object.read_bytes())
    yield there
    there.close()


@pytest.fixture(scope="session")
def racer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return racer_object(tmp_path_factory.mktemp("flows"))


@pytest.fixture
def small(racer: bytes, request: pytest.FixtureRequest) -> Iterator[Table]:
    """A connection table that a test fills in no time, behind the POLICY of the test's file."""
    with closing(Table(racer, 1024, request.module.POLICY)) as table:
        yield table


@pytest.fixture
def large(racer: bytes, request: pytest.FixtureRequest) -> Iterator[Table]:
    """One of the usual size."""
    with closing(Table(racer, layout.FLOWS, request.module.POLICY)) as table:
        yield table


@pytest.fixture
def veth() -> Iterator[tuple[int, int]]:
    """A namespace with a veth pair; the numbers of its two ends, `va` and `vb`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            for words in ("link add va type veth peer name vb", "link set va up", "link set vb up"):
                subprocess.run(["ip", *words.split()], check=True)
            # nobody may talk but the test: neighbour discovery would be counted
            for name in ("va", "vb"):
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            yield socket.if_nametoindex("va"), socket.if_nametoindex("vb")
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "bpf"
    assert not kernel.is_bpffs(place)
    assert kernel.ensure_bpffs(place)
    assert kernel.is_bpffs(place)
    assert not kernel.ensure_bpffs(place)
    yield place
    subprocess.run(["umount", place], check=True)
    assert not kernel.is_bpffs(place)
