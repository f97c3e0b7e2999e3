"""A word with a running agent on its own machine: `STATE_DIR/agent.sock`, behind `loopback host ctl`.

Each connection is one request and one answer, both JSON behind four bytes of length (big-endian). Whoever asks must be root
or the agent's own user, by the kernel's word (SO_PEERCRED). `status` is always answered. What looks inside, or changes
what is logged, is for debugging: where the workspace is regulated, or nobody knows yet whether it is, it is refused with
`host.debug-off`. That keeps people from it, not a stolen root, who needs no socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.reports import ModuleStatus
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.host.state import Store

NAME: Final = "agent.sock"
MAX_REQUEST: Final = 4 * 1024  # bytes; one has under 100
MAX_ANSWER: Final = 1024 * 1024  # bytes; a status has at most 160 KiB
MAX_CLIENTS: Final = 4  # at one time; further ones are closed at once
DEADLINE_S: Final = 5.0  # for one request and its answer
LOG_TAIL: Final = 64 * 1024  # bytes of a module's log that are shown
_LENGTH: Final = struct.Struct("!I")
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid

log = logging.getLogger("loopback.host")

Level = Literal["debug", "info", "warning", "error"]


class AskStatus(msgspec.Struct, frozen=True, tag="status", forbid_unknown_fields=True):
    """How the agent is."""


class AskStacks(msgspec.Struct, frozen=True, tag="stacks", forbid_unknown_fields=True):
    """What every task and thread of the agent is doing."""


class SetLevel(msgspec.Struct, frozen=True, tag="log-level", forbid_unknown_fields=True):
    """Log this much, until the agent starts again."""

    level: Level


class AskLog(msgspec.Struct, frozen=True, tag="module-log", forbid_unknown_fields=True):
    """The end of what a module said on its output."""

    module: str


Request = AskStatus | AskStacks | SetLevel | AskLog


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The agent as it knows itself. `regulated` is None and `trust` 0 while no trust document was verified."""

    host: str
    workspace: str
    incarnation: str
    generation: int
    connected: bool
    trust: int
    regulated: bool | None
    refusal: Refusal | None
    modules: tuple[ModuleStatus, ...]


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """To `status` a status, to the others text; a refusal instead of either."""

    status: AgentStatus | None = None
    text: str = ""
    refusal: Refusal | None = None


_REQUESTS: Final[Decoder[Request]] = Decoder(msgspec.json.Decoder(Request))
_ANSWERS: Final = Decoder(msgspec.json.Decoder(Answer))


