"""One module process: started with only what it may have, spoken to over the ABI, and ended for certain.

The spawner starts it (`spawner`), or this process itself where there is none. It runs in a process group of its own, with no
new privileges, exactly the capabilities that its manifest names, and resource limits; its output goes to a bounded log.
What it says is never trusted further than its frames decode.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused
from loopback.host import proc
from loopback.host.confine import NOFILE
from loopback.host.launch import Launch

HELLO_S: Final = 30.0  # from start to hello; a third of a second, but a good version must not fail on a machine that is busy
REQUEST_S: Final[dict[type, float]] = {
    abi.Configure: 20.0,
    abi.Stage: 30.0,  # and more for a large policy (`supervisor.stage`)
    abi.Fill: 30.0,
    abi.Commit: 10.0,
    abi.Confirm: 10.0,
    abi.Revert: 10.0,
    abi.Health: 3.0,
    abi.Metrics: 3.0,
    abi.Drain: 3.0,
}
MAX_LOG: Final = 512 * 1024  # bytes per file; one older file is kept
LAST_WORDS: Final = 600  # characters of a dead module's log shown in its refusal

log = logging.getLogger("loopback.host")


class Child(Protocol):
    """A started process, whoever started it. `returncode` is None while it runs, and minus the signal that ended it."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int:
        """Until it has ended."""

    def kill_all(self) -> None:
        """End it and its process group."""


#: Starts what a Launch says, with the module's end of the ABI socket and where its output goes. Raises Refused, OSError.
Starter = Callable[[Launch, int, int], Awaitable[Child]]


class DirectChild:
    """A child of this process."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.pid = child.pid
        self._child = child

    @property
    def returncode(self) -> int | None:
        """As in Child."""
        return self._child.returncode

    async def wait(self) -> int:
        """As in Child."""
        return await self._child.wait()

    def kill_all(self) -> None:
        """As in Child."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


async def direct(launch: Launch, abi_end: int, output: int) -> Child:
    """Start it from here, with what `setpriv` and `prlimit` can take from it: for an agent that has no spawner."""
    return DirectChild(
        await asyncio.create_subprocess_exec(
            *confined(launch),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(abi_end,),
            env={**launch.env, abi.FD_VARIABLE: str(abi_end)},
            cwd=launch.cwd,
            start_new_session=True,
        )
    )


