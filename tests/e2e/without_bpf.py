"""Run a command on a machine that does not permit eBPF: `python without_bpf.py COMMAND…`.

A seccomp filter answers every bpf(2) with EPERM, as an unprivileged container would, for the command and all it starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]
LOAD_NUMBER, EQUAL, RETURN = 0x20, 0x15, 0x06  # classic BPF: load a word, jump if equal, return
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


class Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_bpf() -> None:
    """Install the filter for this process and its children. Raises OSError."""
    code = b"".join(
        struct.pack("HBBI", *one)
        for one in (
            (LOAD_NUMBER, 0, 0, 0),
            (EQUAL, 0, 1, BPF_SYSCALL),
            (RETURN, 0, 0, ERRNO | errno.EPERM),
            (RETURN, 0, 0, ALLOW),
        )
    )
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(code) // 8, code)
    for call in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid_bpf()
    os.execvp(sys.argv[1], sys.argv[1:])
