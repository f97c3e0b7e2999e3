"""`loopback firewall diff` and `shadow`: what another policy would change, before anybody commits it.

`diff` compares rules, and where a firewall runs also its tracked flows; `shadow` compares live packets for a while. Both judge
by the real program, loaded privately: nothing is staged on the host, and nothing changes for any packet.

Exit codes: 0 no difference · 1 there are differences · 2 the policy, the call or the host refuses.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from loopback.bpf import layout, rtnl
from loopback.cli import firewall_compare as looks
from loopback.cli.firewall_judge import KernelJudge, object_file
from loopback.cli.firewall_stream import Heard, listen
from loopback.cli.firewall_where import ConfigOption, DataOption, Place, RootOption, find
from loopback.cli.interrupts import CtrlC
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import filling
from loopback.modules.firewall import flows as tracking
from loopback.modules.firewall import policy as policies
from loopback.modules.firewall import shadow as shadows
from loopback.modules.firewall.model import FirewallPolicy, Packet
from loopback.modules.firewall.observing import Wish
from loopback.modules.firewall.packets import Verdict
from loopback.modules.firewall.policy_text import PolicyRefused, render
from loopback.modules.firewall.reading import View

ACTIVE: Final = "active"
EXIT_DIFFERENT: Final = 1
EXIT_REFUSED: Final = 2
BATCH: Final = 200  # samples judged at once
REDRAW_S: Final = 1.0
_OVER: Final = object()

PolicyOption = Annotated[Path, typer.Option("--policy", help="The policy that is to come, YAML or JSON.")]
ObjectOption = Annotated[
    Path | None,
    typer.Option(
        "--object",
        help="A compiled firewall.bpf.o to judge with; without it the module's own, else it is compiled here.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def diff_command(
    policy_file: PolicyOption,
    against: Annotated[
        str,
        typer.Option(
            "--against", help=f"The policy of now: a file, or '{ACTIVE}' for what this machine enforces."
        ),
    ] = ACTIVE,
    object_path: ObjectOption = None,
    config: ConfigOption = None,
    pins: RootOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a policy would change: rules added, removed, changed or moved, and which live flows it would judge otherwise.

    Against a file only the two policies are compared, on any machine. Against 'active' (as root, on the host) the first packet
    of every tracked flow is judged by the policy in force and by the new one, through the real program.

    Next: 'loopback firewall shadow --policy NEW' judges live packets; 'rollout' brings the policy to hosts.
    """
    new = _read(policy_file)
    if against != ACTIVE:
        found = looks.compare(_read(Path(against)), new)
        if as_json:
            typer.echo(json.dumps({"rules": msgspec.to_builtins(found), "same": found.same, "flows": None}))
        else:
            typer.echo("\n".join(looks.lines(found)))
        raise typer.Exit(0 if found.same else EXIT_DIFFERENT)
    place = find(config, pins, data)
    with place.view() as view:
        kept = view.policy()
        new = filling.lent(new, kept)
        compared = looks.compare(kept, new) if kept is not None else None
        changes, total = _flows(view, new, object_path or _object_of(place))
    same = not changes and (compared is None or compared.same)
    if as_json:
        rules = msgspec.to_builtins(compared) if compared is not None else None
        typer.echo(json.dumps({"rules": rules, "same": same, "flows": looks.flows_document(changes, total)}))
    else:
        if compared is None:
            typer.echo(
                "the rules in force are not known here: name the module's folder with --data",
                err=True,
            )
        typer.echo(
            "\n".join([*(looks.lines(compared) if compared else []), *looks.flow_lines(changes, total)])
        )
    raise typer.Exit(0 if same else EXIT_DIFFERENT)


