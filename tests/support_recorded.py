"""An installation that did its work and was switched off, kept on disk; and a thief of its broker.

Made once for a module: two rollouts to two hosts, and a refused command. Each test takes a copy of its folder and starts a
broker on it, so every attack meets the real stored streams, and none sees another's.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from support import EmbeddedPlace, eventually
from support_installation import Installation, installation

from loopback.contracts import envelope, journal, subjects
from loopback.contracts.messages import JournalEntry, Result, decode_command
from loopback.host import config
from loopback.host.config import Allow
from loopback.services._runtime import streams
from loopback.services._runtime.bus import Bus, Outgoing, Stored

HOSTS = ("web-1", "web-2")
STREAM = subjects.workspace_stream("prod")
GENERAL = subjects.workspace_stream(subjects.GLOBAL_WORKSPACE)


def record(folder: Path, work: Callable[[Installation], Awaitable[None]]) -> Path:
    """Run an installation below `folder`, let it do this work, and stop it; the folder."""

    async def run() -> None:
        place = EmbeddedPlace(folder / "home")
        try:
            await place.prepare()
            async with installation(place, folder, *HOSTS) as found:
                await work(found)
        finally:
            await place.close()

    asyncio.run(run())
    return folder


async def two_rollouts(found: Installation) -> None:
    """r1 and r2 reach both hosts; somebody aborts what is not there; both hosts have said what they witnessed."""
    await found.roll_out("r1")
    await found("rollout", "abort", "nothing", "--workspace", "prod", code=2)
    await found.release("1.1")
    await found.roll_out("r2", "1.1")
    last = {name: found.agents[name][0].state.witnesses[-1].links for name in HOSTS}
    for name in HOSTS:
        await eventually(lambda name=name: _has(found, name, last[name]))


async def _has(found: Installation, name: str, links: int) -> bool:
    return await found.witnessed(name) >= links


@asynccontextmanager
async def replayed(recorded: Path, folder: Path) -> Any:
    """A copy of what was recorded, with a broker that runs; services and agents do not."""
    await asyncio.to_thread(shutil.copytree, recorded, folder)
    place = EmbeddedPlace(folder / "home")
    try:
        await place.prepare()
        found = Installation(place, folder)
        found.bus = await place.bus()
        for name in HOSTS:
            loaded = config.load(folder / "hosts" / name / "host.toml")
            found.configs[name] = msgspec.structs.replace(
                loaded, url=place.url, allow=Allow(modules=("tiny",), capabilities=()), otel=False
            )
        yield found
    finally:
        await place.close()


class Thief:
    """Has the broker: reads streams, deletes them, and writes them anew as if nothing else had ever been."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.stored: list[Stored] = []
        self.commands: list[Stored] = []
        self.general: list[Stored] = []

    async def steal(self) -> Thief:
        """Read what there is."""
        self.stored = await self.bus.read(STREAM, ["lb.ws.prod.>"])
        self.general = await self.bus.read(GENERAL, ["lb.ws.global.>"])
        self.commands = await self.bus.read(subjects.STREAM_COMMANDS, ["lb.ws.*.cmd.>"])
        return self

    def forget_rollout(self, name: str) -> None:
        """Take a rollout away with everything that speaks of it: links, commands, outcomes, entries."""
        gone = {c.sequence for c in self.commands if getattr(_command(c.data), "rollout", "") == name}
        ids = {_command(c.data).id for c in self.commands if c.sequence in gone}
        self.commands = [c for c in self.commands if c.sequence not in gone]
        self.stored = [s for s in self.stored if not self._about(s, name, ids)]

    def _about(self, stored: Stored, rollout: str, ids: set[str]) -> bool:
        parts = stored.subject.split(".")
        if parts[3] == "rollout":
            return subjects.untoken(parts[4]) == rollout
        if parts[3] == "result":
            return msgspec.json.decode(stored.data, type=Result).command in ids
        if parts[3] == "journal":
            return msgspec.json.decode(stored.data, type=JournalEntry).command in ids
        return False

    def change_links(self, change: Callable[[journal.Link], journal.Link]) -> None:
        """Change links, and hash every rollout's chain anew."""
        self.stored = [
            msgspec.structs.replace(s, data=journal.encode(change(journal.decode(s.data))))
            if ".rollout." in s.subject
            else s
            for s in self.stored
        ]

    def append(self, rollout: str, event: journal.AnyEvent) -> None:
        """Invent one more link at the end of a rollout."""
        last = next(s for s in reversed(self.stored) if ".rollout." in s.subject)
        link = msgspec.structs.replace(journal.decode(last.data), rollout=rollout, event=event)
        self.stored.append(
            msgspec.structs.replace(
                last, subject=subjects.rollout("prod", rollout, event.name), data=journal.encode(link)
            )
        )

    async def write(self) -> None:
        """Delete the streams and write them as they should have been, each chain and each number consistent."""
        places = await self._write_commands()
        for stream, messages in ((STREAM, self.stored), (GENERAL, self.general)):
            heads: dict[str, tuple[int, str]] = {}
            await self.bus.api(f"STREAM.DELETE.{stream}")
            await streams.ensure_workspace(self.bus, stream.removeprefix("LB_WS_"))
            for stored in messages:
                data = stored.data
                if ".rollout." in stored.subject:
                    data = _sealed(data, heads)
                elif ".journal." in stored.subject or ".result." in stored.subject:
                    kind = JournalEntry if ".journal." in stored.subject else Result
                    said = msgspec.json.decode(data, type=kind)
                    place = places.get(said.sequence, said.sequence)
                    data = msgspec.json.encode(msgspec.structs.replace(said, sequence=place))
                await self.bus.publish(Outgoing(stored.subject, data))

    async def _write_commands(self) -> dict[int, int]:
        wanted = next(c for c in streams.configurations() if c["name"] == subjects.STREAM_COMMANDS)
        await self.bus.api(f"STREAM.DELETE.{subjects.STREAM_COMMANDS}")
        await self.bus.api(f"STREAM.CREATE.{subjects.STREAM_COMMANDS}", wanted)
        return {c.sequence: await self.bus.publish(Outgoing(c.subject, c.data)) for c in self.commands}

    def chain(self) -> tuple[int, str]:
        """Links and head of the journal as it will be written."""
        heads: dict[str, tuple[int, str]] = {}
        count, head = 0, ""
        for stored in self.stored:
            if ".rollout." in stored.subject:
                digest = journal.digest(_sealed(stored.data, heads))
                count, head = count + 1, journal.chained(head, digest)
        return count, head


def _command(data: bytes) -> Any:
    return decode_command(envelope.payload_of(envelope.parse(data)))


def _sealed(data: bytes, heads: dict[str, tuple[int, str]]) -> bytes:
    """The link behind the last of its rollout, which it becomes."""
    link = journal.decode(data)
    seq, prev = heads.get(link.rollout, (0, ""))
    made = journal.encode(msgspec.structs.replace(link, seq=seq + 1, prev=prev))
    heads[link.rollout] = (seq + 1, journal.digest(made))
    return made
