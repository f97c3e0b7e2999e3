"""What the host says: signed reports on its own subjects, in order, at most a bounded number waiting.

A report that the broker did not take waits; the oldest of too many gives way, since every status says everything. One that
nobody would ever take is dropped at once, counted and logged: it must not stand in the way of the others.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from loopback.contracts import envelope, events
from loopback.contracts.codes import Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import MAX_BYTES, Heartbeat, Inventory, Status
from loopback.host.link import Link
from loopback.host.state import SEQUENCE_BLOCK

MAX_WAITING: Final = 64
RETRY_S: Final = 1.0
PROTOBUF: Final = "application/x-protobuf"

log = logging.getLogger("loopback.host")


class Reporter:
    """Signs and sends. `reserve(upto)` writes down that report numbers up to there may be used."""

    def __init__(
        self, link: Link, key: SigningKey, host: str, workspace: str, incarnation: str, used: int,
        reserve: Callable[[int], None], clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self.host, self.workspace, self.incarnation = host, workspace, incarnation
        self.dropped = 0
        self._link = link
        self._key = key
        self._clock = clock
        self._reserve = reserve
        self._seq = self._reserved = used
        self._waiting: deque[tuple[str, bytes, dict[str, str]]] = deque()
        self._wake = asyncio.Event()

    def begin(self, workspace: str, incarnation: str) -> None:
        """Speak as another incarnation, elsewhere; what waits was said by the one before and is dropped."""
        if (workspace, incarnation) != (self.workspace, self.incarnation):
            self.workspace, self.incarnation = workspace, incarnation
            self._waiting.clear()

    def fields(self) -> dict[str, object]:
        """What every report has, with the next number."""
        self._seq += 1
        if self._seq > self._reserved:
            self._reserved = self._seq + SEQUENCE_BLOCK
            self._reserve(self._reserved)
        return {
            "host": self.host, "workspace": self.workspace, "incarnation": self.incarnation,
            "seq": self._seq, "at": self._clock(),
        }  # fmt: skip

    def send(self, report: Status | Inventory, traceparent: str = "") -> None:
        """Have it sent, and sent again until the broker has it."""
        what = "status" if isinstance(report, Status) else "inventory"
        payload = msgspec.json.encode(report)
        if len(payload) > MAX_BYTES[what]:
            self._drop(what, f"its {len(payload)} bytes are more than the {MAX_BYTES[what]} allowed")
            return
        self._enqueue(what, *self._sealed(payload, what, traceparent))

    async def heartbeat(self, report: Heartbeat) -> bool:
        """Send now or never; whether it could be sent."""
        return await self._link.publish(
            "heartbeat", *self._sealed(msgspec.json.encode(report), "heartbeat", ""), acknowledged=False
        )

    def otlp(self, payload_type: str, payload: bytes) -> None:
        """Have an OTLP request sent, signed like every word of this host."""
        data = envelope.seal_bytes(payload_type, payload, self._key)
        if len(data) > envelope.MAX_ENVELOPE:
            self._drop("otlp", f"its {len(data)} bytes are more than the {envelope.MAX_ENVELOPE} allowed")
            return
        self._enqueue("otlp", data, self._headers("otlp", "", PROTOBUF))

    async def run(self) -> None:
        """Send what waits, in order; runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                what, data, headers = self._waiting[0]
                try:
                    taken = await self._link.publish(what, data, headers, acknowledged=True)
                except Refused as refused:
                    self._drop(what, refused.reason)
                    self._drop_first(data)
                    continue
                if not taken:
                    if what == "otlp":
                        self._drop_first(data)
                        continue
                    await asyncio.sleep(RETRY_S)
                    continue
                self._drop_first(data)

    async def flush(self, seconds: float) -> None:
        """Give what waits a last chance, for at most so many seconds; nothing may be running `run` any more."""
        try:
            async with asyncio.timeout(seconds):
                while self._waiting:
                    what, data, headers = self._waiting.popleft()
                    try:
                        await self._link.publish(what, data, headers, acknowledged=True)
                    except Refused as refused:
                        self._drop(what, refused.reason)
        except TimeoutError:
            log.info("%d reports were not sent before the end", len(self._waiting) + 1)

    def _drop(self, what: str, why: str) -> None:
        self.dropped += 1
        log.error("a report (%s) can never be sent and is dropped: %s", what, why)

    def _drop_first(self, data: bytes) -> None:
        # While it was being sent, it may have given way to newer ones already.
        if self._waiting and self._waiting[0][1] is data:
            self._waiting.popleft()

    def _enqueue(self, what: str, data: bytes, headers: dict[str, str]) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append((what, data, headers))
        self._wake.set()

    def _sealed(self, payload: bytes, what: str, traceparent: str) -> tuple[bytes, dict[str, str]]:
        data = envelope.seal_bytes(envelope.REPORT, payload, self._key)
        return data, self._headers(what, traceparent, events.JSON)

    def _headers(self, what: str, traceparent: str, content_type: str) -> dict[str, str]:
        return events.headers(
            event_id=uuid.uuid4().hex,
            source=f"host/{self.workspace}/{self.host}",
            event_type=f"host.{what}",
            subject=self.host,
            at=self._clock(),
            traceparent=traceparent,
            content_type=content_type,
        )
