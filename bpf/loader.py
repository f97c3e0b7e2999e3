"""Load eBPF objects and work with maps and programs, through libbpf as the `bcc` bindings reach it.

The only importer of `bcc`, and of it only the shared library. Nothing here knows a policy. Errors of the kernel become
Refused: KERNEL_UNSUPPORTED where it lacks something or permission is missing, KERNEL_REFUSED with the verifier's words.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from loopback.contracts.codes import Code, Refused

BPF_FS_MAGIC: Final = 0xCAFE4A11
MAX_LOG: Final = 3000  # characters of the verifier's log that a refusal carries: its end says what was wrong
BPF_ANY, BPF_NOEXIST = 0, 1
MAP_ARRAY, MAP_HASH, MAP_LPM = 2, 1, 11
NO_PREALLOC: Final = 1
LIVE_FRAMES: Final = 1 << 1
PROGRAM_XDP: Final = 6
XDP_PASS: Final = 2

_lib: Any = None
_lines: list[str] = []  # what libbpf printed during the present call


def _library() -> Any:
    """libbpf, with its messages collected instead of printed. Raises Refused(KERNEL_UNSUPPORTED) without it."""
    global _lib
    if _lib is not None:
        return _lib
    try:
        from bcc.libbcc import lib
    except (ImportError, OSError) as error:
        raise Refused(
            Code.KERNEL_UNSUPPORTED, f"libbpf cannot be reached: {error}", "install python3-bpfcc"
        ) from None
    for name in (
        "bpf_object__open_mem", "bpf_object__next_map", "bpf_object__next_program",
        "bpf_object__find_program_by_name", "bpf_object__find_map_by_name",
    ):  # fmt: skip
        getattr(lib, name).restype = ct.c_void_p
    for name in ("bpf_map__name", "bpf_program__name"):
        getattr(lib, name).restype = ct.c_char_p
        getattr(lib, name).argtypes = [ct.c_void_p]
    lib.libbpf_set_print.argtypes = [ct.c_void_p]
    lib.libbpf_set_print.restype = ct.c_void_p
    lib.libbpf_set_print(ct.cast(_collect, ct.c_void_p))
    _lib = lib
    return lib


_libc = ct.CDLL(None, use_errno=True)


def _collect_line(level: int, form: bytes, arguments: int) -> int:
    # A va_list travels as a pointer on x86-64 and arm64 alike (24 and 32 bytes there). The first call uses it up, so it
    # gets a copy: a verifier's log may have megabytes, and only its end says what was wrong.
    if level <= 1:
        copy = ct.create_string_buffer(ct.string_at(arguments, 32), 32)
        length = _libc.vsnprintf(None, ct.c_size_t(0), ct.c_char_p(form), ct.byref(copy))
        buffer = ct.create_string_buffer(max(length, 0) + 1)
        _libc.vsnprintf(buffer, ct.c_size_t(len(buffer)), ct.c_char_p(form), ct.c_void_p(arguments))
        _lines.append(buffer.value[-2 * MAX_LOG :].decode(errors="replace"))
    return 0


_collect = ct.CFUNCTYPE(ct.c_int, ct.c_int, ct.c_char_p, ct.c_void_p)(_collect_line)


def refused(number: int, what: str) -> Refused:
    """The refusal for a negative errno that libbpf or the kernel returned for `what`."""
    number = abs(number)
    words = "".join(_lines).strip()
    _lines.clear()
    said = f"{what}: {os.strerror(number)}" + (f"\n{words[-MAX_LOG:]}" if words else "")
    if number in (errno.EPERM, errno.EACCES) and "END PROG LOAD LOG" not in words:
        return Refused(
            Code.KERNEL_UNSUPPORTED, f"kernel: {said}", "it needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        )
    if number in (errno.ENOSYS, errno.EOPNOTSUPP):
        return Refused(Code.KERNEL_UNSUPPORTED, f"kernel: {said}", "a newer kernel is needed")
    return Refused(Code.KERNEL_REFUSED, said)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise refused(result if result != -1 else ct.get_errno() or errno.EINVAL, what)
    return result


class _MapInfo(ct.Structure):
    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
    )


class Map:
    """One map, by its descriptor, which this object owns. Keys and values are bytes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = _MapInfo()
        length = ct.c_uint32(ct.sizeof(info))
        _check(_library().bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(length)), "reading a map")
        self.id: int = info.id
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self.max_entries: int = info.max_entries
        self.name: str = info.name.decode()
        self._memory: mmap.mmap | None = None

    @classmethod
    def create(
        cls, kind: int, name: str, key_size: int, value_size: int, entries: int, flags: int = 0
    ) -> Map:
        """A new map of the kernel. Raises Refused."""

        class Options(ct.Structure):
            _fields_ = (
                ("sz", ct.c_size_t),
                *(
                    (n, ct.c_uint32)
                    for n in ("btf_fd", "btf_key", "btf_value", "btf_vmlinux", "inner_fd", "flags")
                ),
                ("extra", ct.c_uint64),
                ("numa", ct.c_uint32),
                ("ifindex", ct.c_uint32),
            )

        options = Options(sz=ct.sizeof(Options), flags=flags)
        made = _library().bpf_map_create(
            kind, name.encode(), key_size, value_size, max(entries, 1), ct.byref(options)
        )
        return cls(_check(made, f"making the map {name}"))

    @classmethod
    def pinned(cls, path: Path) -> Map:
        """A pinned map. Raises Refused."""
        return cls(_check(_library().bpf_obj_get(os.fsencode(path)), f"opening {path}"))

    def lookup(self, key: bytes, size: int | None = None) -> bytes | None:
        """The value, or None. `size` is for per-CPU maps, whose values are one per possible CPU."""
        value = ct.create_string_buffer(size or self.value_size)
        result = _library().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        _check(result, f"reading map {self.name}")
        return value.raw

    def update(self, key: bytes, value: bytes | ct.Structure, flags: int = BPF_ANY) -> None:
        """Set one entry. Raises Refused."""
        given = ct.byref(value) if isinstance(value, ct.Structure) else value
        _check(
            _library().bpf_map_update_elem(self.fd, key, given, ct.c_uint64(flags)),
            f"writing map {self.name}",
        )

    def update_fd(self, index: int, inner: Map) -> None:
        """Put an inner map into this outer one. Returns when no packet can see the one it replaced."""
        self.update(struct.pack("=I", index), struct.pack("=i", inner.fd))

    def update_batch(self, keys: bytes, values: bytes, count: int) -> None:
        """Set many entries in one call. Raises Refused."""

        class Options(ct.Structure):
            _fields_ = (("sz", ct.c_size_t), ("elem_flags", ct.c_uint64), ("flags", ct.c_uint64))

        options = Options(sz=ct.sizeof(Options))
        number = ct.c_uint32(count)
        if count:
            result = _library().bpf_map_update_batch(
                self.fd, keys, values, ct.byref(number), ct.byref(options)
            )
            _check(result, f"filling map {self.name}")

    def delete(self, key: bytes) -> None:
        """Remove one entry; harmless when there is none."""
        result = _library().bpf_map_delete_elem(self.fd, key)
        if result != -errno.ENOENT:
            _check(result, f"deleting from map {self.name}")

    def keys(self) -> Iterator[bytes]:
        """Every key, as far as the map holds still."""
        key: bytes | None = None
        following = ct.create_string_buffer(self.key_size)
        while _library().bpf_map_get_next_key(self.fd, key, following) == 0:
            key = following.raw
            yield key

    def store_word(self, value: int) -> None:
        """Write the first eight bytes of a mappable array with one aligned store."""
        ct.c_uint64.from_buffer(self._mapped()).value = value

    def load_word(self) -> int:
        """Read them."""
        return ct.c_uint64.from_buffer(self._mapped()).value

    def _mapped(self) -> mmap.mmap:
        if self._memory is None:
            self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
        return self._memory

    def pin(self, path: Path) -> None:
        """Pin it. Raises Refused."""
        _check(_library().bpf_obj_pin(self.fd, os.fsencode(path)), f"pinning {path}")

    def close(self) -> None:
        """Give the descriptor back; the kernel keeps what is pinned or in use."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _ProgramInfo(ct.Structure):
    _fields_ = (("type", ct.c_uint32), ("id", ct.c_uint32), ("tag", ct.c_uint8 * 8))


class _TestRun(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("data_in", ct.c_void_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    )


class Program:
    """One loaded program, by its descriptor, which this object owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = _ProgramInfo()
        length = ct.c_uint32(ct.sizeof(info))
        _check(_library().bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(length)), "reading a program")
        self.id: int = info.id
        self.tag = bytes(info.tag).hex()

    @classmethod
    def pinned(cls, path: Path) -> Program:
        """A pinned program. Raises Refused."""
        return cls(_check(_library().bpf_obj_get(os.fsencode(path)), f"opening {path}"))

    def pin(self, path: Path) -> None:
        """Pin it. Raises Refused."""
        _check(_library().bpf_obj_pin(self.fd, os.fsencode(path)), f"pinning {path}")

    def run(
        self, data: bytes, *, repeat: int = 1, context: bytes = b"", flags: int = 0, batch: int = 0
    ) -> tuple[int, bytes, int]:
        """TEST_RUN: (return value, the data afterwards, ns per run). With LIVE_FRAMES packets really leave. Raises Refused."""
        given = ct.create_string_buffer(data, len(data)) if data else None
        out = ct.create_string_buffer(len(data)) if data and not flags & LIVE_FRAMES else None
        beside = ct.create_string_buffer(context, len(context)) if context else None
        options = _TestRun(
            sz=ct.sizeof(_TestRun),
            data_in=ct.cast(given, ct.c_void_p) if given else None,
            data_size_in=len(data),
            data_out=ct.cast(out, ct.c_void_p) if out else None,
            data_size_out=len(data) if out else 0,
            ctx_in=ct.cast(beside, ct.c_void_p) if beside else None,
            ctx_size_in=len(context),
            repeat=repeat,
            flags=flags,
            batch_size=batch,
        )
        _check(_library().bpf_prog_test_run_opts(self.fd, ct.byref(options)), "running a program")
        return options.retval, out.raw[: options.data_size_out] if out else b"", options.duration

    def run_syscall(self, context: ct.Structure) -> int:
        """Run a program of type syscall; `context` is its input and its output. Raises Refused."""
        options = _TestRun(
            sz=ct.sizeof(_TestRun),
            ctx_in=ct.cast(ct.byref(context), ct.c_void_p),
            ctx_size_in=ct.sizeof(context),
        )
        _check(_library().bpf_prog_test_run_opts(self.fd, ct.byref(options)), "running a program")
        return int(options.retval)

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Loaded:
    """What an object became: its maps and programs by name."""

    def __init__(self, maps: dict[str, Map], programs: dict[str, Program]) -> None:
        self.maps = maps
        self.programs = programs

    def close(self) -> None:
        """Give every descriptor back."""
        for there in self.maps.values():
            there.close()
        for program in self.programs.values():
            program.close()


