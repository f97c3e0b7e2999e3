"""One question to the kernel over netlink (RFC 3549), and its answers."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Generator
from typing import Final

ACK: Final = 4  # say when it is done
DUMP: Final = 0x300  # of all there are
_REQUEST: Final = 1
_ERROR, _DONE = 2, 3
_TORN: Final = 0x10  # NLM_F_DUMP_INTR


def ask(
    kind: int, body: bytes, flags: int, protocol: int = socket.NETLINK_ROUTE
) -> Generator[tuple[int, bytes], None, None]:
    """One request; the answers as (type, body after the netlink header).

    Raises OSError: the kernel's own refusal, TimeoutError after 5 s without an answer, and InterruptedError when what
    is told changed meanwhile, so that something may have been left out.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as asking:
        asking.settimeout(5)
        asking.bind((0, 0))
        asking.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, 1, 0) + body)
        while True:
            data = asking.recv(1 << 18)
            at = 0
            while at + 16 <= len(data):
                length, type_, marks = struct.unpack_from("=IHH", data, at)
                if marks & _TORN and flags & DUMP:
                    raise InterruptedError(errno.EINTR, "netlink: it changed while it was told")
                if type_ == _DONE:
                    return
                if type_ == _ERROR:  # or an acknowledgement
                    number = -struct.unpack_from("=i", data, at + 16)[0]
                    if number:
                        raise OSError(number, "netlink")
                    return
                yield type_, data[at + 16 : at + length]
                at += (length + 3) & ~3
