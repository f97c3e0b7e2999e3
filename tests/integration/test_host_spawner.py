"""A real spawner and real processes, as root: what a module can do, what it cannot, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from support import Place, eventually
from support_host import WORKSPACE, World, agent_command
from support_spawner import Disk, internet, sockets, status

from loopback.contracts import envelope, reports, subjects
from loopback.host import confine, proc
from loopback.host.config import Allow, write_config

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to give up")

SELF = """
lines = open("/proc/self/status").read().splitlines()
found["status"] = dict(l.split(":\\t", 1) for l in lines if ":\\t" in l)
names = os.listdir("/proc/self/fd")
names = [n for n in names if os.path.exists("/proc/self/fd/" + n)]
found["descriptors"] = {n: os.readlink("/proc/self/fd/" + n).split(":")[0] for n in names}
found["environment"] = dict(os.environ)
found["limits"] = {n: resource.getrlimit(getattr(resource, "RLIMIT_" + n)) for n in ("DATA", "NOFILE", "CORE")}
found["cwd"], found["umask"], found["session"] = os.getcwd(), os.umask(0), os.getsid(0) == os.getpid()
found["oom"] = open("/proc/self/oom_score_adj").read().strip()
tell()
"""


async def test_a_module_has_exactly_what_its_manifest_names(tmp_path: Path) -> None:
    disk = Disk(tmp_path, capabilities=("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"))
    spec = disk.signed(
        SELF, capabilities=("CAP_NET_ADMIN", "CAP_BPF"), limits={"memory_mib": 128, "tasks": 16}
    )
    async with disk.spawner() as client:
        found = await disk.found(client, spec)
    wanted = f"{1 << 12 | 1 << 39:016x}"
    for one in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert found["status"][one] == wanted, one
    assert (found["status"]["NoNewPrivs"], found["status"]["Seccomp"]) == ("1", "2")
    assert found["limits"] == {"DATA": [128 << 20] * 2, "NOFILE": [4096] * 2, "CORE": [0, 0]}
    assert (found["umask"], found["session"], found["oom"]) == (0o077, True, "300")
    assert found["cwd"] == str(disk.module_dir / "data")
    assert set(found["descriptors"]) == {"0", "1", "2", "3"}
    assert found["descriptors"]["3"] == "socket"
    assert set(found["environment"]) <= {
        "PATH", "LANG", "HOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "LOOPBACK_PACKAGE_DIR",
        "LOOPBACK_ABI_FD", "LC_CTYPE",
    }  # fmt: skip
    assert found["environment"]["LOOPBACK_PACKAGE_DIR"].startswith(str(tmp_path / "state.sealed"))


CALLS = """
NUMBERS = {"x86_64": dict(mount=165, unshare=272, setns=308, ptrace=101, keyctl=250, bpf=321, perf=298, uring=425,
           userfaultfd=323, personality=135, pivot=155, reboot=169, kexec=246, module=175, handle=304, clone3=435, unknown=600),
           "aarch64": dict(mount=40, unshare=97, setns=268, ptrace=117, keyctl=219, bpf=280, perf=241, uring=425,
           userfaultfd=282, personality=92, pivot=41, reboot=142, kexec=104, module=105, handle=265, clone3=435, unknown=600)}
numbers = NUMBERS[os.uname().machine]
for name, number in numbers.items():
    call(name, lambda: libc.syscall(number, 0, 0, 0, 0, 0, 0))
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
for name, flag in dict(user=0x10000000, net=0x40000000, mount=0x20000, pid=0x20000000).items():
    call("clone-" + name, lambda: libc.syscall(clone, flag, 0, 0, 0, 0))
for family in ("AF_UNIX", "AF_ALG", "AF_PACKET", "AF_VSOCK", "AF_INET", "AF_INET6", "AF_NETLINK"):
    kind = socket.SOCK_RAW if family == "AF_NETLINK" else socket.SOCK_STREAM
    call(family, lambda: socket.socket(getattr(socket, family), kind).close())
