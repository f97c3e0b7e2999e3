"""The bus as services use it: store, decide atomically, fold, and share work, through any loss of connection or leader.

Imports only contracts, NATS and OpenTelemetry; knows no business rule. All of it is safe to repeat: every message has an id,
by which the broker drops a second copy, and a publish whose answer was lost is looked for before it counts as refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.client import JetStreamContext
from opentelemetry import metrics, propagate

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.services._runtime import flow, wire
from loopback.services._runtime.pull import Pull
from loopback.services._runtime.settings import Settings, read_identity
from loopback.services._runtime.wire import (
    ApiError,
    Conflict,
    Forbidden,
    Outgoing,
    Stored,
    StreamReplaced,
    TooLarge,
    Unavailable,
)
from loopback.trust import tls
from loopback.trust.disconnect import disconnect

__all__ = [
    "Bus",
    "Conflict",
    "Forbidden",
    "Outgoing",
    "Stored",
    "StreamReplaced",
    "TooLarge",
    "Unavailable",
]

RETRY_S: Final = 30.0  # leaders came back after 4–15 s when measured; twice the worst
ATTEMPT_S: Final = 3.0
CONNECT_S: Final = 20.0
ORDER_S: Final = 5.0  # of which this long with one order of the servers
RECONNECT_WAIT_S: Final = 0.25
CLOCK_S: Final = 10.0  # how long one reading of the broker's clock is carried on with the monotonic one

log = logging.getLogger(__name__)


class Bus:
    """A connection with one identity. Close it, or use it as an async context manager."""

    def __init__(self, client: Client, name: str, meter: metrics.Meter | None = None) -> None:
        self.nc = client
        self.js: JetStreamContext = client.jetstream(timeout=10)
        self.name = name
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        meter = meter or metrics.get_meter("loopback.bus")
        self.consumed = meter.create_counter("loopback_consumed", description="Messages handled, by outcome")
        self.retried = meter.create_counter("loopback_publish_retries", description="Publishes sent again")
        self._pulls: set[Pull] = set()
        self._denied: set[str] = set()
        self._closing = False
        self._clock: tuple[float, datetime] | None = None
        self._latest = datetime.min.replace(tzinfo=UTC)

    @classmethod
    async def connect(cls, settings: Settings, *, meter: metrics.Meter | None = None) -> Self:
        """Connect with the credentials in `settings`, waiting for the broker up to CONNECT_S seconds.

        Raises Refused where the credentials do not read or the broker is too old, nats.errors.Error where none answers.
        """
        servers = settings.url.split(",")
        random.shuffle(servers)  # replicas spread over the servers
        deadline = time.monotonic() + CONNECT_S
        while True:
            bus = cls._unconnected(settings, meter)
            try:
                async with asyncio.timeout(min(ORDER_S, max(deadline - time.monotonic(), 0.1))):
                    await bus.nc.connect(servers=servers, **bus._options(settings))
                return bus
            except TimeoutError:
                # After a failed TLS handshake the client library waits for ever, and asks no other server.
                await bus.close()
                servers.append(servers.pop(0))
                if time.monotonic() >= deadline:
                    raise nats.errors.NoServersError from None

    @classmethod
    def _unconnected(cls, settings: Settings, meter: metrics.Meter | None) -> Self:
        return cls(Client(), read_identity(settings.creds).name, meter)

    def _options(self, settings: Settings) -> dict[str, Any]:
        return {
            "user_credentials": str(settings.creds),
            "name": f"loopback-{self.name}-{settings.instance}",
            "inbox_prefix": subjects.inbox(subjects.untoken(self.name)),
            "dont_randomize": True,
            "connect_timeout": 3,
            "reconnect_time_wait": RECONNECT_WAIT_S,
            "max_reconnect_attempts": -1,
            "ping_interval": 10,
            "error_cb": self._on_error,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
            "pending_size": 8 * 1024 * 1024,
            **tls.options(settings.url, settings.authority),
        }

    async def close(self) -> None:
        """Send what is buffered and disconnect."""
        self._closing = True
        if not self.nc.is_closed:
            if self.nc.is_connected:
                try:
                    await self.nc.flush(timeout=2)
                except (nats.errors.Error, TimeoutError) as error:
                    log.warning("closing without a last flush: %s", error)
            if not await disconnect(self.nc):
                log.warning("the connection is left half closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Storing

    async def publish(self, out: Outgoing) -> int:
        """Store one message and return its sequence. Retried for RETRY_S seconds without ever storing it twice.

        A message whose `Nats-Msg-Id` the stream has seen within its duplicate window counts as stored. Raises Conflict
        where `expected_subject_seq` does not hold or the stream keeps one message per subject and has one;
        Unavailable, Forbidden, ApiError.
        """
        return await self._publish(out, None)

    async def batch(self, outs: Sequence[Outgoing], *, expected_last: int | None = None) -> int:
        """Store up to 1000 messages of one stream, all or none; return the last one's sequence.

        With `expected_last`, only if that is still the stream's last sequence. Raises Conflict, Unavailable, Forbidden,
        ApiError; ValueError where it is empty, too long, or names a message id twice.
        """
        if not 1 <= len(outs) <= wire.MAX_BATCH:
            raise ValueError(f"a batch has 1 to {wire.MAX_BATCH} messages, not {len(outs)}")
        ids = Counter(found for out in outs if (found := out.headers.get("Nats-Msg-Id")))
        if repeated := [found for found, count in ids.items() if count > 1]:
            raise ValueError(f"the message id {repeated[0]!r} appears twice in one batch")
        if len(outs) == 1:
            return await self._publish(outs[0], expected_last)
        base = uuid.uuid4().hex
        prepared = [
            (out, self._headers(out, None, base if number == 0 else "")) for number, out in enumerate(outs)
        ]
        if expected_last is not None:
            prepared[0][1]["Nats-Expected-Last-Sequence"] = str(expected_last)
        uncertain = False
        number = 0
        async for _ in self._attempts(f"batch of {len(outs)} from {outs[0].subject}", outs[0].subject):
            number += 1
            try:
                return await self._send_batch(prepared, f"{base}-{number}")
            except nats.errors.NoRespondersError:
                continue
            except nats.errors.MaxPayloadError:
                raise TooLarge(f"a message of the batch from {outs[0].subject} is too large") from None
            except (nats.errors.Error, TimeoutError) as error:
                log.info("batch %s: %s; trying again", base, error or type(error).__name__)
                uncertain = True
            except ApiError as error:
                if error.status != 503 and error.code != wire.BATCH_INCOMPLETE:
                    raise
            except Conflict as conflict:
                if uncertain:
                    start = (expected_last or 0) + 1
                    first = await self._find(
                        conflict.args[1], outs[0].subject, start, "Nats-Batch-Id", f"{base}-"
                    )
                    if first is not None:
                        return first + len(outs) - 1
                raise
        raise Unavailable(f"the batch from {outs[0].subject} was not confirmed in {RETRY_S:.0f} s")

    async def _send_batch(self, prepared: list[tuple[Outgoing, dict[str, str]]], batch: str) -> int:
        for number, (out, given) in enumerate(prepared, 1):
            headers = {**given, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            if number == len(prepared):
                headers["Nats-Batch-Commit"] = "1"
                answer = await self._request(out.subject, out.data, headers)
                return wire.read_ack(answer.data).seq
            if number == 1:
                # Asked, because the answer to the commit would not tell why the first was refused.
                answer = await self._request(out.subject, out.data, headers)
                if answer.data:
                    wire.read_ack(answer.data)
            else:
                await self.nc.publish(out.subject, out.data, headers=headers)
        raise AssertionError("a batch always ends with its commit")

    async def _publish(self, out: Outgoing, expected_last: int | None) -> int:
        headers = self._headers(out, expected_last, uuid.uuid4().hex)
        uncertain = False
        async for _ in self._attempts(f"publish to {out.subject}", out.subject):
            try:
                answer = await self._request(out.subject, out.data, headers)
                return wire.read_ack(answer.data).seq
            except nats.errors.NoRespondersError:
                continue
            except nats.errors.MaxPayloadError:
                raise TooLarge(f"{len(out.data)} bytes are too many for {out.subject}") from None
            except (nats.errors.Error, TimeoutError) as error:
                log.info("publish to %s: %s; trying again", out.subject, error or type(error).__name__)
                uncertain = True
            except ApiError as error:
                if error.status != 503:
                    raise
            except Conflict as conflict:
                # The broker compares before it looks for duplicates, so an answer lost on the way looks like a conflict.
                if uncertain:
                    start = max(out.expected_subject_seq or 0, expected_last or 0) + 1
                    mine = headers["Nats-Msg-Id"]
                    found = await self._find(conflict.args[1], out.subject, start, "Nats-Msg-Id", mine)
                    if found is not None:
                        return found
                raise
        raise Unavailable(f"{out.subject} was not confirmed in {RETRY_S:.0f} s")

    async def _request(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> Msg:
        """One request. Being cancelled just as the answer comes is being cancelled.

        The client library waits with asyncio.wait_for, which in Python 3.11 returns the answer then and forgets the
        cancellation; a service that was told to stop went on for ever.
        """
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        answer = await self.nc.request(subject, data, timeout=ATTEMPT_S, headers=headers)
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
        return answer

    def _headers(self, out: Outgoing, expected_last: int | None, message_id: str) -> dict[str, str]:
        headers = dict(out.headers)
        if "traceparent" not in headers:
            propagate.inject(headers)
        if message_id:
            headers.setdefault("Nats-Msg-Id", message_id)
        if out.expected_subject_seq is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(out.expected_subject_seq)
        if expected_last is not None:
            headers["Nats-Expected-Last-Sequence"] = str(expected_last)
        return headers

    async def _find(self, stream: str, subject: str, start: int, header: str, prefix: str) -> int | None:
        """The sequence of the first message of `subject` from `start` whose header begins like this."""
        while True:
            try:
                found = await self.api(f"STREAM.MSG.GET.{stream}", {"seq": start, "next_by_subj": subject})
            except ApiError as error:
                if error.code == wire.NO_MESSAGE:
                    return None
                raise
            stored = wire.from_store(stream, found["message"])
            if stored.headers.get(header, "").startswith(prefix):
                return stored.sequence
            start = stored.sequence + 1

    async def _attempts(self, what: str, subject: str) -> AsyncIterator[int]:
        """Attempts until RETRY_S have passed, each only while connected. Raises Forbidden after the broker's refusal."""
        deadline = time.monotonic() + RETRY_S
        self._denied.discard(subject.lower())
        for number in range(1_000_000):
            if number:
                if subject.lower() in self._denied:
                    raise Forbidden(f"{self.name} may not {what}")
                self.retried.add(1)
                await asyncio.sleep(min(0.1 * number, 1.0))
            while not self.nc.is_connected:
                if self.nc.is_closed or time.monotonic() > deadline:
                    raise Unavailable(f"no connection to the broker for: {what}")
                await asyncio.sleep(0.05)
            if number and time.monotonic() > deadline:
                return
            yield number

    # Reading

    async def api(self, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request to the JetStream API, retried while nobody answers. Raises ApiError, Unavailable, Forbidden."""
        subject = f"$JS.API.{verb}"
        data = json.dumps(body).encode() if body is not None else b""
        async for _ in self._attempts(f"ask {verb}", subject):
            try:
                answer = await self._request(subject, data)
            except (nats.errors.Error, TimeoutError) as error:
                log.debug("%s: %s; asking again", verb, error or type(error).__name__)
                continue
            found: dict[str, Any] = json.loads(answer.data)
            if (problem := found.get("error")) is None:
                return found
            error_found = wire.api_error(problem)
            if error_found.status != 503:
                raise error_found
        raise Unavailable(f"the broker did not answer {verb} in {RETRY_S:.0f} s")

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The subject's last stored message, from the stream's leader, so that own writes are seen. None: there is none."""
        try:
            found = await self.api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject})
        except ApiError as error:
            if error.code in (wire.NO_MESSAGE, wire.NO_STREAM):
                return None
            raise
        return wire.from_store(stream, found["message"])

    async def read(self, stream: str, filters: Sequence[str]) -> list[Stored]:
        """Everything stored now under `filters`, in order; nothing where there is no such stream."""
        found: list[Stored] = []
        await flow.follow(self, stream, filters, found.append, forever=False)
        return found

    async def revision(self, stream: str) -> int:
        """The stream's last sequence; 0 where it is empty. Raises ApiError where there is none."""
        state = (await self.api(f"STREAM.INFO.{stream}"))["state"]
        return int(state["last_seq"])

    async def now(self) -> datetime:
        """The broker's time, UTC, never going backwards; between two readings carried on with the monotonic clock."""
        if self._clock is None or time.monotonic() - self._clock[0] > CLOCK_S:
            before = time.monotonic()
            answer = await self.api(f"STREAM.INFO.{subjects.STREAM_COMMANDS}")
            middle = (before + time.monotonic()) / 2
            self._clock = (middle, datetime.fromisoformat(answer["ts"]).astimezone(UTC))
        then, at = self._clock
        self._latest = max(self._latest, at + timedelta(seconds=time.monotonic() - then))
        return self._latest

    # Following

    async def fold(
        self,
        stream: str,
        filters: Sequence[str],
        on: Callable[[Stored], None],
        *,
        caught_up: asyncio.Event,
        last_per_subject: bool = False,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Hand every message to `on`, in order, from the start and then as they come; runs until cancelled.

        Resumes after any loss of connection without gap or repeat. `caught_up` is set once everything stored at the start
        was folded; `after` is called whenever what is at hand was folded, and at `caught_up`. A stream that does not
        exist yet is waited for. Raises StreamReplaced where the stream was wiped or restored: fold again from nothing.
        """
        await flow.follow(
            self,
            stream,
            filters,
            on,
            caught_up=caught_up,
            last_per_subject=last_per_subject,
            after=after,
        )

    async def consume(
        self,
        stream: str,
        durable: str,
        filters: Sequence[str],
        handle: Callable[[Stored], Awaitable[None]],
        *,
        parallel: int = 1,
    ) -> None:
        """Handle the messages of a durable consumer that all replicas share; runs until cancelled.

        A message is done when `handle` returns. When it raises, that is logged and counted, and the message comes again,
        later and later, for ever; when this process dies, after seconds. So `handle` must bear repeats. `parallel`
        handlers run at once here; with 1 this replica handles in order. The durable is made where it is missing.
        """
        await flow.consume(self, stream, durable, filters, handle, parallel=parallel)

    def register(self, pull: Pull) -> None:
        """Tell this pull when the connection is renewed."""
        self._pulls.add(pull)

    def unregister(self, pull: Pull) -> None:
        """No more."""
        self._pulls.discard(pull)

    async def _on_reconnected(self) -> None:
        log.info(
            "%s: connected again to %s", self.name, self.nc.connected_url and self.nc.connected_url.netloc
        )
        self._clock = None
        for pull in self._pulls:
            pull.interrupt()

    async def _on_closed(self) -> None:
        if not self._closing and not self.failed.done():
            self.failed.set_result(f"the broker closed the connection of {self.name} for good")

    async def _on_error(self, error: Exception) -> None:
        words = str(error)  # in lower case, as the client library hands it on
        if "permissions violation for publish" in words:
            self._denied.add(words.split('"')[1] if '"' in words else words)
        log.warning("%s: %s", self.name, words or type(error).__name__)


async def require_api_level(bus: Bus) -> None:
    """Raise Refused where the server is older than 2.15: it would silently ignore what atomic decisions need."""
    found = await bus.api("INFO")
    level = int(found.get("api", {}).get("level", 0))
    if level < wire.API_LEVEL:
        raise Refused(
            Code.COMMAND_UNKNOWN,
            f"the NATS server speaks JetStream API level {level}; level {wire.API_LEVEL} is needed",
            "run NATS Server 2.15 or newer",
        )
