"""What a firewall holds in the kernel: a set of maps and programs, its slots, its devices; and going over to another set.

Two things lead to another set: a policy that needs more room, and a release with other structures or programs. Neither may
leave a device without a program that knows the policy in force, nor lose flows or counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from loopback.bpf import layout
from loopback.bpf.loader import Loaded
from loopback.bpf.objects import Map, Program
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import compile as compiler
from loopback.modules.firewall import pins
from loopback.modules.firewall.attach import Attachment, Attachments
from loopback.modules.firewall.model import FirewallPolicy
from loopback.modules.firewall.pins import Pins
from loopback.modules.firewall.slots import Slots
from loopback.modules.firewall.store import Room, SlotRecord, Store

#: Of a set that nobody grew yet: room for about 15,000 rules, since going over to a larger one has the programs verified again.
#: 2 MiB, and a quarter of one for each CPU.
FIRST: Final = Room(half=1 << 20, counters=1 << 14)
#: Of a dry run, which does not live long: most policies fit, and load the programs once.
PRIVATE: Final = Room(half=1 << 23, counters=1 << 14)
_THREADS: Final = 4  # a fence, or the three outer maps of a slot, and what goes to disk meanwhile


class Holding:
    """The set that is open. `Datapath` decides what is done with it."""

    def __init__(
        self,
        data: bytes,
        root: Path | None,
        state_dir: Path | None,
        interfaces: Sequence[str],
        flows: int | None,
        half: int | None,
        random: Callable[[int], bytes],
    ) -> None:
        """Open what is pinned, or make it. Raises Refused."""
        self._store = Store(state_dir)
        room = self._store.room or (FIRST if root else PRIVATE)
        self._pins = Pins(root, data, half or room.half, room.counters)
        self._hooks = Attachments(self._pins, interfaces)
        if root:
            self._hooks.adopt()
        self._set = self._pins.open(flows, self._hooks.live() if root else ())
        self._threads = ThreadPoolExecutor(_THREADS)
        self._slots = Slots(self._pins, self._set, self._threads, random)
        self.attachments: list[Attachment] = []

    @property
    def _maps(self) -> dict[str, Map]:
        return self._set.maps

    @property
    def _programs(self) -> dict[str, Program]:
        return self._set.programs

    def word(self) -> tuple[int, int, int]:
        """(epoch, fallback, deadline in ticks) of the active word."""
        return layout.split_word(self._maps["active"].load_word())

    def _in_charge(self) -> str:
        """Whose programs guard the devices: ours, unless another version's do, which then hold until a commit."""
        others = self._others_live()
        return others[0] if others and not self._on_devices() else self._pins.name

    def _others_live(self) -> list[str]:
        """The sets of others whose programs sit on devices, the largest first: who went over to a larger set had filled it."""
        others = self._pins.others()
        live = self._hooks.live() if others else set()
        return sorted((n for n, ids in others.items() if ids & live), key=pins.size_of, reverse=True)

    # ── slots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _next_epoch(self) -> int:
        """A new epoch for the idle slot."""
        active = self.word()[0]
        epochs = [head.epoch for i in range(layout.SLOTS) if (head := self._slots.head(i))]
        epoch: int = max([*epochs, active, self._store.last_epoch]) + 1
        while epoch & 1 == active & 1 or not epoch & 0xFFFF:
            epoch += 1
        return epoch

    def _write(self, compiled: compiler.Compiled, policy: FirewallPolicy, digest: str, epoch: int) -> int:
        """Fill the slot of an epoch, and remember what it holds."""
        record = SlotRecord(
            epoch=epoch,
            digest=digest,
            interfaces=compiled.interfaces,
            names=compiled.names,
            filled={name: len(policy.sets[name]) for name in policy.filled},
        )
        self._store.set_slot(epoch & 1, record)
        self._slots.write(epoch, compiled)
        return epoch

    # ── room ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _half_for(self, need: int) -> int:
        """The room that slots must have for a policy of `need` bytes."""
        return self._pins.half if need <= self._pins.half else min(layout.half_for(need), layout.MAX_HALF)

    def _grow(self, half: int, counters: int) -> None:
        """Go over to a set with larger slots, or more counters, under the policy that holds. Refused, nothing has changed.

        The new set has the policy in force under the same epoch before any device runs its programs, so at every moment
        each device is guarded by the one or the other, with the same flows and verdicts. The counters of the old set
        are kept and added up, since programs go on counting in them until the last device is switched.
        """
        larger = self._pins.sized(half, counters)
        reuse = {
            name: one
            for name, one in self._maps.items()
            if name != pins.CORE
            and not (name == "arena" and half != self._pins.half)
            and not (name == "counters" and counters != self._pins.counters)
        }
        past = self._set.past if "counters" in reuse else [*self._set.past, self._maps["counters"]]
        epoch = self.word()[0]

        def fill(loaded: Loaded) -> None:
            if epoch and "arena" not in reuse:
                source, into = self._maps["arena"], loaded.maps["arena"]
                self._slots.carry(epoch, source, self._pins.half, into, half)

        self._slots.disturb()
        opened = larger.make(reuse, self._set.inner, past, fill=fill)
        if self._pins.root is not None and self._on_devices():
            attachments = self._hooks.put(opened.programs)
            failed = [a for a in attachments if a.problem]
            if failed:
                self.attachments = self._hooks.put(self._programs)
                larger.discard()
                opened.close(keep=self._set)
                raise Refused(Code.KERNEL_REFUSED, f"kernel: device {failed[0].device}: {failed[0].problem}")
            self.attachments = attachments
        before, smaller = self._set, self._pins
        self._set, self._pins = opened, larger
        self._hooks.move(larger)
        self._slots.move(larger, opened)
        self._slots.wait()  # a packet in the entry of the old set needs its core
        smaller.discard()
        before.close(keep=opened)
        self._store.set_room(Room(half=half, counters=counters))

    def _on_devices(self) -> bool:
        """Whether our programs guard a device."""
        return bool(self._hooks.live() & {program.id for program in self._programs.values()})

    def _take_base(self, other: str) -> None:
        """Another version's programs enforce: have its policy in our slots too, as what our commit falls back to.

        Under the same epoch where the word is shared, so that flows stay what they are. Raises Refused(MODULE_ABI) when the
        policy is not known.
        """
        epoch = self.word()[0]
        there = self._pins.arena_of(other) if epoch else None
        if there is not None:
            arena, half = there
            try:
                if arena.id == self._maps["arena"].id:
                    return
                if half > self._pins.half:
                    self._grow(half, self._pins.counters)
                if self._slots.carry(epoch, arena, half, self._maps["arena"], self._pins.half):
                    return
            finally:
                arena.close()
        base = self._store.promoted()
        if base is None or epoch not in (0, base.epoch & 0xFFFF):
            raise Refused(
                Code.MODULE_ABI,
                "another version enforces a policy that is not known any more: there would be nothing to fall back to",
                "let the version that runs now activate its policy once more, then this one",
            )
        names = [rule.name for rule in base.policy.rules]
        counters = self._pins.counters
        if len(names) > counters:
            counters = layout.counters_for(len(names))
        identities = compiler.assign(self._store.identities, names, counters)
        compiled = compiler.compile_policy(base.policy, identities, digest_bytes(base.digest))
        half = self._half_for(len(compiled.slot))
        if (half, counters) != (self._pins.half, self._pins.counters):
            self._grow(half, counters)
        self._store.set_identities(identities)
        written = self._write(compiled, base.policy, base.digest, base.epoch if epoch else self._next_epoch())
        if not epoch:
            self._maps["active"].store_word(layout.active_word(written))

    def close(self) -> None:
        """Give descriptors back. What is pinned goes on enforcing."""
        self._hooks.close()
        try:
            self._slots.close()
        finally:
            self._threads.shutdown()
            self._set.close()


def digest_bytes(digest: str) -> bytes:
    """A policy's digest as the slot holds it."""
    return bytes.fromhex(digest).ljust(32, b"\0")[:32]
