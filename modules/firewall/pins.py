"""What the firewall keeps in the bpf file system: sets of maps and programs that belong together, and links by device.

    <root>/set-<version>-<bits>-<counters>/   the maps and programs of one version in one size
        <map>-<fingerprint>                   a map; several sets may hold the same one
        interfaces-0, …                       the inner maps of each slot, so that an adopting process can read and reach them
        core                                  leads the TC programs to the one that judges; each set has its own
        past0-<fingerprint>, …                counters of smaller sets, which nobody counts in any more: they are added up
        fw_xdp, …                             the programs
    <root>/links/xdp-<ifindex>-<mode>         an XDP attachment

A set counts only once its last pin is there, so a process killed between two pins leaves nothing half-made to adopt. A set that
takes the place of another (a larger one, a new release) takes over every map whose structures are the same in both: flows,
buckets and counters live on. The other one goes when it is certain that no device will need it again.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import hashlib
import os
import platform
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from loopback.bpf import kernel, layout, loader, sharing
from loopback.bpf.hooks import XdpLink
from loopback.bpf.loader import Loaded
from loopback.bpf.objects import Map, Program
from loopback.contracts.codes import Code, Refused

MAPS: Final = tuple(sharing.HELD)
SLOT_MAPS: Final = ("arena", "interfaces")  # one policy lies in both
#: The last one is pinned last: its pin says that the set is whole.
PROGRAMS: Final = (
    "fw_core", "fw_tc_ingress", "fw_tc_egress", "fw_l3_ingress", "fw_l3_egress", "fw_probe", "fw_clock", "fw_xdp",
)  # fmt: skip
CORE: Final = "core"  # the map; without a pin of its own the kernel would empty it
INNER: Final = tuple(f"interfaces-{index}" for index in range(layout.SLOTS))


class Opened:
    """A set as this process holds it. `there` says that it was pinned already."""

    def __init__(self, loaded: Loaded, inner: dict[str, Map], past: list[Map], *, there: bool) -> None:
        self.maps, self.programs = loaded.maps, loaded.programs
        self.inner, self.past = inner, past
        self.there = there

    def close(self, keep: Opened | None = None) -> None:
        """Give descriptors back, but for those that `keep` took over."""
        kept = {id(one) for one in keep.everything()} if keep else set()
        for one in self.everything():
            if id(one) not in kept:
                one.close()

    def everything(self) -> Iterable[Map | Program]:
        """Each object that holds a descriptor."""
        return (*self.maps.values(), *self.programs.values(), *self.inner.values(), *self.past)


_ORDERED: Final = frozenset({"x86_64", "i686"})  # processors that never reorder reads
_SEED: Final = ct.sizeof(layout.FlowSeed)  # bytes that nobody outside knows


class Pins:
    """The pins of one firewall. `root` None keeps nothing: a private firewall for dry runs."""

    def __init__(
        self, root: Path | None, data: bytes, half: int = layout.MIN_HALF, counters: int = layout.MIN_COUNTERS
    ) -> None:
        """`half` is the room of a slot in bytes, a power of two; `counters` that of rule identities. Both of a new set."""
        self.root = root
        self.half, self.counters = half, counters
        prints = "".join(sharing.fingerprint(name) for name in MAPS)
        self.version = hashlib.sha256(data + prints.encode()).hexdigest()[:16]
        self._data = data

    @property
    def name(self) -> str:
        """The folder of our set."""
        return f"set-{self.version}-{self.half.bit_length() - 1}-{self.counters}"

    def sized(self, half: int, counters: int) -> Pins:
        """The same version in another size."""
        return Pins(self.root, self._data, half, counters)

    def open(self, flows: int | None = None, live: Iterable[int] = ()) -> Opened:
        """Our set: the one that is pinned, or a new one on the maps of the set whose programs, ids in `live`, are on devices.

        `flows` is how many flows a new connection table has room for, rounded up to a power of two.
        Raises Refused(KERNEL_*), PACKAGE_MALFORMED.
        """
        if self.root is None:
            return self.make(flows=flows)
        if not kernel.is_bpffs(self.root):
            raise Refused(
                Code.KERNEL_UNSUPPORTED,
                f"kernel: {self.root} is in no bpf file system",
                "mount one: mount -t bpf bpf /sys/fs/bpf",
            )
        self._make_folder(self.root)
        self._make_folder(self.root / "links")
        self._clear_halves()
        live = set(live)
        found = self.program_sets()
        # a process that was killed while it went over to a larger set leaves two: the larger one is filled, or runs nowhere
        order = sorted(found, key=lambda name: (bool(found[name] & live), size_of(name)), reverse=True)
        for name in order:
            if self._is_version(name):
                self.half, self.counters = size_of(name)
                return self._adopt(self.root / name)
        if not order:
            return self.make(flows=flows)
        return self._make_beside(order[0], flows)

    def _is_version(self, name: str) -> bool:
        return name.startswith(f"set-{self.version}-")

    def _clear_halves(self) -> None:
        assert self.root is not None
        for folder in self.root.glob(f"set-{self.version}-*"):
            if not (folder / PROGRAMS[-1]).exists():
                _clear(folder)

    def _adopt(self, folder: Path) -> Opened:
        maps = {name: Map.pinned(folder / map_pin(name)) for name in MAPS} | {CORE: Map.pinned(folder / CORE)}
        programs = {name: Program.pinned(folder / name) for name in PROGRAMS}
        return Opened(Loaded(maps, programs), *self._others(folder), there=True)

    def _others(self, folder: Path) -> tuple[dict[str, Map], list[Map]]:
        """The inner maps and the counters of smaller sets that are pinned in a folder."""
        inner = {name: Map.pinned(folder / name) for name in INNER if (folder / name).exists()}
        past: list[Map] = []
        while (folder / past_pin(len(past))).exists():
            past.append(Map.pinned(folder / past_pin(len(past))))
        return inner, past

    def _make_beside(self, other: str, flows: int | None) -> Opened:
        """A new set on what it can share with another version's."""
        assert self.root is not None
        folder = self.root / other
        reuse = {
            name: Map.pinned(folder / map_pin(name)) for name in MAPS if (folder / map_pin(name)).exists()
        }
        half, counters = size_of(other)
        inner, past = self._others(folder)
        if reuse.keys() >= set(SLOT_MAPS):
            self.half = half
        else:
            _close(inner.values())
            _close(reuse.pop(name) for name in SLOT_MAPS if name in reuse)
            inner = {}
        if "counters" in reuse:
            self.counters = counters
        return self.make(reuse, inner, past, flows=flows)

    def make(
        self,
        reuse: Mapping[str, Map] | None = None,
        inner: Mapping[str, Map] | None = None,
        past: Sequence[Map] = (),
        *,
        flows: int | None = None,
        fill: Callable[[Loaded], None] = lambda loaded: None,
    ) -> Opened:
        """A new set on the maps of `reuse`, which it takes over. `fill` writes what must be there before it counts.

        Raises Refused; then nothing is left of it.
        """
        reuse = reuse or {}
        loaded = self.load(flows, reuse)
        for name, one in reuse.items():
            loaded.maps[name].close()
            loaded.maps[name] = one
        made = Opened(loaded, dict(inner or {}), list(past), there=False)
        try:
            fill(loaded)
            if self.root is not None:
                self._pin(self.root / self.name, made)
        except Refused:
            self.discard()
            _close(one for name, one in loaded.maps.items() if name not in reuse)
            _close(loaded.programs.values())
            raise
        return made

    def _pin(self, folder: Path, made: Opened) -> None:
        _clear(folder)
        self._make_folder(folder)
        for name in MAPS:
            made.maps[name].pin(folder / map_pin(name))
        made.maps[CORE].pin(folder / CORE)
        for name, one in made.inner.items():
            one.pin(folder / name)
        for number, one in enumerate(made.past):
            one.pin(folder / past_pin(number))
        for name in PROGRAMS:
            made.programs[name].pin(folder / name)

    def load(self, flows: int | None = None, reuse: Mapping[str, Map] | None = None) -> Loaded:
        """Load the object in our sizes, on the maps of `reuse` where it has them. Raises Refused."""
        reuse = reuse or {}
        there = reuse.get("flow_tags")
        buckets = there.max_entries if there else layout.buckets_for(flows or layout.FLOWS)
        resize = {"counters": self.counters, "flows": buckets * layout.WAYS, "flow_tags": buckets}
        values = {"arena": layout.SLOTS * self.half + layout.SLACK}
        weak = platform.machine() not in _ORDERED
        sizes = layout.Sizes(half=self.half, buckets=buckets, weak=weak)
        try:
            loaded = loader.load(
                self._data,
                reuse=reuse,
                resize={name: size for name, size in resize.items() if name not in reuse},
                values={name: size for name, size in values.items() if name not in reuse},
                constants={".rodata.sizes": bytes(sizes)},
            )
        except Refused as refused:
            raise _too_large(refused, self.half) from None
        loaded = self._only(loaded)
        loaded.maps[CORE].update(bytes(4), struct.pack("=i", loaded.programs["fw_core"].fd))
        if "flow_seed" not in reuse:
            loaded.maps["flow_seed"].update(bytes(4), layout.FlowSeed.from_buffer_copy(os.urandom(_SEED)))
        return loaded

    @staticmethod
    def _only(loaded: Loaded) -> Loaded:
        """Without the maps that the compiler made for itself. Raises Refused where one of ours is missing."""
        missing = [n for n in (*MAPS, CORE) if n not in loaded.maps] + [
            n for n in PROGRAMS if n not in loaded.programs
        ]
        if missing:
            loaded.close()
            raise Refused(Code.PACKAGE_MALFORMED, f"the eBPF object has no {', '.join(missing)}")
        for name in [n for n in loaded.maps if n not in (*MAPS, CORE)]:
            loaded.maps.pop(name).close()
        return loaded

    @staticmethod
    def _make_folder(folder: Path) -> None:
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
        place = self.root / self.name / name
        fresh = place.with_name(name + "-new")
        fresh.unlink(missing_ok=True)
        one.pin(fresh)
        fresh.rename(place)

    def program_sets(self) -> dict[str, set[int]]:
        """The ids of the programs of each set that is whole. Raises Refused."""
        return self._ids(lambda name: True)

    def others(self) -> dict[str, set[int]]:
        """The same without our own set. Raises Refused."""
        return self._ids(lambda name: name != self.name)

    def _ids(self, wanted: Callable[[str], bool]) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for folder in sorted(self.root.glob("set-*")) if self.root else []:
            if wanted(folder.name) and (folder / PROGRAMS[-1]).exists():
                programs = self.programs_of(folder.name)
                found[folder.name] = {program.id for program in programs.values()}
                _close(programs.values())
        return found

    def programs_of(self, name: str) -> dict[str, Program]:
        """The programs of a pinned set. Raises Refused."""
        assert self.root is not None
        return {p.name: Program.pinned(p) for p in sorted((self.root / name).iterdir()) if _is_program(p)}

    def shares(self, name: str, what: str, one: Map) -> bool:
        """Whether another set holds this very map, too. Raises Refused."""
        assert self.root is not None
        place = self.root / name / map_pin(what)
        if not place.exists():
            return False
        other = Map.pinned(place)
        other.close()
        return other.id == one.id

    def arena_of(self, name: str) -> tuple[Map, int] | None:
        """The arena of another set and the room of its slots, None where its slots are not like ours. Raises Refused."""
        assert self.root is not None
        place = self.root / name / map_pin("arena")
        return (Map.pinned(place), size_of(name)[0]) if place.exists() else None

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

    def links_of(self) -> dict[int, tuple[str, int]]:
        """(mode, program id) of the XDP links by device; nothing changes. Raises Refused."""
        found: dict[int, tuple[str, int]] = {}
        for path in sorted((self.root / "links").glob("xdp-*")) if self.root else []:
            link = XdpLink.pinned(path)
            if link.ifindex and path.name.split("-")[1] == str(link.ifindex):
                found[link.ifindex] = link.mode, link.program_id
            link.close()
        return found

    def pin_link(self, ifindex: int, link: XdpLink) -> None:
        """Keep a link beyond this process. Raises Refused."""
        if self.root is not None:
            link.pin(self.root / "links" / f"xdp-{ifindex}-{link.mode}")

    def unpin_link(self, ifindex: int) -> None:
        """Let a link go with its last descriptor."""
        for path in (self.root / "links").glob(f"xdp-{ifindex}-*") if self.root else []:
            path.unlink()

    def forget_others(self, *, versions: bool = True) -> None:
        """Remove every other set; without `versions` only those of this version in other sizes."""
        for folder in self.root.glob("set-*") if self.root else []:
            if folder.name != self.name and (versions or self._is_version(folder.name)):
                _clear(folder)

    def discard(self) -> None:
        """Remove our own set."""
        if self.root is not None:
            _clear(self.root / self.name)

    def remove(self) -> None:
        """Remove everything."""
        if self.root is None or not self.root.exists():
            return
        for folder in self.root.iterdir():
            _clear(folder)
        self.root.rmdir()


