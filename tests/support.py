"""What tests of several areas share: waiting for a condition, and places with a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from nats.aio.client import Client

from loopback.cli import creds
from loopback.contracts.keys import SigningKey
from loopback.services._runtime import streams
from loopback.services._runtime.broker import Broker
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.settings import Settings
from loopback.trust import natsjwt

T = TypeVar("T")
DEADLINE_S = 60.0


async def eventually(check: Callable[[], T | Awaitable[T]], timeout: float = DEADLINE_S) -> T:
    """The first true answer of `check`, which may be a coroutine function. Fails with the last answer after `timeout` s.

    AssertionErrors inside it count as "not yet".
    """
    deadline = time.monotonic() + timeout
    delay = 0.005
    while True:
        problem: object
        try:
            answer = check()
            if inspect.isawaitable(answer):
                answer = await answer
            if answer:
                return answer
            problem = answer
        except AssertionError as error:
            problem = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s; last: {problem!r}")
        await asyncio.sleep(delay)
        delay = min(delay * 1.5, 0.1)


async def settled(nc: Client) -> None:
    """Until the server has handled what this client sent, and its complaints about it have arrived.

    Twice, because nats-py takes a PONG that may be left from connecting for the answer to its first flush.
    """
    await nc.flush()
    await nc.flush()


class Place(ABC):
    """A home with every credential, and a broker with every stream. `bus(identity)` connects, and is closed in the end."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.url = ""
        self._stack = AsyncExitStack()

    @abstractmethod
    async def start(self) -> None:
        """Start the broker; again after `kill`, on the same address."""

    @abstractmethod
    async def kill(self) -> None:
        """SIGKILL to the broker."""

    def settings(self, identity: str, **changes: object) -> Settings:
        """How a service or person of this name connects."""
        path = self.home / "creds" / f"{identity}.creds"
        return Settings(**({"url": self.url, "creds": path, "home": self.home} | changes))

    async def bus(self, identity: str = "admin", **changes: object) -> Bus:
        """A connection with this identity's credentials."""
        return await self._stack.enter_async_context(await Bus.connect(self.settings(identity, **changes)))

    def host(self, workspace: str, name: str) -> str:
        """Enrol a host; the identity to connect with."""
        identity = f"host-{workspace}-{name}"
        (self.home / "creds" / f"{identity}.creds").write_text(creds.host_creds(self.home, workspace, name))
        return identity

    def guest(self, keyid: str) -> str:
        """Whoever holds the token of the invitation with this key id; the identity to connect with."""
        account = natsjwt.public("account", creds.read_key(self.home, "account").public)
        role, key = creds.read_key(self.home, "role-enrol"), SigningKey.generate()
        token = natsjwt.user(role, account, key.public, keyid, (), datetime.now(UTC))
        text = natsjwt.creds(token, natsjwt.seed("user", key))
        (self.home / "creds" / f"guest-{keyid}.creds").write_text(text)
        return f"guest-{keyid}"

    async def workspace(self, name: str) -> str:
        """Make a workspace's stream; its name."""
        await streams.ensure_workspace(await self.bus(), name)
        return f"LB_WS_{name}"

    async def prepare(self) -> None:
        """Credentials, broker, streams."""
        creds.init_home(self.home)
        await self.start()
        await streams.ensure(await self.bus())

    async def close(self) -> None:
        """Disconnect everybody and stop the broker."""
        await self._stack.aclose()


class EmbeddedPlace(Place):
    """With the server from the wheel."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self._broker = Broker(home, listen="127.0.0.1:0")

    async def start(self) -> None:
        await self._broker.start()
        self.url = self._broker.url

    async def kill(self) -> None:
        await self._broker.kill()

    async def close(self) -> None:
        await super().close()
        await self._broker.stop()


@contextlib.asynccontextmanager
async def background(*work: Awaitable[None]) -> AsyncIterator[None]:
    """Run what runs for ever, until the block ends."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
