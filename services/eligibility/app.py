"""Wiring: what eligibility listens to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Final

from loopback.contracts import subjects
from loopback.contracts.messages import EntitlementPut, HostInvite, HostMove, HostPut, PoolPut, WorkspacePut
from loopback.services._runtime.bus import Bus, Stored
from loopback.services._runtime.commands import serve_commands
from loopback.services._runtime.service import Service
from loopback.services.eligibility.handlers import NAME, Handlers
from loopback.services.eligibility.identities import Identities
from loopback.services.eligibility.moves import Moves
from loopback.services.eligibility.store import Fleet, Source

PARALLEL: Final = 4  # messages of one kind worked on at once by one replica


async def start(service: Service) -> None:
    """Fold what is known, then work: commands, changes, and the rollouts of every workspace there is or comes to be."""
    bus, group = service.bus, service.group

    def workspace_appeared(workspace: str) -> None:
        if workspace not in working:
            working.add(workspace)
            group.create_task(follow_rollouts(bus, workspace, handlers))

    working: set[str] = set()
    fleet = Fleet(service.log, workspace_appeared)
    handlers = Handlers(bus, fleet, service.trust, service.tracer, service.meter)
    ready = {source: asyncio.Event() for source in Source}
    for fold in fleet.folds(bus, ready):
        group.create_task(fold)
    for event in ready.values():
        await event.wait()
    identities = Identities(bus, fleet, handlers, service.settings, service.meter)
    moves = Moves(bus, fleet, handlers, identities, service.trust)
    await identities.listen()
    await service.trust.wait()
    for work in follow_changes(bus, handlers, moves):
        group.create_task(work)
    group.create_task(handlers.follow_rules())
    await serve_commands(
        service,
        {
            WorkspacePut: handlers.put_workspace,
            EntitlementPut: handlers.put_entitlement,
            HostPut: handlers.put_host,
            HostInvite: identities.invite,
            HostMove: moves.move,
            PoolPut: handlers.put_pool,
        },
    )


async def follow_rollouts(bus: Bus, workspace: str, handlers: Handlers) -> None:
    """Judge the rollouts of one workspace, for ever."""
    await bus.consume(
        subjects.workspace_stream(workspace),
        f"{NAME}-created",
        [subjects.rollout(workspace, "*", "created")],
        handlers.on_created,
        parallel=PARALLEL,
    )


def follow_changes(bus: Bus, handlers: Handlers, moves: Moves) -> Iterable[Coroutine[Any, Any, None]]:
    """Keep offers true, for ever: one coroutine for each kind of change."""

    async def on_inventory(stored: Stored) -> None:
        await moves.on_inventory(stored)
        await handlers.on_inventory(stored)

    changes = (
        (
            subjects.STREAM_FLEET,
            f"{NAME}-records",
            [subjects.record("*", "host", "*"), subjects.record("*", "entitlement", "*")],
            handlers.on_record,
        ),
        (subjects.STREAM_CATALOG, f"{NAME}-releases", [Source.RELEASES.filter], handlers.on_release),
        (subjects.STREAM_REPORTS, f"{NAME}-inventories", [Source.INVENTORIES.filter], on_inventory),
    )
    for stream, durable, filters, handle in changes:
        yield bus.consume(stream, durable, filters, handle, parallel=PARALLEL)