class Control:
    """Answers on a listening socket. `status` and `rules` ask the agent; no rules mean that nobody is trusted yet."""

    def __init__(
        self,
        store: Store,
        status: Callable[[], AgentStatus],
        rules: Callable[[], WorkspaceRules | None],
        modules: Callable[[], Collection[str]],
    ) -> None:
        self._store = store
        self._status = status
        self._rules = rules
        self._modules = modules
        self._clients = 0

    async def serve(self, listening: socket.socket) -> None:
        """Answer until cancelled; the socket is closed then and its file taken away."""
        try:
            server = await asyncio.start_unix_server(self._client, sock=listening)
            async with server:
                await server.serve_forever()
        finally:
            listening.close()
            with contextlib.suppress(OSError):
                (self._store.dir / NAME).unlink()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients > MAX_CLIENTS or not _may_ask(writer.get_extra_info("socket")):
                return
            async with asyncio.timeout(DEADLINE_S):
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length > MAX_REQUEST:
                    return
                answer = msgspec.json.encode(self._answer(await reader.readexactly(length)))
                writer.write(_LENGTH.pack(len(answer)) + answer)
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone
        finally:
            self._clients -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, data: bytes) -> Answer:
        try:
            request = _REQUESTS.decode(data)
            answer = self.answer(request)
        except (msgspec.MsgspecError, RecursionError) as error:
            return Answer(refusal=Refusal(Code.COMMAND_MALFORMED, f"that is no request: {error}"))
        except Refused as refused:
            return Answer(refusal=refused.refusal)
        return answer

    def answer(self, request: Request) -> Answer:
        """The answer to one request. Raises Refused: HOST_DEBUG_OFF, PACKAGE_UNKNOWN for a module that is not here."""
        match request:
            case AskStatus():
                return Answer(status=self._status())
            case AskStacks():
                self._debugging()
                return Answer(text=stacks()[: MAX_ANSWER // 4])
            case SetLevel(level=level):
                self._debugging()
                logging.getLogger("loopback").setLevel(level.upper())
                log.warning("logging at %s now, as somebody on this machine asked for", level)
                return Answer(text=f"logging at {level} until the agent starts again")
            case AskLog(module=module):
                self._debugging()
                if module not in self._modules():
                    raise Refused(
                        Code.PACKAGE_UNKNOWN,
                        f"this host has no module {module[:80]!r}",
                        "see 'loopback host ctl status'",
                    )
                return Answer(text=_tail(self._store.module(module).folder / "log"))

    def _debugging(self) -> None:
        rules = self._rules()
        if rules is None or rules.regulated:
            why = (
                "whether this one is, is not known before a trust document was verified"
                if rules is None
                else "this host's is one"
            )
            raise Refused(
                Code.HOST_DEBUG_OFF,
                f"no agent is debugged in a regulated workspace, and {why}",
                "'loopback host ctl status' is always answered; look at the agent's log and reports",
            )


def stacks() -> str:
    """The stacks of all tasks of the running loop and of all threads, without the values in them."""
    out = io.StringIO()
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        out.write(f"task {task.get_name()}\n")
        for frame in task.get_stack():
            out.writelines(traceback.format_stack(frame, limit=1))
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        out.write(f"thread {names.get(ident, ident)}\n")
        out.writelines(traceback.format_stack(frame))
    return out.getvalue()


def listen(state_dir: Path) -> socket.socket | None:
    """The listening socket, for the agent's own user only; None where there can be none, which the agent lives with.

    Called before the agent gives up its privileges, with which it also loses the right to make such sockets.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _short(state_dir) as path:
            if _answered(path):
                return None  # another agent's, who will say so itself
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108  below a descriptor
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listening.bind(path)
            os.chmod(path, 0o600)  # noqa: PTH101  nobody is let in before `listen`
        listening.listen(MAX_CLIENTS)
        listening.setblocking(False)
    except OSError as error:
        log.warning("nothing listens on %s: %s", state_dir / NAME, error)
        return None
    return listening


def ask(state_dir: Path, request: Request) -> Answer:
    """Ask the agent that runs on this state directory. Blocking. Raises Refused(HOST_LOST) where none answers."""
    try:
        with _short(state_dir) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(path)
            data = msgspec.json.encode(request)
            sock.sendall(_LENGTH.pack(len(data)) + data)
            (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
            if length > MAX_ANSWER:
                raise OSError(f"it answers with {length} bytes")
            answer = _ANSWERS.decode(_exactly(sock, length))
    except PermissionError:
        raise Refused(
            Code.HOST_LOST,
            f"{state_dir / NAME} is not yours to ask",
            "ask as root or as the agent's own user",
        ) from None
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        raise Refused(
            Code.HOST_LOST, f"no agent answers on {state_dir / NAME}: {error or type(error).__name__}",
            "start it with 'loopback host run', or name its file with --config",
        ) from None  # fmt: skip
    if answer.refusal is not None:
        raise Refused(answer.refusal.code, answer.refusal.reason, answer.refusal.next_step)
    return answer


@contextlib.contextmanager
def _short(state_dir: Path) -> Iterator[str]:
    """A path of the socket that fits the 108 bytes of a Unix address, however deep the folder lies."""
    folder = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{NAME}"
    finally:
        os.close(folder)


def _answered(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def _may_ask(sock: socket.socket) -> bool:
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return uid in (0, os.geteuid())


def _exactly(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        more = sock.recv(size - len(found))
        if not more:
            raise EOFError("it ended the conversation")
        found += more
    return bytes(found)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
            return file.read(LOG_TAIL).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Refused(Code.HOST_DISK, f"{path}: {error.strerror}") from None
