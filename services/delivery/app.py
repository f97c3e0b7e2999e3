"""Wiring: what delivery listens to, and the one timer that keeps metadata fresh."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import MetadataPublish, ReleasePublish
from loopback.contracts.trustdoc import Role
from loopback.services._runtime.bus import Stored, Unavailable
from loopback.services._runtime.commands import serve_commands
from loopback.services._runtime.service import Service
from loopback.services._runtime.wire import ApiError
from loopback.services.delivery.handlers import NAME, Handlers
from loopback.services.delivery.store import OnlineKeys, Store

PARALLEL: Final = 4
RENEW_EVERY_S: Final = 60.0  # between looks; a timestamp lives a day and is renewed after half of it


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
    await store.renew()
    group.create_task(renew(service, store))

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
            ReleasePublish: (Role.RELEASER, handlers.publish_release),
            MetadataPublish: (Role.ADMIN, handlers.publish_metadata),
        },
    )


def workspace_of(stored: Stored, log: logging.Logger) -> str | None:
    """The workspace that a record is of; None, said in the log, where its subject is none that could have been made."""
    try:
        return subjects.parse(stored.subject).workspace
    except Refused as refused:
        log.error("%s (sequence %d) is left out: %s", stored.subject, stored.sequence, refused)
        return None


async def renew(service: Service, store: Store, every_s: float = RENEW_EVERY_S) -> None:
    """Renew what is due, for ever. What goes wrong is logged and tried again: a day's life leaves many attempts."""
    while True:
        await asyncio.sleep(every_s)
        try:
            if await store.renew():
                service.log.info("renewed the repository's timestamp")
        except (Unavailable, ApiError) as error:
            service.log.warning("the repository's timestamp was not renewed: %s", error)
        except Refused as refused:
            if refused.code != Code.TUF_INVALID:
                raise
            service.log.error("the repository on the bus does not read: %s", refused)


def _pinned(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Refused(
            Code.TUF_INVALID,
            f"there is no pinned root {path}",
            "run 'loopback keys init' or 'loopback up' first",
        ) from None
