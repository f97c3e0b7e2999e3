"""The connection table under floods, filled to the brim, and written by two processors at once; and as user space sees it."""

from __future__ import annotations

import os
import threading

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Raw
from support_datapath import HOST4, PEER4, policy_of, to_host, to_peer
from support_table import MILLION, Table, answered, asked, living, talk

from loopback.modules.firewall.model import Action, Direction

pytestmark = pytest.mark.kernel

SHUT = "version: 1\ndefault: {ingress: drop, egress: drop}\nrules:\n"
NAMES = "  - {name: names, proto: udp, ports: 53, action: accept}\n"
WEB = "  - {name: web, proto: tcp, ports: 80, action: accept}\n"
ASK = "  - {name: ask, direction: egress, proto: udp, ports: 1000-2000, action: accept}\n"
POLICY = SHUT + NAMES + WEB + ASK
FLOWS = 65536


# ── floods ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "frame", [to_host(UDP(sport=1, dport=53), Raw(b"12345678")), to_host(TCP(sport=1, dport=80, flags="S"))],
    ids=["datagrams", "syns"],
)  # fmt: skip
def test_a_million_one_way_packets_push_out_no_open_flow(small: Table, frame: object) -> None:
    talk(small, 200)
    small.control()
    small.run("flood", MILLION, bytes(frame))  # type: ignore[call-overload]
    created, evicted, failed = small.totals("flows_created", "flows_evicted", "flows_failed")
    assert created + failed > 0.99 * MILLION, "the flood was let in, each packet as a flow of its own"
    assert evicted > 0.9 * MILLION, "and took each other's places"
    assert living(small, 200) == 200


def test_flows_that_nothing_protects_do_not_outlive_a_flood(small: Table) -> None:
    talk(small, 200)
    small.change(proof=0)
    small.control()
    small.run("flood", MILLION // 10, bytes(to_host(UDP(sport=1, dport=53), Raw(b"12345678"))))
    assert living(small, 200) == 0


def test_an_answer_alone_proves_no_flow_and_a_wrong_acknowledgement_neither(small: Table) -> None:
    def proofs() -> list[tuple[str, str]]:
        return [(flow.stage, flow.proof) for flow in small.datapath.flows()]

    talk(small, 1, again=False)
    assert proofs() == [("open", "answered")]
    small.change(quiet=10**9)
    assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="S", seq=77)))
    assert proofs() == [("opening", "one-sided")]
    assert small.leaves(to_peer(TCP(sport=80, dport=5000, flags="SA", seq=123456789, ack=78)))
    assert proofs() == [("opening", "answered")], "SYN cookies answer everybody"
    assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="A", seq=78, ack=987654321)))
    assert proofs() == [("opening", "answered")], "he never saw the answer"
    assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="A", seq=78, ack=123456790)))
    assert proofs() == [("open", "proven")]


# ── room ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nine_tenths_of_the_table_fill_before_anything_is_refused(large: Table) -> None:
    most = FLOWS * 9 // 10
    large.control()
    large.run("fill", most)
    assert large.found().count == most
    assert large.totals("flows_created", "flows_failed", "flows_evicted") == [most, 0, 0]
    large.run("fill", FLOWS)
    created, failed, evicted = large.totals("flows_created", "flows_failed", "flows_evicted")
    assert created + failed == most + FLOWS
    assert (failed > 0, evicted) == (True, 0), "who finds no room is refused, and nobody loses his"
    large.control()
    large.run("recount", most + FLOWS)
    assert large.found().count == created, "every one that was remembered is found"
    assert sum(1 for _ in large.datapath.flows()) == created


def test_what_finds_no_room_is_asked_for_each_time_and_counted(small: Table) -> None:
    small.control()
    small.run("fill", 4096)
    assert small.leaves(asked(1)), "the rules let it pass"
    assert not small.arrives(answered(1)), "but nobody remembers it"
    assert small.totals("flows_failed")[0] > 0


def test_expired_flows_make_room_without_a_sweeper(small: Table) -> None:
    small.control()
    small.run("fill", 4096)
    before = small.totals("flows_created", "flows_failed", "flows_evicted")
    small.change(quiet=10**9)
    assert list(small.datapath.flows()) == []
    talk(small, 300)
    assert small.totals("flows_created", "flows_failed", "flows_evicted") == [before[0] + 300, *before[1:]]


def test_an_expired_flow_lets_no_answer_in_and_begins_anew_in_its_place(small: Table) -> None:
    talk(small, 1)
    small.change(quiet=10**9)
    assert not small.arrives(answered(0))
    talk(small, 1)
    assert len(list(small.datapath.flows())) == 1
    assert sum(1 for tag in memoryview(small.datapath._maps["flow_tags"].memory()).cast("H") if tag) == 1


