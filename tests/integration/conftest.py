"""A TUF repository over HTTP and our client, for the conformance tests; installations with keys, for those about keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Place
from support_keys import Installation
from support_simulator import Made, Server, Simulator, TufClient, serving

from loopback.cli import ceremony


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture
def repo(server: Server) -> Simulator:
    return server.add(Simulator())


@pytest.fixture
def made(server: Server, tmp_path: Path) -> Made:
    def make(repo: Simulator, **how: Any) -> TufClient:
        return TufClient(tmp_path / "client", server.address(repo), **how)

    return make


@pytest.fixture
def client(made: Made, repo: Simulator) -> TufClient:
    """A client that trusts the repository's first root."""
    found = made(repo)
    assert found.init(repo.last("root")) == 0
    assert repo.asked == [], "init asks nobody"
    return found


@pytest.fixture
async def place(broker: Place, tmp_path: Path) -> AsyncIterator[Installation]:
    """Keys, one of each; delivery runs, and release 1.0.0 is out."""
    found = Installation(broker, tmp_path)
    found.bus = await broker.bus("admin")
    async with found.delivery():
        await found.release("1.0.0")
        yield found


@pytest.fixture
async def threshold(broker: Place, tmp_path: Path) -> AsyncIterator[Installation]:
    """Two of three root keys and two of three targets keys must sign."""
    found = Installation(broker, tmp_path, ceremony.Plan(3, 2, 3, 2))
    found.bus = await broker.bus("admin")
    async with found.delivery():
        yield found
