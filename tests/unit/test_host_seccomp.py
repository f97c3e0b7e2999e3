"""The system-call filter as the kernel runs it, for both architectures, and the names it is made of."""

from __future__ import annotations

import platform
import struct

import pytest

from loopback.host import confine, seccomp
from loopback.trust import capabilities


def test_every_capability_that_a_manifest_may_name_can_be_given() -> None:
    assert set(confine.CAPABILITIES) == capabilities.POWERS.keys()
    assert (confine.CAPABILITIES.index("CAP_NET_ADMIN"), confine.CAPABILITIES.index("CAP_BPF")) == (12, 39)


def test_what_a_capability_opens_is_refused_without_it() -> None:
    opened = {call for calls in seccomp.GIVEN.values() for call in calls}
    assert opened <= set(seccomp.REFUSED)
    assert not set(seccomp._ALLOWED) & set(seccomp.REFUSED)
    assert seccomp.GIVEN.keys() <= set(confine.CAPABILITIES)


def test_the_filter_knows_both_architectures() -> None:
    """The filter as the kernel runs it: classic BPF over (number, architecture, arguments), interpreted here."""
    numbers = {
        "x86_64": {"read": 0, "mount": 165, "bpf": 321, "clone": 56},
        "aarch64": {"read": 63, "mount": 40, "bpf": 280, "clone": 220},
    }
    for machine, calls in numbers.items():
        other = next(m for m in numbers if m != machine)
        program = seccomp.program(
            frozenset({"CAP_BPF"}), architecture="" if machine == platform.machine() else machine
        )
        if program is None:
            pytest.skip("libseccomp.so.2 is missing")

        def judge(number: int, arch: str = machine, *arguments: int, program: bytes = program) -> int:
            return interpret(program, number, seccomp.ARCHITECTURES[arch], arguments)

        assert judge(calls["read"]) == 0x7FFF0000
        assert judge(calls["bpf"]) == 0x7FFF0000
        assert judge(calls["mount"]) == 0x00050001, "EPERM"
        assert judge(999) == 0x00050026, "ENOSYS"
        assert judge(calls["clone"], machine, 0x11) == 0x7FFF0000
        assert judge(calls["clone"], machine, 0x10000000) != 0x7FFF0000
        assert judge(calls["read"], other) & 0xFFFF0000 in (0x00000000, 0x80000000), "the process ends"


def interpret(program: bytes, number: int, arch: int, arguments: tuple[int, ...]) -> int:
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*arguments, *[0] * (6 - len(arguments))))
    at, accumulator = 0, 0
    rows = [struct.unpack_from("<HBBI", program, 8 * n) for n in range(len(program) // 8)]
    while True:
        code, yes, no, k = rows[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x06:  # BPF_RET | BPF_K
            return k
        elif code == 0x05:  # BPF_JMP | BPF_JA
            at += k
        elif code in (0x15, 0x25, 0x35, 0x45):  # JEQ, JGT, JGE, JSET
            holds = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }
            at += yes if holds[code] else no
        elif code == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= k
        else:
            raise AssertionError(f"an instruction that no filter needs: {code:#x}")
