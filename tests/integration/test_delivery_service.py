"""Delivery on a real broker, two replicas with their own credentials, reached as an operator reaches it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from support import Place, eventually
from support_delivery import World, replicas
from support_trust import archive, manifest

from loopback.cli import context, keys, module
from loopback.contracts import envelope, journal, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import (
    Blob,
    MetadataPublish,
    Policy,
    ReleasePublish,
    RolloutStart,
    Scope,
    Selector,
    Verdict,
    Wave,
)
from loopback.contracts.trustdoc import Role
from loopback.services._runtime.bus import Outgoing
from loopback.services._runtime.settings import read_identity
from loopback.services.delivery import handlers
from loopback.services.delivery.store import OnlineKeys, Store
from loopback.trust import blobs, package, signing
from loopback.trust.repository import TrustedRepository, target_path

pytestmark = pytest.mark.broker


@pytest.fixture
async def installed(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    """Keys and an operator's session; nothing runs yet."""
    world = World(broker, tmp_path)
    seed = read_identity(broker.home / "creds" / "activation.creds").seed
    keys.init_keys(broker.home, SigningKey.from_nkey(seed).public.text)
    world.bus = await broker.bus("admin")
    place = context.Context(
        broker.home,
        broker.url,
        broker.home / "creds" / "operator.creds",
        keys.operator_key(broker.home, "admin"),
    )
    async with context.connect(place) as world.session:
        yield world


@pytest.fixture
async def world(installed: World) -> AsyncIterator[World]:
    async with replicas(installed, 2):
        await eventually(lambda: installed.file("timestamp.json"))
        yield installed


async def test_replicas_that_start_together_import_the_first_repository_once(world: World) -> None:
    client = await world.host()
    assert (await world.state())[0] == 5  # root, targets, releases, snapshot, timestamp
    info = client.find("trust.json")
    assert info is not None
    content = await world.session.blob(info.sha256, info.length)
    trust = client.trust_document(lambda _digest, _size: content)
    assert [o.name for o in trust.document.operators] == ["admin"]


async def test_a_published_release_verifies_on_a_host_and_stands_in_the_catalog(world: World) -> None:
    path = world.package()
    info = await module.publish(world.session, path, "canary")
    found = (await world.host()).release("firewall", "1.0.0")
    assert found is not None
    assert (found.sha256, found.custom["channel"]) == (info.digest, "canary")
    (release,) = await world.releases()
    assert (release.digest, release.size, release.channel) == (info.digest, info.size, "canary")
    assert (release.operators, release.requirements.capabilities) == (("admin",), ("CAP_BPF",))
    into = world.tmp_path / "fetched"

    async def get(subject: str) -> tuple[bytes, dict[str, str]] | None:
        stored = await world.bus.last(subjects.STREAM_BLOBS, subject)
        return (stored.data, stored.headers) if stored else None

    await blobs.download(get, info.digest, max_size=package.MAX_PACKAGE, into=into, size=info.size)
    assert into.read_bytes() == path.read_bytes()


async def test_publishing_the_same_package_again_changes_no_content_and_a_changed_one_is_refused(
    world: World,
) -> None:
    await module.publish(world.session, world.package())
    await module.publish(world.session, world.package())
    assert len(await world.releases()) == 1
    with pytest.raises(Refused) as caught:
        await module.publish(world.session, world.package(other=b"1"))
    assert caught.value.code == Code.TUF_CONFLICT
    assert len(await world.releases()) == 1


async def test_families_published_at_once_through_two_replicas_all_arrive(world: World) -> None:
    names = [f"edge{n}" for n in range(4)]
    for name in names:
        trusted = await keys.repository(world.session)
        await keys.publish(world.session, keys.add_family(world.home, name, repository=trusted))
    commands = [await world.command(world.package("1.0.0", name)) for name in names]
    await asyncio.gather(*(world.session.send(command, "delivery") for command in commands))
    client = await world.host()
    assert all(client.release(name, "1.0.0") for name in names)
    assert sorted(r.module for r in await world.releases()) == names


