"""The host's link, with a client during whose subscribing others work, as the library allows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from loopback.contracts import subjects
from loopback.contracts.keys import SigningKey
from loopback.host import link
from loopback.host.config import HostConfig

CONFIG = HostConfig(
    host="web-1", workspace="prod", url="nats://127.0.0.1:1",
    creds=Path("/none"), root=Path("/none"), state_dir=Path("/none"),
)  # fmt: skip
KEYS = ["a" * 32, "b" * 32, "c" * 32]


class Client:
    """One that is connected at once; `meanwhile` is what others do while it subscribes."""

    is_connected = True
    _reconnection_task = None

    def __init__(self, meanwhile: Callable[[str], Awaitable[None]]) -> None:
        self.subscribed: list[str] = []
        self._meanwhile = meanwhile

    async def connect(self, **_: Any) -> None:
        pass

    async def subscribe(self, subject: str, **_: Any) -> None:
        self.subscribed.append(subject)
        await self._meanwhile(subject)

    async def close(self) -> None:
        pass


async def test_a_roster_that_is_asked_for_while_the_host_connects_is_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rosters = [subjects.rosters("prod", key) for key in KEYS]

    async def meanwhile(subject: str) -> None:
        if subject in rosters[:-1]:
            await found.follow(KEYS[rosters.index(subject) + 1])

    async def desired(data: bytes, headers: dict[str, str]) -> None:
        pass

    client, joined = Client(meanwhile), asyncio.Event()
    monkeypatch.setattr(link, "Client", lambda: client)
    key = SigningKey.generate()
    found = link.Link(CONFIG, joined.set, desired, key=key, jwt=lambda: "", told=lambda data: None)
    await found.follow(KEYS[0])
    running = asyncio.create_task(found.run())
    waiting = asyncio.create_task(joined.wait())
    await asyncio.wait({waiting, running}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert joined.is_set(), running
    assert client.subscribed[2:] == rosters
    running.cancel()
    waiting.cancel()
