"""What the datapath's bench measures in the kernel: one program after another behind the same varied packet.

Runs in a process with the capabilities of the module's manifest, like the firewall itself.
"""

from __future__ import annotations

import random
import struct
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, Self

from loopback.bpf import loader
from loopback.bpf.build import compile_object
from loopback.bpf.loader import Loaded
from loopback.bpf.objects import Program

SOURCE: Final = Path(__file__).parent / "programs" / "datapath.bpf.c"
TABLE: Final = 65536  # tuples that the program's tables hold
FRAME: Final = 64  # bytes
LEAVE, RANDOM, FROM_TABLE = 0, 1, 2
TCP, UDP, ICMP = 6, 17, 1
SAMPLE_S: Final = (
    0.03  # how long one sample runs: long beside a tick, short beside what else happens on a machine
)
FEWEST, MOST = 256, 1_000_000  # packets in a sample
_ZERO: Final = bytes(4)
_PLAN: Final = struct.Struct("=6I")
_MACS: Final = bytes.fromhex("027700000001027700000002")


class Tuple(NamedTuple):
    """What `vary` makes a packet of. Addresses are integers of the family's width."""

    source: int
    destination: int
    source_port: int
    destination_port: int
    protocol: int


@cache
def compiled() -> bytes:
    """The bench's own programs."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "datapath.bpf.o"
        compile_object(SOURCE, built)
        return built.read_bytes()


def frame(family: int) -> bytes:
    """A frame that serves TCP (a SYN) and UDP alike: what one reads as its length, the other reads as a sequence number."""
    if family == 4:
        size = FRAME - 14
        head = struct.pack(">BBHHHBBH8x", 0x45, 0, size, 1, 0, 64, UDP, 0)
        kind, payload = b"\x08\0", size - 20
    else:
        size = FRAME + 10 - 54
        head = struct.pack(">IHBB32x", 6 << 28, size, UDP, 64)
        kind, payload = b"\x86\xdd", size
    transport = struct.pack(">HHHHIBBHHH", 0, 0, payload, 0, 0, 0x50, 2, 65535, 0, 0)
    return _MACS + kind + head + transport.ljust(payload, b"\0")


def _sum(data: bytes) -> int:
    """The Internet checksum's sum, not yet complemented, as this machine reads 16-bit words."""
    total: int = sum(struct.unpack(f"={len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def plan(family: int, mode: int, ifindex: int = 0, tuples: int = 1) -> bytes:
    """struct plan. `tuples` is a power of two."""
    data = frame(family)
    ip_sum = tcp_sum = 0
    if family == 4:
        head = data[14:23] + b"\0" + data[24:34]  # the protocol is added by the program
        segment = data[34:FRAME]
        ip_sum = _sum(head)
        tcp_sum = _sum(segment + struct.pack(">BBH", 0, TCP, len(segment)))
    return _PLAN.pack(ifindex, mode, family, tuples - 1, ip_sum, tcp_sum)


def fill(loaded: Loaded, family: int, tuples: Sequence[Tuple]) -> int:
    """Write the table; how many tuples the plan may use: a power of two, the first ones repeated to fill it."""
    number = 1
    while number < min(len(tuples), TABLE):
        number *= 2
    every = (list(tuples) * 2)[:number] if tuples else []
    if family == 4:
        values = b"".join(struct.pack(">IIHHB3x", *one) for one in every)
    else:
        values = b"".join(
            one.source.to_bytes(16, "big")
            + one.destination.to_bytes(16, "big")
            + struct.pack(">HHB3x", one.source_port, one.destination_port, one.protocol)
            for one in every
        )
    keys = struct.pack(f"={len(every)}I", *range(len(every)))
    loaded.maps[f"table{family}"].update_batch(keys, values, len(every))
    return max(number, 1)


class Bench:
    """`vary` and what it goes on into."""

    def __init__(self, prefixes: Iterable[tuple[int, int, int]] = ()) -> None:
        """`prefixes` are (family, address, length) of the peer's tries. Raises Refused."""
        known = {4: [], 6: []}  # type: dict[int, list[tuple[int, int]]]
        for family, address, length in prefixes:
            known[family].append((address, length))
        self.loaded = loader.load(
            compiled(), resize={f"prefixes{f}": max(1, len(found)) for f, found in known.items()}
        )
        for family, found in known.items():
            keys = b"".join(
                length.to_bytes(4, "little") + a.to_bytes(4 if family == 4 else 16, "big")
                for a, length in found
            )
            self.loaded.maps[f"prefixes{family}"].update_batch(
                keys, struct.pack(f"={len(found)}I", *range(len(found))), len(found)
            )
        self._vary = self.loaded.programs["vary"]
        self._repeat: dict[object, int] = {}

    def program(self, name: str) -> Program:
        """One of our own: `bare`, `lookups4`, `lookups6`."""
        return self.loaded.programs[name]

    def tuples(self, family: int, tuples: Sequence[Tuple]) -> None:
        """From now on packets come from a table."""
        number = fill(self.loaded, family, tuples)
        self.loaded.maps["plan"].update(_ZERO, plan(family, FROM_TABLE, tuples=number))

    def random(self, family: int) -> None:
        """From now on packets are uniformly random."""
        self.loaded.maps["plan"].update(_ZERO, plan(family, RANDOM))

    def run(self, program: Program, family: int, repeat: int) -> tuple[int, float]:
        """So many packets through `vary` into the program: the last verdict, and ns of this thread's time per packet."""
        self.loaded.maps["under_test"].update(_ZERO, struct.pack("=i", program.fd))
        began = time.thread_time_ns()
        verdict, _, _ = self._vary.run(frame(family), repeat=repeat)
        return verdict, (time.thread_time_ns() - began) / repeat

    def sample(self, program: Program, family: int) -> float:
        """ns per packet, over about SAMPLE_S."""
        repeat = self._repeat.get((program.fd, family))
        if repeat is None:
            _, rough = self.run(program, family, FEWEST)
            _, rough = self.run(program, family, max(FEWEST, min(MOST, int(SAMPLE_S * 2e8 / max(rough, 1)))))
            repeat = max(FEWEST, min(MOST, int(SAMPLE_S * 1e9 / max(rough, 1))))
            self._repeat[program.fd, family] = repeat
        return self.run(program, family, repeat)[1]

    def alone(self, program: Program, family: int, repeat: int = 500_000) -> float:
        """ns per packet of a program without `vary` in front."""
        began = time.thread_time_ns()
        program.run(frame(family), repeat=repeat)
        return (time.thread_time_ns() - began) / repeat

    def close(self) -> None:
        """Give everything back."""
        self.loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def random_tuples(seed: int, family: int, number: int) -> list[Tuple]:
    """Uniformly random packets, for a table."""
    rng = random.Random(seed)  # noqa: S311  # the same packets in every run
    width = 32 if family == 4 else 128
    return [
        Tuple(
            rng.getrandbits(width),
            rng.getrandbits(width),
            rng.getrandbits(16),
            rng.getrandbits(16),
            rng.choice((TCP, UDP)),
        )
        for _ in range(number)
    ]
