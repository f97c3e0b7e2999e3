"""Listening to the firewall's module: packets that it reports, as they come. It passes them on to several at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.observing import FOLDER, Wish, name_of

ANSWER_S: Final = (
    15.0  # the module looks twice a second, but not while it compiles a large policy on a busy machine
)
PIPE: Final = (
    1 << 20
)  # bytes that wait for us, some 1500 packets: the most that a pipe has where nobody raised it
_CHUNK: Final = 1 << 16


class Heard(NamedTuple):
    """A reported packet in words, and as the kernel wrote it."""

    event: dict[str, Any]
    record: bytes


def listen(folder: Path | None, wish: Wish, until: float | None = None) -> Iterator[Heard | int | None]:
    """Reported packets; a number is how many were missed for being too slow; None comes first, and when a second was silent.

    Ends when the module does, or at `until` of the monotonic clock. Raises Refused(HOST_LOST) where nobody listens.
    """
    if folder is None:
        raise Refused(
            Code.HOST_LOST, "it is not known where the firewall's module listens",
            "name the host's file with --config, or the module's own folder with --data",
        )  # fmt: skip
    place = folder / FOLDER / name_of(wish, os.getpid())
    try:
        pipe = _pipe(place)
    except OSError as error:
        raise Refused(
            Code.HOST_LOST,
            f"no firewall module listens in {place.parent}: {error.strerror}",
            "ask as root; see whether it runs: 'loopback host ctl status'. 'firewall stats' works without it",
        ) from None
    try:
        patience = time.monotonic() + ANSWER_S
        lines = _lines(pipe, lambda: until if answered else patience)
        answered = False
        first = next((line for line in lines if line is not None), None)
        answered = True
        if not first or "observing" not in first:
            why = (first or {}).get("refused", f"nobody answers in {place.parent}")
            raise Refused(
                Code.HOST_LOST,
                f"no firewall module listens: {why}",
                "see whether it runs: 'loopback host ctl status'. 'firewall stats' works without it",
            )
        yield None
        for line in lines:
            if line is None:
                yield None
            elif "missed" in line:
                yield int(line["missed"])
            elif "event" in line:
                yield Heard(line["event"], bytes.fromhex(line["record"]))
    finally:
        os.close(pipe)
        with contextlib.suppress(OSError):
            place.unlink()


def _pipe(place: Path) -> int:
    """Our pipe, which has its name only once it is read. Raises OSError."""
    unready = place.with_name(f".{place.name}")
    try:
        os.mkfifo(unready, 0o600)
        pipe = os.open(unready, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except BaseException:
        unready.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
    unready.rename(place)
    return pipe


def _lines(pipe: int, until: Callable[[], float | None]) -> Iterator[dict[str, Any] | None]:
    waiting = b""
    while True:
        end = until()
        left = 1.0 if end is None else min(end - time.monotonic(), 1.0)
        if left <= 0:
            return
        # not ready before the module has opened it, and at its end when the module is gone
        if not select.select([pipe], [], [], left)[0]:
            yield None
            continue
        data = os.read(pipe, _CHUNK)
        if not data:
            return
        *whole, waiting = (waiting + data).split(b"\n")
        for line in whole:
            found = json.loads(line)
            if isinstance(found, dict):
                yield found
