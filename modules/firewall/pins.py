"""What the firewall keeps in the bpf file system: maps by layout, programs by object, links by device.

    <root>/maps-<layout>/<map>            shared by every version with that layout
                        /slot-0, …        the inner maps of each slot, so that an adopting process can read and reach them
    <root>/programs-<layout>-<object>/    the programs of one object file; two of these exist while a version is on trial
    <root>/links/xdp-<ifindex>-<mode>     an XDP attachment

A folder counts only once its last pin is there, so a process killed between two pins leaves nothing half-made to adopt.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Final

from loopback.bpf import layout, loader
from loopback.bpf.hooks import XdpLink
from loopback.bpf.loader import Loaded, Map, Program
from loopback.contracts.codes import Code, Refused

#: `active` is pinned last: its pin says that the set is whole.
MAPS: Final = (
    "slots", "sets4", "sets6", "interfaces", "fence", "config", "flows", "fragments", "buckets", "counters", "totals",
    "events", "active",
)  # fmt: skip
PROGRAMS: Final = (
    "fw_tc_ingress", "fw_tc_egress", "fw_l3_ingress", "fw_l3_egress", "fw_probe", "fw_clock", "fw_xdp",
)  # fmt: skip


class Pins:
    """The pins of one firewall. `root` None keeps nothing: a private firewall for dry runs."""

    def __init__(self, root: Path | None, data: bytes) -> None:
        self.root = root
        self.layout = layout.fingerprint()
        self.name = f"programs-{self.layout}-{hashlib.sha256(data).hexdigest()[:16]}"
        self._data = data

    def open(self, flows: int | None = None) -> tuple[Loaded, bool]:
        """Maps and programs of our own object, and whether the maps were there already.

        `flows` is the size of a new connection table. Raises Refused(KERNEL_*), PACKAGE_MALFORMED.
        """
        resize = {"flows": flows} if flows else {}
        if self.root is None:
            return self._only(loader.load(self._data, resize=resize)), False
        if not loader.is_bpffs(self.root):
            raise Refused(
                Code.KERNEL_UNSUPPORTED,
                f"kernel: {self.root} is in no bpf file system",
                "mount one: mount -t bpf bpf /sys/fs/bpf",
            )
        self._make(self.root)
        self._make(self.root / "links")
        maps = self.root / f"maps-{self.layout}"
        there = (maps / MAPS[-1]).exists()
        if not there:
            _clear(maps)
            for stale in self.root.glob(f"programs-{self.layout}-*"):
                _clear(stale)
        kept = {name: Map.pinned(maps / name) for name in MAPS} if there else {}
        programs = self.root / self.name
        if (programs / PROGRAMS[-1]).exists():
            return Loaded(kept, {name: Program.pinned(programs / name) for name in PROGRAMS}), True
        _clear(programs)
        loaded = self._only(loader.load(self._data, reuse=kept, resize=resize))
        for one in kept.values():
            one.close()
        if not there:
            self._make(maps)
            for name in MAPS:
                loaded.maps[name].pin(maps / name)
        self._make(programs)
        for name in PROGRAMS:
            loaded.programs[name].pin(programs / name)
        return loaded, there

    @staticmethod
    def _only(loaded: Loaded) -> Loaded:
        """Without the maps that the compiler made for itself. Raises Refused where one of ours is missing."""
        missing = [n for n in MAPS if n not in loaded.maps] + [
            n for n in PROGRAMS if n not in loaded.programs
        ]
        if missing:
            loaded.close()
            raise Refused(Code.PACKAGE_MALFORMED, f"the eBPF object has no {', '.join(missing)}")
        for name in [n for n in loaded.maps if n not in MAPS]:
            loaded.maps.pop(name).close()
        return loaded

    @staticmethod
    def _make(folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(
                Code.KERNEL_UNSUPPORTED, f"kernel: cannot make {folder}: {error.strerror}"
            ) from None

    def replace(self, name: str, one: Map) -> None:
        """Pin an inner map of a slot in the place of its predecessor. Raises Refused."""
        if self.root is None:
            return
        place = self.root / f"maps-{self.layout}" / name
        fresh = place.with_name(name + "-new")
        fresh.unlink(missing_ok=True)
        one.pin(fresh)
        fresh.rename(place)

    def inner(self, name: str) -> Map | None:
        """An inner map pinned by `replace`. Raises Refused."""
        if self.root is None:
            return None
        place = self.root / f"maps-{self.layout}" / name
        return Map.pinned(place) if place.exists() else None

    def program_sets(self) -> dict[str, set[int]]:
        """The ids of each folder of programs that is whole. Raises Refused."""
        found: dict[str, set[int]] = {}
        for folder in sorted(self.root.glob("programs-*")) if self.root else []:
            if (folder / PROGRAMS[-1]).exists():
                found[folder.name] = set(self._ids(folder))
        return found

    @staticmethod
    def _ids(folder: Path) -> list[int]:
        ids = []
        for path in folder.iterdir():
            program = Program.pinned(path)
            ids.append(program.id)
            program.close()
        return ids

    def programs_of(self, name: str) -> dict[str, Program]:
        """The programs of a pinned folder. Raises Refused."""
        assert self.root is not None
        return {p.name: Program.pinned(p) for p in sorted((self.root / name).iterdir())}

    def links(self) -> dict[int, XdpLink]:
        """The XDP links by device; those of devices that are gone are forgotten. Raises Refused."""
        found: dict[int, XdpLink] = {}
        for path in sorted((self.root / "links").glob("xdp-*")) if self.root else []:
            link = XdpLink.pinned(path)
            if link.ifindex and path.name.split("-")[1] == str(link.ifindex):
                found[link.ifindex] = link
            else:
                link.close()
                path.unlink()
        return found

    def pin_link(self, ifindex: int, link: XdpLink) -> None:
        """Keep a link beyond this process. Raises Refused."""
        if self.root is not None:
            link.pin(self.root / "links" / f"xdp-{ifindex}-{link.mode}")

    def unpin_link(self, ifindex: int) -> None:
        """Let a link go with its last descriptor."""
        for path in (self.root / "links").glob(f"xdp-{ifindex}-*") if self.root else []:
            path.unlink()

    def forget_others(self) -> None:
        """Remove the programs of every other version, and maps of other layouts."""
        if self.root is None:
            return
        for folder in (*self.root.glob("programs-*"), *self.root.glob("maps-*")):
            if folder.name not in (self.name, f"maps-{self.layout}"):
                _clear(folder)

    def remove(self) -> None:
        """Remove everything."""
        if self.root is None or not self.root.exists():
            return
        for folder in self.root.iterdir():
            _clear(folder)
        self.root.rmdir()


def _clear(folder: Path) -> None:
    if folder.is_dir():
        for last in (MAPS[-1], PROGRAMS[-1]):  # first to go: half a folder must not count as a whole one
            (folder / last).unlink(missing_ok=True)
        for path in folder.iterdir():
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
