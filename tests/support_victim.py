"""A host that installs over a bus which somebody else owns: the real HostTrust, download, verification and unpacking.

`Bus` is what the broker holds, by subject, for an attacker to bend. `Victim.install` does what the agent does between a
desired state and a version folder; what a later start would run is what lies in that folder.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from support_trust import NOW, MemoryRepository, archive
from tuf.api.metadata import Root, Targets

from loopback.contracts import subjects
from loopback.contracts.desired import Running
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.host import install
from loopback.host.config import Allow, HostConfig
from loopback.host.disk import Disk
from loopback.host.state import Store
from loopback.host.trusted import HostTrust
from loopback.trust import blobs, package
from loopback.trust.manifest import Manifest
from loopback.trust.repository import TrustedRepository
from loopback.trust.updater import DurableUpdater

Message = tuple[bytes, dict[str, str]]
PAYLOAD = "lib/loopback/__init__.py"


class Bus:
    """Stored messages by subject. `asked` is what the host asked for."""

    def __init__(self) -> None:
        self.messages: dict[str, Message] = {}
        self.asked: list[str] = []
        self.answer: Callable[[str], Awaitable[Message | None]] = self._stored

    async def get(self, subject: str) -> Message | None:
        """For HostTrust and blobs."""
        self.asked.append(subject)
        return await self.answer(subject)

    async def _stored(self, subject: str) -> Message | None:
        return self.messages.get(subject)

    def blob(self, data: bytes, sha256: str = "") -> str:
        """Store content under its digest, or under another's."""
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        for number, chunk in enumerate(blobs.split(data)):
            self.messages[subjects.blob(sha256, number)] = chunk, blobs.headers(len(data))
        return sha256

    def metadata(self, files: Mapping[str, bytes]) -> None:
        """Serve these files of a repository."""
        for name, data in files.items():
            self.messages[subjects.tuf(name)] = data, {}


class Victim:
    """One host, its bus and the honest repository; `now` is the host's clock."""

    def __init__(self, place: Path) -> None:
        self.now = NOW
        self.bus = Bus()
        self.repository = MemoryRepository()
        self.place = place
        self.bus.blob(self.repository.trust)
        self.publish()
        self.config = HostConfig(
            host="h1", workspace="prod", url="nats://127.0.0.1:1", creds=place / "none.creds", root=place / "root.json",
            state_dir=place / "state", allow=Allow(modules=("firewall", "edge"), capabilities=()),
        )  # fmt: skip
        self.store = Store(Disk(), self.config.state_dir)
        self.store.open(lambda: "i1", NOW)
        self.connected = True
        self.trust = HostTrust(self.store, self.repository.pinned, self.bus.get, lambda: self.connected)
        # The same repository with the clock passed in; HostTrust itself takes the machine's.
        self.trust.repository = TrustedRepository(self.store.tuf, self.trust._fetch, now=lambda: self.now)

    def publish(self, now: datetime = NOW) -> None:
        """Sign what is current and put it on the bus."""
        self.repository.publish(now)
        self.bus.metadata(self.repository.files)

    def release(self, version: str, content: bytes = b"honest\n", now: datetime = NOW) -> Running:
        """An honest release, published."""
        data = archive(version, {PAYLOAD: content})
        self.repository.add_release(data, version)
        self.publish(now)
        return Running(version=version, package=self.bus.blob(data))

    async def install(self, target: Running, module: str = "firewall") -> bytes:
        """What the agent does with a target before it starts it; the code that would run. Raises Refused."""
        await self.trust.refresh()
        assert self.trust.trust is not None
        await install.fetch(self.bus.get, self.store, target, 0, module, "prod", self.trust.trust)
        await asyncio.to_thread(self._verify, target, module)
        own = self.store.module(module)
        if not own.version_dir(target).is_dir():
            await asyncio.to_thread(install.unpack, self.store, target, module)
        return (own.version_dir(target) / PAYLOAD).read_bytes()

    def _verify(self, target: Running, module: str) -> Manifest:
        return install.verify(
            self.trust.repository, self.store, target, module, self.config, frozenset(), WorkspaceRules(), kept=False
        ).manifest  # fmt: skip

    def installed(self) -> list[str]:
        """Every version folder of every module."""
        return sorted(str(p.relative_to(self.store.dir)) for p in self.store.dir.glob("modules/*/versions/*"))


def anybody_may_sign(patch: pytest.MonkeyPatch) -> None:
    """Without the check of signatures and thresholds."""
    for kind in (Root, Targets):
        patch.setattr(kind, "verify_delegate", lambda *_: None)


def one_signature_is_enough(patch: pytest.MonkeyPatch) -> None:
    """Without the threshold."""

    def lenient(self: Root | Targets, role: str, payload: bytes, signatures: dict[str, object]) -> None:
        assert self.get_verification_result(role, payload, signatures).signed

    for kind in (Root, Targets):
        patch.setattr(kind, "verify_delegate", lenient)
    patch.setattr("loopback.trust.updater.count_keys", lambda *_: None)


def nothing_expires(patch: pytest.MonkeyPatch) -> None:
    """Without expiry."""
    patch.setattr("tuf.api._payload.Signed.is_expired", lambda *_: False)


def nothing_is_remembered(patch: pytest.MonkeyPatch) -> None:
    """Without the memory of what was verified before."""

    def forgetful(*_: object) -> bytes:
        raise FileNotFoundError

    patch.setattr(DurableUpdater, "_load_local_metadata", forgetful)


def no_floor_of_time(patch: pytest.MonkeyPatch) -> None:
    """Without the floor under the clock."""
    patch.setattr(TrustedRepository, "_floor", lambda *_: datetime.min.replace(tzinfo=UTC))


def with_member(data: bytes, name: str, content: bytes) -> bytes:
    """The same archive with one file more, in canonical form, that `digests.json` does not list."""
    end = data.index(bytes(1024), data.index(b"[module]"))
    end += -end % package.BLOCK
    starts = [0]
    while (at := starts[-1]) < len(data) and data[at : at + 1] != b"\0":
        size = int(data[at + 124 : at + 135], 8)
        starts.append(at + package.BLOCK + size + -size % package.BLOCK)
    members = [data[a:b] for a, b in pairwise(starts)]
    members.append(package.header(name, len(content)) + content + bytes(-len(content) % package.BLOCK))
    members.sort(key=lambda m: m[:100].split(b"\0")[0])
    return b"".join(members) + data[starts[-1] :]
