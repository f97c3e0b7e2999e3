"""A host behind the real firewall and a peer beside it: two namespaces, a veth pair, a bpf file system of their own.

Frames are written to the peer's end of the wire and read behind the host's XDP hook, and the other way round behind its egress
hook. Every probe carries a number of its own, and a marker that always passes follows, so nothing waits for a silence.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datapath_veth import inside, take_frames_without_xdp
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet as Frame
from scapy.packet import Raw

from loopback.bpf import rtnl
from loopback.bpf.flood import Flood
from loopback.bpf.kernel import ensure_bpffs
from loopback.cli.firewall_judge import object_file
from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import FirewallPolicy

__all__ = [
    "AH", "ARP", "ICMP", "IP", "TCP", "UDP", "Dot1Q", "Ether", "Frame", "ICMPv6DestUnreach", "ICMPv6EchoRequest",
    "ICMPv6ND_NS", "IPv6", "IPv6ExtHdrDestOpt", "IPv6ExtHdrFragment", "IPv6ExtHdrHopByHop", "IPv6ExtHdrRouting", "Raw",
    "World", "fragment", "inside", "policy_of",
]  # fmt: skip

HOST4, PEER4, OTHER4 = "10.77.0.1", "10.77.0.2", "10.77.0.3"
HOST6, PEER6 = "fd77::1", "fd77::2"
HOST_MAC, PEER_MAC = "02:77:00:00:00:01", "02:77:00:00:00:02"
ETH_P_ALL = 3
WAIT_S = 60.0

_numbers = itertools.count(1)
_objects: list[bytes] = []


def program() -> bytes:
    """The compiled firewall, compiled once per session."""
    if not _objects:
        _objects.append(object_file())
    return _objects[0]


def policy_of(text: str) -> FirewallPolicy:
    """A policy from YAML."""
    return policies.parse(text.encode(), "test.yaml")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class World:
    """Use as a context manager; everything is gone afterwards."""

    def __init__(self) -> None:
        unique = f"{os.getpid():x}{next(_numbers):x}"
        self.host, self.peer = f"lbh{unique}", f"lbp{unique}"
        self._stack = contextlib.ExitStack()
        self._datapaths: list[Datapath] = []

    def __enter__(self) -> World:
        with self._stack:
            for name in (self.host, self.peer):
                _ip("netns", "add", name)
                self._stack.callback(_ip, "netns", "del", name)
            _ip(
                "-n", self.host, "link", "add", "eth0", "address", HOST_MAC,
                "type", "veth", "peer", "name", "eth0", "address", PEER_MAC, "netns", self.peer,
            )  # fmt: skip
            for name, v4, v6 in ((self.host, HOST4, HOST6), (self.peer, PEER4, PEER6)):
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", "eth0", "up")
                _ip("-n", name, "addr", "add", f"{v4}/24", "dev", "eth0")
                _ip("-n", name, "addr", "add", f"{v6}/64", "dev", "eth0", "nodad")
            _ip("-n", self.peer, "addr", "add", f"{OTHER4}/24", "dev", "eth0")
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lb-datapath-")))
            self.state = folder / "state"
            self.bpf = folder / "bpf"
            if ensure_bpffs(self.bpf):
                self._stack.callback(subprocess.run, ["umount", str(self.bpf)], check=True)
            self.root = self.bpf / "host" / "firewall"
            self._stack.callback(self._close_all)
            self._wires = {
                name: self._stack.enter_context(self._wire(name)) for name in (self.host, self.peer)
            }
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _close_all(self) -> None:
        for datapath in self._datapaths:
            with contextlib.suppress(OSError):
                datapath.close()

    def open(self, data: bytes | None = None, **settings: Any) -> Datapath:
        """The host's firewall: opened anew, or adopted."""
        with inside(self.host):
            datapath = Datapath(data or program(), root=self.root, state_dir=self.state, **settings)
        self._datapaths.append(datapath)
        return datapath

    def enforce(
        self, text: str | FirewallPolicy, datapath: Datapath | None = None, trial_s: float = 0
    ) -> Datapath:
        """Stage and commit; without a trial, it holds at once."""
        datapath = datapath or self.open()
        found = policy_of(text) if isinstance(text, str) else text
        with inside(self.host):
            datapath.stage(found, f"{next(_numbers):064x}")
            datapath.commit(trial_s)
        return datapath

    def stop_adopting(self, datapath: Datapath) -> None:
        """End the time in which older TCP connections are taken over."""
        datapath._write_config(datapath._rate, 0)

    def received(self) -> int:
        """UDP packets that reached the host's stack, with or without a socket."""
        script = "print(open('/proc/net/snmp').read())"
        text = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.host}", sys.executable, "-c", script],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        names, values = [line.split()[1:] for line in text.splitlines() if line.startswith("Udp:")]
        found = dict(zip(names, map(int, values), strict=True))
        return found["InDatagrams"] + found["NoPorts"]

    @contextlib.contextmanager
    def flooded(self, frame: bytes) -> Iterator[Flood]:
        """The frame from the peer to the host, without pause; also while no XDP program is there."""
        with inside(self.host):
            take_frames_without_xdp("eth0")
        with inside(self.peer):
            flood = Flood(next(d.index for d in rtnl.devices() if d.name == "eth0"), frame)
            flood.start()
        with flood:
            yield flood
            flood.stop()

    # ── packets ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _wire(self, name: str) -> Iterator[socket.socket]:
        with inside(name), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            wire.bind(("eth0", 0))
            wire.settimeout(WAIT_S)
            yield wire

    def arriving(self, *frames: Frame) -> list[bool]:
        """Send frames from the peer to the host, one after another: which of them passed the host's firewall."""
        return self._through(self.peer, self.host, frames)

    def leaving(self, *frames: Frame) -> list[bool]:
        """The same from the host to the peer."""
        return self._through(self.host, self.peer, frames)

    def _through(self, sender: str, receiver: str, frames: Sequence[Frame]) -> list[bool]:
        tags = []
        for frame in frames:
            tag = struct.pack(">8sI", b"LOOPBACK", next(_numbers))
            tags.append(tag)
            with _dropped_at_once():
                self._wires[sender].send(bytes(frame / Raw(tag)))
        return self._seen(sender, receiver, tags)

    def raw(self, *frames: bytes) -> list[bool]:
        """Send bytes from the peer as they are: which of them were read, byte for byte or with padding, behind the hook."""
        for frame in frames:
            self._wires[self.peer].send(frame)
        return self._seen(self.peer, self.host, [frame[12:] for frame in frames])

    def _seen(self, sender: str, receiver: str, tags: Sequence[bytes]) -> list[bool]:
        marker = struct.pack(">8sI", b"MARKERED", next(_numbers))
        arp = bytes(
            Ether(src=PEER_MAC, dst=HOST_MAC) / ARP(op=2, psrc="0.0.0.0", pdst="0.0.0.0") / Raw(marker)
        )
        self._wires[sender].send(arp)
        found = [False] * len(tags)
        while True:
            data, about = self._wires[receiver].recvfrom(65536)
            if about[2] == socket.PACKET_OUTGOING:
                continue
            if marker in data:
                return found
            for place, tag in enumerate(tags):
                found[place] = found[place] or tag in data


