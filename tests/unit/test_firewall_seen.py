"""How the firewall looks to people: figures, events, differences; and that several can watch without waiting for each other."""

from __future__ import annotations

import asyncio
import ctypes as ct
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loopback.bpf import layout
from loopback.cli import firewall_compare as comparing
from loopback.cli import firewall_observe as observe
from loopback.cli import firewall_statsview as view
from loopback.cli import firewall_stream
from loopback.cli.firewall_stream import Heard, listen
from loopback.cli.main import main
from loopback.contracts.codes import Refused
from loopback.host import seccomp
from loopback.modules.firewall import observing, oracle, policy, shadow
from loopback.modules.firewall.model import FirewallPolicy, Packet
from loopback.modules.firewall.observing import Observers, Wish
from loopback.modules.firewall.packets import Verdict
from loopback.modules.firewall.reading import Counted, Hooked, RuleCount, Stats, Table

LONG = "a-rule-whose-name-is-as-long-as-its-author-had-patience-for-the-day-of-the-audit"


def stats(**changed: Any) -> Stats:
    values: dict[str, Any] = {
        "root": "/sys/fs/bpf/x/firewall", "epoch": 7, "policy": "ab" * 32, "fallback": 6, "deadline_s": None,
        "past_deadline": 0, "shadow": 0,
        "rules": [
            RuleCount("ssh", 3, 12, 900, 1), RuleCount(LONG, 4, 123_456_789, 5 << 30, 0),
            RuleCount("gone", 5, 1, 60, None), RuleCount("never", 6, 0, 0, None), RuleCount("idle", 9, 0, 0, 2),
        ],
        "reasons": [
            Counted("ingress", "default", "drop", 40), Counted("egress", "default", "accept", 2),
            Counted("ingress", "truncated", "drop", 99),
        ],
        "flows": Table(5, 10, 65536, 11, 0, 1, 2), "events_lost": 4,
        "devices": [Hooked("eth0", 2, "native", True), Hooked("wlan0", 3, "none", False)],
    }  # fmt: skip
    return Stats(**(values | changed))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_figures_fit_the_width_and_names_keep_both_their_ends(width: int) -> None:
    many = [Hooked(f"interface-{number}", number, "generic", True) for number in range(9)]
    lines = view.lines(stats(devices=many), width)
    assert max(map(len, lines)) <= width
    name = next(line for line in lines if line.startswith("a-rule")).split()[0]
    assert name.endswith("audit") and (("…" in name) == (len(LONG) > width - 37))


def test_rules_are_sorted_by_hits_and_former_ones_shown_only_where_they_were_hit() -> None:
    lines = view.lines(stats(), 120)
    names = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert names == [LONG, "ssh", "gone", "idle"]
    assert "(not in force)" in next(line for line in lines if line.startswith("gone"))
    assert "wlan0 OPEN/OPEN" in "\n".join(lines)


def test_a_trial_says_what_it_goes_back_to_and_when() -> None:
    assert "ON TRIAL: back to epoch 6 in 42 s" in view.lines(stats(deadline_s=42.3), 80)[0]
    assert "back to nothing" in view.lines(stats(deadline_s=42.3, fallback=0), 80)[0]
    assert "fell back" in view.lines(stats(deadline_s=0.0), 80)[0]
    assert "NOTHING" in view.lines(stats(epoch=0), 80)[0]


def test_a_live_view_has_rates_and_cuts_what_has_no_room() -> None:
    later = stats(rules=[RuleCount("ssh", 3, 112, 9000, 0), RuleCount(LONG, 4, 1, 1, 1)])
    lines = view.lines(later, 80, rows=1, before=stats(rules=[RuleCount("ssh", 3, 12, 900, 0)]), seconds=2.0)
    assert lines[-2].split() == ["ssh", "112", "8.8", "kiB", "50"]
    assert lines[-1] == "… and 1 more"


