"""`loopback pool`: the addresses of load balancers' pools, which fill sets of firewall policies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from loopback.cli import context, fleetio
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import PoolPut

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Pools: the addresses behind a load balancer. A policy names one as 'backends: {pool: NAME, within: […], max: …}'.",
)
Name = Annotated[str, typer.Argument(help="The pool's name.")]
Workspace = Annotated[
    str | None, typer.Option("--workspace", help="Its workspace; may be left out where there is only one.")
]
Serial = Annotated[
    int | None,
    typer.Option("--serial", help="Number of this word on the pool; without it, one above the last."),
]


@app.command("put")
def put(
    name: Name,
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADDRESS", help="Addresses or prefixes: all that the pool has."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Read them here, one a line; '-' is stdin.")
    ] = None,
    empty: Annotated[bool, typer.Option("--empty", help="The pool has none at the moment.")] = False,
    workspace: Workspace = None,
    serial: Serial = None,
    json: fleetio.Json = False,
) -> None:
    """Say which addresses a pool has, instead of those that it had. Needs the role balancer for the pool, or admin."""
    found = [*(addresses or []), *(_lines(file) if file else [])]
    if bool(found) == empty:
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"pool {name}: " + ("--empty, and yet addresses" if empty else "no addresses"),
            "name all that it has, or give --empty where it has none",
        )
    _send(name, tuple(dict.fromkeys(found)), workspace, serial, json, absent=False)


@app.command("remove")
def remove(
    name: Name, workspace: Workspace = None, serial: Serial = None, json: fleetio.Json = False
) -> None:
    """Take a pool away. Sets that it filled are empty then."""
    _send(name, (), workspace, serial, json, absent=True)


@app.command("list")
def list_pools(workspace: Workspace = None, json: fleetio.Json = False) -> None:
    """Every pool, of one workspace or of all."""

    async def run() -> list[PoolPut]:
        async with context.connect() as session:
            place = await fleetio.any_workspace(session, workspace)
            return await fleetio.records(session, "pool", PoolPut, place)

    found = asyncio.run(run())
    if json:
        fleetio.print_json([_plain(pool) for pool in found])
        return
    fleetio.table(
        ("POOL", "WORKSPACE", "SERIAL", "SINCE", "ADDRESSES"),
        [
            (p.pool, p.workspace, str(p.serial), f"{p.issued_at:%Y-%m-%d %H:%M:%S}", _short(p.addresses))
            for p in found
        ],
    )


def _send(
    name: str,
    addresses: tuple[str, ...],
    workspace: str | None,
    serial: int | None,
    json: bool,
    *,
    absent: bool,
) -> None:
    async def run() -> PoolPut:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            stored = await fleetio.stored_records(session, "pool", place)
            known = {c.pool: c for c in map(fleetio.command_of, stored) if isinstance(c, PoolPut)}
            before = known.get(name)
            if absent and (before is None or before.absent):
                raise Refused(
                    Code.NAME_INVALID,
                    f"the workspace {place!r} has no pool {name!r}",
                    "see 'loopback pool list'",
                )
            number = serial if serial is not None else before.serial + 1 if before else 1
            command = PoolPut(
                **context.new_command_fields(place),
                pool=name,
                serial=number,
                addresses=addresses,
                absent=absent,
            )
            await session.send(command, "eligibility")
            return command

    made = asyncio.run(run())
    if json:
        fleetio.print_json(_plain(made))
        return
    what = "is taken away" if absent else f"has {len(addresses)} address" + "es" * (len(addresses) != 1)
    typer.echo(f"pool {name} {what} (serial {made.serial})", err=True)


def _lines(file: Path) -> list[str]:
    text = typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text()
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _plain(pool: PoolPut) -> dict[str, object]:
    return {
        "pool": pool.pool,
        "workspace": pool.workspace,
        "serial": pool.serial,
        "addresses": list(pool.addresses),
        "absent": pool.absent,
    }


def _short(addresses: tuple[str, ...]) -> str:
    more = f" and {len(addresses) - 8} more" if len(addresses) > 8 else ""
    return ", ".join(addresses[:8]) + more
