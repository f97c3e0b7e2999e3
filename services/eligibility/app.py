"""Wiring: what eligibility listens to."""

from __future__ import annotations

import asyncio

from loopback.contracts import subjects
from loopback.contracts.messages import EntitlementPut, HostPut, WorkspacePut
from loopback.contracts.trustdoc import Role
from loopback.services._runtime.commands import serve_commands
from loopback.services._runtime.service import Service
from loopback.services.eligibility.handlers import NAME, Handlers
from loopback.services.eligibility.store import Fleet, Source

PARALLEL = 4


async def start(service: Service) -> None:
    """Fold what is known, then work: commands, changes, and the rollouts of every workspace there is or comes to be."""
    bus, group = service.bus, service.group

    def workspace_appeared(workspace: str) -> None:
        if workspace not in working:
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

    working: set[str] = set()
    fleet = Fleet(service.log, workspace_appeared)
    handlers = Handlers(bus, fleet, service.tracer, service.meter)
    ready = {source: asyncio.Event() for source in Source}
    for fold in fleet.folds(bus, ready):
        group.create_task(fold)
    for event in ready.values():
        await event.wait()

    changes = (
        (
            subjects.STREAM_FLEET,
            f"{NAME}-records",
            [subjects.record("*", "host", "*"), subjects.record("*", "entitlement", "*")],
            handlers.on_record,
        ),
        (subjects.STREAM_CATALOG, f"{NAME}-releases", [Source.RELEASES.filter], handlers.on_release),
        (subjects.STREAM_REPORTS, f"{NAME}-inventories", [Source.INVENTORIES.filter], handlers.on_inventory),
    )
    for stream, durable, filters, handle in changes:
        group.create_task(bus.consume(stream, durable, filters, handle, parallel=PARALLEL))
    await serve_commands(
        service,
        {
            WorkspacePut: (Role.ADMIN, handlers.put_workspace),
            EntitlementPut: (Role.ADMIN, handlers.put_entitlement),
            HostPut: (Role.ADMIN, handlers.put_host),
        },
    )
