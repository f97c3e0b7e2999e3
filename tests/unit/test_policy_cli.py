"""`loopback firewall` as a person meets it: what it prints where, and with which exit code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from loopback.cli.main import main

GOOD = """\
version: 1
default: {ingress: drop, egress: accept}
sets: {office: [203.0.113.0/24]}
rules:
  - {name: ssh, from: "@office", proto: tcp, ports: 22, action: accept}
tests:
  - {packet: {src: 203.0.113.9, dst: 10.1.0.5, proto: tcp, dport: 22}, expect: accept}
  - {packet: {src: 198.51.100.7, dst: 10.1.0.5, proto: tcp, dport: 22}, expect: drop}
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["firewall", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "web.yaml"
    path.write_text(GOOD)
    return path


def test_a_good_policy_is_counted_and_says_who_judged(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", good, "--judge", "oracle")
    assert (code, err) == (0, "")
    assert out == f"{good}: 1 rule, 1 set; tests: 2 of 2 hold, judged by the plain evaluator\n"


def test_a_mistake_is_shown_like_a_compiler_does(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good.write_text(GOOD.replace("ports: 22, action: accept", 'ports: "30-20", action: acept'))
    code, out, err = run(capsys, "check", good)
    assert (code, out) == (2, "")
    where, excerpt, caret, hint = err.splitlines()
    assert where.startswith(f"{good}:5:53: rules[0].ports: '30-20' is an empty range")
    assert excerpt.startswith("  5 |   - {name: ssh")
    assert excerpt[caret.index("^") :].startswith('"30-20"')
    assert hint == "  write '20-30'"


def test_mistakes_as_json_hold_the_same(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good.write_text(GOOD.replace("proto", "porto"))
    code, out, _ = run(capsys, "check", good, "--json")
    assert code == 2
    found = json.loads(out)
    assert (found["ok"], found["code"]) == (False, "policy.invalid")
    problem = found["problems"][0]
    assert (problem["line"], problem["column"], problem["field"]) == (5, 34, "rules[0].porto")
    assert "'proto'" in problem["hint"]


def test_a_test_that_does_not_hold_names_its_line_and_the_rule(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good.write_text(GOOD.replace("dport: 22}, expect: accept", "dport: 22}, expect: drop"))
    code, out, err = run(capsys, "check", good, "--judge", "oracle")
    assert code == 1
    assert err == (
        f"{good}:7: tests[0]: expected drop, but it is accept by rule ssh: ingress tcp 203.0.113.9:0 → 10.1.0.5:22\n"
    )
    assert "tests: 1 of 2 hold" in out
    code, out, _ = run(capsys, "check", good, "--judge", "oracle", "--json")
    assert code == 1
    assert json.loads(out)["failed"][0]["rule"] == "ssh"


def test_a_policy_that_the_program_has_no_room_for_is_refused_on_any_machine(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = ", ".join(str(port) for port in range(1, 2000, 2))
    many = [
        "{name: few, proto: tcp, ports: 22, action: accept}",
        f"{{name: every, proto: [tcp, udp], ports: [{ports}], source_ports: [{ports}], action: accept}}",
    ]
    good.write_text("version: 1\ndefault: {ingress: drop, egress: drop}\nrules:\n  - " + "\n  - ".join(many))
    code, out, err = run(capsys, "check", good, "--json", "--judge", "oracle")
    assert code == 2
    assert json.loads(out)["code"] == "policy.invalid"
    (problem,) = json.loads(out)["problems"]
    assert problem["line"] > 0 and problem["field"].startswith("rules[")
    assert "line 5: rule 'every'" in err and "needs more than" in err


@pytest.mark.parametrize(
    ("name", "says", "step"),
    [("none.yaml", "No such file or directory", "see that its name"), ("", "Is a directory", "name a file")],
)
def test_a_file_that_cannot_be_read_is_told_with_a_code_and_a_next_step_in_words_and_in_json(
    name: str, says: str, step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    code, out, err = run(capsys, "check", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}: {path}  [config.invalid]\n  next: {step}")
    code, out, _ = run(capsys, "check", path, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["code"]) == (2, False, "config.invalid")
    assert says in found["problems"][0]["message"] and step in found["problems"][0]["hint"]


def test_a_judge_that_does_not_open_is_told_to_programs_too(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "check", good, "--json", "--object", good)  # no object, whoever asks
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_a_policy_may_come_by_stdin(
    good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(good.read_bytes())))
    code, out, _ = run(capsys, "check", "-", "--judge", "oracle")
    assert (code, out.split(":")[0]) == (0, "stdin")


def test_a_direction_that_would_not_count_is_refused(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packet = '{"src":"203.0.113.9","dst":"10.1.0.5","proto":"tcp","dport":22}'
    code, out, err = run(capsys, "explain", "--policy", good, "--packet", packet, "--direction", "egress")
    assert (code, out) == (2, "")
    assert 'write "direction": "egress" into the packet' in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"src": "203.0.113.9", "dst": "10.1.0.5", "proto": "tcp", dport: 22}', "not JSON"),
        ("{'src': '203.0.113.9', 'dst': '10.1.0.5', 'proto': 'tcp'}", "not JSON"),
        ("src: 203.0.113.9", "not JSON"),
        ('{"src": "203.0.113.9", "dst"', "not JSON"),
    ],
)
def test_a_line_that_is_no_json_is_named_and_told_how_a_packet_looks(
    line: str, says: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packet = '{"src":"203.0.113.9","dst":"10.1.0.5","proto":"tcp","dport":22}'
    lines = tmp_path / "packets.jsonl"
    lines.write_text(f"{packet}\n\n{line}\n{packet}\n")
    code, out, err = run(
        capsys, "explain", "--policy", good, "--packets", lines, "--json", "--judge", "oracle"
    )
    assert (code, out) == (2, "")
    assert err.startswith(f"{lines}:3:") and says in err and "  [policy.malformed]" in err
    assert "a packet is JSON" in err


def test_explain_prints_one_json_line_for_each_packet_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "packets.jsonl"
    lines.write_text(
        '{"src":"203.0.113.9","dst":"10.1.0.5","proto":"tcp","dport":22}\n'
        "\n"
        '{"direction":"egress","src":"10.1.0.5","dst":"::1","proto":"tcp"}\n'.replace("::1", "9.9.9.9")
        + '{"direction":"ingress","src":"203.0.113.9","dst":"10.1.0.5","proto":17,"sport":1,"dport":22,"icmp_type":null}\n'
    )
    code, out, err = run(
        capsys, "explain", "--policy", good, "--packets", lines, "--json", "--judge", "oracle"
    )
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"verdict": "accept", "rule": "ssh", "generation": 0},
        {"verdict": "accept", "rule": None, "generation": 0},
        {"verdict": "drop", "rule": None, "generation": 0},
    ]
    assert err == "judged by the plain evaluator\n"


def test_explain_says_one_packet_in_words(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packet = '{"src":"203.0.113.9","dst":"10.1.0.5","proto":"tcp","sport":4000,"dport":22,"iface":"eth0"}'
    code, out, _ = run(capsys, "explain", "--policy", good, "--packet", packet, "--judge", "oracle")
    assert code == 0
    assert out == "accept  by rule ssh: ingress tcp 203.0.113.9:4000 → 10.1.0.5:22 on eth0\n"


def test_a_bad_packet_line_is_named_and_nothing_is_judged(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "packets.jsonl"
    lines.write_text(
        '{"src":"203.0.113.9","dst":"10.1.0.5","proto":"tcp"}\n{"src":"203.0.113.9","dst":"10.1.0.5","proto":"tpc"}\n'
    )
    code, out, err = run(capsys, "explain", "--policy", good, "--packets", lines, "--json")
    assert (code, out) == (2, "")
    assert f"{lines}:2:47: proto: 'tpc' is no protocol" in err
    assert "'tcp'" in err


@pytest.mark.parametrize("arguments", [[], ["--packet", "{}", "--packets", "x"]])
def test_explain_wants_packets_from_one_place(
    good: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "explain", "--policy", good, *arguments)
    assert code == 2
    assert "one of --packet, --packets and --pcap" in err


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0
    assert json.loads(out)["properties"]["version"]["const"] == 1


def test_control_characters_of_a_policy_never_reach_the_terminal(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good.write_text(GOOD.replace("name: ssh", 'name: "\\e[2J"'))
    _, _, err = run(capsys, "check", good)
    assert "\x1b" not in err
