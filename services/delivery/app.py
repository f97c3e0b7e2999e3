"""Wiring: what delivery listens to, and the keeper that keeps metadata fresh."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import MetadataPublish, ReleasePublish
from loopback.services._runtime.bus import Stored
from loopback.services._runtime.commands import serve_commands
from loopback.services._runtime.service import Service
from loopback.services.delivery.handlers import NAME, Handlers
from loopback.services.delivery.keeper import Keeper
from loopback.services.delivery.store import OnlineKeys, Store
from loopback.services.delivery.sweep import Sweeper

PARALLEL: Final = 4
INBOX: Final = Path("tuf") / "inbox"  # below the home: changes that come by hand


async def start(service: Service) -> None:
    """Import the seed where nothing is published, then work: commands, rollouts of every workspace, renewal."""
    bus, group = service.bus, service.group
    keys = await asyncio.to_thread(OnlineKeys.load, service.settings.home)
    pinned = await asyncio.to_thread(_pinned, service.settings.pinned_root)
    scratch = service.settings.state(NAME) / "scratch"
    store = Store(bus, keys, pinned, scratch)
    handlers = Handlers(bus, store, service.trust, scratch, service.tracer, service.meter)
    if await store.import_seed(service.settings.home / "tuf" / "seed"):
        service.log.info("published the first repository, from %s", service.settings.home / "tuf" / "seed")
    if await store.adopt_pinned():
        service.log.warning(
            "published the root that was pinned here by hand; whoever follows the old one stops"
        )
    keeper = Keeper(
        store,
        service.settings.home / INBOX,
        service.meter,
        service.log,
        published=service.trust.refresh,  # so that the next command is judged by it
    )
    await keeper.look()
    group.create_task(keeper.run())
    group.create_task(Sweeper(bus, store, service.meter, service.log).run())

    working: set[str] = set()

    def on_workspace(stored: Stored) -> None:
        workspace = workspace_of(stored, service.log)
        if workspace is not None and workspace not in working:
            working.add(workspace)
            group.create_task(
                bus.consume(
                    subjects.workspace_stream(workspace),
                    f"{NAME}-created",
                    [subjects.rollout(workspace, "*", "created")],
                    handlers.on_created,
                    parallel=PARALLEL,
                )
            )

    group.create_task(
        bus.fold(
            subjects.STREAM_FLEET,
            [subjects.record("*", "workspace", "*")],
            on_workspace,
            caught_up=asyncio.Event(),
            last_per_subject=True,
        )
    )
    await serve_commands(
        service,
        {
            ReleasePublish: handlers.publish_release,
            MetadataPublish: handlers.publish_metadata,
        },
    )


def workspace_of(stored: Stored, log: logging.Logger) -> str | None:
    """The workspace that a record is of; None, said in the log, where its subject is none that could have been made."""
    try:
        return subjects.parse(stored.subject).workspace
    except Refused as refused:
        log.error("%s (sequence %d) is left out: %s", stored.subject, stored.sequence, refused)
        return None


def _pinned(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Refused(
            Code.TUF_INVALID,
            f"there is no pinned root {path}",
            "run 'loopback keys init' or 'loopback up' first",
        ) from None
