"""Rules of iptables and nftables as a policy: the same verdicts, or a refusal that names what cannot be said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback.cli.firewall_import import translate
from loopback.cli.main import main
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import oracle, policy, policy_tables


def verdict(plain: dict[str, Any], **packet: Any) -> str:
    found = policy.parse(policy.to_json(plain))
    asked = policy_tables.packet({"src": "192.0.2.1", "dst": "192.0.2.2", "proto": "tcp", **packet})
    return oracle.judge(found, asked).verdict.name.lower()


def saved(*rules: str, chains: str = "", policy: str = "DROP") -> bytes:
    return f"*filter\n:INPUT {policy} [0:0]\n:OUTPUT ACCEPT [0:0]\n{chains}{chr(10).join(rules)}\nCOMMIT\n".encode()


NETWORKS = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32"]
ADDRESSES = ["10.0.0.1", "10.1.0.1", "10.1.2.3", "9.9.9.9"]


@st.composite
def tangles(draw: st.DrawFn) -> dict[str, list[tuple[str | None, bool, int | None, str]]]:
    """Chains that jump, go and return: INPUT to a, a to b. A rule is (source, negated, port, target)."""
    found = {}
    for chain, targets in (("INPUT", ["a", "b"]), ("a", ["b"]), ("b", [])):
        verbs = [
            "ACCEPT",
            "DROP",
            "RETURN",
            *(f"{verb} {target}" for target in targets for verb in ("-j", "-g")),
        ]
        found[chain] = draw(
            st.lists(
                st.tuples(
                    st.sampled_from([None, *NETWORKS]),
                    st.booleans(),
                    st.sampled_from([None, 22, 80]),
                    st.sampled_from(verbs),
                ),
                max_size=4,
            )
        )
    return found


def walk(tangle: Any, address: str, port: int) -> str:
    """What netfilter does, by its manual: a stack of where to go on."""
    import ipaddress

    stack = [("INPUT", 0)]
    while stack:
        chain, at = stack.pop()
        if at >= len(tangle[chain]):
            continue
        source, negated, wanted, verb = tangle[chain][at]
        inside = source is None or (ipaddress.ip_address(address) in ipaddress.ip_network(source)) != negated
        if not inside or wanted not in (None, port):
            stack.append((chain, at + 1))
        elif verb in ("ACCEPT", "DROP"):
            return verb.lower()
        elif verb.startswith("-"):
            if verb.startswith("-j"):
                stack.append((chain, at + 1))
            stack.append((verb[3:], 0))
    return "drop"


@given(tangles())
@settings(max_examples=200, deadline=None)
def test_chains_that_jump_and_return_keep_their_verdicts(tangle: Any) -> None:
    lines = []
    for chain, rules in tangle.items():
        for source, negated, port, verb in rules:
            line = f"-A {chain}"
            line += f" {'! ' if negated else ''}-s {source}" if source else ""
            line += f" -p tcp -m tcp --dport {port}" if port else ""
            lines.append(f"{line} {verb if verb.startswith('-') else f'-j {verb}'}")
    plain, refused, _ = translate(saved(*lines, chains=":a - [0:0]\n:b - [0:0]\n"))
    assert refused == []
    for address in ADDRESSES:
        for port in (22, 80, 443):
            assert verdict(plain, src=address, dport=port) == walk(tangle, address, port), (
                lines,
                address,
                port,
            )


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # a rule that accepts, a packet it means, one it does not
    ("-m conntrack --ctstate RELATED,ESTABLISHED", {"state": "established"}, {"state": "new"}),
    ("-m state ! --state INVALID", {"state": "new"}, {"state": "invalid"}),
    ("-p tcp -m multiport --dports 80,8000:8100", {"dport": 8050}, {"dport": 81}),
    ("-p udp -m udp ! --sport 53", {"proto": "udp", "sport": 54}, {"proto": "udp", "sport": 53}),
    ("! -s 10.0.0.0/8", {}, {"src": "10.9.9.9"}),
    ("-d 192.0.2.2/32 -i eth0", {"iface": "eth0"}, {"iface": "eth1"}),
    ("-p icmp -m icmp --icmp-type 3/4", {"proto": "icmp", "icmp_type": 3, "icmp_code": 4}, {"proto": "icmp", "icmp_type": 3}),
    ("-p icmp -m icmp --icmp-type 8 -m limit --limit 5/sec --limit-burst 9", {"proto": "icmp", "icmp_type": 8},
     {"proto": "icmp"}),
    ("! -p tcp", {"proto": "udp"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "meant", "other"), CASES)
def test_a_rule_of_iptables_means_the_same_here(
    words: str, meant: dict[str, Any], other: dict[str, Any]
) -> None:
    plain, refused, _ = translate(saved(f"-A INPUT {words} -j ACCEPT"))
    assert refused == []
    assert (verdict(plain, **meant), verdict(plain, **other)) == ("accept", "drop")


CANNOT = ["-A INPUT -m mark --mark 0x1 -j ACCEPT", "-A INPUT -m set --match-set bad src -j DROP", "-A INPUT -i eth+ -j ACCEPT",
          "-A INPUT -p tcp --syn -j ACCEPT", "-A INPUT -j MARK --set-mark 1", "-A INPUT -m limit --limit 1/s -j DROP",
          "-A INPUT -s 2001:db8::/32 -d 10.0.0.1 -j DROP", "-A INPUT -j nowhere", "-A INPUT -m limit --limit-burst x -j DROP",
          '-A INPUT -m comment --comment "a', "-A INPUT -j LOG", "-A INPUT -m conntrack --ctstate DNAT -j ACCEPT"]  # fmt: skip


@pytest.mark.parametrize("line", CANNOT)
def test_what_cannot_be_said_is_named_with_its_line(line: str) -> None:
    _, refused, _ = translate(saved(line))
    assert len(refused) == 1
    assert refused[0][0] in (4, 0)
    assert refused[0][2]


def test_an_address_translation_is_refused_with_its_line() -> None:
    text = b"*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j DNAT --to 10.0.0.1\nCOMMIT\n" + saved()
    _, refused, _ = translate(text)
    assert [(line, "nat" in why) for line, _, why in refused] == [(3, True)]


def test_forwarding_is_refused_where_there_are_rules_for_it() -> None:
    _, refused, _ = translate(saved("-A FORWARD -j ACCEPT", chains=":FORWARD DROP [0:0]\n"))
    assert "forwarded" in refused[0][1]


def test_a_log_before_the_same_verdict_becomes_a_log_of_it_and_comments_become_names() -> None:
    plain, refused, remarks = translate(
        saved(
            "-A INPUT -s 10.0.0.0/8 -j LOG --log-prefix x",
            "-A INPUT -s 10.0.0.0/8 -j REJECT --reject-with icmp-port-unreachable",
            '-A INPUT -p tcp -m comment --comment "the web" -j ACCEPT',
            '-A INPUT -p udp -m comment --comment "the web" -j ACCEPT',
        )
    )
    assert refused == []
    assert plain["rules"][0]["log"] == {"sample": 1}
    assert [rule["name"] for rule in plain["rules"]] == ["line-5", "the-web", "the-web-2"]
    assert any("REJECT became drop" in remark for remark in remarks)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["firewall", "import", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_a_person_is_told_what_is_missing_and_may_go_on_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rules"
    path.write_bytes(
        saved("-A INPUT -m mark --mark 0x1 -j ACCEPT", "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT")
    )
    code, out, err = run(capsys, path)
    assert (code, out) == (2, "")
    assert f"{path}:4: -A INPUT -m mark --mark 0x1 -j ACCEPT: cannot be said: the match 'mark'" in err
    code, out, _ = run(capsys, path, "--partial")
    assert code == 0
    assert "# LEFT OUT: " in out
    assert [rule["name"] for rule in yaml.safe_load(out)["rules"]] == ["line-5"]
    assert policy.parse(out.encode()).rules[0].name == "line-5"
    code, out, _ = run(capsys, path, "--partial", "--json")
    assert policy.parse(out.encode()).rules[0].name == "line-5"
    path.write_text("hello")
    code, out, err = run(capsys, path)
    assert code == 2
    assert "neither what 'nft -j list ruleset' prints" in err


WHOLE = "*nat\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -j DROP\nCOMMIT\n"


@pytest.mark.parametrize("cut", [WHOLE.removesuffix("COMMIT\n"), WHOLE.replace("*nat\nCOMMIT", "*nat")])
def test_a_text_of_iptables_that_was_cut_is_refused_as_rules_may_be_missing(cut: str) -> None:
    assert translate(WHOLE.encode())[0]["rules"]
    with pytest.raises(Refused, match="does not end with COMMIT") as caught:
        translate(cut.encode())
    assert caught.value.next_step


@pytest.mark.parametrize("data", [b"{", b'{"nftables": 1}', b'{"nftables": [{"chain": 5}]}', b"[" * 100_000])
def test_what_is_no_ruleset_is_refused(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        translate(data)
    assert caught.value.code == Code.POLICY_MALFORMED


def test_a_form_of_nftables_that_nobody_knows_is_listed() -> None:
    chain = {
        "family": "inet",
        "table": "f",
        "name": "input",
        "type": "filter",
        "hook": "input",
        "prio": 0,
        "policy": "drop",
    }
    rules = [{"rule": {"family": "inet", "table": "f", "chain": "input", "handle": 1, "expr": expr}}
             for expr in ([{"match": 1}], [{"x": 1, "y": 2}], [{"vmap": {}}], [{"xt": {}}], 7)]  # fmt: skip
    _, refused, _ = translate(json.dumps({"nftables": [{"chain": chain}, *rules]}).encode())
    assert [line for line, _, _ in refused] == [2, 3, 4, 5, 6]
