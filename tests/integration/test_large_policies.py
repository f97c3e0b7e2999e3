"""Policies of any size by the same command: from a file over four real services to real agents with the tiny module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import rulegen
import rulesets
from support import Place
from support_installation import Installation, installation

from loopback.contracts import envelope, subjects
from loopback.contracts.abi import MAX_CONTENT
from loopback.contracts.codes import Code
from loopback.services._runtime.wire import Outgoing
from loopback.trust import blobs

pytestmark = pytest.mark.broker


@pytest.fixture
async def shop(broker: Place, tmp_path: Path) -> AsyncIterator[Installation]:
    async with installation(broker, tmp_path, "web-1", "web-2") as found:
        yield found


def generated(count: int) -> bytes:
    """So many rules, as JSON."""
    return rulesets.text(rulesets.policy(rulegen.generate("acl1", count)))


def write(shop: Installation, name: str, content: bytes) -> str:
    """A rollout file with a policy of this content."""
    path = shop.rollout_file(name)
    (shop.folder / f"{name}-policy.json").write_bytes(content)
    return path


async def stored(shop: Installation, sha256: str) -> int:
    """How many chunks the bus has of some content."""
    filters = {"subjects_filter": subjects.blob_chunks(sha256)}
    info = await shop.bus.api(f"STREAM.INFO.{subjects.STREAM_BLOBS}", filters)
    return len(info["state"].get("subjects") or {})


def held(shop: Installation, host: str) -> dict[str, bytes]:
    """The contents on a host's disk."""
    folder = shop.configs[host].state_dir / "contents"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_ten_rules_and_a_hundred_thousand_go_the_same_way(shop: Installation) -> None:
    few, many = generated(10), generated(100_000)
    assert len(many) > 10 * envelope.MAX_ENVELOPE
    digest = hashlib.sha256(many).hexdigest()

    said = await shop("rollout", "start", write(shop, "few", few), "--json")
    assert said.json["policy"]["blob"] is None
    assert "stored" not in said.err
    await shop("rollout", "watch", "few", "--json")

    planned = (await shop("rollout", "plan", write(shop, "many", many), "--json")).json
    assert await stored(shop, digest) == 0, "planning stores nothing"
    said = await shop("rollout", "start", write(shop, "many", many), "--json")
    assert said.json["policy"]["blob"] == planned["policy"]["blob"] == digest
    assert said.json["policy"]["size"] == len(many)
    assert f"stored the policy's content: {len(many):,} bytes" in said.err
    assert await stored(shop, digest) == blobs.chunk_count(len(many))
    await shop("rollout", "watch", "many", "--json")
    for host in ("web-1", "web-2"):
        assert held(shop, host) == {digest: many}
        status = await shop.said(host)
        assert status is not None
        (module,) = status.modules
        assert (module.rollout, module.enforcing) == ("many", True)
        assert module.promoted is not None
        assert module.promoted.policy == said.json["policy"]["digest"]

    # The way back and the same content once more need nothing new from anywhere.
    await shop.bus.api("STREAM.PURGE.LB_BLOB", {"filter": subjects.blob_chunks(digest)})
    await shop("rollout", "start", write(shop, "again", many), "--watch", "--json")
    assert held(shop, "web-1") == {digest: many}


async def test_a_policy_over_the_bound_is_refused_before_anything_is_stored(shop: Installation) -> None:
    before = await shop.bus.revision(subjects.STREAM_BLOBS)
    slightly = json.dumps({"x": "y" * MAX_CONTENT}).encode()
    said = await shop("rollout", "start", write(shop, "slightly", slightly), code=2)
    assert f"[{Code.POLICY_TOO_LARGE}]" in said.err
    assert f"{len(slightly):,} bytes as JSON" in said.err
    assert f"{MAX_CONTENT:,} at most" in said.err
    assert "next: merge prefixes" in said.err
    said = await shop("rollout", "plan", write(shop, "far", b" " * 40_000_000 + b"{}"), code=2)
    assert f"[{Code.POLICY_TOO_LARGE}]" in said.err
    assert "40,000,002 bytes of text" in said.err
    assert await shop.bus.revision(subjects.STREAM_BLOBS) == before
    fits = json.dumps({"x": "y" * (MAX_CONTENT - 9)}).encode()
    assert len(fits) == MAX_CONTENT
    await shop("rollout", "start", write(shop, "fits", fits), "--watch", "--json")
    assert held(shop, "web-2") == {hashlib.sha256(fits).hexdigest(): fits}


async def test_an_upload_that_was_cut_off_goes_on_and_one_that_meets_other_bytes_stops(
    shop: Installation,
) -> None:
    content = json.dumps({"x": "y" * 3_000_000}).encode()
    digest = hashlib.sha256(content).hexdigest()
    parts = list(blobs.split(content))
    for number in (0, 5):
        subject = subjects.blob(digest, number)
        await shop.bus.publish(Outgoing(subject, parts[number], blobs.headers(len(content))))
    await shop("rollout", "start", write(shop, "whole", content), "--watch", "--json")
    assert await stored(shop, digest) == len(parts)

    other = json.dumps({"x": "z" * 3_000_000}).encode()
    poisoned = subjects.blob(hashlib.sha256(other).hexdigest(), 7)
    await shop.bus.publish(Outgoing(poisoned, bytes(blobs.CHUNK), blobs.headers(len(other))))
    said = await shop("rollout", "start", write(shop, "poisoned", other), code=2)
    assert f"[{Code.BLOB_DIGEST}]" in said.err
    assert poisoned in said.err
    assert "poisoned" not in {r["rollout"] for r in (await shop("rollout", "list", "--json")).json}
