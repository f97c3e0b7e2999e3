"""The policy language: what is read, what is refused, and how a mistake is told."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_firewall import plain_policies

from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy
from loopback.modules.firewall.model import Action, Direction, Limit, PortRange, Prefix, PrefixTable
from loopback.modules.firewall.policy_text import MAX_PROBLEMS, PolicyRefused

FIRST_FORM = b"""\
version: 1
default: {ingress: drop, egress: accept}
sets:
  office: [203.0.113.0/24, "2001:db8::/32"]
  web: {labels: {role: web}, within: [10.0.0.0/8], max: 500, prefixes: [10.3.0.0/16]}
rules:
  - {name: ssh, direction: ingress, from: "@office", proto: tcp, ports: 22, action: accept,
     limit: {rate: 10/s, burst: 20, per: source}, log: {sample: 100}}
  - {name: dns, direction: ingress, from: [10.0.0.0/8, "@web"], to: [10.1.0.0/16], proto: udp,
     source_ports: "1024-65535", ports: [53, "8000-8100"], action: accept}
tests:
  - {packet: {src: 198.51.100.7, dst: 10.1.0.5, proto: tcp, dport: 22}, expect: drop}
"""


def minimal(**more: Any) -> dict[str, Any]:
    return {"version": 1, "default": {"ingress": "drop", "egress": "accept"}, **more}


def rule(**more: Any) -> dict[str, Any]:
    return {"name": "a", "action": "accept", **more}


def parse(plain: Any) -> Any:
    return policy.parse(json.dumps(plain).encode())


def refusal(plain: Any) -> PolicyRefused:
    with pytest.raises(PolicyRefused) as caught:
        parse(plain)
    return caught.value


def test_the_first_form_of_the_language_reads_whole() -> None:
    found = policy.parse(FIRST_FORM)
    assert found.default == {Direction.INGRESS: Action.DROP, Direction.EGRESS: Action.ACCEPT}
    assert tuple(found.sets["web"]) == (Prefix(4, 0x0A030000, 16),)
    ssh, dns = found.rules
    assert (ssh.name, ssh.line, ssh.source_sets, ssh.protocols, ssh.ports) == (
        "ssh", 7, ("office",), (6,), (PortRange(22, 22),),
    )  # fmt: skip
    assert (ssh.limit, ssh.log_sample) == (Limit(10.0, 20, "source"), 100)
    assert (dns.sources, dns.source_sets) == ((Prefix(4, 0x0A000000, 8),), ("web",))
    assert dns.source_ports == (PortRange(1024, 65535),)
    assert dns.ports == (PortRange(53, 53), PortRange(8000, 8100))
    assert (found.tests[0].packet.src, found.tests[0].expect, found.tests[0].line) == (
        "198.51.100.7",
        Action.DROP,
        12,
    )


def test_yaml_and_its_canonical_json_are_one_policy() -> None:
    loaded = policy.loads(FIRST_FORM)
    canonical = policy.to_json(loaded.plain)
    again = policy.loads(canonical)
    assert again.plain == loaded.plain
    assert policy.to_json(again.plain) == canonical
    assert [r.name for r in again.policy.rules] == ["ssh", "dns"]


@given(plain_policies())
@settings(max_examples=150, deadline=None)
def test_whatever_the_form_the_policy_is_the_same(plain: dict[str, Any]) -> None:
    def without_lines(data: bytes) -> Any:
        found = policy.parse(data)
        return (
            found.default,
            found.sets,
            [(r.name, r.action, r.sources, r.ports, r.states, r.icmp) for r in found.rules],
        )

    forms = [
        json.dumps(plain),
        json.dumps(plain, indent="\t"),
        yaml.safe_dump(plain),
        policy.to_json(plain).decode(),
    ]
    first, *others = [without_lines(form.encode()) for form in forms]
    assert all(other == first for other in others)


# one mistake each: what is written, the field that is named, what the message says, what the hint offers
MISTAKES: list[tuple[dict[str, Any], str, str, str]] = [
    (minimal(setz={}), "setz", "unknown field 'setz'", "'sets'"),
    ({"default": {"ingress": "drop", "egress": "drop"}}, "", "needs 'version'", "version"),
    ({**minimal(), "version": 2}, "version", "2 is no version", "version: 1"),
    ({**minimal(), "version": True}, "version", "true is no version", "version: 1"),
    ({"version": 1}, "", "needs 'default'", "default"),
    ({"version": 1, "default": "drop"}, "default", "'drop' is no default", "ingress"),
    ({"version": 1, "default": {"ingress": "drop"}}, "default", "needs 'egress'", "egress"),
    ({"version": 1, "default": {"ingress": "deny", "egress": "drop"}},
     "default.ingress", "'deny' is no action", "accept or drop"),
    (minimal(rules={}), "rules", "a mapping is no list", "- "),
    (minimal(rules=["x"]), "rules[0]", "'x' is no rule", "name"),
    (minimal(rules=[{"action": "drop"}]), "rules[0]", "needs 'name'", "name"),
    (minimal(rules=[{"name": "a"}]), "rules[0]", "needs 'action'", "action"),
    (minimal(rules=[rule(name="a b")]), "rules[0].name", "'a b' is no name", "allow-ssh"),
    (minimal(rules=[rule(name=7)]), "rules[0].name", "7 is no name", "quote it"),
    (minimal(rules=[rule(), rule()]), "rules[1].name", "the name of rules[0] already", "its own"),
    (minimal(rules=[rule(direction="in")]), "rules[0].direction", "'in' is no direction", "ingress"),
    (minimal(rules=[rule(prots=22)]), "rules[0].prots", "unknown field 'prots'", "'ports'"),
    (minimal(rules=[rule(**{"from": []})]), "rules[0].from", "an empty list matches nothing", "leave the field out"),
    (minimal(rules=[rule(**{"from": "10.0.0.1/8"})]), "rules[0].from", "bits set beyond its length", "10.0.0.0/8"),
    (minimal(rules=[rule(to=["10.0.0.0/8", "10.0.0.0/33"])]), "rules[0].to[1]", "0 to 32 bits", "203.0.113.0/24"),
    (minimal(rules=[rule(to="2001:db8::/129")]), "rules[0].to", "0 to 128 bits", "2001:db8"),
    (minimal(rules=[rule(to="10.0.0.0/-1")]), "rules[0].to", "0 to 32 bits", ""),
    (minimal(rules=[rule(to="10.0.0")]), "rules[0].to", "is no address", ""),
    (minimal(rules=[rule(to="010.0.0.1")]), "rules[0].to", "is no address", ""),
    (minimal(rules=[rule(to="fe80::1%eth0")]), "rules[0].to", "is no address", ""),
    (minimal(rules=[rule(to="office")]), "rules[0].to", "is no address", "'@office'"),
    (minimal(rules=[rule(to=7)]), "rules[0].to", "7 is no address", ""),
    (minimal(sets={"office": []}, rules=[rule(to="@ofice")]), "rules[0].to", "no set 'ofice'", "'@office'"),
    (minimal(rules=[rule(to="@x")]), "rules[0].to", "no set 'x'", "none is defined"),
    (minimal(rules=[rule(**{"from": "10.0.0.0/8", "to": "::/0"})]), "rules[0].to",
     "different address families", "one rule per family"),
    (minimal(rules=[rule(to="::/0", proto="icmp")]), "rules[0].proto", "icmp is IPv4's", "icmpv6"),
    (minimal(rules=[rule(proto="tpc")]), "rules[0].proto", "'tpc' is no protocol", "'tcp'"),
    (minimal(rules=[rule(proto=256)]), "rules[0].proto", "256 is no protocol number", "0 to 255"),
    (minimal(rules=[rule(proto=True)]), "rules[0].proto", "true is no protocol number", "0 to 255"),
    (minimal(rules=[rule(ports=22)]), "rules[0].ports", "need a protocol", "proto: tcp"),
    (minimal(rules=[rule(proto=["tcp", "icmp"], ports=22)]), "rules[0].ports", "icmp has no ports", "proto: tcp"),
    (minimal(rules=[rule(proto="gre", source_ports=22)]), "rules[0].source_ports", "gre has no ports", "proto: tcp"),
    (minimal(rules=[rule(proto="tcp", ports="8100-8000")]), "rules[0].ports", "empty range", "'8000-8100'"),
    (minimal(rules=[rule(proto="tcp", ports=[1, 65536])]), "rules[0].ports[1]", "65536 is no port", "65535"),
    (minimal(rules=[rule(proto="tcp", ports="1-65536")]), "rules[0].ports", "0 to 65535", ""),
    (minimal(rules=[rule(proto="tcp", ports=-1)]), "rules[0].ports", "-1 is no port", ""),
    (minimal(rules=[rule(proto="tcp", ports=22.5)]), "rules[0].ports", "22.5 is no port", ""),
    (minimal(rules=[rule(proto="tcp", ports="ssh")]), "rules[0].ports", "'ssh' is no port", ""),
    (minimal(rules=[rule(proto="tcp", ports=None)]), "rules[0].ports", "null is no port", ""),
    (minimal(rules=[rule(icmp=8)]), "rules[0].icmp", "must name one of them", "proto: icmp"),
    (minimal(rules=[rule(proto=["icmp", "icmpv6"], icmp=8)]), "rules[0].icmp", "must name one of them", "one rule for each"),
    (minimal(rules=[rule(proto="icmp", icmp="ecko-request")]), "rules[0].icmp", "no type of icmp", "'echo-request'"),
    (minimal(rules=[rule(proto="icmp", icmp=["3/4", "3/255"])]), "rules[0].icmp[1]", "255 is no ICMP code", ""),
    (minimal(rules=[rule(state="open")]), "rules[0].state", "'open' is no state", "new, established, related or invalid"),
    (minimal(rules=[rule(iface="eth*")]), "rules[0].iface", "patterns are not available", "eth0"),
    (minimal(rules=[rule(iface="a" * 16)]), "rules[0].iface", "no interface name", "eth0"),
    (minimal(rules=[rule(log=True)]), "rules[0].log", "true is no log", "sample"),
    (minimal(rules=[rule(log={"sample": 0})]), "rules[0].log.sample", "0 is no sample", ""),
    (minimal(rules=[rule(limit={"rate": "10"})]), "rules[0].limit.rate", "'10' is no rate", "10/s"),
    (minimal(rules=[rule(limit={"rate": 0})]), "rules[0].limit.rate", "from one packet a day", "10/s"),
    (minimal(rules=[rule(limit={"rate": "1/s", "per": "host"})]), "rules[0].limit.per", "'host' is no kind", "rule or source"),
    (minimal(rules=[rule(limit={"burst": 3})]), "rules[0].limit", "needs 'rate'", "rate"),
    (minimal(rules=[{**rule(limit={"rate": 1}), "action": "drop"}]), "rules[0].limit", "later rules", "accepts"),
    (minimal(sets=[]), "sets", "no mapping of names", "office"),
    (minimal(sets={"a b": []}), "sets['a b']", "'a b' is no name", ""),
    (minimal(sets={"a": ["@b"], "b": []}), "sets.a[0]", "is no address", ""),
    (minimal(sets={"a": "@b"}), "sets.a", "do not nest", ""),
    (minimal(sets={"a": {"within": ["10.0.0.0/8"], "max": 5}}), "sets.a", "'labels' or 'pool'", "pool: shop"),
    (minimal(sets={"a": {"labels": {"x": "y"}, "pool": "p", "within": ["10.0.0.0/8"], "max": 5}}),
     "sets.a", "not both", "pool: shop"),
    (minimal(sets={"a": {"pool": "", "within": ["10.0.0.0/8"], "max": 5}}), "sets.a.pool", "is no name", "allow-ssh"),
    (minimal(sets={"a": {"labels": {"x": "y"}, "max": 5}}), "sets.a", "needs 'within'", "within"),
    (minimal(sets={"a": {"labels": {"x": "y"}, "within": ["10.0.0.0/8"], "max": 1, "prefixes": ["10.0.0.1", "10.0.0.2"]}}),
     "sets.a.prefixes", "more than the set's own max of 1", ""),
    (minimal(sets={"a": {"labels": {"x": "y"}, "within": ["10.0.0.0/8"], "max": 1, "prefixes": ["11.0.0.1"]}}),
     "sets.a.prefixes[0]", "outside the set's own 'within'", ""),
    (minimal(tests=[{"packet": {"src": "10.0.0.1", "dst": "::1", "proto": "tcp"}, "expect": "drop"}]),
     "tests[0].packet.dst", "different address families", ""),
    (minimal(tests=[{"packet": {"src": "10.0.0.0/8", "dst": "10.0.0.1", "proto": "tcp"}, "expect": "drop"}]),
     "tests[0].packet.src", "is no address", ""),
    (minimal(tests=[{"packet": {"src": "10.0.0.1", "dst": "10.0.0.1", "proto": "tcp"}, "expect": "deny"}]),
     "tests[0].expect", "'deny' is no action", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plain", "field", "message", "hint"), MISTAKES, ids=[f"{m[1]}:{m[2]}" for m in MISTAKES]
)
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_mistake_names_its_field_place_value_and_way_out(
    plain: dict[str, Any], field: str, message: str, hint: str, form: str
) -> None:
    text = json.dumps(plain, indent=2) if form == "json" else yaml.safe_dump(plain, sort_keys=False)
    with pytest.raises(PolicyRefused) as caught:
        policy.parse(text.encode(), f"policy.{form}")
    assert caught.value.code is Code.POLICY_INVALID
    (problem,) = caught.value.problems
    assert problem.field == field
    assert message in problem.message
    assert hint in problem.hint
    assert problem.source == f"policy.{form}"
    excerpt = text.split("\n")[problem.line - 1]
    assert problem.excerpt == excerpt
    assert len(excerpt) >= problem.column


def test_every_mistake_is_told_at_once_in_the_order_of_the_text() -> None:
    error = refusal(minimal(setz=1, sets={"a": "x"}, rules=[rule(ports=1), rule(name="b", proto="tpc")]))
    assert [p.field for p in error.problems] == ["setz", "sets.a", "rules[0].ports", "rules[1].proto"]
    assert error.reason.count("\n") == 3
    assert isinstance(error, Refused)


def test_a_file_full_of_mistakes_is_told_in_part() -> None:
    error = refusal(minimal(rules=[rule(name=f"r{i}", ports=i) for i in range(500)]))
    assert len(error.problems) == MAX_PROBLEMS


def test_line_and_column_point_at_the_value_in_yaml() -> None:
    text = FIRST_FORM.replace(b'"8000-8100"', b'"8100-8000"')
    with pytest.raises(PolicyRefused) as caught:
        policy.parse(text, "policy.yaml")
    (problem,) = caught.value.problems
    line = text.decode().split("\n")[problem.line - 1]
    assert line[problem.column - 1 :].startswith('"8100-8000"')
    assert str(problem).startswith("policy.yaml:10:46: rules[1].ports[1]: '8100-8000' is an empty range")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "nothing in it"),
        (b"\xff", "not UTF-8"),
        (b'{"version": 1, "version": 1}', "there twice"),
        (b"version: 1\nversion: 1", "there twice"),
        (b'{"version": NaN}', "NaN"),
        (b'{"version": ' + b"9" * 5000 + b"}", "more digits"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 20 + b"1" + b"}" * 20, "nested"),
        (b"- " * 20 + b"1", "nested"),
        (b"a: [", "not YAML"),
        (b"a:\n\t- b", "not YAML"),
        (b"a: *b", "names nothing"),
        (b"a: &a [*a]", "names nothing"),
        (b"a: !!python/object/apply:os.system [id]", "tag"),
        (b"a: !!int 1", "tag"),
        (b"--- 1\n--- 2", "second document"),
        (b"? [a]\n: 1", "a key is a word"),
        (b"\x00", "not YAML"),
        (b"{" + b" " * (32 * 1024 * 1024), "more than the"),
    ],
)  # fmt: skip
def test_what_is_no_policy_text_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(PolicyRefused) as caught:
        policy.parse(text)
    assert caught.value.code is Code.POLICY_MALFORMED
    assert says in caught.value.reason


@pytest.mark.parametrize("text", [b"\tversion: 1", b"rules:\n\t- name: a"])
def test_a_tab_in_yaml_is_told_as_one(text: bytes) -> None:
    with pytest.raises(PolicyRefused) as caught:
        policy.parse(text, "web.yaml")
    assert caught.value.problems[0].hint == "indent with spaces"


def test_aliases_that_grow_without_bound_are_refused_early() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(PolicyRefused, match="aliases"):
        policy.parse("\n".join(lines).encode())


def test_an_alias_may_repeat_a_value() -> None:
    text = b"version: 1\ndefault: {ingress: drop, egress: drop}\nsets: {a: &a [10.0.0.0/8], b: *a}\n"
    ten = PrefixTable.of([Prefix(4, 0x0A000000, 8)])
    assert policy.parse(text).sets == {"a": ten, "b": ten}


def test_yaml_words_are_not_numbers_in_disguise() -> None:
    base = b"version: 1\ndefault: {ingress: drop, egress: drop}\nrules:\n- {name: %b, proto: tcp, ports: %b, action: drop}"
    assert policy.parse(base % (b"yes", b"22")).rules[0].name == "yes"
    with pytest.raises(PolicyRefused, match="'22:30' is no port"):
        policy.parse(base % (b"a", b"22:30"))


def test_json_needs_no_yaml_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from loopback.modules import firewall

    monkeypatch.setitem(sys.modules, "yaml", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "loopback.modules.firewall.policy_yaml", raising=False)
    monkeypatch.delattr(firewall, "policy_yaml", raising=False)
    assert parse(minimal(rules=[rule()])).rules[0].name == "a"
    assert "rules[0].prots" in refusal(minimal(rules=[rule(prots=1)])).reason
    with pytest.raises(PolicyRefused, match="no YAML reader"):
        policy.parse(b"version: 1")


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")))
@settings(max_examples=400, deadline=None)
def test_noise_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    with pytest.raises(PolicyRefused):
        policy.parse(noise)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70_000) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
        ["tcp", "10.0.0.0/8", "@a", "a", "drop", "8-9", "::", "10/s", "new", "", "\ud800".encode("utf-8", "replace").decode()]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["name", "action", "from", "to", "proto", "ports", "icmp", "sample", "rate", "packet", "labels"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["default", "sets", "rules", "tests"]), JSON_VALUES))
@settings(max_examples=400, deadline=None)
def test_values_of_any_shape_are_read_or_refused(values: dict[str, Any]) -> None:
    try:
        parse(minimal(**values))
    except PolicyRefused as error:
        assert error.code is Code.POLICY_INVALID
        assert all(p.line == 1 and p.column for p in error.problems)


@given(plain_policies(most=4), st.data())
@settings(max_examples=100, deadline=None)
def test_places_agree_between_the_forms_of_one_text(plain: dict[str, Any], data: st.DataObject) -> None:
    """JSON is YAML: both readers must see each value of a JSON text at the same place."""
    from loopback.modules.firewall import policy_text, policy_yaml

    text = json.dumps(plain, indent=2)
    by_json = dict(policy_text.json_marks(text))
    by_yaml = dict(policy_yaml.marks(text))
    assert by_json == by_yaml
    assert len(by_json) > 5


def test_a_packet_reads_from_json_with_nulls_and_names() -> None:
    packet = policy.read_packet(
        b'{"direction": null, "src": "10.0.0.1", "dst": "10.0.0.2", "proto": 6, "dport": 22, "tcp_flags": "SA", "state": null}'
    )
    assert (packet.direction, packet.protocol, packet.dport, packet.tcp_flags, packet.state) == (
        0,
        6,
        22,
        0x12,
        "new",
    )
    ping = policy.read_packet(
        b'{"src": "::1", "dst": "::2", "proto": "icmpv6", "icmp_type": "echo-request", "sport": 0}'
    )
    assert (ping.icmp_type, ping.icmp_code) == (128, 0)
    with pytest.raises(PolicyRefused, match="unknown field 'port'"):
        policy.read_packet(b'{"src": "10.0.0.1", "dst": "10.0.0.2", "proto": 6, "port": 22}')


def test_a_key_that_is_there_twice_behind_something_too_deep_is_refused() -> None:
    """Found by the fuzzer, once in a million inputs."""
    text = '{"version": 1, "default": ' + "[" * 40 + "]" * 40 + ', "rules": [], "rules": []}'
    with pytest.raises(Refused) as caught:
        policy.parse(text.encode(), "p.json")
    assert caught.value.code is Code.POLICY_MALFORMED
    assert "deep" in caught.value.reason
