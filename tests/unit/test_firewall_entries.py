"""What a rule becomes: entries and a record, no more of them than needed, and refusals that name the rule."""

from __future__ import annotations

import time
from typing import Any

import pytest
from support_slot import Reader, agree, compiled, policy_of, refused, rule

from loopback.bpf import layout
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.entries import MAX_ENTRIES
from loopback.modules.firewall.model import Direction, Limit, Packet, PortRange, Prefix, Rule


def ports_of(one: Rule, family: int = 4) -> list[tuple[Any, ...]]:
    """Protocol and both port ranges of each entry."""
    reader = Reader(compiled(policy_of(one)))
    matches = [e.match for e in reader.entries(one.direction, family)]
    return [(m.protocol, tuple(m.ports), tuple(m.source_ports)) for m in matches]


ANY = (0, 65535)


def test_neighbouring_ports_become_one_range() -> None:
    one = rule(protocols=(17, 6), ports=(PortRange(80, 80), PortRange(81, 90), PortRange(78, 78)))
    assert ports_of(one) == [(p, ports, ANY) for p in (17, 6) for ports in ((78, 78), (80, 90))]


def test_ports_ask_for_protocols_that_have_them() -> None:
    one = rule(source_ports=(PortRange(0, 65535),))
    reader = Reader(compiled(policy_of(one)))
    assert {e.match.protocol for e in reader.entries(0, 4)} == set(fields.WITH_PORTS)
    assert all(
        e.match.needs == layout.HAS_PORTS and e.match.protocol_mask == 255 for e in reader.entries(0, 4)
    )


def test_an_icmp_code_is_asked_where_one_is_named() -> None:
    one = rule(protocols=(1,), icmp=((3, 4), (8, None)))
    assert ports_of(one) == [(1, (3 << 8 | 4, 3 << 8 | 4), ANY), (1, (8 << 8, 8 << 8 | 255), ANY)]
    assert ports_of(one, 6) == []


def test_a_rule_of_ports_and_icmp_types_matches_nothing_but_keeps_its_place() -> None:
    both = rule("both", icmp=((8, None),), ports=(PortRange(1, 2),), states=frozenset({"new"}))
    policy = policy_of(both, rule("all"))
    one = compiled(policy)
    packet = Packet(direction=Direction.INGRESS, src="192.0.2.1", dst="192.0.2.2", protocol=1, icmp_type=8)
    assert one.entries == 2 and agree(policy, Reader(one), packet).order == 1


def test_a_prefix_makes_entries_of_its_family_alone() -> None:
    reader = Reader(compiled(policy_of(rule(sources=(fields.prefix("10.1.0.0/16"),)))))
    [entry] = reader.entries(0, 4)
    assert (entry.source, entry.match.source_shift, entry.match.destination_shift) == (
        10 << 24 | 1 << 16,
        16,
        32,
    )
    assert not reader.entries(0, 6)
    reader = Reader(compiled(policy_of(rule(destinations=(fields.prefix("2001:db8::/32"),)))))
    [entry6] = reader.entries(0, 6)
    assert (list(entry6.destination), entry6.match.destination_shift) == ([0x20010DB8 << 32, 0], 32)
    assert not reader.entries(0, 4)


# ── records ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_limit_becomes_an_interval_and_a_tolerance() -> None:
    record = Reader(compiled(policy_of(rule(limit=Limit(rate=4.0, burst=3, per="source"))))).rule(0)
    assert (record.limit_interval, record.limit_tolerance) == (250_000_000, 500_000_000)
    assert record.flags == layout.LIMIT_SOURCE
    whole = Reader(compiled(policy_of(rule(limit=Limit(rate=1e7, burst=1, per="rule"))))).rule(0)
    assert (whole.limit_interval, whole.limit_tolerance, whole.flags) == (100, 0, layout.LIMIT_RULE)


def test_records_reach_as_far_as_the_last_rule_that_has_something_to_say() -> None:
    quiet = [rule(f"q{n}", sources=(Prefix(4, 10 << 24 | n, 32),)) for n in range(100)]
    nothing = len(compiled(policy_of(*quiet)).slot)
    first = compiled(policy_of(rule("s", states=frozenset({"new"}), sources=quiet[0].sources), *quiet[1:]))
    last = compiled(policy_of(*quiet[1:], rule("s", log_sample=5, sources=quiet[0].sources)))
    assert nothing < len(first.slot) <= nothing + 64
    assert nothing + 99 * 32 <= len(last.slot) <= nothing + 64 + 100 * 40
    reader = Reader(last)
    assert reader.rule(99).log_sample == 5 and reader.rule(98).flags == 0
    shown = {e.match.order: e.match.flags & (layout.SAMPLES | layout.MORE) for e in reader.entries(0, 4)}
    assert shown == dict.fromkeys(range(99), 0) | {99: layout.SAMPLES}


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_more_entries_than_allowed_name_the_first_rule_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopback.modules.firewall.compile.MAX_ENTRIES", 4096)
    fits = [rule(f"r{n}", line=n + 1, sources=(Prefix(4, n, 32),)) for n in range(4097)]
    assert compiled(policy_of(*fits[:4096])).entries == 4096
    monkeypatch.setattr("loopback.modules.firewall.entries.MAX_ENTRIES", 4096)
    assert (
        "line 4097: rule 'r4096': with this rule the policy needs more than 4096"
        in refused(policy_of(*fits)).reason
    )


def test_lists_that_multiply_are_refused_at_once() -> None:
    odd = tuple(PortRange(port, port) for port in range(1, 4000, 2))
    begin = time.process_time()
    assert "rule 'big'" in refused(policy_of(rule("big", ports=odd, source_ports=odd))).reason
    some = tuple(Prefix(4, n << 8, 24) for n in range(60))
    big = rule(
        "wide", ports=odd[:500], source_ports=odd[:500], protocols=(6,), sources=some, destinations=some
    )
    assert f"more than {MAX_ENTRIES} entries" in refused(policy_of(big)).reason
    assert time.process_time() - begin < 5, "it tried all of them"


def test_a_limit_of_centuries_is_refused() -> None:
    policy = policy_of(rule(limit=Limit(rate=fields.MIN_RATE, burst=fields.MAX_BURST, per="rule")))
    assert "rule 'r': limit: " in refused(policy).reason


def test_more_than_63_interfaces_name_the_one_too_many() -> None:
    policy = policy_of(*(rule(f"r{n}", interfaces=(f"eth{n}",)) for n in range(64)))
    assert "rule 'r63': iface: with this rule the policy names more than 63" in refused(policy).reason
    assert len(compiled(policy_of(*policy.rules[:63])).interfaces) == 63
