"""The TUF client against a repository in memory: what it follows, and the attacks of TUF §1.5.2 that it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.signer import CryptoSigner, SSlibKey
from support_trust import NOW, Client, MemoryRepository, archive, refusal
from tuf.api.metadata import Metadata

from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.trust import signing
from loopback.trust.repository import TrustedRepository, key_id, target_path


def test_a_published_release_is_found_with_its_length_digest_and_channel(
    repository: MemoryRepository, client: Client
) -> None:
    data = archive()
    path = repository.add_release(data, "1.0.0", "canary")
    repository.publish()
    found = client().find(path)
    assert found is not None
    assert (found.length, found.custom) == (len(data), {"channel": "canary", "version": "1.0.0"})
    assert client().find(target_path("firewall", "9.9.9")) is None


def test_a_release_says_by_our_own_key_ids_who_signed_it(
    repository: MemoryRepository, client: Client
) -> None:
    """Only keys whose signatures hold and whom the delegation names: neither strangers nor broken signatures count."""
    first, second = repository.keys[repository.role], SigningKey.generate()
    stranger, broken = SigningKey.generate(), SigningKey.generate()
    delegations = repository.targets.delegations
    assert delegations is not None and delegations.roles is not None
    for key in (second, broken):
        delegations.keys[signing.tuf_key(key).keyid] = signing.tuf_key(key)
        delegations.roles[repository.role].keyids.append(signing.tuf_key(key).keyid)
    repository.targets.version += 1
    repository.add_release(archive(), "1.0.0")
    repository.publish()
    signed = signing.sign(repository.releases, first, second, stranger, broken)
    held = Metadata.from_bytes(signed).signatures[signing.tuf_key(broken).keyid].signature
    signed = signed.replace(held.encode(), held[:-2].encode() + (b"00" if held[-2:] != "00" else b"11"))
    name = f"{repository.releases.version}.{repository.role}.json"
    repository.files[name] = signed
    repository.publish_snapshot(NOW, {"targets": repository.files["2.targets.json"], repository.role: signed})
    found = client().release("firewall", "1.0.0")
    assert found is not None
    assert found.signers == tuple(sorted((first.public.keyid, second.public.keyid)))
    offline = client()
    offline.load()
    again = offline.release("firewall", "1.0.0")
    assert again is not None and again.signers == found.signers


def test_a_target_of_the_top_level_is_signed_by_the_targets_key(
    repository: MemoryRepository, client: Client
) -> None:
    found = client().find(trustdoc.TARGET)
    assert found is not None and found.signers == (repository.keys["targets"].public.keyid,)


def test_a_key_has_one_id_however_it_is_written() -> None:
    """Ed25519 keys have the id that pins and trust documents use; a PEM's line ends and TUF's own ids make no difference."""
    key = SigningKey.generate()
    assert key_id(signing.tuf_key(key)) == key.public.keyid
    for made in (CryptoSigner.generate_ecdsa(), CryptoSigner.generate_rsa()):
        public = made.public_key
        spki = load_pem_public_key(public.keyval["public"].encode()).public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        )
        assert key_id(public) == hashlib.sha256(spki).hexdigest()
        other = SSlibKey(
            "another-id",
            public.keytype,
            public.scheme,
            {"public": public.keyval["public"].replace("\n", "\r\n")},
        )
        assert key_id(other) == key_id(public)
    odd = SSlibKey("x", "odd", "odd", {"public": "?"})
    assert re.fullmatch("[0-9a-f]{64}", key_id(odd))


def test_the_trust_document_is_checked_against_its_signed_digest(
    repository: MemoryRepository, client: Client
) -> None:
    trust = client().trust_document(lambda _digest, _size: repository.trust)
    assert [o.name for o in trust.document.operators] == ["admin"]
    forged = repository.trust.replace(b"admin", b"mallo", 1)
    assert refusal(lambda: client().trust_document(lambda _digest, _size: forged)) == Code.TUF_INVALID


def test_what_was_verified_once_is_found_again_without_a_network(
    repository: MemoryRepository, client: Client
) -> None:
    path = repository.add_release(archive(), "1.0.0")
    repository.publish()
    assert client().find(path) is not None
    repository.files.clear()
    offline = client()
    assert refusal(offline.refresh) == Code.TUF_UNREACHABLE
    offline.load()
    assert offline.find(path) is not None


def test_a_fetch_that_raises_is_unreachable_and_leaves_what_was_trusted(
    repository: MemoryRepository, client: Client, tmp_path: Path
) -> None:
    client().refresh()

    def broken(_: str) -> bytes | None:
        raise ConnectionError("the broker is gone")

    again = TrustedRepository(tmp_path / "tuf", broken, now=lambda: NOW)
    with pytest.raises(Refused, match="the broker is gone") as caught:
        again.refresh()
    assert caught.value.code == Code.TUF_UNREACHABLE
    again.load()


def test_rollback_of_the_timestamp_is_refused(repository: MemoryRepository, client: Client) -> None:
    old = repository.files["timestamp.json"]
    repository.publish()
    client().refresh()
    repository.files["timestamp.json"] = old
    assert refusal(client().refresh) == Code.TUF_INVALID


def test_rollback_of_a_modules_releases_is_refused(repository: MemoryRepository, client: Client) -> None:
    before = {
        "targets": repository.files["1.targets.json"],
        repository.role: repository.files[f"1.{repository.role}.json"],
    }
    repository.add_release(archive(), "1.0.0")
    repository.publish()
    client().refresh()
    repository.publish_snapshot(NOW, before)  # fresh, signed with the real online keys, but of old releases
    assert refusal(client().refresh) == Code.TUF_INVALID


def test_a_frozen_repository_expires(repository: MemoryRepository, client: Client) -> None:
    client().refresh()
    late = NOW + signing.TIMESTAMP_LIFE + timedelta(seconds=1)
    assert refusal(client(late).refresh) == Code.TUF_EXPIRED
    repository.publish(late)
    client(late).refresh()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "module-firewall"])
def test_without_a_network_what_expired_is_called_expired_and_not_out_of_reach(
    repository: MemoryRepository, client: Client, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """Else a host that is cut off would think that nothing but its connection is wrong, and go on."""
    path = repository.add_release(archive(), "1.0.0")
    lives = dict.fromkeys(("timestamp", "snapshot", "targets", "module-firewall"), timedelta(days=100))
    lives[role] = timedelta(days=2)
    monkeypatch.setattr(signing, "TIMESTAMP_LIFE", lives["timestamp"])
    monkeypatch.setattr(signing, "SNAPSHOT_LIFE", lives["snapshot"])
    repository.targets.expires = NOW + lives["targets"]
    repository.releases.expires = NOW + lives["module-firewall"]
    repository.publish()
    assert client().find(path) is not None

    def look(days: int) -> None:
        offline = client(NOW + timedelta(days=days))
        offline.load()
        assert offline.find(path) is not None

    look(1)
    assert refusal(lambda: look(3)) == Code.TUF_EXPIRED


def test_a_clock_set_back_does_not_revive_expired_metadata(
    repository: MemoryRepository, client: Client
) -> None:
    frozen = dict(repository.files)
    late = NOW + timedelta(days=30)
    repository.publish(late)
    client(late).refresh()
    repository.files = {**repository.files, **{n: frozen[n] for n in frozen if n.startswith("1.")}}
    repository.timestamps = 5
    repository.publish_timestamp(NOW, repository.files["2.snapshot.json"])  # newer version, expired long ago
    assert refusal(client(NOW - timedelta(days=3650)).refresh) == Code.TUF_EXPIRED


def test_an_expired_root_is_refused_whatever_the_rest_says(
    repository: MemoryRepository, client: Client
) -> None:
    late = NOW + signing.ROOT_LIFE + timedelta(days=1)
    repository.publish(late)
    assert refusal(client(late).refresh) == Code.TUF_EXPIRED


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp", "module-firewall"])
def test_metadata_signed_with_another_key_is_refused(
    repository: MemoryRepository, client: Client, role: str
) -> None:
    repository.keys[role] = SigningKey.generate()
    path = repository.add_release(archive(), "1.0.0")
    repository.targets.version += 1
    repository.publish()
    assert refusal(lambda: client().find(path)) == Code.TUF_INVALID


def test_a_module_key_cannot_sign_another_modules_release(
    repository: MemoryRepository, client: Client
) -> None:
    other = target_path("edge", "1.0.0")
    repository.releases.version += 1
    repository.releases.targets[other] = signing.release(other, "0" * 64, 1, "1.0.0", "stable")
    repository.publish()
    assert client().find(other) is None


def test_mix_and_match_of_two_states_is_refused(repository: MemoryRepository, client: Client) -> None:
    first = repository.files["1.snapshot.json"]
    repository.add_release(archive(), "1.0.0")
    repository.publish()
    repository.files["2.snapshot.json"] = first
    assert refusal(client().refresh) == Code.TUF_INVALID


def test_delegated_metadata_swapped_under_a_valid_snapshot_is_refused(
    repository: MemoryRepository, client: Client
) -> None:
    path = repository.add_release(archive(), "1.0.0")
    repository.publish()
    repository.releases.targets[path] = signing.release(path, "f" * 64, 1, "1.0.0", "stable")
    repository.files[f"2.{repository.role}.json"] = signing.sign(
        repository.releases, repository.keys[repository.role]
    )
    assert refusal(lambda: client().find(path)) == Code.TUF_INVALID


def test_endless_metadata_is_refused(repository: MemoryRepository, client: Client) -> None:
    repository.files["timestamp.json"] += b" " * 20_000
    assert refusal(client().refresh) == Code.TUF_INVALID


def test_root_rotation_is_followed_and_the_old_keys_are_worth_nothing_after(
    repository: MemoryRepository, client: Client
) -> None:
    client().refresh()
    stolen = repository.keys["timestamp"]
    repository.rotate_root(root=SigningKey.generate(), timestamp=SigningKey.generate())
    repository.rotate_root(snapshot=SigningKey.generate())
    repository.publish()
    client().refresh()
    repository.keys["timestamp"] = stolen
    repository.publish()
    assert refusal(client().refresh) == Code.TUF_INVALID


@pytest.mark.parametrize("who", ["nobody", "only the new key", "only the old key", "a stranger"])
def test_a_root_that_both_generations_did_not_sign_is_refused(
    repository: MemoryRepository, client: Client, who: str
) -> None:
    client().refresh()
    old, new = repository.keys["root"], SigningKey.generate()
    signers = {
        "nobody": (),
        "only the new key": (new,),
        "only the old key": (old,),
        "a stranger": (SigningKey.generate(), new),
    }[who]
    repository.rotate_root(root=new, signers=signers)
    repository.publish()
    assert refusal(client().refresh) == Code.TUF_INVALID


def test_pinning_the_same_root_again_keeps_what_is_known_and_another_starts_afresh(
    repository: MemoryRepository, client: Client, tmp_path: Path
) -> None:
    client().refresh()
    TrustedRepository.pin(tmp_path / "tuf", repository.pinned)
    client().load()
    other = MemoryRepository()
    TrustedRepository.pin(tmp_path / "tuf", other.pinned)
    assert refusal(client().load) == Code.TUF_UNREACHABLE
    assert refusal(client().refresh) == Code.TUF_INVALID
    TrustedRepository(tmp_path / "tuf", other.fetch, now=lambda: NOW).refresh()


def test_pinning_something_else_than_a_root_is_refused(repository: MemoryRepository, tmp_path: Path) -> None:
    for wrong in (b"", b"{}", repository.files["timestamp.json"]):
        assert refusal(lambda wrong=wrong: TrustedRepository.pin(tmp_path / "x", wrong)) == Code.TUF_INVALID
    assert refusal(TrustedRepository(tmp_path / "x", repository.fetch).refresh) == Code.TUF_INVALID


def test_metadata_is_flushed_to_the_disk_before_it_is_renamed(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """python-tuf's own writer does not flush; this also notices if it stops asking ours."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("fsync") or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append(Path(to).name) or replace(self, to))
    client().refresh()
    at = events.index(".tuf-staged")
    # The pinned root was flushed when it was pinned, and is only given another name: four files and two folders.
    assert events[:at] == ["fsync"] * 6, "before the one rename that counts"
    assert events[at + 1] == "fsync", "and then that rename itself"
    names = {"1.root.json", "timestamp.json", "snapshot.json", "targets.json", "clock-floor", "root.json"}
    assert set(events[at + 2 :]) == names
    assert (tmp_path / "tuf" / "root_history" / "1.root.json").samefile(tmp_path / "tuf" / "pinned-root")
    events.clear()
    client().refresh()
    assert events == [], "where nothing is new, nothing is written"


def test_the_clock_floor_is_when_the_newest_timestamp_was_issued(client: Client, tmp_path: Path) -> None:
    client().refresh()
    floor = json.loads((tmp_path / "tuf" / "clock-floor").read_bytes())
    assert datetime.fromisoformat(floor["issued"]) == NOW.astimezone(UTC)
