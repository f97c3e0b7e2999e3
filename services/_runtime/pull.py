"""One pull consumer's messages, as a queue that also tells when its requests were lost."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

EXPIRES_S: Final = 15.0
HEARTBEAT_S: Final = 2.0
SILENCE_S: Final = 3 * HEARTBEAT_S  # this long without a heartbeat: the broker has forgotten the request

_HEARTBEAT: Final = "100"
_REQUEST_ENDED: Final = ("404", "408")


class Lost(Exception):
    """The consumer is gone, or the connection was: what was asked for will not come."""


class Pull:
    """Asks for messages and hands them out one by one. `outstanding` is how many were asked for and have not come."""

    def __init__(self, client: Client, stream: str, consumer: str) -> None:
        self._client = client
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._inbox = ""
        self.outstanding = 0

    async def open(self) -> None:
        """Subscribe to an inbox of its own."""
        self._inbox = self._client.new_inbox()
        self._subscription = await self._client.subscribe(self._inbox, cb=self._queue.put)

    async def close(self) -> None:
        """Give the inbox back; what the broker still sends there is delivered again later."""
        if self._subscription is not None and not self._client.is_closed:
            await self._subscription.unsubscribe()
        self._subscription = None

    def interrupt(self) -> None:
        """The connection was renewed: requests sent over the old one are void."""
        self._queue.put_nowait(None)

    async def ask(self, count: int) -> None:
        """Ask for `count` more messages."""
        request = {
            "batch": count,
            "expires": int(EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
        }
        self.outstanding += count
        await self._client.publish(self._next, json.dumps(request).encode(), reply=self._inbox)

    @property
    def waiting(self) -> bool:
        """Whether something is already here to be taken."""
        return not self._queue.empty()

    async def take(self) -> Msg | None:
        """The next message, or None where a request ended and more may be asked for. Raises Lost."""
        try:
            async with asyncio.timeout(SILENCE_S):
                message = await self._queue.get()
        except TimeoutError:
            raise Lost("the broker fell silent") from None
        if message is None:
            raise Lost("the connection was renewed")
        if message.reply.startswith("$JS.ACK."):
            self.outstanding = max(0, self.outstanding - 1)
            return message
        headers = message.headers or {}
        status = headers.get("Status", "")
        if status == _HEARTBEAT:
            return None
        if status in _REQUEST_ENDED:
            left = int(headers.get("Nats-Pending-Messages", self.outstanding))
            self.outstanding = max(0, self.outstanding - left)
            return None
        raise Lost(f"the consumer answered {status} {headers.get('Description', '')}".strip())
