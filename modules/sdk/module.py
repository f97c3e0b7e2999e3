"""The base class of a Python module, and the loop that serves it over the ABI."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import tomllib
from collections import deque
from pathlib import Path
from typing import ClassVar, Final

from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused

MAX_EVENTS: Final = (
    256  # events waiting to be sent; older ones give way, so a slow agent never stops a module
)
STOP_S: Final = 5.0  # seconds that a module gets to end by itself once the agent has gone
_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h

log = logging.getLogger("loopback.module")


def package_dir() -> Path:
    """The folder of this version's unpacked package, where `module.toml` and eBPF objects lie."""
    return Path(os.environ.get("LOOPBACK_PACKAGE_DIR", "."))


class Module:
    """One module. Override what you need; every method may raise `Refused`, and then nothing must have changed.

    `name` is the module's name. `adopted` and `policy` (the enforced policy's digest) are set by `configure` where it
    found its programs in the kernel and took them over; the SDK reports both.
    """

    name: ClassVar[str] = ""
    adopted: bool = False
    policy: str | None = None

    def __init__(self) -> None:
        self.dropped_events = 0
        self._events: deque[abi.Event] = deque(maxlen=MAX_EVENTS)
        self._wake = asyncio.Event()

    async def configure(self, request: abi.Configure) -> None:
        """Learn where it is, take over what is in the kernel already. Comes once, first."""

    async def stage(self, request: abi.Stage) -> dict[str, str]:
        """Prepare a policy without any effect. What is returned is shown to operators."""
        return {}

    async def fill(self, request: abi.Fill) -> dict[str, str]:
        """Prepare other contents of sets, for a module whose policies have any."""
        raise Refused(Code.MODULE_ABI, f"{self.name} has no sets")

    async def commit(self, request: abi.Commit) -> None:
        """Switch to the staged policy, on trial."""

    async def confirm(self, request: abi.Confirm) -> None:
        """Keep what was committed."""

    async def revert(self, request: abi.Revert) -> None:
        """Return to what held before the commit; harmless when nothing was committed."""

    async def health(self) -> abi.HealthReport:
        """How it is. Asked every few seconds, also while another request is being worked on."""
        return abi.HealthReport(state="ok", policy=self.policy)

    async def metrics(self) -> dict[str, float]:
        """Counters by Prometheus name. Asked also while another request is being worked on."""
        return {}

    async def drain(self) -> None:
        """Take no new work; a stop follows."""

    async def stop(self, *, remove: bool) -> None:
        """End. What enforces stays in the kernel, unless `remove`. Also called when the agent has vanished."""

    def event(self, kind: str, **attributes: str | int | float | bool) -> None:
        """Tell the agent that something happened. Never blocks: the oldest of too many is dropped and counted."""
        if len(self._events) == MAX_EVENTS:
            self.dropped_events += 1
        self._events.append(abi.Event(kind=kind, attributes=attributes))
        self._wake.set()


