"""Real frames through a real pair of devices: what the policy says is what passes, however the packet is wrapped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from support_datapath import (
    AH,
    ARP,
    HOST4,
    HOST6,
    HOST_MAC,
    ICMP,
    IP,
    OTHER4,
    PEER4,
    PEER6,
    PEER_MAC,
    TCP,
    UDP,
    Dot1Q,
    Ether,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Raw,
    World,
    fragment,
    to_host,
    to_host6,
    to_peer,
)

from loopback.contracts.codes import Refused
from loopback.modules.firewall.packets import Frame

pytestmark = pytest.mark.kernel

SHUT = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
POLICY = """
version: 1
default: {ingress: drop, egress: accept}
sets:
  friends: [10.77.0.2, "fd77::/64"]
rules:
  - {name: web, from: "@friends", proto: tcp, ports: [80, "8000-8010"], action: accept}
  - {name: names, from: "@friends", proto: udp, ports: 53, source_ports: "1024-65535", action: accept}
  - {name: ping, proto: [icmp], icmp: echo-request, action: accept}
  - {name: ping6, proto: icmpv6, icmp: echo-request, action: accept}
  - {name: here, iface: eth0, proto: udp, ports: 100, action: accept}
  - {name: elsewhere, iface: eth7, proto: udp, ports: 101, action: accept}
  - {name: no-smtp, direction: egress, proto: tcp, ports: 25, action: drop}
