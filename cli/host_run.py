"""`loopback host run`: the core agent in the foreground, until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from loopback.host.agent import Agent
from loopback.host.config import load


def host_run_command(
    config: Annotated[
        Path, typer.Option("--config", help="The host's own file, made by 'loopback host add'.")
    ] = Path("/etc/loopback/host.toml"),
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more on stderr.")] = False,
) -> None:
    """Run the agent of this host: join, obey what was signed, report. Ends on SIGTERM; the kernel keeps enforcing."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    found = load(config)

    async def main() -> None:
        await Agent(found).run()

    asyncio.run(main())
