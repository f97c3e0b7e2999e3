"""Ctrl-C for commands that watch until it comes and then have something to say: it ends the watching, never the saying."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Self, TypeVar

T = TypeVar("T")


class CtrlC:
    """Entered, Ctrl-C cuts off what `call` runs, and anywhere else only sets `pressed`: the caller looks there when it is done.

    Python's own answer, an exception at whatever instruction is next, would also cut off the words that tell of the end. Where
    Ctrl-C means something else already (it is ignored, or another handler has it) it stays so.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._cuts = False
        self._ours = False

    def __enter__(self) -> Self:
        self._ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._on)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(self, work: Callable[[], T], cut: T) -> T:
        """What `work` returns, or `cut` where Ctrl-C came before or meanwhile."""
        try:
            self._cuts = True
            if self.pressed:
                return cut
            found = work()
            self._cuts = False
            return found
        except KeyboardInterrupt:
            return cut
        finally:
            self._cuts = False

    def _on(self, _: int, __: FrameType | None) -> None:
        self.pressed = True
        if self._cuts:
            self._cuts = False  # the answer to a second one must not cut off the first one's
            raise KeyboardInterrupt
