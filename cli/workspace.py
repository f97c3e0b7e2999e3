"""`loopback workspace`: the places that keep fleets apart."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import typer

from loopback.cli import context, fleetio
from loopback.contracts.messages import WorkspacePut

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Workspaces: each has its own hosts, policies and rollouts.",
)


@app.command("put")
def put(
    name: Annotated[str, typer.Argument(help="The workspace's name.")],
    environment: Annotated[
        Literal["production", "staging", "sandbox"], typer.Option(help="What its hosts are for.")
    ] = "production",
    description: Annotated[str, typer.Option(help="A line for people.")] = "",
) -> None:
    """Create a workspace, or change what is said about it."""

    async def run() -> None:
        command = WorkspacePut(
            **context.new_command_fields(name), environment=environment, description=description
        )
        async with context.connect() as session:
            await session.send(command, "eligibility")
        typer.echo(f"workspace {name} ({environment}) is there", err=True)

    asyncio.run(run())


@app.command("list")
def list_workspaces(json: fleetio.Json = False) -> None:
    """Every workspace."""

    async def run() -> list[WorkspacePut]:
        async with context.connect() as session:
            return await fleetio.records(session, "workspace", WorkspacePut)

    found = asyncio.run(run())
    if json:
        fleetio.print_json(
            [
                {"workspace": w.workspace, "environment": w.environment, "description": w.description}
                for w in found
            ]
        )
        return
    fleetio.table(
        ("WORKSPACE", "ENVIRONMENT", "DESCRIPTION"),
        [(w.workspace, w.environment, w.description) for w in found],
    )
