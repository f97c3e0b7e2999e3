"""The spawner: the one process of a host that keeps privileges, so that the agent can have none.

    python -m loopback.host.spawner DESCRIPTOR HOST_TOML STATE_DIR

The agent's command starts it before it gives up everything itself. It holds the capabilities that host.toml's `[allow]`
names and CAP_SETPCAP, reads nothing from the network, and takes requests over one inherited socket: start this
package of this module, end that process. What a module gets is read from the package itself, whose signatures were
checked (`sealed`), never from the request. Where the agent is gone, it ends what is left and itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from loopback.contracts import abi, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.host import cgroups, confine, proc, seccomp
from loopback.host.config import HostConfig, load, with_state_dir
from loopback.host.launch import Launch, launch
from loopback.host.reach import reach
from loopback.host.sealed import Sealed, open_below
from loopback.trust.manifest import Manifest

MAX_MESSAGE: Final = 16 * 1024  # bytes of one request or answer; they have under 1 KiB
MAX_RUNNING: Final = 64  # module processes at a time
LINGER_S: Final = 8.0  # for modules to end by themselves once the agent is gone; the SDK gives them 5 s
REMOVE_S: Final = 1.0  # between attempts to take away a control group that is not yet empty
ABI_FD: Final = 3  # in the module


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Start a package that lies unpacked; with two descriptors, the module's end of the ABI socket and its output."""

    number: int
    module: str
    version: str
    package: str


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """A version is on its way that was never started here: be ready to check its signatures."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """End a process that was started here, and everything that it started."""

    pid: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Said once: what holds modules here, and what is missing, in words."""

    holds: tuple[str, ...]
    lacks: tuple[str, ...]


class Started(msgspec.Struct, frozen=True, tag="started"):
    """`start` as in `proc.started_at`; `lacks` are capabilities that could not be given."""

    number: int
    pid: int
    start: int
    lacks: tuple[str, ...] = ()


