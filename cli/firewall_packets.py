"""Packets that somebody asks about, from JSON: one, or a hundred thousand lines in a second."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Final, Literal

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy, policy_fields, policy_tables
from loopback.modules.firewall.model import Direction, Packet
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, PROTOCOLS, STATES, WITH_PORTS, Wrong
from loopback.modules.firewall.policy_text import PolicyRefused

MAX_PACKETS: Final = 1_000_000


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line as most of them are. What needs more thought than this goes the slow way."""

    src: str
    dst: str
    proto: str | int
    direction: Literal["ingress", "egress"] | None = None
    sport: int | None = None
    dport: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    tcp_flags: int | None = None
    iface: str | None = None
    state: Literal["new", "established", "related", "invalid"] | None = None


assert _Line.__struct_fields__[3:] == tuple(
    key for key in policy_tables.PACKET if key not in ("src", "dst", "proto")
)
_LINES: Final = msgspec.json.Decoder(_Line)


class _Other(Exception):
    """Not a line as most of them are."""


def read_lines(path: Path) -> list[Packet]:
    """The packets of a file of JSON lines; `-` is stdin. Raises OSError, and PolicyRefused for a line that is no packet."""
    name = "stdin" if str(path) == "-" else str(path)
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        found = quick(data)
    except (_Other, OSError, ValueError, Wrong, msgspec.MsgspecError):
        found = []
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                found.append(read_one(line, name, number))
            _bounded(found, name)
    _bounded(found, name)
    return found


def _bounded(found: list[Packet], name: str) -> None:
    if len(found) > MAX_PACKETS:
        raise Refused(Code.POLICY_INVALID, f"{name} holds more than {MAX_PACKETS} packets", "split the file")


def quick(data: bytes) -> list[Packet]:
    """The packets of lines that are all as most are; raises anything where one is not."""
    interfaces: dict[str | None, str] = {None: ""}
    found = []
    for line in _LINES.decode_lines(data):
        six = ":" in line.src
        family = socket.AF_INET6 if six else socket.AF_INET
        if six != (":" in line.dst):
            raise _Other
        protocol = PROTOCOLS.get(line.proto, -1) if isinstance(line.proto, str) else line.proto
        ports = protocol in WITH_PORTS
        sport, dport = line.sport or 0, line.dport or 0
        if not (0 <= protocol <= 255 and 0 <= sport <= 65_535 and 0 <= dport <= 65_535):
            raise _Other
        kind, code, flags = line.icmp_type or 0, line.icmp_code or 0, line.tcp_flags
        if not (0 <= kind <= 255 and 0 <= code <= 255 and 0 <= (flags or 0) <= 255):
            raise _Other
        icmp = protocol in (ICMP, ICMPV6)
        if icmp and six != (protocol == ICMPV6):
            raise _Other
        if line.iface not in interfaces:
            interfaces[line.iface] = policy_fields.interface(line.iface)
        found.append(
            Packet(
                direction=Direction.EGRESS if line.direction == "egress" else Direction.INGRESS,
                src=socket.inet_ntop(family, socket.inet_pton(family, line.src)),
                dst=socket.inet_ntop(family, socket.inet_pton(family, line.dst)),
                protocol=protocol,
                sport=sport if ports else 0,
                dport=dport if ports else 0,
                icmp_type=kind if icmp else 0,
                icmp_code=code if icmp else 0,
                tcp_flags=flags,
                iface=interfaces[line.iface],
                state=line.state or STATES[0],
            )
        )
    return found


def read_one(text: str | bytes, source: str, number: int = 1) -> Packet:
    """One packet; the quick way first, and where it fails the one that explains. Raises PolicyRefused with its line."""
    try:
        return policy_tables.packet(json.loads(text))
    except (ValueError, RecursionError, Wrong):
        data = text if isinstance(text, bytes) else text.encode(errors="replace")
        try:
            return policy.read_packet(data, source)
        except PolicyRefused as error:
            there = (msgspec.structs.replace(p, line=p.line and p.line + number - 1) for p in error.problems)
            raise PolicyRefused(error.code, tuple(there)) from None
