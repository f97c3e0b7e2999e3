"""Connecting a NATS client so that a person is told why it does not come about, and soon."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client

from loopback.trust.disconnect import WHOLE_S, disconnect, ended


async def connect(
    client: Client,
    url: str,
    options: dict[str, Any],
    *,
    seconds: float,
    said: list[str],
    hopeless: Callable[[], bool] = lambda: False,
) -> None:
    """Connect it. Then and later, `said` gathers what went wrong, the last one last.

    Raises what the client library raises, and TimeoutError after `seconds`, or before where another attempt would lead to
    nothing else: where the server's certificate does not hold, after which the library waits for ever, and where `hopeless`,
    which is asked after each failure, says so. The client is closed then.
    """
    over = asyncio.Event()

    async def note(error: Exception) -> None:
        said.append(str(error) or type(error).__name__)
        if isinstance(error, ssl.SSLError) or hopeless():
            over.set()

    connecting = asyncio.create_task(client.connect(url.split(","), **options, error_cb=note))
    ending = asyncio.create_task(over.wait())
    try:
        await asyncio.wait({connecting, ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ending.cancel()
        if not connecting.done():
            await ended(connecting, asyncio.get_running_loop().time() + WHOLE_S)
            await disconnect(client)  # its socket would stay
    if not connecting.done() or connecting.cancelled():
        raise TimeoutError
    if connecting.exception() is not None:
        await disconnect(client)
    connecting.result()
