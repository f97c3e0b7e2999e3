"""Packets as bytes, for questions to the real program, and its answers."""

from __future__ import annotations

import ctypes as ct
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from loopback.bpf import layout
from loopback.bpf.objects import Program
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.model import Action, Direction, Packet

TCP, UDP, ICMP, ICMPV6, DCCP, SCTP, UDPLITE = 6, 17, 1, 58, 33, 132, 136
SYN: Final = 0x02
ACK: Final = 0x10
_HOP_LIMIT: Final = (
    64  # below 255, so that neighbour discovery is judged by the rules and not let through as essential
)
_ETHERNET: Final = bytes.fromhex("020000000001020000000002")
_ETHERNET4, _ETHERNET6 = _ETHERNET + b"\x08\x00", _ETHERNET + b"\x86\xdd"
_HEAD4, _HEAD6 = struct.Struct(">BBHHHBBH4s4s"), struct.Struct(">IHBB16s16s")
#: Bytes: the longest IP packet with its link header and tags. TEST_RUN takes 17 pages beside the first, which are more.
LONGEST_FRAME: Final = 65535 + 22
MOST_ASKED: Final = LONGEST_FRAME + ct.sizeof(layout.Probe)


class Verdict(msgspec.Struct, frozen=True):
    """What the program says of a packet. `rule` is None for the default; `generation` is the slot's epoch, 0 for none."""

    action: Action
    rule: str | None
    reason: str
    generation: int


class Frame(NamedTuple):
    """A frame to ask about: `data` begins with an Ethernet header, or with the IP header where `network` says so."""

    data: bytes
    direction: Direction = Direction.INGRESS
    iface: str = ""
    state: str = "new"
    network: bool = False


def frame(packet: Packet) -> bytes:
    """The packet in an Ethernet frame. Raises ValueError for addresses of two families, or what is no address."""
    family = socket.AF_INET6 if ":" in packet.src else socket.AF_INET
    if (":" in packet.dst) != (family == socket.AF_INET6):
        raise ValueError(f"{packet.src} and {packet.dst} are of different address families")
    try:
        source, destination = socket.inet_pton(family, packet.src), socket.inet_pton(family, packet.dst)
    except OSError as error:
        raise ValueError(str(error)) from None
    body = _transport(packet)
    if family == socket.AF_INET:
        head = _HEAD4.pack(0x45, 0, 20 + len(body), 1, 0, _HOP_LIMIT, packet.protocol, 0, source, destination)
        return _ETHERNET4 + head + body
    return (
        _ETHERNET6 + _HEAD6.pack(6 << 28, len(body), packet.protocol, _HOP_LIMIT, source, destination) + body
    )


def framed(packet: Packet) -> Frame:
    """A packet with its frame made for it. Raises Refused(POLICY_INVALID) for one that cannot be."""
    try:
        return Frame(frame(packet), packet.direction, packet.iface, packet.state)
    except (ValueError, struct.error) as error:
        raise Refused(Code.POLICY_INVALID, f"packet {packet.src} → {packet.dst}: {error}") from None


def asking(frame: Frame, slot: int, interfaces: int) -> bytes:
    """The question for a frame. Raises Refused(POLICY_INVALID) for one that is too long."""
    if len(frame.data) > LONGEST_FRAME:
        raise Refused(
            Code.POLICY_INVALID,
            f"a frame of {len(frame.data)} bytes is longer than the {LONGEST_FRAME} that the kernel takes in a dry run",
            "leave it out of the question",
        )
    state = layout.STATES.get(frame.state, layout.NEW)
    return question(
        frame.data,
        slot=slot,
        direction=frame.direction,
        state=state,
        interfaces=interfaces,
        network=frame.network,
    )


def judged(
    probe: Program, frames: Iterable[Frame], slot: int, interfaces: Sequence[str], names: Sequence[str]
) -> list[Verdict]:
    """What fw_probe says of frames by a slot whose policy names these interfaces and rules. Raises Refused as `asking` does."""
    bits = {name: 1 << place for place, name in enumerate(interfaces)}
    run = probe.repeated(MOST_ASKED)
    found = []
    for one in frames:
        said = answer(run(asking(one, slot, bits.get(one.iface, 0))))
        rule = names[said.order] if said.order < len(names) else None
        found.append(Verdict(Action(said.verdict), rule, layout.REASONS[said.reason], said.epoch))
    return found


def _transport(packet: Packet) -> bytes:
    if packet.protocol == TCP:
        flags = SYN if packet.tcp_flags is None else packet.tcp_flags
        return struct.pack(">HHIIBBHHH", packet.sport, packet.dport, 1, 0, 0x50, flags, 65535, 0, 0)
    if packet.protocol in (UDP, UDPLITE, SCTP, DCCP):
        return struct.pack(">HHHH", packet.sport, packet.dport, 8, 0)
    if packet.protocol in (ICMP, ICMPV6):
        return struct.pack(">BBHHH", packet.icmp_type, packet.icmp_code, 0, 1, 1)
    return bytes(8)


def question(
    data: bytes,
    *,
    slot: int = layout.PROBE_ACTIVE,
    direction: Direction = Direction.INGRESS,
    state: int = layout.NEW,
    interfaces: int = 0,
    network: bool = False,
) -> bytes:
    """What TEST_RUN gives to fw_probe: the frame behind its question."""
    probe = layout.Probe(
        interfaces=interfaces, slot=slot, direction=int(direction), state=state, network=int(network)
    )
    return bytes(probe) + data


def skb_on(device: int) -> bytes:
    """The beginning of a struct __sk_buff (linux/bpf.h) that says which device a packet of TEST_RUN is on."""
    return struct.pack("=40xI", device)


def answer(data: bytes) -> layout.Probe:
    """The probe that came back. Raises ValueError when the program did not answer."""
    probe = layout.Probe.from_buffer_copy(data[: ct.sizeof(layout.Probe)])
    if not probe.done:
        raise ValueError("the program did not answer")
    return probe