class _OpenOptions(ct.Structure):
    _fields_ = (("sz", ct.c_size_t), ("object_name", ct.c_char_p))


def load(
    data: bytes, *, reuse: Mapping[str, Map] | None = None, resize: Mapping[str, int] | None = None
) -> Loaded:
    """Load an object file. `reuse` are maps to take instead of making them, `resize` other numbers of entries.

    Raises Refused(PACKAGE_MALFORMED) for what is no object, KERNEL_REFUSED with the verifier's words, KERNEL_UNSUPPORTED.
    """
    lib = _library()
    _lines.clear()
    # without a name of ours libbpf makes one from the address in memory, and names the map of constants after it
    options = _OpenOptions(sz=ct.sizeof(_OpenOptions), object_name=b"loopback")
    handle = lib.bpf_object__open_mem(data, ct.c_size_t(len(data)), ct.byref(options))
    if not handle:
        words = "".join(_lines).strip()
        _lines.clear()
        raise Refused(Code.PACKAGE_MALFORMED, f"this is no eBPF object: {words or 'libbpf cannot read it'}")
    whole = ct.c_void_p(handle)
    try:
        for name, entries in (resize or {}).items():
            found = lib.bpf_object__find_map_by_name(whole, name.encode())
            if found:
                _check(lib.bpf_map__set_max_entries(ct.c_void_p(found), entries), f"sizing map {name}")
        for name, there in (reuse or {}).items():
            found = lib.bpf_object__find_map_by_name(whole, name.encode())
            if found:
                _check(lib.bpf_map__reuse_fd(ct.c_void_p(found), there.fd), f"reusing map {name}")
        _check(lib.bpf_object__load(whole), "loading the object")
        _lines.clear()
        maps = {
            lib.bpf_map__name(ct.c_void_p(at)).decode(): Map(os.dup(lib.bpf_map__fd(ct.c_void_p(at))))
            for at in _each(lib.bpf_object__next_map, whole)
        }
        programs = {
            lib.bpf_program__name(ct.c_void_p(at)).decode(): Program(
                os.dup(lib.bpf_program__fd(ct.c_void_p(at)))
            )
            for at in _each(lib.bpf_object__next_program, whole)
        }
        return Loaded(maps, programs)
    finally:
        lib.bpf_object__close(whole)


