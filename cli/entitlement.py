"""`loopback entitlement`: which hosts may have which versions of a module."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from loopback.cli import context, fleetio
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import EntitlementPut

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Entitlements: hosts that nobody entitled to a module get nothing.",
)
Workspace = Annotated[
    str | None, typer.Option("--workspace", help="Its workspace; may be left out where there is only one.")
]


@app.command("put")
def put(
    name: Annotated[str, typer.Argument(help="The entitlement's name.")],
    module: Annotated[str, typer.Option(help="The module it is about.")],
    workspace: Workspace = None,
    versions: Annotated[
        str, typer.Option(help="A version range such as '>=1,<2' (PEP 440); empty means any.")
    ] = "",
    channel: Annotated[str, typer.Option(help="The release channel that its hosts follow.")] = "stable",
    label: fleetio.Labels = None,
) -> None:
    """Let hosts with these labels have these versions of a module."""

    async def run() -> None:
        async with context.connect() as session:
            command = EntitlementPut(
                **context.new_command_fields(await fleetio.only_workspace(session, workspace)),
                name=name,
                module=module,
                versions=versions,
                channel=channel,
                labels=fleetio.labels(label),
            )
            await session.send(command, "eligibility")
        typer.echo(
            f"entitlement {name}: {module} {versions or 'any version'} on {channel} for hosts with "
            f"{fleetio.label_text(command.labels) if command.labels else 'any labels'}",
            err=True,
        )

    asyncio.run(run())


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="The entitlement's name.")], workspace: Workspace = None
) -> None:
    """Withdraw an entitlement. Hosts keep what they run; new rollouts skip them."""

    async def run() -> None:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            known = {e.name: e for e in await fleetio.records(session, "entitlement", EntitlementPut, place)}
            if name not in known:
                raise Refused(
                    Code.NAME_INVALID,
                    f"the workspace {place!r} has no entitlement {name!r}",
                    "see 'loopback entitlement list'",
                )
            await session.send(
                EntitlementPut(
                    **context.new_command_fields(place), name=name, module=known[name].module, absent=True
                ),
                "eligibility",
            )
        typer.echo(f"entitlement {name} is withdrawn", err=True)

    asyncio.run(run())


@app.command("list")
def list_entitlements(workspace: Workspace = None, json: fleetio.Json = False) -> None:
    """Every entitlement, of one workspace or of all."""

    async def run() -> list[EntitlementPut]:
        async with context.connect() as session:
            place = await fleetio.any_workspace(session, workspace)
            return await fleetio.records(session, "entitlement", EntitlementPut, place)

    found = asyncio.run(run())
    if json:
        fleetio.print_json(
            [
                {
                    "name": e.name,
                    "workspace": e.workspace,
                    "module": e.module,
                    "versions": e.versions,
                    "channel": e.channel,
                    "labels": e.labels,
                }
                for e in found
            ]
        )
        return
    fleetio.table(
        ("ENTITLEMENT", "WORKSPACE", "MODULE", "VERSIONS", "CHANNEL", "LABELS"),
        [
            (e.name, e.workspace, e.module, e.versions or "any", e.channel, fleetio.label_text(e.labels))
            for e in found
        ],
    )
