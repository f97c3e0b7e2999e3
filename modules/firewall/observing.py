"""Several people watch what the ring buffer says, which has one reader: the module, which tells the others.

A module may have no Unix socket (host/seccomp.py), so an observer brings a pipe: it makes a FIFO in `observers/` of the
module's own folder, opens it for reading, and gives it a name that says what it wants (`name_of`). The module looks there
twice a second, and writes lines: `{"observing": true}` first, then `{"event": {…}, "record": "hex of struct fw_event"}`, and
where the pipe was full `{"missed": n}` in the place of what was missed. It waits for nobody. Only root and its own user
reach the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import select
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from loopback.bpf import layout

FOLDER: Final = "observers"
MAX_OBSERVERS: Final = 8  # a write for each reported packet and observer
LOOK_S: Final = 0.5  # between looks for who came and who went
_NAME: Final = re.compile(r"([01])-(\d{1,5})-(\d{1,10})")

log = logging.getLogger("loopback.firewall")


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What an observer wants: the events that rules log, one in `shadow` packets besides (0: none)."""

    events: bool = True
    shadow: int = 0


def name_of(wish: Wish, number: int) -> str:
    """The name of an observer's pipe; `number` tells it from others, as its process id does."""
    return f"{int(wish.events)}-{wish.shadow}-{number}"


class _Observer:
    def __init__(self, pipe: int, wish: Wish) -> None:
        self.pipe, self.wish = pipe, wish
        self.missed = 0

    def put(self, line: bytes) -> bool:
        """Write a line, or count it as missed. Whether somebody still reads. A line below PIPE_BUF is written whole or not."""
        before = b'{"missed":%d}\n' % self.missed if self.missed else b""
        try:
            os.write(self.pipe, before + line)
        except BlockingIOError:
            self.missed += 1
        except OSError:
            return False
        else:
            self.missed = 0
        return True

    def reads(self) -> bool:
        """Whether its reader is still there."""
        poll = select.poll()
        poll.register(self.pipe, 0)
        return not poll.poll(0)


class Observers:
    """Who watches. `wanted` is told the smallest N of one-in-N that somebody wants sampled, 0 when nobody does any more."""

    def __init__(self, wanted: Callable[[int], None]) -> None:
        self._wanted = wanted
        self._all: list[_Observer] = []
        self._folder: Path | None = None
        self._looking: asyncio.Task[None] | None = None

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def shadow(self) -> int:
        """One in so many is wanted; 0: none."""
        return min((one.wish.shadow for one in self._all if one.wish.shadow), default=0)

    def start(self, folder: Path) -> None:
        """Let observers come to `folder`. Where there can be no place for them, the log says so and the firewall goes on."""
        try:
            self._folder = folder / FOLDER
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            log.warning("nobody can observe below %s: %s", folder, error.strerror)
            return
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        while True:
            try:
                self.look()
            except OSError as error:
                log.warning("cannot look for observers: %s", error.strerror)
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Let in who came, let go who went. Raises OSError where the folder cannot be read."""
        assert self._folder is not None
        for one in [one for one in self._all if not one.reads()]:
            self._leave(one)
        for name in os.listdir(self._folder):  # noqa: PTH208  nothing but names is wanted
            found = _NAME.fullmatch(name)
            if found is None:
                continue
            wish = Wish(events=found[1] == "1", shadow=min(int(found[2]), layout.MAX_SHADOW))
            pipe = _open(self._folder / name)
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()  # it is open, or nobody reads it any more
            if pipe is None:
                continue
            one = _Observer(pipe, wish)
            if len(self._all) >= MAX_OBSERVERS:
                one.put(b'{"refused":"%d observe already"}\n' % MAX_OBSERVERS)
                os.close(pipe)
            elif one.put(b'{"observing":true}\n'):
                self._all.append(one)
                self._wanted(self.shadow)
            else:
                os.close(pipe)

    def _leave(self, one: _Observer) -> None:
        self._all.remove(one)
        os.close(one.pipe)
        self._wanted(self.shadow)

    def tell(self, why: int, record: bytes, attributes: Mapping[str, str | int]) -> None:
        """Pass a report on to whom it concerns. Never waits."""
        line = b""
        for one in tuple(self._all):
            if (why & layout.LOGGED and one.wish.events) or (why & layout.SHADOWED and one.wish.shadow):
                line = line or msgspec.json.encode({"event": attributes, "record": record.hex()}) + b"\n"
                if not one.put(line):
                    self._leave(one)

    async def close(self) -> None:
        """Send everybody away."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        for one in tuple(self._all):
            self._leave(one)


def _open(place: Path) -> int | None:
    """An observer's pipe; None for what is none, or is read by nobody."""
    try:
        pipe = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            log.warning("%s is no observer's pipe: %s", place, error.strerror)
        return None
    if stat.S_ISFIFO(os.fstat(pipe).st_mode):
        return pipe
    os.close(pipe)
    return None