"""


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def syn(port: int, flags: str = "S") -> TCP:
    return TCP(sport=40000, dport=port, flags=flags)


def test_nothing_is_dropped_before_the_first_commit(world: World) -> None:
    world.open()
    assert world.arriving(to_host(syn(9)), to_host(UDP(dport=9))) == [True, True]


def test_ports_ranges_sets_and_both_families(world: World) -> None:
    world.enforce(POLICY)
    assert world.arriving(
        to_host(syn(80)), to_host(syn(8000)), to_host(syn(8010)), to_host6(syn(80)),
        to_host(UDP(sport=2000, dport=53)), to_host6(UDP(sport=2000, dport=53)),
    ) == [True] * 6  # fmt: skip
    assert world.arriving(
        to_host(syn(81)), to_host(syn(7999)), to_host(syn(8011)), to_host6(syn(81)), to_host(syn(80), src=OTHER4),
        to_host(UDP(sport=1023, dport=53)), to_host(UDP(sport=2000, dport=54)), to_host6(syn(80), src="fd78::2"),
    ) == [False] * 8  # fmt: skip


def test_icmp_by_type_and_interfaces_by_name(world: World) -> None:
    world.enforce(POLICY)
    assert world.arriving(
        to_host(ICMP(type=8)), to_host(ICMP(type=13)), to_host6(ICMPv6EchoRequest()),
        to_host(UDP(dport=100)), to_host(UDP(dport=101)),
    ) == [True, False, True, True, False]  # fmt: skip


def test_egress_has_rules_of_its_own(world: World) -> None:
    world.enforce(POLICY)
    assert world.leaving(to_peer(syn(25)), to_peer(syn(26)), to_peer(UDP(dport=25))) == [False, True, True]


def test_vlan_tags_are_no_way_round(world: World) -> None:
    world.enforce(POLICY)

    def tagged(*tags: Dot1Q, port: int) -> Ether:
        frame = Ether(src=PEER_MAC, dst=HOST_MAC)
        for tag in tags:
            frame = frame / tag
        return frame / IP(src=PEER4, dst=HOST4) / syn(port)

    one, two = (Dot1Q(vlan=7),), (Dot1Q(vlan=7, type=0x8100), Dot1Q(vlan=8))
    assert world.arriving(
        tagged(*one, port=80), tagged(*one, port=81), tagged(*two, port=80), tagged(*two, port=81)
    ) == [True, False, True, False]
    three = (Dot1Q(vlan=1, type=0x8100), Dot1Q(vlan=2, type=0x8100), Dot1Q(vlan=3))
    assert world.arriving(tagged(*three, port=80)) == [False], "what cannot be read gets the default"


def test_jumbo_frames_are_judged_like_short_ones_on_the_wire_and_when_asked_about(world: World) -> None:
    for name in (world.host, world.peer):
        subprocess.run(["ip", "-n", name, "link", "set", "eth0", "mtu", "9000"], check=True)
    datapath = world.enforce(SHUT + "rules:\n  - {name: names, proto: udp, ports: 53, action: accept}\n")
    filling = Raw(b"x" * 8900)
    assert world.arriving(
        to_host(UDP(dport=53), filling),
        to_host(UDP(dport=54), filling),
        to_host6(UDP(dport=53), filling),
        to_host6(UDP(dport=54), filling),
        to_host6(IPv6ExtHdrDestOpt(), UDP(dport=53), filling),
    ) == [True, False, True, False, True]
    start = Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER4, dst=HOST4)
    longest = start / UDP(dport=53) / Raw(bytes(65535 - 28))
    asked = [start / UDP(dport=port) / Raw(bytes(size)) for size in (3400, 3500, 9000) for port in (53, 54)]
    found = datapath.explain_frames([Frame(bytes(one)) for one in (*asked, longest)])
    assert [one.rule for one in found] == ["names", None] * 3 + ["names"]
    cut = bytes(
        Ether(src=PEER_MAC, dst=HOST_MAC)
        / IP(src=PEER4, dst=HOST4, len=9029)
        / UDP(dport=53)
        / Raw(bytes(9000))
    )  # a byte less than its header says
    assert datapath.explain_frames([Frame(cut)])[0].reason == "truncated"
    with pytest.raises(Refused, match="longer than"):
        datapath.explain_frames([Frame(bytes(70000))])


def test_ip_options_do_not_hide_the_ports(world: World) -> None:
    world.enforce(POLICY)
    frame = Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER4, dst=HOST4, options=b"\x01" * 40)
    assert world.arriving(frame / syn(80), frame / syn(81)) == [True, False]


def test_extension_headers_do_not_hide_the_ports(world: World) -> None:
    world.enforce(POLICY)
    for before in (
        [IPv6ExtHdrHopByHop()],
        [IPv6ExtHdrDestOpt()],
        [IPv6ExtHdrRouting()],
        [
            IPv6ExtHdrHopByHop(),
            IPv6ExtHdrRouting(),
            IPv6ExtHdrDestOpt(),
            AH(nh=6, payloadlen=4, icv=b"\0" * 12),
        ],
        [IPv6ExtHdrDestOpt()] * 8,
        [IPv6ExtHdrFragment(offset=0, m=0, id=1)],
    ):
        assert world.arriving(to_host6(*before, syn(80)), to_host6(*before, syn(81))) == [True, False], before
    assert world.arriving(to_host6(*[IPv6ExtHdrDestOpt()] * 9, syn(80))) == [False], "more than are followed"


def test_later_fragments_follow_their_first_one(world: World) -> None:
    world.enforce(POLICY)

    def pieces(port: int, number: int) -> list[IP]:
        whole = IP(src=PEER4, dst=HOST4, id=number) / UDP(sport=2000, dport=port) / Raw(b"x" * 2000)
        return [Ether(src=PEER_MAC, dst=HOST_MAC) / piece for piece in fragment(whole, fragsize=800)]

    allowed, denied = pieces(53, 7), pieces(54, 8)
    assert len(allowed) == 3
    assert world.arriving(*allowed) == [True] * 3
    assert world.arriving(*denied) == [False] * 3
    assert world.arriving(*pieces(53, 9)[1:]) == [False, False], "without their first one they have no port"


def test_ipv6_fragments_too(world: World) -> None:
    world.enforce(POLICY)
    first = to_host6(
        IPv6ExtHdrFragment(offset=0, m=1, id=5, nh=17), UDP(sport=2000, dport=53, len=1000), Raw(b"x" * 56)
    )
    later = to_host6(IPv6ExtHdrFragment(offset=8, m=0, id=5, nh=17), Raw(b"y" * 64))
    strange = to_host6(IPv6ExtHdrFragment(offset=8, m=0, id=6, nh=17), Raw(b"y" * 64))
    assert world.arriving(first, later, strange) == [True, True, False]


def test_a_fragment_cannot_overwrite_tcp_flags(world: World) -> None:
    world.enforce("version: 1\ndefault: {ingress: accept, egress: accept}\n")
    tiny = (
        Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER4, dst=HOST4, proto=6, frag=1, id=3) / Raw(b"z" * 32)
    )
    fine = (
        Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER4, dst=HOST4, proto=6, frag=9, id=3) / Raw(b"z" * 32)
    )
    assert world.arriving(tiny, fine) == [False, True]


def test_truncated_packets_are_dropped_even_where_the_default_accepts(world: World) -> None:
    datapath = world.enforce("version: 1\ndefault: {ingress: accept, egress: accept}\n")
    whole = bytes(to_host(syn(80), Raw(b"q" * 30)))
    short_header = whole[:14] + b"\x44" + whole[15:]
    longer_than_it_is = whole[:16] + b"\x05\x00" + whole[18:]
    cut_ports = bytes(
        Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER4, dst=HOST4, proto=6, len=24) / Raw(b"abcd")
    )
    cut6 = bytes(
        Ether(src=PEER_MAC, dst=HOST_MAC) / IPv6(src=PEER6, dst=HOST6, plen=900, nh=17) / Raw(b"abcdefgh")
    )
    assert world.raw(whole, short_header, longer_than_it_is, cut_ports, cut6) == [
        True,
        False,
        False,
        False,
        False,
    ]
    assert datapath.totals()["ingress.truncated.drop"] == 4


def test_padding_is_not_read_as_ports(world: World) -> None:
    world.enforce("version: 1\ndefault: {ingress: accept, egress: accept}\n")
    head = IP(src=PEER4, dst=HOST4, proto=17, len=20)
    padded = bytes(Ether(src=PEER_MAC, dst=HOST_MAC) / head / Raw(bytes(UDP(dport=53)) + b"p" * 20))
    assert world.raw(padded) == [False]


def test_a_mapped_address_on_the_wire_is_not_taken_for_ipv4(world: World) -> None:
    world.enforce(
        "version: 1\ndefault: {ingress: drop, egress: accept}\n"
        "rules:\n  - {name: a, from: 10.77.0.2, action: accept}\n  - {name: b, from: [10.77.0.2, 10.77.0.9], action: accept}\n"
    )
    assert world.arriving(to_host(UDP(dport=1)), to_host6(UDP(dport=1), src=f"::ffff:{PEER4}")) == [
        True,
        False,
    ]


def test_address_resolution_always_passes_and_other_link_traffic_gets_the_default(world: World) -> None:
    world.enforce(POLICY)
    solicit = (
        Ether(src=PEER_MAC, dst=HOST_MAC) / IPv6(src=PEER6, dst=HOST6, hlim=255) / ICMPv6ND_NS(tgt=HOST6)
    )
    forged = Ether(src=PEER_MAC, dst=HOST_MAC) / IPv6(src=PEER6, dst=HOST6, hlim=64) / ICMPv6ND_NS(tgt=HOST6)
    arp = Ether(src=PEER_MAC, dst=HOST_MAC) / ARP(op=1, psrc=PEER4, pdst=HOST4)
    lldp = Ether(src=PEER_MAC, dst=HOST_MAC, type=0x88CC) / Raw(b"hello")
    assert world.arriving(solicit, forged, arp, lldp) == [True, False, True, False]
