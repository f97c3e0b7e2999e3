"""A real broker with every identity, and hosts that sign what they say: for the tests of eligibility and telemetry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import nats
from support import Place

from loopback.contracts import envelope, events, subjects
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import (
    Command,
    EntitlementPut,
    HostPut,
    Record,
    Release,
    Requirements,
    WorkspacePut,
)
from loopback.contracts.reports import AnyReport, Heartbeat, Inventory, ModuleStatus, Status
from loopback.services._runtime import streams
from loopback.services._runtime.bus import Bus, Outgoing
from loopback.services._runtime.settings import read_identity

WORKSPACE = "prod"
OPERATOR = SigningKey.generate()


def fields(workspace: str = WORKSPACE, command_id: str = "c1") -> dict[str, object]:
    """What every command needs."""
    now = datetime.now(UTC)
    return {
        "id": command_id,
        "workspace": workspace,
        "issued_at": now,
        "expires_at": now + timedelta(hours=1),
    }


class World:
    """A place (see `support`) with one workspace; `host(name)` makes a host with its credentials and record."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.bus = place.bus
        self._stack = AsyncExitStack()
        self._places = 0
        self._admin_bus: Bus | None = None

    async def host(self, name: str, workspace: str = WORKSPACE, **record: object) -> FakeHost:
        """A host: connected with credentials of its own, its record stored as eligibility stores it."""
        path = self.place.settings(self.place.host(workspace, name)).creds
        host = FakeHost(self, name, workspace, SigningKey.from_nkey(read_identity(path).seed))
        await self.connect(host, path)
        await host.put(**record)
        return host

    async def connect(self, host: FakeHost, path: Path) -> None:
        """Connect a host with these credentials."""
        host.nc = await nats.connect(
            self.place.url,
            user_credentials=str(path),
            inbox_prefix=subjects.inbox(host.name).encode(),
            error_cb=host.on_error,
        )
        self._stack.push_async_callback(host.nc.close)

    async def put(self, kind: str, name: str, command: Command) -> None:
        """Store a record, as eligibility would."""
        self._places += 1
        sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), OPERATOR)
        body = Record(
            kind=kind,
            name=name,
            workspace=command.workspace,
            envelope=sealed,
            at=command.issued_at,
            sequence=self._places,
        )
        bus = await self._admin()
        await bus.publish(Outgoing(subjects.record(command.workspace, kind, name), msgspec.json.encode(body)))

    async def put_workspace(self, workspace: str = WORKSPACE) -> None:
        """A workspace with its stream."""
        await streams.ensure_workspace(await self._admin(), workspace)
        await self.put("workspace", workspace, WorkspacePut(**fields(workspace), environment="sandbox"))

    async def entitle(self, name: str = "fw", **changed: object) -> None:
        """An entitlement for the firewall."""
        known = {**fields(), "name": name, "module": "firewall", **changed}
        await self.put("entitlement", name, EntitlementPut(**known))

    async def release(
        self, version: str = "1.0.0", digest: str = "ab" * 32, **requirements: object
    ) -> Release:
        """A release in the catalog, as delivery would publish it."""
        release = Release(
            module="firewall",
            version=version,
            digest=digest,
            size=1,
            target=f"modules/firewall/{version}/firewall-{version}.lbm",
            channel="stable",
            requirements=Requirements(**requirements),
            published_at=datetime.now(UTC),
        )
        bus = await self._admin()
        await bus.publish(Outgoing(subjects.catalog("firewall", digest), msgspec.json.encode(release)))
        return release

    async def _admin(self) -> Bus:
        if self._admin_bus is None:
            self._admin_bus = await self.bus()
        return self._admin_bus

    async def close(self) -> None:
        """Disconnect the hosts."""
        await self._stack.aclose()


class FakeHost:
    """A host as the bus sees it. `seq` counts its reports."""

    def __init__(self, world: World, name: str, workspace: str, key: SigningKey) -> None:
        self.world = world
        self.name = name
        self.workspace = workspace
        self.key = key
        self.seq = 0
        self.errors: list[str] = []
        self.nc: nats.aio.client.Client

    async def on_error(self, error: Exception) -> None:
        """Keep what the broker refused."""
        self.errors.append(str(error))

    async def put(self, **changed: object) -> None:
        """Store its record, new or changed."""
        known = {**fields(self.workspace), "host": self.name, "public_key": self.key.public.text, **changed}
        await self.world.put("host", self.name, HostPut(**known))

    def fields(self) -> dict[str, object]:
        """What every report needs; the next `seq`."""
        self.seq += 1
        return {
            "host": self.name,
            "workspace": self.workspace,
            "incarnation": "i1",
            "seq": self.seq,
            "at": datetime.now(UTC),
        }

    def inventory(self, **changed: object) -> Inventory:
        """An inventory that the firewall's needs are met by."""
        known = {
            "kernel": "6.1.0",
            "architecture": "x86_64",
            "agent_version": "0.1.0",
            "abi_min": 1,
            "abi_max": 1,
        }
        return Inventory(**{**self.fields(), **known, **changed})

    def heartbeat(self, interval_s: float = 10.0) -> Heartbeat:
        """A heartbeat."""
        return Heartbeat(**self.fields(), generation=1, agent="ok", interval_s=interval_s)

    def status(self, *modules: ModuleStatus) -> Status:
        """A status with these modules."""
        return Status(**self.fields(), agent="ok", generation=1, modules=modules)

    async def say(
        self, report: AnyReport, *, to: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        """Sign a report and publish it: on the host's own subject, or where it should not."""
        kind = type(report).__name__.lower()
        subject = to or subjects.from_host(self.workspace, self.name, kind)
        data = envelope.seal_bytes(envelope.REPORT, msgspec.json.encode(report), self.key)
        await self.publish(subject, data, headers)

    async def publish(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Publish anything at all with this host's credentials."""
        known = events.headers(
            event_id=f"{self.name}-{self.seq}-{len(data)}",
            source=f"host/{self.name}",
            event_type="report",
            subject=self.name,
            at=datetime.now(UTC),
        )
        await self.nc.publish(subject, data, headers={**known, **(headers or {})})
        await self.nc.flush()


@asynccontextmanager
async def world(place: Place) -> AsyncIterator[World]:
    """This place, with one workspace."""
    made = World(place)
    try:
        await made.put_workspace()
        yield made
    finally:
        await made.close()