call("pair", lambda: socket.socketpair())
call("fork", lambda: subprocess.run(["/bin/true"], check=True) and 0)
call("thread", lambda: __import__("threading").Thread(target=int).start())
tell()
"""


async def test_calls_that_no_module_needs_are_refused_and_it_lives(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    async with disk.spawner() as client:
        found = await disk.found(client, disk.signed(CALLS))
    refused = {name for name, answer in found.items() if answer == "EPERM"}
    assert refused == {
        "mount", "unshare", "setns", "ptrace", "keyctl", "bpf", "perf", "uring", "userfaultfd", "personality", "pivot",
        "reboot", "kexec", "module", "handle",
    }, found  # fmt: skip
    unknown = {name for name, answer in found.items() if answer == "ENOSYS"}
    assert unknown == {
        "clone-user", "clone-net", "clone-mount", "clone-pid", "clone3", "unknown", "AF_UNIX", "AF_ALG", "AF_PACKET",
        "AF_VSOCK",
    }  # fmt: skip
    assert {found[n] for n in ("AF_INET", "AF_INET6", "AF_NETLINK", "pair", "fork", "thread")} == {"ok"}


async def test_a_capability_opens_its_calls_and_no_others(tmp_path: Path) -> None:
    disk = Disk(tmp_path, capabilities=("CAP_BPF", "CAP_NET_RAW"))
    async with disk.spawner() as client:
        found = await disk.found(client, disk.signed(CALLS, capabilities=("CAP_BPF", "CAP_NET_RAW")))
    assert found["bpf"] not in ("EPERM", "ENOSYS"), (
        "the filter lets it reach the kernel, which finds it empty"
    )
    assert (found["perf"], found["mount"]) == ("EPERM", "EPERM")
    assert found["AF_PACKET"] not in ("ENOSYS",)


FILES = """
def touch(path):
    with open(path, "w") as file: file.write("x")
home = os.environ["HOME"]
place = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(home))))
call("own", lambda: touch(home + "/mine"))
call("own-rename", lambda: (os.mkdir(home + "/d"), os.rename(home + "/mine", home + "/d/mine")) and 0)
call("toml", lambda: touch(place + "/host.toml"))
call("creds", lambda: open(place + "/host.creds").read() and 0)
call("package", lambda: touch(os.environ["LOOPBACK_PACKAGE_DIR"] + "/lib/probe.py"))
call("state", lambda: touch(place + "/state/other"))
call("shadow", lambda: open("/etc/shadow").read() and 0)
call("link", lambda: os.symlink("/etc/shadow", home + "/shadow"))
call("through", lambda: open(home + "/shadow").read() and 0)
call("tmp", lambda: touch("/tmp/a-module-was-here"))
call("hosts", lambda: open("/etc/hosts").read() and 0)
call("null", lambda: touch("/dev/null"))
call("memory", lambda: open(f"/proc/{os.getppid()}/mem", "rb+"))
call("signal", lambda: os.kill(os.getppid(), 0))
made = os.open(home + "/program", os.O_CREAT | os.O_WRONLY, 0o755)
os.write(made, b"#!/bin/true"); os.close(made)
found["program"] = oct(os.stat(home + "/program").st_mode & 0o777)
call("run-own", lambda: subprocess.run([home + "/program"]) and 0)
tell()
"""


async def test_a_module_reaches_its_own_files_and_nobody_elses(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    async with disk.spawner() as client:
        found = await disk.found(client, disk.signed(FILES))
    assert found.pop("program") == "0o700", "its mode would let it run"
    may = {name for name, answer in found.items() if answer == "ok"}
    assert may == {"own", "own-rename", "link", "hosts", "null"}, found
    assert set(found.values()) <= {"ok", "EACCES", "EPERM"}, found


async def test_a_kernel_or_machine_that_can_do_less_is_named_and_still_runs_modules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(tmp_path)
    spec = disk.signed(SELF)
    less = """
