"""TLS between everybody and a real broker: the right authority connects, every other way of connecting does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import pytest
from support import EmbeddedPlace, eventually
from support_host import WORKSPACE
from support_identity import enrolling

from loopback.cli import certificates, context, supervise
from loopback.contracts.codes import Code, Refused
from loopback.host import config
from loopback.host import link as host_link
from loopback.host.config import Allow, HostConfig
from loopback.host.link import Link
from loopback.services._runtime.bus import Bus
from loopback.trust import natsjwt, tls

pytestmark = pytest.mark.broker

NAMES = ("localhost", "127.0.0.1")
FAILED = "TLS handshake error"
HUNG_UP = b""


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[EmbeddedPlace]:
    home = tmp_path / "home"
    certificates.keep(home / "tls", "server", NAMES)
    found = EmbeddedPlace(home)
    try:
        await found.prepare()
        yield found
    finally:
        await found.close()


def authority(folder: Path) -> Path:
    """Another installation's."""
    certificates.make_authority(folder)
    return folder / "ca.pem"


Connect = Callable[[EmbeddedPlace, str, Path | None], Coroutine[Any, Any, None]]


async def a_service(place: EmbeddedPlace, url: str, ca: Path | None) -> None:
    settings = place.settings("delivery", url=url, ca=ca, home=place.home / "elsewhere")
    async with await Bus.connect(settings):
        pass


async def an_operator(place: EmbeddedPlace, url: str, ca: Path | None) -> None:
    path = place.home / "creds" / "operator.creds"
    async with context.connect(context.Context(place.home, url, path, path, ca)):
        pass


async def a_host(place: EmbeddedPlace, url: str, ca: Path | None) -> None:
    async with a_link(place, url, ca) as link:
        await connected(link)


async def connects(connect: Connect, place: EmbeddedPlace, ca: Path) -> bool:
    """Whether it does; it does not where the broker sees its handshake fail."""
    log = place.home / "nats" / "nats.log"
    before = log.read_text().count(FAILED)
    return await gets_through(connect(place, place.url, ca), lambda: log.read_text().count(FAILED) > before)


async def gets_through(trying_it: Coroutine[Any, Any, None], failed: Callable[[], bool]) -> bool:
    """Whether it does what it tries, before the other side sees that it failed."""
    trying = asyncio.create_task(trying_it)
    try:
        await eventually(lambda: trying.done() or failed())
        if not trying.done():
            return False
        await trying
    except (nats.errors.Error, OSError, Refused):
        return False
    finally:
        trying.cancel()
        await asyncio.gather(trying, return_exceptions=True)
    return True


@contextlib.asynccontextmanager
async def a_link(place: EmbeddedPlace, url: str, ca: Path | None) -> AsyncIterator[Link]:
    path = place.home / "creds" / f"{place.host(WORKSPACE, 'web-1')}.creds"
    config = HostConfig(
        host="web-1", workspace=WORKSPACE, url=url, creds=path, root=path, state_dir=place.home, ca=ca, allow=Allow()
    )  # fmt: skip

    async def ignore(data: bytes, headers: dict[str, str]) -> None: ...

    jwt, key = natsjwt.read_creds(path.read_text())
    link = Link(config, lambda: None, ignore, key=key, jwt=lambda: jwt, told=lambda data: None)
    running = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await link.close()


async def connected(link: Link) -> None:
    await eventually(lambda: link.connected)


EVERYBODY = pytest.mark.parametrize("connect", [a_service, an_operator, a_host])


@EVERYBODY
async def test_the_installations_own_authority_connects(place: EmbeddedPlace, connect: Connect) -> None:
    assert place.url.startswith("tls://")
    assert await connects(connect, place, place.home / "tls" / "ca.pem")


@EVERYBODY
async def test_another_authority_does_not(place: EmbeddedPlace, connect: Connect, tmp_path: Path) -> None:
    assert not await connects(connect, place, authority(tmp_path / "other"))


