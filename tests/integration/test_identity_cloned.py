"""Two machines under one key: telemetry says so, in the journal and in the fleet."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import msgspec
import pytest
from support import Place, eventually
from support_cli import Operator, services
from support_fleet import FakeHost, World

from loopback.contracts import subjects
from loopback.contracts.codes import Code
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import JournalEntry
from loopback.host import config
from loopback.services._runtime.settings import read_identity

pytestmark = pytest.mark.broker


async def test_a_copied_host_is_said_to_be_one_until_both_are_enrolled_anew(
    broker: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loopback = Operator(broker, capsys)
    async with services(broker):
        assert (await loopback("workspace", "put", "prod"))[0] == 0
        assert (await loopback("host", "add", "web-1", "--out", str(tmp_path / "h")))[0] == 0
        made = config.load(tmp_path / "h" / "host.toml")
        world = World(broker)
        host = FakeHost(world, "web-1", "prod", SigningKey.from_nkey(read_identity(made.creds).seed))
        await world.connect(host, made.creds)
        runs = itertools.cycle(("a-run", "another"))

        async def beat(run: str) -> None:
            await host.say(msgspec.structs.replace(host.heartbeat(interval_s=60), run=run))

        async def shown() -> str:
            _, out, _ = await loopback("hosts", "--json")
            (row,) = json.loads(out)
            return str(row["state"]) if not row["cloned"] else f"{row['state']}, cloned"

        await beat("the one before")

        async def alone() -> bool:
            return await shown() == "ok"

        assert await eventually(alone)

        async def found() -> bool:
            await beat(next(runs))
            return await shown() == "ok, cloned"

        assert await eventually(found)
        code, out, _ = await loopback("host", "show", "web-1")
        assert code == 0
        assert Code.HOST_CLONED in out

        async def journalled() -> bool:
            admin = await broker.bus()
            stored = await admin.read(
                subjects.workspace_stream("prod"), [subjects.journal("prod", "telemetry", "refused")]
            )
            entries = [msgspec.json.decode(s.data, type=JournalEntry) for s in stored]
            return [e.refusal.code for e in entries if e.refusal] == [Code.HOST_CLONED]

        assert await eventually(journalled)
        assert (await loopback("host", "revoke", "web-1"))[0] == 0
        assert json.loads((await loopback("hosts", "--json"))[1]) == []
        await world.close()
