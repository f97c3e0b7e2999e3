"""Entry point of `loopback`: finds the area a person asked for and turns refusals into words.

Exit codes: 0 done · 1 the answer is no · 2 refused or a mistake in the call · 3 rolled back · 4 halted or paused · 5 rollback
incomplete · 6 canceled ·
130 interrupted. Areas are imported when used, so that `loopback --help` costs nothing that it does not show.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import typer.core
import typer.main

import loopback
from loopback.cli import fileerrors, printing
from loopback.cli import home as installation
from loopback.contracts.codes import Refused

EXIT_NO = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

#: command → (module, attribute); an attribute that is no Typer app is a function with typer annotations.
AREAS: dict[str, tuple[str, str]] = {
    "up": ("loopback.cli.up", "up_command"),
    "service": ("loopback.cli.up", "service_command"),
    "demo": ("loopback.cli.demo.app", "demo_command"),
    "keys": ("loopback.cli.keys", "app"),
    "tls": ("loopback.cli.tls", "app"),
    "bus": ("loopback.cli.bus", "app"),
    "workspace": ("loopback.cli.workspace", "app"),
    "entitlement": ("loopback.cli.entitlement", "app"),
    "pool": ("loopback.cli.pool", "app"),
    "host": ("loopback.cli.hosts", "app"),
    "hosts": ("loopback.cli.hosts", "hosts_command"),
    "eligibility": ("loopback.cli.eligibility", "app"),
    "module": ("loopback.cli.module", "app"),
    "tuf-client": ("loopback.cli.tufclient", "app"),
    "rollout": ("loopback.cli.rollout", "app"),
    "firewall": ("loopback.cli.firewall", "app"),
    "audit": ("loopback.cli.audit", "audit_command"),
    "posture": ("loopback.cli.posture", "posture_command"),
}


class _Areas(typer.core.TyperGroup):
    """The root group, whose commands are imported on first use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(AREAS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in AREAS:
            return None
        module, attribute = AREAS[cmd_name]
        found = getattr(importlib.import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(cmd_name)(found)
            found = single
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=_Areas,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ship signed modules to fleets of Linux hosts, in stages, and watch them.\n\n"
    "Start here: 'loopback up' runs the broker and the four services on this machine; "
    "'loopback demo' (root) plays the whole product with four hosts.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loopback {loopback.__version__}")
        raise typer.Exit


@app.callback()
def root(
    home: Annotated[
        Path | None,
        typer.Option(
            envvar="LOOPBACK_HOME",
            help="Folder of this installation: keys, credentials, context.toml.",
            show_default=str(installation.default_home()),
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            help="File whose first line opens your encrypted keys, for use without a terminal. "
            f"Also {installation.PASSPHRASE_VARIABLE}.",
        ),
    ] = None,
    operator_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Sign commands with this key instead of the one that context.toml names. "
            f"Also {installation.OPERATOR_VARIABLE}.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Remember the home and the keys for whichever area follows."""
    installation.begin(home, passphrase_file, operator_key)


def refusals(error: BaseException) -> list[Refused]:
    """Every refusal inside an exception, also those that a task group wrapped."""
    if isinstance(error, Refused):
        return [error]
    if isinstance(error, BaseExceptionGroup):
        return [found for inner in error.exceptions for found in refusals(inner)]
    return []


def explain(error: BaseException) -> str | None:
    """What to tell a person, or None for a defect of ours, whose traceback is wanted."""
    found = refusals(error)
    if isinstance(error, OSError) and (unread := fileerrors.refusal(error)):
        found = [unread]
    if found:
        return printing.lines(
            "\n".join(
                f"error: {r.reason}  [{r.code}]" + (f"\n  next: {r.next_step}" if r.next_step else "")
                for r in found
            )
        )
    import nats.errors  # what raised one of its errors has imported it; nothing else should wait for it

    if isinstance(error, BaseExceptionGroup):
        inner = [explain(e) for e in error.exceptions]
        return inner[0] if inner and all(inner) else None
    if isinstance(error, nats.errors.NoServersError | ConnectionRefusedError):
        return "error: no NATS server answers\n  next: start one with 'loopback up', or give --home of the one that runs"
    if isinstance(error, nats.errors.Error):
        return f"error: the bus said: {error}\n  next: check that 'loopback up' runs and that your credentials are its own"
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, msgspec.MsgspecError):
        return f"error: stored data does not read: {error}\n  next: check that client and services have one version"
    return None


def _of_use(record: logging.LogRecord) -> bool:
    return "returning true from eof_received()" not in record.getMessage()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    # asyncio says this of every connection whose TLS began after its protocol did, as the NATS client's does, when it ends.
    logging.getLogger("asyncio").addFilter(_of_use)
    try:
        app(args=arguments, prog_name="loopback")
    except SystemExit as end:
        if (
            end.code == EXIT_INTERRUPTED
        ):  # typer's own answer to Ctrl-C, without a word, perhaps behind a prompt
            typer.echo("\ninterrupted", err=True)
        raise
    except KeyboardInterrupt:
        typer.echo("\ninterrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        words = explain(error)
        if words is None:
            raise
        typer.echo(words, err=True)
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
