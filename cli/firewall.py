"""`loopback firewall`: check a policy, ask what it does to a packet, print its schema. Works without agent, bus or network.

What looks at the firewall of this machine is beside: firewall_stats, firewall_observe, firewall_diff (with `shadow`).

Exit codes: 0 done, and every test of the policy holds · 1 a test does not hold · 2 the policy, a packet or the call is wrong.
Verdicts come from the program that runs in the kernel, where this machine lets it run (root, eBPF); else from the plain Python
evaluator that the program is tested against. Which one it was is said on stderr and in `check --json`.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from loopback.cli import (
    fileerrors,
    firewall_diff,
    firewall_import,
    firewall_observe,
    firewall_pcap,
    firewall_stats,
)
from loopback.cli.firewall_judge import Kind, Verdict, open_judge, open_kernel
from loopback.cli.firewall_packets import MAX_PACKETS, read_lines, read_one
from loopback.contracts.codes import Code, Refused
from loopback.contracts.roster import Source
from loopback.modules.firewall import compile as compiler
from loopback.modules.firewall import policy, schema
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.entries import RuleRefused
from loopback.modules.firewall.model import Action, FirewallPolicy, Packet
from loopback.modules.firewall.policy_fields import PROTOCOL_NAMES, WITH_PORTS, Wrong
from loopback.modules.firewall.policy_text import PolicyRefused, Problem, render

EXIT_TEST_FAILED = 1
EXIT_REFUSED = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Check firewall policies, explain their verdicts, look at this machine's firewall. The language: docs/policy.md.",
)

JudgeOption = Annotated[
    Kind,
    typer.Option(
        "--judge", help="Who judges: the kernel's program, the plain evaluator, or the first that can."
    ),
]
ObjectOption = Annotated[
    Path | None,
    typer.Option(
        "--object", help="A compiled firewall.bpf.o to judge with, instead of compiling it here with clang."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The policy, YAML or JSON; - is stdin.")],
    as_json: JsonOption = False,
    judge: JudgeOption = Kind.AUTO,
    object_path: ObjectOption = None,
) -> None:
    """Read a policy, tell what is wrong with it, and run its own tests.

    Exit code: 0 every test holds, 1 one does not, 2 the policy or the call is wrong.
    """
    stdin = str(file) == "-"
    file = Path("stdin") if stdin else file
    try:
        found = policy.parse(sys.stdin.buffer.read() if stdin else file.read_bytes(), str(file))
        # whether the program has room for it is as pure a question, and answered on any machine
        compiler.compile_policy(found, compiler.assign({}, [rule.name for rule in found.rules]))
        with open_judge(found, judge, object_path) as judging:
            verdicts = judging.judge([test.packet for test in found.tests])
    except PolicyRefused as error:
        if as_json:
            _print(
                {
                    "ok": False,
                    "code": error.code,
                    "problems": [_problem(p) for p in error.problems],
                    "failed": [],
                }
            )
        _refuse(error)
    except (Refused, OSError) as error:
        told = error if isinstance(error, Refused) else fileerrors.refusal(error)
        if as_json and told is not None:
            line, field, what = 0, "", told.reason
            if isinstance(told, RuleRefused):
                place = [rule.name for rule in found.rules].index(told.rule.name)
                line, what = told.rule.line, told.what
                field = f"rules[{place}]" + f".{told.field}" * bool(told.field)
            only = Problem(
                source=str(file), line=line, column=0, field=field, message=what, hint=told.next_step
            )
            _print({"ok": False, "code": told.code, "problems": [_problem(only)], "failed": []})
        raise
    failed = []
    for index, (test, verdict) in enumerate(zip(found.tests, verdicts, strict=True)):
        if verdict.action != test.expect:
            failed.append(
                {
                    "test": index, "line": test.line, "expected": _word(test.expect), "verdict": _word(verdict.action),
                    "rule": verdict.rule, "packet": describe(test.packet),
                }
            )  # fmt: skip
    if as_json:
        _print(
            {
                "ok": not failed, "rules": len(found.rules), "sets": len(found.sets), "tests": len(found.tests),
                "judge": judging.name, "problems": [], "failed": failed, "filled": _filled(found),
            }
        )  # fmt: skip
    else:
        for one in failed:
            where = f"{file}:{one['line']}" if one["line"] else str(file)
            typer.echo(
                f"{where}: tests[{one['test']}]: expected {one['expected']}, but it is {one['verdict']} by "
                f"{_by(one['rule'])}: {one['packet']}",
                err=True,
            )
        counted = f"{_count(len(found.rules), 'rule')}, {_count(len(found.sets), 'set')}"
        for name, words in _filled(found).items():
            listed = len(found.sets[name])
            typer.echo(
                f"note: set {name!r} is filled on hosts ({words}); here it holds only what the policy lists ({listed})",
                err=True,
            )
        passed = f"tests: {len(found.tests) - len(failed)} of {len(found.tests)} hold"
        typer.echo(f"{file}: {counted}; {passed}, judged by {judging.name}{judging.why}")
    if failed:
        raise typer.Exit(EXIT_TEST_FAILED)


@app.command()
def explain(
    policy_file: Annotated[Path, typer.Option("--policy", help="The policy, YAML or JSON.")],
    packet: Annotated[str | None, typer.Option("--packet", help="One packet as JSON.")] = None,
    packets: Annotated[
        Path | None, typer.Option("--packets", help="Packets, one JSON object a line; - is stdin.")
    ] = None,
    pcap: Annotated[
        Path | None,
        typer.Option("--pcap", help="Frames of a capture (pcap, pcapng), as they were on the wire."),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            "--direction",
            help="With --pcap: ingress or egress, where the capture does not say it.",
            show_default="ingress",
        ),
    ] = None,
    as_json: JsonOption = False,
    judge: JudgeOption = Kind.AUTO,
    object_path: ObjectOption = None,
) -> None:
    """Say what a policy does to packets, and which rule decides: null where it is the default.

    A packet is JSON with src, dst, proto, and where they matter direction, sport, dport, icmp_type, icmp_code, tcp_flags,
    iface, state. With --json each packet gives one line {"verdict","rule","generation"}. One bad line, and none is judged.

    Example: --packet '{"src": "203.0.113.9", "dst": "10.1.0.5", "proto": "tcp", "dport": 22}'

    Frames of a capture go to the kernel's program byte for byte, each as the first of its connection.
    """
    if [packet, packets, pcap].count(None) != 2:
        raise Refused(
            Code.POLICY_INVALID,
            "explain needs one of --packet, --packets and --pcap",
            "give one of the three",
        )
    if pcap is None and direction is not None:
        raise Refused(
            Code.POLICY_INVALID,
            "--direction is for --pcap; a packet says its direction itself",
            f'write "direction": "{direction}" into the packet',
        )
    try:
        found = policy.parse(policy_file.read_bytes(), str(policy_file))
        if pcap is not None:
            _explain_frames(found, pcap, direction or "ingress", as_json, judge, object_path)
            return
        asked = [read_one(packet, "--packet")] if packet is not None else read_lines(packets or Path("-"))
    except PolicyRefused as error:
        _refuse(error)
    with open_judge(found, judge, object_path) as judging:
        verdicts = judging.judge(asked)
    if as_json:
        sys.stdout.write("".join(_verdict_line(verdict) for verdict in verdicts))
    else:
        for one, verdict in zip(asked, verdicts, strict=True):
            typer.echo(f"{_word(verdict.action):6}  by {_by(verdict.rule)}: {describe(one)}")
    typer.echo(f"judged by {judging.name}{judging.why}", err=True)


def _explain_frames(
    found: FirewallPolicy, pcap: Path, direction: str, as_json: bool, judge: Kind, object_path: Path | None
) -> None:
    if judge is Kind.ORACLE:
        raise Refused(
            Code.POLICY_INVALID,
            "frames of a capture are judged by the kernel's program alone: the plain evaluator knows no bytes",
            "leave --judge out, or give the packets with --packets",
        )
    try:
        way = fields.direction(direction)
    except Wrong as error:
        raise Refused(Code.POLICY_INVALID, f"--direction: {error.message}", error.hint) from None
    frames = firewall_pcap.read(
        pcap.read_bytes(), way
    )  # one by one: filled up, they can be far more than the file
    with open_kernel(found, object_path) as judging:
        verdicts = judging.judge_frames(itertools.islice(frames, MAX_PACKETS))
    if next(frames, None) is not None:
        raise Refused(Code.POLICY_INVALID, f"{pcap} holds more than {MAX_PACKETS} frames", "split the file")
    if as_json:
        sys.stdout.write("".join(_verdict_line(verdict) for verdict in verdicts))
    else:
        for number, verdict in enumerate(verdicts, 1):
            typer.echo(f"{_word(verdict.action):6}  by {_by(verdict.rule)}: frame {number}")
    typer.echo(f"judged by {judging.name}", err=True)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of the policy language."""
    typer.echo(schema.text(), nl=False)


