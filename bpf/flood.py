"""A packet generator: one frame, millions of times a second, out of an interface or into the stack behind it.

For tests, benchmarks and demonstrations; no module imports it.
"""

from __future__ import annotations

import ctypes as ct
import struct
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from loopback.bpf import libbpf, loader, objects
from loopback.bpf.build import compile_object
from loopback.contracts.codes import Code, Refused

SOURCE: Final = Path(__file__).parent / "programs" / "flood.bpf.c"
MIN_FRAME: Final = 14  # bytes, an Ethernet header
MAX_FRAME: Final = 3400  # bytes: what fits into a page beside the kernel's own words
BATCH: Final = 64  # frames that the kernel hands over at once
CHUNK: Final = 1 << 16  # frames of one system call, some 15 ms: `stop` waits for no longer
_PLAN: Final = struct.Struct("=IIII")
_CONTEXT: Final = struct.Struct("=6I")  # struct xdp_md
_ZERO: Final = bytes(4)


@cache
def _object() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "flood.bpf.o"
        compile_object(SOURCE, built)
        return built.read_bytes()


class Flood:
    """Sends a frame again and again, from the network namespace of the thread that calls `send` or `start`.

    `out` of the interface (onto its wire; a veth's peer then needs XDP or GRO), or, with `into`, up its stack behind its XDP
    hook, so that TC and netfilter see it. `vary` is (offset, mask): these bits of the 32-bit word there, in the order of the
    wire, are random in each frame; no checksum is corrected.
    """

    def __init__(
        self, ifindex: int, frame: bytes, *, into: bool = False, vary: tuple[int, int] | None = None
    ) -> None:
        """Raises Refused."""
        if not MIN_FRAME <= len(frame) <= MAX_FRAME:
            raise Refused(
                Code.CONFIG_INVALID, f"a frame has {MIN_FRAME} to {MAX_FRAME} bytes, not {len(frame)}"
            )
        at, mask = vary or (0, 0)
        if mask and not 0 <= at <= min(len(frame), 1024) - 4:
            raise Refused(Code.CONFIG_INVALID, f"there is no word at offset {at} of this frame")
        self._frame = frame
        self._loaded = loader.load(_object())
        self._program = self._loaded.programs["into" if into else "out"]
        plan = _PLAN.pack(ifindex, at, int.from_bytes(mask.to_bytes(4, "big"), "little"), 0)
        self._loaded.maps["plan"].update(_ZERO, plan)
        self._context = _CONTEXT.pack(0, len(frame), 0, ifindex, 0, 0) if into else b""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Refused | None = None

    @property
    def sent(self) -> int:
        """Frames handed over since the beginning; a full queue at the other end may have lost some of them."""
        cpus = libbpf.possible_cpus()
        each = self._loaded.maps["sent"].lookup(_ZERO, ct.sizeof(ct.c_uint64) * cpus)
        return sum(struct.unpack(f"={cpus}Q", each)) if each else 0

    def send(self, number: int) -> None:
        """Send so many frames now. Raises Refused."""
        while number > 0:
            chunk = min(number, CHUNK)
            self._program.run(
                self._frame, repeat=chunk, context=self._context, flags=objects.LIVE_FRAMES, batch=BATCH
            )
            number -= chunk

    def start(self) -> None:
        """Send without pause from a thread of its own until `stop`."""
        if self._thread is not None:
            raise RuntimeError("the flood is running already")
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="flood", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self.send(CHUNK)
        except Refused as refusal:  # told to whoever stops it
            self._failure = refusal

    def stop(self) -> int:
        """End it; the frames sent so far. Raises Refused when the thread ended early because of that."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self.sent

    def close(self) -> None:
        """End it and give everything back."""
        try:
            self.stop()
        finally:
            self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
