"""Clears content that nobody names from LB_BLOB: uploads that were given up, policies of starts that were refused.

Once a day. Something is cleared only if it has been stored for KEPT, which is many times as long as a command is valid, and
neither the catalog, nor any targets file that is stored, nor any rollout of any workspace names it, nor the policy of one. So
what a host may ever ask for again stays, and so does what an auditor reads. Where one of these cannot be read, nothing is
cleared.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final

import msgspec
from opentelemetry import metrics
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # tuf says no __all__

from loopback.contracts import envelope, journal, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import decode_policy
from loopback.services._runtime import flow, streams
from loopback.services._runtime.bus import Bus, Conflict, Forbidden, Stored, Unavailable
from loopback.services._runtime.wire import ApiError
from loopback.services.delivery.store import Store
from loopback.trust import blobs, signing

KEPT: Final = timedelta(days=7)
EVERY_S: Final = 24 * 3600.0
_EVERY_CREATED: Final = "lb.ws.*.rollout.*.created"


def old_enough(unnamed: Mapping[str, datetime | None], now: datetime) -> list[str]:
    """Which of the contents that nobody names, by digest with the time of a chunk (None: gone), are to be cleared. Pure."""
    return sorted(digest for digest, at in unnamed.items() if at is not None and now - at > KEPT)


class Sweeper:
    """Looks once a day. What it learnt of rollouts it remembers: they are never taken back."""

    def __init__(self, bus: Bus, store: Store, meter: metrics.Meter, log: logging.Logger) -> None:
        self._bus = bus
        self._store = store
        self._log = log
        self._contents: dict[
            str, str
        ] = {}  # of policies that rollouts name: digest → digest of the content, or ""
        self._cleared = meter.create_counter(
            "loopback_delivery_blobs_cleared", description="Contents that nobody named and that were cleared"
        )

    async def run(self, every_s: float = EVERY_S) -> None:
        """Look for ever. Replicas begin at different times of the day, and bear that another was faster."""
        while True:
            await asyncio.sleep(every_s * random.uniform(0.5, 1.5))  # noqa: S311  jitter, not a secret
            await self.look()

    async def look(self) -> int:
        """Look once; how many contents were cleared. What goes wrong is logged, and tried again the next day."""
        try:
            return await self._look()
        except (Unavailable, ApiError, Conflict, Forbidden, OSError) as error:
            self._log.warning("content that nobody names was not cleared: %s", error)
        except Refused as refused:
            self._log.error("content that nobody names was not cleared: %s", refused)
        return 0

    async def _look(self) -> int:
        stored = await self._stored()
        suspects = stored.keys() - await self._published()
        if suspects:
            suspects -= await self._rolled_out()
        ages = {digest: await self._age(stored[digest]) for digest in suspects}
        cleared = old_enough(ages, await self._bus.now())
        for digest in cleared:
            filters = {"filter": subjects.blob_chunks(digest)}
            await self._bus.api(f"STREAM.PURGE.{subjects.STREAM_BLOBS}", filters)
            self._log.info("cleared content %s, which nobody has named for %d days", digest, KEPT.days)
        self._cleared.add(len(cleared))
        return len(cleared)

    async def _stored(self) -> dict[str, str]:
        """Every content by digest, with the subject of one of its chunks."""
        found: dict[str, str] = {}
        for subject in await self._subjects(subjects.STREAM_BLOBS, subjects.blob_chunks(subjects.EVERY)):
            found.setdefault(subject.split(".")[2], subject)
        return found

    async def _subjects(self, stream: str, filters: str) -> list[str]:
        found: list[str] = []
        while True:
            info = await self._bus.api(
                f"STREAM.INFO.{stream}", {"subjects_filter": filters, "offset": len(found)}
            )
            page = info["state"].get("subjects") or {}
            found += page
            if not page or len(found) >= int(info.get("total", 0)):
                return found

    async def _age(self, subject: str) -> datetime | None:
        found = await self._bus.last(subjects.STREAM_BLOBS, subject)
        return found.time if found is not None else None

    async def _published(self) -> set[str]:
        """Packages of the catalog, and every target of every targets file, also of earlier ones."""
        catalog = await self._subjects(
            subjects.STREAM_CATALOG, subjects.catalog(subjects.EVERY, subjects.EVERY)
        )
        found = {subject.rpartition(".")[2] for subject in catalog}
        for file in await self._bus.read(subjects.STREAM_TUF, [subjects.tuf_files()]):
            name = subjects.tuf_name(file.subject) or ""
            role = name.split(".")[-2] if name.count(".") >= 2 else ""
            if role == "targets" or role.startswith("module-"):
                found |= _targets(name, file.data)
        return found

    async def _rolled_out(self) -> set[str]:
        """Policies that any rollout names, and their contents."""
        policies: set[str] = set()

        def on(stored: Stored) -> None:
            policies.update(_policy(stored))

        for name in await streams.names(self._bus, _EVERY_CREATED):
            await flow.follow(self._bus, name, [_EVERY_CREATED], on, forever=False)
        for digest in policies - self._contents.keys():
            if (content := await self._content(digest)) is not None:
                self._contents[digest] = content
        return policies | set(self._contents.values())

    async def _content(self, policy: str) -> str | None:
        """The digest of a policy's content; "" where it is inside, None where the policy is not there, or is none."""
        try:
            data = await blobs.read(self._store.blob_message, policy, max_size=envelope.MAX_ENVELOPE)
            blob = decode_policy(envelope.payload_of(envelope.parse(data))).blob
        except (msgspec.MsgspecError, RecursionError, Refused):
            return None  # hosts do not come to its content either
        return blob.sha256 if blob is not None else ""


def _targets(name: str, data: bytes) -> set[str]:
    try:
        targets = signing.parse(Targets, data).targets.values()
    except (RepositoryError, ValueError) as error:
        raise Refused(
            Code.TUF_INVALID,
            f"{name} on the bus does not read: {error}",
            "somebody else wrote it: read docs/keys.md, 'stolen online keys'",
        ) from None
    return {digest for target in targets if (digest := target.hashes.get("sha256"))}


def _policy(stored: Stored) -> Iterable[str]:
    """What a link `created` names; one that does not decode was obeyed by nobody."""
    try:
        created = journal.decode(stored.data).event
    except (msgspec.MsgspecError, RecursionError):
        return ()
    return (created.policy,) if isinstance(created, journal.Created) and created.policy else ()