app.command("import")(firewall_import.command)
app.command("diff")(firewall_diff.diff_command)
app.command("shadow")(firewall_diff.shadow_command)
app.command("stats")(firewall_stats.command)
app.command("observe")(firewall_observe.command)


def describe(packet: Packet) -> str:
    """A packet in a few words: `ingress tcp 198.51.100.7:0 → 10.1.0.5:22`."""
    kind = PROTOCOL_NAMES.get(packet.protocol, f"protocol {packet.protocol}")
    v6 = ":" in packet.src
    ends = (packet.src, packet.dst)
    detail = ""
    if packet.protocol in WITH_PORTS:
        pairs = zip(ends, (packet.sport, packet.dport), strict=True)
        ends = tuple(f"[{address}]:{port}" if v6 else f"{address}:{port}" for address, port in pairs)  # type: ignore[assignment]  # still two
    elif kind in ("icmp", "icmpv6"):
        detail = f" type {packet.icmp_type} code {packet.icmp_code}"
    detail += f" on {packet.iface}" if packet.iface else ""
    detail += f" ({packet.state})" if packet.state != "new" else ""
    return f"{packet.direction.name.lower()} {kind} {ends[0]} → {ends[1]}{detail}"


def _verdict_line(verdict: Verdict) -> str:
    # a name has no character that JSON escapes
    rule = "null" if verdict.rule is None else f'"{verdict.rule}"'
    return f'{{"verdict":"{_word(verdict.action)}","rule":{rule},"generation":{verdict.generation}}}\n'


def _filled(found: FirewallPolicy) -> dict[str, str]:
    """What fills which of a policy's sets, in words."""
    return {name: Source(labels=one.labels, pool=one.pool).words for name, one in found.filled.items()}


def _word(action: Action) -> str:
    return action.name.lower()


def _by(rule: Any) -> str:
    return f"rule {rule}" if rule else "the default"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "file": problem.source, "line": problem.line, "column": problem.column, "field": problem.field,
        "message": problem.message, "hint": problem.hint,
    }  # fmt: skip


def _print(value: Any) -> None:
    typer.echo(json.dumps(value))


def _refuse(error: PolicyRefused) -> NoReturn:
    typer.echo(render(error.problems, error.code), err=True)
    raise typer.Exit(EXIT_REFUSED) from None
