"""Connections over real sockets: return traffic, related errors, policies that change under them, and what is counted."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from support_datapath import (
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
    Ether,
    Raw,
    World,
    inside,
    to_host,
    to_peer,
)

from loopback.bpf.ring import Ring
from loopback.modules.firewall import events

pytestmark = pytest.mark.kernel

CLOSED = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
SHUT = "version: 1\ndefault: {ingress: drop, egress: drop}\n"
WEB = CLOSED + "rules:\n  - {name: web, proto: tcp, ports: 8080, action: accept}\n"
NAMES = CLOSED + "rules:\n  - {name: names, proto: udp, ports: 5353, action: accept}\n"


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@contextlib.contextmanager
def listening(namespace: str, family: int, address: str, port: int) -> Iterator[socket.socket]:
    with inside(namespace), socket.create_server((address, port), family=family) as server:
        server.settimeout(60)
        yield server


def dial(namespace: str, family: int, address: str, port: int) -> socket.socket:
    with inside(namespace):
        made = socket.socket(family, socket.SOCK_STREAM)
    made.settimeout(60)
    made.connect((address, port))
    return made


def exchange(one: socket.socket, other: socket.socket) -> None:
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"hello")
        assert receiver.recv(100) == b"hello"


@contextlib.contextmanager
def connected(world: World, family: int = socket.AF_INET) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection from the peer to port 8080 of the host: (the peer's end, the host's end)."""
    address = HOST4 if family == socket.AF_INET else HOST6
    with (
        listening(world.host, family, address, 8080) as server,
        dial(world.peer, family, address, 8080) as client,
    ):
        accepted, _ = server.accept()
        accepted.settimeout(60)
        with accepted:
            yield client, accepted


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_answers_pass_though_the_way_out_is_shut(world: World, family: int) -> None:
    world.enforce(SHUT + "rules:\n  - {name: web, proto: tcp, ports: 8080, action: accept}\n")
    with connected(world, family) as (client, server):
        exchange(client, server)


