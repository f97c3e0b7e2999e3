"""Each unit's command line, run with the unit's user, capabilities, system calls and files: it has to work like that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support import EmbeddedPlace, eventually
from support_datapath import UDP, World, to_host
from support_spawner import Disk, status
from support_units import NOBODY, Unit, environment

from loopback.cli import certificates, creds, supervise
from loopback.contracts import subjects
from loopback.modules.build import build_module
from loopback.modules.firewall import module as firewall
from loopback.services._runtime.broker import server_program

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can take on another user's rights"),
    pytest.mark.skipif(
        shutil.which("systemd-analyze") is None, reason="the sets of system calls are systemd's"
    ),
    pytest.mark.e2e,
]


@pytest.fixture
def ground() -> Iterator[Path]:
    """A folder that other users may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="loopback-units-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("ab") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment(), cwd="/") as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def owned(folder: Path) -> Path:
    """Give everything in a folder to the unit's user."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return folder


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[EmbeddedPlace]:
    """An installation with a broker that speaks TLS alone, and its first repository."""
    home = tmp_path / "home"
    certificates.keep(home / "tls", "server", ("127.0.0.1",))
    supervise.prepare(home, "127.0.0.1:0")
    found = EmbeddedPlace(home)
    try:
        await found.prepare()
        await supervise.seed_repository(await found.bus(), home)
        yield found
    finally:
        await found.close()


@pytest.mark.broker
@pytest.mark.parametrize("service", subjects.SERVICES)
async def test_a_service_works_as_its_unit_confines_it(
    place: EmbeddedPlace, ground: Path, service: str
) -> None:
    unit, home = Unit("loopback-service@.service"), place.home
    state, secrets = ground / f"loopback-{service}", ground / "credentials"
    secrets.mkdir()
    state.mkdir()
    shutil.copy(home / "creds" / f"{service}.creds", secrets / "service.creds")
    if (issuer := home / "creds" / f"{service}.issuer").exists():
        shutil.copy(issuer, secrets / "service.issuer")
    shutil.copy(home / "tls" / "ca.pem", secrets)
    shutil.copy(home / "tuf" / "root.json", secrets)
    if service == "delivery":
        shutil.copytree(home / "keys" / "online", state / "keys" / "online")
    owned(secrets), owned(state)
    loopback = str(Path(sys.executable).with_name("loopback"))
    argv = unit.argv(
        **{"/opt/loopback/bin/loopback": loopback, "%S": str(ground), "%d": str(secrets), "%i": service,
           "${LOOPBACK_URL}": place.url}
    )  # fmt: skip
    log = ground / "log"
    with running(unit.command(argv, [state, Path("/tmp")], ground), log) as process:
        port = state / "state" / f"{service}-1" / "http.port"

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            if not port.exists():
                return False
            with contextlib.suppress(OSError):
                return (
                    urllib.request.urlopen(
                        f"http://127.0.0.1:{int(port.read_text())}/readyz", timeout=2
                    ).status
                    == 200
                )
            return False

        try:
            await eventually(lambda: asyncio.to_thread(ready))
        except AssertionError:
            raise AssertionError(log.read_text()) from None
        held = status(process.pid)
        assert {held[n].strip("0") for n in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
        assert (held["NoNewPrivs"], held["Seccomp"], held["Uid"].split()[0]) == ("1", "2", str(NOBODY))
        assert port.owner() == pwd.getpwuid(NOBODY).pw_name


@pytest.mark.broker
async def test_the_broker_works_as_its_unit_confines_it(ground: Path) -> None:
    unit = Unit("loopback-nats.service")
    home, state, etc = ground / "home", ground / "var", ground / "etc"
    state.mkdir()
    etc.mkdir()
    certificates.keep(ground / "tls", "server", ("127.0.0.1",))
    creds.init_home(home)
    shutil.copytree(home / "nats" / "jwt", state / "jwt")
    for source in (
        home / "nats" / "operator.jwt",
        *(ground / "tls" / n for n in ("ca.pem", "server.pem", "server.key")),
    ):
        shutil.copy(source, etc)
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    conf = Path(__file__).parents[2] / "deploy" / "nats-cluster"
    for source, name in ((conf / "nats-1.conf", "nats.conf"), (conf / "common.conf", "common.conf")):
        text = (
            source.read_text()
            .replace("/etc/loopback/nats", str(etc))
            .replace("/var/lib/loopback-nats", str(state))
        )
        text = text.replace("0.0.0.0:4222", f"127.0.0.1:{ports[0]}").replace(
            "0.0.0.0:6222", f"127.0.0.1:{ports[1]}"
        )
        (etc / name).write_text(text.replace(".example", ".invalid"))
    owned(etc), owned(state)
    argv = unit.argv(
        **{
            "/opt/loopback/bin/nats-server": server_program(),
            "/etc/loopback/nats/nats.conf": str(etc / "nats.conf"),
        }
    )
    log = ground / "log"
    with running(unit.command(argv, [state], ground), log) as process:
        await eventually(lambda: "Server is ready" in log.read_text())
        reader, writer = await asyncio.open_connection("127.0.0.1", ports[0])
        async with asyncio.timeout(60):
            assert json.loads((await reader.readline()).removeprefix(b"INFO "))["tls_required"]
        writer.close()
        held = status(process.pid)
        assert (held["CapEff"].strip("0"), held["NoNewPrivs"], held["Uid"].split()[0]) == (
            "",
            "1",
            str(NOBODY),
        )
    said = log.read_text().lower()
    assert "not permitted" not in said and "denied" not in said, said


HOST = """
import asyncio, json, os, sys
from pathlib import Path
from loopback.contracts import abi
from loopback.host.config import load
from loopback.host.launch import Launch
from loopback.host.process import ModuleProcess
from loopback.host.spawner_client import SpawnerClient, give_up
toml, digest, data = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
config = load(toml)
client = SpawnerClient.begin(toml, config)
give_up(config)
POLICY = b'{"version":1,"default":{"ingress":"drop","egress":"accept"}}'
async def main():
    client.listen()
    spec = Launch(module="firewall", version="1.0.0", argv=(), env={}, cwd=data, log=data / "log", package=digest)
    async with asyncio.TaskGroup() as group:
        module = await ModuleProcess.start(spec, group, starter=client.start)
        await module.request(abi.Configure(host="h", workspace="w", state_dir=str(data), settings=config.modules["firewall"]))
        await module.request(abi.Stage(digest="d0" * 32, serial=1, content=POLICY, control=[]))
        await module.request(abi.Commit(digest="d0" * 32, trial_s=60))
        await module.request(abi.Confirm(digest="d0" * 32))
        health = await module.health()
        print(json.dumps([health.state, health.enforcing, module.pid, list(client.holds)]), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await module.stop()
    await client.close()
asyncio.run(main())
"""


@pytest.mark.kernel
def test_the_agent_enforces_a_firewall_as_its_unit_confines_it(tmp_path: Path) -> None:
    """In a network namespace: the spawner and the agent below the unit's limits, and real packets."""
    unit = Unit("loopback-host.service")
    built = build_module(Path(firewall.__file__).parent, version="1.0.0", out=tmp_path)
    with World() as world:
        disk = Disk(
            tmp_path, module="firewall", capabilities=("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"),
            settings={"interfaces": ["*"], "bpf_root": str(world.bpf)},
        )  # fmt: skip
        archive = tmp_path / "firewall-1.0.0.lbm"
        if built.path != archive:
            shutil.copy(built.path, archive)
        spec = disk.unpack_archive(archive, "firewall", "1.0.0")
        disk.sign(spec)
        data = disk.module_dir / "data"
        argv = [sys.executable, "-P", "-c", HOST, str(disk.toml), spec.package, str(data)]
        # The unit's StateDirectory and ReadWritePaths, and what ProtectSystem=strict leaves: kernel interfaces.
        writable = [tmp_path, world.bpf, Path("/sys/fs/cgroup"), Path("/proc")]
        command = unit.command(argv, writable, tmp_path)
        assert world.arriving(to_host(UDP(dport=9)))[0]
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{world.host}", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            state, enforcing, module, holds = json.loads(line)
            assert (state, enforcing) == ("ok", True)
            assert {"seccomp", "landlock"} <= set(holds)
            assert not world.arriving(to_host(UDP(dport=9)))[0], "the kernel drops what the policy says"
            assert status(process.pid)["CapEff"].strip("0") == ""
            assert int(status(module)["CapEff"], 16) == 1 << 12 | 1 << 38 | 1 << 39
        finally:
            said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert not world.arriving(to_host(UDP(dport=9)))[0], "and goes on when agent and module have ended"
