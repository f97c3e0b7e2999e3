"""The connection table under an enemy who forges senders, floods it, and aims at buckets; while honest people connect."""

from __future__ import annotations

import ctypes as ct

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.packet import Packet as Frame
from scapy.packet import Raw
from support_datapath import OTHER4, PEER4, to_host, to_peer
from support_table import MILLION, Table, living, talk

from loopback.bpf import layout

pytestmark = pytest.mark.kernel

SHUT = "version: 1\ndefault: {ingress: drop, egress: drop}\nrules:\n"
POLICY = (
    SHUT + "  - {name: names, proto: udp, ports: 53, action: accept}\n"
    "  - {name: web, proto: tcp, ports: 80, action: accept}\n"
    "  - {name: ping, proto: icmp, icmp: echo-request, action: accept}\n"
    "  - {name: ask, direction: egress, proto: udp, ports: 1000-2000, action: accept}\n"
)
FLOWS = 65536


def proofs(table: Table) -> list[tuple[str, str]]:
    return [(flow.stage, flow.proof) for flow in table.datapath.flows()]


# ── forged senders ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def forged(number: int) -> tuple[Frame, Frame]:
    """A question with somebody else's address, and what the host answers him."""
    name = f"198.51.{number >> 8}.{number & 255}"
    return (
        to_host(UDP(sport=5353, dport=53), Raw(b"question"), src=name),
        to_peer(UDP(sport=53, dport=5353), Raw(b"answer"), dst=name),
    )


def test_questions_with_forged_senders_prove_no_flow_however_often_they_come(small: Table) -> None:
    question, answer = forged(1)
    ping, pong = to_host(ICMP(type=8, id=7)), to_peer(ICMP(type=0, id=7))
    for one, other in ((question, answer), (ping, pong)):
        for _ in range(3):
            assert small.arrives(one)
            assert small.leaves(other)
        assert proofs(small) == [("open", "answered")]
        small.change(quiet=10**9)
    talk(small, 1)
    assert proofs(small) == [("open", "proven")], "but what the host began"


def test_a_flood_of_forged_questions_that_are_answered_fills_no_table(small: Table) -> None:
    """Three times as many as there is room for, each of them twice."""
    talk(small, 100)
    for number in range(3 * 1024):
        question, answer = map(bytes, forged(number))
        assert small.arrives(question) and small.leaves(answer) and small.arrives(question)
    talk(small, 200)
    assert small.totals("flows_failed") == [0]
    assert living(small, 200) == 200


def test_a_refusal_is_no_answer(small: Table) -> None:
    """A port that the rules open and nobody listens at: the host refuses, to whomever the sender forged."""
    assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="S", seq=77)))
    assert small.leaves(to_peer(TCP(sport=80, dport=5000, flags="RA", ack=78)))
    for _ in range(3):
        assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="A", seq=78, ack=1)))
    assert [proof for _, proof in proofs(small)] == ["one-sided"]


def test_segments_forged_while_connections_are_taken_over_prove_none(racer: bytes) -> None:
    """Just after the firewall was switched on: the host refuses each, and the enemy says it again."""
    table = Table(racer, 1024, "version: 1\ndefault: {ingress: drop, egress: accept}\n")
    try:
        for _ in range(3):
            assert table.arrives(to_host(TCP(sport=5000, dport=22, flags="A", seq=78, ack=1)))
            assert table.leaves(to_peer(TCP(sport=22, dport=5000, flags="R", seq=1)))
        assert [proof for _, proof in proofs(table)] == ["answered"]
    finally:
        table.close()


def connect(table: Table, port: int) -> None:
    assert table.arrives(to_host(TCP(sport=port, dport=80, flags="S", seq=77)))
    assert table.leaves(to_peer(TCP(sport=80, dport=port, flags="SA", seq=1000, ack=78)))
    assert table.arrives(to_host(TCP(sport=port, dport=80, flags="A", seq=78, ack=1001)))


def test_a_forged_end_does_not_shorten_a_connections_life(small: Table) -> None:
    connect(small, 5000)
    assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="FA", seq=7, ack=9)))
    assert proofs(small) == [("open", "proven")]
    assert small.leaves(to_peer(TCP(sport=80, dport=5000, flags="FA", seq=1001, ack=79)))
    assert proofs(small) == [("closing", "proven")], "the host's own end is one"
    assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="A", seq=79, ack=1002)))
    assert proofs(small) == [("closing", "proven")]