@contextlib.contextmanager
def _dropped_at_once() -> Iterator[None]:
    """A sender learns from the kernel that its own egress hook dropped the packet."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOBUFS, errno.EPERM):
            raise


def to_host(*layers: Any, src: str = PEER4, dst: str = HOST4) -> Frame:
    """An IPv4 frame from the peer to the host."""
    return _stack(Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=src, dst=dst), layers)


def to_host6(*layers: Any, src: str = PEER6, dst: str = HOST6) -> Frame:
    """An IPv6 frame from the peer to the host."""
    return _stack(Ether(src=PEER_MAC, dst=HOST_MAC) / IPv6(src=src, dst=dst), layers)


def to_peer(*layers: Any, src: str = HOST4, dst: str = PEER4) -> Frame:
    """An IPv4 frame from the host to the peer."""
    return _stack(Ether(src=HOST_MAC, dst=PEER_MAC) / IP(src=src, dst=dst), layers)


def to_peer6(*layers: Any, src: str = HOST6, dst: str = PEER6) -> Frame:
    """An IPv6 frame from the host to the peer."""
    return _stack(Ether(src=HOST_MAC, dst=PEER_MAC) / IPv6(src=src, dst=dst), layers)


def _stack(frame: Frame, layers: Sequence[Any]) -> Frame:
    for layer in layers:
        frame = frame / layer
    return frame
