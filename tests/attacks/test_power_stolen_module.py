"""A signed module that turns out to be hostile, running as root without capabilities: what root's name alone would get it.

Each attack is first made with one defence taken out of the spawner, and gets through; then against the spawner as it is.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support_spawner import Disk

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the attacks are about being root's process")

NO_FENCE = "from loopback.host import spawner\nspawner.confine.fence = lambda what: True"
NO_FILTER = "from loopback.host import spawner\nspawner.seccomp.program = lambda capabilities, **more: None"
NO_GROUPS = "from loopback.host import spawner\nspawner.cgroups.find = lambda: spawner.cgroups.Groups(())"
KEEP_ALL = "from loopback.host import spawner\nspawner.confine.keep_only = lambda names, **more: None"

FILES = """
place = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.environ["HOME"]))))
call("secret", lambda: open(place + "/host.creds").read() and 0)
call("allow-list", lambda: open(place + "/host.toml", "a").write("# mine") and 0)
call("other-state", lambda: open(place + "/state/state.json", "w").write("{}") and 0)
call("own-package", lambda: open(os.environ["LOOPBACK_PACKAGE_DIR"] + "/lib/probe.py", "a").write("#") and 0)
call("agent", lambda: os.kill(os.getppid(), 0))
tell()
"""


async def test_it_does_not_read_the_hosts_secrets_or_write_its_rules(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    spec = disk.signed(FILES)
    async with disk.spawner(NO_FENCE) as client:
        assert set((await disk.found(client, spec)).values()) == {"ok"}
    async with disk.spawner() as client:
        assert set((await disk.found(client, spec)).values()) <= {"EACCES", "EPERM"}


@contextmanager
def obliging(path: Path) -> Iterator[list[int]]:
    """A system service on a Unix socket that does what root asks, as many do: who asked."""
    asked: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(0.2)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    peer, _ = listening.accept()
                except TimeoutError:
                    continue
                with peer:
                    uid = int.from_bytes(
                        peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], "little"
                    )
                    asked.append(uid)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            ended.set()
            thread.join()


async def test_it_does_not_have_a_system_service_do_it_for_root(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    path = tmp_path / "service"
    spec = disk.signed(f"call('ask', lambda: socket.socket(socket.AF_UNIX).connect({str(path)!r})); tell()")
    with obliging(path) as asked:
        async with disk.spawner(NO_FILTER) as client:
            assert (await disk.found(client, spec))["ask"] == "ok"
        assert asked == [0], "and the service saw root"
    path.unlink()
    with obliging(path) as asked:
        async with disk.spawner() as client:
            assert (await disk.found(client, spec))["ask"] == "ENOSYS"
        assert asked == []


async def test_it_does_not_make_itself_a_namespace_to_be_root_in(tmp_path: Path) -> None:
    """A user namespace gives every capability inside, and the kernel's whole attack surface with them."""
    disk = Disk(tmp_path)
    code = """
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
call("namespace", lambda: libc.syscall(number, 0x10000000))
found["capabilities"] = open("/proc/self/status").read().split("CapEff:\\t")[1][:16]
tell()
"""
    spec = disk.signed(code)
    async with disk.spawner(NO_FILTER) as client:
        reached = await disk.found(client, spec)
        assert reached["namespace"] == "ok" and int(reached["capabilities"], 16) >> 21 & 1, "CAP_SYS_ADMIN"
    async with disk.spawner() as client:
        assert await disk.found(client, spec) == {"namespace": "EPERM", "capabilities": "0" * 16}


async def test_it_does_not_keep_what_its_manifest_does_not_name(tmp_path: Path) -> None:
    disk = Disk(tmp_path, capabilities=("CAP_NET_ADMIN",))
    spec = disk.signed("found['caps'] = open('/proc/self/status').read().split('CapEff:\\t')[1][:16]; tell()")
    async with disk.spawner(KEEP_ALL) as client:
        assert int((await disk.found(client, spec))["caps"], 16) != 0
    async with disk.spawner() as client:
        assert int((await disk.found(client, spec))["caps"], 16) == 0


