"""What this kernel gives to this process: the right to load, a bpf file system, what is loaded already."""

from __future__ import annotations

import ctypes as ct
import errno
import os
import struct
import subprocess
from pathlib import Path
from typing import Final

from loopback.bpf.libbpf import PROGRAM_XDP, LoadOptions, libc, library, lines
from loopback.bpf.objects import MAP_ARRAY
from loopback.contracts.codes import Code, Refused

BPF_FS_MAGIC: Final = 0xCAFE4A11  # linux/magic.h
XDP_PASS: Final = 2


def object_ids() -> set[tuple[str, int]]:
    """Kind and id of every map, program and link of this kernel, none of which is opened for that.

    It matters: a program array that is opened by its id while its last holder lets go is emptied twice, and never freed
    (seen on Linux 6.18: prog_array_map_clear takes a reference for work that is queued already).
    """
    lib = library()
    found = set()
    for kind in ("map", "prog", "link"):
        following = getattr(lib, f"bpf_{kind}_get_next_id")
        at = ct.c_uint32()
        while following(at, ct.byref(at)) == 0:
            found.add((kind, at.value))
    return found


def why_unsupported() -> str:
    """Empty when this process may make maps and load XDP programs here, else why not, after the kernel's version.

    It really tries both, and leaves nothing behind.
    """
    kernel = ".".join(os.uname().release.split(".")[:2])
    try:
        lib = library()
    except Refused as refusal:
        return f"{kernel}: {refusal.reason}"
    made = lib.bpf_map_create(MAP_ARRAY, b"lb_trial", 4, 4, 1, None)
    if made >= 0:
        os.close(made)
        code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, XDP_PASS, 0x95, 0, 0, 0)  # r0 = XDP_PASS; exit
        options = LoadOptions(sz=ct.sizeof(LoadOptions), attempts=1)
        made = lib.bpf_prog_load(
            PROGRAM_XDP, b"lb_trial", b"GPL", code, ct.c_size_t(len(code) // 8), ct.byref(options)
        )
        if made >= 0:
            os.close(made)
    lines.clear()
    if made >= 0:
        return ""
    if made in (-errno.EPERM, -errno.EACCES):
        return f"{kernel}: bpf() is not permitted ({errno.errorcode[-made]})"
    return f"{kernel}: bpf() fails: {os.strerror(-made)} ({errno.errorcode.get(-made, -made)})"


def is_bpffs(path: Path) -> bool:
    """Whether `path`, or the nearest folder above it that exists, lies in a bpf file system."""
    while not path.exists() and path != path.parent:
        path = path.parent
    buffer = ct.create_string_buffer(256)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return bool(struct.unpack_from("@l", buffer)[0] & 0xFFFFFFFF == BPF_FS_MAGIC)


def ensure_bpffs(path: Path) -> bool:
    """Have a bpf file system at `path`; True when this call mounted it. Raises Refused(KERNEL_UNSUPPORTED).

    A module has no right to mount: whoever starts the agent does it (systemd, the demo, a test).
    """
    there = is_bpffs(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_bpffs(path, str(error.strerror)) from None
    if there:
        return False
    done = subprocess.run(
        ["mount", "-t", "bpf", "bpf", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise _no_bpffs(path, done.stderr.strip())
    return True


def _no_bpffs(path: Path, why: str) -> Refused:
    return Refused(
        Code.KERNEL_UNSUPPORTED,
        f"kernel: no bpf file system at {path}: {why}",
        "mount one as root: mount -t bpf bpf /sys/fs/bpf",
    )