def test_segments_that_the_stack_joins_pass_like_single_ones(world: World) -> None:
    datapath = world.enforce(SHUT + "rules:\n  - {name: web, proto: tcp, ports: 8080, action: accept}\n")
    size = 8 << 20
    with connected(world) as (client, server):
        for sender, receiver in ((client, server), (server, client)):
            thread = threading.Thread(target=sender.sendall, args=(bytes(size),))
            thread.start()
            got = 0
            while got < size:
                got += len(receiver.recv(1 << 20))
            thread.join()
    assert datapath.totals()["egress.truncated.drop"] == datapath.totals()["ingress.truncated.drop"] == 0


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, PEER4), (socket.AF_INET6, PEER6)])
def test_what_the_host_begins_is_answered(world: World, family: int, address: str) -> None:
    world.enforce(CLOSED)
    with (
        listening(world.peer, family, address, 9000) as server,
        dial(world.host, family, address, 9000) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            exchange(client, accepted)
    strange = to_host(TCP(sport=9000, dport=9, flags="S"))
    assert world.arriving(strange) == [False]


def test_udp_answers_pass_and_nothing_else_from_there(world: World) -> None:
    world.enforce(CLOSED)
    answer, other = to_host(UDP(sport=53, dport=4000)), to_host(UDP(sport=54, dport=4000))
    assert world.arriving(answer) == [False]
    assert world.leaving(to_peer(UDP(sport=4000, dport=53))) == [True]
    assert world.arriving(answer, other, to_host(UDP(sport=53, dport=4000), src=OTHER4)) == [
        True,
        False,
        False,
    ]


def test_echo_answers_pass_and_requests_do_not(world: World) -> None:
    world.enforce(CLOSED)
    assert world.arriving(to_host(ICMP(type=0, id=9))) == [False]
    assert world.leaving(to_peer(ICMP(type=8, id=9))) == [True]
    assert world.arriving(
        to_host(ICMP(type=0, id=9)), to_host(ICMP(type=8, id=9)), to_host(ICMP(type=0, id=10))
    ) == [True, False, False]


def test_errors_pass_only_about_a_flow_and_only_to_who_sent_it(world: World) -> None:
    world.enforce(CLOSED)
    assert world.leaving(to_peer(UDP(sport=4000, dport=53))) == [True]
    ours = IP(src=HOST4, dst=PEER4) / UDP(sport=4000, dport=53)
    other = IP(src=HOST4, dst=PEER4) / UDP(sport=4001, dport=53)
    turned = IP(src=PEER4, dst=HOST4) / UDP(sport=53, dport=4000)
    assert world.arriving(
        to_host(ICMP(type=3, code=1), ours, src="10.77.0.250"),
        to_host(ICMP(type=3, code=1), other),
        to_host(ICMP(type=3, code=1), turned),
    ) == [True, False, False]


def test_a_syn_in_an_open_connections_place_is_asked_again(world: World) -> None:
    world.enforce(CLOSED)
    with (
        listening(world.peer, socket.AF_INET, PEER4, 9000) as server,
        dial(world.host, socket.AF_INET, PEER4, 9000) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            exchange(client, accepted)
            ours = client.getsockname()[1]
            assert world.arriving(to_host(TCP(sport=9000, dport=ours, flags="S", seq=1))) == [False]
            exchange(client, accepted)


def test_revoked_access_ends_and_allowed_flows_live_on(world: World) -> None:
    datapath = world.enforce(WEB)
    with connected(world) as (client, server):
        exchange(client, server)
        world.enforce(WEB + "  - {name: more, proto: udp, ports: 1, action: accept}\n", datapath)
        exchange(client, server)
        world.enforce(CLOSED, datapath)
        client.sendall(b"too late")
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.recv(100)
        assert datapath.totals()["ingress.revoked.drop"] > 0


def test_a_revert_lets_a_flow_live_on_that_the_trial_denied(world: World) -> None:
    datapath = world.enforce(WEB)
    with connected(world) as (client, server):
        exchange(client, server)
        world.enforce(CLOSED, datapath, trial_s=60)
        client.sendall(b"waits")
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(100)
        with inside(world.host):
            datapath.revert()
        server.settimeout(60)
        assert server.recv(100) == b"waits", "TCP sends it again"
        exchange(client, server)


def test_connections_from_before_the_firewall_are_not_cut(world: World) -> None:
    with (
        listening(world.peer, socket.AF_INET, PEER4, 9000) as server,
        dial(world.host, socket.AF_INET, PEER4, 9000) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            exchange(client, accepted)
            datapath = world.enforce(CLOSED)
            accepted.sendall(b"from outside, first")
            assert client.recv(100) == b"from outside, first"
            assert datapath.totals()["ingress.flow.accept"] > 0
    assert world.arriving(to_host(TCP(sport=9000, dport=4444, flags="S"))) == [False]


def test_after_that_time_a_stray_packet_is_no_connection(world: World) -> None:
    datapath = world.enforce(CLOSED)
    stray = to_host(TCP(sport=9000, dport=4444, flags="A"))
    assert world.arriving(stray) == [True], "it may belong to one from before"
    world.stop_adopting(datapath)
    other = to_host(TCP(sport=9001, dport=4445, flags="A"))
    assert world.arriving(other) == [False]


def test_rules_may_ask_for_the_state(world: World) -> None:
    datapath = world.enforce(
        CLOSED + "rules:\n  - {name: stray, proto: tcp, state: invalid, action: drop}\n"
        "  - {name: any, proto: tcp, ports: 80, state: new, action: accept}\n"
    )
    world.stop_adopting(datapath)
    assert world.arriving(
        to_host(TCP(sport=1, dport=80, flags="S")), to_host(TCP(sport=2, dport=80, flags="A"))
    ) == [True, False]
    assert datapath.counters()["stray"][0] == 1


def test_counters_agree_with_what_was_sent_and_survive_policies(world: World) -> None:
    datapath = world.enforce(NAMES)
    frames = [to_host(UDP(sport=4000 + n, dport=5353)) for n in range(50)]
    assert all(world.arriving(*frames))
    assert not any(world.arriving(*[to_host(UDP(sport=4000 + n, dport=99)) for n in range(30)]))
    size = sum(len(bytes(f)) + 12 for f in frames)
    assert datapath.counters()["names"] == (50, size)
    assert datapath.totals()["ingress.default.drop"] == 30
    world.enforce(
        CLOSED
        + "rules:\n  - {name: zero, proto: tcp, ports: 1, action: accept}\n"
        + NAMES.split("rules:\n")[1],
        datapath,
    )
    assert all(world.arriving(*frames[:5])), "flows that lived on count for their rule as well"
    assert datapath.counters()["names"][0] == 55
    assert datapath.counters()["zero"] == (0, 0)


def test_a_limit_per_source_passes_the_burst_and_no_more(world: World) -> None:
    datapath = world.enforce(
        CLOSED
        + "rules:\n  - {name: slow, proto: udp, ports: 7, action: accept, limit: {rate: 1/h, burst: 5, per: source}}\n"
    )
    one = [to_host(UDP(sport=4000 + n, dport=7)) for n in range(9)]
    two = [to_host(UDP(sport=4000 + n, dport=7), src=OTHER4) for n in range(9)]
    assert world.arriving(*one) == [True] * 5 + [False] * 4
    assert world.arriving(*two) == [True] * 5 + [False] * 4
    assert datapath.counters()["slow"][0] == 10
    assert world.arriving(one[0]) == [True], "a flow that was let in pays no more"


def test_a_limit_per_rule_is_shared_by_all(world: World) -> None:
    world.enforce(
        CLOSED
        + "rules:\n  - {name: slow, proto: udp, ports: 7, action: accept, limit: {rate: 1/h, burst: 3, per: rule}}\n"
    )
    assert (
        sum(
            world.arriving(
                *[to_host(UDP(sport=4000 + n, dport=7), src=f"10.77.0.{20 + n}") for n in range(9)]
            )
        )
        == 3
    )


def test_a_sample_of_drops_is_reported(world: World) -> None:
    datapath = world.enforce(
        CLOSED + "rules:\n  - {name: telnet, proto: tcp, ports: 23, action: drop, log: {sample: 10}}\n"
    )
    records: list[bytes] = []
    ring = Ring(datapath.events, records.append)
    frame = (
        Ether(src=PEER_MAC, dst=HOST_MAC)
        / IP(src=PEER4, dst=HOST4)
        / TCP(sport=1234, dport=23)
        / Raw(b"12345678")
    )
    assert not any(world.arriving(*[frame] * 25))
    ring.consume()
    ring.close()
    with inside(world.host):
        told = [events.decode(record, datapath.rule_names()) for record in records]
    mine = [one for one in told if one["rule"] == "telnet"]
    assert 3 <= len(mine) <= 6, "one in ten on each processor, and its first"
    assert {k: mine[0][k] for k in ("src", "dst", "proto", "sport", "dport", "verdict", "direction", "interface")} == {
        "src": PEER4, "dst": HOST4, "proto": "tcp", "sport": 1234, "dport": 23, "verdict": "drop",
        "direction": "ingress", "interface": "eth0",
    }  # fmt: skip
    assert mine[0]["generation"] == datapath.generation
