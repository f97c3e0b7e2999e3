"""The quick reader of policies: what it takes is what the slow one takes, and it is used where a policy is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_firewall import plain_policies

from loopback.modules.firewall import policy, policy_fast
from loopback.modules.firewall.model import FirewallPolicy
from loopback.modules.firewall.policy_text import PolicyRefused, Source

BASE = {"version": 1, "default": {"ingress": "drop", "egress": "accept"}}


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    policy_fast.forget()
    yield
    policy_fast.forget()


def slow(data: bytes) -> FirewallPolicy | list[str]:
    try:
        return policy._read(Source(data, "p"))
    except PolicyRefused as error:
        return [str(problem) for problem in error.problems]


def whole(data: bytes) -> FirewallPolicy | list[str]:
    try:
        return policy.parse(data, "p")
    except PolicyRefused as error:
        return [str(problem) for problem in error.problems]


def rule(**more: Any) -> dict[str, Any]:
    return {"name": "a", "action": "drop", **more}


@pytest.fixture(params=[1, policy_fast.MANY], ids=["by columns", "one by one"])
def _many(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(policy_fast, "MANY", request.param)
        yield


@pytest.mark.usefixtures("_many")
@given(plain_policies(), st.sampled_from([None, 0, 2]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_right_policy_is_read_the_quick_way_and_as_the_slow_way_reads_it(
    plain: dict[str, Any], indent: int | None, canonical: bool
) -> None:
    data = json.dumps(plain, indent=indent, sort_keys=canonical).encode()
    policy_fast.forget()
    expected = slow(data)
    assert isinstance(expected, FirewallPolicy)
    assert policy_fast.read(data) == expected
    assert policy_fast.read(data) == expected  # and from memory


BROKEN: list[tuple[str, Any]] = [
    ("ports", "9-1"), ("ports", []), ("ports", True), ("ports", 1.0), ("proto", "tpc"), ("from", "10.0.0.1/8"),
    ("from", "@gone"), ("to", ["10.0.0.0/8", "::/0", "1.2.3.4/33"]), ("portz", 1), ("name", "a b"), ("name", "rule-0"),
    ("icmp", 8), ("action", None), ("state", "newish"), ("iface", "eth*"), ("limit", {"rate": 0}), ("log", {"sample": 0}),
    ("direction", "in"), ("source_ports", "1-70000"), ("to", "2001:db8::/32"), ("limit", {"rate": "1/s", "rat": 1}),
]  # fmt: skip


@pytest.mark.usefixtures("_many")
@given(plain_policies(), st.sampled_from(BROKEN), st.integers(0, 11), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_change_that_may_break_it_is_answered_as_the_slow_way_answers(
    plain: dict[str, Any], change: tuple[str, Any], index: int, warm: bool
) -> None:
    if warm:
        policy.parse(json.dumps(plain).encode())
    if plain["rules"]:
        plain["rules"][index % len(plain["rules"])][change[0]] = change[1]
    data = policy.to_json(plain)
    assert whole(data) == slow(data)


@given(plain_policies(most=6), st.sampled_from(["office", "web", "mixed", "empty"]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_rule_from_memory_is_held_to_the_sets_of_now(plain: dict[str, Any], name: str, gone: bool) -> None:
    policy.parse(json.dumps(plain).encode())
    if gone:
        plain["sets"].pop(name, None)
    else:
        plain["sets"][name] = ["2001:db8::/32"]
    data = json.dumps(plain).encode()
    assert whole(data) == slow(data)
    assert whole(data) == slow(data)


@pytest.mark.usefixtures("_many")
@given(plain_policies(most=4), st.data(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_text_with_a_byte_changed_is_read_alike(
    plain: dict[str, Any], data: st.DataObject, canonical: bool
) -> None:
    good = policy.to_json(plain) if canonical else json.dumps(plain).encode()
    at = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.sampled_from(b'",:{}[]\\ 019.-/@eE\x00\x80\n'))
    mutated = good[:at] + bytes([byte]) + good[at + data.draw(st.integers(0, 1)) :]
    quick = policy_fast.read(mutated)
    assert quick is None or quick == slow(mutated)


REPEATED = [
    b'{"version":1,"version":1,"default":{"ingress":"drop","egress":"drop"}}',
    b'{"version":1,"default":{"ingress":"drop","egress":"drop","egress":"accept"}}',
    b'{"version":1,"default":{"ingress":"drop","egress":"drop"},"rules":[],"rules":[]}',
    b'{"version":1,"default":{"ingress":"drop","egress":"drop"},"rules":[],"r\\u0075les":[]}',
    b'{"version":1,"default":{"ingress":"drop","egress":"drop"},"sets":{"a":[],"a":["10.0.0.0/8"]}}',
    b'{"version":1,"default":{"ingress":"drop","egress":"drop"},"rules":[{"name":"a","action":"drop","action":"accept"}]}',
    b'{"version":1,"default":{"ingress":"drop","egress":"drop"},"rules":[{"name":"a","action":"accept","limit":{"rate":1,"rate":2}}]}',
    b'{"version":1,"default":{"ingress":"drop","egress":"drop"},"rules":[{"name":"a","action":"drop","\\u0061ction":"accept"}]}',
]


@pytest.mark.usefixtures("_many")
@pytest.mark.parametrize("data", REPEATED)
def test_a_repeated_key_is_refused_wherever_it_stands(data: bytes) -> None:
    assert policy_fast.read(data) is None
    problems = whole(data)
    assert isinstance(problems, list)
    assert "is there twice" in problems[0]


def test_only_what_is_new_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {**BASE, "rules": [rule(name=f"r{n}", proto="tcp", ports=n) for n in range(100)]}
    first = policy.parse(policy.to_json(plain))
    read: list[str] = []
    really = policy_fast.policy_rules.rule
    monkeypatch.setattr(
        policy_fast.policy_rules, "rule", lambda *given: read.append(given[0]["name"]) or really(*given)
    )
    plain["rules"][40]["ports"] = 4040
    second = policy.parse(policy.to_json(plain))
    assert read == ["r40"]
    assert [a is b for a, b in zip(first.rules, second.rules, strict=True)].count(False) == 1
    plain["rules"][40]["ports"] = 40  # and back: the policy before is remembered as well
    assert policy.parse(policy.to_json(plain)) == first
    assert read == ["r40"]


def test_rules_of_many_lines_know_theirs_from_memory_too() -> None:
    plain = {**BASE, "rules": [rule(name="a"), rule(name="b"), rule(name="c")], "tests": []}
    text = json.dumps(plain, indent=1).encode()
    found = policy_fast.read(text)
    assert found == slow(text)
    later = policy_fast.read(b"\n\n" + text)
    assert found is not None and later is not None
    assert [r.line for r in later.rules] == [r.line + 2 for r in found.rules]


def test_plain_values_and_text_come_along() -> None:
    data = policy.to_json({**BASE, "rules": [rule()]})
    loaded = policy.loads(data)
    assert loaded == (slow(data), msgspec.json.decode(data), data.decode())


def test_many_rules_in_canonical_json_are_read_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [
        rule(name=f"r{n}", ports=[n % 7 + 1], proto=["tcp"], **{"from": [f"10.0.{n}.0/24"]})
        for n in range(100)
    ]
    rules[5]["log"] = {"sample": 10}
    rules[6]["to"] = "@office"
    data = policy.to_json({**BASE, "sets": {"office": ["192.0.2.0/24"]}, "rules": rules})
    expected = slow(data)
    one = []
    monkeypatch.setattr(
        policy_fast, "_fields", lambda plain, read=policy_fast._fields: one.append(plain) or read(plain)
    )
    assert policy_fast.read(data) == expected
    assert len(one) < 10, "one of each shape, and the one that logs"


@pytest.mark.parametrize("name", ["a\nb", "a\n", "\n", "", "ä", "a" * 65])
def test_what_is_no_name_is_none_among_many(name: str) -> None:
    rules = [rule(name=f"r{n}") for n in range(policy_fast.MANY)]
    rules[3]["name"] = name
    data = policy.to_json({**BASE, "rules": rules})
    assert policy_fast.read(data) is None
    assert isinstance(slow(data), list)
