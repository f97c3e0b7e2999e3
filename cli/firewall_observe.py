"""`loopback firewall observe`: packets that rules sample (`log`), as they are judged.

Exit codes: 0 as many as --count came, or --for is over · 1 the module ended · 2 it cannot be reached, or the call is wrong ·
130 Ctrl-C.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from loopback.cli.firewall_statsview import cut
from loopback.cli.firewall_stream import listen
from loopback.cli.firewall_where import ConfigOption, DataOption, RootOption, find
from loopback.cli.interrupts import CtrlC
from loopback.cli.printing import printable
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.observing import Wish
from loopback.modules.firewall.policy_fields import Wrong
from loopback.modules.firewall.reading import View

NAME_WIDTH: Final = 24  # columns of a rule's name; longer ones lose their middle, but for pipes and --json
DEVICE_WIDTH: Final = 10

Test = Callable[[dict[str, Any]], bool]


def command(
    verdict: Annotated[str | None, typer.Option("--verdict", help="Only accept, or only drop.")] = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", help="Only this rule; a pattern with * may be given, '' is the default."),
    ] = None,
    src: Annotated[str | None, typer.Option("--src", help="Only from this address or prefix.")] = None,
    dst: Annotated[str | None, typer.Option("--dst", help="Only to this address or prefix.")] = None,
    proto: Annotated[
        str | None, typer.Option("--proto", help="Only this protocol: tcp, udp, icmp, 47 …")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Only from or to this port.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Only on this device; * is allowed.")] = None,
    direction: Annotated[
        str | None, typer.Option("--direction", help="Only ingress, or only egress.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="End after so many.")] = None,
    for_s: Annotated[float | None, typer.Option("--for", min=0.1, help="End after so many seconds.")] = None,
    every: Annotated[
        int, typer.Option("--sample", min=0, max=65535, help="Show one in N of all packets, too; 0 is none.")
    ] = 0,
    config: ConfigOption = None,
    pins: RootOption = None,
    data: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show packets as the firewall judges them: those that rules sample by 'log', and dropped ones by the default's sample.

    The module passes them on, so several can observe at once; who is too slow loses lines and is told how many. With
    --sample, one in N packets of every rule is shown beside, also of rules without 'log'.

    A line: time, verdict, direction, device, rule, protocol, source → destination, and why: the rule, the default, a flow …

    Example: loopback firewall observe --verdict drop --src 198.51.100.0/24 --count 20
    """
    wanted = _tests(
        verdict=verdict,
        rule=rule,
        src=src,
        dst=dst,
        proto=proto,
        port=port,
        device=device,
        direction=direction,
    )
    place = find(config, pins, data)
    end = time.monotonic() + for_s if for_s is not None else None
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    narrow = sys.stdout.isatty()
    shown = missed = lost = 0
    begun = False
    with place.view() as view, CtrlC() as ctrl_c:
        before = view.events_lost()

        def watch() -> bool:
            nonlocal shown, missed, lost, begun
            for heard in listen(place.data, Wish(shadow=every), end):
                if heard is None:
                    if not begun:
                        begun = True
                        typer.echo("observing; Ctrl-C ends it", err=True)
                    lost = _told(view, before, lost)
                elif isinstance(heard, int):
                    missed += heard
                    typer.echo(f"{heard} missed: this observer was too slow", err=True)
                elif all(test(heard.event) for test in wanted):
                    event = {"time": _time(started, heard.event), **heard.event}
                    typer.echo(json.dumps(event) if as_json else line(event, narrow=narrow))
                    sys.stdout.flush()
                    shown += 1
                    if shown == count:
                        return True
            return end is not None and time.monotonic() >= end

        try:
            done = ctrl_c.call(watch, cut=False)
        finally:
            if begun or ctrl_c.pressed:
                lost = _told(view, before, lost)
                typer.echo(f"{shown} shown, {missed} missed, {lost} lost in the kernel's ring", err=True)
    if ctrl_c.pressed:
        raise KeyboardInterrupt
    if not done:
        typer.echo("the firewall's module has ended", err=True)
        raise typer.Exit(1)


def _told(view: View, before: int, told: int) -> int:
    """Say it once more where samples were lost since the last time."""
    lost = view.events_lost() - before
    if lost > told:
        typer.echo(f"{lost - told} lost: the kernel's ring was full", err=True)
    return lost


def _time(started: float, event: dict[str, Any]) -> str:
    moment = datetime.fromtimestamp(started + int(event["boot_ns"]) / 1e9, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line(event: dict[str, Any], *, narrow: bool) -> str:
    """An event in one line; `narrow` bounds names, for eyes."""
    rule = printable(str(event["rule"])) or "default"
    if event["reason"] not in ("rule", "default", "flow", "revoked", "adoption"):
        rule = "-"
    device = printable(str(event["interface"]))
    if narrow:
        rule, device = cut(rule, NAME_WIDTH), cut(device, DEVICE_WIDTH)
    at = event["time"][11:23]
    return (
        f"{at} {event['verdict']:6} {event['direction']:7} {device:{DEVICE_WIDTH}} {rule:{NAME_WIDTH}} "
        f"{_tuple(event)} ({event['reason']})"
    )


def _tuple(event: dict[str, Any]) -> str:
    if "src" not in event:
        return f"no IP, {event['length']} bytes"
    if "icmp_type" in event:
        return f"{event['proto']} {event['src']} → {event['dst']} type {event['icmp_type']} code {event['icmp_code']}"
    ends = [
        (f"[{event[a]}]" if ":" in event[a] else event[a])
        + (f":{event[p]}" if event["sport"] or event["dport"] else "")
        for a, p in (("src", "sport"), ("dst", "dport"))
    ]
    return f"{event['proto']} {ends[0]} → {ends[1]}"


def _tests(**given: Any) -> list[Test]:
    """What each filter that was given demands of an event. Raises Refused(POLICY_INVALID) for one that cannot be."""
    tests: list[Test] = []
    for name, allowed in (("verdict", ("accept", "drop")), ("direction", ("ingress", "egress"))):
        word = given[name]
        if word is not None:
            if word not in allowed:
                raise Refused(
                    Code.POLICY_INVALID,
                    f"--{name} {word}: it is neither {allowed[0]} nor {allowed[1]}",
                    "say which",
                )
            tests.append(_equal(name, word))
    for name, field in (("rule", "rule"), ("device", "interface")):
        if given[name] is not None:
            tests.append(_like(field, given[name]))
    for name in ("src", "dst"):
        if given[name] is not None:
            tests.append(_within(name, given[name]))
    if given["proto"] is not None:
        tests.append(_protocol(given["proto"].lower()))
    if given["port"] is not None:
        tests.append(lambda event: given["port"] in (event.get("sport"), event.get("dport")))
    return tests


def _protocol(text: str) -> Test:
    try:
        number = fields.protocol(text)
    except Wrong as error:
        raise Refused(Code.POLICY_INVALID, f"--proto: {error.message}", error.hint) from None
    # reports name the usual ones, and give the others by number
    words = (str(number), fields.PROTOCOL_NAMES.get(number))
    return lambda event: event.get("proto") in words


def _equal(field: str, value: str) -> Test:
    return lambda event: event.get(field) == value


def _like(field: str, pattern: str) -> Test:
    return lambda event: fnmatch.fnmatchcase(str(event[field]), pattern)


def _within(field: str, text: str) -> Test:
    try:
        prefix = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise Refused(Code.POLICY_INVALID, f"--{field}: {error}", "give an address or a prefix") from None
    return lambda event: field in event and ipaddress.ip_address(event[field]) in prefix
