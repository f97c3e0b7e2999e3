"""`loopback host run` as a process, killed with SIGKILL while it works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import Place, eventually
from support_host import World, agent_command

from loopback.contracts.reports import Phase
from loopback.host import proc
from loopback.host.config import write_config
from loopback.host.disk import Disk
from loopback.host.state import ModuleState, Store

pytestmark = pytest.mark.broker


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    write_config(world.config, tmp_path / "host.toml")
    yield world


@contextmanager
def agent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = agent_command(tmp_path / "host.toml")
    with (tmp_path / "agent.log").open("ab") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def state(world: World) -> ModuleState:
    return Store(Disk(), world.config.state_dir).module("tiny").read()


def process_of(world: World) -> tuple[int, int]:
    pid, start = json.loads((world.config.state_dir / "modules" / "tiny" / "process.json").read_text())
    return pid, start


def kernel(world: World) -> dict[str, object]:
    path = world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
    found: dict[str, object] = json.loads(path.read_text())
    return found


async def test_a_killed_agent_takes_its_module_along_not_the_kernel_and_a_restart_adopts(
    world: World, tmp_path: Path
) -> None:
    target = await world.release("1.0", policy=1)
    with agent(tmp_path) as process:
        await world.reached(await world.desire(target))
        pid, start = process_of(world)
        process.kill()
        await eventually(lambda: proc.started_at(pid) != start)
        assert kernel(world) == {"policy": target.policy}
    with agent(tmp_path):

        async def adopted() -> bool:
            module = await world.module()
            return (
                module is not None
                and module.adopted
                and module.health == "ok"
                and process_of(world)[0] != pid
            )

        await eventually(adopted)
    assert (state(world).promoted, state(world).phase) == (target, Phase.PROMOTED)


async def test_an_agent_killed_on_trial_comes_back_to_what_was_promoted(world: World, tmp_path: Path) -> None:
    old = await world.release("1.0", policy=1)
    new = await world.with_policy(await world.release("1.1"), 2)
    with agent(tmp_path) as process:
        await world.reached(await world.desire(old))
        generation = await world.desire(new, expected=old, rollout="r2", start={"trial_s": 30.0})
        await eventually(lambda: state(world).step == "watch-trial")
        assert kernel(world)["policy"] == new.policy
        process.kill()
        process.wait(60)
    with agent(tmp_path):
        found = await world.reached(generation)
        assert (found.phase, found.promoted) == (Phase.UNCONFIRMED, old)
        await eventually(lambda: kernel(world) == {"policy": old.policy})
        assert state(world).quarantine == ()
        done = await world.reached(await world.desire(new, expected=old, rollout="r2"))
        assert (done.phase, done.promoted) == (Phase.PROMOTED, new)


async def test_a_module_that_hangs_does_not_hold_up_the_end_of_the_agent(
    world: World, tmp_path: Path
) -> None:
    target = await world.release("1.0", "hangs-at-stop", policy=1)
    with agent(tmp_path) as process:
        await world.reached(await world.desire(target))
        pid, start = process_of(world)
        process.terminate()
        assert process.wait(60) == 0
        assert proc.started_at(pid) != start


async def test_a_stopped_leftover_of_a_killed_agent_is_ended_by_the_next(
    world: World, tmp_path: Path
) -> None:
    target = await world.release("1.0", policy=1)
    with agent(tmp_path) as process:
        await world.reached(await world.desire(target))
        pid, start = process_of(world)
        os.kill(pid, signal.SIGSTOP)  # it cannot notice that its agent is gone
        process.kill()
        process.wait(60)
        assert proc.started_at(pid) == start
    with agent(tmp_path):
        await eventually(lambda: proc.started_at(pid) != start)

        async def well() -> bool:
            module = await world.module()
            return module is not None and module.health == "ok" and process_of(world)[0] != pid

        await eventually(well)


async def test_a_second_agent_on_the_same_state_is_refused_in_words(world: World, tmp_path: Path) -> None:
    target = await world.release("1.0")
    with agent(tmp_path):
        await world.reached(await world.desire(target))
        command = agent_command(tmp_path / "host.toml")
        second = subprocess.run(command, capture_output=True, timeout=30, check=False)  # noqa: ASYNC221  it is short
        assert second.returncode == 2
        assert b"another agent uses" in second.stderr
        assert b"Traceback" not in second.stderr
