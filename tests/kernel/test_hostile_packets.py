"""Packets made to get past the firewall, sent over a real wire at a real stack: what passes, and what a socket hears."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

import pytest
from scapy.layers.inet6 import (
    ICMPv6MLDone,
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    ICMPv6PacketTooBig,
)
from scapy.layers.l2 import GRE
from support_datapath import (
    AH,
    HOST4,
    HOST6,
    HOST_MAC,
    IP,
    OTHER4,
    PEER4,
    PEER6,
    PEER_MAC,
    TCP,
    UDP,
    Ether,
    Frame,
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Raw,
    World,
    inside,
    to_host,
    to_host6,
    to_peer6,
)

pytestmark = pytest.mark.kernel

SHUT = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
OPEN = "version: 1\ndefault: {ingress: accept, egress: accept}\n"
NAMES = SHUT + "rules:\n  - {name: names, proto: udp, ports: 53, action: accept}\n"
WEB = "  - {name: web, proto: tcp, ports: 80, action: accept}\n"
LINK = "fe80::77"


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@contextlib.contextmanager
def heard(world: World, family: int, address: str, *ports: int) -> Iterator[dict[int, socket.socket]]:
    """UDP sockets of the host, by port."""
    with inside(world.host), contextlib.ExitStack() as stack:
        found = {}
        for port in ports:
            found[port] = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            found[port].bind((address, port))
            found[port].settimeout(60)
        yield found


def silent(one: socket.socket) -> bool:
    """Whether nothing waits at a socket. Ask after something that was sent later has arrived."""
    one.setblocking(False)
    try:
        one.recv(65536)
    except BlockingIOError:
        return True
    return False


def send(world: World, *frames: Frame) -> None:
    for frame in frames:
        world._wires[world.peer].send(bytes(frame))


# ── tunnels ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_wrapped_in_a_tunnel_is_judged_by_its_outer_header(world: World) -> None:
    """Neither does an allowed packet open the way for its wrapping, nor does a rule for the wrapping look inside."""
    four, six = IP(src=PEER4, dst=HOST4), IPv6(src=PEER6, dst=HOST6)
    web = TCP(sport=4000, dport=80)
    wrapped = [
        to_host(four, web), to_host(six, web), to_host(GRE(), four, web), to_host(UDP(dport=4789), Raw(bytes(8)), four, web),
        to_host6(four, web), to_host6(six, web), to_host6(IPv6ExtHdrDestOpt(), GRE(), six, web),
    ]  # fmt: skip
    datapath = world.enforce(SHUT + "rules:\n" + WEB)
    assert world.arriving(to_host(web), *wrapped) == [True] + [False] * 7
    assert datapath.totals()["ingress.default.drop"] == 7
    world.enforce(
        SHUT + "rules:\n  - {name: no-telnet, proto: tcp, ports: 23, action: drop}\n"
        "  - {name: tunnels, proto: [4, 41, gre], action: accept}\n",
        datapath,
    )
    telnet = TCP(sport=4000, dport=23)
    assert world.arriving(
        to_host(four, telnet), to_host(six, telnet), to_host(GRE(), four, telnet), to_host6(IPv6ExtHdrHopByHop(), six, telnet),
        to_host(telnet), to_host(UDP(dport=4789), Raw(bytes(8)), four, telnet),
    ) == [True] * 4 + [False] * 2  # fmt: skip
    assert datapath.counters()["tunnels"][0] == 4


# ── fragments ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def piece4(
    number: int, place: int, data: bytes, *, more: bool, protocol: int = 17, src: str = PEER4
) -> Frame:
    """A fragment of an IPv4 datagram that begins `place` bytes into it."""
    head = IP(src=src, dst=HOST4, id=number, proto=protocol, frag=place // 8, flags="MF" if more else 0)
    return Ether(src=PEER_MAC, dst=HOST_MAC) / head / Raw(data)


def piece6(number: int, place: int, data: bytes, *, more: bool, following: int = 17) -> Frame:
    """The same of an IPv6 datagram."""
    header = IPv6ExtHdrFragment(id=number, offset=place // 8, m=int(more), nh=following)
    return to_host6(header, Raw(data))


def datagram(port: int, size: int, *, six: bool = False) -> bytes:
    """A UDP datagram of so many bytes behind its IP header."""
    head = IPv6(src=PEER6, dst=HOST6) if six else IP(src=PEER4, dst=HOST4)
    return bytes(head / UDP(sport=4000, dport=port) / Raw(b"d" * (size - 8)))[len(head) :]


def test_no_later_fragment_rewrites_the_ports_of_the_first(world: World) -> None:
    world.enforce(NAMES)
    allowed, denied = datagram(53, 48), datagram(54, 48)
    with heard(world, socket.AF_INET, HOST4, 53, 54) as at:
        send(
            world,
            piece4(7, 0, allowed[:24], more=True),
            piece4(7, 0, denied[:24], more=True),
            piece4(7, 24, allowed[24:], more=False),
        )
        assert at[53].recv(100) == allowed[8:], "the second beginning was judged for itself"
        send(
            world,
            piece4(8, 24, denied[24:], more=False),
            piece4(8, 0, denied[:24], more=True),
            piece4(8, 0, allowed[:24], more=True),
            piece4(8, 8, denied[8:24], more=True),
            to_host(UDP(sport=4001, dport=53), Raw(b"afterwards")),
        )
        assert at[53].recv(100) == b"afterwards"
        assert silent(at[54])


def test_no_later_fragment_rewrites_the_ports_behind_an_extension_header(world: World) -> None:
    """The ports lie where a later fragment can be laid over them; the stack gives such a datagram up (RFC 5722)."""
    world.enforce(NAMES)
    options = bytes(IPv6ExtHdrDestOpt(nh=17))
    allowed, denied = (options + datagram(port, 40, six=True) for port in (53, 54))
    assert len(allowed) == 48
    with heard(world, socket.AF_INET6, HOST6, 53, 54) as at:
        send(
            world,
            piece6(7, 0, allowed[:24], more=True, following=60),
            piece6(7, 24, allowed[24:], more=False, following=60),
        )
        assert at[53].recv(100) == allowed[16:], "so it arrives where nobody meddles"
        for number, place in ((8, 0), (9, 8), (10, 16)):
            send(
                world,
                piece6(number, 0, allowed[:24], more=True, following=60),
                piece6(number, place, denied[place:24], more=True, following=60),
                piece6(number, 24, denied[24:], more=False, following=60),
            )
        send(world, to_host6(UDP(sport=4001, dport=53), Raw(b"afterwards")))
        heard_there = [at[53].recv(100)]
        while heard_there[-1] != b"afterwards":
            heard_there.append(at[53].recv(100))
        assert silent(at[54])


def test_a_tiny_first_fragment_hides_no_ports_even_where_all_is_open(world: World) -> None:
    datapath = world.enforce(OPEN)
    tcp, udp = bytes(TCP(sport=4000, dport=23, flags="S")), datagram(54, 48)
    tiny = [piece4(1, 0, tcp[:8], more=True, protocol=6), piece4(2, 0, tcp[:16], more=True, protocol=6)]
    tiny += [piece6(3, 0, tcp[:8], more=True, following=6), piece6(4, 0, tcp[:16], more=True, following=6)]
    hidden = bytes(IPv6ExtHdrDestOpt(nh=17))
    tiny += [piece6(5, 0, hidden, more=True, following=60), piece6(6, 0, b"", more=True)]
    fine = [piece4(7, 0, udp[:8], more=True), piece6(8, 0, hidden + udp[:8], more=True, following=60)]
    assert world.raw(*map(bytes, tiny + fine)) == [False] * 6 + [True] * 2
    assert datapath.totals()["ingress.truncated.drop"] == 6


def test_a_later_fragment_that_comes_first_waits_for_nobody(world: World) -> None:
    world.enforce(NAMES)
    first, later = datagram(53, 48)[:24], b"l" * 24
    assert world.arriving(
        piece4(1, 32, later, more=False), piece4(1, 0, first, more=True), piece4(1, 32, later, more=False)
    ) == [False, True, True]  # fmt: skip
    assert world.arriving(
        piece6(1, 32, later, more=False), piece6(1, 0, first, more=True), piece6(1, 32, later, more=False)
    ) == [False, True, True]  # fmt: skip


def test_the_pass_of_a_first_fragment_holds_for_its_datagram_only(world: World) -> None:
    world.enforce(NAMES)
    first, later = datagram(53, 48)[:24], b"l" * 24
    assert world.arriving(piece4(1, 0, first, more=True), piece6(1, 0, first, more=True)) == [True, True]
    others = [
        piece4(2, 24, later, more=False),
        piece4(1, 24, later, more=False, src=OTHER4),
        piece4(1, 24, later, more=False, protocol=132),
        piece6(2, 24, later, more=False),
    ]
    assert world.arriving(*others) == [False] * 4
    denied = datagram(54, 48)[:24]
    assert world.arriving(piece4(1, 0, denied, more=True), piece6(1, 0, denied, more=True)) == [False, False]


def test_an_atomic_fragment_is_a_packet_of_its_own(world: World) -> None:
    world.enforce(NAMES)
    whole = IPv6ExtHdrFragment(id=5, offset=0, m=0)
    assert world.arriving(
        to_host6(whole, UDP(sport=4000, dport=53)), to_host6(whole, UDP(sport=4000, dport=54)),
        piece6(5, 24, b"l" * 24, more=False),
    ) == [True, False, False]  # fmt: skip


def test_a_fragment_of_a_fragment_opens_nothing(world: World) -> None:
    """The outer header says that more follows; what follows has the outer number, and nobody let that in."""
    world.enforce(NAMES)
    outer, inner = IPv6ExtHdrFragment(id=1, m=1), IPv6ExtHdrFragment(id=2, m=1)
    assert world.arriving(
        to_host6(outer, inner, UDP(sport=4000, dport=53, len=200), Raw(bytes(8))), piece6(1, 40, b"l" * 24, more=False)
    ) == [True, False]  # fmt: skip
    later = IPv6ExtHdrFragment(id=3, offset=4)
    assert world.arriving(to_host6(outer, later, Raw(b"l" * 24))) == [False]


# ── addresses that no honest packet has ───────────────────────────────────────────────────────────────────────────────────────

REFUSED = ("127.0.0.1", "127.9.9.9", HOST4, "224.0.0.1", "255.255.255.255", "0.0.0.0", "::1", "ff02::1")
BELIEVED = (
    "10.77.0.255",
    HOST6,
    "::",
    f"::ffff:{PEER4}",
)  # by Linux, where nothing but the firewall stands before it


@pytest.mark.parametrize("source", [*REFUSED, *BELIEVED])
def test_a_sender_that_cannot_be_is_judged_by_the_rules_like_any_other(world: World, source: str) -> None:
    """Nobody gets in by such an address without a rule; where a rule lets it in, the host's own stack refuses most of them."""
    six = ":" in source
    to, address, family = (to_host6, HOST6, socket.AF_INET6) if six else (to_host, HOST4, socket.AF_INET)
    datapath = world.enforce(NAMES)
    forged = to(UDP(sport=53, dport=53), Raw(b"forged"), src=source)
    assert world.arriving(
        to(TCP(sport=4000, dport=4000, flags="S"), src=source), to(UDP(sport=54, dport=54), src=source), forged
    ) == [False, False, True]  # fmt: skip
    named = f"rules:\n  - {{name: forged, from: '{source}', action: drop}}\n"
    for policy in [NAMES] * (source in REFUSED) + [NAMES.replace("rules:\n", named)]:
        world.enforce(policy, datapath)
        with heard(world, family, address, 53) as at:
            send(world, forged, to(UDP(sport=4001, dport=53), Raw(b"afterwards")))
            assert at[53].recv(100) == b"afterwards"


