"""A TUF repository in memory and a client of it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from support_trust import NOW, Client, MemoryRepository

from loopback.trust.repository import TrustedRepository


@pytest.fixture
def repository() -> MemoryRepository:
    return MemoryRepository()


@pytest.fixture
def client(repository: MemoryRepository, tmp_path: Path) -> Client:
    TrustedRepository.pin(tmp_path / "tuf", repository.pinned)

    def make(now: datetime = NOW) -> TrustedRepository:
        return TrustedRepository(tmp_path / "tuf", repository.fetch, now=lambda: now)

    return make
