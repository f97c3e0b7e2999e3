"""Large policies in hands that are not an author's: whoever owns the broker, or activation's key, and what they store.

The content of a policy lies apart from its signature. Nothing may reach a module, or fill a host, but what an author signed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Place
from support_host import World

from loopback.contracts import envelope, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Blob
from loopback.contracts.reports import ModuleStatus, Phase
from loopback.host import contents, install
from loopback.host.disk import Disk
from loopback.host.link import Link
from loopback.host.state import Store
from loopback.services._runtime.wire import Outgoing
from loopback.trust import blobs

pytestmark = pytest.mark.broker

CONTENT = json.dumps({"filling": "x" * 1_500_000}).encode()
EVIL = json.dumps({"filling": "y" * 1_500_000}).encode()
NAME = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every subject that hosts asked for; they try once instead of four times."""
    found: list[str] = []
    honest = Link.get

    async def get(self: Link, subject: str) -> Any:
        found.append(subject)
        return await honest(self, subject)

    monkeypatch.setattr(Link, "get", get)
    monkeypatch.setattr(install, "RETRIES_S", ())
    return found


async def store(world: World, sha256: str, chunks: list[bytes], size: int) -> None:
    """Put chunks under a digest in the place of what is there: only the broker's owner can."""
    await world.bus.api("STREAM.PURGE.LB_BLOB", {"filter": subjects.blob_chunks(sha256)})
    headers = {blobs.SIZE_HEADER: str(size), blobs.CHUNKS_HEADER: "1"}
    for number, chunk in enumerate(chunks):
        await world.bus.publish(Outgoing(subjects.blob(sha256, number), chunk, headers))