from loopback.host import spawner
spawner.seccomp._library = lambda: None
spawner.confine.landlock_abi = lambda: 0
spawner.cgroups.find = lambda: spawner.cgroups.Groups(())
"""
    async with disk.spawner(less) as client:
        assert client.holds == ()
        found = await disk.found(client, spec)
    assert (found["status"]["Seccomp"], found["status"]["NoNewPrivs"]) == ("0", "1")
    assert found["limits"]["NOFILE"] == [4096, 4096]
    for words in (
        "no system-call filter",
        "no fence around files",
        "no limit on a module's memory",
        "no limit on a module's tasks",
    ):
        assert words in caplog.text


async def test_the_owner_may_let_modules_reach_more(tmp_path: Path) -> None:
    beyond = tmp_path / "certificates"
    beyond.mkdir()
    (beyond / "chain.pem").write_text("…")
    tell = f"call('beyond', lambda: open({str(beyond / 'chain.pem')!r}).read() and 0); tell()"
    for allow, answer in (((), "EACCES"), ((str(beyond),), "ok")):
        place = tmp_path / f"host-{answer}"
        place.mkdir()
        disk = Disk(place, read=allow)
        async with disk.spawner() as client:
            assert (await disk.found(client, disk.signed(tell)))["beyond"] == answer


@pytest.mark.broker
async def test_agent_spawner_module_and_watchdog_of_a_real_host(broker: Place, tmp_path: Path) -> None:
    world = World(broker, tmp_path)
    await world.prepare()
    write_config(msgspec.structs.replace(world.config, allow=Allow(modules=("tiny",), capabilities=("CAP_NET_ADMIN",))),
                 tmp_path / "host.toml")  # fmt: skip
    target = await world.release("1.0", policy=1, capabilities=("CAP_NET_ADMIN",))
    command = agent_command(tmp_path / "host.toml")
    with (tmp_path / "agent.log").open("ab") as log:
        agent = subprocess.Popen(command, stderr=log)  # noqa: ASYNC220  it only starts
    try:
        generation = await world.desire(target, start={"trial_s": 4.0})
        await eventually(lambda: {"spawner", "watchdog"} <= set(family(agent.pid)))
        processes = family(agent.pid)
        spawner = processes["spawner"]
        (module,) = await eventually(lambda: [p for p in children(spawner) if "tiny" in words(p)])
        nothing = f"{0:016x}"
        for pid in (agent.pid, processes["watchdog"]):
            held = status(pid)
            assert {held[name] for name in CAPS} == {nothing}, words(pid)
            assert (held["NoNewPrivs"], held["Seccomp"]) == ("1", "2")
        one = f"{1 << 12:016x}"
        assert [status(module)[name] for name in CAPS] == [one] * 5
        assert (status(module)["NoNewPrivs"], status(module)["Seccomp"]) == ("1", "2")
        assert status(spawner)["CapEff"] == f"{1 << 12 | 1 << 8:016x}"
        assert not sockets(spawner) & internet(spawner), "only the agent speaks to the network"
        assert sockets(agent.pid) & internet(agent.pid)
        # during the trial: the watchdog ends with it
        for pid in (agent.pid, spawner, module, processes["watchdog"]):
            assert core_limit(pid) == ["0", "0"], words(pid)
        done = await world.reached(generation)
        assert done.promoted == target
        assert looked_into([agent.pid, module, spawner]) == []
        assert {"seccomp", "landlock"} <= set((await inventories(world))[-1].features)
    finally:
        agent.terminate()
        agent.wait(60)
    await eventually(lambda: not proc.started_at(spawner) and not proc.started_at(module))


def core_limit(pid: int) -> list[str]:
    """Soft and hard."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line.split()[4:6] for line in lines if line.startswith("Max core file size"))