async def test_a_replica_that_dies_after_the_metadata_leaves_the_rest_to_the_redelivery(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = 0
    list_release = handlers.Handlers._list

    async def die_first(self: handlers.Handlers, *arguments: object) -> None:
        nonlocal died
        died += 1
        if died == 1:
            raise RuntimeError("killed")
        await list_release(self, *arguments)

    monkeypatch.setattr(handlers.Handlers, "_list", die_first)
    await module.publish(world.session, world.package())
    assert died == 2
    assert len(await world.releases()) == 1
    assert await world.timestamp() == 2


async def test_a_replayed_command_is_refused_and_changes_nothing(world: World) -> None:
    command = await world.command(world.package())
    await world.session.send(command, "delivery")
    before = await world.state()
    subject = subjects.command("global", "delivery", "release-publish")
    sealed = envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(command), world.session.context.key)
    sequence = await world.bus.publish(Outgoing(subject, sealed, {"Nats-Msg-Id": "replay"}))
    replayed = subjects.result("global", f"{command.id}.{sequence}")
    result = await eventually(lambda: world.session.last("LB_WS_global", replayed))
    assert b"command.replayed" in result
    assert await world.state() == before


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (lambda data: data[:-700], Code.PACKAGE_TRUNCATED),
        (lambda data: data.replace(b"\0the content", b"\0The content"), Code.PACKAGE_DIGEST),
        (lambda data: b"#!/bin/sh\n", Code.PACKAGE_TRUNCATED),
        (lambda data: archive("2.0.0"), Code.MANIFEST_INVALID),
        (lambda data: package.build({"lib/x.py": b"1"}, manifest()), Code.PACKAGE_SBOM),
    ],
    ids=["truncated", "changed", "no package", "another version", "without SBOM and provenance"],
)
async def test_a_corrupt_package_is_refused_although_every_signature_is_right(
    world: World, harm: object, code: Code
) -> None:
    """A releaser's own broken file: its digest is signed and stored, only the content is none."""
    bad = harm(world.package(x=b"the content").read_bytes())  # type: ignore[operator]  # parametrised
    digest = await world.session.put_blob(bad)
    trusted = await keys.repository(world.session)
    targets = signing.parse(signing.Targets, trusted.metadata("module-firewall"))
    targets.version += 1
    path = target_path("firewall", "1.0.0")
    targets.targets[path] = signing.release(path, digest, len(bad), "1.0.0", "stable")
    key = SigningKey.load(keys.offline_key(world.home, "module-firewall"))
    command = ReleasePublish(
        **context.new_command_fields("global"),
        module="firewall",
        version="1.0.0",
        digest=digest,
        size=len(bad),
        metadata=keys.encode({"2.module-firewall.json": signing.sign(targets, key)}),
    )
    assert (await world.refused(command)).code == code


async def test_swapped_content_is_refused(world: World) -> None:
    """Somebody stored other bytes under the digest before the releaser did: the first write stays."""
    path = world.package()
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    evil = bytes([data[0] ^ 1]) + data[1:]
    command = await world.command(path)
    await world.bus.api("STREAM.PURGE.LB_BLOB", {"filter": subjects.blob_chunks(digest)})
    await world.bus.publish(Outgoing(subjects.blob(digest, 0), evil, blobs.headers(len(evil))))
    with pytest.raises(Refused, match="is something else"):  # whoever would store the right ones is told
        await world.session.put_blob(data)
    assert (await world.refused(command)).code == Code.BLOB_DIGEST


async def test_content_that_was_never_stored_is_refused(world: World) -> None:
    command = await world.command(world.package())
    absent = msgspec.structs.replace(command, digest="0" * 64)
    assert (await world.refused(absent)).code == Code.BLOB_MISSING


