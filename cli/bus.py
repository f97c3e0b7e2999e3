"""`loopback bus`: prepare a broker that runs by itself, in containers or as units, for an installation."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from loopback.cli import context, supervise
from loopback.contracts.codes import Code, Refused
from loopback.services._runtime import streams
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="A broker that runs by itself, in containers or as units. 'loopback up' needs none of this.",
)


@app.callback()
def bus() -> None:
    """A group even while it has one command: typer would drop the command's name."""


@app.command("init")
def init_command(
    url: Annotated[
        str,
        typer.Option(
            help="The broker's address as it is reached from here, for example tls://broker.example:4222; several with commas."
        ),
    ],
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=5,
            help="On how many servers each stream is kept: 3 in a cluster of three. Default: as it is, and 1 at first. "
            "Say it the first time: from 1 to more, the stream of reports has to be deleted.",
        ),
    ] = None,
) -> None:
    """Make the streams on a running broker, publish the first trust metadata there, and remember the address.

    Once, when the broker is up: services wait for it. A repeat changes nothing, brings streams of an older version up to
    date, and with another --replicas copies what is stored to more servers or fewer. It takes creds/admin.creds and
    tuf/seed from the home, and with tls:// also tls/ca.pem; it writes the address to context.toml there, for every other
    command. 'loopback up' does all this by itself.

    Example: loopback --home home bus init --url tls://broker.example:4222
    """
    kept = asyncio.run(_init(context.home(), url, replicas))
    typer.echo(
        f"{url} has every stream, each on {kept} server{'s' if kept > 1 else ''}, and the first trust metadata\n"
        "next: loopback workspace put NAME",
        err=True,
    )


async def _init(home: Path, url: str, replicas: int | None) -> int:
    seed = home / "tuf" / "seed" / "timestamp.json"
    if not seed.is_file():
        raise Refused(
            Code.CONFIG_INVALID,
            f"{home} is no installation's home: {seed} is not there",
            "give --home before 'bus', or make one with 'loopback --home DIR keys init'",
        )
    admin = Settings(url=url, creds=home / "creds" / "admin.creds", home=home)
    async with await Bus.connect(admin) as bus:
        wanted = replicas or await streams.replicas_of(bus)
        await streams.ensure(bus, replicas=wanted)
        await streams.spread(bus, wanted)
        await supervise.seed_repository(bus, home)
    supervise.save_context(home, url)
    return wanted
