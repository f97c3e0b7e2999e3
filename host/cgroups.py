"""A control group for each module, where this process was given a place to make one: all of its processes together are held
to its memory and number of tasks, and can be ended for certain, also those that left its process group.

Version 2 wants a delegated group (`Delegate=yes` in the unit): the agent's own processes move into a leaf of it, since a group
that limits its children may hold no process. Version 1, on older systems and in containers, has a tree per controller. The
environment says nothing about which it is; the mounts do (cgroups(7)).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

_V2: Final = {"memory": "memory.max", "pids": "pids.max"}
_V1: Final = {"memory": "memory.limit_in_bytes", "pids": "pids.max"}
LEAF: Final = "agent"
PLACE: Final = "loopback"
PREFIX: Final = "module-"


class Tree(msgspec.Struct, frozen=True):
    """Where groups may be made: `folder`, the `files` that take limits there by controller, and whether it is version 2."""

    folder: Path
    files: dict[str, str]
    unified: bool


class Groups:
    """The places found; `limits` says what they hold modules to."""

    def __init__(self, trees: tuple[Tree, ...]) -> None:
        self.trees = trees

    @property
    def limits(self) -> frozenset[str]:
        """Of "memory" and "pids", what is limited."""
        return frozenset(name for tree in self.trees for name in tree.files)

    def sweep(self) -> None:
        """Take away groups that a spawner left which was killed; those with processes in them stay."""
        for tree in self.trees:
            for folder in tree.folder.glob(f"{PREFIX}*-*-*"):
                pid = folder.name.split("-")[-2]
                if not Path(f"/proc/{pid}").exists():
                    with contextlib.suppress(OSError):
                        folder.rmdir()

    def leave(self) -> None:
        """Take away our own place, where that is possible and nobody else uses it."""
        for tree in self.trees:
            if not tree.unified:
                with contextlib.suppress(OSError):
                    tree.folder.rmdir()

    def make(self, name: str, *, memory_mib: int, tasks: int) -> tuple[Path, ...]:
        """A fresh group with these limits in every tree; a tree that refuses is left out."""
        values = {"memory": str(memory_mib * 1024 * 1024), "pids": str(tasks)}
        made = []
        for tree in self.trees:
            folder = tree.folder / (PREFIX + name)
            with contextlib.suppress(OSError):
                folder.mkdir()
                for controller, file in tree.files.items():
                    (folder / file).write_text(values[controller])
                made.append(folder)
        return tuple(made)


def join(groups: tuple[Path, ...]) -> None:
    """Put the calling process into these groups; its children follow. Raises OSError."""
    for folder in groups:
        (folder / "cgroup.procs").write_text("0")


def end(groups: tuple[Path, ...]) -> None:
    """End whatever is in these groups, and take them away as soon as they are empty."""
    for folder in groups:
        kill = folder / "cgroup.kill"
        with contextlib.suppress(OSError):
            if kill.exists():
                kill.write_text("1")
            else:
                for pid in _members(folder):
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)


def remove(groups: tuple[Path, ...]) -> bool:
    """Take empty groups away; whether all are gone. Those that are not yet empty (a killed process takes a moment) stay."""
    for folder in groups:
        with contextlib.suppress(OSError):
            folder.rmdir()
    return not any(folder.exists() for folder in groups)


def find(listing: Path = Path("/proc/self/mountinfo"), own: Path = Path("/proc/self/cgroup")) -> Groups:
    """The trees in which this process may make groups; ask while there are privileges.

    Never raises: without any there are only resource limits.
    """
    trees: list[Tree] = []
    with contextlib.suppress(OSError, ValueError):
        paths = dict(_own(own.read_text()))
        for kind, root, place, options in mounts(listing):
            if kind == "cgroup2" and "" in paths:
                unified = _unified(_inside(place, root, paths[""]))
                trees += [unified] if unified else []
            elif kind == "cgroup":
                for controller, file in _V1.items():
                    if controller in options and controller in paths:
                        folder = _inside(place, root, paths[controller])
                        trees += _place(folder, {controller: file})
    return Groups(tuple(trees))


def _place(folder: Path, files: dict[str, str]) -> list[Tree]:
    """A group of our own in a tree of version 1, whose top only a process with more privileges may change."""
    own = folder / PLACE
    try:
        own.mkdir(exist_ok=True)
    except OSError:
        return []
    return [Tree(own, files, unified=False)] if os.access(own, os.W_OK) else []


def _unified(folder: Path) -> Tree | None:
    """Make a delegated group ready: processes into a leaf, controllers on. None where it is nobody's to use or has none."""
    control = folder / "cgroup.subtree_control"
    available = (folder / "cgroup.controllers").read_text().split()
    wanted = [name for name in _V2 if name in available]
    if not wanted or not os.access(control, os.W_OK) or not _ours(folder):
        return None
    if not set(wanted) <= set(control.read_text().split()):
        leaf = folder / LEAF
        try:
            leaf.mkdir(exist_ok=True)
            for pid in _members(folder):
                with contextlib.suppress(ProcessLookupError):
                    (leaf / "cgroup.procs").write_text(str(pid))
            control.write_text(" ".join(f"+{name}" for name in wanted))
        except OSError:
            return None
    return Tree(folder, {name: _V2[name] for name in wanted}, unified=True)


def _ours(folder: Path) -> bool:
    """Whether a group was delegated, as systemd notes on it, or holds nobody but the agent and us."""
    try:
        if os.getxattr(folder, "user.delegate") == b"1":
            return True
    except OSError:
        pass
    return set(_members(folder)) <= {os.getpid(), os.getppid()}


def _members(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "cgroup.procs").read_text().split()]


def _own(text: str) -> Iterator[tuple[str, str]]:
    """Controller → path of this process; the unified tree has an empty name."""
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            yield name, path


def mounts(listing: Path = Path("/proc/self/mountinfo")) -> Iterator[tuple[str, str, Path, list[str]]]:
    """Type, root, place and options of each mount (proc(5))."""
    for line in listing.read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split(" ")  # a source may be empty
        if len(fields) < 5 or len(kind) < 3:
            continue
        yield kind[0], fields[3], Path(fields[4]), kind[2].split(",")


def _inside(place: Path, root: str, path: str) -> Path:
    """Where a process's group is below a mount that shows the tree from `root` on."""
    inner = path[len(root) :] if root != "/" and path.startswith(root) else path
    return place / inner.strip("/")