async def test_metadata_that_does_not_verify_is_refused(world: World) -> None:
    path = world.package()
    info = package.inspect(path)
    trusted = await keys.repository(world.session)
    right = await world.command(path)
    targets = signing.parse(signing.Targets, trusted.metadata("module-firewall"))
    targets.version += 1
    signed_by_a_stranger = signing.sign(targets, SigningKey.generate())
    target = target_path("firewall", "1.0.0")
    for metadata, code in (
        ({}, Code.PACKAGE_UNKNOWN),
        ({"2.module-firewall.json": b"{}"}, Code.TUF_INVALID),
        ({"2.module-firewall.json": signed_by_a_stranger}, Code.TUF_INVALID),
        ({"2.module-other.json": signed_by_a_stranger}, Code.TUF_INVALID),
        ({"3.module-firewall.json": signed_by_a_stranger}, Code.TUF_INVALID),
        ({"timestamp.json": signed_by_a_stranger}, Code.TUF_INVALID),
        ({"9.snapshot.json": signed_by_a_stranger}, Code.TUF_INVALID),
        ({"2.root.json": await world.file("1.root.json") or b""}, Code.TUF_INVALID),
    ):
        command = msgspec.structs.replace(
            right, id=f"c-{len(metadata)}-{next(iter(metadata), '')}", metadata=keys.encode(metadata)
        )
        error = await world.refused(command)
        assert error.code == code, (metadata.keys(), error)
    # a right signature, but over other content than the command's
    targets.targets[target] = signing.release(target, "0" * 64, info.size, "1.0.0", "stable")
    key = SigningKey.load(keys.offline_key(world.home, "module-firewall"))
    other = {"2.module-firewall.json": signing.sign(targets, key)}
    command = msgspec.structs.replace(right, id="other", metadata=keys.encode(other))
    assert (await world.refused(command)).code == Code.PACKAGE_DIGEST
    wrong_channel = msgspec.structs.replace(right, id="channel", channel="canary")
    assert (await world.refused(wrong_channel)).code == Code.TUF_INVALID
    await world.session.send(right, "delivery")


async def test_an_older_or_rewriting_version_of_a_familys_releases_is_refused(world: World) -> None:
    first = await world.command(world.package("1.0.0"))
    await world.session.send(first, "delivery")
    # a second operator signed version 2 on top of version 1 too
    key = SigningKey.load(keys.offline_key(world.home, "module-firewall"))
    data = world.package("1.1.0").read_bytes()
    digest = await world.session.put_blob(data)
    path = target_path("firewall", "1.1.0")
    fresh = signing.new_targets(
        datetime.now(UTC),
        version=2,
        files={path: signing.release(path, digest, len(data), "1.1.0", "stable")},
    )
    command = ReleasePublish(
        **context.new_command_fields("global"),
        module="firewall",
        version="1.1.0",
        digest=digest,
        size=len(data),
        metadata=keys.encode({"2.module-firewall.json": signing.sign(fresh, key)}),
    )
    assert (await world.refused(command)).code == Code.TUF_CONFLICT
    # version 3 that gives 1.0.0 other content
    old = target_path("firewall", "1.0.0")
    fresh.version = 3
    fresh.targets[old] = signing.release(old, digest, len(data), "1.0.0", "stable")
    rewriting = msgspec.structs.replace(
        command, id="rewriting", metadata=keys.encode({"3.module-firewall.json": signing.sign(fresh, key)})
    )
    error = await world.refused(rewriting)
    assert error.code == Code.TUF_CONFLICT
    assert "never changes" in error.reason


async def accepted(session: context.Session, path: Path) -> bool:
    try:
        await module.publish(session, path)
    except Refused as refused:
        assert refused.code == Code.COMMAND_UNAUTHORISED
        return False
    return True


async def expect(outcome: Callable[[], Awaitable[Code]], code: Code) -> bool:
    return await outcome() == code


