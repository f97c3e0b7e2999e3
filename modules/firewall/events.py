"""Sampled packets, as the kernel reports them, in words."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from loopback.bpf import layout

PACKET: str = "firewall.packet"
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


def decode(record: bytes, names: Mapping[int, str]) -> dict[str, str | int]:
    """An event's attributes. `names` gives a rule's name by its counter slot. Raises ValueError for a short record."""
    event = layout.Event.from_buffer_copy(record)
    by_rule = event.identity != layout.NO_RULE
    attributes: dict[str, str | int] = {
        "verdict": "accept" if event.verdict else "drop",
        "direction": "egress" if event.direction else "ingress",
        "reason": layout.REASONS[event.reason] if event.reason < len(layout.REASONS) else str(event.reason),
        "rule": names.get(event.identity, "") if by_rule else "",
        "generation": event.epoch,
        "interface": _interface(event.ifindex),
        "length": event.length,
        "sample": event.sample,
        "boot_ns": event.boot_ns,
    }
    if event.family in (4, 6):
        attributes |= {
            "src": address(event.family, bytes(event.source)),
            "dst": address(event.family, bytes(event.destination)),
            "proto": _PROTOCOLS.get(event.protocol, str(event.protocol)),
        }
        if event.protocol in (1, 58):
            attributes |= {"icmp_type": event.icmp_type, "icmp_code": event.icmp_code}
        else:
            attributes |= {"sport": event.source_port, "dport": event.destination_port}
        if event.protocol == 6:
            attributes["tcp_flags"] = event.tcp_flags
    return attributes


def address(family: int, data: bytes) -> str:
    """An address of a report, which carries it in network order."""
    return str(ipaddress.ip_address(data[12:] if family == 4 else data))


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)  # it is gone