class NotStarted(msgspec.Struct, frozen=True, tag="refused"):
    """Why not."""

    number: int
    code: str
    reason: str
    next_step: str = ""


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A process has ended: its exit status, or minus the signal."""

    pid: int
    status: int


Request = Start | Prepare | End
Answer = Ready | Started | NotStarted | Ended
_REQUEST: Final[Decoder[Request]] = Decoder(msgspec.json.Decoder(Request))


class Child(msgspec.Struct):
    """A running module."""

    module: str
    descriptor: int
    groups: tuple[Path, ...]


class Spawner:
    """Serves one agent. `powers` is what modules can be given."""

    def __init__(
        self, sock: socket.socket, config: HostConfig, powers: frozenset[str], groups: cgroups.Groups
    ) -> None:
        self.sock = sock
        self.config = config
        self.powers = powers
        self.sealed = Sealed(config)
        self.groups = groups
        self.children: dict[int, Child] = {}
        self._emptying: list[tuple[Path, ...]] = []
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._started = 0

    def serve(self) -> None:
        """Until the agent is gone; then until what it had started is."""
        self.say(self.ready())
        self.sealed.sweep()
        self.groups.sweep()
        while self._turn(None if not self._emptying else REMOVE_S):
            pass
        deadline = time.monotonic() + LINGER_S
        self._poll.unregister(self.sock)
        while self.children and time.monotonic() < deadline:
            self._turn(max(deadline - time.monotonic(), 0.0))
        for pid in list(self.children):
            self._end(pid)
        deadline = time.monotonic() + LINGER_S
        while (self.children or self._emptying) and time.monotonic() < deadline:
            self._turn(0.05)

    def ready(self) -> Ready:
        """What holds modules here."""
        filtered = seccomp.program(frozenset()) is not None
        landlock = confine.landlock_abi()
        found = {
            "seccomp": (filtered, "no system-call filter: libseccomp.so.2 is missing"),
            **{name: (version <= landlock, words) for name, (version, words) in confine.FENCES.items()},
            "cgroup-memory": ("memory" in self.groups.limits, "no limit on a module's memory as a whole"),
            "cgroup-tasks": ("pids" in self.groups.limits, "no limit on a module's tasks where it is root's"),
        }
        lacks = [words for holds, words in found.values() if not holds]
        if missing := sorted(set(self.config.allow.capabilities) - self.powers):
            lacks.append(f"cannot give {', '.join(missing)}")
        return Ready(tuple(name for name, (holds, _) in found.items() if holds), tuple(lacks))

    def say(self, answer: Answer) -> None:
        """Tell the agent, if it is there."""
        with contextlib.suppress(OSError):
            self.sock.send(msgspec.json.encode(answer)[:MAX_MESSAGE])

    def _turn(self, seconds: float | None) -> bool:
        """Wait for something and see to it; false once the agent is gone."""
        for descriptor, _ in self._poll.poll(None if seconds is None else seconds * 1000):
            if descriptor != self.sock.fileno():
                self._reap(next(pid for pid, c in self.children.items() if c.descriptor == descriptor))
            elif not self._listen():
                return False
        self._emptying = [groups for groups in self._emptying if not cgroups.remove(groups)]
        return True

    def _listen(self) -> bool:
        try:
            data, descriptors, flags, _ = socket.recv_fds(self.sock, MAX_MESSAGE, 4)
        except ConnectionError:
            return False
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # what arrives over a socket would go on to every child
        try:
            if not data:
                return False
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise msgspec.ValidationError("it is too long")
            request = _REQUEST.decode(data)
            if isinstance(request, End):
                if request.pid in self.children:  # nobody else's process is any business of the agent's
                    self._end(request.pid)
            elif isinstance(request, Prepare):
                self.sealed.prepare()
            else:
                self._start(request, descriptors)
        except (msgspec.MsgspecError, RecursionError) as error:
            print(f"spawner: a request makes no sense: {error}", file=sys.stderr)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _start(self, request: Start, descriptors: list[int]) -> None:
        try:
            pid, lacks = self._spawn(request, descriptors)
        except Refused as refused:
            self.say(NotStarted(request.number, refused.code, refused.reason, refused.next_step))
        except OSError as error:
            said = f"{request.module} {request.version} cannot be started: {error}"[:1000]
            self.say(NotStarted(request.number, Code.MODULE_START, said, "look at the manifest's entry"))
        else:
            self.say(Started(request.number, pid, proc.started_at(pid), lacks))

    def _spawn(self, request: Start, descriptors: list[int]) -> tuple[int, tuple[str, ...]]:
        if len(descriptors) != 2:
            raise Refused(Code.MODULE_START, "a start comes with two descriptors")
        if request.module not in self.config.allow.modules:
            raise Refused(
                Code.HOST_NOT_ALLOWED,
                f"this host's owner does not allow the module {request.module[:80]!r}",
                "add it to [allow] modules in host.toml there",
            )
        if len(self.children) >= MAX_RUNNING:
            raise Refused(Code.MODULE_START, f"{MAX_RUNNING} module processes run already")
        folder, manifest = self.sealed.open(request.module, request.version, request.package)
        self._check_capabilities(manifest)
        own = self.config.state_dir / "modules" / subjects.token(request.module)
        spec = launch(manifest, request.package, folder, own / "data", own / "log")
        data = open_below(self.config.state_dir, "modules", subjects.token(request.module), "data")
        try:
            return self._fork(spec, folder, data, descriptors)
        finally:
            os.close(data)

    def _check_capabilities(self, manifest: Manifest) -> None:
        """Whether the owner lets a module have what it names."""
        for capability in manifest.module.capabilities:
            if capability not in self.config.allow.capabilities:
                raise Refused(
                    Code.MANIFEST_CAPABILITY,
                    f"{manifest.name} {manifest.version} asks for {capability}, which this host's owner does not allow",
                    "add it to [allow] capabilities in host.toml there",
                )

    def _fork(
        self, spec: Launch, folder: Path, data: int, descriptors: list[int]
    ) -> tuple[int, tuple[str, ...]]:
        given = frozenset(spec.capabilities) & self.powers
        program = seccomp.program(given)
        fence = reach(self.config, spec, folder)
        self._started += 1
        name = f"{spec.module}-{os.getpid()}-{self._started}"
        groups = self.groups.make(name, memory_mib=spec.memory_mib, tasks=spec.tasks)
        failed, failing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                failing = _arrange(descriptors[0], descriptors[1], failing)
                become(spec, given, program, fence, groups, data)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.write(failing, str(error).encode()[:1000])
            finally:
                os._exit(127)
        os.close(failing)
        with os.fdopen(failed, "rb") as pipe:
            words = pipe.read()  # ends with the exec, which closes the other end
        if words:
            os.waitpid(child, 0)
            self._emptying.append(groups)
            raise OSError(words.decode("utf-8", "replace"))
        descriptor = os.pidfd_open(child)
        self.children[child] = Child(spec.module, descriptor, groups)
        self._poll.register(descriptor, select.POLLIN)
        return child, tuple(sorted(set(spec.capabilities) - given))

    def _end(self, pid: int) -> None:
        # Not reaped yet, so the id is nobody else's; also when its leader has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        cgroups.end(self.children[pid].groups)

    def _reap(self, pid: int) -> None:
        """A module has ended: what it left behind ends with it."""
        self._end(pid)
        _, status = os.waitpid(pid, 0)
        child = self.children.pop(pid)
        self._poll.unregister(child.descriptor)
        os.close(child.descriptor)
        if child.groups and not cgroups.remove(child.groups):
            self._emptying.append(child.groups)
        self.say(Ended(pid, os.waitstatus_to_exitcode(status)))


def _arrange(abi_end: int, output: int, failing: int) -> int:
    """Standard input from nowhere, output to the agent's log, the ABI socket at its place, all else closed at exec."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64) for descriptor in (abi_end, output, failing)]
    nowhere = os.open("/dev/null", os.O_RDONLY)
    for descriptor, place in ((nowhere, 0), (high[1], 1), (high[1], 2), (high[0], ABI_FD)):
        os.dup2(descriptor, place)
    return high[2]


