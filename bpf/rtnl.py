"""Network devices, over rtnetlink: which there are, of what kind, and when that changes. No privilege is needed."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final

import msgspec

from loopback.bpf.netlink import ACK, DUMP, ask

_RTM_NEWLINK, _RTM_GETLINK, _RTM_GETQDISC, _RTM_DELQDISC, _RTM_GETTFILTER = 16, 18, 38, 37, 46
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_RTA_DST, _RTA_SRC, _RTA_OIF = 1, 2, 4
_IFLA_IFNAME, _IFLA_EXT_MASK = 3, 29
#: Of every device, without its statistics (RTEXT_FILTER_SKIP_STATS): half the size, and so fewer pieces to be told in.
_LINKS: Final = struct.pack("=BxHiIIHHI", 0, 0, 0, 0, 0, 8, _IFLA_EXT_MASK, 1 << 3)
_PATIENCE_S: Final = 5.0
_GROUP_LINK = 1
_TCA_KIND = 1
_CLSACT: Final = 0xFFFFFFF1  # TC_H_CLSACT
_PARENTS: Final = (0xFFFFFFF2, 0xFFFFFFF3)  # its ingress and egress
ARPHRD_ETHER, ARPHRD_LOOPBACK = 1, 772
IFF_UP: Final = 1


class Device(msgspec.Struct, frozen=True):
    """A network device. `kind` is its ARPHRD type."""

    index: int
    name: str
    kind: int
    up: bool

    @property
    def ethernet(self) -> bool:
        """Whether its packets begin with an Ethernet header."""
        return self.kind in (ARPHRD_ETHER, ARPHRD_LOOPBACK)

    @property
    def loopback(self) -> bool:
        """Whether it is `lo`."""
        return self.kind == ARPHRD_LOOPBACK


def devices() -> list[Device]:
    """Every device of this network namespace, as they were at one moment. Raises OSError, also where they change for
    seconds on end faster than they can be read.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return [_device(body) for kind, body in ask(_RTM_GETLINK, _LINKS, DUMP) if kind == _RTM_NEWLINK]
        except InterruptedError:
            if time.monotonic() > deadline:
                raise


def _device(body: bytes) -> Device:
    _family, hardware, index, flags, _change = struct.unpack_from("=BxHiII", body)
    name = dict(_attributes(body[16:])).get(_IFLA_IFNAME, b"").rstrip(b"\0").decode()
    return Device(index, name, hardware, bool(flags & IFF_UP))


def device_to(remote: str, local: str) -> int:
    """The number of the device by which packets from `local` leave for `remote`; 0 where there is no way.

    Raises OSError where the kernel does not answer, ValueError for what is no address.
    """
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    addresses = [socket.inet_pton(family, one.split("%")[0]) for one in (remote, local)]
    length = len(addresses[0])
    body = struct.pack("=BBBBBBBBI", family, 8 * length, 8 * length, 0, 0, 0, 0, 0, 0)
    for kind, address in zip((_RTA_DST, _RTA_SRC), addresses, strict=True):
        body += struct.pack("=HH", 4 + length, kind) + address
    try:
        with contextlib.closing(ask(_RTM_GETROUTE, body, 0)) as answers:
            for kind, route in answers:
                if kind == _RTM_NEWROUTE:
                    out = dict(_attributes(route[12:])).get(_RTA_OIF)
                    return int(struct.unpack("=I", out)[0]) if out else 0
    except TimeoutError:
        raise
    except OSError:
        return 0
    return 0


def monitor() -> socket.socket:
    """A non-blocking socket that becomes readable whenever a device appears, goes or changes. Raises OSError."""
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    listening.bind((0, _GROUP_LINK))
    listening.setblocking(False)
    return listening


def drain(listening: socket.socket) -> None:
    """Read away what a monitor has said; its reader looks at `devices` again. An overrun means the same."""
    while True:
        try:
            if not listening.recv(65536):
                return
        except BlockingIOError:
            return
        except OSError:
            continue  # ENOBUFS: messages were lost, which is why devices are read again


def has_clsact(index: int) -> bool:
    """Whether the device has the clsact discipline. Raises OSError."""
    for _kind, body in ask(_RTM_GETQDISC, struct.pack("=BxxxiIII", 0, index, 0, 0, 0), DUMP):
        _family, owner, _handle, parent, _info = struct.unpack_from("=BxxxiIII", body)
        if owner == index and dict(_attributes(body[20:])).get(_TCA_KIND, b"").rstrip(b"\0") == b"clsact":
            return bool(parent == _CLSACT)
    return False


def filters(index: int) -> int:
    """How many filters hang on the device's clsact. Raises OSError."""
    return sum(
        1
        for parent in _PARENTS
        for _kind, body in ask(_RTM_GETTFILTER, struct.pack("=BxxxiIII", 0, index, 0, parent, 0), DUMP)
        if struct.unpack_from("=BxxxiIII", body)[1] == index
    )


def remove_clsact(index: int) -> None:
    """Take the discipline away, with whatever hangs on it. Raises OSError."""
    for _reply in ask(_RTM_DELQDISC, struct.pack("=BxxxiIII", 0, index, 0xFFFF0000, _CLSACT, 0), ACK):
        pass


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3