def test_the_document_holds_everything_once() -> None:
    found = json.loads(json.dumps(view.document(stats())))
    assert found["verdicts"] == {"accept": 2, "drop": 139} and found["drops"] == {
        "truncated": 99,
        "default": 40,
    }
    assert [rule["rule"] for rule in found["rules"]] == [LONG, "ssh", "gone", "idle"]
    assert found["rules"][1] == {"rule": "ssh", "identity": 3, "packets": 12, "bytes": 900, "order": 1}


# ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

EVENT = {
    "verdict": "drop", "direction": "ingress", "reason": "rule", "rule": "web-in", "generation": 1, "interface": "eth0",
    "length": 60, "sample": 1, "boot_ns": 1, "src": "192.0.2.7", "dst": "2001:db8::1", "proto": "tcp", "sport": 1,
    "dport": 80, "tcp_flags": 2, "time": "2026-11-25T10:00:00.123Z",
}  # fmt: skip
NONE = dict.fromkeys(("verdict", "rule", "src", "dst", "proto", "port", "device", "direction"))


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ({}, True), ({"verdict": "drop"}, True), ({"verdict": "accept"}, False), ({"rule": "web-*"}, True),
        ({"rule": ""}, False), ({"src": "192.0.2.0/24"}, True), ({"src": "198.51.100.0/24"}, False),
        ({"src": "2001:db8::/32"}, False), ({"dst": "2001:db8::1"}, True), ({"proto": "TCP"}, True), ({"port": 80}, True),
        ({"proto": "6"}, True), ({"proto": "gre"}, False),
        ({"port": 443}, False), ({"device": "eth*"}, True), ({"direction": "egress"}, False),
        ({"verdict": "drop", "port": 443}, False),
    ],
)  # fmt: skip
def test_filters_let_pass_what_they_name(filters: dict[str, Any], passes: bool) -> None:
    assert all(test(EVENT) for test in observe._tests(**(NONE | filters))) is passes


@pytest.mark.parametrize(
    "wrong", [{"verdict": "deny"}, {"src": "10.0.0.256"}, {"direction": "in"}, {"proto": "tpc"}]
)
def test_a_filter_that_cannot_be_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=f"--{next(iter(wrong))}"):
        observe._tests(**(NONE | wrong))


def test_a_protocol_is_found_by_its_name_where_reports_give_its_number() -> None:
    (test,) = observe._tests(**(NONE | {"proto": "gre"}))
    assert test({**EVENT, "proto": "47"})


def test_lines_for_eyes_bound_names_and_lines_for_pipes_do_not() -> None:
    event = {**EVENT, "rule": LONG}
    assert LONG in observe.line(event, narrow=False) and LONG not in observe.line(event, narrow=True)
    assert observe.line(EVENT, narrow=True) == (
        "10:00:00.123 drop   ingress eth0       web-in                   tcp 192.0.2.7:1 → [2001:db8::1]:80 (rule)"
    )
    assert "\x1b" not in observe.line({**EVENT, "rule": "\x1b[2Jx"}, narrow=False)


# ── differences ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

OLD = """\
version: 1
default: {ingress: drop, egress: accept}
sets: {office: [203.0.113.0/24], gone: [192.0.2.0/24]}
rules:
  - {name: ssh, from: "@office", proto: tcp, ports: 22, action: accept}
  - {name: web, proto: tcp, ports: 80, action: accept}
  - {name: dns, proto: udp, ports: 53, action: accept}
  - {name: old, proto: udp, ports: 69, action: accept}
"""
NEW = """\
version: 1
default: {ingress: drop, egress: drop}
sets: {office: [203.0.113.0/25], fresh: [192.0.2.0/24]}
rules:
  - {name: dns, proto: udp, ports: 53, action: accept}
  - {name: ssh, from: "@office", proto: tcp, ports: 22, action: accept}
  - {name: web, proto: tcp, ports: [80, 443], action: drop}
  - {name: new, proto: udp, ports: 123, action: accept}
"""


def parsed(text: str) -> FirewallPolicy:
    return policy.parse(text.encode(), "test.yaml")