def enforced(world: World) -> str | None:
    found = (world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json").read_text()
    policy: str | None = json.loads(found)["policy"]
    return policy


def on_disk(world: World) -> int:
    """Bytes in the host's folder of contents."""
    return sum(path.stat().st_size for path in (world.config.state_dir / "contents").iterdir())


def refused(found: ModuleStatus, old: Running) -> Code | None:
    """Why nothing came of it; what held before must hold still."""
    assert (found.phase, found.promoted, found.enforcing) == (Phase.REJECTED, old, True)
    return found.refusal.code if found.refusal else None


async def test_other_bytes_under_the_digest_of_a_content_are_not_given_to_a_module(
    world: World, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await world.release("1.0", policy=1)
    new = await world.with_content(old, 2, CONTENT)
    await store(world, NAME, list(blobs.split(EVIL)), len(EVIL))
    staged: list[bytes] = []
    honest = install.policy_content

    def watched(place: Store, running: Running) -> bytes | None:
        found = honest(place, running)
        staged.append(found or b"")
        return found

    monkeypatch.setattr(install, "policy_content", watched)
    async with world.agent():
        await world.reached(await world.desire(old))
        found = await world.reached(await world.desire(new, expected=old, rollout="r2"))
        assert refused(found, old) == Code.BLOB_DIGEST
        assert EVIL not in staged
        assert enforced(world) == old.policy
        assert on_disk(world) == 0

        def uncompared(place: Store, blob: Blob) -> bytes | None:
            return place.disk.read(place.content_path(blob.sha256))

        with monkeypatch.context() as patch:
            patch.setattr(blobs, "_digest_of", lambda path: path.name.split(".")[0])
            patch.setattr(contents, "read", uncompared)
            await world.reached(await world.desire(new, expected=old, rollout="r3"))
            assert EVIL in staged, "without the defence, the attack reaches its target"


@pytest.mark.parametrize(
    ("chunks", "size"),
    [
        ([bytes(blobs.CHUNK)] * 12, 10**12),
        ([bytes(4 * blobs.CHUNK)] * 12, len(CONTENT)),
        ([bytes(blobs.CHUNK)] * 40, 40 * blobs.CHUNK),
        ([b"x"] * 12, len(CONTENT)),
    ],
    ids=["a-terabyte", "longer-chunks", "more-chunks", "a-byte-at-a-time"],
)
async def test_content_without_end_costs_a_host_no_more_than_what_was_signed(
    world: World, asked: list[str], chunks: list[bytes], size: int
) -> None:
    old = await world.release("1.0", policy=1)
    new = await world.with_content(old, 2, CONTENT)
    await store(world, NAME, chunks, size)
    async with world.agent():
        await world.reached(await world.desire(old))
        found = await world.reached(await world.desire(new, expected=old, rollout="r2"))
        assert refused(found, old) == Code.BLOB_DIGEST
    assert sum(NAME in subject for subject in asked) <= 1 + 4, "the first few told"
    assert on_disk(world) <= len(CONTENT)


async def test_content_that_comes_ever_more_slowly_ends_at_a_deadline_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Store(Disk(), tmp_path)
    place.disk.folder(place.contents)
    parts = list(blobs.split(CONTENT))
    asked: list[int] = []
    honest = blobs.download

    async def impatient(*words: Any, **named: Any) -> None:
        await honest(*words, **named, parallel=1, deadline_s=1.0)

    monkeypatch.setattr(blobs, "download", impatient)

    async def get(subject: str) -> tuple[bytes, dict[str, str]]:
        number = int(subject.rpartition(".")[2])
        asked.append(number)
        if number == 5 and asked.count(5) == 1:
            await asyncio.Event().wait()
        return parts[number], blobs.headers(len(CONTENT))

    blob = Blob(NAME, len(CONTENT))
    with pytest.raises(Refused) as caught:
        await contents.fetch(get, place, blob)
    assert caught.value.code == Code.BLOB_MISSING
    assert contents.read(place, blob) is None
    del asked[:-1]
    await contents.fetch(get, place, blob)
    assert contents.read(place, blob) == CONTENT
    assert asked[1:] == [0, *range(5, len(parts))], "the first says the size"


async def test_older_content_comes_back_under_no_newer_serial(world: World, asked: list[str]) -> None:
    """Who owns broker and activation has old policies and their contents, and nobody's key to sign a new one with."""
    first = await world.with_content(await world.release("1.0"), 1, CONTENT)
    second = await world.with_content(first, 2, EVIL)
    thief = SigningKey.generate()
    data, _ = world.signers.apart(3, CONTENT)
    again = envelope.seal_bytes(envelope.POLICY, envelope.payload_of(envelope.parse(data)), thief)
    wrapped = msgspec.structs.replace(second, policy=await world.blob(again), policy_serial=3)
    renumbered = msgspec.structs.replace(first, policy_serial=3)
    async with world.agent():
        await world.reached(await world.desire(first))
        await world.reached(await world.desire(second, expected=first, rollout="r2"))
        asked.clear()
        # The scope of these is an operator's, as if one had been talked into it: what the author signed decides.
        for rollout, target, code in (
            ("r3", wrapped, Code.SIGNATURE_UNKNOWN_KEY),
            ("r4", renumbered, Code.POLICY_SERIAL),
            ("r5", first, Code.POLICY_SERIAL),
        ):
            found = await world.reached(await world.desire(target, expected=second, rollout=rollout))
            assert refused(found, second) == code, rollout
        assert enforced(world) == second.policy
    assert not any(NAME in subject for subject in asked), "content that nobody signed is not even asked for"


async def test_a_stolen_activation_points_at_no_other_workspaces_content(
    world: World, asked: list[str]
) -> None:
    old = await world.release("1.0", policy=1)
    honest = await world.with_content(old, 2, EVIL)
    data, digest = world.signers.apart(2, CONTENT, workspace="lab")
    await world.blob(data)
    await world.blob(CONTENT)
    foreign = msgspec.structs.replace(honest, policy=digest)
    signed = world.signers.command(world.signers.rollout(honest, "r2"))
    async with world.agent():
        await world.reached(await world.desire(old))
        asked.clear()
        outside = await world.desire(foreign, expected=old, rollout="r2", scope=signed)
        assert refused(await world.reached(outside), old) == Code.SCOPE_VIOLATION
        # Also where an operator of this workspace names it: it was signed for another one.
        inside = await world.desire(foreign, expected=old, rollout="r3")
        assert refused(await world.reached(inside), old) == Code.POLICY_MALFORMED
    assert not any(NAME in subject for subject in asked)
