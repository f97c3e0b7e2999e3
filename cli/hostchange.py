"""`loopback host change`: sign a host's record again, with other labels or addresses; its key stays."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from loopback.cli import context, fleetio, hostfolder
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import HostPut


def change_command(
    host: Annotated[str, typer.Argument(help="The host.")],
    workspace: Annotated[str | None, typer.Option("--workspace", help="The host's workspace.")] = None,
    label: fleetio.Labels = None,
    no_label: Annotated[
        list[str] | None,
        typer.Option("--no-label", metavar="NAME", help="Take a label away. May be repeated."),
    ] = None,
    address: Annotated[
        list[str] | None, typer.Option(metavar="IP", help="An address that it has as well. May be repeated.")
    ] = None,
    no_address: Annotated[
        list[str] | None,
        typer.Option("--no-address", metavar="IP", help="Take an address away. May be repeated."),
    ] = None,
    json: fleetio.Json = False,
) -> None:
    """Change a host's labels and addresses. Sets of policies that its labels fill follow within seconds, without a rollout.

    The record is signed anew in any case, also where nothing changes: that is how it outlives the key of an operator who left.

      loopback host change web-1 --label role=web --no-label stage --address 10.0.0.7
    """

    async def run() -> HostPut:
        async with context.connect() as session:
            record = await fleetio.recorded(session, host, workspace)
            for what, known, gone in (
                ("label", record.labels.keys(), no_label),
                ("address", record.addresses, no_address),
            ):
                if unknown := [one for one in gone or () if one not in known]:
                    has = ", ".join(known) or "none"
                    raise Refused(
                        Code.NAME_INVALID, f"{host!r} has no {what} {unknown[0]!r}", f"it has: {has}"
                    )
            labels = {k: v for k, v in record.labels.items() if k not in (no_label or ())}
            labels |= fleetio.labels(label)
            kept = [one for one in record.addresses if one not in (no_address or ())]
            command = HostPut(
                **context.new_command_fields(record.workspace),
                host=host,
                public_key=record.public_key,
                labels=labels,
                addresses=tuple(dict.fromkeys((*kept, *(address or ())))),
            )
            hostfolder.check(host, record.workspace, command.addresses)
            await session.send(command, "eligibility")
            return command

    made = asyncio.run(run())
    if json:
        fleetio.print_json(
            {
                "host": host,
                "workspace": made.workspace,
                "labels": made.labels,
                "addresses": list(made.addresses),
            }
        )
        return
    addresses = ", ".join(made.addresses) or "no address"
    typer.echo(f"{host} has {fleetio.label_text(made.labels)} and {addresses}", err=True)
