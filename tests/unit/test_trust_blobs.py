"""Content in chunks: what arrives is what was named, or nothing is kept."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.trust import blobs
from loopback.trust.blobs import CHUNK

DATA = bytes(range(256)) * 2048 + b"the end"  # five chunks, the last one short


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class Bus:
    """Chunks by subject, counting how they are asked for."""

    def __init__(self, data: bytes) -> None:
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.stored = {
            subjects.blob(self.sha256, n): (chunk, blobs.headers(len(data)))
            for n, chunk in enumerate(blobs.split(data))
        }
        self.asked: list[str] = []
        self.fail_after = 10**9
        self.under_way = self.most_under_way = 0

    async def get(self, subject: str) -> tuple[bytes, dict[str, str]] | None:
        self.asked.append(subject)
        if len(self.asked) > self.fail_after:
            raise ConnectionError("gone")
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        return self.stored.get(subject)


@given(st.integers(0, 3 * CHUNK + 1))
def test_chunks_put_together_are_the_content_and_only_the_last_is_short(size: int) -> None:
    data = bytes(size)
    chunks = list(blobs.split(data))
    assert b"".join(chunks) == data
    assert len(chunks) == blobs.chunk_count(size)
    assert all(len(c) == CHUNK for c in chunks[:-1])


@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(CHUNK), bytes(2 * CHUNK)])
async def test_content_arrives_whole(data: bytes, tmp_path: Path) -> None:
    bus = Bus(data)
    into = tmp_path / "content"
    await blobs.download(bus.get, bus.sha256, max_size=10**6, into=into, size=len(data))
    assert into.read_bytes() == data
    assert await blobs.read(bus.get, bus.sha256) == data
    assert names(tmp_path) == ["content"]
    assert bus.most_under_way <= 4


async def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    bus = Bus(DATA)
    bus.fail_after = 3
    into = tmp_path / "content"
    with pytest.raises(ConnectionError):
        await blobs.download(bus.get, bus.sha256, max_size=10**6, into=into, parallel=1)
    assert not into.exists()
    bus.fail_after, bus.asked = 10**9, []
    await blobs.download(bus.get, bus.sha256, max_size=10**6, into=into, parallel=1)
    assert into.read_bytes() == DATA
    assert subjects.blob(bus.sha256, 1) not in bus.asked


async def test_a_partial_file_damaged_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    bus = Bus(DATA)
    (tmp_path / "content.part").write_bytes(b"!" * (2 * CHUNK + 5))
    await blobs.download(bus.get, bus.sha256, max_size=10**6, into=tmp_path / "content")
    assert (tmp_path / "content").read_bytes() == DATA


async def refused(bus: Bus, into: Path, **options: object) -> Code:
    with pytest.raises(Refused) as caught:
        await blobs.download(bus.get, bus.sha256, **({"max_size": 10**6, "into": into} | options))
    assert into.name not in names(into.parent)
    with pytest.raises(Refused) as again:
        await blobs.read(bus.get, bus.sha256, **({"max_size": 10**6} | options))
    assert again.value.code == caught.value.code
    return caught.value.code


async def test_a_missing_chunk_is_refused(tmp_path: Path) -> None:
    for number in range(5):
        bus = Bus(DATA)
        del bus.stored[subjects.blob(bus.sha256, number)]
        assert await refused(bus, tmp_path / "c") == Code.BLOB_MISSING


async def test_wrong_content_is_refused_and_forgotten(tmp_path: Path) -> None:
    bus = Bus(DATA)
    subject = subjects.blob(bus.sha256, 2)
    chunk, headers = bus.stored[subject]
    bus.stored[subject] = (b"?" + chunk[1:], headers)
    assert await refused(bus, tmp_path / "c") == Code.BLOB_DIGEST
    assert names(tmp_path) == []


@pytest.mark.parametrize("length", [0, CHUNK - 1, CHUNK + 1])
async def test_a_chunk_of_another_length_is_refused(length: int, tmp_path: Path) -> None:
    bus = Bus(DATA)
    subject = subjects.blob(bus.sha256, 1)
    bus.stored[subject] = (bytes(length), bus.stored[subject][1])
    assert await refused(bus, tmp_path / "c") == Code.BLOB_DIGEST


async def test_content_that_announces_too_much_is_refused_after_one_chunk(tmp_path: Path) -> None:
    bus = Bus(DATA)
    assert await refused(bus, tmp_path / "c", max_size=len(DATA) - 1) == Code.PACKAGE_TOO_LARGE
    assert len(bus.asked) == 2  # one for each of the two ways
    assert names(tmp_path) == []


async def test_another_size_than_the_signed_one_is_refused(tmp_path: Path) -> None:
    assert await refused(Bus(DATA), tmp_path / "c", size=len(DATA) + 1) == Code.BLOB_DIGEST


@pytest.mark.parametrize("said", ["", "-1", "1e9", "9" * 40, "٣"])
async def test_an_odd_size_header_is_refused(said: str, tmp_path: Path) -> None:
    bus = Bus(DATA)
    first = subjects.blob(bus.sha256, 0)
    bus.stored[first] = (bus.stored[first][0], {blobs.SIZE_HEADER: said})
    assert await refused(bus, tmp_path / "c") == Code.BLOB_DIGEST


async def test_endless_content_that_lies_about_its_size_is_bounded_by_what_it_announced(
    tmp_path: Path,
) -> None:
    bus = Bus(DATA)
    announced = blobs.headers(CHUNK)
    bus.stored = {subject: (chunk, announced) for subject, (chunk, _) in bus.stored.items()}
    assert await refused(bus, tmp_path / "c") == Code.BLOB_DIGEST


async def test_a_slow_drip_ends_at_the_deadline(tmp_path: Path) -> None:
    bus = Bus(DATA)
    never = asyncio.Event()

    async def drip(subject: str) -> tuple[bytes, dict[str, str]] | None:
        if subject.endswith(".3"):
            await never.wait()
        return await Bus.get(bus, subject)

    bus.get = drip  # type: ignore[method-assign]
    assert await refused(bus, tmp_path / "c", deadline_s=0.05) == Code.BLOB_MISSING


async def test_a_name_that_is_no_digest_never_becomes_a_subject(tmp_path: Path) -> None:
    bus = Bus(DATA)
    bus.sha256 = "../../etc/passwd"
    assert await refused(bus, tmp_path / "c") == Code.BLOB_DIGEST
    assert bus.asked == []


async def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    bus = Bus(DATA)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "c.part").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        await blobs.download(bus.get, bus.sha256, max_size=10**6, into=tmp_path / "c")
    assert victim.read_bytes() == b"precious"


async def test_whoever_met_a_missing_chunk_is_not_taken_for_cancelled(tmp_path: Path) -> None:
    bus = Bus(DATA)
    del bus.stored[subjects.blob(bus.sha256, 2)]
    assert await refused(bus, tmp_path / "c") == Code.BLOB_MISSING
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()
