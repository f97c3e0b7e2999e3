"""Giving up power for good, by the kernel's own calls: capabilities, privileges by execve, files, limits.

Everything here works on the calling thread and can only take away; what is given up does not come back. So it is called
where there is one thread: in a fresh child before its program, or in an agent before it does anything. The numbers are
the kernel's user-space interface (linux/capability.h, prctl.h, securebits.h, landlock.h), the same on every
architecture.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

_NAMES: Final = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
#: By number, 0 to 40 (Linux 5.9).
CAPABILITIES: Final = tuple("CAP_" + name for name in _NAMES.split())
SETPCAP: Final = "CAP_SETPCAP"

NOFILE: Final = 4096  # open files of a module; a firewall with a thousand devices has about two thousand
OOM_SCORE: Final = (
    300  # of 1000: where memory runs out, a module goes before the agent and before what the host is for
)

_CAP_VERSION = 0x20080522  # two words of 32 bits
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 1, 4, 23, 24
_PR_SET_SECCOMP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 22, 28, 38, 47
_AMBIENT_RAISE, _AMBIENT_CLEAR = 2, 4
#: Root is nobody special, for good: NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE and the locks of all four bits.
_SECUREBITS = 0b11101111
_NO_AMBIENT = 0b11000000

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_CHANGE_FOLDER = 0b1111111110000  # REMOVE_DIR … MAKE_SYM
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READS = _READ_FILE | _READ_DIR
_SCOPES = 0b11  # abstract Unix sockets, signals
_ABI_REFER, _ABI_TRUNCATE, _ABI_SCOPES = 2, 3, 6

#: What `fence` asks of Landlock, by the name of the feature: the version that brought it, and what is missing without it.
FENCES: Final = {
    "landlock": (1, "no fence around files: this kernel has no Landlock"),
    "landlock-truncate": (_ABI_TRUNCATE, "files outside the fence can be cut short: that needs Linux 6.2"),
    "landlock-scopes": (
        _ABI_SCOPES,
        "no fence around signals and abstract Unix sockets: that needs Linux 6.12",
    ),
}

_libc = ctypes.CDLL(None, use_errno=True)


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """What a process may reach of the file system: everything in `write`, and to read or run what is in `read` and `run`.

    `read` None leaves reading and running as they are. `alone` keeps it from signalling processes outside the fence.
    What does not exist is left out.
    """

    write: tuple[Path, ...] = ()
    read: tuple[Path, ...] | None = None
    run: tuple[Path, ...] = ()
    alone: bool = False


def held() -> frozenset[str]:
    """The capabilities of this thread that count (the permitted set)."""
    permitted = _capget()[1]
    return frozenset(name for number, name in enumerate(CAPABILITIES) if permitted >> number & 1)


def keep_only(names: Iterable[str], *, ambient: bool = True, giving: bool = False) -> None:
    """Have exactly these capabilities, and with `ambient` hand them on through execve; every other is gone for good.

    `giving` lets children make theirs ambient still: for the spawner. Raises OSError (EPERM) where one of them is not held,
    ValueError for a name that Linux does not know.
    """
    wanted = frozenset(names)
    bits = sum(1 << CAPABILITIES.index(name) for name in wanted)
    powerful = SETPCAP in held()
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR)
    number = 0
    # To the end of the running kernel's list, which may be longer than ours.
    while (there := _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)) >= 0:
        # Without SETPCAP the bounding set stays; no_new_privs keeps it from mattering.
        if there and powerful and not bits >> number & 1:
            _prctl(_PR_CAPBSET_DROP, number)
        number += 1
    first = bits | (1 << CAPABILITIES.index(SETPCAP) if powerful else 0)
    _capset(first, first, bits if ambient else 0)
    if ambient:
        for name in wanted:
            _prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, CAPABILITIES.index(name))
    if powerful:
        _prctl(_PR_SET_SECUREBITS, _SECUREBITS & ~_NO_AMBIENT if giving else _SECUREBITS)
    _capset(bits, bits, bits if ambient else 0)


def no_new_privileges() -> None:
    """From now on execve gives nothing that the caller has not: no set-user-ID, no file capabilities."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def leave_no_core() -> None:
    """Write no core file, and let nobody without CAP_SYS_PTRACE look into this process's memory: there are keys in it.

    The limit is for good and for children too. The rest ends with execve, so each program has to ask for it; without it, a
    kernel that pipes cores to a program (core_pattern with `|`) does not look at the limit.
    """
    dumpable(False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def dumpable(yes: bool) -> None:
    """Whether this process's memory and what /proc says of it belong to its user (prctl(2), PR_SET_DUMPABLE)."""
    _prctl(_PR_SET_DUMPABLE, int(yes))


def die_with_parent(number: int) -> None:
    """Have the kernel send this signal when the thread that forked this process ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def limit(*, memory_mib: int, tasks: int | None) -> None:
    """Resource limits of a module. `tasks` counts for every user but root, whom only a control group holds."""
    data = memory_mib * 1024 * 1024
    # Private data, not address space: the eBPF libraries map hundreds of MiB that they never touch.
    for kind, value in (
        (resource.RLIMIT_DATA, data),
        (resource.RLIMIT_NOFILE, NOFILE),
        (resource.RLIMIT_CORE, 0),
        *([(resource.RLIMIT_NPROC, tasks)] if tasks is not None else []),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def filter_calls(program: bytes) -> None:
    """Put a system-call filter (`seccomp.program`) on this process and its children. Raises OSError."""
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: length in instructions of 8 bytes, padding, address
    header = ctypes.create_string_buffer(
        struct.pack("@HxxxxxxQ" if ctypes.sizeof(ctypes.c_void_p) == 8 else "@HxxI",
                    len(program) // 8, ctypes.addressof(instructions))
    )  # fmt: skip
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(header))  # SECCOMP_MODE_FILTER


def landlock_abi() -> int:
    """The running kernel's version of Landlock; 0 where it has none."""
    version: int = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    return max(version, 0)


def fence(what: Fence) -> bool:
    """Fence this process in, for good; whether the kernel can. Needs `no_new_privileges` first. Raises OSError."""
    abi = landlock_abi()
    if abi == 0:
        return False
    # REFER is denied to whoever is fenced in unless it is given, so it is handled wherever it is known.
    changing = (
        _WRITE_FILE | _CHANGE_FOLDER | _REFER * (abi >= _ABI_REFER) | _TRUNCATE * (abi >= _ABI_TRUNCATE)
    )
    handled = changing | (0 if what.read is None else _READS | _EXECUTE)
    scopes = _SCOPES if what.alone and abi >= _ABI_SCOPES else 0
    attributes = struct.pack("=QQQ", handled, 0, scopes)
    # An older kernel takes the part that it knows.
    attributes = attributes[: 24 if scopes else 8]
    ruleset = _libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        raise _error("landlock_create_ruleset")
    try:
        for path in what.write:
            _allow(ruleset, path, handled & ~_EXECUTE)
        for path in what.read or ():
            _allow(ruleset, path, handled & _READS)
        for path in what.run:
            _allow(ruleset, path, handled & (_READS | _EXECUTE))
        if _libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) < 0:
            raise _error("landlock_restrict_self")
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: Path, access: int) -> None:
    if access == 0:
        return
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        if not path.is_dir():
            access &= _ON_FILES
        rule = struct.pack("=Qi", access, descriptor)  # struct landlock_path_beneath_attr, packed
        if _libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0) < 0:
            raise _error(f"landlock_add_rule {path}")
    finally:
        os.close(descriptor)


def _capget() -> tuple[int, int, int]:
    data = ctypes.create_string_buffer(24)
    if _libc.capget(struct.pack("=Ii", _CAP_VERSION, 0), data) < 0:
        raise _error("capget")
    low_e, low_p, low_i, high_e, high_p, high_i = struct.unpack("=6I", data.raw)
    return low_e | high_e << 32, low_p | high_p << 32, low_i | high_i << 32


def _capset(effective: int, permitted: int, inheritable: int) -> None:
    words = [
        value >> shift & 0xFFFFFFFF for shift in (0, 32) for value in (effective, permitted, inheritable)
    ]
    if _libc.capset(struct.pack("=Ii", _CAP_VERSION, 0), struct.pack("=6I", *words)) < 0:
        raise _error("capset")


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *words) < 0:
        raise _error(f"prctl {option}")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
