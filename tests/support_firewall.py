"""The firewall's module as the agent runs it: a process of its own with three capabilities, spoken to over its socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support_bpf import ONLY_THREE
from support_datapath import World

from loopback.contracts import abi


class Process:
    """A module's process, spoken to over its socket."""

    def __init__(self, world: World, package: Path, **settings: Any) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.socket.settimeout(60)
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(package / "lib"),
            abi.FD_VARIABLE: str(theirs.fileno()),
            "LOOPBACK_PACKAGE_DIR": str(package),
        }
        world.state.mkdir(exist_ok=True)
        with theirs:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{world.host}", *ONLY_THREE, sys.executable, "-P", "-W", "error", "-m",
                 "loopback.modules.firewall"],
                env=environment, pass_fds=[theirs.fileno()], cwd=world.state, stderr=subprocess.PIPE,
            )  # fmt: skip
        self.events: list[abi.Event] = []
        self._number = 0
        hello = self._frame().body
        assert isinstance(hello, abi.Hello), self.words()
        self.hello = hello
        self.configured = self.ask(
            abi.Configure(
                host="host",
                workspace="w",
                state_dir=str(world.state),
                settings={"interfaces": ["*"], "bpf_root": str(world.bpf)} | settings,
            )
        )

    def words(self) -> str:
        self.process.kill()
        return self.process.communicate()[1].decode()

    def _frame(self) -> abi.Frame:
        def exactly(size: int) -> bytes:
            data = b""
            while len(data) < size:
                more = self.socket.recv(size - len(data))
                assert more, self.words()
                data += more
            return data

        return abi.decode(exactly(abi.length_of(exactly(4))))

    def ask(self, body: abi.Request) -> abi.Done | abi.Failed:
        self._number += 1
        self.socket.sendall(abi.encode(abi.Frame(id=self._number, body=body)))
        while True:
            frame = self._frame()
            if isinstance(frame.body, abi.Event):
                self.events.append(frame.body)
            else:
                assert frame.id == self._number
                assert isinstance(frame.body, abi.Done | abi.Failed)
                return frame.body

    def done(self, body: abi.Request) -> abi.Done:
        answer = self.ask(body)
        assert isinstance(answer, abi.Done), answer
        return answer

    def enforce(self, content: bytes, trial_s: float = 60, *, confirm: bool = True) -> None:
        digest = hashlib.sha256(content).hexdigest()
        self.done(abi.Stage(digest=digest, serial=1, content=content))
        self.done(abi.Commit(digest=digest, trial_s=trial_s))
        if confirm:
            self.done(abi.Confirm(digest=digest))

    @property
    def health(self) -> abi.HealthReport:
        found = self.done(abi.Health()).health
        assert found is not None
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.socket.close()
        self.process.wait(60)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def running(world: World, package: Path, **settings: Any) -> Iterator[Process]:
    process = Process(world, package, **settings)
    try:
        yield process
    finally:
        process.kill()  # harmless when it has ended


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)  # a waiter that spins takes a core from whom it waits for
