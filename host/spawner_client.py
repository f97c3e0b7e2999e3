"""The agent's end of the spawner: starts it while there are privileges, gives them up, and asks it for modules after that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.host import confine, process, seccomp
from loopback.host.config import HostConfig
from loopback.host.launch import Launch
from loopback.host.reach import agent_reach
from loopback.host.spawner import MAX_MESSAGE, Answer, End, Ended, NotStarted, Prepare, Ready, Start, Started

READY_S: Final = 20.0  # for its first word; it has imports and a control group to make, about 0.1 s
START_S: Final = 60.0  # for an answer; a first start has signatures checked and a copy made, under a second
STOP_S: Final = 20.0  # for its end, once the agent has closed its socket

log = logging.getLogger("loopback.host")
_ANSWER = msgspec.json.Decoder(Answer)


class SpawnedChild:
    """A process that the spawner started: what `ModuleProcess` needs of it."""

    def __init__(self, client: SpawnerClient, pid: int, start: int) -> None:
        self.pid = pid
        self.start = start
        self.returncode: int | None = None
        self._client = client
        self._ended = asyncio.Event()

    async def wait(self) -> int:
        """Until it has ended; its exit status, or minus the signal."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def kill_all(self) -> None:
        """End it and everything that it started."""
        if self.returncode is None:
            self._client.send(End(self.pid))

    def ended(self, status: int) -> None:
        """The spawner's word that it has."""
        self.returncode = status
        self._ended.set()


class _Request(NamedTuple):
    """One message to the spawner, and the descriptors that go with it."""

    data: bytes
    descriptors: tuple[int, ...] = ()