def test_a_comparison_names_each_difference_and_the_fewest_moves() -> None:
    assert comparing.lines(comparing.compare(parsed(OLD), parsed(NEW))) == [
        "~ default egress: accept → drop",
        "+ rule new",
        "- rule old",
        "~ rule web: ports, action",
        "> rule dns",
        "+ set fresh",
        "- set gone",
        "~ set office",
    ]
    assert comparing.compare(parsed(OLD), parsed(OLD.replace("version: 1\n", "\nversion: 1\n"))).same


def test_diff_of_two_files_works_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(OLD)
    new.write_text(NEW)
    for words, code in (((new, old), 1), ((old, old), 0)):
        with pytest.raises(SystemExit) as caught:
            main(["firewall", "diff", "--policy", str(words[0]), "--against", str(words[1]), "--json"])
        assert (caught.value.code or 0) == code
        found = json.loads(capsys.readouterr().out)
        assert found["same"] is (code == 0) and found["flows"] is None
    new.write_text("version: 2\n")
    with pytest.raises(SystemExit) as caught:
        main(["firewall", "diff", "--policy", str(new), "--against", str(old)])
    assert caught.value.code == 2 and "new.yaml:1:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["stats", "observe"])
def test_where_no_firewall_is_it_says_where_it_looked(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["firewall", verb, "--pins", str(tmp_path)])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and str(tmp_path) in err and "next:" in err and "Traceback" not in err


# ── the shadow ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(text: str, generation: int) -> shadow.Judge:
    """The plain evaluator as a judge."""
    found = parsed(text)

    def ask(asked: Any) -> list[Verdict]:
        answers = (oracle.judge(found, packet) for packet in asked)
        return [Verdict(action, rule, "", generation) for action, rule in answers]

    return ask


def event(reason: str = "rule", verdict: int = 1, **fields: Any) -> layout.Event:
    values: dict[str, Any] = {
        "family": 4, "protocol": 6, "tcp_flags": 2, "source_port": 4000, "destination_port": 80, "epoch": 5,
        "ifindex": 2, "verdict": verdict, "reason": layout.REASONS.index(reason),
    }  # fmt: skip
    made = layout.Event(**(values | fields))
    made.source[:] = bytes(10) + b"\xff\xff" + socket.inet_aton("198.51.100.7")
    made.destination[:] = bytes(10) + b"\xff\xff" + socket.inet_aton("10.0.0.1")
    return made


def asked(one: layout.Event) -> Packet:
    found = shadow.question(one, {2: "eth0", 3: "eth1"})
    assert found is not None
    return found


def test_an_answer_is_asked_about_as_the_packet_that_began_its_flow() -> None:
    back = asked(
        event("flow", direction=1, asked=layout.ASKED_REPLY, origin=3, source_port=22, tcp_flags=0x10)
    )
    assert (back.src, back.sport, back.dst, back.dport) == ("10.0.0.1", 80, "198.51.100.7", 22)
    assert (back.direction.name, back.iface, back.state, back.tcp_flags) == ("INGRESS", "eth1", "new", None)
    echo = asked(
        event("flow", protocol=1, icmp_type=0, asked=layout.ASKED_REPLY | layout.ASKED_EGRESS, origin=2)
    )
    assert (echo.icmp_type, echo.direction.name) == (8, "EGRESS")


def test_a_packet_that_begins_nothing_is_asked_about_as_invalid() -> None:
    assert asked(event(tcp_flags=0x10)).state == "invalid"
    assert asked(event(tcp_flags=0x02)).state == "new"
    assert asked(event(protocol=1, icmp_type=3)).state == "invalid"
    assert asked(event(protocol=1, icmp_type=8)).state == "new"


@pytest.mark.parametrize("reason", ["related", "essential", "truncated", "unparsed", "fragment", "adoption"])
def test_what_no_rule_decides_is_not_asked(reason: str) -> None:
    assert shadow.question(event(reason), {}) is None
    assert shadow.question(event(packet=layout.LATER_FRAGMENT), {}) is None


