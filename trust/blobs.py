"""Content addressed by its SHA-256, moved in chunks that fit a NATS message.

Chunk n of some content is the message on `subjects.blob(sha256, n)`; each carries the headers `Lb-Size` (bytes of the whole
content) and `Lb-Chunks`. Every chunk but the last has exactly CHUNK bytes, so a partial file says by its length
where to go on. Nothing is believed but the digest: sizes are bounded before a byte is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.together import together

CHUNK: Final = 128 * 1024  # bytes
DEADLINE_S: Final = 600.0  # for one whole download; a slow drip ends here
MAX_IN_MEMORY: Final = 32 * 1024 * 1024  # bytes; policies and trust documents

SIZE_HEADER: Final = "Lb-Size"
CHUNKS_HEADER: Final = "Lb-Chunks"

Get = Callable[[str], Awaitable[tuple[bytes, dict[str, str]] | None]]

_DIGEST = re.compile(r"[0-9a-f]{64}")


def split(data: bytes) -> Iterator[bytes]:
    """The chunks of some content, in order; one empty chunk for empty content."""
    for start in range(0, max(len(data), 1), CHUNK):
        yield data[start : start + CHUNK]


def chunk_count(size: int) -> int:
    """How many chunks content of this size has."""
    return max(1, -(-size // CHUNK))


def headers(size: int) -> dict[str, str]:
    """The headers of every chunk of content of this size."""
    return {SIZE_HEADER: str(size), CHUNKS_HEADER: str(chunk_count(size))}


def check_digest(sha256: str) -> str:
    """The digest itself. Raises Refused(BLOB_DIGEST) where it is not 64 lower-case hex digits."""
    if not _DIGEST.fullmatch(sha256):
        raise Refused(Code.BLOB_DIGEST, f"{sha256[:80]!r} is not a SHA-256 in hex")
    return sha256


async def download(
    get: Get,
    sha256: str,
    *,
    max_size: int,
    into: Path,
    size: int | None = None,
    parallel: int = 4,
    deadline_s: float = DEADLINE_S,
) -> None:
    """Bring content into the file `into`, which appears only once its digest was verified.

    `get(subject)` returns one stored message's data and headers, or None. What arrived is kept beside it as `….part` and
    a later call goes on from there; `parallel` chunks are under way at a time. `size` is the exact size where it is
    known, `max_size` the most that is accepted, in bytes.
    Raises Refused: BLOB_MISSING (a chunk is absent or late), BLOB_DIGEST, PACKAGE_TOO_LARGE; OSError from the disk.
    """
    check_digest(sha256)
    part = into.with_name(into.name + ".part")
    resumed = await _fill(get, sha256, part, max_size, size, parallel, deadline_s)
    if resumed and await asyncio.to_thread(_digest_of, part) != sha256:
        part.unlink()  # the earlier part may have been damaged on this disk: once more, from the start
        await _fill(get, sha256, part, max_size, size, parallel, deadline_s)
    found = await asyncio.to_thread(_digest_of, part)
    if found != sha256:
        part.unlink()
        raise Refused(
            Code.BLOB_DIGEST,
            f"the content stored as {sha256[:12]} has the digest {found[:12]}",
            "it was damaged or swapped; have it published again",
        )
    part.replace(into)
    folder = os.open(into.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


async def read(
    get: Get,
    sha256: str,
    *,
    max_size: int = MAX_IN_MEMORY,
    size: int | None = None,
    parallel: int = 4,
    deadline_s: float = DEADLINE_S,
) -> bytes:
    """The same into memory, for policies and trust documents."""
    check_digest(sha256)
    parts: list[bytes] = []
    async with _deadline(sha256, deadline_s):
        total = await _size(get, sha256, max_size, size)
        async for chunk in _chunks(get, sha256, total, 0, parallel):
            parts.append(chunk)
    data = b"".join(parts)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Refused(
            Code.BLOB_DIGEST,
            f"the content stored as {sha256[:12]} has another digest",
            "it was damaged or swapped; have it published again",
        )
    return data


async def _fill(
    get: Get, sha256: str, part: Path, max_size: int, size: int | None, parallel: int, deadline_s: float
) -> bool:
    """Complete the partial file; whether some of it was there before."""
    async with _deadline(sha256, deadline_s):
        total = await _size(get, sha256, max_size, size)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            had = min(file.seek(0, os.SEEK_END), total) // CHUNK
            file.truncate(had * CHUNK)
            file.seek(had * CHUNK)
            async for chunk in _chunks(get, sha256, total, had, parallel):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return had > 0


async def _size(get: Get, sha256: str, max_size: int, size: int | None) -> int:
    first = await _chunk(get, sha256, 0)
    text = first[1].get(SIZE_HEADER, "")
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise Refused(Code.BLOB_DIGEST, f"content {sha256[:12]} does not say its size")
    total = int(text)
    if size is not None and total != size:
        raise Refused(
            Code.BLOB_DIGEST,
            f"content {sha256[:12]} announces {total} bytes, but {size} were signed",
            "have it published again",
        )
    if total > max_size:
        raise Refused(
            Code.PACKAGE_TOO_LARGE,
            f"content {sha256[:12]} announces {total} bytes; at most {max_size} are accepted",
        )
    return total


async def _chunks(get: Get, sha256: str, total: int, first: int, parallel: int) -> AsyncIterator[bytes]:
    """Chunks from number `first` on, in order, `parallel` under way at a time."""
    count = chunk_count(total)
    for start in range(first, count, parallel):
        numbers = range(start, min(start + parallel, count))
        for number, data in zip(numbers, await _together(get, sha256, numbers), strict=True):
            wanted = CHUNK if number < count - 1 else total - CHUNK * (count - 1)
            if len(data) != wanted:
                raise Refused(
                    Code.BLOB_DIGEST,
                    f"chunk {number} of content {sha256[:12]} has {len(data)} bytes instead of {wanted}",
                    "it was damaged or swapped; have it published again",
                )
            yield data


async def _together(get: Get, sha256: str, numbers: range) -> list[bytes]:
    """These chunks, fetched at once; where one fails, the others end too."""
    return [data for data, _ in await together(_chunk(get, sha256, number) for number in numbers)]


async def _chunk(get: Get, sha256: str, number: int) -> tuple[bytes, dict[str, str]]:
    found = await get(subjects.blob(sha256, number))
    if found is None:
        raise Refused(
            Code.BLOB_MISSING,
            f"chunk {number} of content {sha256[:12]} is not stored",
            "have it published again",
        )
    return found


@asynccontextmanager
async def _deadline(sha256: str, seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Refused(
            Code.BLOB_MISSING, f"content {sha256[:12]} did not arrive within {seconds:.0f} s", "try again"
        ) from None


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
