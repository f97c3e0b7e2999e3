"""What delivery does unasked: renew snapshot and timestamp, take in changes that come by hand, warn before expiry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

from opentelemetry import metrics

from loopback.contracts.codes import Code, Refused
from loopback.services._runtime.bus import Conflict, Unavailable
from loopback.services._runtime.wire import ApiError
from loopback.services.delivery.decide import Expiry
from loopback.services.delivery.store import Store

EVERY_S: Final = 60.0  # between looks; a timestamp lives a day and is renewed after half of it
AGAIN_S: Final = (
    6 * 3600.0
)  # between two warnings of one role: four a day are read, sixty an hour are filtered away
METRIC: Final = "loopback_delivery_metadata_expires_seconds"

_EXPECTED: Final = frozenset(
    {
        Code.TUF_INVALID,
        Code.TUF_UNREACHABLE,
        Code.TUF_EXPIRED,
        Code.TUF_CONFLICT,
        Code.BLOB_MISSING,
        Code.BLOB_DIGEST,
    }
)


class Keeper:
    """Looks at the repository from time to time. `inbox` is the folder in which people put changes."""

    def __init__(
        self,
        store: Store,
        inbox: Path,
        meter: metrics.Meter,
        log: logging.Logger,
        *,
        published: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`published` is called once changes from the inbox were published."""
        self._store = store
        self._inbox = inbox
        self._log = log
        self._published = published
        self._clock = clock
        self._expiries: tuple[float, list[Expiry]] = (clock(), [])
        self._warned: dict[str, float] = {}
        meter.create_observable_gauge(
            METRIC,
            callbacks=[self._observe],
            unit="s",
            description="How long the published metadata of each role still counts; negative once it has expired",
        )

    async def run(self, every_s: float = EVERY_S) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def look(self) -> None:
        """Look once. What goes wrong is logged and tried again: the shortest life leaves many attempts."""
        for step in (self._take_in, self._renew, self._warn):
            try:
                await step()
            except (Unavailable, ApiError, Conflict, OSError) as error:
                self._log.warning("the repository was not looked after, and will be again: %s", error)
            except Refused as refused:
                if refused.code not in _EXPECTED:
                    raise
                self._log.error("the repository was not looked after: %s", refused)

    async def _take_in(self) -> None:
        found = await self._store.import_changes(self._inbox)
        for said in found:
            self._log.warning("from %s: %s", self._inbox, said)
        if found and self._published is not None:
            await self._published()

    async def _renew(self) -> None:
        if await self._store.renew():
            self._log.info("renewed the repository's timestamp")

    async def _warn(self) -> None:
        now = self._clock()
        found = await self._store.expiries()
        self._expiries = (now, found)
        for expiry in found:
            if not expiry.due:
                self._warned.pop(expiry.role, None)
            elif expiry.role not in self._warned or now - self._warned[expiry.role] >= AGAIN_S:
                self._warned[expiry.role] = now
                self._log.warning("%s", words(expiry))

    def _observe(self, _: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        at, found = self._expiries
        passed = self._clock() - at
        return [metrics.Observation(e.remaining.total_seconds() - passed, {"role": e.role}) for e in found]


def words(expiry: Expiry) -> str:
    """What a person should know and do about it."""
    hours = expiry.remaining.total_seconds() / 3600
    left = f"expires in {hours / 24:.0f} days" if hours >= 48 else f"expires in {hours:.1f} hours"
    if hours <= 0:
        left = "has expired: hosts install nothing new"
    if expiry.role in ("snapshot", "timestamp"):
        return f"{expiry.role} {left}; delivery should have renewed it: look at its earlier messages"
    return f"{expiry.role} {left}; sign it anew: 'loopback keys renew {expiry.role}'"
