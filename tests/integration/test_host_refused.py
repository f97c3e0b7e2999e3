"""A host that the broker does not let in asks less and less often, and is back at once when there is a reason to ask.

With a real broker: what it says to a revoked host, and how the client library takes it, is what all this is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator

import pytest
from support import Place, eventually

from loopback.cli import revoke
from loopback.host import link as link_module
from loopback.host.config import Allow, HostConfig
from loopback.host.link import REFUSED_FIRST_S, REFUSED_LONGEST_S, Link, hold_off
from loopback.trust import natsjwt

pytestmark = pytest.mark.broker
WORKSPACE = "prod"
FIRST_S = 0.1  # in the stories that wait for several refusals
AT_ONCE_S = (
    REFUSED_LONGEST_S / 2
)  # the client library waits a second between attempts, a busy machine makes it several
SEVERAL = 6


class Host:
    """One host's link; `asked` is when it presented its credentials, `jwt` what it presents."""

    def __init__(self, place: Place) -> None:
        self.path = place.home / "creds" / f"{place.host(WORKSPACE, 'web-1')}.creds"
        self.jwt, self.key = natsjwt.read_creds(self.path.read_text())
        self.asked: list[float] = []
        config = HostConfig(
            host="web-1", workspace=WORKSPACE, url=place.url, creds=self.path, root=self.path, state_dir=place.home,
            allow=Allow(),
        )  # fmt: skip
        self.link = Link(
            config, lambda: None, self._ignore, key=self.key, jwt=self._present, told=lambda data: None, chance=lambda: 1.0
        )  # fmt: skip

    def _present(self) -> str:
        self.asked.append(time.monotonic())
        return self.jwt

    async def _ignore(self, data: bytes, headers: dict[str, str]) -> None: ...

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.link.run())
        try:
            yield
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.link.close()

    async def waits(self, since: int) -> list[float]:
        """The seconds between SEVERAL attempts from that one on."""
        await eventually(lambda: len(self.asked) >= since + SEVERAL)
        found = self.asked[since : since + SEVERAL]
        return [b - a for a, b in itertools.pairwise(found)]


@pytest.fixture
async def prod(broker: Place) -> Place:
    await broker.workspace(WORKSPACE)
    return broker


def doubled(waits: list[float]) -> bool:
    """Each at least as long as it should be, which is twice the one before."""
    print(f"\nseconds between attempts: {', '.join(f'{w:.2f}' for w in waits)}")
    return all(wait >= FIRST_S * 2**n for n, wait in enumerate(waits))


async def test_a_revoked_host_asks_less_and_less_often(prod: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine thousand of them would otherwise be nine thousand handshakes a second, for ever."""
    monkeypatch.setattr(link_module, "REFUSED_FIRST_S", FIRST_S)
    host = Host(prod)
    async with host.running():
        await eventually(lambda: host.link.connected)
        since = len(host.asked)
        await revoke.revoke(prod.home, prod.url, host.key.public)
        assert doubled(await host.waits(since)), host.asked


async def test_also_one_that_was_revoked_while_the_broker_was_away(
    prod: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is in the midst of the client library's own reconnecting, which asks once a second for ever."""
    monkeypatch.setattr(link_module, "REFUSED_FIRST_S", FIRST_S)
    host = Host(prod)
    async with host.running():
        await eventually(lambda: host.link.connected)
        await prod.kill()
        await eventually(lambda: not host.link.connected)
        host.jwt = host.jwt[:-8] + "AAAAAAAA"
        since = len(host.asked)
        await prod.start()
        assert doubled(await host.waits(since)), host.asked


async def test_new_credentials_end_the_wait(prod: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "REFUSED_FIRST_S", REFUSED_LONGEST_S)
    host = Host(prod)
    good = host.jwt
    host.jwt = good[:-8] + "AAAAAAAA"
    async with host.running():
        await eventually(lambda: host.link._refusals == 1)
        host.jwt = good
        began = time.monotonic()
        host.path.write_text(host.path.read_text() + "\n")  # as 'loopback host enroll --replace' does
        await eventually(lambda: host.link.connected)
        took = time.monotonic() - began
    assert took < AT_ONCE_S and len(host.asked) == 2, (
        "asked once in vain, and once more when there was a reason"
    )


async def test_a_plain_loss_of_the_network_is_no_refusal(
    prod: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "REFUSED_FIRST_S", REFUSED_LONGEST_S)
    host = Host(prod)
    async with host.running():
        for _ in range(3):
            await eventually(lambda: host.link.connected)
            await prod.kill()
            await eventually(lambda: not host.link.connected)
            await prod.start()
            began = time.monotonic()
            await eventually(lambda: host.link.connected)
            assert time.monotonic() - began < AT_ONCE_S


def test_the_waits_grow_to_about_a_minute_and_never_fall_together() -> None:
    assert [hold_off(n, 1.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert hold_off(1, 0.0) == REFUSED_FIRST_S / 2
    assert hold_off(10**9, 0.0) == REFUSED_LONGEST_S / 2
    assert len({hold_off(7, n / 100) for n in range(100)}) == 100
