"""What Uptane adds to TUF's attacks: requests that are dropped, content that never quite arrives, half of a bundle."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support import Place
from support_host import World
from support_trust import NOW
from support_victim import Victim, nothing_expires

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.reports import Phase
from loopback.host import install
from loopback.trust import blobs
from loopback.trust import http as trust_http


@pytest.fixture
def victims(tmp_path: Path) -> Callable[[], Victim]:
    count = iter(range(9))

    def make() -> Victim:
        place = tmp_path / f"victim{next(count)}"
        place.mkdir()
        return Victim(place)

    return make


async def test_drop_request(victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker answers no request any more, so that the host never hears of the fix.

    Nothing makes it answer. What a host has against it is that it cannot go unnoticed for longer than a timestamp lives.
    """

    async def attack(victim: Victim) -> list[Code | None]:
        await victim.trust.refresh()

        async def dropped(_: str) -> None:
            return None

        victim.bus.answer = dropped
        found: list[Code | None] = []
        for hours in (1, 23, 25, 24 * 300):
            victim.now = NOW + timedelta(hours=hours)
            await victim.trust.refresh()
            found.append(victim.trust.problem.code if victim.trust.problem else None)
        assert victim.trust.trust is not None, "what it had, it keeps"
        return found

    with monkeypatch.context() as patch:
        nothing_expires(patch)
        assert await attack(victims()) == [None] * 4, "for ever content with what it knew"
    assert await attack(victims()) == [None, None, Code.TUF_EXPIRED, Code.TUF_EXPIRED]
    victim = victims()
    await attack(victim)
    target = victim.release("1.0.0")
    with pytest.raises(Refused, match="chunk 0 of content") as caught:
        await install.fetch(victim.bus.get, victim.store, target, 0, "firewall", "prod", _trust(victim))
    assert caught.value.code == Code.BLOB_MISSING


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "RETRIES_S", ())


def _trust(victim: Victim):
    assert victim.trust.trust is not None
    return victim.trust.trust


async def test_slow_retrieval_over_the_bus(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk after chunk arrives, each just in time, and the whole never."""

    async def attack(victim: Victim) -> None:
        await victim.trust.refresh()

        async def slow(_: str) -> tuple[bytes, dict[str, str]]:
            await asyncio.sleep(0.05)
            return bytes(blobs.CHUNK), {blobs.SIZE_HEADER: str(60 * 1024 * 1024)}

        victim.bus.answer = slow
        target = victim.release("1.0.0")
        await install.fetch(victim.bus.get, victim.store, target, 0, "firewall", "prod", _trust(victim))

    def deadline(patch: pytest.MonkeyPatch, seconds: float) -> None:
        download = blobs.download

        async def limited(*arguments: object, **how: object) -> None:
            await download(*arguments, **how, deadline_s=seconds)  # type: ignore[arg-type]

        patch.setattr(blobs, "download", limited)

    with monkeypatch.context() as patch:
        deadline(patch, float("inf"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await attack(victims())
    deadline(monkeypatch, 0.3)  # seconds instead of the minutes that a host gives a package
    with pytest.raises(Refused, match="did not arrive within 0 s") as caught:
        async with asyncio.timeout(60):
            await attack(victims())
    assert caught.value.code == Code.BLOB_MISSING


FILE = 1_000_000  # bytes, at 50 a second


def test_slow_retrieval_over_http() -> None:
    """A byte every now and then: each read of an ordinary client is in time, and there is no last one."""
    with dripping() as url:
        place = urlsplit(url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
        connection.request("GET", "/file")
        answer = connection.getresponse()
        got = 0
        while got <= 10:
            got += len(answer.read1(1024))
        assert got < FILE, "the ordinary client never misses a read, and reads for hours"
        answer.close()
        connection.close()
        endless = trust_http.fetcher(url, answer_s=1e9)("file")
        assert endless is not None
        assert sum(len(piece) for piece in itertools.islice(endless, 10)) < FILE, (
            "as does ours without its deadline"
        )
        pieces = trust_http.fetcher(url, answer_s=0.3)("file")
        assert pieces is not None
        with pytest.raises(TimeoutError, match="did not answer in time"):
            b"".join(pieces)


@contextmanager
def dripping() -> Iterator[str]:
    """A server that sends a byte every 20 ms, for ever, to everybody."""
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % FILE)
            while not stop.wait(0.02):
                connection.sendall(b"x")

    def accept(listener: socket.socket) -> None:
        threads = []
        with suppress(OSError):
            while not stop.is_set():
                thread = threading.Thread(target=serve, args=(listener.accept()[0],))
                thread.start()
                threads.append(thread)
        for thread in threads:
            thread.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("missing", ["policy", "last chunk of the package"])
async def test_partial_bundle(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The broker withholds a part of what belongs together, so that the host runs half of it."""

    async def attack(victim: Victim) -> bytes:
        target = victim.release("2.0.0", b"x" * 300_000)
        if missing == "policy":
            target = type(target)(
                version=target.version, package=target.package, policy="a" * 64, policy_serial=2
            )
        else:
            del victim.bus.messages[subjects.blob(target.package, 2)]
        return await victim.install(target)

    with monkeypatch.context() as patch:
        if missing == "policy":

            async def whatever(*_: object) -> None:
                """Takes what came."""

            patch.setattr(install, "_policy", whatever)
            assert (await attack(victims()))[:1] == b"x", "the package is there, and its policy is not"
        else:
            chunk = blobs._chunk

            async def padded(get: blobs.Get, sha256: str, number: int) -> tuple[bytes, dict[str, str]]:
                """Takes what came, and zeros for the rest."""
                with suppress(Refused):
                    return await chunk(get, sha256, number)
                size = int((await chunk(get, sha256, 0))[1][blobs.SIZE_HEADER])
                return bytes(size - number * blobs.CHUNK), {}

            victim = victims()
            patch.setattr(blobs, "_chunk", padded)
            patch.setattr(blobs, "_digest_of", lambda path: path.name.split(".")[0])
            with suppress(Refused):
                await attack(victim)
            (file,) = victim.store.downloads.glob("*.lbm")
            assert file.read_bytes()[-1024:] == bytes(1024), "half a package lies where a whole one belongs"
    victim = victims()
    with pytest.raises(Refused, match=r"chunk \d of content \w+ is not stored") as caught:
        await attack(victim)
    assert caught.value.code == Code.BLOB_MISSING
    assert victim.installed() == []
    assert not list(victim.store.downloads.glob("*.lbm")) or missing == "policy"


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    found = World(broker, tmp_path)
    await found.prepare()
    yield found


@pytest.mark.broker
async def test_a_host_that_is_given_half_a_bundle_changes_nothing(world: World) -> None:
    """The same against a whole agent with a real module: what was promoted goes on, policy and all."""
    first = await world.release("1.0", policy=1)
    async with world.agent():
        assert (await world.reached(await world.desire(first))).phase is Phase.PROMOTED
        half = await world.release("2.0")
        half = type(half)(version=half.version, package=half.package, policy="b" * 64, policy_serial=2)
        after = await world.reached(await world.desire(half, expected=first))
        assert after.refusal is not None and after.refusal.code == Code.BLOB_MISSING
        assert "is not stored" in after.refusal.reason
        assert after.promoted == first
    versions = world.config.state_dir / "modules" / "tiny" / "versions"
    assert [p.name for p in versions.iterdir()] == [f"1_2e0-{first.package[:12]}"]
