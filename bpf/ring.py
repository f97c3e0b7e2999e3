"""Read a ring buffer of the kernel."""

from __future__ import annotations

import ctypes as ct
import errno
from collections.abc import Callable
from typing import Any, Final

from loopback.bpf import libbpf
from loopback.bpf.libbpf import refused
from loopback.bpf.objects import Map

MOST: Final = (
    1000  # records in one call: the kernel may write faster than they are read, and others wait meanwhile
)


class Ring:
    """A consumer of one ring buffer map. There must be only one at a time."""

    def __init__(self, ring: Map, on: Callable[[bytes], None]) -> None:
        """`on` gets each record. Raises Refused."""
        lib = libbpf.library()
        lib.ring_buffer__new.restype = ct.c_void_p
        lib.ring_buffer__new.argtypes = [ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_void_p]

        self._failure: BaseException | None = None
        self._left = 0

        def receive(_context: Any, data: int, size: int) -> int:
            try:
                on(ct.string_at(data, size))
            except BaseException as error:  # ctypes would print and forget it; `consume` raises it
                self._failure = error
                return -errno.ECANCELED
            self._left -= 1
            return 0 if self._left > 0 else -errno.ECANCELED

        # libbpf calls it as long as this lives
        self._receive = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)(receive)
        handle = lib.ring_buffer__new(ring.fd, ct.cast(self._receive, ct.c_void_p), None, None)
        if not handle:
            raise refused(ct.get_errno() or errno.EINVAL, "opening the ring buffer")
        self._handle: ct.c_void_p | None = ct.c_void_p(handle)

    def fileno(self) -> int:
        """Readable when there are records."""
        return int(libbpf.library().ring_buffer__epoll_fd(self._handle))

    def consume(self) -> int:
        """Hand over what is there now, MOST at once. Returns how many records. Raises Refused, and what the reader raised.

        A record that the reader failed on is used up; those after it stay for the next call.
        """
        self._left = MOST
        result = int(libbpf.library().ring_buffer__consume(self._handle))
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        if self._left <= 0:
            return MOST
        if result < 0:
            raise refused(result, "reading the ring buffer")
        return result

    def close(self) -> None:
        """Give it back."""
        if self._handle is not None:
            libbpf.library().ring_buffer__free(self._handle)
            self._handle = None
