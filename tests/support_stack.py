"""How much stack the programs of an object take, as the verifier of any kernel adds it up."""

from __future__ import annotations

import ctypes as ct
import struct
from bisect import bisect_right
from functools import cache
from typing import Final, NamedTuple

from loopback.bpf import libbpf, loader

LIMIT: Final = 512  # bytes along the deepest way of calls, in every kernel
DEEPEST: Final = 8  # calls, likewise
_CALL, _LOAD64, _MOVE, _ADD = 0x85, 0x18, 0xBF, 0x07  # opcodes, linux/bpf.h
_TO_PROGRAM, _TO_FUNCTION, _FRAME = 1, 4, 10  # kinds of call and of constant; the register of the frame
_MEMORY: Final = {1, 2, 3}  # classes: LDX, ST, STX


class Stack(NamedTuple):
    """Bytes and calls of the deepest way, with each frame rounded up to 32 bytes: kernels before 6.8 do that."""

    bytes: int
    calls: int


class _Instruction(NamedTuple):
    code: int
    target: int
    source: int
    offset: int
    value: int


def of_program(data: bytes, name: str) -> Stack:
    """The stack of one program of an object, from its instructions as they are linked. Raises Refused."""
    code = _linked(data, name)
    calls = [(at, at + one.value + 1) for at, one in enumerate(code) if _leads(one)]
    starts = sorted({0, *(to for _, to in calls)})
    frames = [_frame(code[begin:end]) for begin, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    callees: dict[int, set[int]] = {}
    for at, to in calls:
        callees.setdefault(bisect_right(starts, at) - 1, set()).add(starts.index(to))

    @cache
    def deepest(function: int) -> Stack:
        below = [deepest(callee) for callee in callees.get(function, ())]
        own = -(-max(frames[function], 1) // 32) * 32
        return Stack(
            own + max((s.bytes for s in below), default=0), 1 + max((s.calls for s in below), default=0)
        )

    return deepest(0)


def _leads(one: _Instruction) -> bool:
    return (one.code == _CALL and one.source == _TO_PROGRAM) or (
        one.code == _LOAD64 and one.source == _TO_FUNCTION
    )


def _linked(data: bytes, name: str) -> list[_Instruction]:
    lib = libbpf.library()
    lib.bpf_program__insns.restype = ct.c_void_p
    with loader.opened(data) as whole:
        loader.programs_wanted(whole, (name,))
        libbpf.check(lib.bpf_object__load(whole), "loading the object")
        program = ct.c_void_p(lib.bpf_object__find_program_by_name(whole, name.encode()))
        raw = ct.string_at(lib.bpf_program__insns(program), lib.bpf_program__insn_cnt(program) * 8)
    return [
        _Instruction(code, registers & 15, registers >> 4, offset, value)
        for code, registers, offset, value in struct.iter_unpack("<BBhi", raw)
    ]


def _frame(code: list[_Instruction]) -> int:
    deepest = 0
    pointers: set[int] = set()  # registers that were just set to the frame's
    for one in code:
        kind = one.code & 7
        if kind in _MEMORY and _FRAME in ((one.source,) if kind == 1 else (one.target,)):
            deepest = max(deepest, -one.offset)
        if one.code == _ADD and one.target in pointers:
            deepest = max(deepest, -one.value)
        if one.code == _MOVE and one.source == _FRAME:
            pointers.add(one.target)
        else:
            pointers.discard(one.target)
    return deepest
