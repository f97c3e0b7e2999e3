"""Put programs on devices: XDP through pinned links, TC through filters on clsact. Both outlive the process.

Replacing is atomic in both: `bpf_link_update`, and a replacing filter change. No packet passes unfiltered in between.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from pathlib import Path
from typing import Final, Literal

from loopback.bpf import libbpf, rtnl
from loopback.bpf.libbpf import BPF_XDP, check, refused
from loopback.bpf.objects import Program

XDP_SKB, XDP_NATIVE = 1 << 1, 1 << 2
TC_INGRESS, TC_EGRESS = 1, 2
TC_REPLACE: Final = 1
#: Where our filters stand: early, and with a handle of our own, so that they are found again.
TC_PRIORITY: Final = 7
TC_HANDLE: Final = 0x4C42
Mode = Literal["native", "generic"]


class _LinkInfo(ct.Structure):
    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("ifindex", ct.c_uint32),  # 0 when the device is gone
        ("rest", ct.c_uint8 * 64),
    )


class _LinkOptions(ct.Structure):
    _fields_ = (("sz", ct.c_size_t), ("flags", ct.c_uint32), ("rest", ct.c_uint8 * 52))


class _TcHook(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("ifindex", ct.c_int),
        ("point", ct.c_int),
        ("parent", ct.c_uint32),
        ("pad", ct.c_uint32),
    )


class _TcOptions(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("prog_fd", ct.c_int),
        ("flags", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("handle", ct.c_uint32),
        ("priority", ct.c_uint32),
        ("pad", ct.c_uint32),
    )


class SlotTaken(Exception):
    """Another XDP program holds the device."""


class XdpLink:
    """An XDP attachment. It lives as long as its pin."""

    def __init__(self, fd: int, mode: Mode) -> None:
        self.fd = fd
        self.mode: Mode = mode

    @classmethod
    def create(cls, ifindex: int, program: Program) -> XdpLink:
        """Attach in native mode, else in generic mode. Raises SlotTaken, Refused."""
        lib = libbpf.library()
        result = 0
        for flags, mode in ((XDP_NATIVE, "native"), (XDP_SKB, "generic")):
            options = _LinkOptions(sz=16, flags=flags)
            result = lib.bpf_link_create(program.fd, ifindex, BPF_XDP, ct.byref(options))
            if result >= 0:
                return cls(result, mode)  # type: ignore[arg-type]  # the tuple's words are Modes
            if -result in (errno.EBUSY, errno.EEXIST):
                raise SlotTaken
        raise refused(result, f"attaching XDP to device {ifindex}")

    @classmethod
    def pinned(cls, path: Path) -> XdpLink:
        """A pinned link; its name ends in its mode. Raises Refused."""
        fd = check(libbpf.library().bpf_obj_get(os.fsencode(path)), f"opening {path}")
        return cls(fd, "generic" if path.name.endswith("generic") else "native")

    def _info(self) -> _LinkInfo:
        info = _LinkInfo()
        length = ct.c_uint32(ct.sizeof(info))
        check(
            libbpf.library().bpf_obj_get_info_by_fd(self.fd, ct.byref(info), ct.byref(length)),
            "reading a link",
        )
        return info

    @property
    def ifindex(self) -> int:
        """The device, 0 when it is gone. Raises Refused."""
        return int(self._info().ifindex)

    @property
    def program_id(self) -> int:
        """The program that runs. Raises Refused."""
        return int(self._info().prog_id)

    def update(self, program: Program) -> None:
        """Replace the program; every packet meets the one or the other. Raises Refused."""
        check(libbpf.library().bpf_link_update(self.fd, program.fd, None), "replacing an XDP program")

    def pin(self, path: Path) -> None:
        """Keep it beyond this process. Raises Refused."""
        check(libbpf.library().bpf_obj_pin(self.fd, os.fsencode(path)), f"pinning {path}")

    def close(self) -> None:
        """Give the descriptor back. Without a pin this detaches."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _hook(ifindex: int, point: int) -> _TcHook:
    return _TcHook(sz=ct.sizeof(_TcHook), ifindex=ifindex, point=point)


def tc_attach(ifindex: int, point: int, program: Program) -> None:
    """Put a program on TC ingress or egress, in the place of our earlier one. Raises Refused."""
    lib = libbpf.library()
    hook = _hook(ifindex, TC_INGRESS | TC_EGRESS)
    result = lib.bpf_tc_hook_create(ct.byref(hook))
    if result < 0 and -result != errno.EEXIST:
        raise refused(result, f"making clsact on device {ifindex}")
    hook = _hook(ifindex, point)
    options = _TcOptions(
        sz=ct.sizeof(_TcOptions), prog_fd=program.fd, flags=TC_REPLACE, handle=TC_HANDLE, priority=TC_PRIORITY
    )
    result = lib.bpf_tc_attach(ct.byref(hook), ct.byref(options))
    libbpf.lines.clear()
    if result < 0:
        raise refused(result, f"attaching TC to device {ifindex}")


def tc_program(ifindex: int, point: int) -> int:
    """The id of the program that is there in our place, 0 when none."""
    hook = _hook(ifindex, point)
    options = _TcOptions(sz=ct.sizeof(_TcOptions), handle=TC_HANDLE, priority=TC_PRIORITY)
    result = libbpf.library().bpf_tc_query(ct.byref(hook), ct.byref(options))
    libbpf.lines.clear()
    return int(options.prog_id) if result >= 0 else 0


def tc_detach(ifindex: int, point: int) -> None:
    """Take ours away, and clsact with the last filter of anybody; harmless when there is none."""
    hook = _hook(ifindex, point)
    options = _TcOptions(sz=ct.sizeof(_TcOptions), handle=TC_HANDLE, priority=TC_PRIORITY)
    libbpf.library().bpf_tc_detach(ct.byref(hook), ct.byref(options))
    libbpf.lines.clear()
    try:
        if rtnl.has_clsact(ifindex) and rtnl.filters(ifindex) == 0:
            rtnl.remove_clsact(ifindex)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            raise
