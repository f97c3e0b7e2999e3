"""Whoever is revoked is disconnected within a second and stays out, whatever is started or written anew."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from nats.aio.client import Client
from support import EmbeddedPlace, Place, eventually

from loopback.cli import creds, revoke
from loopback.contracts.codes import Refused
from loopback.services._runtime.broker import server_program
from loopback.services._runtime.settings import read_identity
from loopback.trust import natsjwt

pytestmark = pytest.mark.broker


class Connection:
    """Somebody connected, who notes when he is cut off."""

    def __init__(self) -> None:
        self.nc = Client()
        self.cut = asyncio.Event()
        self.at = 0.0

    async def open(self, place: Place, identity: str) -> Connection:
        async def cut() -> None:
            self.at = time.monotonic()
            self.cut.set()

        path = place.home / "creds" / f"{identity}.creds"
        await self.nc.connect(
            place.url,
            user_credentials=str(path),
            inbox_prefix=f"_INBOX.{read_identity(path).name}",
            disconnected_cb=cut,
            error_cb=_quiet,
            allow_reconnect=False,
        )
        return self


async def _quiet(_: Exception) -> None:
    """The event is what counts."""


async def lets_in(place: Place, identity: str) -> bool:
    """Whether the server takes this identity now."""
    one = Connection()
    try:
        await one.open(place, identity)
    except nats.errors.Error:
        one.nc._transport.close()  # the client library leaves it open after a refused attempt
        with contextlib.suppress(ConnectionResetError):
            await one.nc._transport.wait_closed()
        return False
    await one.nc.close()
    return True


def key(place: Place, identity: str) -> Any:
    text = (place.home / "creds" / f"{identity}.creds").read_text()
    return natsjwt.read_creds(text)[1].public


async def restart(place: Place) -> None:
    await place.kill()
    await place.start()


@pytest.mark.parametrize("identity", ["web-1", "telemetry", "operator"])
async def test_who_is_revoked_is_cut_off_within_a_second_and_stays_out(broker: Place, identity: str) -> None:
    other = broker.host("prod", "web-2")
    identity = broker.host("prod", "web-1") if identity == "web-1" else identity
    async with asyncio.timeout(60):
        one, bystander = await Connection().open(broker, identity), await Connection().open(broker, other)
        began = time.monotonic()
        assert await revoke.revoke(broker.home, broker.url, key(broker, identity)) == 1
        await one.cut.wait()
        print(f"\n{identity} was cut off after {(one.at - began) * 1000:.1f} ms")
        assert one.at - began < 1.0
        assert not await lets_in(broker, identity)
        assert bystander.nc.is_connected and await lets_in(broker, other)

        await restart(broker)
        assert not await lets_in(broker, identity), "after the broker's restart"
        creds.init_home(broker.home)
        assert not await lets_in(broker, identity), "after the installation was written anew"
        await restart(broker)
        assert not await lets_in(broker, identity), "after both"
        assert await lets_in(broker, other)
        await bystander.nc.close()


async def test_a_later_jwt_for_a_revoked_key_counts_no_more_than_the_first(broker: Place) -> None:
    """Whoever holds the hosts' signing key, as a stolen eligibility does, cannot undo an operator's revocation."""
    identity = broker.host("prod", "web-1")
    path = broker.home / "creds" / f"{identity}.creds"
    public = key(broker, identity)
    await revoke.revoke(broker.home, broker.url, public)
    seed = read_identity(path).seed
    account = natsjwt.public("account", creds.read_key(broker.home, "account").public)
    issued = natsjwt.user(
        creds.read_key(broker.home, "role-host"),
        account,
        public,
        "web-1",
        ("ws:prod",),
        creds.FOR_GOOD.replace(year=9998),
    )
    path.write_text(natsjwt.creds(issued, seed))
    assert not await lets_in(broker, identity)


async def test_without_a_server_it_holds_from_the_next_start_on(tmp_path: Path) -> None:
    place = EmbeddedPlace(tmp_path / "home")
    try:
        await place.prepare()
        identity = place.host("prod", "web-1")
        url = place.url
        await place.kill()
        async with asyncio.timeout(60):
            assert await revoke.revoke(place.home, url, key(place, identity)) == 0
        await place.start()
        assert not await lets_in(place, identity)
        assert await lets_in(place, place.host("prod", "web-2"))
    finally:
        await place.close()


async def test_a_home_without_the_keys_says_so(broker: Place, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no key"):
        await revoke.revoke(tmp_path, broker.url, key(broker, broker.host("prod", "web-1")))


async def test_what_may_push_accounts_may_do_nothing_else(broker: Place) -> None:
    (broker.home / "creds" / "system.creds").write_text(creds.system_creds(broker.home, datetime.now(UTC)))
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    nc = Client()
    await nc.connect(
        broker.url,
        user_credentials=str(broker.home / "creds" / "system.creds"),
        error_cb=note,
        inbox_prefix="_INBOX.system",
    )
    for subject in (
        "$SYS.REQ.SERVER.PING",
        "$SYS.REQ.CLAIMS.LIST",
        "$SYS.REQ.CLAIMS.DELETE",
        "lb.ws.prod.cmd.x.y",
    ):
        await nc.publish(subject, b"{}", reply=nc.new_inbox())
    await nc.subscribe(">")
    await nc.flush()
    await eventually(lambda: len(refused) == 5)
    await nc.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.asynccontextmanager
async def cluster(home: Path, size: int) -> AsyncIterator[list[str]]:
    """So many servers of one cluster, each with its own resolver; their addresses. No JetStream, which needs three."""
    creds.init_home(home)
    ports = [(free_port(), free_port()) for _ in range(size)]
    routes = ", ".join(f'"nats://127.0.0.1:{route}"' for _, route in ports)
    processes = []
    try:
        for number, (port, route) in enumerate(ports):
            place = home / f"server-{number}"
            shutil.copytree(home / "nats", place)
            text = (place / "nats.conf").read_text().replace(str(home / "nats"), str(place))
            lines = [
                line
                for line in text.splitlines()
                if not line.startswith(("jetstream", "listen", "server_name"))
            ]
            lines += [
                f"listen: 127.0.0.1:{port}",
                f"server_name: s{number}",
                f"cluster {{ name: c, listen: 127.0.0.1:{route}, routes: [{routes}] }}",
            ]
            (place / "nats.conf").write_text("\n".join(lines))
            with (place / "log").open("wb") as log:
                processes.append(
                    await asyncio.create_subprocess_exec(
                        server_program(), "-c", str(place / "nats.conf"), stdout=log, stderr=log
                    )
                )
        for number in range(size):
            said = home / f"server-{number}" / "log"
            await eventually(lambda file=said: "Route connection created" in file.read_text())
        yield [f"nats://127.0.0.1:{port}" for port, _ in ports]
    finally:
        for process in processes:
            process.terminate()
            await process.wait()


async def test_every_server_of_a_cluster_is_told(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as urls:
        place = EmbeddedPlace(tmp_path)
        identity = place.host("prod", "web-1")
        place.url = urls[1]
        one = await Connection().open(place, identity)

        async def all_told() -> bool:  # routes may still be forming; revoking again changes nothing
            return await revoke.revoke(place.home, urls[0], key(place, identity)) == 2

        began = time.monotonic()
        await eventually(all_told)
        await asyncio.wait_for(one.cut.wait(), 60)
        print(f"\ncut off at the other server after {(one.at - began) * 1000:.1f} ms")
        for place.url in urls:
            assert not await lets_in(place, identity)