@pytest.mark.parametrize("target", ["127.0.0.1", "::1"])
def test_nobody_on_the_wire_reaches_the_loopback(world: World, target: str) -> None:
    six = ":" in target
    to, address, family = (to_host6, HOST6, socket.AF_INET6) if six else (to_host, HOST4, socket.AF_INET)
    world.enforce(NAMES)
    with heard(world, family, target, 53) as inner, heard(world, family, address, 53) as outer:
        send(world, to(UDP(sport=4000, dport=53), Raw(b"within"), dst=target))
        send(world, to(UDP(sport=4001, dport=53), Raw(b"afterwards")))
        assert outer[53].recv(100) == b"afterwards"
        assert silent(inner[53])


# ── neighbours and listeners ──────────────────────────────────────────────────────────────────────────────────────────────────


def six(hops: int, *layers: object, src: str = LINK) -> Frame:
    frame = Ether(src=PEER_MAC, dst=HOST_MAC) / IPv6(src=src, dst=HOST6, hlim=hops)
    for layer in layers:
        frame = frame / layer
    return frame


LISTENING = (ICMPv6MLQuery(), ICMPv6MLReport(), ICMPv6MLDone(), ICMPv6MLReport2())


def test_listener_messages_pass_from_the_link_only(world: World) -> None:
    """From further away anybody can have one arrive with a hop limit of 1."""
    world.enforce(SHUT)
    alert = IPv6ExtHdrHopByHop()
    for message in LISTENING:
        assert (
            world.arriving(
                six(1, message),
                six(1, alert, message),
                six(1, message, src="::"),
                six(1, message, src="febf::1"),
            )
            == [True] * 4
        )
        assert world.arriving(
            six(1, message, src=PEER6), six(1, alert, message, src=PEER6), six(1, message, src="fec0::1"),
            six(1, message, src="::1"), six(2, message), six(255, message),
        ) == [False] * 6  # fmt: skip
    world.enforce(SHUT + "rules:\n  - {name: listeners, proto: icmpv6, icmp: [143], action: accept}\n")
    assert world.arriving(six(1, ICMPv6MLReport2(), src=PEER6)) == [True], "a rule can say otherwise"


