"""Every key is rotated against the real delivery, and clients that know only the old state follow by themselves."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from support import Place, eventually
from support_keys import Installation, has
from tuf.api.metadata import Targets, Timestamp

from loopback.cli import ceremony, context, keychange, keyring, trustedit, trustpublish
from loopback.cli import home as installation
from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import KeyFile, SigningKey
from loopback.contracts.messages import MetadataPublish
from loopback.contracts.trustdoc import Trust
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.metrics import Metrics
from loopback.services._runtime.settings import read_identity
from loopback.services.delivery.keeper import METRIC, Keeper
from loopback.services.delivery.store import OnlineKeys, Store
from loopback.trust import signing

pytestmark = pytest.mark.broker


@pytest.fixture
async def place(broker: Place, tmp_path: Path) -> AsyncIterator[Installation]:
    """Keys, one of each; two replicas of delivery run."""
    found = Installation(broker, tmp_path)
    found.bus = await broker.bus("admin")
    async with found.delivery(2):
        yield found


@pytest.fixture
async def single(broker: Place, tmp_path: Path) -> AsyncIterator[Installation]:
    """The same with one replica, which knows at once what it published; others learn it within half a minute."""
    found = Installation(broker, tmp_path)
    found.bus = await broker.bus("admin")
    async with found.delivery():
        yield found


async def trust_of(place: Installation) -> Trust:
    async with context.connect(place.context()) as session:
        return (await trustpublish.present(session)).trust


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "firewall"])
async def test_a_rotated_role_is_followed_by_clients_that_know_only_the_old_key(
    role: str, place: Installation
) -> None:
    await place.release("1.0.0")
    client = await place.client()
    before = await place.root()
    said = await place.done("keys", "rotate", role)
    name = role if role in signing.TOP_ROLES else f"module-{role}"
    assert f"{name}-2.pem" in said
    new = SigningKey.load(next((place.home / "keys").rglob(f"{name}-2.pem")))
    files = await place.published()
    ours = client.follow(files)
    # the old key counts for nothing, the new one for its role, and nothing that was published is lost
    after = await place.root()
    delegator = after if role in signing.TOP_ROLES else signing.parse(Targets, ours.metadata("targets"))
    assert [key.keyid for key in signing.role_keys(delegator, name).keys.values()] == [new.keyid]
    assert after.version == before.version + (role in signing.TOP_ROLES)
    assert signing.signed_by(ours.metadata(name), delegator, name) == {signing.tuf_key(new).keyid}
    assert has(ours, "1.0.0")
    # and delivery, which was not restarted, goes on with it
    await place.release("1.1.0")
    assert has(client.follow(await place.published()), "1.1.0")
    # somebody who begins today with the first root follows as well
    assert has((await place.client()).follow(await place.published()), "1.1.0")


async def test_every_role_is_rotated_one_after_the_other_and_then_the_first_key_of_each_counts_nowhere(
    place: Installation,
) -> None:
    client = await place.client()
    first = {path: SigningKey.load(path) for path in (place.home / "keys").rglob("*.pem")}
    for role in (*signing.TOP_ROLES, "firewall"):
        await place.done("keys", "rotate", role)
    for path in first:
        if path.parent.name != "operators":
            path.unlink()
    await place.release("1.0.0")
    assert has(client.follow(await place.published()), "1.0.0")
    shown = json.loads((await place.loopback("keys", "show", "--json"))[1])
    counting = {keyid for role in shown["roles"] for keyid in role["keyids"]}
    assert counting.isdisjoint(key.keyid for key in first.values())
    assert shown["problem"] == ""


async def test_online_keys_that_were_made_where_delivery_is_are_taken_up_without_a_restart(
    place: Installation, tmp_path: Path
) -> None:
    client = await place.client()
    public = (await place.done("keys", "new", tmp_path / "there.pem", "--unencrypted")).splitlines()[0]
    code, said = await place.loopback("keys", "rotate", "timestamp", "--public-key", public)
    # delivery refuses a root whose keys it does not hold: nobody could sign the next timestamp
    assert (code, "keys/online" in said) == (2, True)
    client.follow(await place.published())
    assert (await place.root()).version == 1
    (tmp_path / "there.pem").rename(place.home / "keys" / "online" / "brought.pem")
    await place.done("keys", "rotate", "timestamp", "--public-key", public)
    client.follow(await place.published())
    assert (await place.root()).version == 2


async def test_an_operators_key_is_rotated_and_the_old_one_commands_nothing(single: Installation) -> None:
    old = single.context()
    await single.done("keys", "rotate", "operator", "admin")
    new = single.context()
    assert new.operator_key != old.operator_key
    await single.release("1.0.0")
    installation.begin(single.home, None)
    async with context.connect(old) as session:
        command = MetadataPublish(**context.new_command_fields("global"), metadata={})
        with pytest.raises(Refused) as caught:
            await session.send(command, "delivery")
    assert caught.value.code == Code.SIGNATURE_UNKNOWN_KEY


async def test_activations_key_is_rotated_with_both_keys_counting_until_the_old_one_is_revoked(
    place: Installation,
) -> None:
    creds = place.home / "creds" / "activation.creds"
    old = SigningKey.from_nkey(read_identity(creds).seed)
    stored = envelope.seal(envelope.DESIRED, b"{}", old)  # what hosts may still read from the bus
    said = await place.done("keys", "rotate", "activation")
    new = SigningKey.from_nkey(read_identity(creds).seed)
    assert "restart activation" in said
    trust = await trust_of(place)
    assert set(trust.service_keys["activation"]) == {old.keyid, new.keyid}
    envelope.open_envelope(stored, envelope.DESIRED, trust.service_keys["activation"])
    # the broker knows the new identity without being told
    await place.place.bus("activation")
    await place.done("keys", "revoke", old.keyid)
    trust = await trust_of(place)
    with pytest.raises(Refused):
        envelope.open_envelope(stored, envelope.DESIRED, trust.service_keys["activation"])
    fresh = envelope.seal(envelope.DESIRED, b"{}", new)
    envelope.open_envelope(fresh, envelope.DESIRED, trust.service_keys["activation"])
    code, said = await place.loopback("keys", "revoke", new.keyid)
    assert (code, "activation" in said) == (2, True)  # hosts would believe nobody


async def test_root_and_targets_are_renewed_by_hand_and_nothing_else_changes(place: Installation) -> None:
    await place.release("1.0.0")
    client = await place.client()
    before = await place.published()
    await place.done("keys", "renew", "root", "targets", "firewall")
    ours = client.follow(await place.published())
    assert has(ours, "1.0.0")
    for role, kind in (("targets", Targets), ("module-firewall", Targets)):
        name = signing.filename(role, 1 if role == "targets" else 2)
        old, new = signing.parse(kind, before[name]), signing.parse(kind, ours.metadata(role))
        assert (new.version, new.targets, new.delegations) == (old.version + 1, old.targets, old.delegations)
    assert (await place.root()).version == 2
    code, said = await place.loopback("keys", "renew", "timestamp")
    assert (code, "by itself" in said) == (2, True)


# Signatures one after the other


@pytest.fixture
async def threshold(broker: Place, tmp_path: Path) -> AsyncIterator[Installation]:
    """Two of three root keys and two of two targets keys must sign; each lies in a folder of its own."""
    found = Installation(broker, tmp_path, ceremony.Plan(3, 2, 2, 2))
    found.bus = await broker.bus("admin")
    for path in (found.home / "keys" / "offline").glob("*-*.pem"):
        if path.name.startswith(("root", "targets")):
            (tmp_path / path.stem).mkdir()
            path.rename(tmp_path / path.stem / path.name)
    async with found.delivery():
        yield found


async def test_below_the_threshold_nothing_is_published_and_what_is_missing_is_said(
    threshold: Installation, tmp_path: Path
) -> None:
    client = await threshold.client()
    file = tmp_path / "ann.change"
    code, said = await threshold.loopback(
        "keys", "operator", "ann", "--role", "viewer", "--offline", tmp_path / "targets-1", "--out", file
    )
    assert (code, "1 of the 2 signatures of targets missing" in said) == (1, True)
    code, said = await threshold.loopback("keys", "publish", file)
    assert (code, "1 of the 2 signatures" in said, "loopback keys sign" in said) == (2, True, True)
    # delivery itself refuses it too
    change = trustpublish.read(file)
    async with context.connect(threshold.context()) as session:
        with pytest.raises(Refused) as caught:
            await trustpublish.publish(session, msgspec.structs.replace(change, base={}))
        assert caught.value.code == Code.TUF_INVALID
    # a key that does not count adds nothing, and the second key, on a machine without this home or a bus, completes it
    elsewhere = tmp_path / "elsewhere"
    code, said = await threshold.loopback(
        "keys", "sign", file, "--offline", tmp_path / "root-1", home=elsewhere
    )
    assert (code, "no key at hand counts" in said) == (2, True)
    code, said = await threshold.loopback(
        "keys", "sign", file, "--offline", tmp_path / "targets-2", home=elsewhere
    )
    assert (code, "): *: viewer" in said, "every signature is there" in said) == (0, True, True)
    await threshold.done("keys", "publish", file)
    client.follow(await threshold.published())
    assert "ann" in {o.name for o in (await trust_of(threshold)).document.operators}


async def test_a_root_is_signed_by_the_thresholds_of_the_old_and_of_the_new_one(
    threshold: Installation, tmp_path: Path
) -> None:
    client = await threshold.client()
    going = SigningKey.load(tmp_path / "root-3" / "root-3.pem")
    file, fresh = tmp_path / "root.change", tmp_path / "fresh"
    fresh.mkdir()
    code, said = await threshold.loopback(
        "keys", "rotate", "root", "--key", going.keyid[:12], "--out", file, "--offline", fresh
    )
    # the new key signed for the new root, but not for the old one
    assert (code, "2 of the 2 signatures of root version 1 missing" in said) == (1, True)
    assert "1 of the 2 signatures of root version 2 missing" in said
    for medium in ("root-1", "root-2"):
        assert (await threshold.loopback("keys", "sign", file, "--offline", tmp_path / medium))[0] == 0
    await threshold.done("keys", "publish", file)
    client.follow(await threshold.published())
    after = signing.role_keys(await threshold.root(), "root")
    assert (after.threshold, len(after.keys)) == (2, 3)
    assert going.keyid not in {key.keyid for key in after.keys.values()}


async def test_a_change_that_was_overtaken_is_refused_and_says_so(
    threshold: Installation, tmp_path: Path
) -> None:
    media = ["--offline", tmp_path / "targets-1", "--offline", tmp_path / "targets-2"]
    await threshold.loopback(
        "keys", "operator", "ann", "--role", "viewer", *media, "--out", tmp_path / "late.change"
    )
    await threshold.done("keys", "renew", "targets", *media)
    code, said = await threshold.loopback("keys", "publish", tmp_path / "late.change")
    assert (code, "tuf.conflict" in said, "sign again" in said) == (2, True, True)


# Renewal and warnings


@pytest.fixture
async def store(broker: Place, tmp_path: Path) -> tuple[Installation, Bus, Store]:
    found = Installation(broker, tmp_path)
    found.bus = await broker.bus("admin")
    bus = await broker.bus("delivery")
    pinned = (found.home / "tuf" / "root.json").read_bytes()
    kept = Store(bus, OnlineKeys.load(found.home), pinned, tmp_path / "scratch")
    assert await kept.import_seed(found.home / "tuf" / "seed")
    return found, bus, kept


async def test_a_first_repository_that_a_power_cut_left_half_is_not_published(
    broker: Place, tmp_path: Path
) -> None:
    found = Installation(broker, tmp_path)
    found.bus = await broker.bus("admin")
    pinned = (found.home / "tuf" / "root.json").read_bytes()
    kept = Store(await broker.bus("delivery"), OnlineKeys.load(found.home), pinned, tmp_path / "scratch")
    seed = found.home / "tuf" / "seed"
    whole = {path: path.read_bytes() for path in seed.rglob("*") if path.is_file()}
    for path, data in whole.items():
        path.write_bytes(b"")
        with pytest.raises(Refused) as caught:
            await kept.import_seed(seed)
        assert caught.value.code == Code.TUF_INVALID
        assert await found.published() == {}, f"without {path.name}"
        path.write_bytes(data)
    assert await kept.import_seed(seed)


async def test_a_first_repository_that_waited_longer_than_its_timestamp_lives_is_published_and_renewed(
    broker: Place, tmp_path: Path
) -> None:
    found = Installation(broker, tmp_path)
    found.bus = await broker.bus("admin")
    shutil.rmtree(found.home / "tuf")
    activation = SigningKey.from_nkey(read_identity(found.home / "creds" / "activation.creds").seed)
    ceremony.init_keys(found.home, activation.public.text, now=lambda: datetime.now(UTC) - timedelta(days=10))
    async with found.delivery():
        await eventually(lambda: len(found.keepers) == 1)
        await found.keepers[0].look()
        await found.client()


async def test_expiry_is_told_in_log_and_metric_long_before_it_bites_and_not_over_and_over(
    store: tuple[Installation, Bus, Store],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    _, bus, kept = store
    start, passed = await bus.now(), timedelta()

    async def later() -> datetime:
        return start + passed

    monkeypatch.setattr(bus, "now", later)
    metrics = Metrics("delivery", "1", "")
    keeper = Keeper(
        kept, tmp_path / "inbox", metrics.provider.get_meter("test"), logging.getLogger("keeper"),
        clock=lambda: passed.total_seconds(),
    )  # fmt: skip

    def gauge(role: str) -> float:
        lines = metrics.exposition().decode().splitlines()
        return float(
            next(line for line in lines if line.startswith(METRIC) and f'"{role}"' in line).split()[-1]
        )

    async def said_after(time: timedelta) -> str:
        nonlocal passed
        passed = time
        caplog.clear()
        await keeper.look()
        return caplog.text

    assert "expires" not in await said_after(timedelta(days=300))
    # renewed at once, though they had expired 299 days ago
    assert gauge("timestamp") == pytest.approx(86400, abs=60)
    assert gauge("root") == pytest.approx(430 * 86400, abs=60)
    said = await said_after(timedelta(days=336))
    assert "targets expires in 29 days; sign it anew: 'loopback keys renew targets'" in said
    assert "module-firewall expires in 29 days" in said
    assert "root" not in said
    assert "expires" not in await said_after(timedelta(days=336, hours=1))  # said a moment ago
    assert "targets expires" in await said_after(timedelta(days=336, hours=7))
    assert "root expires in 89 days" in await said_after(timedelta(days=641))
    assert "targets has expired" in caplog.text
    assert gauge("targets") < 0
    metrics.shutdown()


async def test_online_metadata_is_warned_of_when_renewal_has_failed_for_a_quarter_of_its_life(
    store: tuple[Installation, Bus, Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    place, bus, kept = store
    start, passed = await bus.now(), timedelta()

    async def later() -> datetime:
        return start + passed

    monkeypatch.setattr(bus, "now", later)
    metrics = Metrics("delivery", "1", "")
    keeper = Keeper(kept, tmp_path / "inbox", metrics.provider.get_meter("test"), logging.getLogger("keeper"))
    for name in ("snapshot", "timestamp"):  # the medium is gone, or somebody cleaned up
        (place.home / "keys" / "online" / f"{name}.pem").rename(tmp_path / f"{name}.pem")
    kept._keys._look()
    for hours, warned in ((13, False), (17, False), (19, True)):
        passed = timedelta(hours=hours)
        caplog.clear()
        await keeper.look()
        assert "keys/online" in caplog.text  # each failure is logged
        assert ("timestamp expires in 5.0 hours" in caplog.text) is warned
    for name in ("snapshot", "timestamp"):
        (tmp_path / f"{name}.pem").rename(place.home / "keys" / "online" / f"{name}.pem")
    caplog.clear()
    await keeper.look()  # found again without a restart
    assert "expires" not in caplog.text
    files = await place.published()
    assert signing.parse(Timestamp, files["timestamp.json"]).version == 2
    metrics.shutdown()


# Rules


async def test_a_regulated_workspace_needs_a_second_person_and_its_rules_reach_the_trust_document(
    place: Installation, tmp_path: Path
) -> None:
    code, said = await place.loopback("keys", "workspace", "prod", "--regulated")
    assert (code, "nobody could approve" in said, "--role approver" in said) == (2, True, True)
    public = (await place.done("keys", "new", tmp_path / "eve.pem", "--unencrypted")).splitlines()[0]
    await place.done(
        "keys", "operator", "eve", "--role", "approver", "--workspace", "prod", "--public-key", public
    )
    family = place.key("offline", "module-firewall").keyid
    said = await place.done(
        "keys", "workspace", "prod", "--regulated", "--publisher", f"firewall={family[:12]}",
        "--floor", "firewall=1.2.0@2027-01-31T00:00:00Z",
    )  # fmt: skip
    assert "admin is admin and approver in prod" in said
    trust = await trust_of(place)
    rules = trust.rules("prod")
    assert (rules.regulated, rules.publishers) == (True, {"firewall": (family,)})
    assert (rules.floors["firewall"].version, rules.floors["firewall"].not_before) == (
        "1.2.0", datetime.fromisoformat("2027-01-31T00:00:00+00:00"),
    )  # fmt: skip
    # she may do nothing elsewhere, and the last who could approve cannot be taken away
    eve = next(k for k, o in trust.operators.items() if o.name == "eve")
    assert (set(trust.roles(eve, "prod")), set(trust.roles(eve, "lab"))) == ({"approver"}, set())
    code, said = await place.loopback("keys", "operator", "eve", "--remove")
    assert (code, "nobody could approve" in said) == (2, True)
    said = await place.done(
        "keys", "operator", "eve", "--role", "approver", "--role", "releaser", "--workspace", "prod"
    )
    assert "eve may both start rollouts and approve them in prod" in said
    # the rules are taken back one by one
    await place.done(
        "keys", "workspace", "prod", "--no-regulated", "--publisher", "firewall=", "--floor", "firewall="
    )
    assert (await trust_of(place)).document.workspaces == {}
    for wrong in (("--floor", "firewall=1.x"), ("--floor", "firewall"), ("--publisher", "firewall"),
                  ("--floor", "firewall=1.0@2027-01-31T00:00:00"), ("--publisher", "firewall=abc"), ()):  # fmt: skip
        assert (await place.loopback("keys", "workspace", "prod", *wrong))[0] == 2


async def test_pins_of_a_family_key_follow_its_rotation_and_its_revocation(
    place: Installation, tmp_path: Path
) -> None:
    old = place.key("offline", "module-firewall").keyid
    other = "a" * 64
    await place.done(
        "keys", "workspace", "prod", "--publisher", f"firewall={old}", "--publisher", f"firewall={other}",
        "--publisher", f"edge={old}",
    )  # fmt: skip
    await place.done("keys", "rotate", "firewall")
    new = place.key("offline", "module-firewall-2").keyid
    pins = (await trust_of(place)).rules("prod").publishers
    # another module's pin of the same key is not this family's business
    assert pins == {"firewall": (other, new), "edge": (old,)}
    await place.done("keys", "revoke", new, "--keep-all")
    third = place.key("offline", "module-firewall-3").keyid
    assert (await trust_of(place)).rules("prod").publishers["firewall"] == (other, third)


async def test_an_installation_with_encrypted_keys_asks_for_them_wherever_one_signs(
    broker: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "passphrase"
    secret.touch(0o600)
    secret.write_text("correct horse battery\n")
    found = Installation(broker, tmp_path, passphrase=b"correct horse battery")
    found.bus = await broker.bus("admin")
    async with found.delivery():
        code, said = await found.loopback("keys", "rotate", "firewall")
        assert (code, "passphrase" in said, keyring.FILE_VARIABLE in said) == (2, True, True)
        client = await found.client()
        monkeypatch.setenv(keyring.FILE_VARIABLE, str(secret))
        for role in ("root", "targets", "snapshot", "firewall", "operator"):
            await found.done("keys", "rotate", role, *(["admin"] if role == "operator" else []))
        await found.done("keys", "operator", "ann", "--role", "viewer")
        await found.done("module", "publish", found.package("1.0.0"))
        assert has(client.follow(await found.published()), "1.0.0")
        files = {p: KeyFile.read(p) for p in (found.home / "keys").rglob("*.pem")}
        plain = {path.parent.name for path, file in files.items() if not file.encrypted}
        assert (len(files), plain) == (12, {"online"})


async def test_delivery_refuses_what_the_command_would_never_sign(place: Installation) -> None:
    """A trust document made by other means: regulated with nobody to approve, and two operators who share a key."""
    async with context.connect(place.context()) as session:
        present = await trustpublish.present(session)
        document = present.trust.document
        twin = msgspec.structs.replace(document.operators[0], name="twin")
        for wrong, said in (
            ({"workspaces": {"prod": {"regulated": True}}}, "nobody could approve"),
            ({"operators": (document.operators[0], twin)}, "one key to two operators"),
            ({"operators": ()}, "nobody would be admin"),
            ({"services": {}}, "no key of activation"),
        ):
            changed = msgspec.convert(
                {**msgspec.to_builtins(document), **msgspec.to_builtins(wrong)}, type(document)
            )
            change = trustpublish.sign_at_hand(place.home, trustedit.change(present, changed, "wrong"))
            with pytest.raises(Refused, match=said):
                await trustpublish.publish(session, change)
    assert keychange.locate(present, place.key("offline", "root").keyid[:8]).roles == ("root",)
