"""Each key lost or stolen: what a thief can do with it, and the way back (docs/keys.md). Real delivery, real TUF clients."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from support import Place, eventually
from support_keys import Client, Installation, has, now, refused
from tuf.api.metadata import Targets, Timestamp

from loopback.cli import context, keychange, keys, module, trustpublish
from loopback.cli import home as installation
from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import Operator, Role
from loopback.services.delivery import decide
from loopback.trust import signing, standing
from loopback.trust.changes import Change
from loopback.trust.repository import target_path

pytestmark = pytest.mark.broker

FAR = 2_000_000_000  # a version that honest counting never reaches


def frozen(place: Installation, files: dict[str, bytes], **versions: int) -> dict[str, bytes]:
    """What a thief of the online keys signs: the present files, under versions of their choice."""
    timestamp = signing.parse(Timestamp, files["timestamp.json"])
    snapshot = signing.parse(signing.Snapshot, files[f"{timestamp.snapshot_meta.version}.snapshot.json"])
    for role, version in versions.items():
        if role not in ("snapshot", "timestamp"):
            snapshot.meta[f"{role}.json"].version = version
            snapshot.meta[f"{role}.json"].length = snapshot.meta[f"{role}.json"].hashes = None
    snapshot.version = versions.get("snapshot", snapshot.version + 1)
    data = signing.sign(snapshot, place.key("online", "snapshot"))
    fresh = signing.new_timestamp(
        now(), version=versions.get("timestamp", timestamp.version + 1), snapshot=data
    )
    return {
        signing.filename("snapshot", snapshot.version): data,
        "timestamp.json": signing.sign(fresh, place.key("online", "timestamp")),
    }


async def running_up_versions(place: Installation) -> Client:
    """A thief of both online keys and of delivery's credentials: a client of theirs can follow nobody else any longer."""
    client = await place.client()
    honest = await place.published()
    await place.put(frozen(place, honest, timestamp=FAR, snapshot=FAR, targets=FAR))
    assert refused(
        client, await place.published()
    )  # there are no such targets; but their versions are remembered
    assert refused(client, honest) == Code.TUF_INVALID  # what everybody else signs is a rollback now
    return client