def test_neighbour_discovery_passes_unfragmented_with_hop_limit_255_only(world: World) -> None:
    datapath = world.enforce(SHUT)
    ask = ICMPv6ND_NS(tgt=HOST6)
    assert (
        world.arriving(six(255, ask), six(255, IPv6ExtHdrHopByHop(), ask), six(255, ask, src=PEER6))
        == [True] * 3
    )
    others = [six(hops, ask) for hops in (0, 1, 64, 254)]
    others += [six(255, ICMPv6ND_NS(tgt=HOST6, code=1)), six(255, ICMPv6EchoRequest())]
    assert world.arriving(*others) == [False] * 6
    pieces = IPv6ExtHdrFragment(id=9, m=1)
    assert world.arriving(six(255, pieces, ask), six(1, pieces, ICMPv6MLReport2())) == [False] * 2, "RFC 6980"
    assert datapath.totals()["ingress.default.drop"] == 8


# ── errors about IPv6 packets with extension headers ──────────────────────────────────────────────────────────────────────────

HEADERS: dict[str, Sequence[object]] = {
    "options": [IPv6ExtHdrDestOpt()],
    "hop by hop": [IPv6ExtHdrHopByHop(), IPv6ExtHdrRouting()],
    "atomic": [IPv6ExtHdrFragment(id=3)],
    "first fragment": [IPv6ExtHdrFragment(id=3, m=1)],
    "authenticated": [AH(nh=17, payloadlen=4, icv=b"\0" * 12)],
    "eight": [IPv6ExtHdrDestOpt()] * 8,
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS.keys())
def test_an_error_about_a_packet_with_extension_headers_finds_its_flow(
    world: World, headers: Sequence[object]
) -> None:
    world.enforce(SHUT)
    assert world.leaving(to_peer6(UDP(sport=4000, dport=53))) == [True]

    def about(port: int, error: object, *layers: object) -> Frame:
        inner: Frame = IPv6(src=HOST6, dst=PEER6)
        for layer in layers:
            inner = inner / layer
        return to_host6(error, inner / UDP(sport=port, dport=53, len=8), src="fd77::250")

    errors = [ICMPv6PacketTooBig(mtu=1280), ICMPv6DestUnreach(code=4)]
    assert world.arriving(*[about(4000, error, *headers) for error in errors]) == [True, True]
    assert world.arriving(*[about(4001, error, *headers) for error in errors]) == [False, False]