def looked_into(pids: list[int]) -> list[int]:
    """Whose memory a process of root's may open that has the capability of the module, and no other."""
    look = """
import sys
for pid in sys.argv[1:]:
    try: open(f"/proc/{pid}/mem", "rb").close(); print(pid)
    except PermissionError: pass
"""
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all", sys.executable, "-c", look, *map(str, pids)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(pid) for pid in done.stdout.split()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to give up")
def test_nobody_without_the_power_to_trace_looks_into_a_process_that_asks_for_it() -> None:
    """Root's processes without capabilities are each other's: a stolen module could read the host's key in the agent."""
    wait = (
        "import sys\nfrom loopback.host import confine\nconfine.keep_only(()){}\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    for ask, core in (("", None), ("\nconfine.leave_no_core()", ["0", "0"])):
        child = subprocess.Popen(
            [sys.executable, "-c", wait.format(ask)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with child:
            assert child.stdout is not None and child.stdin is not None
            child.stdout.readline()
            seen, limits = looked_into([child.pid]), core_limit(child.pid)
            child.stdin.close()
        assert seen == ([] if ask else [child.pid])
        assert core is None or limits == core


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        (0, {"landlock", "landlock-truncate", "landlock-scopes"}),
        (2, {"landlock-truncate", "landlock-scopes"}),
        (5, {"landlock-scopes"}),
        (6, set()),
        (99, set()),
    ],
)
async def test_a_kernel_whose_landlock_is_too_old_for_a_part_of_the_fence_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int, lacks: set[str]
) -> None:
    less = f"from loopback.host import spawner\nspawner.confine.landlock_abi = lambda: {version}"
    async with Disk(tmp_path).spawner(less) as client:
        assert confine.FENCES.keys() - set(client.holds) == lacks
    for name, (_, words) in confine.FENCES.items():
        assert (words in caplog.text) == (name in lacks)
    assert ("signals" in caplog.text) == (version < 6)


CAPS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def family(agent: int) -> dict[str, int]:
    return {
        name: p
        for p in children(agent)
        for name in ("spawner", "watchdog")
        if f"loopback.host.{name} " in words(p)
    }


async def inventories(world: World) -> list[reports.Inventory]:
    subject = subjects.from_host(WORKSPACE, world.host, "inventory")
    found = []
    for stored in await world.bus.read(subjects.STREAM_REPORTS, [subject]):
        payload, _ = envelope.open_envelope(
            envelope.parse(stored.data), envelope.REPORT, {world.key.keyid: world.key.public}
        )
        found.append(reports.decode(payload))
    return [one for one in found if isinstance(one, reports.Inventory)]


NOBODY = 65534
AS_ANYBODY = """
import asyncio, json, os, socket, sys
from pathlib import Path
from loopback.host.config import load
from loopback.host.launch import Launch
from loopback.host.spawner_client import SpawnerClient, give_up
toml, digest = Path(sys.argv[1]), sys.argv[2]
config = load(toml)
client = SpawnerClient.begin(toml, config)
give_up(config)
async def main():
    client.listen()
    ours, theirs = socket.socketpair()
    spec = Launch(module="probe", version="1.0", argv=(), env={}, cwd=toml.parent, log=toml.parent / "log", package=digest)
    child = await client.start(spec, theirs.fileno(), 1)
    assert await child.wait() == 0
    await client.close()
asyncio.run(main())
"""


def test_without_root_it_works_with_less_and_says_what(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="loopback-anybody-") as name:
        place = Path(name)
        disk = Disk(place, capabilities=("CAP_NET_ADMIN",))
        spec = disk.signed(SELF, capabilities=("CAP_NET_ADMIN",), limits={"tasks": 9})
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        done = subprocess.run(
            ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--inh-caps=-all", "--",
             sys.executable, "-P", "-c", AS_ANYBODY, str(disk.toml), spec.package],
            capture_output=True, text=True, timeout=60, check=False, cwd="/",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("FOUND ")[1].splitlines()[0])
    assert found["status"]["CapEff"].strip("0") == found["status"]["CapAmb"].strip("0") == ""
    assert (found["status"]["NoNewPrivs"], found["status"]["Seccomp"]) == ("1", "2"), (
        "all that needs no privilege holds"
    )
    assert "cannot give CAP_NET_ADMIN" in done.stderr and "probe runs without CAP_NET_ADMIN" in done.stderr
