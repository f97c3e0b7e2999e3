"""Load eBPF objects through libbpf: their maps, and their programs side by side. Nothing here knows a policy."""

from __future__ import annotations

import contextlib
import ctypes as ct
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from loopback.bpf.libbpf import check, library, lines, quick, taken, unheard
from loopback.bpf.objects import Map, Program
from loopback.contracts.codes import Code, Refused

SHORT: Final = 32  # instructions; a program of no more that calls no other is verified in microseconds


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
    wanted = reuse or {}, resize or {}, values or {}, constants or {}
    try:
        with unheard():
            return _load(data, *wanted)
    except Refused:
        return _load(data, *wanted)  # once more, for the words of what refuses it


def _load(
    data: bytes,
    reuse: Mapping[str, Map],
    resize: Mapping[str, int],
    values: Mapping[str, int],
    constants: Mapping[str, bytes],
) -> Loaded:
    lib = quick()
    made = Loaded({}, {})
    try:
        with opened(data) as whole:
            for name, entries in resize.items():
                _with_map(whole, name, f"sizing map {name}", lib.bpf_map__set_max_entries, entries)
            for name, size in values.items():
                _with_map(whole, name, f"sizing map {name}", lib.bpf_map__set_value_size, size)
            for name, content in constants.items():
                length = ct.c_size_t(len(content))
                _with_map(whole, name, f"setting {name}", lib.bpf_map__set_initial_value, content, length)
            for name in reuse:
                _with_map(
                    whole, name, f"leaving out map {name}", lib.bpf_map__set_autocreate, ct.c_bool(False)
                )
            short, long = _programs_by_length(whole)
            programs_wanted(whole, short if not reuse else ())
            check(library().bpf_object__load(whole), "loading the object")
            lines.clear()
            for at in map(ct.c_void_p, _each(lib.bpf_object__next_map, whole)):
                name = lib.bpf_map__name(at).decode()
                fd = reuse[name].fd if name in reuse else lib.bpf_map__fd(at)
                made.maps[name] = Map(os.dup(fd))
            if not reuse:
                made.programs |= {name: _program(whole, name) for name in short}
                short = []
        # verifying is nearly all of the time, and the kernel does it for several programs at once
        with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)), 1)) as threads:
            each = {n: threads.submit(_load_one, data, n, made.maps) for n in (*long, *short)}
        # first those that were loaded: should another one be refused, they are closed with the rest
        made.programs |= {n: one.result() for n, one in each.items() if not one.exception()}
        for one in each.values():
            one.result()
    except BaseException:
        made.close()
        raise
    return made


def _load_one(data: bytes, wanted: str, maps: Mapping[str, Map]) -> Program:
    """Load one program of an object, whose maps are there. Raises Refused."""
    lib = quick()
    with opened(data) as whole:
        for at in map(ct.c_void_p, _each(lib.bpf_object__next_map, whole)):
            # they only hold the place of those that are there, so they are made as small as may be
            if lib.bpf_map__initial_value(at, ct.byref(ct.c_size_t())) is None:
                check(lib.bpf_map__set_max_entries(at, 1), "sizing a map")
                if not lib.bpf_map__btf_value_type_id(at) and lib.bpf_map__value_size(at) > mmap.PAGESIZE:
                    check(lib.bpf_map__set_value_size(at, 8), "sizing a map")
        programs_wanted(whole, (wanted,))
        taken.whole, taken.maps = whole, maps
        try:
            check(library().bpf_object__load(whole), "loading the object")
        finally:
            taken.whole, taken.maps = None, {}
        lines.clear()
        return _program(whole, wanted)


def _program(whole: ct.c_void_p, name: str) -> Program:
    found = quick().bpf_object__find_program_by_name(whole, name.encode())
    return Program(os.dup(quick().bpf_program__fd(ct.c_void_p(found))))


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[ct.c_void_p]:
    """An object as libbpf reads it. Raises Refused(PACKAGE_MALFORMED)."""
    lib = quick()
    lines.clear()
    # without a name of ours libbpf makes one from the address in memory, and names the map of constants after it
    options = _OpenOptions(sz=ct.sizeof(_OpenOptions), object_name=b"loopback")
    handle = lib.bpf_object__open_mem(data, ct.c_size_t(len(data)), ct.byref(options))
    if not handle:
        words = lines.words()
        lines.clear()
        raise Refused(
            Code.PACKAGE_MALFORMED,
            f"this is no eBPF object: {words or 'libbpf cannot read it'}",
            "give the object file of a package, bpf/NAME.bpf.o, or build the package again",
        )
    whole = ct.c_void_p(handle)
    try:
        yield whole
    finally:
        lib.bpf_object__close(whole)


def _with_map(whole: ct.c_void_p, name: str, what: str, call: Callable[..., int], *given: Any) -> None:
    """Call `call` with the map of that name, if the object has it. Raises Refused."""
    found = quick().bpf_object__find_map_by_name(whole, name.encode())
    if found:
        check(call(ct.c_void_p(found), *given), what)


def programs_wanted(whole: ct.c_void_p, wanted: Collection[str]) -> None:
    """Have only these programs loaded with the object. Raises Refused."""
    lib = quick()
    for at in map(ct.c_void_p, _each(lib.bpf_object__next_program, whole)):
        name = lib.bpf_program__name(at).decode()
        check(lib.bpf_program__set_autoload(at, ct.c_bool(name in wanted)), f"choosing {name}")


def _programs_by_length(whole: ct.c_void_p) -> tuple[list[str], list[str]]:
    """The names of programs that are not worth a load of their own, and of the others."""
    lib = quick()
    found: tuple[list[str], list[str]] = [], []
    for at in map(ct.c_void_p, _each(lib.bpf_object__next_program, whole)):
        found[lib.bpf_program__insn_cnt(at) > SHORT].append(lib.bpf_program__name(at).decode())
    return found


def _each(following: Callable[[Any, Any], int | None], whole: Any) -> Iterator[int]:
    at = following(whole, None)
    while at:
        yield at
        at = following(whole, ct.c_void_p(at))
