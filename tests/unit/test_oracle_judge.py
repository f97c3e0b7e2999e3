"""The oracle: each field's meaning shown on one rule, and the laws that hold for every policy."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_firewall import meets_nothing, on_corners, other, packets, plain_policies

from loopback.modules.firewall import oracle, policy
from loopback.modules.firewall.model import Action, FirewallPolicy, Packet, Rule


def one_rule(sets: dict[str, Any] | None = None, **fields: Any) -> FirewallPolicy:
    plain = {
        "version": 1, "default": {"ingress": "drop", "egress": "drop"}, "sets": sets or {},
        "rules": [{"name": "it", "action": "accept", **fields}],
    }  # fmt: skip
    return policy.parse(json.dumps(plain).encode())


def packet(**fields: Any) -> Packet:
    plain = {"src": "10.1.2.3", "dst": "10.9.9.9", "proto": "tcp", "sport": 40000, "dport": 443, **fields}
    return policy.read_packet(json.dumps(plain).encode())


#: fields of the rule, fields of a packet that matches, fields of one that does not
MEANINGS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"direction": "egress"}, {"direction": "egress"}, {}),
    ({"from": "10.1.0.0/16"}, {"src": "10.1.255.255"}, {"src": "10.2.0.0"}),
    ({"from": ["192.0.2.1", "10.1.0.0/16"]}, {"src": "192.0.2.1"}, {"src": "192.0.2.2"}),
    ({"to": "10.9.9.9"}, {}, {"dst": "10.9.9.8"}),
    ({"from": "@a", "sets": {"a": ["10.0.0.0/8"]}}, {}, {"src": "11.0.0.0"}),
    ({"from": ["192.0.2.0/24", "@a"], "sets": {"a": ["10.0.0.0/8"]}}, {"src": "192.0.2.9"}, {"src": "11.0.0.0"}),
    ({"from": "0.0.0.0/0"}, {}, {"src": "::1", "dst": "::2"}),
    ({"from": "::/0"}, {"src": "::1", "dst": "::2"}, {}),
    ({"proto": "udp"}, {"proto": 17}, {}),
    ({"proto": ["udp", "tcp"]}, {}, {"proto": "sctp"}),
    ({"proto": "tcp", "ports": [22, "440-443"]}, {}, {"dport": 444}),
    ({"proto": "tcp", "source_ports": "1024-65535"}, {}, {"sport": 1023}),
    ({"proto": "icmp", "icmp": "echo-request"}, {"proto": "icmp", "icmp_type": 8}, {"proto": "icmp", "icmp_type": 0}),
    ({"proto": "icmp", "icmp": "3/4"}, {"proto": "icmp", "icmp_type": 3, "icmp_code": 4}, {"proto": "icmp", "icmp_type": 3}),
    ({"proto": "icmp", "icmp": 8}, {"proto": "icmp", "icmp_type": 8, "icmp_code": 3}, {}),
    ({"state": ["established", "related"]}, {"state": "related"}, {}),
    ({"iface": ["eth0", "eth1"]}, {"iface": "eth1"}, {"iface": "eth2"}),
    ({"limit": {"rate": "1/h"}}, {}, {"direction": "egress"}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "hit", "miss"), MEANINGS, ids=[str(m[0]) for m in MEANINGS])
def test_a_field_matches_what_it_says_and_nothing_beside_it(
    fields: dict[str, Any], hit: dict[str, Any], miss: dict[str, Any]
) -> None:
    found = one_rule(**fields)
    assert oracle.judge(found, packet(**hit)) == (Action.ACCEPT, "it")
    assert oracle.judge(found, packet(**miss)) == (Action.DROP, None)


def test_an_empty_set_matches_nothing_rather_than_everything() -> None:
    assert oracle.judge(one_rule({"a": []}, **{"from": "@a"}), packet()) == (Action.DROP, None)


def test_the_first_of_two_matching_rules_decides() -> None:
    found = one_rule()
    both = msgspec.structs.replace(
        found,
        rules=(found.rules[0], msgspec.structs.replace(found.rules[0], name="later", action=Action.DROP)),
    )
    assert oracle.judge(both, packet()) == (Action.ACCEPT, "it")


def test_return_traffic_of_an_accepted_flow_passes_although_the_default_drops() -> None:
    nothing = one_rule(iface="none0")
    assert oracle.judge(nothing, packet()) == (Action.DROP, None)
    assert oracle.judge(nothing, packet(), flow_known=True) == (Action.ACCEPT, None)


def test_failing_names_the_tests_that_do_not_hold() -> None:
    text = """
version: 1
default: {ingress: drop, egress: accept}
rules: [{name: web, proto: tcp, ports: 443, action: accept}]
tests:
  - {packet: {src: 10.0.0.1, dst: 10.0.0.2, proto: tcp, dport: 443}, expect: accept}
  - {packet: {src: 10.0.0.1, dst: 10.0.0.2, proto: tcp, dport: 443}, expect: drop}
"""
    found = policy.parse(text.encode())
    ((test, judgement),) = oracle.failing(found)
    assert (test.line, judgement.rule) == (7, "web")


@given(plain_policies(), packets())
@settings(max_examples=200, deadline=None)
def test_the_rule_that_decides_matches_and_no_earlier_one_does(plain: dict[str, Any], probe: Packet) -> None:
    found = policy.parse(policy.to_json(plain))
    verdict, name = oracle.judge(found, probe)
    before = [rule for rule in found.rules if oracle.matches(rule, probe, found)]
    if name is None:
        assert not before
        assert verdict == found.default[probe.direction]
    else:
        assert (before[0].name, before[0].action) == (name, verdict)


@given(plain_policies(), packets())
@settings(max_examples=100, deadline=None)
def test_turning_every_action_turns_every_verdict(plain: dict[str, Any], probe: Packet) -> None:
    found = policy.parse(policy.to_json(plain))
    turned = FirewallPolicy(
        default={side: other(action) for side, action in found.default.items()},
        sets=found.sets,
        rules=tuple(msgspec.structs.replace(rule, action=other(rule.action)) for rule in found.rules),
    )
    assert oracle.judge(turned, probe) == (
        other(oracle.judge(found, probe).verdict),
        oracle.judge(found, probe).rule,
    )


@given(plain_policies(), packets(), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_a_rule_that_does_not_match_may_be_taken_away(
    plain: dict[str, Any], probe: Packet, index: int
) -> None:
    found = policy.parse(policy.to_json(plain))
    rest = tuple(r for i, r in enumerate(found.rules) if i != index or oracle.matches(r, probe, found))
    assert oracle.judge(msgspec.structs.replace(found, rules=rest), probe) == oracle.judge(found, probe)


@given(plain_policies(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_packets_made_on_the_corners_of_rules_do_meet_them(plain: dict[str, Any], seed: int) -> None:
    found = policy.parse(policy.to_json(plain))
    choose = random.Random(seed).choice
    for rule in found.rules:
        if on_corners(rule, found, choose) is None:
            continue  # its two sides have no family in common

        def meets(rule: Rule = rule) -> bool:
            probe = on_corners(rule, found, choose)
            return probe is not None and oracle.matches(rule, probe, found)

        if meets_nothing(rule, found):
            assert not any(meets() for _ in range(60))
        else:
            # Each field lies inside the rule's or just beside it, so a rule with many fields is met seldom, but it is met.
            assert any(meets() for _ in range(20_000)), f"no packet of 20000 met {rule}"
