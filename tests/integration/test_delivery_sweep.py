"""What nobody names is cleared from the bus in time, and nothing else ever is."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from opentelemetry import metrics
from support import Place, eventually
from support_delivery import World, replicas
from test_delivery_service import created, policy_bytes

from loopback.cli import context, keys, module
from loopback.contracts import journal, subjects
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Blob
from loopback.services._runtime.bus import Outgoing
from loopback.services._runtime.settings import read_identity
from loopback.services.delivery import sweep
from loopback.services.delivery.store import OnlineKeys, Store
from loopback.services.delivery.sweep import Sweeper
from loopback.trust import blobs

pytestmark = pytest.mark.broker

NOW = datetime(2026, 11, 26, tzinfo=UTC)


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    seed = read_identity(broker.home / "creds" / "activation.creds").seed
    keys.init_keys(broker.home, SigningKey.from_nkey(seed).public.text)
    world.bus = await broker.bus("admin")
    own = context.Context(
        broker.home,
        broker.url,
        broker.home / "creds" / "operator.creds",
        keys.operator_key(broker.home, "admin"),
    )
    async with context.connect(own) as world.session, replicas(world, 1):
        await eventually(lambda: world.file("timestamp.json"))
        await broker.workspace("prod")
        yield world


async def sweeper(world: World) -> Sweeper:
    """With delivery's own identity: what it may do on the bus is a part of this."""
    bus = await world.place.bus("delivery")
    home = world.place.home
    store = Store(
        bus, OnlineKeys.load(home), (home / "tuf" / "root.json").read_bytes(), world.tmp_path / "scratch"
    )
    return Sweeper(bus, store, metrics.get_meter("test"), logging.getLogger("test"))


async def digests(world: World) -> set[str]:
    filters = {"subjects_filter": subjects.blob_chunks("*")}
    info = await world.bus.api(f"STREAM.INFO.{subjects.STREAM_BLOBS}", filters)
    return {subject.split(".")[2] for subject in info["state"].get("subjects") or {}}


async def test_what_a_release_a_trust_document_or_a_rollout_names_stays_and_the_rest_goes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await module.publish(world.session, world.package())
    content, forgotten = b"c" * 300_000, b"f" * 300_000
    blob = Blob(await world.session.put_blob(content), len(content))
    apart = await world.session.put_blob(policy_bytes(world, content=msgspec.Raw(b"null"), blob=blob))
    inside = await world.session.put_blob(policy_bytes(world))
    for name, policy in (("one", apart), ("two", inside), ("lost", "0" * 64)):
        link = created(info, name, policy=policy)
        await world.bus.publish(Outgoing(subjects.rollout("prod", name, "created"), journal.encode(link)))
    before = await digests(world)  # with the package, and the trust document
    assert {info.digest, apart, inside, blob.sha256} < before

    given_up = await world.session.put_blob(forgotten)
    # An upload that was cut off has no first chunk, and a policy without a rollout keeps nothing.
    half = subjects.blob("ab" * 32, 1)
    await world.bus.publish(Outgoing(half, bytes(blobs.CHUNK), blobs.headers(3 * blobs.CHUNK)))
    unused = Blob(given_up, len(forgotten))
    refused = await world.session.put_blob(policy_bytes(world, content=msgspec.Raw(b"null"), blob=unused))

    own = await sweeper(world)
    assert await own.look() == 0, "it is young"
    assert await digests(world) == before | {given_up, "ab" * 32, refused}
    monkeypatch.setattr(sweep, "KEPT", timedelta(0))
    assert await own.look() == 3
    assert await digests(world) == before
    assert await own.look() == 0
    # What was cleared can be stored again.
    assert await world.session.put_blob(forgotten) == given_up
    assert given_up in await digests(world)


async def test_where_it_cannot_be_known_what_is_named_nothing_is_cleared(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "KEPT", timedelta(0))
    await world.session.put_blob(b"nobody names it")
    before = await digests(world)
    await world.bus.publish(Outgoing(subjects.tuf("9.module-firewall.json"), b"no metadata"))
    assert await (await sweeper(world)).look() == 0
    assert await digests(world) == before


def test_content_is_cleared_only_after_its_time() -> None:
    unnamed = {"old": NOW - sweep.KEPT - timedelta(seconds=1), "young": NOW - sweep.KEPT, "gone": None}
    assert sweep.old_enough(unnamed, NOW) == ["old"]
