"""The rate of the kernel's jiffies, which nothing tells: the programs' timeouts are counted in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from loopback.bpf import layout

_HZ: Final = (100, 250, 300, 1000)  # what Linux is built with


def jiffies_per_second(look: Callable[[], layout.Clock]) -> int:
    """Jiffies start at -300 s and count the time since boot; when that fits several rates, two looks decide."""
    clock = look()
    up = clock.monotonic_ns / 1e9
    fitting = [hz for hz in _HZ if abs((clock.jiffies - ((1 << 32) - 300 * hz)) / hz - up) < 2 + up * 1e-3]
    if len(fitting) == 1:
        return fitting[0]
    time.sleep(0.1)
    later = look()
    rate = (later.jiffies - clock.jiffies) * 1e9 / (later.monotonic_ns - clock.monotonic_ns)
    return int(min(_HZ, key=lambda hz: abs(hz - rate)))