def test_an_error_is_about_no_flow_where_its_packet_cannot_be_read(world: World) -> None:
    world.enforce(SHUT)
    assert world.leaving(to_peer6(UDP(sport=4000, dport=53))) == [True]
    inner, ports = IPv6(src=HOST6, dst=PEER6), UDP(sport=4000, dport=53, len=8)
    error = ICMPv6DestUnreach(code=4)
    later, many = IPv6ExtHdrFragment(id=3, offset=1), [IPv6ExtHdrDestOpt()] * 9
    too_many = inner
    for layer in many:
        too_many = too_many / layer
    assert world.arriving(
        to_host6(error, inner / later / ports), to_host6(error, too_many / ports),
        to_host6(error, IPv6(src=PEER6, dst=PEER6) / IPv6ExtHdrDestOpt() / ports),
    ) == [False] * 3  # fmt: skip
    cut = bytes(
        to_host6(error, IPv6(src=HOST6, dst=PEER6, nh=60, plen=64), Raw(bytes([17, 200, *range(10)])))
    )
    assert world.raw(cut) == [False]


# ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_address_of_the_same_network_does_not_renew_a_limit(world: World) -> None:
    """Who has one IPv6 address has the 2^64 of its network as well."""
    world.enforce(
        SHUT
        + "rules:\n  - {name: slow, proto: udp, ports: 7, action: accept, limit: {rate: 1/h, burst: 3, per: source}}\n"
    )
    asks = [to_host6(UDP(sport=4000, dport=7), src=f"fd77::{n:x}:{n:x}") for n in range(16, 25)]
    assert world.arriving(*asks) == [True] * 3 + [False] * 6
    assert world.arriving(to_host6(UDP(sport=4000, dport=7), src="fd77:0:0:1::2")) == [True]