async def test_an_operator_with_another_authority_is_told_why(place: EmbeddedPlace, tmp_path: Path) -> None:
    """Where the client library says nothing, and waits for ever."""
    with pytest.raises(Refused, match="certificate verify failed") as refused:
        await an_operator(place, place.url, authority(tmp_path / "other"))
    assert refused.value.code is Code.CONFIG_INVALID and "context.toml" in (refused.value.next_step or "")


@EVERYBODY
async def test_an_expired_certificate_does_not(place: EmbeddedPlace, connect: Connect) -> None:
    await replaced(place, NAMES, datetime.now(UTC) - timedelta(days=91))
    assert not await connects(connect, place, place.home / "tls" / "ca.pem")


@EVERYBODY
async def test_another_servers_certificate_does_not(place: EmbeddedPlace, connect: Connect) -> None:
    await replaced(place, ("nats-2.example",))
    assert not await connects(connect, place, place.home / "tls" / "ca.pem")


async def test_a_host_comes_back_once_its_brokers_certificate_is_good_again(
    place: EmbeddedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed handshake the client library waits for ever; the host does not."""
    monkeypatch.setattr(host_link, "ATTEMPT_S", 2.0)
    await replaced(place, NAMES, datetime.now(UTC) - timedelta(days=91))
    async with a_link(place, place.url, place.home / "tls" / "ca.pem") as link:
        log = place.home / "nats" / "nats.log"
        await eventually(lambda: FAILED in log.read_text())
        assert not link.connected
        await replaced(place, NAMES)
        await connected(link)


async def replaced(place: EmbeddedPlace, names: tuple[str, ...], now: datetime | None = None) -> None:
    """Give the broker another certificate."""
    await place.kill()
    certificates.issue(place.home / "tls", "server", names, now)
    await place.start()


def plain(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("tls://").rpartition(":")
    return host, int(port)


async def test_the_broker_takes_no_plain_connection(place: EmbeddedPlace) -> None:
    reader, writer = await asyncio.open_connection(*plain(place.url))
    try:
        async with asyncio.timeout(60):
            info = await reader.readline()
            assert json.loads(info.removeprefix(b"INFO "))["tls_required"] is True
            writer.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
            assert b"PONG" not in await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def stripping(place: EmbeddedPlace) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Somebody between client and broker who says that TLS is not wanted, and writes down what comes."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = {"server_id": "x", "version": "2.15.1", "max_payload": 1 << 20, "proto": 1, "headers": True, "nonce": "n" * 16,
                "auth_required": True, "tls_required": False}  # fmt: skip
        with contextlib.suppress(OSError):
            writer.write(b"INFO " + json.dumps(said).encode() + b"\r\n")
            while data := await reader.read(65536):
                seen.append(data)
                if b"PING" in data:
                    writer.write(b"PONG\r\n")
            seen.append(HUNG_UP)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"tls://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()


@EVERYBODY
async def test_nobody_between_can_talk_a_client_out_of_tls(
    place: EmbeddedPlace, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = place.home / "tls" / "ca.pem"
    with monkeypatch.context() as patch:
        patch.setattr(
            tls, "options", lambda url, ca: {"tls": tls.context(ca)}
        )  # as the client library does it by itself
        async with stripping(place) as (url, seen):
            assert await gets_through(connect(place, url, ca), lambda: False), "the attack reaches its target"
            assert b"CONNECT" in b"".join(seen) and b"jwt" in b"".join(seen)
    async with stripping(place) as (url, seen):
        assert not await gets_through(connect(place, url, ca), lambda: HUNG_UP in seen)
        assert b"CONNECT" not in b"".join(seen), "not a word was said in the clear"


async def test_other_clients_that_wait_for_the_brokers_word_can_connect_too(place: EmbeddedPlace) -> None:
    async def quiet(error: Exception) -> None: ...

    nc = await nats.connect(
        place.url, user_credentials=str(place.home / "creds" / "operator.creds"), error_cb=quiet,
        inbox_prefix=b"_INBOX.operator", tls=tls.context(place.home / "tls" / "ca.pem"),
    )  # fmt: skip
    assert nc.is_connected
    await nc.close()


async def test_up_with_tls_brings_up_every_service_and_stays_that_way(tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with supervise.running(home, listen="127.0.0.1:0", tls=True) as installation:
        assert installation.url.startswith("tls://")
        context.set_home(home)
        try:
            async with context.connect() as session:
                assert session.context.ca == home / "tls" / "ca.pem"
        finally:
            context.set_home(None)
    before = (home / "tls" / "server.pem").read_bytes()
    async with supervise.running(home, listen="127.0.0.1:0", services=()) as installation:
        assert installation.url.startswith("tls://"), "what was encrypted once is not plain without a word"
    assert (home / "tls" / "server.pem").read_bytes() == before, "good for another while"


def test_keys_are_their_owners_and_certificates_end(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    certificates.keep(tmp_path / "tls", "server", NAMES)
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / "tls" / name).stat().st_mode) == 0o600
    (server,) = certificates.servers(tmp_path / "tls").values()
    assert timedelta(days=89) < server.not_valid_after_utc - now < timedelta(days=91)
    assert set(certificates.names_of(server)) == set(NAMES)
    assert not certificates.due(server, now + timedelta(days=59))
    assert certificates.due(server, now + timedelta(days=61))
    assert not certificates.keep(tmp_path / "tls", "server", NAMES)
    assert certificates.keep(tmp_path / "tls", "server", (*NAMES, "nats.example")), (
        "another name, another certificate"
    )


def test_a_certificate_outlives_an_authority_kept_offline(tmp_path: Path) -> None:
    certificates.keep(tmp_path, "server", NAMES)
    (tmp_path / "ca.key").rename(tmp_path / "elsewhere")
    assert not certificates.keep(tmp_path, "server", NAMES)
    with pytest.raises(Refused) as caught:
        certificates.keep(tmp_path, "server", ("other.example",))
    assert "other half" in caught.value.reason


@pytest.mark.parametrize("name", ["", "ca", "../x", "-x", "a b"])
def test_names_that_no_file_or_certificate_should_have_are_refused(tmp_path: Path, name: str) -> None:
    certificates.make_authority(tmp_path)
    with pytest.raises(Refused):
        certificates.issue(tmp_path, name, [name or "x"])


def test_a_missing_authority_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pem", tmp_path / "garbage.pem"):
        (tmp_path / "garbage.pem").write_text("garbage")
        with pytest.raises(Refused) as caught:
            tls.options("tls://127.0.0.1:1", path)
        assert caught.value.code is Code.CONFIG_INVALID and str(path) in caught.value.reason
    assert tls.options("nats://127.0.0.1:1", None) == {}
    assert tls.context(None).minimum_version == ssl.TLSVersion.TLSv1_3


async def test_a_machine_enrols_over_tls_with_the_authority_that_its_token_carries(
    place: EmbeddedPlace, tmp_path: Path
) -> None:
    async with enrolling(place) as world:
        given = await world.invite("web-1")
        assert given.ca == (place.home / "tls" / "ca.pem").read_text()
        made = config.load(await world.enrol(given, tmp_path / "web-1"))
        assert made.ca is not None
        assert made.ca.read_text() == given.ca
        other = authority(tmp_path / "other").read_text()
        stray = msgspec.structs.replace(await world.invite("web-2"), ca=other)
        with pytest.raises(Refused, match="no bus answers") as refused:
            await world.enrol(stray, tmp_path / "web-2", wait_s=1.0)
        assert "certificate" in refused.value.reason.lower()
        assert not (tmp_path / "web-2" / "host.creds").exists()
