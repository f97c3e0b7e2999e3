"""What this machine is and what its kernel can do, found out by trying.

What is named works: `btf` (types of the running kernel), `bpf` (loading programs is permitted), `xdp` (an XDP program loads),
`ringbuf` (5.8), `bpf-loop` (5.17). Nothing is attached, and what is made for a try is closed at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path
from typing import Final

_BPF_NR: Final = {"x86_64": 321, "aarch64": 280}  # the system call's number, by architecture
_MAP_CREATE, _PROG_LOAD = 0, 5  # enum bpf_cmd
_MAP_TYPE_RINGBUF = 27  # enum bpf_map_type
_PROG_TYPE_SOCKET_FILTER, _PROG_TYPE_XDP = 1, 6  # enum bpf_prog_type
_EXIT = b"\x95" + bytes(7)


def features() -> frozenset[str]:
    """The names of what works here."""
    found = set()
    if Path("/sys/kernel/btf/vmlinux").exists():
        found.add("btf")
    if _loads(_PROG_TYPE_SOCKET_FILTER, _move(0, 0) + _EXIT):
        found.add("bpf")
    if _loads(_PROG_TYPE_XDP, _move(0, 2) + _EXIT):
        found.add("xdp")
    # Trying it would need BTF for the callback; the helper came with 5.17 and cannot be configured away.
    if "xdp" in found and kernel_version(platform.release()) >= (5, 17):
        found.add("bpf-loop")
    if _makes_ringbuf():
        found.add("ringbuf")
    return frozenset(found)


def kernel_version(release: str) -> tuple[int, ...]:
    """The leading numbers of a kernel release: (6, 1, 0) for 6.1.0-18-amd64."""
    found: list[int] = []
    for part in release.replace("-", ".").replace("+", ".").split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def boot_id() -> str:
    """The kernel's name for this boot; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _move(register: int, value: int) -> bytes:
    """BPF_MOV64_IMM."""
    return struct.pack("<BBhi", 0xB7, register, 0, value)


def _loads(kind: int, program: bytes) -> bool:
    instructions = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"GPL")
    # union bpf_attr for BPF_PROG_LOAD: prog_type, insn_cnt, insns, license, then zeros.
    attributes = struct.pack(
        "<IIQQ", kind, len(program) // 8, ctypes.addressof(instructions), ctypes.addressof(licence)
    )
    return _bpf(_PROG_LOAD, attributes)


def _makes_ringbuf() -> bool:
    # union bpf_attr for BPF_MAP_CREATE: map_type, key_size, value_size, max_entries.
    return _bpf(_MAP_CREATE, struct.pack("<IIII", _MAP_TYPE_RINGBUF, 0, 0, os.sysconf("SC_PAGE_SIZE")))


def _bpf(command: int, attributes: bytes) -> bool:
    number = _BPF_NR.get(platform.machine())
    if number is None:
        return False
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(number, command, buffer, len(buffer))
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True
