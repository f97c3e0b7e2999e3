"""What the commands about workspaces, entitlements and hosts share: labels, tables and the stored records."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, TypeVar

import msgspec
import typer

from loopback.cli import context, printing
from loopback.contracts import hostrecord, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import payload_of
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.messages import Command, EntitlementPut, PoolPut, Record, WorkspacePut, decode_command

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="May be repeated.")]
Interfaces = Annotated[
    list[str] | None,
    typer.Option(
        "--interface", metavar="NAME", help="Interface that the firewall protects. May be repeated."
    ),
]
Heartbeat = Annotated[float, typer.Option(help="Seconds between its heartbeats.")]
Put = TypeVar("Put", WorkspacePut, EntitlementPut, PoolPut)


def labels(given: Sequence[str] | None) -> dict[str, str]:
    """`NAME=VALUE` pairs as a mapping. Raises Refused(NAME_INVALID) for what is no pair, or a name given twice."""
    found: dict[str, str] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise Refused(
                Code.NAME_INVALID, f"--label {pair!r} is no NAME=VALUE pair", "write it like --label role=web"
            )
        if found.setdefault(name, value) != value:
            raise Refused(Code.NAME_INVALID, f"--label {name!r} is given twice", "give each name one value")
    return found


def taught(command: Callable[..., None]) -> str:
    """A command's docstring as its help, with indented examples left as the lines that they are (click's `\\b`)."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(f"\b\n{text}" if text.startswith("  ") else text for text in paragraphs)


def label_text(found: dict[str, str]) -> str:
    """Labels for a table."""
    return ",".join(f"{name}={value}" for name, value in sorted(found.items())) or "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns, two spaces apart, without any colour, so that it pipes well: one line each, whatever they hold."""
    lines = [list(head), *([printing.printable(str(cell)) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


async def records(session: context.Session, kind: str, put: type[Put], workspace: str = "*") -> list[Put]:
    """The stored records of one kind that were not withdrawn, as their signed commands, by workspace and name."""
    commands = [command_of(record) for record in await stored_records(session, kind, workspace)]
    return [c for c in commands if isinstance(c, put) and not getattr(c, "absent", False)]


async def stored_records(session: context.Session, kind: str, workspace: str = "*") -> list[Record]:
    """The stored records of one kind as they are, by workspace and name."""
    newest: dict[str, Record] = {}
    for message in await session.read(
        subjects.STREAM_FLEET, [subjects.record(workspace, kind, "*")], last=True
    ):
        newest[message.subject] = msgspec.json.decode(message.data, type=Record)
    return [newest[s] for s in sorted(newest)]


async def hosts(session: context.Session, workspace: str = "*") -> list[HostRecord]:
    """The records of hosts that are there: neither withdrawn, nor moved away, nor invited only."""
    stored = await stored_records(session, hostrecord.KIND, workspace)
    return [found for record in stored if not (found := hostrecord.of(record)).absent]


async def recorded(session: context.Session, host: str, workspace: str | None) -> HostRecord:
    """A host's record. Raises Refused where there is none, or several and no workspace was named."""
    place = await any_workspace(session, workspace)
    found = [h for h in await hosts(session, place) if h.host == host]
    if not found:
        raise Refused(
            Code.ELIGIBILITY_NO_RECORD, f"no record names the host {host!r}", "see 'loopback hosts'"
        )
    if len(found) > 1:
        places = ", ".join(h.workspace for h in found)
        raise Refused(
            Code.WORKSPACE_UNKNOWN,
            f"the host {host!r} is in several workspaces: {places}",
            "name one with --workspace",
        )
    return found[0]


def command_of(record: Record) -> Command:
    """The signed command inside a record."""
    return decode_command(payload_of(record.envelope))


async def any_workspace(session: context.Session, given: str | None) -> str:
    """The workspace that was named, or `*` for all of them. Raises Refused(WORKSPACE_UNKNOWN), naming what is near."""
    if given is None:
        return subjects.EVERY
    return _existing(given, await _workspaces(session))


async def _workspaces(session: context.Session) -> list[str]:
    return [w.workspace for w in await records(session, "workspace", WorkspacePut)]


def _existing(given: str, known: Sequence[str]) -> str:
    if given in known:
        return given
    near = difflib.get_close_matches(given, known, n=3)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise Refused(
        Code.WORKSPACE_UNKNOWN,
        f"there is no workspace {given!r}{meant}",
        "see 'loopback workspace list'" if known else "make one with 'loopback workspace put'",
    )


async def only_workspace(session: context.Session, given: str | None) -> str:
    """The workspace that was named, or the only one there is. Raises Refused(WORKSPACE_UNKNOWN)."""
    known = await _workspaces(session)
    if given:
        return _existing(given, known)
    if len(known) == 1:
        return known[0]
    raise Refused(
        Code.WORKSPACE_UNKNOWN,
        f"there are {len(known)} workspaces; which one is meant?" if known else "there is no workspace",
        "name one with --workspace" if known else "make one with 'loopback workspace put'",
    )