# ── floods ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_under_a_flood_of_syns_live_flows_live_and_new_ones_get_in(large: Table) -> None:
    """The promise: a handshake is remembered if it is done before half as many forged SYNs came as there is room for. At a
    million of them a second, and the room for 65,536 flows that there is without a setting, that is 32 ms."""
    for port in range(1000, 1200):
        connect(large, port)
    syn = bytes(to_host(TCP(sport=1, dport=80, flags="S"), src=OTHER4))
    large.control()
    large.run("flood", 2 * FLOWS, syn)
    for turn in range(10):
        new = range(2000 + turn * 20, 2020 + turn * 20)
        for port in new:
            assert large.arrives(to_host(TCP(sport=port, dport=80, flags="S", seq=77)))
        large.run("flood", FLOWS // 4, syn)
        for port in new:
            assert large.leaves(to_peer(TCP(sport=80, dport=port, flags="SA", seq=1000, ack=78)))
        large.run("flood", FLOWS // 4, syn)
        for port in new:
            assert large.arrives(to_host(TCP(sport=port, dport=80, flags="A", seq=78, ack=1001)))
    large.run("flood", MILLION, syn)
    proven = {flow.sport for flow in large.datapath.flows() if flow.proof == "proven"}
    assert proven == {*range(1000, 1200), *range(2000, 2200)}
    assert large.totals("flows_failed") == [0]
    for port in (1000, 1199, 2000, 2199):
        assert large.leaves(to_peer(TCP(sport=80, dport=port, flags="A", seq=1001, ack=78)))


# ── chosen tuples ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def buckets(table: Table) -> dict[int, list[int]]:
    """Ports of senders by the bucket that their flow stands in."""
    found: dict[int, list[int]] = {}
    size = ct.sizeof(layout.Flow)
    for place in range(len(table.entries) // size):
        entry = layout.Flow.from_buffer(table.entries, place * size)
        if entry.sequence:
            low, high = entry.key.low_port, entry.key.high_port
            found.setdefault(place // layout.WAYS, []).append(high if low == 53 else low)
    return found


def test_tuples_that_meet_in_one_bucket_meet_in_no_other_hosts_table(racer: bytes) -> None:
    """An enemy who sees the table of his own host learns nothing about another: each has a seed of its own."""
    tables = [Table(racer, 4096, POLICY) for _ in range(2)]
    try:
        for port in range(10_000, 12_000):
            tables[0].arrives(to_host(UDP(sport=port, dport=53), Raw(b"x" * 8)))
        crowded = sorted(buckets(tables[0]).values(), key=len)[-20:]
        chosen = [port for ports in crowded for port in ports]
        assert len(chosen) > 120, "they share twenty buckets of 256"
        for port in chosen:
            tables[1].arrives(to_host(UDP(sport=port, dport=53), Raw(b"x" * 8)))
        spread = buckets(tables[1])
        assert sum(map(len, spread.values())) == len(chosen)
        assert len(spread) > len(chosen) // 2
        seeds = {bytes(table.datapath._maps["flow_seed"].lookup(bytes(4)) or b"") for table in tables}
        assert len(seeds) == 2 and bytes(88) not in seeds
    finally:
        for table in tables:
            table.close()


# ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

LIMITED = (
    SHUT
    + "  - {name: slow, proto: udp, ports: 53, action: accept, limit: {rate: 1/h, burst: 3, per: source}}\n"
    "  - {name: all, proto: udp, ports: 54, action: accept, limit: {rate: 1/h, burst: 3, per: rule}}\n"
)


def test_forged_senders_neither_shut_others_out_of_a_limit_nor_free_who_goes_on(racer: bytes) -> None:
    """Six times as many senders as are remembered. A new one is let in; one who keeps asking stays where he was."""
    table = Table(racer, 1024, LIMITED)
    try:

        def asks(port: int, sender: str, number: int) -> bool:
            return table.arrives(to_host(UDP(sport=number, dport=port), Raw(b"x" * 8), src=sender))

        passed = {port: sum(asks(port, PEER4, 100 + n) for n in range(9)) for port in (53, 54)}
        assert passed == {53: 3, 54: 3}
        forged_ones = bytes(to_host(UDP(sport=1, dport=53), Raw(b"12345678")))
        table.control()
        for turn in range(160):
            table.run("flood", 2500, forged_ones)
            assert not asks(53, PEER4, 1000 + turn)
            assert not asks(54, PEER4, 1000 + turn)
        assert [asks(53, OTHER4, 100 + n) for n in range(4)] == [True, True, True, False]
    finally:
        table.close()
