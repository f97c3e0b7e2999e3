"""nftables as a judge: a policy becomes an nft ruleset on real devices in a private network namespace.

Each packet is written to a tap device, in whose ingress chain the rules stand. Every rule writes its number into the frame's
source address and forwards the frame to one more tap, where it is read back: so each packet brings its own verdict with it, and
a lost one is noticed. The namespace belongs to one thread and vanishes with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from nftwords import rule_matches
from strategies_firewall import INTERFACES

from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Packet, Rule

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
BATCH = 32  # packets under way; fewer than the tap's queue holds
DEFAULT = 0xFFFF
OUT = "lbout"


class NftJudge:
    """Judges packets with nftables. Needs root. Close it."""

    def __init__(self) -> None:
        # everything runs in one thread, since a network namespace belongs to a thread
        self._thread = ThreadPoolExecutor(1, initializer=_enter_namespace)
        self._taps: dict[str, int] = {}
        try:
            self._run(self._make_taps)
        except BaseException:
            self.close()
            raise

    def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return self._thread.submit(function, *arguments).result(120)

    def close(self) -> None:
        """Remove the devices and the namespace."""
        for descriptor in self._taps.values():
            os.close(descriptor)
        self._taps.clear()
        self._thread.shutdown()

    def load(self, policy: FirewallPolicy) -> None:
        """Put a policy in force."""
        self.load_text(ruleset(policy))

    def load_text(self, text: str) -> None:
        """Put a ruleset in force whose answers are `answer`'s."""
        done = self._run(
            lambda: subprocess.run(
                ["nft", "-f", "-"], input=text, text=True, capture_output=True, check=False
            )
        )
        assert done.returncode == 0, f"{done.stderr[:4000]}\n{text[:20000]}"

    def judge(self, packets: Sequence[Packet]) -> list[tuple[Action, int | None]]:
        """Verdict and index of the rule that gave it (None: the default), for each packet."""
        return self._run(self._judge, packets)

    def _make_taps(self) -> None:
        with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as file:  # no packets of the kernel's own
            file.write("1")
        for name in [OUT, *(device(d, i) for d in Direction for i in ("", *INTERFACES))]:
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._taps[name] = descriptor
            request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
            fcntl.ioctl(descriptor, TUNSETIFF, request)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                flags = struct.unpack("16xH", fcntl.ioctl(control, SIOCGIFFLAGS, request)[:18])[0]
                fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | IFF_UP))

    def _judge(self, packets: Sequence[Packet]) -> list[tuple[Action, int | None]]:
        found: list[tuple[Action, int | None]] = []
        for start in range(0, len(packets), BATCH):
            batch = packets[start : start + BATCH]
            for number, packet in enumerate(batch):
                os.write(self._taps[device(packet.direction, packet.iface)], frame(packet, number))
            answers: dict[int, tuple[Action, int | None]] = {}
            while len(answers) < len(batch):
                ready, _, _ = select.select([self._taps[OUT]], [], [], 60)
                assert ready, f"nftables answered {len(answers)} of {len(batch)} packets"
                data = os.read(self._taps[OUT], 2048)
                rule = int.from_bytes(data[10:12])
                answers[int.from_bytes(data[-4:])] = (Action(data[9]), None if rule == DEFAULT else rule)
            found += [answers[number] for number in range(len(batch))]
        return found


def _enter_namespace() -> None:
    assert threading.current_thread() is not threading.main_thread()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")


def device(direction: Direction, interface: str) -> str:
    """The tap that stands for an interface and a direction."""
    return f"{'in' if direction is Direction.INGRESS else 'out'}-{interface or 'none'}"


def ruleset(policy: FirewallPolicy) -> str:
    """A policy as nftables reads it. Its rules must not ask for states."""
    lines = ["flush ruleset", "table netdev t {"]
    for direction in Direction:
        lines.append(f" chain {direction.name.lower()} {{")
        for index, rule in enumerate(policy.rules):
            if rule.direction is direction:
                lines += [
                    f"  {match} {answer(rule.action, index)}" for family in (4, 6) for match in _matches(rule, policy, family)
                ]  # fmt: skip
        lines += [f"  {answer(policy.default[direction], DEFAULT)}", " }"]
        for interface in ("", *INTERFACES):
            name = device(direction, interface)
            lines += [
                f' chain {name.replace("-", "_")} {{ type filter hook ingress device "{name}" priority 0;',
                f"  jump {direction.name.lower()}", " }",
            ]  # fmt: skip
    return "\n".join([*lines, "}"]) + "\n"


def _matches(rule: Rule, policy: FirewallPolicy, family: int) -> list[str]:
    # packets of both directions come in by a tap here, which stands for direction and interface
    arriving = msgspec.structs.replace(rule, direction=Direction.INGRESS)
    return rule_matches(arriving, policy, family, lambda name: device(rule.direction, name))


def answer(action: Action, number: int) -> str:
    """The end of a rule: it sends the packet back with its verdict and number."""
    return f'ether saddr set 02:00:00:{int(action):02x}:{number >> 8:02x}:{number & 255:02x} fwd to "{OUT}"'


def frame(packet: Packet, number: int) -> bytes:
    """The packet on Ethernet, with a number as its last four bytes."""
    payload = number.to_bytes(4)
    if packet.protocol == 6:
        flags = 0x02 if packet.tcp_flags is None else packet.tcp_flags
        transport = struct.pack("!HHIIBBHHH", packet.sport, packet.dport, 1, 0, 5 << 4, flags, 1024, 0, 0)
    elif packet.protocol == 17:
        transport = struct.pack("!HHHH", packet.sport, packet.dport, 8 + len(payload), 0)
    elif packet.protocol in (1, 58):
        transport = struct.pack("!BBHI", packet.icmp_type, packet.icmp_code, 0, 0)
    else:
        transport = bytes(8)
    body = transport + payload
    if ":" in packet.src:
        ends = socket.inet_pton(socket.AF_INET6, packet.src) + socket.inet_pton(socket.AF_INET6, packet.dst)
        header, kind = struct.pack("!IHBB", 6 << 28, len(body), packet.protocol, 64) + ends, 0x86DD
    else:
        ends = socket.inet_aton(packet.src) + socket.inet_aton(packet.dst)
        header, kind = (
            struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, packet.protocol, 0) + ends,
            0x0800,
        )
    return b"\x02" + bytes(5) + b"\x02" + bytes(5) + struct.pack("!H", kind) + header + body
