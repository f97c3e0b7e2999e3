"""The engines of all workspaces: one is started for each workspace that eligibility has a record of."""

from __future__ import annotations

import asyncio
import logging

from opentelemetry import metrics, trace

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.services._runtime.bus import Bus
from loopback.services.activation.engine import Engine
from loopback.services.activation.fleet import Fleet
from loopback.services.activation.store import Store

log = logging.getLogger(__name__)


class Workspaces:
    """Engines by workspace; their tasks live in the service's task group."""

    def __init__(
        self,
        bus: Bus,
        fleet: Fleet,
        key: SigningKey,
        tracer: trace.Tracer,
        meter: metrics.Meter,
        group: asyncio.TaskGroup,
    ) -> None:
        self.bus = bus
        self.fleet = fleet
        self.key = key
        self.tracer = tracer
        self.group = group
        self.failures = meter.create_counter(
            "loopback_rollout_failures", description="Times that a rollout was set aside, by error"
        )
        self.engines: dict[str, Engine] = {}
        self.news = asyncio.Event()  # records changed, or rollouts did: something may fill sets otherwise

    async def run(self) -> None:
        """Start an engine for every workspace that there is or comes, until cancelled."""
        while True:
            await self.fleet.changed.wait()
            self.fleet.changed.clear()
            self.news.set()
            for workspace in list(self.fleet.environments):
                try:
                    self._ensure(workspace)
                except Refused as refused:
                    log.error("the workspace %r is left out: %s", workspace[:80], refused)

    def _ensure(self, workspace: str) -> Engine:
        found = self.engines.get(workspace)
        if found is None:
            store = Store(self.bus, workspace, self._sourced)
            found = Engine(self.bus, store, self.fleet, self.key, self.tracer, self.failures)
            self.engines[workspace] = found
            self.group.create_task(found.run(), name=f"rollouts of {workspace}")
        return found

    def _sourced(self) -> None:
        self.news.set()

    async def engine(self, workspace: str) -> Engine:
        """The engine of a workspace. Raises Refused(WORKSPACE_UNKNOWN)."""
        if not await self.fleet.refresh_workspace(self.bus, workspace):
            raise Refused(
                Code.WORKSPACE_UNKNOWN,
                f"there is no workspace {workspace!r}",
                "make it with 'loopback workspace put'",
            )
        return self._ensure(workspace)