async def test_an_operator_gets_a_role_and_only_that(world: World, tmp_path: Path) -> None:
    async def grant(*roles: Role) -> None:
        trusted = await keys.repository(world.session)
        info = trusted.find("trust.json")
        assert info is not None
        content = await world.session.blob(info.sha256, info.length)
        change = keys.add_operator(
            world.home, "ann", {"*": roles}, repository=trusted, read_blob=lambda _d, _s: content
        )
        await keys.publish(world.session, change)

    await grant(Role.VIEWER)
    ann = world.session.context._replace(operator_key=keys.operator_key(world.home, "ann"))
    async with context.connect(ann) as session:

        async def outcome() -> Code:
            with pytest.raises(Refused) as caught:
                await module.publish(session, world.package())
            return caught.value.code

        # each replica learns of new keys within a second
        await eventually(lambda: expect(outcome, Code.COMMAND_UNAUTHORISED))
        await grant(Role.RELEASER)
        await eventually(lambda: accepted(session, world.package()))
        (release,) = await world.releases()
        assert release.operators == ("ann",)
        with pytest.raises(Refused) as caught:
            await session.send(
                MetadataPublish(**context.new_command_fields("global"), metadata={}), "delivery"
            )
        assert caught.value.code == Code.COMMAND_UNAUTHORISED


async def test_a_trust_document_that_locks_everybody_out_is_refused(world: World) -> None:
    trusted = await keys.repository(world.session)
    info = trusted.find("trust.json")
    assert info is not None
    content = await world.session.blob(info.sha256, info.length)
    change = keys.add_operator(
        world.home, "admin", {"*": (Role.VIEWER,)}, repository=trusted, read_blob=lambda _d, _s: content
    )
    for data in change.blobs:
        await world.session.put_blob(data)
    command = MetadataPublish(**context.new_command_fields("global"), metadata=keys.encode(change.metadata))
    error = await world.refused(command)
    assert (error.code, "admin" in error.reason) == (Code.TUF_INVALID, True)


