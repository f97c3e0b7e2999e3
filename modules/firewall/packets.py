"""Packets as bytes, for questions to the real program, and its answers."""

from __future__ import annotations

import ctypes as ct
import ipaddress
import struct
from typing import Final

import msgspec

from loopback.bpf import layout
from loopback.modules.firewall.model import Action, Direction, Packet

TCP, UDP, ICMP, ICMPV6, DCCP, SCTP, UDPLITE = 6, 17, 1, 58, 33, 132, 136
SYN: Final = 0x02
_HOP_LIMIT: Final = (
    64  # below 255, so that neighbour discovery is judged by the rules and not let through as essential
)
_ETHERNET: Final = bytes.fromhex("020000000001020000000002")


class Verdict(msgspec.Struct, frozen=True):
    """What the program says of a packet. `rule` is None for the default; `generation` is the slot's epoch, 0 for none."""

    action: Action
    rule: str | None
    reason: str
    generation: int


def frame(packet: Packet) -> bytes:
    """The packet in an Ethernet frame. Raises ValueError for addresses of two families."""
    source, destination = ipaddress.ip_address(packet.src), ipaddress.ip_address(packet.dst)
    if source.version != destination.version:
        raise ValueError(f"{packet.src} and {packet.dst} are of different address families")
    body = _transport(packet)
    if source.version == 4:
        head = struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, _HOP_LIMIT, packet.protocol, 0,
            source.packed, destination.packed,
        )  # fmt: skip
        return _ETHERNET + b"\x08\x00" + head + body
    head = struct.pack(
        ">IHBB16s16s", 6 << 28, len(body), packet.protocol, _HOP_LIMIT, source.packed, destination.packed
    )
    return _ETHERNET + b"\x86\xdd" + head + body


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


def answer(data: bytes) -> layout.Probe:
    """The probe that came back. Raises ValueError when the program did not answer."""
    probe = layout.Probe.from_buffer_copy(data[: ct.sizeof(layout.Probe)])
    if not probe.done:
        raise ValueError("the program did not answer")
    return probe
