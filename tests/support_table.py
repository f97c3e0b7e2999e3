"""The connection table by itself: the real programs on private maps, and the test's own beside them (kernel/flows.bpf.c)."""

from __future__ import annotations

import ctypes as ct
from pathlib import Path
from typing import Final

from scapy.layers.inet import UDP
from scapy.packet import Raw
from support_datapath import policy_of, program, to_host, to_peer

from loopback.bpf import layout, loader
from loopback.bpf.build import compile_object
from loopback.bpf.loader import Loaded
from loopback.modules.firewall.datapath import Datapath

MILLION: Final = 1_000_000
PASS, GO_ON = 2, 0xFFFFFFFF


def racer_object(folder: Path) -> bytes:
    """The test's own programs, compiled into a folder."""
    out = folder / "flows.bpf.o"
    compile_object(Path(__file__).parent / "kernel" / "flows.bpf.c", out)
    return out.read_bytes()


class Control(ct.Structure):
    _fields_ = tuple((name, ct.c_uint64) for name in ("turn", "count", "wrong", "careless", "epoch"))


class Table:
    """A private firewall of real programs, and the test's own beside them on the same maps."""

    def __init__(self, data: bytes, flows: int, policy: str) -> None:
        self.datapath = Datapath(program(), flows=flows)
        self.enforce(policy)
        maps = self.datapath._maps
        self.entries = memoryview(maps["flows"].memory())
        half = self.datapath._pins.half
        self.ours: Loaded = loader.load(
            data,
            reuse=maps,
            constants={".rodata.sizes": bytes(layout.Sizes(half=half, buckets=flows // layout.WAYS))},
        )

    def enforce(self, policy: str) -> None:
        self.datapath.stage(policy_of(policy))
        self.datapath.commit(0)

    def close(self) -> None:
        self.entries.release()
        self.ours.close()
        self.datapath.close()

    def control(self, **values: int) -> None:
        self.ours.maps["control"].update(bytes(4), Control(epoch=self.datapath.generation, **values))

    def found(self) -> Control:
        return Control.from_buffer_copy(self.ours.maps["control"].lookup(bytes(4)) or b"")

    def run(self, name: str, times: int, data: bytes = bytes(64)) -> None:
        self.ours.programs[name].run(data, repeat=times)

    def arrives(self, frame: object) -> bool:
        return self.datapath._programs["fw_xdp"].run(bytes(frame))[0] == PASS  # type: ignore[call-overload]

    def leaves(self, frame: object) -> bool:
        return self.datapath._programs["fw_tc_egress"].run(bytes(frame))[0] == GO_ON  # type: ignore[call-overload]

    def totals(self, *names: str) -> list[int]:
        found = self.datapath.totals()
        return [found[name] for name in names]

    def change(self, **fields: int) -> None:
        """Set fields of every entry that is taken; `quiet` says how long ago its last packet was, in jiffies."""
        size = ct.sizeof(layout.Flow)
        now = self.datapath._clock().jiffies
        for at in range(0, len(self.entries) // size * size, size):
            entry = layout.Flow.from_buffer(self.entries, at)
            if entry.sequence:
                for name, value in fields.items():
                    if name == "quiet":
                        entry.seen = now - value
                    else:
                        setattr(entry, name, value)


def asked(number: int) -> object:
    return to_peer(UDP(sport=6000 + number, dport=1000 + number), Raw(b"question"))


def answered(number: int) -> object:
    return to_host(UDP(sport=1000 + number, dport=6000 + number), Raw(b"answer"))


def talk(table: Table, flows: int, *, again: bool = True) -> None:
    for number in range(flows):
        assert table.leaves(asked(number))
        assert table.arrives(answered(number))
        if again:
            assert table.leaves(asked(number))


def living(table: Table, flows: int) -> int:
    return sum(table.arrives(answered(number)) for number in range(flows))
