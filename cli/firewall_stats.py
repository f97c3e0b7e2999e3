"""`loopback firewall stats`: what the firewall of this machine did, from its pins: with module and agent dead as well.

Exit codes: 0 shown · 1 `--watch` was ended by the firewall's end · 2 there is none, or it may not be read.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Annotated

import typer

from loopback.cli import firewall_statsview as looks
from loopback.cli.firewall_where import ConfigOption, DataOption, Place, RootOption, find
from loopback.contracts.codes import Refused
from loopback.modules.firewall.reading import Stats


def command(
    watch: Annotated[bool, typer.Option("--watch", help="Look again until Ctrl-C, with rates.")] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.2, max=3600, help="With --watch: seconds between looks.")
    ] = 1.0,
    config: ConfigOption = None,
    pins: RootOption = None,
    data: DataOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document; with --watch one a line.")
    ] = False,
) -> None:
    """Show what the firewall of this machine does: its policy, each rule's packets, drops by reason, flows, devices.

    It reads what is pinned in the kernel, as root, and can change nothing. Neither module nor agent need be alive.

    A rule's counter belongs to its name and survives every change of policy; 'number' is its place among the counters. A
    device is shown as device ingress/egress: native or generic XDP, tc, or OPEN where no program of the firewall sits.

    Next: 'loopback firewall observe' shows packets as they are judged.
    """
    place = find(config, pins, data)
    if not watch:
        with place.view() as view:
            stats = view.stats()
        if as_json:
            typer.echo(json.dumps(looks.document(stats)))
        else:
            typer.echo("\n".join(looks.lines(stats, shutil.get_terminal_size().columns)))
        return
    _watch(place, every, as_json)


def _watch(place: Place, every: float, as_json: bool) -> None:
    before: Stats | None = None
    seen = 0.0
    at_terminal = sys.stdout.isatty()
    while True:
        try:
            with place.view() as view:
                stats, now = view.stats(), time.monotonic()
        except Refused:
            if before is None:
                raise
            typer.echo("the firewall is gone", err=True)
            raise typer.Exit(1) from None
        if as_json:
            typer.echo(json.dumps(looks.document(stats)))
        else:
            size = shutil.get_terminal_size()
            lines = looks.lines(stats, size.columns, None, before, max(now - seen, 0.001))
            if at_terminal:
                # home, then each line with the rest of its row cleared, then all below: no flicker
                shown = [line + "\x1b[K" for line in lines[: size.lines - 1]]
                sys.stdout.write("\x1b[H" + "\n".join(shown) + "\x1b[J")
            else:
                typer.echo("\n".join([*lines, ""]))
        sys.stdout.flush()
        before, seen = stats, now
        time.sleep(every)
