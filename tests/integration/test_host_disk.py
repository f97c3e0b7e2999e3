"""A disk that refuses one write, whichever: the host says so, and old or new holds, enforced."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from support import Place, eventually
from support_host import World

from loopback.contracts.codes import Code, Refused
from loopback.contracts.reports import Phase
from loopback.host.agent import Agent
from loopback.host.disk import Disk

pytestmark = pytest.mark.broker


class Faulty(Disk):
    """Refuses the n-th write from when it was told to, once."""

    def __init__(self) -> None:
        self.left = -1
        self.failed = False

    def write(self, path: Path, data: bytes) -> None:
        if (
            self.left == 0 and path.parent.name != "state"
        ):  # the host's own numbers are not what is tried here
            self.left, self.failed = -1, True
            raise Refused(Code.HOST_DISK, f"{path}: No space left on device")
        if path.parent.name != "state":
            self.left -= 1
        super().write(path, data)


@pytest.mark.parametrize("nth", range(12))
async def test_one_refused_write_never_leaves_the_host_between_two_states(
    broker: Place, tmp_path: Path, nth: int
) -> None:
    world = World(broker, tmp_path)
    await world.prepare()
    old = await world.release("1.0", policy=1)
    new = await world.with_policy(await world.release("1.1"), 2)
    disk = Faulty()
    agent = Agent(world.config, disk)
    async with asyncio.TaskGroup() as group:
        group.create_task(agent.run())
        try:
            await world.reached(await world.desire(old))
            disk.left = nth
            found = await world.reached(await world.desire(new, expected=old, rollout="r2"))
            path = world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
            if disk.failed and found.phase is not Phase.PROMOTED:
                assert (found.promoted, found.refusal and found.refusal.code) == (old, Code.HOST_DISK)
            else:
                assert found.promoted == new
            assert found.promoted is not None
            wanted = {"policy": found.promoted.policy}
            await eventually(lambda: json.loads(path.read_text()) == wanted)

            again = await world.reached(await world.desire(new, expected=found.promoted, rollout="r3"))
            assert (again.phase, again.promoted) == (Phase.PROMOTED, new), (
                "nothing of it stays once the disk is well"
            )
        finally:
            agent.stop()
