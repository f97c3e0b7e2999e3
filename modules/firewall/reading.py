"""What a firewall does at this moment, read from its pins: with module and agent dead as well, and without a way to change it.

Maps are opened read-only, so the kernel itself refuses a write through them. Two programs are run by TEST_RUN, and neither
touches a flow, a counter or a bucket: the clock, and the probe that judges a packet.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Self

import msgspec

from loopback.bpf import hooks, layout
from loopback.bpf.objects import Map, Program
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import counting, packets
from loopback.modules.firewall import flows as tracking
from loopback.modules.firewall.attach import present
from loopback.modules.firewall.model import FirewallPolicy, Packet
from loopback.modules.firewall.packets import Verdict
from loopback.modules.firewall.pins import PROGRAMS, Pins, map_pin, past_pin
from loopback.modules.firewall.store import SlotRecord, Store

_READ: Final = ("active", "arena", "config", "counters", "totals", "flows", "flow_tags")
_TICK_NS: Final = 1 << layout.TICK_SHIFT
_IDLE: Final = struct.Struct("=Q4xI")  # of an entry, from `seen` on: seen, sequence, life
_UDP_S: Final = 30  # of layout.Config.timeout_udp, which tells the rate of jiffies


class RuleCount(msgspec.Struct, frozen=True):
    """What a rule decided over all policies that had it. `order` is its place in the one in force, None for a former rule."""

    rule: str
    identity: int
    packets: int
    bytes: int
    order: int | None


class Counted(msgspec.Struct, frozen=True):
    """Packets of one direction that got one verdict for one reason (layout.REASONS)."""

    direction: str
    reason: str
    verdict: str
    packets: int


class Table(msgspec.Struct, frozen=True):
    """The connection table: flows that live, entries ever taken, and room; the rest counts since the maps were made."""

    live: int
    taken: int
    room: int
    created: int
    failed: int
    evicted: int
    revalidated: int


class Hooked(msgspec.Struct, frozen=True):
    """How a device is guarded now: `ingress` is native, generic, tc or none."""

    device: str
    ifindex: int
    ingress: str
    egress: bool


class Stats(msgspec.Struct, frozen=True):
    """One look at a firewall. `epoch` is the one in force (0: nothing is enforced), `deadline_s` how long a trial lasts yet."""

    root: str
    epoch: int
    policy: str | None
    fallback: int
    deadline_s: float | None
    past_deadline: int
    shadow: int  # one in so many packets is sampled for a shadow; 0: none
    rules: list[RuleCount]
    reasons: list[Counted]
    flows: Table
    events_lost: int
    devices: list[Hooked]

    @property
    def verdicts(self) -> dict[str, int]:
        """Packets by verdict."""
        return {
            word: sum(one.packets for one in self.reasons if one.verdict == word)
            for word in ("accept", "drop")
        }


class View:
    """A look at the firewall under `root`. `data`, its module's folder, knows the rules by name; it may be lost."""

    def __init__(self, root: Path, data: Path | None = None) -> None:
        """Raises Refused: HOST_LOST where there is none or it is of another version, KERNEL_* where it may not be read."""
        self.root = root
        self._store = Store(data if data is not None and data.is_dir() else None)
        try:
            whole = [p for p in sorted(root.glob("set-*")) if (p / PROGRAMS[-1]).exists()]
        except OSError as error:
            raise Refused(Code.HOST_LOST, f"{root}: {error.strerror}", "ask as root") from None
        if not whole:
            raise Refused(
                Code.HOST_LOST, f"no firewall is pinned under {root}",
                "look as root, on a host whose firewall has had a policy; see 'loopback host ctl status'",
            )  # fmt: skip
        self.links = Pins(root, b"").links_of()
        self.folder = self._in_charge(whole)
        if not all((self.folder / map_pin(name)).exists() for name in (*_READ, "events")):
            raise Refused(
                Code.HOST_LOST, f"the firewall under {self.folder} is of another version than this command",
                "use the loopback that was installed with it",
            )  # fmt: skip
        self.maps: dict[str, Map] = {}
        self.past: list[Map] = []
        self.programs: dict[str, Program] = {}
        try:
            for name in _READ:
                self.maps[name] = Map.pinned(self.folder / map_pin(name), read_only=True)
            while (self.folder / past_pin(len(self.past))).exists():
                self.past.append(Map.pinned(self.folder / past_pin(len(self.past)), read_only=True))
            for name in PROGRAMS:
                self.programs[name] = Program.pinned(self.folder / name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give descriptors back."""
        for one in (*self.maps.values(), *self.past):
            one.close()
        for program in self.programs.values():
            program.close()

    def _in_charge(self, whole: list[Path]) -> Path:
        """The set whose program sits on devices; a replacement that was broken off leaves another."""
        ids = {number for _, number in self.links.values()}
        for folder in whole if len(whole) > 1 else ():
            program = Program.pinned(folder / PROGRAMS[-1])
            program.close()
            if program.id in ids:
                return folder
        return whole[-1]

    # ── where it stands ───────────────────────────────────────────────────────────────────────────────────────────────────

    def stale(self) -> bool:
        """Whether another set has taken the place of the one that this looks at."""
        return not (self.folder / PROGRAMS[-1]).exists()

    def word(self) -> tuple[int, int, float | None]:
        """The epoch in force, the fallback, and seconds to the deadline (None: confirmed)."""
        epoch, fallback, deadline = layout.split_word(self.maps["active"].load_word())
        if not deadline:
            return epoch, fallback, None
        left = (deadline * _TICK_NS - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) / 1e9
        return (epoch, fallback, left) if left > 0 else (fallback, fallback, 0.0)

    def head(self) -> layout.Slot | None:
        """The head of the slot in force; None when nothing is enforced."""
        epoch = self.word()[0]
        memory = self.maps["arena"].memory()
        half = (self.maps["arena"].value_size - layout.SLACK) // layout.SLOTS
        at = (epoch & 1) * half
        head = layout.Slot.from_buffer_copy(memory[at : at + layout.size_of_slot()])
        return head if epoch and head.epoch & 0xFFFF == epoch else None

    def record(self) -> SlotRecord | None:
        """What is known of the policy in force."""
        self._store.read()
        head = self.head()
        if head is None:
            return None
        record = self._store.slots.get(head.epoch & 1)
        if record is not None and record.epoch == head.epoch:
            return record
        return SlotRecord(epoch=head.epoch, digest=bytes(head.digest).hex())

    def policy(self) -> FirewallPolicy | None:
        """The policy in force, where it was confirmed and is still known."""
        record, kept = self.record(), self._store.promoted()
        return kept.policy if record and kept and kept.epoch == record.epoch else None

    def names(self) -> dict[int, str]:
        """Rules by counter slot."""
        return {slot: name for name, slot in self._store.identities.items()}

    # ── figures ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> Stats:
        """One look. Raises Refused."""
        record, head = self.record(), self.head()
        epoch, fallback, left = self.word()
        totals = counting.totals(self.maps["totals"])
        orders = {name: place for place, name in enumerate(record.names if record else ())}
        counters = counting.of_rules([self.maps["counters"], *self.past], self._store.identities)
        reasons = [
            Counted(words[0], words[1], words[2], value)
            for name, value in totals.items()
            if len(words := name.split(".")) == 3 and words[0] != "slot" and value
        ]
        return Stats(
            root=str(self.root),
            epoch=epoch,
            policy=record.digest if record else None,
            fallback=fallback,
            deadline_s=left,
            past_deadline=totals["past_deadline"],
            shadow=head.shadow if head else 0,
            rules=[
                RuleCount(name, self._store.identities[name], *counters[name], order=orders.get(name))
                for name in counters
            ],
            reasons=reasons,
            flows=self._table(totals),
            events_lost=totals["events_lost"],
            devices=self.devices(),
        )

    def events_lost(self) -> int:
        """How many samples found no room in the ring."""
        return counting.totals(self.maps["totals"])["events_lost"]

    def _clock(self) -> layout.Clock:
        clock = layout.Clock()
        self.programs["fw_clock"].run_syscall(clock)
        return clock

    def _table(self, totals: dict[str, int]) -> Table:
        tags = memoryview(self.maps["flow_tags"].memory()).cast("H")
        entries, now = self.maps["flows"].memory(), self._clock().jiffies
        at, size = layout.Flow.seen.offset, self.maps["flows"].value_size
        taken = live = 0
        for place, tag in enumerate(tags):
            if tag:
                seen, life = _IDLE.unpack_from(entries, place * size + at)
                taken += 1
                live += now - seen <= life
        tags.release()
        return Table(
            live=live,
            taken=taken,
            room=self.maps["flows"].max_entries,
            created=totals["flows_created"],
            failed=totals["flows_failed"],
            evicted=totals["flows_evicted"],
            revalidated=totals["revalidated"],
        )

    def devices(self) -> list[Hooked]:
        """Every device with a hook of ours, and those without any that could have one. Raises Refused."""
        ids = {program.id for program in self.programs.values()}
        found = []
        for device in present():
            mode, program = self.links.get(device.index, ("none", 0))
            if program not in ids:
                mode = "tc" if hooks.tc_program(device.index, hooks.TC_INGRESS) in ids else "none"
            egress = hooks.tc_program(device.index, hooks.TC_EGRESS) in ids
            if mode != "none" or egress or not device.loopback:
                found.append(Hooked(device.name, device.index, mode, egress))
        return found

    # ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def explain(self, asked: Iterable[Packet]) -> list[Verdict]:
        """What the policy in force says of packets, by the real program. Raises Refused."""
        record = self.record()
        interfaces, names = (record.interfaces, record.names) if record else ((), ())
        frames = map(packets.framed, asked)
        return packets.judged(self.programs["fw_probe"], frames, layout.PROBE_ACTIVE, interfaces, names)

    def flows(self) -> Iterator[tracking.Flow]:
        """The live flows."""
        self._store.read()
        config = layout.Config.from_buffer_copy(self.maps["config"].lookup(bytes(4)) or b"")
        tags, entries = (memoryview(self.maps[name].memory()) for name in ("flow_tags", "flows"))
        rate = max(config.timeout_udp // _UDP_S, 1)
        return tracking.read(tags, entries, self._clock().jiffies, rate, self.names())
