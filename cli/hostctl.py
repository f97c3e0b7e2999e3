"""`loopback host ctl`: ask the agent that runs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from loopback.host import control
from loopback.host.config import load

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Config = Annotated[
    Path, typer.Option("--config", help="The file that the agent was started with.", show_default=True)
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Its state directory, where it was started with one.")
]
_CONFIG = Path("/etc/loopback/host.toml")


@app.callback()
def ctl() -> None:
    """Ask the agent that runs on this machine: how it is, and, where its workspace is not regulated, what it is doing.

    You must be root or the agent's own user. In a regulated workspace only 'status' is answered.
    """


@app.command("status")
def status_command(config: Config = _CONFIG, state_dir: StateDir = None) -> None:
    """What the agent knows of itself, as JSON: also without any broker or service."""
    found = control.ask(_state_dir(config, state_dir), control.AskStatus()).status
    typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


@app.command("stacks")
def stacks_command(config: Config = _CONFIG, state_dir: StateDir = None) -> None:
    """Where each task and thread of the agent is in its code. For debugging."""
    typer.echo(control.ask(_state_dir(config, state_dir), control.AskStacks()).text)


@app.command("log-level")
def log_level_command(
    level: Annotated[str, typer.Argument(metavar="debug|info|warning|error", help="How much to log.")],
    config: Config = _CONFIG,
    state_dir: StateDir = None,
) -> None:
    """Have the agent log more or less, until it starts again. For debugging."""
    if level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"{level!r} is none of debug, info, warning, error")
    request = msgspec.convert({"type": "log-level", "level": level}, control.SetLevel)
    typer.echo(control.ask(_state_dir(config, state_dir), request).text, err=True)


@app.command("module-log")
def module_log_command(
    module: Annotated[str, typer.Argument(help="The module.")],
    config: Config = _CONFIG,
    state_dir: StateDir = None,
) -> None:
    """The end of what a module printed. For debugging."""
    typer.echo(control.ask(_state_dir(config, state_dir), control.AskLog(module)).text, nl=False)


def _state_dir(config: Path, given: Path | None) -> Path:
    return given if given is not None else load(config).state_dir