async def test_stolen_online_keys_hide_news_and_run_up_versions_until_they_are_revoked(
    place: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await running_up_versions(place)
    code, said = await place.loopback("keys", "show")
    assert (code, f"{FAR}.targets.json is not in the repository" in said) == (1, True)
    # Without the recovery the new keys count on from what the thief signed, and nothing is ever published again.
    with monkeypatch.context() as patched:
        patched.setattr(decide, "replaces_online", lambda _old, _new: False)
        code, said = await place.loopback("keys", "revoke", place.key("online", "timestamp").keyid)
        assert code == 2
    assert refused(client, await place.published())
    # whoever has the broker could have said so of what they published: the new keys stay, and are said to
    assert all(f"kept {path}" in said for path in (place.home / "keys").rglob("*-2.pem"))
    said = await place.done("keys", "revoke", place.key("online", "timestamp").keyid)
    assert "no host accepts the repository as it is now" in said
    files = await place.published()
    assert has(client.follow(files), "1.0.0")
    assert signing.parse(Timestamp, files["timestamp.json"]).version < FAR
    await place.release("1.1.0")
    assert has(client.follow(await place.published()), "1.1.0")
    # both were replaced, since they lie together: what the thief signs counts for nothing
    forged = frozen(place, await place.published())
    assert refused(client, {**await place.published(), **forged}) == Code.TUF_INVALID
    # somebody who saw nothing of it follows as well
    assert has((await place.client()).follow(await place.published()), "1.1.0")


async def test_delivery_that_was_restarted_amid_stolen_online_keys_takes_the_way_back_from_its_folder(
    broker: Place, tmp_path: Path
) -> None:
    """It has no trust document to judge a command by then: the change comes as a file, with the signatures that it needs."""
    place = Installation(broker, tmp_path)
    place.bus = await broker.bus("admin")
    async with place.delivery():
        await place.release("1.0.0")
        client = await running_up_versions(place)
    stolen = place.key("online", "snapshot").keyid
    file = tmp_path / "recovery.change"
    code, said = await place.loopback("keys", "revoke", stolen, "--out", file)
    assert (code, "every signature is there" in said) == (1, True)
    await place.done("keys", "publish", file, "--inbox")
    async with place.delivery():
        done = place.home / "tuf" / "inbox" / "recovery.done"
        await eventually(done.exists)
        assert has(client.follow(await place.published()), "1.0.0")
        await place.release("1.1.0")
        assert has(client.follow(await place.published()), "1.1.0")


async def test_lost_online_keys_are_replaced_although_delivery_cannot_start_without_them(
    broker: Place, tmp_path: Path
) -> None:
    place = Installation(broker, tmp_path)
    place.bus = await broker.bus("admin")
    async with place.delivery():
        await place.release("1.0.0")
        client = await place.client()
    lost = place.key("online", "snapshot").keyid
    for path in (place.home / "keys" / "online").iterdir():
        path.unlink()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with place.delivery():
            pass
    assert caught.group_contains(Refused, match="no key file")
    file = tmp_path / "lost.change"
    await place.loopback("keys", "revoke", lost, "--out", file)
    await place.done("keys", "publish", file, "--inbox")
    async with place.delivery():
        await eventually((place.home / "tuf" / "inbox" / "lost.done").exists)
        await place.release("1.1.0")
        assert has(client.follow(await place.published()), "1.1.0")


async def test_a_stolen_timestamp_key_alone_installs_nothing(place: Installation) -> None:
    client = await place.client()
    files = await place.published()
    evil = signing.sign(
        signing.new_snapshot(now(), version=50, files={"targets": files["1.targets.json"]}),
        SigningKey.generate(),
    )
    fresh = signing.new_timestamp(now(), version=50, snapshot=evil)
    forged = {
        "50.snapshot.json": evil,
        "timestamp.json": signing.sign(fresh, place.key("online", "timestamp")),
    }
    assert refused(client, {**files, **forged}) == Code.TUF_INVALID
    # it freezes: an old state, signed daily, hides what is new
    await place.release("1.1.0")
    old = dict(files)
    again = signing.parse(Timestamp, files["timestamp.json"])
    again.version, again.expires = 60, now().replace(microsecond=0) + timedelta(days=1)
    old["timestamp.json"] = signing.sign(again, place.key("online", "timestamp"))
    assert not has((await fresh_client(place, old)), "1.1.0")
    await place.done("keys", "revoke", place.key("online", "timestamp").keyid)
    assert refused(await place.client(), {**await place.published(), "timestamp.json": old["timestamp.json"]})


async def fresh_client(place: Installation, files: dict[str, bytes]):
    """Somebody who sees nothing but these files."""
    found = Client(place.tmp_path / f"fresh-{len(files)}", (place.home / "tuf" / "root.json").read_bytes())
    return found.follow(files)


async def bad_release(place: Installation, version: str) -> SigningKey:
    """A thief of the family's key, who also has a releaser's, publishes through delivery. The stolen key."""
    await place.release(version)
    return place.key("offline", "module-firewall")


async def test_a_stolen_family_key_is_replaced_good_releases_are_signed_anew_and_the_bad_one_is_dropped(
    place: Installation,
) -> None:
    client = await place.client()
    stolen = await bad_release(place, "6.6.6")
    assert has(client.follow(await place.published()), "6.6.6")  # the attack reaches its target
    code, said = await place.loopback("keys", "revoke", stolen.keyid)
    assert (code, "firewall@6.6.6" in said, "--drop" in said) == (2, True, True)
    code, said = await place.loopback("keys", "revoke", stolen.keyid, "--drop", "firewall@9.9.9")
    assert (code, "no published release" in said) == (2, True)
    await place.done("keys", "revoke", stolen.keyid, "--drop", "firewall@6.6.6")
    ours = client.follow(await place.published())
    assert (has(ours, "1.0.0"), has(ours, "6.6.6")) == (True, False)
    # the thief signs once more: delivery refuses it, and so does a client to which it is served
    targets = signing.parse(Targets, ours.metadata("module-firewall"))
    targets.version += 1
    path = target_path("firewall", "6.6.7")
    targets.targets[path] = signing.release(path, "0" * 64, 1, "6.6.7", "stable")
    evil = {signing.filename("module-firewall", targets.version): signing.sign(targets, stolen)}
    async with context.connect(place.context()) as session:
        with pytest.raises(Refused) as caught:
            await keys.publish(session, keys.Change(metadata=evil))
    assert caught.value.code == Code.TUF_INVALID
    await place.release("1.1.0")
    assert has(client.follow(await place.published()), "1.1.0")


async def test_a_host_without_a_connection_goes_on_with_what_it_verified_while_a_family_key_is_replaced(
    place: Installation,
) -> None:
    client = await place.client()
    assert has(client.follow(await place.published()), "1.0.0")
    await place.done("keys", "revoke", place.key("offline", "module-firewall").keyid, "--keep-all")
    assert has(client.offline(), "1.0.0")
    assert has(client.follow(await place.published()), "1.0.0")


async def test_a_family_whose_versions_were_run_up_is_counted_anew_with_new_online_keys(
    place: Installation,
) -> None:
    """A thief of the family's key, of both online keys and of delivery's credentials."""
    client = await place.client()
    stolen = place.key("offline", "module-firewall")
    files = await place.published()
    evil = signing.new_targets(now(), version=FAR, files={})
    await place.put(
        {
            signing.filename("module-firewall", FAR): signing.sign(evil, stolen),
            **frozen(place, files, **{"module-firewall": FAR}),
        }
    )
    assert not has(client.follow(await place.published()), "1.0.0")
    assert refused(client, files) == Code.TUF_INVALID
    # the releases that stand are those of the newest plausible file, which the person names good
    said = await place.done(
        "keys", "revoke", stolen.keyid, "--keep-all", "--reset-versions", "--as-of", "firewall=2"
    )
    assert "1.0.0" in said
    ours = client.follow(await place.published())
    assert has(ours, "1.0.0")
    assert signing.parse(Targets, ours.metadata("module-firewall")).version < standing.PLAUSIBLE


async def test_nobody_can_use_up_versions_through_delivery(place: Installation) -> None:
    async with context.connect(place.context()) as session:
        present = await trustpublish.present(session)
        for version in (4, FAR):
            targets = signing.parse(Targets, present.families["module-firewall"])
            targets.version = version
            data = signing.sign(targets, place.key("offline", "module-firewall"))
            with pytest.raises(Refused) as caught:
                name = signing.filename("module-firewall", version)
                await keys.publish(session, keys.Change(metadata={name: data}))
            assert (caught.value.code, "next version is 3" in caught.value.reason) == (
                Code.TUF_CONFLICT,
                True,
            )


async def test_targets_keys_stolen_below_their_threshold_sign_nothing_and_are_replaced(
    threshold: Installation,
) -> None:
    client = await threshold.client()
    stolen = threshold.key("offline", "targets-2")
    files = await threshold.published()
    targets = signing.parse(Targets, files["1.targets.json"])
    targets.version = 2
    evil = {"2.targets.json": signing.sign(targets, stolen)}
    current = {"targets": evil["2.targets.json"], "module-firewall": files["1.module-firewall.json"]}
    snapshot = signing.sign(
        signing.new_snapshot(now(), version=2, files=current), threshold.key("online", "snapshot")
    )
    timestamp = signing.new_timestamp(now(), version=2, snapshot=snapshot)
    served = {
        **files, **evil, "2.snapshot.json": snapshot,
        "timestamp.json": signing.sign(timestamp, threshold.key("online", "timestamp")),
    }  # fmt: skip
    assert refused(client, served) == Code.TUF_INVALID
    # with the thresholds's second key it would have been accepted: that is what the threshold holds off
    both = signing.sign(targets, stolen, threshold.key("offline", "targets-1"))
    accepted = resigned(threshold, files, both)
    assert refused(Client(threshold.tmp_path / "naive", files["1.root.json"]), {**files, **accepted}) == ""
    await threshold.done("keys", "revoke", stolen.keyid)
    client = await threshold.client()
    client.follow(await threshold.published())
    known = signing.role_keys(await threshold.root(), "targets")
    assert stolen.keyid not in {key.keyid for key in known.keys.values()}
    assert (known.threshold, len(known.keys)) == (2, 3)
    third = signing.sign(targets, stolen, threshold.key("offline", "targets-1"))
    assert signing.signed_by(third, await threshold.root(), "targets") == {
        signing.tuf_key(threshold.key("offline", "targets-1")).keyid
    }


def resigned(place: Installation, files: dict[str, bytes], targets: bytes) -> dict[str, bytes]:
    """These targets under a snapshot and a timestamp of the online keys."""
    current = {"targets": targets, "module-firewall": files["1.module-firewall.json"]}
    snapshot = signing.sign(
        signing.new_snapshot(now(), version=2, files=current), place.key("online", "snapshot")
    )
    timestamp = signing.new_timestamp(now(), version=2, snapshot=snapshot)
    return {
        "2.targets.json": targets,
        "2.snapshot.json": snapshot,
        "timestamp.json": signing.sign(timestamp, place.key("online", "timestamp")),
    }


async def test_stolen_targets_keys_make_an_operator_until_they_are_revoked(place: Installation) -> None:
    """At their threshold: with the online keys as well, every host believes the thief's trust document."""
    client = await place.client()
    files = await place.published()
    async with context.connect(place.context()) as session:
        present = await trustpublish.present(session)
    mallory = Operator("mallory", SigningKey.generate().public.text, {"*": (Role.ADMIN,)})
    document = msgspec.structs.replace(present.trust.document, version=9, operators=(mallory,))
    content = msgspec.json.encode(document)
    targets = signing.parse(Targets, files["1.targets.json"])
    targets.version = FAR
    targets.targets[trustdoc.TARGET] = signing.target(trustdoc.TARGET, content)
    async with context.connect(place.context()) as session:
        await session.put_blob(content)
    await place.put(
        {
            signing.filename("targets", FAR): signing.sign(targets, place.key("offline", "targets")),
            **frozen(place, files, targets=FAR),
        }
    )
    trusted = client.follow(await place.published())
    assert [o.name for o in trusted.trust_document(lambda _d, _s: content).document.operators] == ["mallory"]
    # the way back builds on the last trust document that is known to be good
    stolen = place.key("offline", "targets").keyid
    file = place.tmp_path / "back.change"
    code, said = await place.loopback(
        "keys", "revoke", stolen, "--reset-versions", "--as-of", "targets=1", "--out", file
    )
    assert (code, "admin (" in said, "mallory" in said) == (1, True, False), said
    await place.done("keys", "publish", file, "--inbox")
    await place.keepers[0].look()
    found = client.follow(await place.published())
    info = found.find(trustdoc.TARGET)
    assert info is not None
    async with context.connect(place.context()) as session:
        back = await session.blob(info.sha256, info.length)
    assert [o.name for o in found.trust_document(lambda _d, _s: back).document.operators] == ["admin"]


@pytest.mark.parametrize("name", ["targets", "module-firewall"])
async def test_a_lost_targets_or_family_key_is_replaced_by_those_above_it(
    name: str, place: Installation
) -> None:
    lost = place.key("offline", name).keyid
    keys.offline_key(place.home, name).unlink()
    client = await place.client()
    arguments = ["--keep-all"] if name.startswith("module-") else []
    await place.done("keys", "revoke", lost, *arguments)
    assert has(client.follow(await place.published()), "1.0.0")
    await place.release("1.1.0")
    assert has(client.follow(await place.published()), "1.1.0")


async def test_the_last_admins_lost_key_is_replaced_by_those_who_have_the_targets_keys(
    place: Installation, tmp_path: Path
) -> None:
    keys.operator_key(place.home, "admin").unlink()
    file = tmp_path / "admin.change"
    code, said = await place.loopback("keys", "rotate", "operator", "admin", "--out", file)
    assert (code, "every signature is there" in said) == (1, True), said
    code, said = await place.loopback("keys", "publish", file)
    assert code == 2  # there is no key to command with
    await place.done("keys", "publish", file, "--inbox")
    await place.keepers[0].look()
    assert (place.home / "tuf" / "inbox" / "admin.done").exists()
    new = place.context()._replace(operator_key=place.home / "keys" / "operators" / "admin.pem")
    installation.begin(place.home, None)
    async with context.connect(new) as session:
        await module.publish(session, place.package("1.1.0"))


async def test_a_change_in_the_folder_that_is_not_signed_enough_is_refused_and_put_aside(
    place: Installation, tmp_path: Path
) -> None:
    async with context.connect(place.context()) as session:
        present = await trustpublish.present(session)
    inbox = place.home / "tuf" / "inbox"
    trustpublish.write(inbox / "unsigned.change", keychange.renew(present, ["targets"]))
    (inbox / "nonsense.change").write_text("{}")
    for name, data in (("torn", b"{"), ("other", b'{"signed": 1, "signatures": []}')):
        for file in ("2.targets.json", "2.root.json", "2.module-firewall.json"):
            change = Change(metadata={file: data})
            trustpublish.write(inbox / f"{name}-{file[2:-5]}.change", change)
    before = await place.published()
    await place.keepers[0].look()
    assert {path.suffix for path in inbox.iterdir()} == {".refused"}
    assert len(list(inbox.iterdir())) == 8
    assert await place.published() == before


async def test_replicas_on_one_home_take_a_change_from_the_folder_once(broker: Place, tmp_path: Path) -> None:
    place = Installation(broker, tmp_path)
    place.bus = await broker.bus("admin")
    async with place.delivery(2):
        for version in (2, 3, 4):
            async with context.connect(place.context()) as session:
                present = await trustpublish.present(session)
            change = trustpublish.sign_at_hand(place.home, keychange.renew(present, ["root"]))
            trustpublish.put_into_inbox(place.home, change, f"renew-{version}")
            await asyncio.gather(*(keeper.look() for keeper in place.keepers))
            assert (await place.root()).version == version
    assert {path.suffix for path in (place.home / "tuf" / "inbox").iterdir()} == {".done"}