# ── two processors ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("careless", [True, False])
def test_no_flow_passes_by_anothers_verdict_while_two_processors_write(racer: bytes, careless: bool) -> None:
    """256 flows in 64 places. Carelessly written, denied ones pass; as it is written, none does."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("a race needs two processors")
    table = Table(racer, 64, POLICY)
    try:
        table.control(careless=int(careless))

        def run(cpu: int) -> None:
            os.sched_setaffinity(threading.get_native_id(), {cpu})
            table.run("race", 2 * MILLION)

        threads = [threading.Thread(target=run, args=(cpu,)) for cpu in cpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = table.found()
        assert found.count > MILLION
        assert table.totals("flows_evicted")[0] > MILLION // 10, "they pushed each other out"
        assert (found.wrong > 0) is careless, f"{found.wrong} of {found.count}"
    finally:
        table.close()


# ── policies ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_revoked_connection_is_not_begun_anew_by_its_other_end(small: Table) -> None:
    """Its flow is forgotten; the host's end sends on, and the policy lets out what the host sends."""
    datapath = small.datapath
    datapath._write_config(datapath._rate, 0)
    small.enforce("version: 1\ndefault: {ingress: drop, egress: accept}\n")
    assert small.leaves(to_peer(TCP(sport=80, dport=5000, flags="A")))
    assert not small.arrives(to_host(TCP(sport=5000, dport=80, flags="A")))
    assert small.leaves(to_peer(TCP(sport=7000, dport=80, flags="S")))
    assert small.arrives(to_host(TCP(sport=80, dport=7000, flags="SA"))), "what the host begins is answered"


def test_flows_are_told_by_the_packet_that_began_them(small: Table) -> None:
    talk(small, 1)
    assert small.arrives(to_host(TCP(sport=5000, dport=80, flags="S")))
    flows = {flow.protocol: flow for flow in small.datapath.flows()}
    out, into = flows[17], flows[6]
    assert (out.src, out.sport, out.dst, out.dport, out.direction) == (
        HOST4,
        6000,
        PEER4,
        1000,
        Direction.EGRESS,
    )
    assert (out.stage, out.proof, out.sides[Direction.EGRESS].rule) == ("open", "proven", "ask")
    assert list(out.sides) == [Direction.EGRESS], "an answer is asked nothing"
    assert (into.src, into.sport, into.dst, into.dport, into.direction) == (
        PEER4,
        5000,
        HOST4,
        80,
        Direction.INGRESS,
    )
    assert (into.stage, into.sides[Direction.INGRESS].rule) == ("opening", "web")
    assert into.sides[Direction.INGRESS].allowed == small.datapath.generation
    assert 0 <= out.idle_s <= out.age_s < 60
    small.change(quiet=20 * small.datapath._rate)
    assert all(20 <= flow.idle_s < 40 for flow in small.datapath.flows())


def test_a_diff_names_the_flows_that_a_staged_policy_would_end(small: Table) -> None:
    talk(small, 3)
    for port in (5000, 5001):
        assert small.arrives(to_host(TCP(sport=port, dport=80, flags="S")))
    assert small.arrives(to_host(UDP(sport=5000, dport=53)))
    small.datapath.stage(
        policy_of(SHUT + "  - {name: shut, proto: tcp, ports: 1-100, action: drop}\n" + NAMES)
    )
    found = [
        (c.direction, c.rule_before, c.before, c.rule_after, c.after, len(c.flows))
        for c in small.datapath.diff()
    ]
    assert found == [
        (Direction.EGRESS, "ask", Action.ACCEPT, None, Action.DROP, 3),
        (Direction.INGRESS, "web", Action.ACCEPT, "shut", Action.DROP, 2),
    ]
    small.datapath.commit(0)
    small.datapath.stage(policy_of(POLICY))
    again = [(c.rule_before, c.rule_after, c.after, len(c.flows)) for c in small.datapath.diff()]
    assert again == [(None, "ask", Action.ACCEPT, 3), ("shut", "web", Action.ACCEPT, 2)]


def test_an_error_about_a_flow_finds_it_in_the_table(small: Table) -> None:
    talk(small, 1)
    ours = IP(src=HOST4, dst=PEER4) / UDP(sport=6000, dport=1000)
    other = IP(src=HOST4, dst=PEER4) / UDP(sport=6001, dport=1000)
    assert small.arrives(to_host(ICMP(type=3, code=1), ours))
    assert not small.arrives(to_host(ICMP(type=3, code=1), other))