def become(
    spec: Launch, given: frozenset[str], program: bytes | None, fence: confine.Fence, groups: tuple[Path, ...], data: int
) -> None:  # fmt: skip
    """Turn this fresh child into the module: only its own rights, for good, and then its program. Raises OSError."""
    os.setsid()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    confine.die_with_parent(signal.SIGKILL)
    confine.dumpable(
        True
    )  # as execve makes it in any case; until then its score below would be root's alone to write
    cgroups.join(groups)
    confine.limit(memory_mib=spec.memory_mib, tasks=spec.tasks)
    with contextlib.suppress(OSError):  # where /proc is read-only, it goes no sooner than others
        Path("/proc/self/oom_score_adj").write_text(str(confine.OOM_SCORE))
    os.umask(0o077)
    os.fchdir(data)
    confine.keep_only(given)
    confine.no_new_privileges()
    confine.fence(fence)
    if program is not None:
        confine.filter_calls(program)
    os.execve(spec.argv[0], spec.argv, {**spec.env, abi.FD_VARIABLE: str(ABI_FD)})  # noqa: S606  it is by list


def main(arguments: list[str]) -> int:
    """Serve the agent at the other end of the socket."""
    confine.leave_no_core()
    sock = socket.socket(fileno=int(arguments[0]))
    os.set_inheritable(sock.fileno(), False)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C is for the agent, which ends modules in order
    try:
        config = with_state_dir(load(Path(arguments[1])), Path(arguments[2]))
    except Refused as refused:
        print(f"spawner: {refused}", file=sys.stderr)
        return 2
    groups = cgroups.find()
    powers = confine.held()
    allowed = frozenset(config.allow.capabilities) & powers
    confine.keep_only(allowed | ({confine.SETPCAP} & powers), ambient=False, giving=True)
    confine.no_new_privileges()
    Spawner(sock, config, allowed, groups).serve()
    groups.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
