"""A stolen agent writes to the spawner's socket itself: frames that are no requests, and requests that no agent makes.

Each attack is first made on a spawner with the one check removed, and gets through; then on the spawner as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import eventually
from support_spawner import Disk, Probe

from loopback.contracts.codes import Code, Refused
from loopback.host import spawner_client
from loopback.host.spawner import MAX_MESSAGE
from loopback.host.spawner_client import SpawnerClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to steal")

#: A module that tells that it is there, and stays until its end of the ABI socket is closed.
STAYS = "tell(); socket.socket(fileno=3).recv(1)"
WHO = 'found["by"] = "the attacker"; tell()'

#: Takes out what catches a request that makes no sense.
NOTHING_CAUGHT = """
import msgspec
from loopback.host import spawner
class Nothing(Exception): pass
msgspec.MsgspecError = spawner.RecursionError = Nothing
"""
#: Takes whoever's process for one of its own.
EVERYBODYS = """
from loopback.host import spawner
class Everybody(dict):
    def __contains__(self, pid): return True
    def __missing__(self, pid): return spawner.Child("", -1, ())
begin = spawner.Spawner.__init__
def began(self, *arguments):
    begin(self, *arguments)
    self.children = Everybody()
spawner.Spawner.__init__ = began
"""
#: Keeps whatever comes with a request.
KEEPS = """
import os
import signal
from loopback.host import spawner
received, receive, close = set(), spawner.socket.recv_fds, os.close
def recv_fds(*arguments):
    found = receive(*arguments)
    received.update(found[1])
    return found
spawner.socket.recv_fds = recv_fds
os.close = lambda descriptor: None if descriptor in received else close(descriptor)
"""
#: No defence, but a surrounding in which the attack needs no minutes: few descriptors, as few modules.
SMALL = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
"""
FEW = "from loopback.host import spawner\nspawner.MAX_RUNNING = 3\n"
ANY_NAME = "from loopback.host import sealed\nsealed.is_digest = lambda text: True\n"