class ModuleProcess:
    """A running module. Its tasks live in the group that `start` was given."""

    def __init__(self, launch: Launch, process: Child) -> None:
        self.launch = launch
        self.hello: abi.Hello | None = None
        self.pid = process.pid
        self.pid_start = proc.started_at(process.pid)
        self.exited = asyncio.Event()
        self.on_event: Callable[[abi.Event], None] = lambda event: None
        self._process = process
        self._writer: asyncio.StreamWriter | None = None
        self._greeting: asyncio.Future[abi.Hello] = asyncio.get_running_loop().create_future()
        self._waiting: dict[int, asyncio.Future[abi.Reply]] = {}
        self._next = 0
        self._tail = b""

    @classmethod
    async def start(
        cls, launch: Launch, group: asyncio.TaskGroup, on_event: Callable[[abi.Event], None] | None = None,
        note: Callable[[int, int], None] | None = None, starter: Starter = direct,
    ) -> ModuleProcess:  # fmt: skip
        """Start it and wait for its hello; `note` is given its id and start as soon as it exists.

        Raises Refused: MODULE_START (it cannot be started or ends at once), MODULE_ABI (it speaks something else),
        MODULE_TIMEOUT (it says nothing). Nothing is left running then.
        """
        ours, theirs = socket.socketpair()
        # A pipe of our own: asyncio's would wait for whoever inherited it, long after the module is gone.
        output, written = os.pipe()
        try:
            with theirs:
                process = await starter(launch, theirs.fileno(), written)
        except Refused:
            ours.close()
            os.close(output)
            raise
        except OSError as error:
            ours.close()
            os.close(output)
            raise Refused(
                Code.MODULE_START, f"{launch.module} {launch.version} cannot be started: {error}",
                "look at the manifest's entry",
            ) from None  # fmt: skip
        finally:
            os.close(written)
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        self = cls(launch, process)
        self._writer = writer
        if on_event is not None:
            self.on_event = on_event
        group.create_task(self._serve(reader, output))
        try:
            if note is not None:
                note(self.pid, self.pid_start)
            async with asyncio.timeout(HELLO_S):
                self.hello = await asyncio.shield(self._greeting)
            self._check(self.hello)
        except TimeoutError:
            await self.kill()
            raise Refused(
                Code.MODULE_TIMEOUT, f"{launch.module} {launch.version} said no hello within {HELLO_S:g} s"
            ) from None
        except BaseException:
            await self.kill()
            raise
        return self

    async def request(self, body: abi.Request, timeout_s: float | None = None) -> abi.Done:
        """Ask and wait. Raises Refused with the module's own code, MODULE_TIMEOUT, or MODULE_DIED."""
        verb = type(body).__name__.lower()
        if self.exited.is_set() or self._writer is None:
            raise self.died(verb)
        self._next += 1
        number = self._next
        limit = timeout_s if timeout_s is not None else REQUEST_S.get(type(body), 10.0)
        answer: asyncio.Future[abi.Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(limit):
                self._writer.write(abi.encode(abi.Frame(id=number, body=body)))
                await self._writer.drain()
                reply = await answer
        except TimeoutError:
            raise Refused(
                Code.MODULE_TIMEOUT, f"{self.launch.module} did not answer {verb} within {limit:g} s"
            ) from None
        except ConnectionError:
            raise self.died(verb) from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, abi.Failed):
            raise Refused(known_code(reply.code), f"{verb}: {reply.reason}"[:1000], reply.next_step[:500])
        return reply

    async def health(self) -> abi.HealthReport:
        """Its own word on how it is. Raises Refused like `request`, MODULE_ABI for an answer without one."""
        found = (await self.request(abi.Health())).health
        if found is None:
            raise Refused(Code.MODULE_ABI, f"{self.launch.module} answered health without a report")
        return found

    async def stop(self, *, remove: bool = False) -> None:
        """Drain, stop, and end it for certain. What it left in the kernel stays, unless `remove`.

        Raises Refused where `remove` was asked and it did not say that it had; it is ended all the same.
        """
        refused: Refused | None = None
        try:
            with contextlib.suppress(Refused):
                await self.request(abi.Drain())
            await self.request(abi.Stop(remove=remove), self.launch.stop_s)
        except Refused as error:
            refused = error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.launch.stop_s):
                await self.exited.wait()
        await self.kill()
        if remove and refused is not None:
            raise refused

    async def kill(self) -> None:
        """End the whole process group now, and wait until it has."""
        self._process.kill_all()
        await self.exited.wait()

    def words(self) -> str:
        """The end of its log."""
        return self._tail.decode("utf-8", "replace")[-LAST_WORDS:].strip()

    def _check(self, hello: abi.Hello) -> None:
        launch = self.launch
        if hello.abi != abi.ABI_VERSION:
            raise Refused(
                Code.MODULE_ABI,
                f"{launch.module} {launch.version} speaks ABI {hello.abi}, this agent {abi.ABI_VERSION}",
                "update the agent, or release the module for its ABI",
            )
        if hello.module != launch.module or hello.version not in ("", launch.version):
            raise Refused(
                Code.MODULE_ABI,
                f"{launch.module} {launch.version} says that it is {hello.module[:80]} {hello.version[:80]}",
            )

    async def _serve(self, reader: asyncio.StreamReader, output_fd: int) -> None:
        """Live as long as the process: read frames and output, then clear up."""
        try:
            async with asyncio.TaskGroup() as own:
                frames = own.create_task(self._read_frames(reader))
                output = own.create_task(self._read_output(output_fd))
                await self._process.wait()
                # Children that outlived it would hold the pipe open, and their parent's rights.
                self._process.kill_all()
                await asyncio.wait({frames, output}, timeout=1.0)
                frames.cancel()
                output.cancel()
        finally:
            if self._process.returncode is None:
                self._process.kill_all()
            self.exited.set()
            if self._writer is not None:
                self._writer.close()
            if not self._greeting.done():
                self._greeting.set_exception(self.died("hello", Code.MODULE_START))
                self._greeting.exception()  # whoever waited has it; nobody may be left who does
            for number, answer in list(self._waiting.items()):
                if not answer.done():
                    answer.set_exception(self.died(f"request {number}"))

    async def _read_frames(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                body = await reader.readexactly(abi.length_of(await reader.readexactly(4)))
                self._take(body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it closed its end; whether it died says its exit
        except Refused as refused:
            if not self._greeting.done():
                self._greeting.set_exception(refused)
            log.error("%s: %s", self.launch.module, refused)
            self._process.kill_all()

    def _take(self, body: bytes) -> None:
        try:
            frame = abi.decode(body)
        except Refused:
            if abi.id_of(body) != 0:
                raise
            return  # an event of a verb that this agent does not know yet
        match frame.body:
            case abi.Hello() if not self._greeting.done():
                self._greeting.set_result(frame.body)
            case abi.Event():
                self.on_event(frame.body)
            case abi.Done() | abi.Failed():
                answer = self._waiting.get(frame.id)
                if answer is not None and not answer.done():
                    answer.set_result(frame.body)
            case _:
                raise Refused(Code.MODULE_ABI, f"a module does not send {type(frame.body).__name__.lower()}")

    async def _read_output(self, descriptor: int) -> None:
        stream = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(stream)
        pipe = os.fdopen(descriptor, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        with contextlib.closing(transport):
            await self._log(stream)

    async def _log(self, stream: asyncio.StreamReader) -> None:
        written = 0
        with contextlib.suppress(OSError):
            written = self.launch.log.stat().st_size
        while data := await stream.read(64 * 1024):
            self._tail = (self._tail + data)[-4096:]
            try:
                if written > MAX_LOG:
                    self.launch.log.replace(self.launch.log.with_name(self.launch.log.name + ".1"))
                    written = 0
                with self.launch.log.open("ab") as file:
                    written += file.write(data)
            except OSError as error:  # a full disk must not stop the module
                log.debug("%s: its log cannot be written: %s", self.launch.module, error)

    def died(self, doing: str = "", code: Code = Code.MODULE_DIED) -> Refused:
        """That it ended, how, and its last words."""
        status = self._process.returncode
        how = f"exit status {status}" if status is None or status >= 0 else f"signal {-status}"
        words = self.words()
        return Refused(
            code,
            f"{self.launch.module} {self.launch.version} ended ({how})"
            + (f" before it answered {doing}" if doing else "")
            + (f": {words}" if words else ""),
            f"see {self.launch.log}",
        )


def known_code(code: str) -> Code:
    """A module's code, where it is one of ours."""
    try:
        return Code(code)
    except ValueError:
        return Code.MODULE_UNHEALTHY


def confined(launch: Launch) -> list[str]:
    """The command line that gives up everything the module may not have, then becomes the module."""
    setpriv, prlimit = shutil.which("setpriv"), shutil.which("prlimit")
    command: list[str] = []
    if setpriv is None:
        log.warning("setpriv is missing: %s keeps the agent's privileges", launch.module)
    else:
        command += [setpriv, "--no-new-privs"]
        if os.geteuid() == 0:
            names = "".join(f",+{c.removeprefix('CAP_').lower()}" for c in launch.capabilities)
            command += [
                f"--bounding-set=-all{names}",
                f"--inh-caps=-all{names}",
                f"--ambient-caps=-all{names}",
            ]
        elif launch.capabilities:
            log.warning("the agent is not root: %s gets no capability", launch.module)
    if prlimit is not None:
        # Private data, not address space: the eBPF libraries map hundreds of MiB that they never touch.
        data = launch.memory_mib * 1024 * 1024
        command += [prlimit, f"--data={data}", f"--nofile={NOFILE}", "--core=0", "--"]
    return [*command, *launch.argv]
