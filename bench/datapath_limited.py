"""A process with the capabilities of the firewall's manifest and no others, and with one CPU: where our own side is measured.

Without CAP_PERFMON the verifier adds instructions that guard against speculation, so figures of an all-powerful root would
be those of another program. What the manifest does not name is given up for good before anything is loaded.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import tomllib
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, ParamSpec, Self, TypeVar, cast

from loopback import modules
from loopback.contracts.codes import Code, Refused
from loopback.host.confine import die_with_parent, held, keep_only, no_new_privileges

MANIFEST: Final = Path(next(iter(modules.__path__))) / "firewall" / "module.toml"
CLONE_NEWNET: Final = 0x40000000
END_S: Final = 10.0
P = ParamSpec("P")
R = TypeVar("R")
_libc = ctypes.CDLL(None, use_errno=True)


def capabilities() -> frozenset[str]:
    """What the manifest asks for."""
    with MANIFEST.open("rb") as file:
        return frozenset(tomllib.load(file)["module"]["capabilities"])


def measuring_cpu() -> int:
    """The CPU that measurements are pinned to: the last one we may use, as interrupts favour the first."""
    return max(os.sched_getaffinity(0))


def enter(namespace: str) -> None:
    """Be in a network namespace for good, with this thread. Raises OSError."""
    with open(f"/run/netns/{namespace}") as there:
        if _libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


class Unfit(Exception):
    """Something that the limited process did failed in a way that no figure can be made of; its words."""


class Limited:
    """Runs functions in such a process, one after another. What they leave in their modules stays there for the next."""

    def __init__(self, namespace: str = "") -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._pipe, namespace), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, function: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
        """The function's result. Raises Refused as it did there, Unfit for anything else."""
        self._pipe.send((function, args, named))
        try:
            kind, found = self._pipe.recv()
        except EOFError:
            raise Unfit(f"the process that ran {function.__name__} ended") from None
        if kind == "refused":
            raise Refused(*found)
        if kind == "failed":
            raise Unfit(found)
        return cast(R, found)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def limited(function: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
    """Run one function in a process of its own. Raises as Limited does."""
    with Limited() as there:
        return there(function, *args, **named)


def _serve(pipe: Connection, other: Connection, namespace: str) -> None:
    other.close()
    die_with_parent(signal.SIGKILL)
    os.sched_setaffinity(0, {measuring_cpu()})
    if namespace:
        enter(namespace)
    keep_only(capabilities())
    no_new_privileges()
    assert held() == capabilities()
    while True:
        try:
            function, args, named = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        answer: tuple[str, Any]
        try:
            answer = "done", function(*args, **named)
        except Refused as refusal:
            answer = "refused", (Code(refusal.code), refusal.reason, refusal.next_step)
        except Exception:  # whatever it was, the process that waits for the answer raises it as Unfit
            answer = "failed", traceback.format_exc()
        pipe.send(answer)


@contextmanager
def pinned() -> Any:
    """This thread on the measuring CPU, for what needs root: the generator and nftables."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {measuring_cpu()})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
