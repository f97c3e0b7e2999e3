"""What went wrong is left alone for a while, longer each time, so that it cannot keep everything else waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

FIRST_S: Final = 1.0
LONGEST_S: Final = 300.0


class Setbacks:
    """Names that failed, and until when each is left alone. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[str, tuple[int, float]] = {}

    def failed(self, name: str) -> float:
        """It failed once more; for how many seconds it is left alone now."""
        count = self._found.get(name, (0, 0.0))[0]
        seconds = min(LONGEST_S, FIRST_S * 2.0 ** min(count, 30))
        self._found[name] = (count + 1, self._clock() + seconds)
        return seconds

    def went_well(self, name: str) -> None:
        """All is forgotten."""
        self._found.pop(name, None)

    def waits(self, name: str) -> bool:
        """Whether it is left alone now."""
        found = self._found.get(name)
        return found is not None and self._clock() < found[1]

    def seconds(self, most: float) -> float:
        """Until the next one is to be tried again; at most `most`."""
        now = self._clock()
        return min([most, *(until - now for _, until in self._found.values() if until > now)])
