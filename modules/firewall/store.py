"""What the firewall remembers on disk beside what the kernel holds: names of counters, policies by slot, a version on trial.

All of it can be lost without harm to enforcement; then counters begin anew and rule names are unknown until the next policy.
Nothing waits for the disk: what is here describes maps of the kernel, and they go with the power too. A rename makes each
change whole for a process that is killed, and a file that a power cut has torn reads as lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

import msgspec

from loopback.modules.firewall.model import FirewallPolicy

_SLOTS: Final = 2


class SlotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was written to a slot. `names` are those of its rules, by order; `filled` how many prefixes filled sets have."""

    epoch: int
    digest: str = ""
    interfaces: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    filled: dict[str, int] = {}


class Promoted(msgspec.Struct, frozen=True, kw_only=True):
    """What was confirmed last: a release with other structures compiles it anew, to have something to fall back to."""

    epoch: int
    digest: str
    policy: FirewallPolicy


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """Programs `new` were put in the place of programs `old` and are not confirmed yet. Names of sets of pins."""

    old: str
    new: str


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """How large the maps were last: after a restart of the machine they need not grow again."""

    half: int
    counters: int


T = TypeVar("T")


class Store:
    """The files of one firewall. `folder` None keeps everything in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.identities: dict[str, int] = {}
        self.slots: dict[int, SlotRecord] = {}
        self._promoted: int = 0
        self.trial: Trial | None = None
        self.room: Room | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.read()

    def read(self) -> None:
        """Read the files again: another version's process may have written them."""
        if self._folder is None:
            return
        self.identities = self._read("identities", dict[str, int]) or {}
        found = {index: self._read(f"slot-{index}", SlotRecord) for index in range(_SLOTS)}
        self.slots = {i: record for i, record in found.items() if record is not None}
        self.trial = self._read("trial", Trial)
        self.room = self._read("room", Room)

    @property
    def last_epoch(self) -> int:
        """The highest epoch that was ever written, as far as is known."""
        return max((record.epoch for record in self.slots.values()), default=0)

    def promoted(self) -> Promoted | None:
        """What was confirmed last. It can be long, and is read only when it is needed."""
        return self._read("promoted", Promoted) if self._folder else None

    def set_identities(self, identities: dict[str, int]) -> None:
        """Keep which rule has which counter."""
        if identities != self.identities:
            self._write("identities", identities)
            self.identities = identities

    def set_slot(self, index: int, record: SlotRecord) -> None:
        """Keep what a slot holds."""
        self._write(f"slot-{index}", record)
        self.slots[index] = record

    def set_promoted(self, promoted: Promoted) -> None:
        """Keep what was confirmed last."""
        if promoted.epoch != self._promoted:
            self._write("promoted", promoted)
            self._promoted = promoted.epoch

    def set_trial(self, trial: Trial | None) -> None:
        """Keep that a version is on trial, or that none is."""
        if trial != self.trial:
            self._write("trial", trial)
            self.trial = trial

    def set_room(self, room: Room) -> None:
        """Keep how large the maps are."""
        if room != self.room:
            self._write("room", room)
            self.room = room

    def forget(self) -> None:
        """Remove the files."""
        for name in ("identities", "slot-0", "slot-1", "promoted", "trial", "room"):
            if self._folder is not None:
                (self._folder / f"{name}.json").unlink(missing_ok=True)
        self.identities, self.slots, self._promoted, self.trial, self.room = {}, {}, 0, None, None

    def _read(self, name: str, kind: type[T]) -> T | None:
        assert self._folder is not None
        try:
            return msgspec.json.decode((self._folder / f"{name}.json").read_bytes(), type=kind)
        except (OSError, msgspec.MsgspecError):
            return None  # absent, or "null", or not ours: as if it had been lost

    def _write(self, name: str, value: object) -> None:
        if self._folder is None:
            return
        place = self._folder / f"{name}.json"
        temporary = place.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(value))
        temporary.replace(place)
