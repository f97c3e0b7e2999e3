"""The cluster's configuration files as they are in deploy/, with only paths, names and ports replaced: three real servers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nats.errors
import nats.js.errors
import pytest
from nats.js.api import StreamConfig
from support import eventually

from loopback.cli import certificates, creds
from loopback.services._runtime import streams
from loopback.services._runtime.broker import server_program
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.settings import Settings

pytestmark = [pytest.mark.broker, pytest.mark.e2e]

CONF = Path(__file__).parents[2] / "deploy" / "nats-cluster"
NAMES = ("nats-1", "nats-2", "nats-3")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in made:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in made]


class Cluster:
    """Three folders as three machines would have them, and their servers."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.home = place / "home"
        creds.init_home(self.home)
        ports = free_ports(6)
        self.clients = dict(zip(NAMES, ports[:3], strict=True))
        self.routes = dict(zip(NAMES, ports[3:], strict=True))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        certificates.make_authority(place / "tls")
        for name in NAMES:
            certificates.issue(place / "tls", name, [name, "127.0.0.1"])
            self.install(name)

    def install(self, name: str, authority: Path | None = None) -> None:
        """What the comments in common.conf say, on one machine."""
        etc, var, tls = self.place / name / "etc", self.place / name / "var", authority or self.place / "tls"
        etc.mkdir(parents=True)
        shutil.copytree(self.home / "nats" / "jwt", var / "jwt")
        shutil.copy(self.home / "nats" / "operator.jwt", etc)
        shutil.copy(tls / "ca.pem", etc)
        shutil.copy(tls / f"{name}.pem", etc / "server.pem")
        shutil.copy(tls / f"{name}.key", etc / "server.key")
        for source, target in ((CONF / f"{name}.conf", "nats.conf"), (CONF / "common.conf", "common.conf")):
            text = source.read_text()
            for old, new in (
                ("/etc/loopback/nats", str(etc)),
                ("/var/lib/loopback-nats", str(var)),
                ("0.0.0.0:4222", f"127.0.0.1:{self.clients[name]}"),
                ("0.0.0.0:6222", f"127.0.0.1:{self.routes[name]}"),
                *((f"{n}.example:4222", f"127.0.0.1:{self.clients[n]}") for n in NAMES),
                *((f"{n}.example:6222", f"127.0.0.1:{self.routes[n]}") for n in NAMES),
            ):
                text = text.replace(old, new)
            (etc / target).write_text(text)

    def start(self, name: str) -> None:
        with (self.place / name / "log").open("ab") as log:
            command = [server_program(), "-c", str(self.place / name / "etc" / "nats.conf")]
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def end(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait(60)

    def log(self, name: str) -> str:
        return (self.place / name / "log").read_text()

    @property
    def url(self) -> str:
        return ",".join(f"tls://127.0.0.1:{port}" for port in self.clients.values())

    async def bus(self) -> Bus:
        settings = Settings(
            url=self.url, creds=self.home / "creds" / "admin.creds", home=self.place, ca=self.place / "tls" / "ca.pem"
        )  # fmt: skip
        return await Bus.connect(settings)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        for name in list(made.processes):
            made.end(name)


@pytest.fixture
async def bus(cluster: Cluster) -> AsyncIterator[Bus]:
    for name in NAMES:
        cluster.start(name)
    async with await cluster.bus() as found:
        yield found


async def test_three_servers_serve_a_stream_of_three_and_lose_nothing_with_one_of_them(
    cluster: Cluster, bus: Bus
) -> None:
    async def made() -> bool:
        with contextlib.suppress(nats.js.errors.Error, nats.errors.Error):
            await bus.js.add_stream(StreamConfig(name="T", subjects=["t.>"], num_replicas=3))
            return True
        return False

    await eventually(made)
    for number in range(20):
        await bus.js.publish("t.x", b"%d" % number)

    async def current() -> str:
        found = (await bus.js.stream_info("T")).cluster
        assert found is not None and found.replicas is not None
        whole = len(found.replicas) == 2 and all(peer.current for peer in found.replicas)
        return (found.leader or "") if whole else ""

    leader = await eventually(current)
    cluster.end(leader)

    async def goes_on() -> bool:
        with contextlib.suppress(nats.js.errors.Error, nats.errors.Error):
            return (await bus.js.publish("t.y", b"after", timeout=2)).seq > 20
        return False

    await eventually(goes_on)
    info = await bus.js.stream_info("T")
    assert info.state.messages >= 21 and info.state.first_seq == 1


async def test_our_streams_can_be_made_on_it(cluster: Cluster, bus: Bus) -> None:
    async def made() -> bool:
        with contextlib.suppress(nats.js.errors.Error, nats.errors.Error, TimeoutError):
            await streams.ensure(bus)
            return True
        return False

    await eventually(made, 60)


async def test_a_server_of_another_authority_joins_nothing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    certificates.make_authority(other)
    certificates.issue(other, "nats-3", ["nats-3", "127.0.0.1"])
    shutil.rmtree(cluster.place / "nats-3")
    cluster.install("nats-3", other)
    for name in NAMES:
        cluster.start(name)
    await eventually(lambda: "Route connection created" in cluster.log("nats-1") + cluster.log("nats-2"))
    await eventually(lambda: "TLS route handshake error" in cluster.log("nats-3"))

    def it_first(servers: list[str]) -> None:
        servers.sort(key=lambda url: not url.endswith(f":{cluster.clients['nats-3']}"))

    # After its handshake fails the client library asks no other server by itself.
    monkeypatch.setattr(random, "shuffle", it_first)
    async with await cluster.bus() as bus:
        assert bus.nc.connected_url is not None
        assert bus.nc.connected_url.port != cluster.clients["nats-3"], (
            "nor do clients take it for one of theirs"
        )


async def test_a_route_in_the_clear_is_not_taken(cluster: Cluster) -> None:
    cluster.start("nats-1")
    await eventually(lambda: "Server is ready" in cluster.log("nats-1"))
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.routes["nats-1"])
    try:
        writer.write(b'CONNECT {"name":"intruder"}\r\nPING\r\n')
        async with asyncio.timeout(60):
            said = await reader.read()
        assert b"PONG" not in said
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