def nothing_pinned(root: Path) -> bool:
    """Whether no firewall was ever there, or none is any more."""
    return next(root.glob("*"), None) is None


def map_pin(name: str) -> str:
    """The name of a map in the folder of its set."""
    return f"{name}-{sharing.fingerprint(name)}"


def past_pin(number: int) -> str:
    """The name of the counters of an earlier, smaller set."""
    return f"past{number}-{sharing.fingerprint('counters')}"


def _is_program(path: Path) -> bool:
    return path.name.startswith("fw_")


def size_of(name: str) -> tuple[int, int]:
    """(room of a slot in bytes, counters) of a set."""
    bits, counters = name.split("-")[2:]
    return 1 << int(bits), int(counters)


def _too_large(refused: Refused, half: int) -> Refused:
    """Until Linux 6.0 the value of an array could have no more bytes than KMALLOC_MAX_SIZE, which is 4 MiB."""
    if os.strerror(errno.E2BIG) in refused.reason and "arena" in refused.reason:
        return Refused(
            Code.KERNEL_UNSUPPORTED,
            f"kernel: no room for slots of {half >> 20} MiB: before Linux 6.0 both together may have 4 MiB",
            "use a newer kernel, or a policy with fewer rules",
        )
    return refused


def _close(some: Iterable[Map | Program]) -> None:
    for one in some:
        one.close()


def _clear(folder: Path) -> None:
    if folder.is_dir():
        # first to go: half a folder must not count as a whole one
        (folder / PROGRAMS[-1]).unlink(missing_ok=True)
        for path in folder.iterdir():
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