class SpawnerClient:
    """One spawner, from `begin` on. `lost` is set when it is gone: then nothing can be started any more."""

    def __init__(self, sock: socket.socket, child: subprocess.Popen[bytes]) -> None:
        self.sock = sock
        self.pid = child.pid
        self.lost = asyncio.Event()
        self.holds: tuple[str, ...] = ()
        self._child = child
        self._number = 0
        self._asked: dict[int, asyncio.Future[Started | NotStarted]] = {}
        self._children: dict[int, SpawnedChild] = {}
        self._early: dict[int, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[_Request] = deque()

    @classmethod
    def begin(
        cls, path: Path, config: HostConfig, program: tuple[str, ...] = ("-m", "loopback.host.spawner")
    ) -> SpawnerClient:
        """Start the spawner with the caller's privileges; `path` is the host.toml, `program` what Python is to run.

        Raises Refused(MODULE_START).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            child = subprocess.Popen(
                [
                    sys.executable, "-P", *program, str(theirs.fileno()), str(path.absolute()), str(config.state_dir),
                ],
                stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True,
                # Nothing of the caller's surroundings: they could name other code to load.
                env={"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "LANG": "C.UTF-8"},
            )  # fmt: skip
        self = cls(ours, child)
        ready, _, _ = select.select([ours], [], [], READY_S)
        data = ours.recv(MAX_MESSAGE) if ready else b""
        if not data:
            child.kill()
            child.wait()
            ours.close()
            raise Refused(
                Code.MODULE_START, "the spawner of modules did not start", "see what it said before this"
            )
        first = _ANSWER.decode(data)
        assert isinstance(first, Ready)
        self.holds = first.holds
        for words in first.lacks:
            log.warning("modules are held by less than they could be: %s", words)
        ours.setblocking(False)
        return self

    def listen(self) -> None:
        """Take its answers in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.sock, self._arrived)

    async def start(self, spec: Launch, abi_end: int, output: int) -> SpawnedChild:
        """Have a module started. Raises Refused with the spawner's word, or MODULE_START where it has none."""
        self._number += 1
        number = self._number
        answer: asyncio.Future[Started | NotStarted] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        request = _Request(
            msgspec.json.encode(Start(number, spec.module, spec.version, spec.package)), (abi_end, output)
        )
        try:
            self._put(request)
            async with asyncio.timeout(START_S):
                found = await answer
        except (OSError, TimeoutError) as error:
            raise Refused(
                Code.MODULE_START, f"the spawner gives no answer: {error or 'it took too long'}", "start the agent again"
            ) from None  # fmt: skip
        finally:
            self._asked.pop(number, None)
            if request in self._waiting:
                self._waiting.remove(request)  # its descriptors may be somebody else's soon
        if isinstance(found, NotStarted):
            raise Refused(process.known_code(found.code), found.reason, found.next_step)
        if found.lacks:
            log.warning("%s runs without %s", spec.module, ", ".join(found.lacks))
        child = SpawnedChild(self, found.pid, found.start)
        if found.pid in self._early:
            child.ended(self._early.pop(found.pid))
        else:
            self._children[found.pid] = child
        return child

    def prepare(self) -> None:
        """Say that a version is on its way that was never started here, which saves its first start a quarter of a second."""
        self.send(Prepare())

    def send(self, request: End | Prepare) -> None:
        """Ask for something that has no answer of its own."""
        with contextlib.suppress(OSError):
            self._put(_Request(msgspec.json.encode(request)))

    def _put(self, request: _Request) -> None:
        if self.lost.is_set():
            raise OSError("it is gone")
        # a spawner that is busy takes nothing for a while, and no request may be lost for that, least of all an End
        self._waiting.append(request)
        if len(self._waiting) == 1:
            self._flush()

    def _flush(self) -> None:
        loop = self._loop or asyncio.get_running_loop()
        try:
            while self._waiting:
                data, descriptors = self._waiting[0]
                socket.send_fds(self.sock, [data], descriptors)
                self._waiting.popleft()
        except BlockingIOError:
            loop.add_writer(self.sock, self._writable)
            return
        except OSError:
            self._waiting.clear()
            loop.remove_writer(self.sock)
            raise
        loop.remove_writer(self.sock)

    def _writable(self) -> None:
        try:
            self._flush()
        except OSError as error:
            self._gone(str(error))

    async def close(self) -> None:
        """Let it end: it first ends what still runs."""
        self._gone("the agent ends")
        self.sock.close()
        try:
            await asyncio.to_thread(self._child.wait, STOP_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):
                self._child.kill()

    def _arrived(self) -> None:
        try:
            data = self.sock.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone("it ended")
            return
        match _ANSWER.decode(data):
            case Started() | NotStarted() as answer:
                waiting = self._asked.get(answer.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
                elif isinstance(answer, Started):
                    self.send(End(answer.pid))  # nobody waits for it any more
            case Ended() as answer:
                child = self._children.pop(answer.pid, None)
                if child is not None:
                    child.ended(answer.status)
                elif self._asked:
                    self._early[answer.pid] = answer.status

    def _gone(self, why: str) -> None:
        if self.lost.is_set():
            return
        self.lost.set()
        if self._loop is not None:
            self._loop.remove_reader(self.sock)
            self._loop.remove_writer(self.sock)
        self._waiting.clear()
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.set_exception(OSError(why))
        for child in self._children.values():
            # Its socket is closed with this process, and the kernel ends it with the spawner.
            child.ended(-signal.SIGKILL)
        self._children.clear()


def give_up(config: HostConfig) -> tuple[str, ...]:
    """Have no privileges any more, in this process and all that it starts; what could not be given up, in words.

    Raises Refused(MODULE_START) where there are other threads already, which would keep theirs.
    """
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise Refused(Code.MODULE_START, "privileges cannot be given up: other threads run already")
    lacks = []
    # Libraries want a place for temporary files, and /tmp is everybody's.
    scratch = config.state_dir / "tmp"
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    confine.keep_only((), ambient=False)
    confine.no_new_privileges()
    if not confine.fence(agent_reach(config)):
        lacks.append("the agent may write to any file of its user: this kernel has no Landlock")
    program = seccomp.program(frozenset(), modes=True)  # it gives what it unpacks the modes that are signed
    if program is None:
        lacks.append("the agent has no system-call filter: libseccomp.so.2 is missing")
    else:
        confine.filter_calls(program)
    for words in lacks:
        log.warning("%s", words)
    return tuple(lacks)
