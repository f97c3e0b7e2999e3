"""Maps and programs of eBPF, as objects that hold a descriptor. Nothing here knows a policy."""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from loopback.bpf.libbpf import check, library, quick
from loopback.contracts.codes import Code, Refused

BPF_F_RDONLY: Final = 1 << 3  # linux/bpf.h
BPF_ANY, BPF_NOEXIST = 0, 1
MAP_ARRAY, MAP_HASH, MAP_LPM = 2, 1, 11
NO_PREALLOC: Final = 1
LIVE_FRAMES: Final = 1 << 1


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
        check(quick().bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(length)), "reading a map")
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
        made = library().bpf_map_create(
            kind, name.encode(), key_size, value_size, max(entries, 1), ct.byref(options)
        )
        return cls(check(made, f"making the map {name}"))

    @classmethod
    def pinned(cls, path: Path, *, read_only: bool = False) -> Map:
        """A pinned map; with `read_only` the kernel lets nobody write to it through this descriptor. Raises Refused.

        A shared mapping needs a descriptor that may write, so such a map opens another one for `memory`, and maps for reading.
        """
        options = _GetOptions(sz=ct.sizeof(_GetOptions), file_flags=BPF_F_RDONLY if read_only else 0)
        found = library().bpf_obj_get_opts(os.fsencode(path), ct.byref(options))
        made = cls(check(found, f"opening {path}"))
        made._read_only = path if read_only else None
        return made

    def lookup(self, key: bytes, size: int | None = None) -> bytes | None:
        """The value, or None. `size` is for per-CPU maps, whose values are one per possible CPU."""
        value = ct.create_string_buffer(size or self.value_size)
        result = library().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        check(result, f"reading map {self.name}")
        return value.raw

    def update(self, key: bytes, value: bytes | ct.Structure, flags: int = BPF_ANY) -> None:
        """Set one entry. Raises Refused."""
        given = ct.byref(value) if isinstance(value, ct.Structure) else value
        check(
            library().bpf_map_update_elem(self.fd, key, given, ct.c_uint64(flags)),
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
            result = library().bpf_map_update_batch(
                self.fd, keys, values, ct.byref(number), ct.byref(options)
            )
            check(result, f"filling map {self.name}")

    def delete(self, key: bytes) -> None:
        """Remove one entry; harmless when there is none."""
        result = library().bpf_map_delete_elem(self.fd, key)
        if result != -errno.ENOENT:
            check(result, f"deleting from map {self.name}")

    def keys(self) -> Iterator[bytes]:
        """Every key, as far as the map holds still."""
        key: bytes | None = None
        following = ct.create_string_buffer(self.key_size)
        while library().bpf_map_get_next_key(self.fd, key, following) == 0:
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
        check(library().bpf_obj_pin(self.fd, os.fsencode(path)), f"pinning {path}")

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
        check(quick().bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(length)), "reading a program")
        self.id: int = info.id
        self.tag = bytes(info.tag).hex()
        self.verified: int = info.verified

    @classmethod
    def pinned(cls, path: Path) -> Program:
        """A pinned program. Raises Refused."""
        return cls(check(library().bpf_obj_get(os.fsencode(path)), f"opening {path}"))

    def pin(self, path: Path) -> None:
        """Pin it. Raises Refused."""
        check(library().bpf_obj_pin(self.fd, os.fsencode(path)), f"pinning {path}")

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
        check(library().bpf_prog_test_run_opts(self.fd, ct.byref(options)), "running a program")
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
        run, fd, reference = library().bpf_prog_test_run_opts, self.fd, ct.byref(options)

        def once(data: bytes) -> bytes:
            size = len(data)
            if size > most:
                raise ValueError(f"{size} bytes are more than the {most} that this was made for")
            ct.memmove(given, data, size)
            options.data_size_in = options.data_size_out = size
            check(run(fd, reference), "running a program")
            return ct.string_at(out, options.data_size_out)

        return once

    def run_syscall(self, context: ct.Structure) -> int:
        """Run a program of type syscall; `context` is its input and its output. Raises Refused."""
        options = _TestRun(
            sz=ct.sizeof(_TestRun),
            ctx_in=ct.cast(ct.byref(context), ct.c_void_p),
            ctx_size_in=ct.sizeof(context),
        )
        check(library().bpf_prog_test_run_opts(self.fd, ct.byref(options)), "running a program")
        return int(options.retval)

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
