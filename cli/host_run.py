"""`loopback host run`: the core agent in the foreground, until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from loopback.host import confine, control, inventory
from loopback.host.agent import Agent
from loopback.host.config import load, with_state_dir
from loopback.host.spawner_client import SpawnerClient, give_up


def host_run_command(
    config: Annotated[
        Path, typer.Option("--config", help="The host's own file, made by 'loopback host add'.")
    ] = Path("/etc/loopback/host.toml"),
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", help="Where it keeps everything, instead of state_dir in the file."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more on stderr.")] = False,
) -> None:
    """Run the agent of this host: join, obey what was signed, report. Ends on SIGTERM; the kernel keeps enforcing.

    Started as root it splits: a spawner keeps what host.toml's [allow] names and starts modules; the agent keeps nothing.
    """
    confine.leave_no_core()  # before the host's key is read
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    found = load(config)
    if state_dir is not None:
        found = with_state_dir(found, state_dir)
    # Found out by trying, which takes privileges.
    features = inventory.features()
    spawner = SpawnerClient.begin(config, found)
    listening = control.listen(found.state_dir)
    give_up(found)

    async def main() -> None:
        await Agent(found, spawner=spawner, features=features | set(spawner.holds), listening=listening).run()

    asyncio.run(main())
