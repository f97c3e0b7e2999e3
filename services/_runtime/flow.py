"""Following streams: in order for one reader, or shared between replicas."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import nats.errors
from nats.aio.msg import Msg

from loopback.services._runtime import wire
from loopback.services._runtime.pull import Lost, Pull
from loopback.services._runtime.wire import ApiError, Stored, StreamReplaced

if TYPE_CHECKING:
    from loopback.services._runtime.bus import Bus

FOLD_BATCH: Final = 500
FORGET_S: Final = 60  # the broker drops a fold's consumer after this long without us
ACK_WAIT_S: Final = 5  # a killed replica's message goes to another after this long
PROGRESS_S: Final = 1.5  # how often a handler that takes longer says so
FIRST_DELAY_S: Final = 0.2
LONGEST_DELAY_S: Final = 30.0
DRAIN_S: Final = 3.0
AGAIN_S: Final = 0.2
MISSING_S: Final = 0.5

log = logging.getLogger(__name__)


class _Fold:
    """One reader of one stream: where it is, and what tells that the stream is another one."""

    def __init__(self, bus: Bus, stream: str, filters: Sequence[str], last_per_subject: bool) -> None:
        self.bus = bus
        self.stream = stream
        self.filters = list(filters)
        self.last_per_subject = last_per_subject
        self.position = 0
        self.created = ""
        self.end = 0  # the stream's last sequence when this was last opened

    async def open(self) -> tuple[Pull, int] | None:
        """A consumer behind the position, and how much it has to deliver; None where there is no stream."""
        try:
            info = await self.bus.api(f"STREAM.INFO.{self.stream}")
        except ApiError as error:
            if error.code == wire.NO_STREAM:
                return None
            raise
        self.end = int(info["state"]["last_seq"])
        if self.created and self.created != info["created"]:
            raise StreamReplaced(f"{self.stream} was made anew at {info['created']}")
        if self.end < self.position:
            raise StreamReplaced(f"{self.stream} ends at {self.end}, but {self.position} was folded")
        self.created = info["created"]
        name = f"fold-{self.bus.name}-{uuid.uuid4().hex}"
        config: dict[str, Any] = {
            "name": name,
            "filter_subjects": self.filters,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(FORGET_S * 1e9),
            "deliver_policy": "last_per_subject" if self.last_per_subject else "all",
        }
        if self.position:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": self.position + 1}
        try:
            made = await self.bus.api(
                f"CONSUMER.CREATE.{self.stream}.{name}", {"stream_name": self.stream, "config": config}
            )
        except ApiError as error:
            if error.code == wire.NO_STREAM:
                return None
            raise
        pull = Pull(self.bus.nc, self.stream, name)
        await pull.open()
        return pull, int(made["num_pending"])


async def follow(
    bus: Bus,
    stream: str,
    filters: Sequence[str],
    on: Callable[[Stored], None],
    *,
    caught_up: asyncio.Event | None = None,
    last_per_subject: bool = False,
    after: Callable[[], None] | None = None,
    forever: bool = True,
) -> None:
    """`Bus.fold`, and with `forever=False` `Bus.read`."""
    fold = _Fold(bus, stream, filters, last_per_subject)
    target: int | None = None
    while True:
        opened = await fold.open()
        if opened is None:
            if not forever:
                return
            await asyncio.sleep(MISSING_S)
            continue
        pull, pending = opened
        target = fold.end if target is None else target
        bus.register(pull)
        try:
            if pending == 0:
                if not forever:
                    return
                _reached(caught_up, after)
            expected = 1
            while True:
                if pull.outstanding == 0:
                    await pull.ask(FOLD_BATCH)
                message = await pull.take()
                if message is None:
                    continue
                metadata = message.metadata
                if metadata.sequence.consumer != expected:
                    raise Lost(f"message {metadata.sequence.consumer} came, not {expected}")
                expected += 1
                on(wire.from_delivery(message))
                fold.position = metadata.sequence.stream
                if not forever and (metadata.num_pending == 0 or fold.position >= target):
                    return
                if metadata.num_pending == 0:
                    _reached(caught_up, after)
                elif not pull.waiting and after is not None and caught_up is not None and caught_up.is_set():
                    after()
        except (Lost, nats.errors.Error) as lost:
            if bus.nc.is_closed:
                raise
            log.info("fold of %s resumes behind %d: %s", stream, fold.position, lost)
            await asyncio.sleep(AGAIN_S)
        finally:
            bus.unregister(pull)
            await pull.close()


def _reached(caught_up: asyncio.Event | None, after: Callable[[], None] | None) -> None:
    if caught_up is not None:
        caught_up.set()
    if after is not None:
        after()


async def consume(
    bus: Bus,
    stream: str,
    durable: str,
    filters: Sequence[str],
    handle: Callable[[Stored], Awaitable[None]],
    *,
    parallel: int,
) -> None:
    """`Bus.consume`."""
    busy: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as handlers:
        while True:
            if not await _ensure_durable(bus, stream, durable, filters):
                await asyncio.sleep(MISSING_S)
                continue
            pull = Pull(bus.nc, stream, durable)
            await pull.open()
            bus.register(pull)
            try:
                while True:
                    free = parallel - len(busy) - pull.outstanding
                    if free > 0:
                        await pull.ask(free)
                    if pull.outstanding == 0 and not pull.waiting:
                        await asyncio.wait(busy, return_when=asyncio.FIRST_COMPLETED)
                        continue
                    message = await pull.take()
                    if message is None:
                        continue
                    while len(busy) >= parallel:
                        await asyncio.wait(busy, return_when=asyncio.FIRST_COMPLETED)
                    task = handlers.create_task(_handle(bus, durable, message, handle))
                    busy.add(task)
                    task.add_done_callback(busy.discard)
            except (Lost, nats.errors.Error) as lost:
                if bus.nc.is_closed:
                    raise
                log.info("consumer %s of %s asks anew: %s", durable, stream, lost)
                await asyncio.sleep(AGAIN_S)
            except asyncio.CancelledError:
                if busy:  # let what is under way finish; what does not is given back
                    await asyncio.wait(busy, timeout=DRAIN_S)
                raise
            finally:
                bus.unregister(pull)
                await pull.close()


async def _ensure_durable(bus: Bus, stream: str, durable: str, filters: Sequence[str]) -> bool:
    config = {
        "durable_name": durable,
        "name": durable,
        "filter_subjects": list(filters),
        "ack_policy": "explicit",
        "ack_wait": int(ACK_WAIT_S * 1e9),
        "max_deliver": -1,
        "deliver_policy": "all",
    }
    try:
        await bus.api(f"CONSUMER.CREATE.{stream}.{durable}", {"stream_name": stream, "config": config})
    except ApiError as error:
        if error.code == wire.NO_STREAM:
            return False
        raise
    return True


async def _handle(bus: Bus, durable: str, message: Msg, handle: Callable[[Stored], Awaitable[None]]) -> None:
    """Handle one message to its end, and tell the broker how it went."""
    stored = wire.from_delivery(message)
    failure: list[Exception] = []

    async def attempt() -> None:
        try:
            await handle(stored)
        except Exception as error:  # whatever a handler raises, its message must come again
            failure.append(error)

    try:
        async with asyncio.TaskGroup() as group:
            work = group.create_task(attempt())
            while not (await asyncio.wait({work}, timeout=PROGRESS_S))[0]:
                await _say(bus, message, b"+WPI")
    except asyncio.CancelledError:
        await _say(bus, message, b"-NAK")
        raise
    outcome = type(failure[0]).__name__ if failure else "ok"
    bus.consumed.add(1, {"durable": durable, "outcome": outcome})
    if not failure:
        await _say(bus, message, b"+ACK")
        return
    delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(stored.delivered - 1, 10))
    log.error(
        "%s: handling %s (sequence %d, delivery %d) failed; again in %.1f s",
        durable, stored.subject, stored.sequence, stored.delivered, delay, exc_info=failure[0],
    )  # fmt: skip
    await _say(bus, message, b'-NAK {"delay": %d}' % int(delay * 1e9))


async def _say(bus: Bus, message: Msg, word: bytes) -> None:
    """Acknowledge in some way; where the connection is gone the broker delivers again, which handlers bear."""
    if not bus.nc.is_closed:
        try:
            await bus.nc.publish(message.reply, word)
        except nats.errors.Error as error:
            log.warning("an acknowledgement was not sent: %s", error)