def shadow_command(
    policy_file: PolicyOption,
    one_in: Annotated[
        int,
        typer.Option(
            "--one-in", min=1, max=layout.MAX_SHADOW, help="Judge one in so many packets of each rule."
        ),
    ] = 16,
    for_s: Annotated[float, typer.Option("--for", min=0.5, help="Seconds; Ctrl-C ends it earlier.")] = 60.0,
    object_path: ObjectOption = None,
    config: ConfigOption = None,
    pins: RootOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a policy judge one in N live packets for a while, beside the one in force, and count the differences by rules.

    Packets of tracked flows count as the first packet of their flow, which is what a commit would judge anew. Limits are taken
    as not used up. Left out are packets whose verdict does not follow from the rules alone: 'unsure' where a limit or a set
    decided otherwise at its moment, and those that no rule decides, as later fragments and ICMP errors about flows.

    It needs the module alive, which passes the samples on, and nothing enforced means nothing to compare with.
    """
    new = _read(policy_file)
    place = find(config, pins, data)
    with place.view() as view:
        if not view.word()[0]:
            raise Refused(
                Code.HOST_LOST,
                "no policy is in force: there is nothing to compare with",
                "commit a first one, or use 'diff'",
            )
        judge = KernelJudge(filling.lent(new, view.policy()), _bytes(object_path or _object_of(place)))
        try:
            report = _shadow(view, judge, place, one_in, for_s)
        finally:
            judge.close()
    if as_json:
        typer.echo(json.dumps({"one_in": one_in, **msgspec.to_builtins(report)}))
    else:
        typer.echo("\n".join(looks.shadow_lines(report)))
    raise typer.Exit(EXIT_DIFFERENT if report.changed else 0)


def _shadow(view: View, judge: KernelJudge, place: Place, one_in: int, seconds: float) -> shadows.Report:
    shadow = shadows.Shadow(view.explain, _asking(judge))
    began = time.monotonic()
    drawn, live = began, sys.stderr.isatty()
    devices = {device.index: device.name for device in rtnl.devices()}
    waiting: list[layout.Event] = []
    listening = listen(place.data, Wish(events=False, shadow=one_in), began + seconds)
    with CtrlC() as ctrl_c:
        # it cuts off the waiting, never the counting: what was found by then is the answer, and each sample is in it once
        while (heard := ctrl_c.call(lambda: next(listening, _OVER), _OVER)) is not _OVER:
            if isinstance(heard, Heard):
                waiting.append(layout.Event.from_buffer_copy(heard.record))
            elif isinstance(heard, int):
                shadow.skip(heard)
            now = time.monotonic()
            if waiting and (heard is None or len(waiting) >= BATCH or now - drawn >= REDRAW_S):
                shadow.judge(waiting, devices, one_in)
                waiting.clear()
            if live and now - drawn >= REDRAW_S:
                drawn = now
                found = shadow.report()
                sys.stderr.write(
                    f"\r\x1b[K{found.changed} of {found.judged} otherwise, {seconds - (now - began):.0f} s left"
                )
                sys.stderr.flush()
        if waiting:
            shadow.judge(waiting, devices, one_in)
        if live:
            sys.stderr.write("\r\x1b[K")
        return shadow.report()


def _flows(view: View, new: FirewallPolicy, object_path: Path | None) -> tuple[list[tracking.Change], int]:
    """Flows that would change, and how many there are. Raises Refused."""
    record = view.record()
    flows = list(view.flows()) if record else []
    if record is None or not flows:
        return [], 0
    judge = KernelJudge(new, _bytes(object_path))
    try:
        devices = {device.index: device.name for device in rtnl.devices()}
        return tracking.changes(flows, record.epoch, devices, view.explain, _asking(judge)), len(flows)
    finally:
        judge.close()


def _asking(judge: KernelJudge) -> Callable[[Sequence[Packet]], list[Verdict]]:
    def ask(packets: Sequence[Packet]) -> list[Verdict]:
        return [Verdict(one.action, one.rule, "", one.generation) for one in judge.judge(packets)]

    return ask


def _object_of(place: Place) -> Path | None:
    """The programs of the version that runs, where the module's folder is known: then no compiler is needed."""
    found = place.data.parent / "current" / "bpf" / "firewall.bpf.o" if place.data is not None else None
    return found if found is not None and found.exists() else None


def _bytes(path: Path | None) -> bytes:
    return path.read_bytes() if path is not None else object_file()


def _read(path: Path) -> FirewallPolicy:
    try:
        return policies.parse(path.read_bytes(), str(path))
    except PolicyRefused as error:
        typer.echo(render(error.problems, error.code), err=True)
        raise typer.Exit(EXIT_REFUSED) from None
