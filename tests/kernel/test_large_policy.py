"""A policy that no envelope holds, from `rollout start` to packets: real services, a real agent, the real firewall."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
import rulesets
from support import Place, eventually
from support_datapath import PEER4, UDP, World, inside, to_host
from support_host import agent_command
from support_installation import Installation, installation

from loopback.contracts import envelope
from loopback.host import config
from loopback.host.config import Allow
from loopback.host.disk import Disk
from loopback.host.state import Store
from loopback.modules.build import build_module
from loopback.modules.firewall import module as firewall
from loopback.modules.firewall import policy as policies

pytestmark = [pytest.mark.kernel, pytest.mark.broker]

HOST = "wall-1"
ROLLOUT = """\
rollout: {name}
workspace: prod
module: firewall
version: 1.0.0
policy: {policy}
selector: {{hosts: [wall-1]}}
waves: [{{name: all, percent: 100}}]
trial: 1s
host_deadline: 5m
"""


@asynccontextmanager
async def reachable(world: World, url: str) -> AsyncIterator[None]:
    """The broker's address answers inside the host's namespace too: a relay, which is all that there is between the two."""
    place = urlsplit(url)
    assert place.port is not None
    with inside(world.host):  # made there, a socket stays there, whoever accepts on it
        listening = socket.create_server(("127.0.0.1", place.port))
    async with await asyncio.start_server(relayed(url), sock=listening):
        yield


def relayed(url: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Copies bytes between a client and the broker until one of them has had enough."""
    place = urlsplit(url)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection(place.hostname, place.port)
        await asyncio.gather(copy(reader, to_broker), copy(from_broker, writer))

    return serve


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_module(
        Path(firewall.__file__).parent, version="1.0.0", out=tmp_path_factory.mktemp("package")
    ).path


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
async def shop(broker: Place, tmp_path: Path, package: Path, world: World) -> AsyncIterator[Installation]:
    """An installation that ships the firewall to one host in a namespace of its own."""
    async with installation(broker, tmp_path) as found:
        await found("entitlement", "put", "walls", "--workspace", "prod", "--module", "firewall")
        await found("module", "publish", str(package))
        out = tmp_path / "hosts" / HOST
        await found("host", "add", HOST, "--workspace", "prod", "--out", str(out), "--heartbeat", "0.5")
        said = msgspec.structs.replace(
            config.load(out / "host.toml"),
            allow=Allow(modules=("firewall",), capabilities=("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")),
            modules={"firewall": {"interfaces": ["eth0"], "bpf_root": str(world.bpf)}},
            otel=False,
        )
        config.write_config(said, out / "host.toml")
        found.configs[HOST] = said
        async with reachable(world, broker.url):
            yield found


@contextmanager
def agent(world: World, shop: Installation) -> Iterator[subprocess.Popen[bytes]]:
    """`loopback host run` in the host's namespace."""
    folder = shop.folder / "hosts" / HOST
    command = ["nsenter", f"--net=/run/netns/{world.host}", *agent_command(folder / "host.toml")]
    with (folder / "agent.log").open("ab") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def large(rules: int, *, then: int) -> bytes:
    """So many rules that match nothing here, behind them one that lets a port in; everything else is dropped."""
    plain = rulesets.plain(rulesets.simple(rules - 1, default=policies.Action.DROP))
    plain["rules"].append(
        {"name": "open", "proto": "udp", "ports": [then], "from": [PEER4], "action": "accept"}
    )
    return policies.to_json(plain)


async def roll_out(shop: Installation, name: str, content: bytes) -> str:
    """By the operator's command, to its end; the policy's digest."""
    (shop.folder / f"{name}.json").write_bytes(content)
    file = shop.folder / f"{name}.yaml"
    file.write_text(ROLLOUT.format(name=name, policy=f"{name}.json"))
    said = await shop("rollout", "start", str(file), "--json")
    assert (await shop("rollout", "watch", name, "--json", code=None)).code == 0, (
        shop.folder / "hosts" / HOST / "agent.log"
    ).read_text()[-4000:]
    found: str = said.json["policy"]["digest"]
    return found


def passing(world: World, *ports: int) -> list[int]:
    """Which of these ports the peer reaches."""
    arrived = world.arriving(*(to_host(UDP(dport=port)) for port in ports))
    return [port for port, passed in zip(ports, arrived, strict=True) if passed]


async def test_ten_thousand_rules_that_came_apart_from_their_signature_judge_packets(
    world: World, shop: Installation
) -> None:
    first, second = large(10_000, then=4001), large(10_000, then=4002)
    assert len(first) > envelope.MAX_ENVELOPE
    own = Store(Disk(), shop.configs[HOST].state_dir)
    with agent(world, shop):
        await eventually(lambda: shop.said(HOST), 60)
        digest = await roll_out(shop, "first", first)
        assert passing(world, 4001, 4002) == [4001]
        state = own.module("firewall").read()
        assert state.promoted is not None
        assert state.promoted.policy == digest
        await roll_out(shop, "second", second)
        assert passing(world, 4001, 4002) == [4002]
    # With agent and module gone the kernel enforces; whoever starts again finds the content on its own disk.
    assert passing(world, 4001, 4002) == [4002]
    assert {path.name for path in own.contents.iterdir()} == {
        hashlib.sha256(content).hexdigest() for content in (first, second)
    }
    with agent(world, shop):

        async def adopted() -> bool:
            status = await shop.said(HOST)
            return bool(status and status.modules and status.modules[0].adopted)

        await eventually(adopted, 60)
        assert passing(world, 4001, 4002) == [4002]
