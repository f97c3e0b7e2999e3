"""Load eBPF objects and work with maps and programs, through libbpf.

The shared library itself: bcc's bindings lead to the same one, but load a compiler first, which takes 0.1 s at each start.
Nothing here knows a policy. Errors of the kernel become Refused: KERNEL_UNSUPPORTED where it lacks something or permission is
missing, KERNEL_REFUSED with the verifier's words.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import mmap
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from loopback.contracts.codes import Code, Refused

BPF_F_RDONLY: Final = 1 << 3  # linux/bpf.h
BPF_FS_MAGIC: Final = 0xCAFE4A11
MAX_LOG: Final = 3000  # characters of the verifier's log that a refusal carries: its end says what was wrong
BPF_ANY, BPF_NOEXIST = 0, 1
MAP_ARRAY, MAP_HASH, MAP_LPM = 2, 1, 11
NO_PREALLOC: Final = 1
LIVE_FRAMES: Final = 1 << 1
PROGRAM_XDP, PROGRAM_TC, PROGRAM_SYSCALL = 6, 3, 31
BPF_XDP: Final = 37
BPF_F_SLEEPABLE, BPF_F_XDP_HAS_FRAGS = 1 << 4, 1 << 5
XDP_PASS: Final = 2

_lib: Any = None


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


_lines = _Lines()


class _Taken(threading.local):
    """The object that this thread is loading, and whose maps its programs shall use instead of its own."""

    def __init__(self) -> None:
        self.whole: ct.c_void_p | None = None
        self.maps: Mapping[str, Map] = {}


_taken = _Taken()


def _library() -> Any:
    """libbpf, with its messages collected instead of printed. Raises Refused(KERNEL_UNSUPPORTED) without it."""
    global _lib
    if _lib is not None:
        return _lib
    try:
        lib = ct.CDLL("libbpf.so.1", use_errno=True)
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
    lib.libbpf_set_print.argtypes = [ct.c_void_p]
    lib.libbpf_set_print.restype = ct.c_void_p
    lib.libbpf_set_print(ct.cast(_collect, ct.c_void_p))
    for section, (kind, attach, flags) in _SECTIONS.items():
        handler = _Handler(sz=ct.sizeof(_Handler), cookie=flags, prepare_load=ct.cast(_prepare, ct.c_void_p))
        if (made := lib.libbpf_register_prog_handler(section, kind, attach, ct.byref(handler))) < 0:
            raise Refused(Code.KERNEL_UNSUPPORTED, f"libbpf takes no handler: {os.strerror(-made)}")
    _lib = lib
    return lib


class _Handler(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("cookie", ct.c_long),
        ("setup", ct.c_void_p),
        ("prepare_load", ct.c_void_p),
        ("attach", ct.c_void_p),
    )


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
    for name, there in _taken.maps.items():
        found = _library().bpf_object__find_map_by_name(_taken.whole, name.encode())
        if found and _libc.dup3(there.fd, _library().bpf_map__fd(ct.c_void_p(found)), os.O_CLOEXEC) < 0:
            return -ct.get_errno()
    return 0


_prepare = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.POINTER(_LoadOptions), ct.c_long)(_before_load)


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
    words = _lines.words()
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


class _GetOptions(ct.Structure):
    _fields_ = (("sz", ct.c_size_t), ("file_flags", ct.c_uint32))


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
        self._read_only: Path | None = None

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
    def pinned(cls, path: Path, *, read_only: bool = False) -> Map:
        """A pinned map; with `read_only` the kernel lets nobody write to it through this descriptor. Raises Refused.

        A shared mapping needs a descriptor that may write, so such a map opens another one for `memory`, and maps for reading.
        """
        options = _GetOptions(sz=ct.sizeof(_GetOptions), file_flags=BPF_F_RDONLY if read_only else 0)
        found = _library().bpf_obj_get_opts(os.fsencode(path), ct.byref(options))
        made = cls(_check(found, f"opening {path}"))
        made._read_only = path if read_only else None
        return made

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
        ct.c_uint64.from_buffer(self.memory()).value = value

    def load_word(self) -> int:
        """Read them."""
        if self._read_only:
            return int(struct.unpack_from("=Q", self.memory())[0])
        return ct.c_uint64.from_buffer(self.memory()).value

    def memory(self) -> mmap.mmap:
        """The values of a mappable array, shared with the kernel: what is written here, programs see at once."""
        if self._memory is None:
            size = self.value_size * self.max_entries
            pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            if self._read_only is None:
                self._memory = mmap.mmap(self.fd, pages)
            else:
                there = Map.pinned(self._read_only)
                try:
                    if there.id != self.id:
                        raise Refused(Code.KERNEL_REFUSED, f"{self._read_only} is another map by now")
                    self._memory = mmap.mmap(there.fd, pages, prot=mmap.PROT_READ)
                finally:
                    there.close()
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
    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("unused", ct.c_uint8 * 200),
        ("verified", ct.c_uint32),  # instructions that the verifier walked; Linux 5.16
        ("more", ct.c_uint32 * 2),
    )


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
        self.verified: int = info.verified

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

    def repeated(self, most: int) -> Callable[[bytes], bytes]:
        """`run` for a great many inputs of up to `most` bytes, with buffers made once: from an input to the data afterwards.

        It raises Refused as `run` does, and ValueError for an input that is longer. Not for several threads at once.
        """
        given, out = ct.create_string_buffer(most), ct.create_string_buffer(most)
        options = _TestRun(
            sz=ct.sizeof(_TestRun),
            data_in=ct.cast(given, ct.c_void_p),
            data_out=ct.cast(out, ct.c_void_p),
            repeat=1,
        )
        run, fd, reference = _library().bpf_prog_test_run_opts, self.fd, ct.byref(options)

        def once(data: bytes) -> bytes:
            size = len(data)
            if size > most:
                raise ValueError(f"{size} bytes are more than the {most} that this was made for")
            ct.memmove(given, data, size)
            options.data_size_in = options.data_size_out = size
            _check(run(fd, reference), "running a program")
            return ct.string_at(out, options.data_size_out)

        return once

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
    data: bytes,
    *,
    reuse: Mapping[str, Map] | None = None,
    resize: Mapping[str, int] | None = None,
    values: Mapping[str, int] | None = None,
    constants: Mapping[str, bytes] | None = None,
) -> Loaded:
    """Load an object file. Its programs are verified side by side, on as many CPUs as this process may use.

    `reuse` are maps to take instead of making them, `resize` other numbers of entries, `values` other sizes of values in bytes,
    `constants` the whole content of sections of constants, which the verifier then knows.

    Raises Refused(PACKAGE_MALFORMED) for what is no object, KERNEL_REFUSED with the verifier's words, KERNEL_UNSUPPORTED.
    """
    lib = _library()
    maps: dict[str, Map] = {}
    programs: dict[str, Program] = {}
    with _opened(data) as whole:
        for name, entries in (resize or {}).items():
            _with_map(whole, name, f"sizing map {name}", lib.bpf_map__set_max_entries, entries)
        for name, size in (values or {}).items():
            _with_map(whole, name, f"sizing map {name}", lib.bpf_map__set_value_size, size)
        for name, content in (constants or {}).items():
            length = ct.c_size_t(len(content))
            _with_map(whole, name, f"setting {name}", lib.bpf_map__set_initial_value, content, length)
        reuse = reuse or {}
        for name in reuse:
            _with_map(whole, name, f"leaving out map {name}", lib.bpf_map__set_autocreate, ct.c_bool(False))
        names = _programs_wanted(whole, None)
        _check(lib.bpf_object__load(whole), "loading the object")
        _lines.clear()
        for at in _each(lib.bpf_object__next_map, whole):
            name = lib.bpf_map__name(ct.c_void_p(at)).decode()
            maps[name] = Map(os.dup(reuse[name].fd if name in reuse else lib.bpf_map__fd(ct.c_void_p(at))))
    made = Loaded(maps, programs)
    try:
        # verifying is nearly all of the time, and the kernel does it for several programs at once
        with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)), 1)) as threads:
            for name, program in zip(
                names, threads.map(lambda n: _load_one(data, n, maps), names), strict=True
            ):
                programs[name] = program
    except BaseException:
        made.close()
        raise
    return made


def _load_one(data: bytes, wanted: str, maps: Mapping[str, Map]) -> Program:
    """Load one program of an object, whose maps are there. Raises Refused."""
    lib = _library()
    with _opened(data) as whole:
        for at in map(ct.c_void_p, _each(lib.bpf_object__next_map, whole)):
            # they only hold the place of those that are there, so they are made as small as may be
            if lib.bpf_map__initial_value(at, ct.byref(ct.c_size_t())) is None:
                _check(lib.bpf_map__set_max_entries(at, 1), "sizing a map")
                if not lib.bpf_map__btf_value_type_id(at) and lib.bpf_map__value_size(at) > mmap.PAGESIZE:
                    _check(lib.bpf_map__set_value_size(at, 8), "sizing a map")
        _programs_wanted(whole, wanted)
        _taken.whole, _taken.maps = whole, maps
        try:
            _check(lib.bpf_object__load(whole), "loading the object")
        finally:
            _taken.whole, _taken.maps = None, {}
        _lines.clear()
        found = lib.bpf_object__find_program_by_name(whole, wanted.encode())
        return Program(os.dup(lib.bpf_program__fd(ct.c_void_p(found))))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[ct.c_void_p]:
    """An object as libbpf reads it. Raises Refused(PACKAGE_MALFORMED)."""
    lib = _library()
    _lines.clear()
    # without a name of ours libbpf makes one from the address in memory, and names the map of constants after it
    options = _OpenOptions(sz=ct.sizeof(_OpenOptions), object_name=b"loopback")
    handle = lib.bpf_object__open_mem(data, ct.c_size_t(len(data)), ct.byref(options))
    if not handle:
        words = _lines.words()
        _lines.clear()
        raise Refused(Code.PACKAGE_MALFORMED, f"this is no eBPF object: {words or 'libbpf cannot read it'}")
    whole = ct.c_void_p(handle)
    try:
        yield whole
    finally:
        lib.bpf_object__close(whole)


def _with_map(whole: ct.c_void_p, name: str, what: str, call: Callable[..., int], *given: Any) -> None:
    """Call `call` with the map of that name, if the object has it. Raises Refused."""
    found = _library().bpf_object__find_map_by_name(whole, name.encode())
    if found:
        _check(call(ct.c_void_p(found), *given), what)


def _programs_wanted(whole: ct.c_void_p, wanted: str | None) -> list[str]:
    """Have only the program `wanted` loaded with the object, or none; the names of all. Raises Refused."""
    lib = _library()
    names = []
    for at in _each(lib.bpf_object__next_program, whole):
        name = lib.bpf_program__name(ct.c_void_p(at)).decode()
        _check(lib.bpf_program__set_autoload(ct.c_void_p(at), ct.c_bool(name == wanted)), f"choosing {name}")
        names.append(name)
    return names


def _each(following: Callable[[Any, Any], int | None], whole: Any) -> Iterator[int]:
    at = following(whole, None)
    while at:
        yield at
        at = following(whole, ct.c_void_p(at))


def possible_cpus() -> int:
    """How many values a per-CPU map has."""
    return _check(_library().libbpf_num_possible_cpus(), "counting CPUs")


def object_ids() -> set[tuple[str, int]]:
    """Kind and id of every map, program and link of this kernel, none of which is opened for that.

    It matters: a program array that is opened by its id while its last holder lets go is emptied twice, and never freed
    (seen on Linux 6.18: prog_array_map_clear takes a reference for work that is queued already).
    """
    lib = _library()
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