def run(module: Module | type[Module]) -> None:
    """Serve one module until it is stopped or its agent goes away. Call it from `__main__`; a class is made here.

    Raises SystemExit naming the variable where the process was not started by an agent.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    number = os.environ.get(abi.FD_VARIABLE, "")
    if not number.isdigit():
        raise SystemExit(f"{abi.FD_VARIABLE} is not set: a module is started by the agent, not by hand")
    # What a module holds in memory goes into no core file, also where a kernel pipes these past the limit that it has.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    with socket.socket(fileno=int(number)) as sock:
        sock.setblocking(False)
        asyncio.run(serve(module, sock))


async def serve(module: Module | type[Module], sock: socket.socket) -> None:
    """The same on a given socket, inside a running loop; returns when the module has ended."""
    made = module() if isinstance(module, type) else module
    reader, writer = await asyncio.open_connection(sock=sock)
    session = _Session(made, reader, writer)
    try:
        await session.run()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class _Session:
    """The conversation with the agent: lifecycle requests one after another, health and metrics beside them."""

    def __init__(self, module: Module, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.module = module
        self.reader = reader
        self.writer = writer
        self.order = asyncio.Lock()
        self.ended = asyncio.Event()
        self.stopped = False

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only the main thread may take signals; tests serve a module inside their own loop.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self.ended.set)
        await self.send(0, _hello(self.module))
        async with asyncio.TaskGroup() as group:
            receiver = group.create_task(self.receive())
            events = group.create_task(self.send_events())
            await self.ended.wait()
            receiver.cancel()
            events.cancel()
        if not self.stopped:
            # The agent vanished, or a signal came: leave the kernel enforcing.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self.module.stop(remove=False)

    async def receive(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    frame = await read_frame(self.reader)
                    if frame is None:
                        break
                    group.create_task(self.answer(frame))
                self.ended.set()
        except* (OSError, Refused) as group_error:
            log.error("the agent's frames make no sense or the socket broke: %s", group_error.exceptions[0])
            self.ended.set()

    async def answer(self, frame: abi.Frame) -> None:
        body = frame.body
        try:
            if isinstance(body, abi.Health | abi.Metrics):
                reply: abi.Reply = await self.perform(body)
            else:
                async with self.order:
                    reply = await self.perform(body)
        except Refused as refused:
            reply = abi.Failed(code=refused.code, reason=refused.reason, next_step=refused.next_step)
        except Exception as error:  # a module's own mistake becomes an answer, not a silent death
            log.exception("%s failed", type(body).__name__.lower())
            reason = f"{type(body).__name__.lower()} raised {type(error).__name__}: {error}"
            reply = abi.Failed(code=Code.MODULE_UNHEALTHY, reason=reason)
        await self.send(frame.id, reply)
        if self.stopped:
            self.ended.set()

    async def perform(self, body: abi.Body) -> abi.Reply:
        module = self.module
        match body:
            case abi.Configure():
                await module.configure(body)
                return abi.Done(
                    detail={"adopted": "true" if module.adopted else "false", "policy": module.policy or ""}
                )
            case abi.Stage():
                return abi.Done(detail=await module.stage(body))
            case abi.Fill():
                return abi.Done(detail=await module.fill(body))
            case abi.Commit():
                await module.commit(body)
            case abi.Confirm():
                await module.confirm(body)
            case abi.Revert():
                await module.revert(body)
            case abi.Health():
                return abi.Done(health=await module.health())
            case abi.Metrics():
                own = {"loopback_module_events_dropped_total": float(module.dropped_events)}
                return abi.Done(metrics=own | await module.metrics())
            case abi.Drain():
                await module.drain()
            case abi.Stop():
                await module.stop(remove=body.remove)
                self.stopped = True
            case _:
                return abi.Failed(
                    code=Code.MODULE_ABI, reason=f"{type(body).__name__.lower()} is not a request"
                )
        return abi.Done()

    async def send(self, frame_id: int, body: abi.Body) -> None:
        try:
            self.writer.write(abi.encode(abi.Frame(id=frame_id, body=body)))
            await self.writer.drain()
        except ConnectionError:
            self.ended.set()

    async def send_events(self) -> None:
        module = self.module
        while True:
            await module._wake.wait()
            module._wake.clear()
            while module._events:
                await self.send(0, module._events.popleft())


async def read_frame(reader: asyncio.StreamReader) -> abi.Frame | None:
    """The next frame; None at the end. A verb that this SDK does not know comes back as an `Event` of kind "unknown".

    Raises Refused(MODULE_ABI) for a frame that is over the limit.
    """
    try:
        body = await reader.readexactly(abi.length_of(await reader.readexactly(4)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return decode_lenient(body)


def decode_lenient(body: bytes) -> abi.Frame:
    """Decode a frame; one whose id is readable but whose body is not becomes an unanswerable request with that id.

    The ABI grows by verbs, so an unknown one must be answered with Failed rather than end the conversation.
    Raises Refused(MODULE_ABI) where not even the id can be read.
    """
    try:
        return abi.decode(body)
    except Refused:
        return abi.Frame(id=abi.id_of(body), body=abi.Event(kind="unknown"))


def _hello(module: Module) -> abi.Hello:
    name, version = module.name, ""
    manifest = package_dir() / "module.toml"
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError, TypeError):
        section = tomllib.loads(manifest.read_text())["module"]
        name, version = name or str(section["name"]), str(section["version"])
    return abi.Hello(
        module=name, version=version, abi=abi.ABI_VERSION, adopted=module.adopted, policy=module.policy
    )