async def test_metadata_is_renewed_before_and_after_it_expired_and_by_one_replica_only(
    installed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = installed
    bus = await world.place.bus("delivery")
    pinned = (world.home / "tuf" / "root.json").read_bytes()
    store = Store(bus, OnlineKeys.load(world.home), pinned, world.tmp_path / "scratch")
    assert await store.import_seed(world.home / "tuf" / "seed")
    assert not await store.import_seed(world.home / "tuf" / "seed")
    assert not await store.renew()
    start = await bus.now()
    for after, version, snapshot in (
        (timedelta(hours=13), 2, 1),
        (timedelta(days=4), 3, 2),
        (timedelta(days=40), 4, 3),
    ):

        async def later(after: timedelta = after) -> datetime:
            return start + after

        monkeypatch.setattr(bus, "now", later)
        assert sorted(await asyncio.gather(store.renew(), store.renew())) == [False, True]
        assert not await store.renew()
        assert await world.timestamp() == version
        assert await world.file(f"{snapshot}.snapshot.json") is not None
        stored = await world.bus.read(subjects.STREAM_TUF, ["lb.tuf.>"])
        files = {s.subject: s.data for s in stored}
        place = world.tmp_path / "client"
        TrustedRepository.pin(place, pinned)
        client = TrustedRepository(
            place, lambda n, files=files: files.get(subjects.tuf(n)), now=lambda at=start + after: at
        )
        client.refresh()


# Verdicts


def created(info: package.PackageInfo, rollout: str, **changes: object) -> journal.Link:
    """The first link of a rollout of this package in workspace prod."""
    now = datetime.now(UTC)
    policy = changes.pop("policy", None)
    digest = str(changes.pop("digest", info.digest))
    start = RolloutStart(
        **context.new_command_fields("prod"),
        rollout=rollout,
        module="firewall",
        version=info.manifest.version,
        waves=(Wave(name="all", percent=100),),
        scope=Scope(
            workspace="prod", module="firewall", packages={info.manifest.version: digest}, policy=policy,
            policy_serial=1, selector=Selector(), not_before=now, not_after=now + timedelta(days=1),
        ),
    )  # fmt: skip
    event = journal.Created(
        envelope=envelope.seal(envelope.COMMAND, msgspec.json.encode(start)),
        command=start.id,
        keyids=(),
        operators=(),
        members=(),
        module="firewall",
        version=info.manifest.version,
        package=digest,
        size=info.size,
        policy=policy,
        policy_serial=1,
    )
    event = msgspec.structs.replace(event, **changes)
    return journal.Link(rollout=rollout, workspace="prod", seq=1, prev="", at=now, event=event)


async def verdict(world: World, link: journal.Link) -> Verdict:
    await world.bus.publish(Outgoing(subjects.rollout("prod", link.rollout, "created"), journal.encode(link)))
    subject = subjects.verdict("prod", link.rollout, "delivery")
    found = await eventually(lambda: world.bus.last(subjects.STREAM_FLEET, subject))
    return msgspec.json.decode(found.data, type=Verdict)


def policy_bytes(world: World, **changes: object) -> bytes:
    right = Policy(
        workspace="prod",
        module="firewall",
        name="web",
        serial=1,
        content=msgspec.Raw(b"{}"),
        issued_at=datetime.now(UTC),
    )
    right = msgspec.structs.replace(right, **changes)
    return envelope.seal_bytes(envelope.POLICY, msgspec.json.encode(right), world.session.context.key)


async def test_rollouts_get_a_verdict_on_their_release_and_their_policy(world: World) -> None:
    await world.place.workspace("prod")
    await world.bus.publish(Outgoing(subjects.record("prod", "workspace", "prod"), b"{}"))
    info = await module.publish(world.session, world.package())
    policy = await world.session.put_blob(policy_bytes(world))
    assert (await verdict(world, created(info, "good", policy=policy))).refusal is None
    assert (await verdict(world, created(info, "bare"))).refusal is None
    assert (await verdict(world, created(info, "absent", package=""))).refusal is None

    unpublished = package.inspect(world.package("9.0.0"))
    elsewhere = await world.session.put_blob(policy_bytes(world, workspace="test"))
    newer = await world.session.put_blob(policy_bytes(world, serial=2))
    unsigned = await world.session.put_blob(b"\xff\xfe")
    content = b'{"rules": "%s"}' % (b"x" * 2_000_000)
    blob = Blob(await world.session.put_blob(content), len(content))
    apart = await world.session.put_blob(policy_bytes(world, content=msgspec.Raw(b"null"), blob=blob))
    assert (await verdict(world, created(info, "large", policy=apart))).refusal is None
    unstored = Blob("0" * 64, 2_000_000)
    lost = await world.session.put_blob(policy_bytes(world, content=msgspec.Raw(b"null"), blob=unstored))
    shorter = Blob(blob.sha256, blob.size - 1)
    misnamed = await world.session.put_blob(policy_bytes(world, content=msgspec.Raw(b"null"), blob=shorter))
    stranger = SigningKey.generate()
    forged = await world.session.put_blob(envelope.seal_bytes(envelope.POLICY, policy_bytes(world), stranger))
    for name, link, code in (
        ("unpublished", created(unpublished, "r1"), Code.PACKAGE_UNKNOWN),
        ("another digest", created(info, "r2", digest="0" * 64), Code.PACKAGE_DIGEST),
        ("outside its scope", created(info, "r3", package="0" * 64), Code.PACKAGE_DIGEST),
        ("another size", created(info, "r4", size=1), Code.PACKAGE_DIGEST),
        ("no policy", created(info, "r5", policy="0" * 64), Code.BLOB_MISSING),
        ("no content", created(info, "r10", policy=lost), Code.BLOB_MISSING),
        ("content of another size", created(info, "r11", policy=misnamed), Code.BLOB_DIGEST),
        ("another workspace's", created(info, "r6", policy=elsewhere), Code.POLICY_INVALID),
        ("another serial", created(info, "r7", policy=newer), Code.POLICY_SERIAL),
        ("nonsense", created(info, "r8", policy=unsigned), Code.ENVELOPE_MALFORMED),
        ("a stranger's", created(info, "r9", policy=forged), Code.SIGNATURE_UNKNOWN_KEY),
    ):
        found = (await verdict(world, link)).refusal
        assert found is not None, name
        assert found.code == code, name
