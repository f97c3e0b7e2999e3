"""Packets from JSON lines and frames from captures."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_frames
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw
from scapy.utils import wrpcap, wrpcapng

from loopback.cli import firewall_packets, firewall_pcap
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy_tables
from loopback.modules.firewall.model import Direction, Packet
from loopback.modules.firewall.packets import frame
from loopback.modules.firewall.policy_fields import Wrong

VALUES: dict[str, list[Any]] = {
    "direction": ["ingress", "egress", None, "in"],
    "src": ["10.0.0.1", "2001:DB8::1", "::ffff:1.2.3.4", "10.0.0.1/8", "x"],
    "dst": ["10.0.0.2", "2001:db8:0::2", "010.0.0.1"],
    "proto": ["tcp", "udp", "icmp", "icmpv6", 17, 255, 256, "17", "tpc", True],
    "sport": [0, 65535, 65536, None, -1, "22", 1.0],
    "dport": [22, None],
    "icmp_type": [8, "echo-request", None, 256],
    "icmp_code": [0, 3, None, 300],
    "tcp_flags": [2, "SA", ["syn"], None, 999],
    "iface": ["eth0", None, "", "eth*"],
    "state": ["new", "established", "related", "invalid", None, "old"],
    "extra": [1],
}


@given(st.fixed_dictionaries({}, optional={key: st.sampled_from(some) for key, some in VALUES.items()}))
@settings(max_examples=400, deadline=None)
def test_a_line_read_the_quick_way_is_the_packet_that_the_language_says(line: dict[str, Any]) -> None:
    try:
        found = firewall_packets.quick(json.dumps(line).encode())
    except Exception:  # the slow way then decides
        return
    assert found == [policy_tables.packet(line)]


def test_common_lines_need_no_second_reading() -> None:
    lines = [
        {"src": "10.0.0.1", "dst": "10.0.0.2", "proto": "tcp", "dport": 22},
        {"direction": "egress", "src": "::1", "dst": "::2", "proto": 58, "icmp_type": 128, "icmp_code": 0, "iface": "lo",
         "sport": None, "dport": None, "tcp_flags": None, "state": "invalid"},
    ]  # fmt: skip
    data = "\n\n".join(map(json.dumps, lines)).encode() + b"\n"
    assert firewall_packets.quick(data) == [policy_tables.packet(line) for line in lines]


def test_the_slow_way_still_takes_what_the_quick_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"src":"10.0.0.1","dst":"10.0.0.2","proto":"icmp","icmp_type":"port-unreachable"}\n')
    (only,) = firewall_packets.read_lines(path)
    assert (only.icmp_type, only.icmp_code) == (3, 3)
    with pytest.raises(Wrong):
        policy_tables.packet({"src": "10.0.0.1", "dst": "::1", "proto": "tcp"})


V4 = frame(Packet(direction=Direction.INGRESS, src="10.0.0.1", dst="10.0.0.2", protocol=6, dport=22))
V6 = frame(Packet(direction=Direction.INGRESS, src="::1", dst="::2", protocol=17, dport=53))


def test_frames_of_a_pcap_come_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    wrpcap(str(path), [V4, V6], linktype=1)
    assert [(f.data, f.network) for f in firewall_pcap.read(path.read_bytes())] == [(V4, False), (V6, False)]


def block(kind: int, body: bytes, order: str) -> bytes:
    body += bytes(-len(body) % 4)
    size = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + size + body + size


def option(code: int, value: bytes, order: str) -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_frames_of_a_pcapng_know_their_interface_and_direction(order: str) -> None:
    data = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    for name in (b"eth0", b"wan"):
        data += block(1, struct.pack(order + "HHI", 1, 0, 0) + option(2, name, order), order)
    for index, kept, flags in ((0, V4, 2), (1, V6, None)):
        packet = (
            struct.pack(order + "IIIII", index, 0, 0, len(kept), len(kept)) + kept + bytes(-len(kept) % 4)
        )
        if flags is not None:
            packet += option(2, struct.pack(order + "I", flags), order)
        data += block(6, packet, order)
    data += block(3, struct.pack(order + "I", len(V6)) + V6, order)
    assert [(f.data, f.iface, f.direction) for f in firewall_pcap.read(data)] == [
        (V4, "eth0", Direction.EGRESS),
        (V6, "wan", Direction.INGRESS),
        (V6, "eth0", Direction.INGRESS),
    ]


def test_a_pcapng_of_scapys_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    wrpcapng(str(path), [Ether(V4), Ether(V6)])
    assert [f.data for f in firewall_pcap.read(path.read_bytes())] == [V4, V6]


def capture(link: int, data: bytes, whole: int | None = None, order: str = "<") -> bytes:
    head = struct.pack(order + "IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, link)
    return head + struct.pack(order + "IIII", 0, 0, len(data), whole or len(data)) + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("link", "before", "way"), [
    (101, b"", 0), (12, b"", 0), (228, b"", 0), (0, bytes(4), 0), (113, b"\0\4" + bytes(14), 1), (113, bytes(16), 0),
    (276, bytes(10) + b"\4" + bytes(9), 1),
])  # fmt: skip
def test_frames_without_an_ethernet_header_begin_with_ip(
    order: str, link: int, before: bytes, way: int
) -> None:
    (only,) = firewall_pcap.read(capture(link, before + V4[14:], order=order))
    assert (only.data, only.network, only.direction) == (V4[14:], True, Direction(way))


def test_a_frame_cut_short_by_the_capture_has_its_length_again() -> None:
    (only,) = firewall_pcap.read(capture(1, V4[:40], len(V4) + 900))
    assert only.data == V4[:40] + bytes(len(V4) + 860)


@pytest.mark.parametrize("data", [
    b"", b"x" * 100, capture(1, V4)[:-1], capture(1, V4)[:30], capture(105, V4),
    struct.pack("<III", 0x0A0D0D0A, 11, 0) + bytes(20), capture(1, V4, 1 << 30), capture(1, V4, 65558), capture(1, V4)[:10],
    capture(1, V4[:37], len(V4)), capture(101, V4[14:30], len(V4) - 14),
])  # fmt: skip
def test_what_is_no_capture_is_refused(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        list(firewall_pcap.read(data))
    assert caught.value.code == Code.POLICY_MALFORMED


CUT: dict[str, Any] = {
    "udp": IP() / UDP(dport=53),
    "tcp with options": IP(options=b"\1" * 40) / TCP(dport=80),
    "icmp": IP() / ICMP(type=3, code=4),
    "later fragment": IP(frag=8, proto=17) / Raw(bytes(32)),
    "another protocol": IP(proto=50) / Raw(bytes(32)),
    "tagged twice": Dot1Q(vlan=1) / Dot1Q(vlan=2) / IPv6() / UDP(dport=53),
    "options": IPv6() / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / TCP(dport=80),
    "authenticated": IPv6() / AH(nh=58, payloadlen=4, icv=bytes(12)) / ICMPv6EchoRequest(),
    "first fragment": IPv6() / IPv6ExtHdrFragment(m=1) / UDP(dport=53),
    "later fragment of IPv6": IPv6() / IPv6ExtHdrFragment(offset=1) / Raw(bytes(32)),
}


@pytest.mark.parametrize("packet", CUT.values(), ids=CUT.keys())
@pytest.mark.parametrize("network", [False, True])
def test_a_cut_frame_is_read_as_the_whole_one_or_refused(packet: Any, network: bool) -> None:
    """A port that the capture left out must not be taken for port 0."""
    if network and isinstance(packet, Dot1Q):
        return
    whole = bytes(packet if network else Ether() / packet) + bytes(100)
    kind, said = plain_frames.read(whole, network=network)
    assert kind == "parsed" and said is not None
    read = refused = 0
    for kept in range(1, len(whole)):
        try:
            (only,) = firewall_pcap.read(capture(101 if network else 1, whole[:kept], len(whole)))
        except Refused:
            refused += 1
            continue
        read += 1
        found = plain_frames.read(only.data, network=network)[1]
        assert found == said, f"with {kept} bytes"
    assert read > 90 and refused > (15 if network else 30)


def test_a_small_file_of_long_frames_is_read_one_by_one() -> None:
    """Filled up to their lengths they would take 6 GiB."""
    data = capture(1, V4[:40], 65000)
    frames = firewall_pcap.read(data[:24] + data[24:] * 100_000)
    assert len(next(frames).data) == 65000
    assert isinstance(frames, Iterator)
