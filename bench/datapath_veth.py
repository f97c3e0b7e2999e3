"""Packets a second through a veth pair: a generator at one end, at the other whoever drops them.

Each side has two network namespaces of its own, so all of them stand ready and are measured in turn. Generator and receiver
share one CPU, and both run in the sender's own time: what is compared is packets a second of that CPU's time for the whole
way, the generator's own work included on every side. So what else the machine does counts little.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, Self

from datapath_kernel import FROM_TABLE, RANDOM, Tuple, compiled, fill, frame, plan
from datapath_limited import CLONE_NEWNET, measuring_cpu, pinned

from loopback.bpf import loader
from loopback.bpf.hooks import XdpLink
from loopback.bpf.kernel import ensure_bpffs
from loopback.bpf.objects import LIVE_FRAMES

HOST_MAC, PEER_MAC = "02:77:00:00:00:01", "02:77:00:00:00:02"  # as in `frame`
SAMPLE_S: Final = 0.25  # how long one sample runs
SMALLEST, LARGEST = 256, 1 << 20  # packets of one sample
BATCH: Final = 64  # frames that the kernel hands over at once; a veth's queue holds 256
LOST: Final = 0.05  # more packets than this share lost on the way: no measurement
NFT_S: Final = 240  # a rule set that takes longer to load is no peer, and the bench says so
NFT_WORDS: Final = 600  # characters of nft's complaint
_SIOCETHTOOL, _ETHTOOL_SGRO = 0x8946, 0x2C
_ZERO: Final = bytes(4)
_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Be in a network namespace with this thread."""
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{namespace}") as there:
        if _libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
        try:
            yield
        finally:
            if _libc.setns(before.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns back")


class Sample(NamedTuple):
    """`mpps` is what arrived a second, in millions; `lost` the share that did not."""

    mpps: float
    lost: float
    sent: int


class Side:
    """One side: `host` receives, `peer` sends. A context manager; everything is gone afterwards."""

    def __init__(self, name: str) -> None:
        self.name = name
        unique = f"{os.getpid():x}-{next(_numbers)}"
        self.host, self.peer = f"lbb-{unique}h", f"lbb-{unique}p"
        self._stack = contextlib.ExitStack()
        self._packets = 0

    def __enter__(self) -> Self:
        with self._stack:
            for name in (self.host, self.peer):
                _ip("netns", "add", name)
                self._stack.callback(_ip, "netns", "del", name)
            _ip(
                "-n", self.host, "link", "add", "eth0", "address", HOST_MAC,
                "type", "veth", "peer", "name", "eth0", "address", PEER_MAC, "netns", self.peer,
            )  # fmt: skip
            for name, address in ((self.host, "10.77.0.1/24"), (self.peer, "10.77.0.2/24")):
                with inside(name):  # nobody talks but the generator
                    for place in ("all", "default", "eth0"):
                        Path(f"/proc/sys/net/ipv6/conf/{place}/disable_ipv6").write_text("1")
                    _ip("addr", "add", address, "dev", "eth0")
                    _ip("link", "set", "eth0", "up")
            with inside(self.host):
                Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
                take_frames_without_xdp("eth0")
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lb-bench-")))
            self.state, self.bpf = folder / "state", folder / "bpf"
            self.state.mkdir()
            if ensure_bpffs(self.bpf):
                self._stack.callback(subprocess.run, ["umount", str(self.bpf)], check=True)
            self.root = self.bpf / "host" / "firewall"
            self._loaded = loader.load(compiled())
            self._stack.callback(self._loaded.close)
            with inside(self.peer):
                self.ifindex = socket.if_nametoindex("eth0")
            self.random()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def random(self) -> None:
        """Send uniformly random packets."""
        self._loaded.maps["plan"].update(_ZERO, plan(4, RANDOM, self.ifindex))

    def tuples(self, tuples: Sequence[Tuple]) -> None:
        """Send these packets, again and again."""
        number = fill(self._loaded, 4, tuples)
        self._loaded.maps["plan"].update(_ZERO, plan(4, FROM_TABLE, self.ifindex, number))

    def drop_bare(self) -> None:
        """Have the host drop everything in XDP."""
        with inside(self.host):
            link = XdpLink.create(socket.if_nametoindex("eth0"), self._loaded.programs["drop"])
        self._stack.callback(link.close)

    def nft(self, text: str, folder: Path) -> float:
        """Have nftables in the host's namespace load a rule set; s. Raises RuntimeError with its words."""
        path = folder / f"{self.host}.nft"
        path.write_text(text)
        began = time.perf_counter()
        nft_load(self.host, path)
        return time.perf_counter() - began

    def send(self, number: int) -> None:
        """So many packets, now."""
        with inside(self.peer):
            while number > 0:
                part = min(number, 1 << 16)
                self._loaded.programs["out"].run(frame(4), repeat=part, flags=LIVE_FRAMES, batch=BATCH)
                number -= part

    def sample(self, seconds: float = SAMPLE_S) -> Sample:
        """Packets a second, pinned to the measuring CPU. Raises RuntimeError where packets were lost on the way."""
        with pinned():
            if not self._packets:
                number, took = SMALLEST, 0.0
                while True:
                    began = spent()
                    self.send(number)
                    took = spent() - began
                    if took >= seconds / 4 or number >= LARGEST:
                        break
                    number *= 4
                self._packets = max(SMALLEST, min(LARGEST, int(number * seconds / took)))
            before = self.received()
            began = spent()
            self.send(self._packets)
            took = spent() - began
            arrived = self.received() - before
        lost = 1 - arrived / self._packets
        if lost > LOST:
            raise RuntimeError(f"{self.name}: {lost:.0%} of {self._packets} packets were lost on the way")
        return Sample(arrived / took / 1e6, lost, self._packets)

    def received(self) -> int:
        """Packets that arrived at the host's device."""
        with inside(self.host):
            for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name.strip() == "eth0":
                    return int(rest.split()[1])
        raise RuntimeError("the host has no eth0")

    def snmp(self) -> dict[str, int]:
        """The counters of the host's IPv4."""
        with inside(self.host):
            names, values = (
                line.split()[1:]
                for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
                if line.startswith("Ip:")
            )
        return dict(zip(names, map(int, values), strict=True))


def nft_load(namespace: str, path: Path) -> None:
    """`nft -f`, as a person or a service does it. Raises RuntimeError with nft's words."""
    try:
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{namespace}", "nft", "-f", str(path)],
            check=False, capture_output=True, text=True, timeout=NFT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"nft has not loaded {path.stat().st_size / 1e6:.1f} MB after {NFT_S} s") from None
    if done.returncode:
        raise RuntimeError(f"nft refuses {path.name}: {done.stderr[:NFT_WORDS]}")


def spent() -> float:
    """s of CPU that sending and receiving took so far: this thread's, and that of the kernel's thread which receives when the
    CPU is contended. Both are on the measuring CPU."""
    return (time.thread_time_ns() + int(_softirq().read_text().split()[0])) / 1e9


@cache
def _softirq() -> Path:
    name = f"ksoftirqd/{measuring_cpu()}\n"
    for place in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if place.read_text() == name:
                return place.with_name("schedstat")
    raise RuntimeError(f"there is no {name.strip()}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def take_frames_without_xdp(device: str) -> None:
    """Have GRO on: without it a veth takes redirected frames only while it has an XDP program."""
    value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_SGRO, 1))
    request = struct.pack("=16sQ16x", device.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCETHTOOL, request)
