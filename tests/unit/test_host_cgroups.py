"""Where control groups may be made, read from the mounts; trees of files stand for the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loopback.host import cgroups


def kernel(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def found(tmp_path: Path, mounts: list[str], own: str) -> cgroups.Groups:
    listing, paths = tmp_path / "mountinfo", tmp_path / "cgroup"
    listing.write_text("\n".join(mounts) + "\n")
    paths.write_text(own)
    return cgroups.find(listing, paths)


def mount(place: Path, kind: str, options: str, root: str = "/") -> str:
    return f"31 23 0:28 {root} {place} rw,relatime shared:9 - {kind} {kind} {options}"


def test_a_delegated_group_of_version_2_moves_its_processes_into_a_leaf_and_limits_children(
    tmp_path: Path,
) -> None:
    place = tmp_path / "cgroup2"
    own = kernel(
        place / "system.slice" / "loopback-host.service",
        cgroup__controllers="cpu memory pids\n", cgroup__subtree_control="", cgroup__procs="71\n72\n",
    )  # fmt: skip
    kernel(own / cgroups.LEAF, cgroup__procs="")
    os.setxattr(own, "user.delegate", b"1")
    groups = found(
        tmp_path, [mount(place, "cgroup2", "rw,nsdelegate")], "0::/system.slice/loopback-host.service\n"
    )
    assert groups.limits == {"memory", "pids"}
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids"
    assert (own / cgroups.LEAF / "cgroup.procs").read_text() == "72", (
        "one process a write; the last one is seen here"
    )
    (made,) = groups.make("firewall-1", memory_mib=64, tasks=9)
    assert made == own / "module-firewall-1"
    assert ((made / "memory.max").read_text(), (made / "pids.max").read_text()) == (str(64 << 20), "9")


def test_a_group_that_others_live_in_and_nobody_delegated_is_left_alone(tmp_path: Path) -> None:
    """Such as a login session's: its shell is not ours to move."""
    place = tmp_path / "cgroup2"
    files = {"cgroup__controllers": "memory pids", "cgroup__subtree_control": ""}
    own = kernel(place / "session-3.scope", cgroup__procs=f"{os.getpid()}\n71\n", **files)
    assert found(tmp_path, [mount(place, "cgroup2", "rw")], "0::/session-3.scope\n").trees == ()
    assert (own / "cgroup.subtree_control").read_text() == ""
    alone = kernel(place / "alone", cgroup__procs=f"{os.getpid()}\n{os.getppid()}\n", **files)
    kernel(alone / cgroups.LEAF, cgroup__procs="")
    assert found(tmp_path, [mount(place, "cgroup2", "rw")], "0::/alone\n").limits == {"memory", "pids"}


@pytest.mark.parametrize("controllers", ["", "cpu io"])
def test_a_group_of_version_2_without_the_controllers_is_nobodys_to_limit(
    tmp_path: Path, controllers: str
) -> None:
    place = tmp_path / "cgroup2"
    own = kernel(place, cgroup__controllers=controllers, cgroup__subtree_control="", cgroup__procs="71\n")
    assert found(tmp_path, [mount(place, "cgroup2", "rw")], "0::/\n").trees == ()
    assert not (own / cgroups.LEAF).exists(), "nothing is moved for nothing"


def test_version_1_has_a_tree_for_each_controller_and_a_place_of_our_own_in_it(tmp_path: Path) -> None:
    pids, memory = kernel(tmp_path / "pids" / "a"), kernel(tmp_path / "memory")
    mounts = [
        mount(tmp_path / "pids", "cgroup", "rw,pids"),
        mount(memory, "cgroup", "rw,memory", "/docker/x"),
    ]
    groups = found(tmp_path, mounts, "8:pids:/a\n4:memory:/docker/x\n0::/\n")
    assert {tree.folder for tree in groups.trees} == {pids / cgroups.PLACE, memory / cgroups.PLACE}
    made = groups.make("probe-1", memory_mib=1, tasks=3)
    assert {path.name for folder in made for path in folder.iterdir()} == {
        "pids.max",
        "memory.limit_in_bytes",
    }


def test_what_a_killed_spawner_left_is_swept_and_what_lives_stays(tmp_path: Path) -> None:
    tree = cgroups.Tree(tmp_path, {"pids": "pids.max"}, unified=False)
    gone, mine = tmp_path / "module-edge-proxy-4999999-1", tmp_path / f"module-edge-proxy-{os.getpid()}-1"
    gone.mkdir()
    mine.mkdir()
    cgroups.Groups((tree,)).sweep()
    assert (gone.exists(), mine.exists()) == (False, True)


def test_no_tree_is_no_failure(tmp_path: Path) -> None:
    assert found(tmp_path, [], "0::/\n").trees == ()
    assert cgroups.find(tmp_path / "none", tmp_path / "none").limits == frozenset()
    assert cgroups.Groups(()).make("x", memory_mib=1, tasks=1) == ()