async def test_it_does_not_fill_the_host_with_processes(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    code = """
started = []
try:
    while len(started) < 60: started.append(subprocess.Popen(["/bin/sleep", "20"]))
except OSError as error:
    found["error"] = errno.errorcode[error.errno]
found["count"] = len(started)
for one in started: one.kill()
tell()
"""
    spec = disk.signed(code, limits={"tasks": 12})
    async with disk.spawner() as client:
        if "cgroup-tasks" not in client.holds:
            pytest.skip("no control group for tasks can be made here, and root has no other limit")
    async with disk.spawner(NO_GROUPS) as client:
        assert (await disk.found(client, spec)) == {"count": 60}
    async with disk.spawner() as client:
        found = await disk.found(client, spec)
        assert (found["count"], found["error"]) == (11, "EAGAIN")


async def test_it_does_not_end_roots_other_processes_by_their_limits(tmp_path: Path) -> None:
    """Limits are no signal, so no fence holds them: a second of processor time, and the kernel ends whichever it is."""
    disk = Disk(tmp_path)
    victim = await asyncio.create_subprocess_exec("/bin/sleep", "120")
    try:
        before = resource.prlimit(victim.pid, resource.RLIMIT_CPU)
        spec = disk.signed(f"""
call("others", lambda: resource.prlimit({victim.pid}, resource.RLIMIT_CPU, (1, 1)) and 0)
call("own", lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60)))
tell()
""")
        async with disk.spawner() as client:
            found = await disk.found(client, spec)
        assert found == {"others": "ENOSYS", "own": "ok"}
        assert resource.prlimit(victim.pid, resource.RLIMIT_CPU) == before
        async with disk.spawner(NO_FILTER) as client:
            assert (await disk.found(client, spec))["others"] == "ok"
        assert resource.prlimit(victim.pid, resource.RLIMIT_CPU) == (1, 1)
    finally:
        victim.kill()
        await victim.wait()


async def test_it_does_not_leave_a_way_to_be_root_for_others(tmp_path: Path) -> None:
    """A set-user-ID program of root's gives whoever runs it every capability that the module itself does not have."""
    disk = Disk(tmp_path)
    spec = disk.signed("""
for name in ("chmod", "fchmod", "created", "nameless"):
    if os.path.exists(name): os.unlink(name)
plain = os.open("chmod", os.O_CREAT | os.O_WRONLY, 0o700)
call("chmod", lambda: os.chmod("chmod", 0o4755))
call("fchmod", lambda: os.fchmod(plain, 0o4755))
call("created", lambda: os.close(os.open("created", os.O_CREAT | os.O_WRONLY, 0o4755)))
call("nameless", lambda: os.close(os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o4755)))
found["set"] = oct(os.stat("chmod").st_mode & 0o6000)
call("plain", lambda: os.chmod("chmod", 0o755))
tell()
""")
    made = disk.module_dir / "data" / "chmod"
    async with disk.spawner(NO_FILTER) as client:
        reached = await disk.found(client, spec)
    assert reached["chmod"] == reached["fchmod"] == reached["created"] == "ok" and reached["set"] == "0o4000"
    async with disk.spawner() as client:
        found = await disk.found(client, spec)
    refused = {found.pop(name) for name in ("chmod", "fchmod", "created", "nameless")}
    assert (refused, found) == ({"ENOSYS"}, {"set": "0o0", "plain": "ok"})
    assert not made.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)


MODES = """
package = os.environ["LOOPBACK_PACKAGE_DIR"] + "/lib/probe.py"
readable = os.open(package, os.O_RDONLY)
call("by-name", lambda: os.chmod(VICTIM, 0o666))
call("by-name-at", lambda: os.chmod(os.path.basename(VICTIM), 0o666, dir_fd=os.open(os.path.dirname(VICTIM), os.O_PATH)))
call("folder", lambda: os.chmod(os.path.dirname(VICTIM), 0o777))
call("by-descriptor", lambda: os.fchmod(readable, 0o666))
call("owner", lambda: os.chown(VICTIM, -1, 0))
call("owner-descriptor", lambda: os.fchown(readable, -1, 0))
found["package"] = oct(os.stat(package).st_mode & 0o777)
tell()
"""


