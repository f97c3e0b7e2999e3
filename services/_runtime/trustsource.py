"""The trust document as services see it: through the verifying TUF client, like every host."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Final

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.trustdoc import Trust
from loopback.services._runtime import wire
from loopback.services._runtime.bus import Bus, Unavailable
from loopback.services._runtime.settings import Settings
from loopback.trust import blobs
from loopback.trust.repository import TrustedRepository

REFRESH_S: Final = 30.0  # a withdrawn key is refused here at most this much later
LOOK_AGAIN_S: Final = 1.0  # unknown keys make us look again, but a flood of them no oftener than this
FETCH_S: Final = 40.0  # above the bus's own retries

log = logging.getLogger(__name__)


class TrustSource:
    """The current trust document, verified. Its memory is a folder, so that older metadata is recognised after restarts."""

    def __init__(self, bus: Bus, settings: Settings, name: str) -> None:
        self._bus = bus
        self._root = settings.pinned_root
        self._folder = settings.state(name) / "tuf"
        self._turn = asyncio.Lock()
        self._trust: Trust | None = None
        self._at = float("-inf")
        self._loop = asyncio.get_running_loop()
        self.repository = TrustedRepository(self._folder, self._fetch)

    async def current(self) -> Trust:
        """The trust document as last verified. Raises Refused(TUF_*) where none could ever be."""
        if self._trust is None:
            await self.refresh()
        assert self._trust is not None
        return self._trust

    async def refresh(self) -> None:
        """Fetch and verify it now. Raises Refused(TUF_*); what was trusted before then stays."""
        async with self._turn:
            self._trust = await asyncio.to_thread(self._load)
            self._at = time.monotonic()

    async def look_again(self) -> bool:
        """Refresh, because something was not known, unless that was done just now; whether there may be news."""
        if time.monotonic() - self._at < LOOK_AGAIN_S:
            return False
        before = self._trust
        try:
            await self.refresh()
        except Refused as refused:
            log.warning("the trust document was not refreshed: %s", refused)
        return self._trust is not before

    async def wait(self) -> None:
        """Until there is a trust document, saying why there is none."""
        said = ""
        while True:
            try:
                await self.current()
                return
            except Refused as refused:
                if str(refused) != said:
                    said = str(refused)
                    log.warning("no trust yet: %s", refused)
                await asyncio.sleep(0.2)

    async def run(self) -> None:
        """Refresh every REFRESH_S seconds, for ever."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.look_again()

    def _load(self) -> Trust:
        """Runs in a thread, as the TUF client is synchronous."""
        TrustedRepository.pin(self._folder, _read_root(self._root))
        try:
            self.repository.refresh()
            return self.repository.trust_document(self._read_blob)
        except (Unavailable, wire.ApiError, TimeoutError) as error:
            raise Refused(
                Code.TUF_UNREACHABLE, f"the bus does not bring the trust document: {error}"
            ) from None

    def _fetch(self, filename: str) -> bytes | None:
        found = asyncio.run_coroutine_threadsafe(
            self._bus.last(subjects.STREAM_TUF, subjects.tuf(filename)), self._loop
        ).result(FETCH_S)
        return found.data if found else None

    def _read_blob(self, sha256: str, size: int) -> bytes:
        return asyncio.run_coroutine_threadsafe(
            blobs.read(self._blob_message, sha256, size=size), self._loop
        ).result(FETCH_S)

    async def _blob_message(self, subject: str) -> tuple[bytes, dict[str, str]] | None:
        found = await self._bus.last(subjects.STREAM_BLOBS, subject)
        return (found.data, found.headers) if found else None


def _read_root(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Refused(
            Code.TUF_INVALID, f"there is no pinned root {path}", "run 'loopback up' first, or give --root"
        ) from None
