"""Activation: turns an operator's rollout into desired states of hosts, wave by wave, and takes hosts back when it fails."""

from __future__ import annotations

from loopback.contracts import subjects
from loopback.contracts.messages import (
    RolloutAbort,
    RolloutApprove,
    RolloutPause,
    RolloutResume,
    RolloutStart,
)
from loopback.services._runtime.commands import serve_commands
from loopback.services._runtime.service import Service
from loopback.services.activation.fleet import Fleet
from loopback.services.activation.handlers import Handlers
from loopback.services.activation.rosters import Rosters
from loopback.services.activation.workspaces import Workspaces

STATUSES_AT_ONCE = 512  # waiting for their link; they share it
FACTS_AT_ONCE = 64


async def start(service: Service) -> None:
    """Wire the service together; its tasks run in the service's own group."""
    bus, group = service.bus, service.group
    fleet = Fleet()
    workspaces = Workspaces(bus, fleet, service.key, service.tracer, service.meter, group)
    handlers = Handlers(workspaces, service.trust)
    group.create_task(fleet.run(bus), name="fold records")
    group.create_task(workspaces.run(), name="workspaces")
    rosters = Rosters(bus, fleet, workspaces, service.key, service.meter)
    group.create_task(rosters.run(), name="rosters")
    group.create_task(
        bus.consume(
            subjects.STREAM_REPORTS,
            "activation-status",
            [subjects.from_host("*", "*", "status")],
            handlers.status,
            parallel=STATUSES_AT_ONCE,
        ),
        name="statuses",
    )
    group.create_task(
        bus.consume(
            subjects.STREAM_FLEET,
            "activation-facts",
            ["lb.ws.*.verdict.>", subjects.presence("*", "*")],
            handlers.fact,
            parallel=FACTS_AT_ONCE,
        ),
        name="verdicts and presence",
    )
    await fleet.caught_up.wait()
    await serve_commands(
        service,
        {
            RolloutStart: handlers.start,
            RolloutApprove: handlers.approve,
            RolloutPause: handlers.pause,
            RolloutResume: handlers.resume,
            RolloutAbort: handlers.abort,
        },
    )