async def test_it_does_not_make_roots_files_everybodys(tmp_path: Path) -> None:
    """Landlock does not look at modes, and to the kernel every file of root's is the module's own."""
    for name, without in (("bare", NO_FILTER), ("whole", "")):
        place, folder = tmp_path / name, tmp_path / f"secrets-{name}"
        place.mkdir()
        folder.mkdir(mode=0o700)
        victim = folder / "key"
        victim.touch(0o600)
        disk = Disk(place)
        spec = disk.signed(f"VICTIM = {str(victim)!r}" + MODES)
        async with disk.spawner(without) as client:
            found = await disk.found(client, spec)
        package, modes = found.pop("package"), [oct(p.stat().st_mode & 0o777) for p in (folder, victim)]
        assert set(found.values()) == {"ok"}, (
            "where it is refused it is so without a word: programs count on it"
        )
        assert (modes, package) == (
            (["0o777", "0o666"], "0o666") if without else (["0o700", "0o600"], "0o644")
        )


async def test_the_standard_library_works_where_modes_cannot_be_changed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    spec = disk.signed("""
import io, logging.handlers, pathlib, pickle, shutil, sqlite3, tarfile, tempfile, zipfile
package = os.environ["LOOPBACK_PACKAGE_DIR"]
if os.path.exists("w"): shutil.rmtree("w")
os.mkdir("w"); os.chdir("w")
def copies():
    shutil.copy(package + "/lib/probe.py", "a"); shutil.copy2("a", "b"); shutil.copytree(package, "tree"); shutil.move("b", "c")
    shutil.copymode("a", "c"); shutil.copystat("a", "c"); shutil.chown("c", 0, 0); shutil.rmtree("tree")
def modes():
    path = pathlib.Path("p"); path.touch(0o640); path.chmod(0o644); os.makedirs("x/y", 0o755); os.chmod("x", 0o755)
    with open("p", "w") as file: os.chmod(file.fileno(), 0o600); os.fchmod(file.fileno(), 0o644)
    os.chmod("p", 0o600, follow_symlinks=True); os.chown("p", 0, 0); os.lchown("p", 0, 0)
def temporary():
    with tempfile.TemporaryDirectory() as name, tempfile.NamedTemporaryFile(dir=name) as file, tempfile.TemporaryFile() as more:
        file.write(b"x"); more.write(b"x"); shutil.copy(file.name, name + "/copy")
def archives():
    with tarfile.open("t.tar", "w") as tar: tar.add("a")
    with tarfile.open("t.tar") as tar: tar.extractall("out")
    with zipfile.ZipFile("z.zip", "w") as made: made.write("a")
    with zipfile.ZipFile("z.zip") as made: made.extractall("zipped")
    shutil.make_archive("made", "gztar", "out")
    shutil.unpack_archive("made.tar.gz", "again")
def databases():
    with sqlite3.connect("d.sqlite") as db:
        db.execute("pragma journal_mode = wal"); db.execute("create table t (x)"); db.commit()
    handler = logging.handlers.RotatingFileHandler("log", maxBytes=10, backupCount=2)
    for _ in range(9): handler.emit(logging.LogRecord("x", 1, "", 1, "twenty characters or so", None, None))
    handler.close()
for one in (copies, modes, temporary, archives, databases):
    try: one(); found[one.__name__] = "ok"
    except Exception as error: found[one.__name__] = repr(error)
found["mode"] = oct(os.stat("p").st_mode & 0o777)
tell()
""")
    async with disk.spawner() as client:
        found = await disk.found(client, spec)
    assert found.pop("mode") == "0o600", "what is made is its own alone"
    assert set(found.values()) == {"ok"} and len(found) == 5, found
