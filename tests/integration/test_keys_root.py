"""Root keys lost or stolen, and the new root that is pinned by hand (docs/keys.md). Real delivery, real TUF clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Place, eventually
from support_keys import Client, Installation, has, now, refused

from loopback.cli import ceremony, keys
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.trust import signing

pytestmark = pytest.mark.broker


async def test_a_root_key_stolen_below_the_threshold_changes_nothing_and_is_replaced(
    threshold: Installation,
) -> None:
    client = await threshold.client()
    files = await threshold.published()
    stolen = threshold.key("offline", "root-1")
    evil = signing.renewed(signing.parse(signing.Root, files["1.root.json"]), now())
    signing.set_keys(evil, "root", [stolen], 1)
    for signers, code in (((stolen,), Code.TUF_INVALID), ((stolen, threshold.key("offline", "root-2")), "")):
        # with a second key the thief would be root: that is what the threshold holds off
        victim = Client(threshold.tmp_path / f"victim{len(signers)}", files["1.root.json"])
        assert refused(victim, {**files, "2.root.json": signing.sign(evil, *signers)}) == code
    await threshold.done("keys", "revoke", stolen.keyid)
    client.follow(await threshold.published())
    known = signing.role_keys(await threshold.root(), "root")
    assert stolen.keyid not in {key.keyid for key in known.keys.values()}
    assert (known.threshold, len(known.keys)) == (2, 3)


async def test_a_lost_root_key_is_replaced_while_enough_others_are_left(threshold: Installation) -> None:
    lost = threshold.home / "keys" / "offline" / "root-3.pem"
    gone = SigningKey.load(lost).keyid
    lost.unlink()
    await threshold.done("keys", "revoke", gone, "--no-replacement")
    known = signing.role_keys(await threshold.root(), "root")
    assert (known.threshold, len(known.keys)) == (2, 2)
    client = await threshold.client()
    client.follow(await threshold.published())


async def test_with_too_few_root_keys_left_a_new_root_is_pinned_by_hand_and_who_has_it_not_keeps_what_it_has(
    broker: Place, tmp_path: Path
) -> None:
    place = Installation(broker, tmp_path, ceremony.Plan(3, 2))
    place.bus = await broker.bus("admin")
    async with place.delivery():
        await place.release("1.0.0")
        client = await place.client()
        assert has(client.follow(await place.published()), "1.0.0")
        for number in (1, 2):
            (place.home / "keys" / "offline" / f"root-{number}.pem").unlink()
        code, said = await place.loopback("keys", "rotate", "targets")
        assert (code, "of the 2 signatures of root version 1 missing" in said) == (1, True)
        said = await place.done("keys", "replace-root", "--root-keys", "2", "--root-threshold", "2")
        assert "by hand" in (await place.loopback("keys", "replace-root", "--help"))[1]
    async with place.delivery():  # restarted, as it says
        files = await eventually(lambda: with_root(place, 2))
        # who was not given the new root refuses everything new, and keeps what was verified
        assert refused(client, files) == Code.TUF_INVALID
        assert has(client.offline(), "1.0.0")
        client.pin((place.home / "tuf" / "root.json").read_bytes())
        assert has(client.follow(files), "1.0.0")
        await place.release("1.1.0")
        assert has(client.follow(await place.published()), "1.1.0")
        # from here on everything goes as ever
        await place.done("keys", "rotate", "targets")
        client.follow(await place.published())
        assert (await place.root()).version == 3


async def test_a_root_that_was_replaced_twice_before_delivery_saw_it_is_published_all_the_same(
    broker: Place, tmp_path: Path
) -> None:
    """The first time with too few keys, say, or it was killed right after; and a thief left a name that is no version."""
    place = Installation(broker, tmp_path)
    place.bus = await broker.bus("admin")
    async with place.delivery():
        client = await place.client()
    await place.put({"x.root.json": b""})
    await place.done("keys", "replace-root")
    await place.done("keys", "replace-root", "--root-keys", "2", "--root-threshold", "2")
    async with place.delivery():
        files = await eventually(lambda: with_root(place, 2))
        client.pin((place.home / "tuf" / "root.json").read_bytes())
        client.follow(files)
        known = signing.role_keys(await place.root(), "root")
        assert (known.threshold, len(known.keys)) == (2, 2)


async def test_root_keys_stolen_at_their_threshold_are_answered_with_a_root_pinned_by_hand(
    broker: Place, tmp_path: Path
) -> None:
    place = Installation(broker, tmp_path)
    place.bus = await broker.bus("admin")
    async with place.delivery():
        await place.release("1.0.0")
        client = await place.client()
    thief = SigningKey.generate()
    evil = signing.renewed(signing.parse(signing.Root, (await place.published())["1.root.json"]), now())
    for role in signing.TOP_ROLES:
        signing.set_keys(evil, role, [thief], 1)
    targets = signing.sign(signing.new_targets(now(), version=9, files={}), thief)
    snapshot = signing.sign(signing.new_snapshot(now(), version=9, files={"targets": targets}), thief)
    timestamp = signing.sign(signing.new_timestamp(now(), version=9, snapshot=snapshot), thief)
    await place.put(
        {
            "2.root.json": signing.sign(evil, place.key("offline", "root"), thief),
            "9.targets.json": targets, "9.snapshot.json": snapshot, "timestamp.json": timestamp,
        }
    )  # fmt: skip
    assert not has(
        client.follow(await place.published()), "1.0.0"
    )  # it reaches its target: the thief is root
    await place.done("keys", "replace-root", "--as-of", "1")
    async with place.delivery():
        files = await eventually(lambda: with_root(place, 3))
        client.pin((place.home / "tuf" / "root.json").read_bytes())
        assert has(client.follow(files), "1.0.0")
        await place.release("1.1.0")
        assert has(client.follow(await place.published()), "1.1.0")
        assert thief.keyid not in {
            key.keyid
            for r in signing.TOP_ROLES
            for key in signing.role_keys(await place.root(), r).keys.values()
        }


async def test_a_new_host_is_led_astray_with_old_root_keys_unless_the_newest_root_is_pinned(
    place: Installation,
) -> None:
    first = (place.home / "tuf" / "root.json").read_bytes()
    stolen = place.key("offline", "root")
    await place.done("keys", "revoke", stolen.keyid)
    evil = signing.renewed(signing.parse(signing.Root, first), now())
    signing.set_keys(evil, "root", [stolen], 1)
    astray = {**await place.published(), "2.root.json": signing.sign(evil, stolen)}
    assert (
        refused(Client(place.tmp_path / "old-pin", first), astray) == ""
    )  # it believes a root that was never ours
    await place.done("keys", "pin")
    pinned = (place.home / "tuf" / "root.json").read_bytes()
    client = Client(place.tmp_path / "new-pin", pinned)
    assert signing.parse(signing.Root, client.follow(astray).metadata("root")).version == 2
    assert client.follow(await place.published()).metadata("root") == pinned
    await place.release("1.1.0")  # and everything here goes on
    async with place.delivery():  # also where delivery starts again with that pin
        assert has(client.follow(await place.published()), "1.1.0")


async def with_root(place: Installation, version: int) -> dict[str, bytes]:
    files = await place.published()
    assert signing.filename("root", version) in files
    return files


async def test_a_foreign_root_is_not_adopted(broker: Place, tmp_path: Path) -> None:
    place = Installation(broker, tmp_path)
    place.bus = await broker.bus("admin")
    async with place.delivery():
        before = await place.published()
    other = tmp_path / "other"
    keys.init_keys(other, SigningKey.generate().public.text)
    (place.home / "tuf" / "root.json").write_bytes((other / "tuf" / "root.json").read_bytes())
    with pytest.raises(BaseExceptionGroup) as caught:
        async with place.delivery():
            pass
    assert caught.group_contains(Refused, match="does not follow the root on the bus")
    assert await place.published() == before
