"""The two slots of a set of maps: the one that packets read, and the idle one, which is written.

The arena is written through a mapping, which no grace period guards. So a slot that packets have read is written only after a
wait for all that may be under way: the update of an outer map is such a wait, about 8 ms. It goes on in a thread while the next
policy is compiled, and is left out where nobody can have read the slot since the last one.
"""

from __future__ import annotations

import ctypes as ct
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Final

from loopback.bpf import layout, objects
from loopback.bpf.objects import Map
from loopback.modules.firewall.attach import present
from loopback.modules.firewall.compile import Compiled
from loopback.modules.firewall.pins import Opened, Pins

_MARK: Final = layout.Slot.mark
_Key = tuple[int, int, bytes]  # word, and epoch and mark of the idle slot


class Slots:
    """Both slots of the set that is open."""

    def __init__(self, pins: Pins, opened: Opened, threads: Executor, random: Callable[[int], bytes]) -> None:
        self._pins, self._set = pins, opened
        self._threads, self._random = threads, random
        self._through: Map | None = None  # what the fence is updated with
        self._waiting: tuple[_Key, Future[None]] | None = None
        self._quiet: _Key | None = None
        self._written: dict[int, tuple[bytes, int | None]] = {}  # by index: mark, and id of the inner map

    def move(self, pins: Pins, opened: Opened) -> None:
        """Go on with another set. Programs of the old one may be under way with either."""
        self.disturb()
        self._pins, self._set = pins, opened

    def head(self, index: int) -> layout.Slot | None:
        """The head of a slot, None while nothing whole is in it."""
        at = index * self._pins.half
        memory = self._set.maps["arena"].memory()
        head = layout.Slot.from_buffer_copy(memory[at : at + ct.sizeof(layout.Slot)])
        return head if head.epoch else None

    def interfaces(self, index: int) -> Map | None:
        """Which devices the names of a slot's policy are."""
        return self._set.inner.get(f"interfaces-{index}")

    # ── waiting ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _key(self) -> _Key:
        word = self._set.maps["active"].load_word()
        head = self.head((layout.split_word(word)[0] & 1) ^ 1)
        return word, head.epoch if head else 0, bytes(head.mark) if head else b""

    def begin(self) -> None:
        """Begin to wait until no packet reads the idle slot, unless that is known. The word must not be on trial."""
        key = self._key()
        if key == self._quiet or (self._waiting and self._waiting[0] == key):
            return
        self._settle()
        if self._through is None:
            self._through = Map.create(objects.MAP_HASH, "fence", 4, 8, 1024)
        self._waiting = key, self._threads.submit(self._set.maps["fence"].update_fd, 0, self._through)

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting[1].result()
            self._quiet = waiting[0]

    def disturb(self) -> None:
        """The word has changed, or programs have: packets under way may read either slot."""
        self._settle()
        self._quiet = None

    def wait(self) -> None:
        """Wait for every packet under way. Raises Refused."""
        self.disturb()
        self.begin()
        self._settle()

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, epoch: int, compiled: Compiled) -> None:
        """Fill the slot of an epoch, which no packet reads but those under way. Raises Refused."""
        index = epoch & 1
        interfaces: Map | None = None
        if compiled.interfaces or not self._empty(index):
            interfaces = Map.create(objects.MAP_HASH, "interfaces", 4, 8, 1024)
            fill_interfaces(interfaces, compiled.interfaces)
        mark = self._random(_MARK.size)
        self.begin()
        self._settle()
        self.fill(index, compiled.slot, epoch, mark)
        if interfaces is not None:
            self._put(index, interfaces)
        self._written[index] = mark, interfaces.id if interfaces else None
        self._quiet = self._key()

    def _empty(self, index: int) -> bool:
        """Whether there is no inner map, or one that names no device."""
        there = self._set.maps["interfaces"].lookup(struct.pack("=I", index))
        if there is None:
            return True
        ours = self.interfaces(index)
        if ours is None or struct.unpack("=I", there)[0] != ours.id:
            return False  # another process put it there
        return next(ours.keys(), None) is None

    def fill(self, index: int, slot: bytes, epoch: int, mark: bytes) -> None:
        """Write a slot that no packet reads. It has no epoch until it is whole."""
        memory, at = self._set.maps["arena"].memory(), index * self._pins.half
        place = ct.c_uint32.from_buffer(memory, at)
        place.value = 0
        memory[at + 4 : at + len(slot)] = memoryview(slot)[4:]
        memory[at + _MARK.offset : at + _MARK.offset + len(mark)] = mark
        place.value = epoch

    def _put(self, index: int, one: Map) -> None:
        self._set.maps["interfaces"].update_fd(index, one)
        name = f"interfaces-{index}"
        self._pins.replace(name, one)
        before = self._set.inner.get(name)
        if before is not None:
            before.close()
        self._set.inner[name] = one

    def is_ours(self, index: int) -> bool:
        """Whether the slot still holds what we wrote to it."""
        mark, inner = self._written.get(index, (b"", None))
        head = self.head(index)
        there = self._set.maps["interfaces"].lookup(struct.pack("=I", index))
        return (
            head is not None
            and bytes(head.mark) == mark
            and (inner is None or there == struct.pack("=I", inner))
        )

    def carry(self, epoch: int, source: Map, half: int, into: Map, into_half: int) -> bool:
        """Copy the slot of a 16-bit epoch to an arena with as large slots or larger; False when it is not there."""
        at, to = (epoch & 1) * half, (epoch & 1) * into_half
        memory = source.memory()
        head = layout.Slot.from_buffer_copy(memory[at : at + ct.sizeof(layout.Slot)])
        if head.epoch & 0xFFFF != epoch or half > into_half:
            return False
        into.memory()[to : to + half] = memoryview(memory)[at : at + half]
        return True

    def close(self) -> None:
        """Give back what is ours alone."""
        self._settle()
        if self._through is not None:
            self._through.close()


def fill_interfaces(inner: Map, names: Sequence[str]) -> None:
    """Tell a policy the numbers of the devices that it names. Raises Refused."""
    if not names:
        return
    bits = {name: 1 << place for place, name in enumerate(names)}
    wanted = {device.index: bits[device.name] for device in present() if device.name in bits}
    for key in list(inner.keys()):
        if struct.unpack("=I", key)[0] not in wanted:
            inner.delete(key)
    for index, bit in wanted.items():
        inner.update(struct.pack("=I", index), struct.pack("=Q", bit))
