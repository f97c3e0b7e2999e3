"""The host's own trust: TUF metadata and the trust document, kept on disk, renewed over the bus, never below what was seen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, Final, TypeVar

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.trustdoc import Trust
from loopback.host.config import HostConfig
from loopback.host.install import plainly
from loopback.host.state import Store
from loopback.trust import blobs
from loopback.trust.repository import MAX_TRUST_DOCUMENT, TrustedRepository

FETCH_S: Final = 10.0  # one metadata file, seen from the verifying thread

_T = TypeVar("_T")

log = logging.getLogger("loopback.host")


Get = Callable[[str], Coroutine[Any, Any, tuple[bytes, dict[str, str]] | None]]


def read_root(config: HostConfig) -> bytes:
    """The root that the machine's owner pinned. Raises Refused(CONFIG_INVALID)."""
    try:
        return config.root.read_bytes()
    except OSError as error:
        raise Refused(
            Code.CONFIG_INVALID, f"the pinned root {config.root} cannot be read: {error.strerror}",
            "copy root.json beside host.toml",
        ) from None  # fmt: skip


class HostTrust:
    """`trust` is the newest verified document, None before the first; `problem` why it may be out of date; `clock_floor`
    when the newest timestamp that was verified here was issued: it is no earlier than that.

    Where `problem` says expired or invalid, no new change is started; what is promoted stays.
    """

    def __init__(self, store: Store, root: bytes, get: Get, connected: Callable[[], bool]) -> None:
        self.trust: Trust | None = None
        self.problem: Refusal | None = None
        self.clock_floor: datetime | None = None
        self._store = store
        self._get = get
        self._connected = connected
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        TrustedRepository.pin(store.tuf, root)
        self.repository = TrustedRepository(store.tuf, self._fetch)

    async def load(self) -> None:
        """Take up what was verified earlier. Never raises Refused: a host without trust just obeys nobody new."""
        await self._renew(self.repository.load)

    async def refresh(self) -> None:
        """Renew over the bus; out of reach, what is known counts until it expires. Never raises Refused."""
        await self._renew(self.repository.refresh if self._connected() else self.repository.load)

    async def _renew(self, load: Callable[[], None]) -> None:
        async with self._turn:
            try:
                found = await asyncio.to_thread(self._verified, load)
                if self.trust is None or self.trust.document != found.document:
                    self.trust = found  # only then: what was verified with it is remembered by it
                self.problem = None
                self.clock_floor = self.repository.clock_floor
            except Refused as refused:
                # Before the first connection there is nothing to load, which is no news.
                first = load == self.repository.load and self.trust is None
                if self.problem != refused.refusal:
                    log.log(logging.DEBUG if first else logging.WARNING, "trust: %s", refused)
                self.problem = refused.refusal

    def _verified(self, load: Callable[[], None]) -> Trust:
        try:
            load()
        except Refused as refused:
            if refused.code is not Code.TUF_UNREACHABLE:
                raise
            self.repository.load()
        return self.repository.trust_document(self._document)

    def _document(self, sha256: str, length: int) -> bytes:
        """The content of the trust document, from disk or bus; its digest is checked by whoever asked."""
        path = self._store.trust / f"{sha256}.json"
        data = self._store.disk.read(path)
        if data is None or len(data) != length:
            data = self._wait(blobs.read(self._get, sha256, size=length, max_size=MAX_TRUST_DOCUMENT))
            self._store.disk.write(path, data)
            for name in self._store.disk.names(self._store.trust):
                if name != path.name:
                    self._store.disk.remove(self._store.trust / name)
        return data

    def _fetch(self, filename: str) -> bytes | None:
        found = self._wait(self._get(subjects.tuf(filename)))
        return found[0] if found else None

    def _wait(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run it on the loop, from the verifying thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        with plainly(self._store.dir):
            try:
                return future.result(FETCH_S)
            finally:
                future.cancel()
