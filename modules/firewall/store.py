"""What the firewall remembers on disk beside what the kernel holds: names of counters, policies by slot, a version on trial.

All of it can be lost without harm to enforcement; then counters begin anew and rule names are unknown until the next policy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from loopback.modules.firewall.model import FirewallPolicy


class SlotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was written to a slot."""

    epoch: int
    digest: str = ""
    interfaces: tuple[str, ...] = ()
    policy: FirewallPolicy | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """Programs `new` were put in the place of programs `old` and are not confirmed yet. Names of folders of pins."""

    old: str
    new: str


T = TypeVar("T")


class Store:
    """The files of one firewall. `folder` None keeps everything in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.identities: dict[str, int] = self._read("identities.json", dict[str, int]) or {}
        found = {index: self._read(f"slot-{index}.json", SlotRecord) for index in range(2)}
        self.slots: dict[int, SlotRecord] = {i: record for i, record in found.items() if record is not None}
        self.promoted: SlotRecord | None = self._read("promoted.json", SlotRecord)
        self.trial: Trial | None = self._read("trial.json", Trial)

    @property
    def last_epoch(self) -> int:
        """The highest epoch that was ever written, as far as is known."""
        return max((record.epoch for record in self.slots.values()), default=0)

    def set_identities(self, identities: dict[str, int]) -> None:
        """Keep which rule has which counter."""
        if identities != self.identities:
            self._write("identities.json", identities)
            self.identities = identities

    def set_slot(self, index: int, record: SlotRecord) -> None:
        """Keep what a slot holds."""
        self._write(f"slot-{index}.json", record)
        self.slots[index] = record

    def set_promoted(self, record: SlotRecord) -> None:
        """Keep the policy that was confirmed last."""
        if record != self.promoted:
            self._write("promoted.json", record)
            self.promoted = record

    def set_trial(self, trial: Trial | None) -> None:
        """Keep that a version is on trial, or that none is."""
        if trial != self.trial:
            self._write("trial.json", trial)
            self.trial = trial

    def forget(self) -> None:
        """Remove the files."""
        for name in ("identities.json", "slot-0.json", "slot-1.json", "promoted.json", "trial.json"):
            if self._folder is not None:
                (self._folder / name).unlink(missing_ok=True)
        self.identities, self.slots, self.promoted, self.trial = {}, {}, None, None

    def _read(self, name: str, kind: type[T]) -> T | None:
        if self._folder is None:
            return None
        try:
            return msgspec.json.decode((self._folder / name).read_bytes(), type=kind)
        except (OSError, msgspec.MsgspecError):
            return None  # absent, or "null", or not ours: as if it had been lost

    def _write(self, name: str, value: object) -> None:
        if self._folder is None:
            return
        place = self._folder / name
        temporary = place.with_suffix(".new")
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(value))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
