"""A word with a running agent on its own machine: who may ask, and what is not answered where the workspace is regulated."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from support import Place, eventually
from support_host import WORKSPACE, World

from loopback.contracts.codes import Code, Refused
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.host import control
from loopback.host.agent import Agent
from loopback.host.config import write_config
from loopback.host.control import Answer, AskLog, AskStacks, AskStatus, Request, SetLevel

pytestmark = pytest.mark.broker

DEBUGGING: tuple[Request, ...] = (AskStacks(), SetLevel("debug"), AskLog("tiny"))


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    yield World(broker, tmp_path)


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    logger = logging.getLogger("loopback")
    before = logger.level
    yield
    logger.setLevel(before)


@asynccontextmanager
async def running(world: World) -> AsyncIterator[Agent]:
    listening = control.listen(world.config.state_dir)
    assert listening is not None
    agent = Agent(world.config, listening=listening)
    task = asyncio.get_running_loop().create_task(agent.run())
    try:
        await eventually(lambda: control_answers(world))
        yield agent
    finally:
        agent.stop()
        await task


async def control_answers(world: World) -> bool:
    try:
        found = (await ask(world, AskStatus())).status
    except Refused:
        return False
    return found is not None and found.connected and found.trust > 0


async def ask(world: World, request: Request) -> Answer:
    return await asyncio.to_thread(control.ask, world.config.state_dir, request)


async def refused(world: World, request: Request) -> Code | None:
    try:
        await ask(world, request)
    except Refused as refusal:
        return refusal.code
    return None


def regulate(world: World, regulated: bool) -> None:
    rules = {WORKSPACE: WorkspaceRules(regulated=regulated)}
    world.signers.document = msgspec.structs.replace(world.signers.document, workspaces=rules)


async def test_the_agent_says_how_it_is_and_what_it_does(world: World) -> None:
    await world.prepare()
    target = await world.release("1.0", policy=1)
    async with running(world):
        await world.reached(await world.desire(target))
        found = (await ask(world, AskStatus())).status
        assert found is not None
        assert (found.host, found.connected, found.regulated, found.generation) == (
            world.host,
            True,
            False,
            1,
        )
        assert [m.promoted for m in found.modules] == [target]
        stacks = (await ask(world, AskStacks())).text
        assert "_reconcile_all" in stacks
        assert "thread MainThread" in stacks
        assert "debug" in (await ask(world, SetLevel("debug"))).text
        assert logging.getLogger("loopback").level == logging.DEBUG
        said = world.config.state_dir / "modules" / "tiny" / "log"
        said.write_text("x" * control.LOG_TAIL + "the end\n")
        assert (await ask(world, AskLog("tiny"))).text[-9:] == "xthe end\n"
        assert await refused(world, AskLog("../../tiny")) == Code.PACKAGE_UNKNOWN
    assert await refused(world, AskStatus()) == Code.HOST_LOST
    assert not (world.config.state_dir / control.NAME).exists()


async def test_nobody_debugs_an_agent_in_a_regulated_workspace(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    regulate(world, True)
    await world.prepare()
    async with running(world) as agent:
        agent.states["tiny"] = agent.store.module("tiny").read()
        with monkeypatch.context() as lenient:
            lenient.setattr(control.Control, "_debugging", lambda self: None)
            for request in DEBUGGING:
                assert await refused(world, request) is None
        for request in DEBUGGING:
            assert await refused(world, request) == Code.HOST_DEBUG_OFF
        found = (await ask(world, AskStatus())).status
        assert found is not None
        assert found.regulated is True


async def test_while_nobody_is_trusted_yet_debugging_is_off(world: World) -> None:
    await world.prepare()
    async with running(world) as agent:
        agent.trust.trust = None
        assert await refused(world, AskStacks()) == Code.HOST_DEBUG_OFF
        found = (await ask(world, AskStatus())).status
        assert found is not None
        assert (found.regulated, found.trust) == (None, 0)


async def test_the_socket_is_its_users_alone(world: World) -> None:
    await world.prepare()
    path = world.config.state_dir / control.NAME
    async with running(world):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        if os.geteuid() != 0:
            pytest.skip("only root can become another user")
        # Even where somebody opened file and folder to everybody, the kernel says who asks.
        path.chmod(0o666)
        path.parent.chmod(0o711)
        answers = [await asyncio.to_thread(answered_as, uid, path.parent) for uid in (0, 65534)]
        assert answers == ["4 bytes", "nothing"]


def answered_as(uid: int, folder: Path) -> str:
    """What another user hears who reaches the socket."""
    script = (
        "import os, socket, struct, sys\n"
        "folder, uid = os.open(sys.argv[1], os.O_PATH), int(sys.argv[2])\n"
        "os.setresgid(uid, uid, uid)\n"
        "os.setresuid(uid, uid, uid)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.settimeout(60)\n"
        's.connect(f"/proc/self/fd/{folder}/agent.sock")\n'
        'data = b\'{"type":"status"}\'\n'
        "try:\n"
        '    s.sendall(struct.pack("!I", len(data)) + data)\n'
        "    got = len(s.recv(4))\n"
        "except OSError:\n"
        "    got = 0\n"
        'print(f"{got} bytes" if got else "nothing")\n'
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(folder), str(uid)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def test_what_is_no_request_or_comes_in_a_crowd_costs_nothing(world: World) -> None:
    await world.prepare()
    async with running(world):
        for data in (
            b"",
            b"\xff\xff\xff\xff",
            b"\0\0\0\x02[]",
            b"\0\0\0\x05[[[[[",
            b'\0\0\0\x11{"type":"reboot"}',
        ):
            with control._short(world.config.state_dir) as path, socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(60)
                await asyncio.to_thread(sock.connect, path)
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                answer = await asyncio.to_thread(sock.recv, 65536)
            if data and data[0] == 0:
                (length,) = struct.unpack("!I", answer[:4])
                assert json.loads(answer[4 : 4 + length])["refusal"]["code"] == Code.COMMAND_MALFORMED
            else:
                assert answer == b""
        assert (await ask(world, AskStatus())).status is not None


async def test_a_second_agent_does_not_take_the_first_ones_socket(world: World) -> None:
    await world.prepare()
    async with running(world):
        assert await asyncio.to_thread(control.listen, world.config.state_dir) is None
        assert (await ask(world, AskStatus())).status is not None


async def test_whoever_was_killed_leaves_a_socket_that_the_next_one_replaces(world: World) -> None:
    await world.prepare()
    left = control.listen(world.config.state_dir)
    assert left is not None
    left.close()
    assert (world.config.state_dir / control.NAME).exists()
    async with running(world):
        assert (await ask(world, AskStatus())).status is not None


async def test_the_command_asks_the_process_that_loopback_host_run_started(
    world: World, tmp_path: Path
) -> None:
    await world.prepare()
    path = tmp_path / "host.toml"
    write_config(world.config, path)
    loopback = [str(Path(sys.executable).with_name("loopback")), "host"]
    agent = await asyncio.create_subprocess_exec(
        *loopback,
        "run",
        "--config",
        str(path),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def ctl(*words: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *loopback, "ctl", *words, "--config", str(path),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def trusted() -> bool:
        code, out, _ = await ctl("status")
        return code == 0 and json.loads(out)["trust"] > 0

    try:
        await eventually(trusted)
        code, out, _ = await ctl("stacks")
        assert (code, "_reconcile_all" in out) == (0, True)
        code, out, err = await ctl("module-log", "none")
        assert (code != 0, out, "has no module 'none'" in err) == (True, "", True)
        assert (await ctl("log-level", "loud"))[0] == 2
    finally:
        agent.terminate()
        await agent.wait()
    code, _, err = await ctl("status")
    assert (code != 0, "no agent answers" in err, "Traceback" in err) == (True, True, False)
