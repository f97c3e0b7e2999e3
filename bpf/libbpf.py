"""The library that loads eBPF: libbpf itself, and what it says when something fails.

bcc's bindings lead to the same library, but load a compiler first, which takes 0.1 s at each start. Errors of the kernel become
Refused: KERNEL_UNSUPPORTED where it lacks something or permission is missing, KERNEL_REFUSED with the verifier's words.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from loopback.contracts.codes import Code, Refused

if TYPE_CHECKING:
    from loopback.bpf.objects import Map

MAX_LOG: Final = 3000  # characters of the verifier's log that a refusal carries: its end says what was wrong
PROGRAM_XDP, PROGRAM_TC, PROGRAM_SYSCALL = 6, 3, 31  # linux/bpf.h
BPF_XDP: Final = 37
BPF_F_SLEEPABLE, BPF_F_XDP_HAS_FRAGS = 1 << 4, 1 << 5

_lib: Any = None
_quick: Any = None


class _Lines(threading.local):
    """What libbpf printed during the present call of this thread."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def append(self, line: str) -> None:
        self.said.append(line)

    def clear(self) -> None:
        self.said.clear()

    def words(self) -> str:
        return "".join(self.said).strip()


lines = _Lines()


class _Taken(threading.local):
    """The object that this thread is loading, and whose maps its programs shall use instead of its own."""

    def __init__(self) -> None:
        self.whole: ct.c_void_p | None = None
        self.maps: Mapping[str, Map] = {}


taken = _Taken()


def library() -> Any:
    """libbpf, with its messages collected instead of printed. Raises Refused(KERNEL_UNSUPPORTED) without it."""
    global _lib
    if _lib is not None:
        return _lib
    lib = _bound(ct.CDLL)
    lib.libbpf_set_print(ct.cast(_collect, ct.c_void_p))
    for section, (kind, attach, flags) in _SECTIONS.items():
        handler = _Handler(sz=ct.sizeof(_Handler), cookie=flags, prepare_load=ct.cast(_prepare, ct.c_void_p))
        if (made := lib.libbpf_register_prog_handler(section, kind, attach, ct.byref(handler))) < 0:
            raise Refused(Code.KERNEL_UNSUPPORTED, f"libbpf takes no handler: {os.strerror(-made)}")
    _lib = lib
    return lib


def quick() -> Any:
    """The same for calls that return at once: the interpreter is not let go for them, which in a busy process costs more than
    they do. Raises Refused(KERNEL_UNSUPPORTED) without it.
    """
    global _quick
    if _quick is None:
        library()
        _quick = _bound(ct.PyDLL)
    return _quick


def _bound(kind: type[ct.CDLL]) -> Any:
    try:
        lib = kind("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise Refused(
            Code.KERNEL_UNSUPPORTED, f"libbpf cannot be reached: {error}", "install libbpf1"
        ) from None
    for name in (
        "bpf_object__open_mem", "bpf_object__next_map", "bpf_object__next_program",
        "bpf_object__find_program_by_name", "bpf_object__find_map_by_name", "bpf_map__initial_value",
    ):  # fmt: skip
        getattr(lib, name).restype = ct.c_void_p
    for name in ("bpf_map__name", "bpf_program__name"):
        getattr(lib, name).restype = ct.c_char_p
        getattr(lib, name).argtypes = [ct.c_void_p]
    lib.bpf_program__insn_cnt.restype = ct.c_size_t
    lib.libbpf_set_print.argtypes = [ct.c_void_p]
    lib.libbpf_set_print.restype = ct.c_void_p
    return lib


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Have libbpf say nothing meanwhile: it says thousands of lines at a load, each of which waits for the interpreter."""
    lib = library()
    lib.libbpf_set_print(None)
    try:
        yield
    finally:
        lib.libbpf_set_print(ct.cast(_collect, ct.c_void_p))


class _Handler(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("cookie", ct.c_long),
        ("setup", ct.c_void_p),
        ("prepare_load", ct.c_void_p),
        ("attach", ct.c_void_p),
    )


class LoadOptions(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("attempts", ct.c_int),
        ("expected_attach_type", ct.c_int),
        *(
            (n, ct.c_uint32)
            for n in ("btf_fd", "flags", "ifindex", "kernel_version", "attach_btf", "attach_prog")
        ),
    )


#: Sections of programs: (type, where it is attached, flags of the load), as libbpf has them for the same names.
_SECTIONS: Final = {
    b"xdp.frags": (PROGRAM_XDP, BPF_XDP, BPF_F_XDP_HAS_FRAGS),
    b"xdp": (PROGRAM_XDP, BPF_XDP, 0),
    b"tc": (PROGRAM_TC, 0, 0),
    b"syscall": (PROGRAM_SYSCALL, 0, BPF_F_SLEEPABLE),
}


def _before_load(program: int, options: Any, flags: int) -> int:
    # Between libbpf's making of the maps and the load of a program: here the maps of others take the places of its own.
    # Its own call for that, bpf_map__reuse_fd, opens "/" in libbpf 1.1, which a confined module may not.
    options.contents.flags |= flags
    for name, there in taken.maps.items():
        found = quick().bpf_object__find_map_by_name(taken.whole, name.encode())
        if found and _libc.dup3(there.fd, quick().bpf_map__fd(ct.c_void_p(found)), os.O_CLOEXEC) < 0:
            return -ct.get_errno()
    return 0


_prepare = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.POINTER(LoadOptions), ct.c_long)(_before_load)


libc = ct.CDLL(None, use_errno=True)
_libc = ct.PyDLL(None, use_errno=True)  # as with quick()


def _collect_line(level: int, form: bytes, arguments: int) -> int:
    # A va_list travels as a pointer on x86-64 and arm64 alike (24 and 32 bytes there). The first call uses it up, so it
    # gets a copy: a verifier's log may have megabytes, and only its end says what was wrong.
    if level <= 1:
        copy = ct.create_string_buffer(ct.string_at(arguments, 32), 32)
        length = libc.vsnprintf(None, ct.c_size_t(0), ct.c_char_p(form), ct.byref(copy))
        buffer = ct.create_string_buffer(max(length, 0) + 1)
        libc.vsnprintf(buffer, ct.c_size_t(len(buffer)), ct.c_char_p(form), ct.c_void_p(arguments))
        lines.append(buffer.value[-2 * MAX_LOG :].decode(errors="replace"))
    return 0


_collect = ct.CFUNCTYPE(ct.c_int, ct.c_int, ct.c_char_p, ct.c_void_p)(_collect_line)


def refused(number: int, what: str) -> Refused:
    """The refusal for a negative errno that libbpf or the kernel returned for `what`."""
    number = abs(number)
    words = lines.words()
    lines.clear()
    said = f"{what}: {os.strerror(number)}" + (f"\n{words[-MAX_LOG:]}" if words else "")
    if number in (errno.EPERM, errno.EACCES) and "END PROG LOAD LOG" not in words:
        return Refused(
            Code.KERNEL_UNSUPPORTED, f"kernel: {said}", "it needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        )
    if number in (errno.ENOSYS, errno.EOPNOTSUPP):
        return Refused(Code.KERNEL_UNSUPPORTED, f"kernel: {said}", "a newer kernel is needed")
    return Refused(Code.KERNEL_REFUSED, said)


def check(result: int, what: str) -> int:
    if result < 0:
        raise refused(result if result != -1 else ct.get_errno() or errno.EINVAL, what)
    return result


def possible_cpus() -> int:
    """How many values a per-CPU map has."""
    return check(library().libbpf_num_possible_cpus(), "counting CPUs")
