"""What the commands about workspaces, entitlements and hosts share: labels, tables and the stored records."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, TypeVar

import msgspec
import typer

from loopback.cli import context
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import payload_of
from loopback.contracts.messages import Command, EntitlementPut, HostPut, Record, WorkspacePut, decode_command

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="May be repeated.")]
Put = TypeVar("Put", WorkspacePut, EntitlementPut, HostPut)


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


def label_text(found: dict[str, str]) -> str:
    """Labels for a table."""
    return ",".join(f"{name}={value}" for name, value in sorted(found.items())) or "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns, two spaces apart, without any colour, so that it pipes well."""
    lines = [list(head), *([str(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


async def records(session: context.Session, kind: str, put: type[Put], workspace: str = "*") -> list[Put]:
    """The stored records of one kind that were not withdrawn, as their signed commands, by workspace and name."""
    newest: dict[str, Put] = {}
    for message in await session.read(
        subjects.STREAM_FLEET, [subjects.record(workspace, kind, "*")], last=True
    ):
        command = command_of(msgspec.json.decode(message.data, type=Record))
        if isinstance(command, put):
            newest[message.subject] = command
    return [newest[s] for s in sorted(newest) if not getattr(newest[s], "absent", False)]


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
