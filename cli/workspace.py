"""`loopback workspace`: the places that keep fleets apart."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import typer

from loopback.cli import context, fleetio, trusted
from loopback.contracts.codes import Refused
from loopback.contracts.messages import WorkspacePut
from loopback.contracts.trustdoc import Trust

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
        Literal["production", "staging", "sandbox"],
        typer.Option(help="What its hosts are for: a label. Rules are in the trust document."),
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
            typer.echo(governed(name, await _trust(session)), err=True)

    asyncio.run(run())


def governed(name: str, trust: Trust | Refused) -> str:
    """What the trust document has to say of a workspace, whose environment is only a label."""
    if isinstance(trust, Refused):
        return f"whether it is regulated cannot be said: {trust.reason}  [{trust.code}]"
    rules = trust.rules(name)
    found = (
        "it is regulated: a rollout also needs 'loopback rollout approve' by another operator, only pinned publishers' "
        "releases are installed, and debugging verbs are off on its hosts"
        if rules.regulated
        else "it is not regulated: one operator's signature starts a rollout, and its environment is a label and no rule"
    )
    limits = [f"{module} from {floor.version} on" for module, floor in sorted(rules.floors.items())]
    limits += [
        f"{module} by {len(keys)} pinned publishers" for module, keys in sorted(rules.publishers.items())
    ]
    return found + (f" ({'; '.join(limits)})" if limits else "")


async def _trust(session: context.Session) -> Trust | Refused:
    """The verified trust document, or why there is none: a workspace can be made without."""
    try:
        return (await trusted.trusted(session)).trust
    except Refused as refused:
        return refused


def _regulated(name: str, trust: Trust | Refused) -> bool | None:
    return None if isinstance(trust, Refused) else trust.rules(name).regulated


@app.command("list")
def list_workspaces(json: fleetio.Json = False) -> None:
    """Every workspace, and whether the trust document regulates it."""

    async def run() -> tuple[list[WorkspacePut], Trust | Refused]:
        async with context.connect() as session:
            return await fleetio.records(session, "workspace", WorkspacePut), await _trust(session)

    found, trust = asyncio.run(run())
    if isinstance(trust, Refused):
        typer.echo(governed("", trust), err=True)
    if json:
        fleetio.print_json(
            [
                {
                    "workspace": w.workspace,
                    "environment": w.environment,
                    "regulated": _regulated(w.workspace, trust),
                    "description": w.description,
                }
                for w in found
            ]
        )
        return
    said = {None: "?", True: "yes", False: "no"}
    fleetio.table(
        ("WORKSPACE", "ENVIRONMENT", "REGULATED", "DESCRIPTION"),
        [(w.workspace, w.environment, said[_regulated(w.workspace, trust)], w.description) for w in found],
    )
