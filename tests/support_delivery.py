"""An installation with replicas of delivery and an operator's session, for the tests of delivery."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from support import Place
from support_trust import described, manifest

from loopback.cli import context, keys, module
from loopback.contracts import subjects
from loopback.contracts.codes import Refused
from loopback.contracts.messages import (
    Release,
    ReleasePublish,
)
from loopback.services._runtime import service
from loopback.services._runtime.bus import Bus
from loopback.services.delivery import app
from loopback.trust import package, signing
from loopback.trust.repository import TrustedRepository


class World:
    """An installation with `replicas` of delivery and an operator's session."""

    def __init__(self, place: Place, tmp_path: Path) -> None:
        self.place = place
        self.home = place.home
        self.tmp_path = tmp_path
        self.bus: Bus
        self.session: context.Session

    def package(self, version: str = "1.0.0", name: str = "firewall", **files: bytes) -> Path:
        path = self.tmp_path / f"{name}-{version}.lbm"
        content = {f"lib/{n}.py": d for n, d in files.items()} or {"lib/x.py": version.encode()}
        path.write_bytes(described(content, manifest(name, version, capabilities=("CAP_BPF",))))
        return path

    async def state(self) -> tuple[int, int]:
        """Revisions of repository and catalog: equal means that nothing was changed."""
        return (
            await self.bus.revision(subjects.STREAM_TUF),
            await self.bus.revision(subjects.STREAM_CATALOG),
        )

    async def file(self, name: str) -> bytes | None:
        found = await self.bus.last(subjects.STREAM_TUF, subjects.tuf(name))
        return found.data if found else None

    async def timestamp(self) -> int:
        data = await self.file("timestamp.json")
        assert data is not None
        return signing.parse(signing.Timestamp, data).version

    async def releases(self) -> list[Release]:
        stored = await self.bus.read(subjects.STREAM_CATALOG, ["lb.catalog.>"])
        return [msgspec.json.decode(s.data, type=Release) for s in stored]

    async def host(self) -> TrustedRepository:
        """A client that has seen nothing but the pinned root."""
        folder = self.tmp_path / "host-tuf"
        TrustedRepository.pin(folder, (self.home / "tuf" / "root.json").read_bytes())
        stored = await self.bus.read(subjects.STREAM_TUF, ["lb.tuf.>"])
        files = {s.subject: s.data for s in stored}
        client = TrustedRepository(folder, lambda name: files.get(subjects.tuf(name)))
        client.refresh()
        return client

    async def command(self, path: Path, **changes: object) -> ReleasePublish:
        """A right command for this package, its content stored, and then changed."""
        info = package.inspect(path)
        trusted = await keys.repository(self.session)
        metadata = module.sign_release(self.home, trusted, info)
        await self.session.put_blob(await asyncio.to_thread(path.read_bytes))
        right = ReleasePublish(
            **context.new_command_fields("global"),
            module=info.manifest.name,
            version=info.manifest.version,
            digest=info.digest,
            size=info.size,
            metadata=keys.encode(metadata),
        )
        return msgspec.structs.replace(right, **changes)

    async def refused(self, command: object) -> Refused:
        """It is refused, and repository and catalog stay as they were."""
        before = await self.state()
        with pytest.raises(Refused) as caught:
            await self.session.send(command, "delivery")
        assert await self.state() == before
        return caught.value


@contextlib.asynccontextmanager
async def replicas(world: World, count: int) -> AsyncIterator[None]:
    """Delivery's processes, here as tasks; they end as on SIGTERM."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            settings = world.place.settings("delivery", instance=str(number))
            group.create_task(service.run("delivery", settings, app.start, stop=stop))
        try:
            yield
        finally:
            stop.set()