GARBAGE = {
    "zeros": b"\0" * 100,
    "half": b"{",
    "another shape": b"[]",
    "not UTF-8": b'{"type":"\xff"}',
    "another type": b'{"type":"stop"}',
    "fields missing": b'{"type":"start"}',
    "another kind of value": b'{"type":"end","pid":"1"}',
    "too deep": b'{"type":"end","pid":1,"x":' + b"[" * (MAX_MESSAGE // 3) + b"]" * (MAX_MESSAGE // 3) + b"}",
    "too long": b'{"type":"prepare"}' + b" " * MAX_MESSAGE + b"x",
}


class Victim(Disk):
    """A host with an honest module that stays, and another that can be started to see whether anything still can."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.stays, self.other = self.signed(STAYS), self.signed(WHO, version="2.0")

    @asynccontextmanager
    async def running(self, without: str = "") -> AsyncIterator[tuple[SpawnerClient, Probe]]:
        """A spawner with the honest module."""
        async with self.spawner(without) as client:
            with contextlib.closing(await self.run(client, self.stays)) as probe:
                await probe.line()
                yield client, probe

    async def serves(self, client: SpawnerClient) -> bool:
        """It starts another module, after everything that was sent before."""
        return await self.found(client, self.other) == {"by": "the attacker"}


@pytest.mark.parametrize("shape", GARBAGE)
async def test_a_frame_that_makes_no_sense_ends_neither_the_spawner_nor_a_module(
    tmp_path: Path, shape: str
) -> None:
    disk = Victim(tmp_path)
    async with disk.running(NOTHING_CAUGHT) as (client, probe):
        client.sock.send(GARBAGE[shape])
        await asyncio.wait_for(client.lost.wait(), 60)
        assert await asyncio.wait_for(probe.child.wait(), 60) != 0, "nothing is enforced any more"
    async with disk.running() as (client, probe):
        for _ in range(20):
            await asyncio.get_running_loop().sock_sendall(client.sock, GARBAGE[shape])
        assert await disk.serves(client)
        assert probe.child.returncode is None
        assert not client.lost.is_set()


async def test_a_spawner_that_takes_nothing_for_a_while_loses_no_request(tmp_path: Path) -> None:
    disk = Victim(tmp_path)
    async with disk.running() as (client, probe):
        os.kill(client.pid, signal.SIGSTOP)
        try:
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.sock.send(GARBAGE["zeros"])
            asked = asyncio.create_task(disk.serves(client))
            await asyncio.sleep(0)  # its first turn asks
            probe.child.kill_all()
            assert len(client._waiting) == 2, "neither was taken"
        finally:
            os.kill(client.pid, signal.SIGCONT)
        assert await asked
        assert await asyncio.wait_for(probe.child.wait(), 60) != 0, "its end was asked for, too"
        assert not client.lost.is_set()
    client.prepare()  # when it is gone, that is no error


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that root started, and nobody's module."""
    found = subprocess.Popen(["/bin/sleep", "300"], start_new_session=True)
    yield found
    found.kill()
    found.wait()


async def test_a_request_to_end_a_process_that_is_no_module_is_not_followed(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    disk = Victim(tmp_path)
    asks = msgspec.json.encode({"type": "end", "pid": sleeper.pid})
    async with disk.running() as (client, probe):
        client.sock.send(asks)
        assert await disk.serves(client)
        assert sleeper.poll() is None
        assert probe.child.returncode is None
    async with disk.running(EVERYBODYS) as (client, _):
        client.sock.send(asks)
        assert await eventually(sleeper.poll) == -9, "without the defence, the attack reaches its target"


async def test_descriptors_that_come_with_garbage_do_not_fill_the_spawner_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Victim(tmp_path)

    def flood(client: SpawnerClient) -> None:
        client.sock.setblocking(True)
        for _ in range(40):
            socket.send_fds(client.sock, [b"{}"], [0, 0, 0, 0])
        client.sock.setblocking(False)

    async with disk.running(SMALL + KEEPS) as (client, _):
        flood(client)
        monkeypatch.setattr(spawner_client, "START_S", 3.0)
        with pytest.raises(Refused) as caught:
            await disk.serves(client)
        assert caught.value.code is Code.MODULE_START, "it can start nothing any more"
    monkeypatch.undo()
    async with disk.running(SMALL) as (client, probe):
        flood(client)
        assert await disk.serves(client)
        assert probe.child.returncode is None


async def test_a_package_that_is_named_by_a_path_is_not_run_from_where_the_agent_can_write(
    tmp_path: Path,
) -> None:
    """The agent puts its own code, with a seal of its own, into the folder that is its own, and names the way there."""
    disk = Disk(tmp_path)
    mine = disk.unpack(WHO)
    forged = disk.config.state_dir / "forged" / mine.package
    shutil.copytree(disk.folder(mine), forged)
    forged.with_name(f"{mine.package}.json").write_bytes(b'{"signers":[]}')
    named = msgspec.structs.replace(mine, package=f"../{disk.config.state_dir.name}/forged/{mine.package}")
    async with disk.spawner(ANY_NAME) as client:
        assert (await disk.found(client, named))["by"] == "the attacker"
    async with disk.spawner() as client:
        with pytest.raises(Refused) as caught:
            await disk.run(client, named)
        assert caught.value.code is Code.PACKAGE_DIGEST


@pytest.mark.parametrize("module", ["../../probe", "probe/../probe", "PROBE", ""])
async def test_a_module_that_is_named_by_a_path_is_not_allowed_anywhere(tmp_path: Path, module: str) -> None:
    """Only the names in the owner's own list are names: see `test_power_stolen_agent` for a list that allows everything."""
    disk = Victim(tmp_path)
    named = msgspec.structs.replace(disk.other, module=module)
    async with disk.spawner() as client:
        with pytest.raises(Refused) as caught:
            await disk.run(client, named)
        assert caught.value.code is Code.HOST_NOT_ALLOWED
        assert await disk.serves(client)


async def test_more_modules_than_may_run_are_not_started(tmp_path: Path) -> None:
    async def start(client: SpawnerClient, number: int) -> tuple[int, Code | None]:
        """How many of so many run at once, and why no more."""
        with contextlib.ExitStack() as stack:
            probes: list[Any] = []
            for _ in range(number):
                try:
                    probes.append(await disk.run(client, disk.stays))
                except Refused as refused:
                    return len(probes), Code(refused.code)
                stack.callback(probes[-1].close)
            return len(probes), None

    disk = Victim(tmp_path)
    async with disk.spawner(FEW.replace("3", "10**9")) as client:
        assert await start(client, 6) == (6, None)
    async with disk.spawner(FEW) as client:
        assert await start(client, 6) == (3, Code.MODULE_START)
