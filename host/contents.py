"""Content that a signed document names by its digest and size: fetched in chunks, kept once however many name it.

A policy that is too large for its envelope names its content so. The size is part of what was signed: not a byte more is
asked for, and a download that was cut off goes on where it ended, also after a restart of the agent.
"""

from __future__ import annotations

import asyncio
import hashlib

from loopback.contracts.messages import Blob
from loopback.host.state import Store
from loopback.trust import blobs


async def fetch(get: blobs.Get, store: Store, blob: Blob) -> None:
    """Have this content on disk; what is there already, and is what its digest says, is not fetched again.

    Raises Refused(BLOB_*), OSError from the disk.
    """
    if await asyncio.to_thread(read, store, blob) is None:
        await blobs.download(
            get, blob.sha256, max_size=blob.size, size=blob.size, into=store.content_path(blob.sha256)
        )


def read(store: Store, blob: Blob) -> bytes | None:
    """The content, compared with its digest as it is read; None where it is not here, or damaged. Blocking."""
    data = store.disk.read(store.content_path(blob.sha256))
    if data is None or len(data) != blob.size or hashlib.sha256(data).hexdigest() != blob.sha256:
        return None
    return data