def test_differences_are_counted_by_the_rules_of_both() -> None:
    made = shadow.Shadow(judge(OLD, 5), judge(NEW, 6))
    made.judge([event(), event(), event(destination_port=53, protocol=17)], {}, 10)
    (one,) = made.report().differences
    assert shadow.words(one.pair) == "ingress: accept by web → drop by web"
    assert (one.samples, one.packets, len(one.examples)) == (2, 20, 1)
    assert (made.report().judged, made.report().same, made.report().changed) == (3, 1, 2)


def test_what_the_rules_alone_do_not_explain_is_no_difference() -> None:
    """A limit dropped it, or a set has changed since: by its rules it would have been accepted."""
    made = shadow.Shadow(judge(OLD, 5), judge(NEW, 6))
    made.judge([event(verdict=0), event(epoch=4)], {}, 10)
    report = made.report()
    assert (report.judged, report.unsure, report.unasked, report.differences) == (0, 1, 1, ())


def test_pairs_beyond_what_is_kept_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "MAX_PAIRS", 0)
    made = shadow.Shadow(judge(OLD, 5), judge(NEW, 6))
    made.judge([event()], {}, 10)
    assert (made.report().more_pairs, made.report().changed) == (1, 1)


def test_the_rate_falls_until_its_samples_fit() -> None:
    assert shadow.rate_for(16, 100, 500) == 16
    assert shadow.rate_for(16, 2100, 500) == 128
    assert shadow.rate_for(40_000, 1 << 20, 500) == layout.MAX_SHADOW


# ── several observers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

RECORD = bytes(ct.sizeof(layout.Event))
PLACE_S = 60.0


@pytest.fixture
def observers(tmp_path: Path) -> Iterator[tuple[Observers, list[int]]]:
    """Observers below the test's folder, looked for by hand; and what they want sampled, as it changes."""
    wanted: list[int] = []
    made = Observers(wanted.append)
    (tmp_path / observing.FOLDER).mkdir()
    made._folder = tmp_path / observing.FOLDER
    yield made, wanted
    asyncio.run(made.close())


def comes(made: Observers, folder: Path, wish: Wish) -> Iterator[Heard | int | None]:
    """An observer whom the module has seen."""
    heard = listen(folder, wish, time.monotonic() + PLACE_S)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(next, heard)
        while not first.done():
            made.look()
        assert first.result() is None
    return heard


def test_each_observer_hears_everything_and_a_slow_one_is_told_what_it_missed(
    observers: tuple[Observers, list[int]], tmp_path: Path
) -> None:
    made, wanted = observers
    quick = comes(made, tmp_path, Wish())
    slow = comes(made, tmp_path, Wish(shadow=100))
    assert (made.shadow, wanted[-1]) == (100, 100)
    total, padding = 6000, "x" * 400
    for number in range(total):
        made.tell(layout.LOGGED, RECORD, {"number": number, "padding": padding})
        found = next(quick)
        assert isinstance(found, Heard) and found.event["number"] == number, (
            "nobody takes a line from another"
        )
    missed, lines, last = 0, 0, -1
    while last < total:
        made.tell(layout.LOGGED, RECORD, {"number": total, "padding": ""})  # says what was missed before it
        found = next(slow)
        if isinstance(found, Heard):
            assert found.event["number"] > last or last == total
            last = found.event["number"]
            lines += last < total
        else:
            assert found is not None
            missed += found
    assert missed > 0 and total <= lines + missed <= total + lines, (
        "what came and what was missed is all there was"
    )
    slow.close()  # type: ignore[attr-defined]  # a generator
    made.look()
    assert (made.shadow, wanted[-1]) == (0, 0), "who went wants nothing any more"
    made.tell(layout.SHADOWED, RECORD, {"number": -1})
    made.tell(layout.LOGGED, RECORD, {"number": -2})
    while not (isinstance(found := next(quick), Heard) and found.event["number"] < 0):
        pass
    assert found.event["number"] == -2, "it did not ask for a shadow's samples"
    assert list((tmp_path / observing.FOLDER).iterdir()) == []


