"""Closing a connection of the NATS client library for good, in bounded time, also in the middle of its reconnecting.

Python 3.11's asyncio.wait_for forgets a cancellation that meets the answer it waits for. The library cancels its reconnection
once and through such a wait: it then goes on reconnecting with a client that is closed, whose close() waits on a socket that
the reconnection has replaced. So the reconnection is ended first, as often as it takes, and close() is not waited for longer
than the caller can.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import nats.errors
from nats.aio.client import Client

AGAIN_S: Final = (
    0.1  # a cancellation that was heeded ends the task within a turn of the loop; after this it is repeated
)
REPEATS: Final = 5  # close() swallows one; the library has no third wait that could
WHOLE_S: Final = 3.0  # for all of it: a close takes milliseconds, or for ever after a failed TLS handshake


async def disconnect(nc: Client, within_s: float = WHOLE_S) -> bool:
    """Close it; whether that was done whole within so many seconds. Nothing reconnects afterwards in either case.

    To be called from outside the client's own callbacks. Safe to repeat.
    """
    deadline = asyncio.get_running_loop().time() + within_s
    whole = await ended(nc._reconnection_task, deadline)
    closing = asyncio.create_task(_close(nc))
    try:
        await asyncio.wait({closing}, timeout=max(deadline - asyncio.get_running_loop().time(), AGAIN_S))
    finally:
        whole = whole and closing.done()
        # Apart from this task, whose cancellation close() would swallow; more than once for the same reason.
        await ended(closing, asyncio.get_running_loop().time() + AGAIN_S * REPEATS)
    return whole


async def ended(task: asyncio.Task[None] | None, deadline: float) -> bool:
    """Cancel it until it is done, which may take more than once; whether it is, by then (in the loop's time)."""
    if task is None or task is asyncio.current_task():
        return True
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=AGAIN_S)
        if asyncio.get_running_loop().time() > deadline:
            break
    return task.done()


async def _close(nc: Client) -> None:
    # AssertionError: the client's way of saying that it did not even begin to connect.
    with contextlib.suppress(nats.errors.Error, OSError, AssertionError, TimeoutError):
        await nc.close()
