"""`loopback host move`: take a host to another workspace, with its key and what it runs."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from loopback.cli import context, fleetio, hostfolder
from loopback.contracts.messages import HostMove


def move_command(
    host: Annotated[str, typer.Argument(help="The host.")],
    to: Annotated[str, typer.Option("--to", help="The workspace that it goes to.")],
    workspace: Annotated[str | None, typer.Option("--workspace", help="Where it is now.")] = None,
    label: fleetio.Labels = None,
    address: Annotated[
        list[str] | None,
        typer.Option(metavar="IP", help="Its addresses there. May be repeated; none given: as they are."),
    ] = None,
) -> None:
    """Move a host to another workspace. You must be admin of both: the host itself checks that.

    It keeps its key and goes on running and enforcing what it has promoted, until a rollout of the new workspace says
    otherwise; what the old workspace says counts no more. A host that is away hears of it when it comes back. Labels that are
    given take the place of those it has:

      loopback host move web-1 --to staging --label role=web --label stage=staging
    """

    async def run() -> str:
        async with context.connect() as session:
            record = await fleetio.recorded(session, host, workspace)
            hostfolder.check(host, to, address or ())
            await session.send(
                HostMove(
                    **context.new_command_fields(record.workspace),
                    host=host,
                    public_key=record.public_key,
                    to=to,
                    labels=fleetio.labels(label) if label else record.labels,
                    addresses=tuple(address) if address else record.addresses,
                ),
                "eligibility",
            )
            return record.workspace

    before = asyncio.run(run())
    typer.echo(
        f"{host} belongs to {to} now, no longer to {before}; next: loopback hosts --workspace {to}", err=True
    )