def test_the_ninth_is_sent_away_with_the_reason(
    observers: tuple[Observers, list[int]], tmp_path: Path
) -> None:
    made, _ = observers
    held = [comes(made, tmp_path, Wish()) for _ in range(observing.MAX_OBSERVERS)]
    with pytest.raises(Refused, match="8 observe already"):
        comes(made, tmp_path, Wish())
    held.pop().close()  # type: ignore[attr-defined]  # a generator
    made.look()
    held.append(comes(made, tmp_path, Wish()))


def test_what_is_no_pipe_with_a_reader_is_cleared_away_and_never_written(
    observers: tuple[Observers, list[int]], tmp_path: Path
) -> None:
    made, wanted = observers
    folder, precious = tmp_path / observing.FOLDER, tmp_path / "precious"
    precious.write_text("untouched")
    (folder / "1-5-1").symlink_to(precious)
    (folder / "1-5-2").write_text("a file")
    os.mkfifo(folder / "1-5-3")  # its reader has died
    (folder / "notes").write_text("not ours")
    made.look()
    assert not made and wanted == [] and precious.read_text() == "untouched"
    assert list(folder.iterdir()) == [folder / "notes"]


def test_where_nobody_listens_the_observer_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match="no firewall module listens"):
        next(listen(tmp_path, Wish()))
    (tmp_path / observing.FOLDER).mkdir()
    monkeypatch.setattr(firewall_stream, "ANSWER_S", 0.2)
    with pytest.raises(Refused, match="nobody answers"):
        next(listen(tmp_path, Wish()))
    assert list((tmp_path / observing.FOLDER).iterdir()) == []


def test_a_module_that_has_ended_ends_its_observers(
    observers: tuple[Observers, list[int]], tmp_path: Path
) -> None:
    made, _ = observers
    heard = comes(made, tmp_path, Wish())
    made.tell(layout.LOGGED, RECORD, {"number": 1})
    asyncio.run(made.close())
    assert [one.event for one in heard if isinstance(one, Heard)] == [{"number": 1}]


CONFINED = """
import asyncio, socket, sys
from pathlib import Path
from loopback.bpf import layout
from loopback.host import confine, reach, seccomp
from loopback.modules.firewall.observing import Observers
own = Path(sys.argv[1])
filtered = seccomp.program(frozenset(("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")))
confine.no_new_privileges()
fenced = confine.fence(confine.Fence(write=(own,), read=reach._READ, run=(*reach._RUN, *reach.interpreter()), alone=True))
async def main():
    if filtered is not None:
        confine.filter_calls(filtered)
        try:
            socket.socket(socket.AF_UNIX)
        except OSError:
            print("no Unix socket", flush=True)
    observers = Observers(lambda rate: print("wanted", rate, flush=True))
    observers.start(own)
    number = 0
    while True:
        observers.tell(layout.LOGGED, b"", {"number": (number := number + 1)})
        await asyncio.sleep(0.01)
asyncio.run(main())
"""


def test_a_module_as_the_spawner_confines_it_can_be_observed(tmp_path: Path) -> None:
    """It has no Unix socket, and writes nowhere but in its own folder: pipes that observers bring are enough."""
    own = tmp_path / "own"
    own.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", CONFINED, str(own)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            end = time.monotonic() + PLACE_S
            while not (own / observing.FOLDER).exists():
                assert process.poll() is None and time.monotonic() < end, process.communicate()
                time.sleep(0.01)
            heard = (one for one in listen(own, Wish(), end) if isinstance(one, Heard))
            first, second = next(heard).event["number"], next(heard).event["number"]
            assert second == first + 1
        finally:
            process.kill()
        out, err = process.communicate()
    assert err == "" and (seccomp.program(frozenset()) is None or out.startswith("no Unix socket\n"))
