"""A stolen agent: it owns the state directory and the spawner's socket, and asks for more than it may have.

Each attack is first made with one defence taken out of the spawner, and gets through; then against the spawner as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support_spawner import Disk

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.host.launch import Launch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to steal")

WHO = 'found["by"] = "the attacker"; found["caps"] = open("/proc/self/status").read().split("CapEff:\\t")[1][:16]; tell()'

NO_SIGNATURES = """
from loopback.host import sealed
sealed.Sealed._check_signed = lambda self, module, version, digest: ()
"""
NO_COPIES = """
from loopback.host import sealed
def opened(self, module, version, digest):
    place = next((self.config.state_dir / "modules" / module / "versions").glob(f"*-{digest[:12]}"))
    return place, sealed.manifests.parse((place / "module.toml").read_bytes())
sealed.Sealed.open = opened
"""
NO_ALLOWED_CAPABILITIES = """
import msgspec
from loopback.host import spawner
spawner.Spawner._check_capabilities = lambda self, manifest: None
load = spawner.load
def everything(path):
    found = load(path)
    names = tuple(spawner.confine.CAPABILITIES)
    return msgspec.structs.replace(found, allow=msgspec.structs.replace(found.allow, capabilities=names))
spawner.load = everything
"""
NO_ALLOWED_MODULES = """
import msgspec
from loopback.host import spawner
load = spawner.load
def everything(path):
    found = load(path)
    return msgspec.structs.replace(found, allow=msgspec.structs.replace(found.allow, modules=("probe", "other")))
spawner.load = everything
"""
NO_FLOOR = """
from loopback.host import sealed
sealed.Sealed._floor = lambda self: sealed.Floor()
"""
NO_PUBLISHERS = """
from loopback.host import sealed
sealed.check_publishers = lambda *arguments, **named: None
"""
FOLLOWING = """
import os
from loopback.host import spawner, sealed
spawner.open_below = lambda base, *names: os.open(base.joinpath(*names), os.O_RDONLY)
"""


async def reaches(disk: Disk, spec: Launch, without: str) -> dict[str, Any]:
    """What the attacker's code tells where the defence is gone."""
    async with disk.spawner(without) as client:
        return await disk.found(client, spec)


async def refused(disk: Disk, spec: Launch) -> Code:
    async with disk.spawner() as client:
        with pytest.raises(Refused) as caught:
            await disk.run(client, spec)
    return caught.value.code


def forget(disk: Disk) -> None:
    """As if the attack with the defence removed had not been."""
    shutil.rmtree(disk.place / "state.sealed", ignore_errors=True)


async def test_a_package_that_nobody_signed_is_not_started(tmp_path: Path) -> None:
    disk = Disk(tmp_path, capabilities=("CAP_NET_ADMIN",))
    disk.signed(
        "tell()", version="0.9"
    )  # the metadata is there, it just does not name the attacker's package
    mine = disk.unpack(WHO, capabilities=("CAP_NET_ADMIN",))
    assert (await reaches(disk, mine, NO_SIGNATURES))["by"] == "the attacker"
    forget(disk)
    assert await refused(disk, mine) is Code.PACKAGE_UNKNOWN


