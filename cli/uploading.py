"""Content on its way to the bus: chunk by chunk, a few under way, going on where an earlier attempt ended."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import nats.js.errors
import typer
from nats.js.client import JetStreamContext

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.together import together
from loopback.trust import blobs

IN_FLIGHT: Final = 8  # chunks
SHOWN_FROM: Final = 4 * 1024 * 1024  # bytes; below, it is over before anybody could read about it


async def store(js: JetStreamContext, data: bytes, progress: Callable[[int], None] = lambda _: None) -> str:
    """Store content under its SHA-256, which is returned. What is there already is compared instead of sent again.

    `progress` is told of each chunk that is there: its size in bytes. Raises Refused(BLOB_DIGEST) where something else is
    stored under this digest: what is stored first stays.
    """
    digest = hashlib.sha256(data).hexdigest()
    chunks = list(blobs.split(data))
    headers = blobs.headers(len(data))
    info = await js.stream_info(subjects.STREAM_BLOBS, subjects_filter=subjects.blob_chunks(digest))
    known = info.state.subjects or {}
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def put(number: int, chunk: bytes) -> None:
        subject = subjects.blob(digest, number)
        async with gate:
            if subject in known or not await _sent(js, subject, chunk, headers):
                await _compare(js, subject, chunk, headers)
        progress(len(chunk))

    await together(put(number, chunk) for number, chunk in enumerate(chunks))
    return digest


async def _sent(js: JetStreamContext, subject: str, chunk: bytes, headers: dict[str, str]) -> bool:
    """Store one chunk; whether it was this call that did."""
    try:
        await js.publish(subject, chunk, headers=headers)
    except nats.js.errors.APIError as error:
        if "maximum messages per subject" not in (error.description or ""):
            raise
        return False
    return True


async def _compare(js: JetStreamContext, subject: str, chunk: bytes, headers: dict[str, str]) -> None:
    found = await js.get_last_msg(subjects.STREAM_BLOBS, subject)
    if (found.data or b"") != chunk or headers.items() - (found.headers or {}).items():
        raise Refused(
            Code.BLOB_DIGEST,
            f"what is stored on {subject} is something else, and hosts would refuse it",
            "find out who stored it, have that content purged from LB_BLOB by the bus's admin, then repeat",
        )


@contextmanager
def shown(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how far an upload of `size` bytes is: a bar on a terminal, one line elsewhere, nothing if it is small."""
    if size < SHOWN_FROM:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield lambda _: None
        typer.echo(f"stored {what}: {size:,} bytes", err=True)
        return
    # Every command imports this module, and few show anything.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("storing {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=size)
        yield lambda done: bar.advance(task, done)