def _each(following: Callable[[Any, Any], int | None], whole: Any) -> Iterator[int]:
    at = following(whole, None)
    while at:
        yield at
        at = following(whole, ct.c_void_p(at))


def possible_cpus() -> int:
    """How many values a per-CPU map has."""
    return _check(_library().libbpf_num_possible_cpus(), "counting CPUs")


class _LoadOptions(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("attempts", ct.c_int),
        ("expected_attach_type", ct.c_int),
        *(
            (n, ct.c_uint32)
            for n in ("btf_fd", "flags", "ifindex", "kernel_version", "attach_btf", "attach_prog")
        ),
    )


def why_unsupported() -> str:
    """Empty when this process may make maps and load XDP programs here, else why not, after the kernel's version.

    It really tries both, and leaves nothing behind.
    """
    kernel = ".".join(os.uname().release.split(".")[:2])
    try:
        lib = _library()
    except Refused as refusal:
        return f"{kernel}: {refusal.reason}"
    made = lib.bpf_map_create(MAP_ARRAY, b"lb_trial", 4, 4, 1, None)
    if made >= 0:
        os.close(made)
        code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, XDP_PASS, 0x95, 0, 0, 0)  # r0 = XDP_PASS; exit
        options = _LoadOptions(sz=ct.sizeof(_LoadOptions), attempts=1)
        made = lib.bpf_prog_load(
            PROGRAM_XDP, b"lb_trial", b"GPL", code, ct.c_size_t(len(code) // 8), ct.byref(options)
        )
        if made >= 0:
            os.close(made)
    _lines.clear()
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
    if _libc.statfs(os.fsencode(path), buffer) != 0:
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