async def test_a_package_signed_with_a_key_of_the_attackers_own_is_not_started(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    mine = disk.unpack(WHO)
    disk.sign(mine, key=SigningKey.generate())
    assert (await reaches(disk, mine, NO_SIGNATURES))["by"] == "the attacker"
    forget(disk)
    assert await refused(disk, mine) is Code.TUF_INVALID


async def test_a_repository_of_the_attackers_own_is_not_believed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    mine = Disk(other)
    spec = mine.signed(WHO)
    shutil.rmtree(disk.config.state_dir)
    shutil.copytree(mine.config.state_dir, disk.config.state_dir)
    # The pinned root lies in the agent's own folder as well, and the attacker replaces that copy too.
    shutil.copy(other / "root.json", disk.config.state_dir / "tuf" / "pinned.root.json")
    assert (await reaches(disk, spec, NO_SIGNATURES))["by"] == "the attacker"
    forget(disk)
    assert await refused(disk, spec) is Code.TUF_INVALID


async def test_another_package_under_a_signed_releases_name_is_not_started(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.signed("tell()", version="1.0")
    shutil.rmtree(disk.module_dir / "versions")
    mine = disk.unpack(WHO, version="1.0")
    assert (await reaches(disk, mine, NO_SIGNATURES))["by"] == "the attacker"
    forget(disk)
    assert await refused(disk, mine) is Code.PACKAGE_UNKNOWN


async def test_what_is_changed_after_it_was_checked_is_not_what_runs(tmp_path: Path) -> None:
    """The agent owns the folder that it unpacked to, and can change it between any two looks."""
    disk = Disk(tmp_path)
    spec = disk.signed('found["by"] = "the publisher"; tell()')

    def change() -> None:
        code = (disk.folder(spec) / "lib" / "probe.py").read_text()
        (disk.folder(spec) / "lib" / "probe.py").write_text(code.replace("the publisher", "the attacker"))

    async with disk.spawner(NO_COPIES) as client:
        assert (await disk.found(client, spec))["by"] == "the publisher"
        change()
        assert (await disk.found(client, spec))["by"] == "the attacker"
    shutil.rmtree(disk.folder(spec))
    spec = disk.signed('found["by"] = "the publisher"; tell()')
    async with disk.spawner() as client:
        assert (await disk.found(client, spec))["by"] == "the publisher"
        change()
        assert (await disk.found(client, spec))["by"] == "the publisher"
    forget(disk)
    assert await refused(disk, spec) is Code.PACKAGE_DIGEST, "changed before it was ever started"


async def test_copies_that_somebody_else_put_there_are_not_started(tmp_path: Path) -> None:
    """Whoever may write beside the state directory could have made the folder of copies first, with seals of their own."""
    disk = Disk(tmp_path)
    spec = disk.signed(WHO)
    folder = tmp_path / "state.sealed"
    folder.mkdir()
    folder.chmod(0o777)
    async with disk.spawner(
        "from loopback.host import sealed\nsealed.Sealed._check_own = lambda self: None"
    ) as client:
        assert await disk.found(client, spec), "it starts from a folder that everybody can change"
    assert await refused(disk, spec) is Code.HOST_DISK
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    assert await refused(disk, spec) is Code.HOST_DISK
    folder.unlink()
    async with disk.spawner() as client:
        assert await disk.found(client, spec)


async def test_a_signed_module_gets_no_capability_that_the_owner_does_not_allow(tmp_path: Path) -> None:
    disk = Disk(tmp_path, capabilities=("CAP_NET_ADMIN",))
    greedy = disk.signed(WHO, capabilities=("CAP_SYS_ADMIN", "CAP_NET_ADMIN"))
    assert int((await reaches(disk, greedy, NO_ALLOWED_CAPABILITIES))["caps"], 16) == 1 << 21 | 1 << 12
    assert await refused(disk, greedy) is Code.MANIFEST_CAPABILITY


async def test_a_module_that_the_owner_does_not_allow_is_not_started(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.signed("tell()")
    other = disk.unpack(WHO, module="other")
    (disk.module_dir.parent / "other" / "data").mkdir()
    assert (await reaches(disk, other, NO_SIGNATURES + NO_ALLOWED_MODULES))["by"] == "the attacker"
    forget(disk)
    assert await refused(disk, other) is Code.HOST_NOT_ALLOWED


async def test_a_publisher_whom_the_owner_does_not_allow_is_not_run(tmp_path: Path) -> None:
    disk = Disk(tmp_path, publishers=("ab" * 32,))
    spec = disk.signed(WHO)
    assert (await reaches(disk, spec, NO_PUBLISHERS))["by"] == "the attacker"
    assert await refused(disk, spec) is Code.HOST_NOT_ALLOWED


async def test_metadata_from_before_a_key_was_taken_away_is_refused(tmp_path: Path) -> None:
    """A publisher's key was stolen and the delegation changed: old targets metadata must not bring it back."""
    for without in (NO_FLOOR, ""):
        place = tmp_path / ("bare" if without else "whole")
        place.mkdir()
        disk = Disk(place)
        stolen = SigningKey.generate()
        mine = disk.unpack(WHO, version="6.6")
        disk.sign(mine, delegated=stolen)
        old = {p.name: p.read_bytes() for p in (disk.config.state_dir / "tuf").iterdir()}
        new = disk.signed("tell()")  # the delegation names the right key again, in newer metadata
        async with disk.spawner(without) as client:
            assert await disk.found(client, new) == {}
            for name, data in old.items():
                (disk.config.state_dir / "tuf" / name).write_bytes(data)
            if without:
                assert (await disk.found(client, mine))["by"] == "the attacker"
            else:
                with pytest.raises(Refused) as caught:
                    await disk.run(client, mine)
                assert caught.value.code is Code.TUF_INVALID


async def test_a_linked_data_folder_does_not_become_a_way_to_write_elsewhere(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    elsewhere = tmp_path / "etc"
    elsewhere.mkdir()
    spec = disk.signed("call('write', lambda: open('passwd', 'w').write('x') and 0); tell()")
    (disk.module_dir / "data").rmdir()
    (disk.module_dir / "data").symlink_to(elsewhere)
    assert (await reaches(disk, spec, FOLLOWING))["write"] == "ok"
    assert (elsewhere / "passwd").exists()
    assert await refused(disk, spec) is Code.MODULE_START


async def test_a_linked_version_folder_is_not_followed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    spec = disk.signed(WHO)
    moved = tmp_path / "moved"
    disk.folder(spec).rename(moved)
    disk.folder(spec).symlink_to(moved)
    opened = "from loopback.host import sealed\n" + FOLLOWING.replace(
        "spawner.open_below", "sealed.open_below"
    )
    assert (await reaches(disk, spec, opened))["by"] == "the attacker"
    forget(disk)
    assert await refused(disk, spec) is Code.PACKAGE_UNKNOWN


AGENT = """
import ctypes, errno, json, os, signal, socket, subprocess, sys
from pathlib import Path
from loopback.host import confine, spawner_client
from loopback.host.config import load
place = Path(sys.argv[1])
{without}
config = load(place / "host.toml")
client = spawner_client.SpawnerClient.begin(place / "host.toml", config)
spawner_client.give_up(config)
libc = ctypes.CDLL(None, use_errno=True)
found = {{}}
def attempt(name, function):
    ctypes.set_errno(0)
    try:
        result = function()
        found[name] = "ok" if not isinstance(result, int) or result >= 0 else errno.errorcode[ctypes.get_errno()]
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
PTRACE, UNSHARE, KILL = dict(x86_64=(101, 272, 62), aarch64=(117, 97, 129))[os.uname().machine]
attempt("state", lambda: (place / "state" / "state.json").write_text("x"))
attempt("toml", lambda: (place / "host.toml").write_text((place / "host.toml").read_text() + "# changed"))
attempt("sealed", lambda: (place / "state.sealed" / "mine").write_text("x"))
attempt("cron", lambda: (place / "etc" / "crontab").write_text("x"))
attempt("memory", lambda: open(f"/proc/{{client.pid}}/mem", "rb+").close())
attempt("trace", lambda: libc.syscall(PTRACE, 16, client.pid, 0, 0))
attempt("namespace", lambda: libc.syscall(UNSHARE, 0x40000000))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("regain", lambda: confine.keep_only(("CAP_NET_ADMIN",)))
lines = dict(l.split(":\\t", 1) for l in open("/proc/self/status").read().splitlines() if ":\\t" in l)
child = subprocess.run(["/bin/sh", "-c", "cat /proc/self/status"], capture_output=True, text=True).stdout
found["self"] = {{n: lines[n] for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")}}
found["child"] = dict(l.split(":\\t", 1) for l in child.splitlines() if l.startswith("Cap"))
print(json.dumps(found))
"""


def stolen(place: Path, without: str = "") -> dict[str, Any]:
    """What an agent can do with itself, once it has given everything up."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", AGENT.format(without=without), str(place)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_stolen_agent_has_nothing_to_rise_with(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    (tmp_path / "state.sealed").mkdir(mode=0o700)
    (tmp_path / "etc").mkdir()
    attacks = {"toml", "sealed", "cron", "memory", "trace", "namespace", "unix", "regain"}
    bare = stolen(tmp_path, "spawner_client.give_up = lambda config: ()")
    assert {name for name in attacks if bare[name] == "ok"} == attacks, bare
    found = stolen(tmp_path)
    assert found["state"] == "ok", "its own folder is its own"
    assert {name: found[name] for name in attacks if found[name] == "ok"} == {}
    none = f"{0:016x}"
    assert found["self"] == {
        "CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none, "NoNewPrivs": "1", "Seccomp": "2"
    }  # fmt: skip
    assert set(found["child"].values()) == {none}, "a program of root's, started by root, is nobody special"
    assert disk.toml.exists()
