"""One agent on one state directory, from its start to the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from loopback.contracts.codes import Code, Refused
from loopback.host.state import Store


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Hold the state directory; two agents on one would undo each other. Raises Refused(HOST_DISK)."""
    path = store.dir / "agent.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(
            Code.HOST_DISK, f"{path}: {error.strerror}", "choose a state_dir that can be written"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                Code.HOST_DISK,
                f"another agent uses {store.dir}",
                "stop it first, or choose another state_dir",
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def stopping_signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set the event, where this thread may take signals at all."""
    loop = asyncio.get_running_loop()
    taken = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, stop.set)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
