"""The attacks of TUF §1.5.2 on what a host installs: each reaches its target without the one defence, and fails with it.

The attacker owns the broker, or the mirror, and in some stories keys. `Victim` is the real trust, download, verification and
unpacking of a host; reaching the target means that the attacker's code lies where the agent would start it, or that the
host can be held where the attacker wants it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support_trust import NOW, archive
from support_victim import (
    PAYLOAD,
    Victim,
    anybody_may_sign,
    no_floor_of_time,
    nothing_expires,
    nothing_is_remembered,
    one_signature_is_enough,
    with_member,
)
from tuf.api.metadata import DelegatedRole, Targets
from tuf.ngclient import Updater
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.keys import SigningKey
from loopback.host import install
from loopback.trust import blobs, manifest, package, signing
from loopback.trust.repository import MAX_TIMESTAMP, Limits, TrustedRepository, target_path
from loopback.trust.updater import DurableUpdater

EVIL = b"evil\n"


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[Callable[[], Victim]]:
    """As many hosts as a story needs, each new."""
    count = iter(range(9))

    def make() -> Victim:
        place = tmp_path / f"victim{next(count)}"
        place.mkdir()
        return Victim(place)

    yield make


async def refused(action: Coroutine[Any, Any, object], code: Code, words: str) -> None:
    """It ends in this refusal."""
    with pytest.raises(Refused, match=words) as caught:
        await action
    assert caught.value.code == code


async def test_arbitrary_installation(victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody without any key publishes a release of their own."""

    async def attack(victim: Victim) -> bytes:
        await victim.trust.refresh()
        forger = victim.repository
        forger.keys = {role: SigningKey.generate() for role in forger.keys}
        return await victim.install(victim.release("6.6.6", EVIL))

    with monkeypatch.context() as patch:
        anybody_may_sign(patch)
        assert await attack(victims()) == EVIL
    victim = victims()
    await refused(attack(victim), Code.TUF_INVALID, r"timestamp was signed by 0/1 keys")
    assert victim.installed() == []


async def test_endless_data(victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker answers with content, and with metadata, that has no end."""
    endless = 32 * 1024 * 1024  # bytes after which the attack has shown what it can do
    chunks = 0

    async def attack(victim: Victim) -> bytes:
        target = victim.release("1.0.0")
        await victim.trust.refresh()

        async def answer(subject: str) -> tuple[bytes, dict[str, str]] | None:
            nonlocal chunks
            if not subject.startswith("lb.blob."):
                return victim.bus.messages.get(subject)
            chunks += 1
            if chunks * blobs.CHUNK > endless:
                raise Refused(Code.BLOB_MISSING, "enough")
            return bytes(blobs.CHUNK), {blobs.SIZE_HEADER: str(1 << 39)}

        victim.bus.answer = answer
        return await victim.install(target)

    def left(victim: Victim) -> int:
        return sum(p.stat().st_size for p in victim.store.downloads.iterdir())

    monkeypatch.setattr(install, "RETRIES_S", ())
    with monkeypatch.context() as patch:
        patch.setattr(package, "MAX_PACKAGE", 1 << 40)
        victim = victims()
        await refused(attack(victim), Code.BLOB_MISSING, "enough")
        assert left(victim) > endless // 2, "the disk fills"
    victim, chunks = victims(), 0
    await refused(attack(victim), Code.PACKAGE_TOO_LARGE, r"announces \d+ bytes; at most")
    assert (left(victim), chunks) == (0, 1)

    def endless_metadata(name: str) -> Iterator[bytes] | None:
        return iter(lambda: b" " * 65536, b"") if name == "timestamp.json" else None

    taken = bytearray()

    def counted(name: str) -> Iterator[bytes] | None:
        found = endless_metadata(name)
        return None if found is None else _counting(found, taken, endless)

    TrustedRepository.pin(victim.place / "other", victim.repository.pinned)
    client = TrustedRepository(victim.place / "other", counted, now=lambda: NOW)
    limits = msgspec.structs.replace(Limits(), timestamp=1 << 40)
    wide = TrustedRepository(victim.place / "other", counted, now=lambda: NOW, limits=limits)
    with pytest.raises(Refused):
        wide.refresh()
    assert len(taken) > endless // 2
    taken.clear()
    with pytest.raises(Refused, match="more than the 16384 bytes it may have") as caught:
        client.refresh()
    assert caught.value.code == Code.TUF_INVALID
    assert len(taken) <= MAX_TIMESTAMP + 65536


def _counting(pieces: Iterator[bytes], taken: bytearray, most: int) -> Iterator[bytes]:
    for piece in pieces:
        if len(taken) > most:
            raise ConnectionError("enough")
        taken += piece
        yield piece


async def test_extraneous_dependencies(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release names other software that must come with it: in its target's custom fields, its manifest, or as a file."""
    victim = victims()
    wanted = victim.bus.blob(archive("6.6.6", {PAYLOAD: EVIL}))
    data = archive("1.0.0", {PAYLOAD: b"honest\n"})
    path = victim.repository.add_release(data, "1.0.0")
    victim.repository.releases.targets[path].unrecognized_fields["custom"] = {"depends": wanted}
    victim.publish()
    target = Running(version="1.0.0", package=victim.bus.blob(data))
    assert await victim.install(target) == b"honest\n"

    async def naive() -> bytes:
        """A client that resolves what releases say they need, as package managers do."""
        info = await asyncio.to_thread(victim.trust.repository.release, "firewall", "1.0.0")
        assert info is not None
        file = victim.place / "dependency.lbm"
        await blobs.download(victim.bus.get, info.custom["depends"], max_size=1 << 20, into=file)
        package.extract(file, victim.place / "dependency")
        return (victim.place / "dependency" / PAYLOAD).read_bytes()

    before = list(victim.bus.asked)
    assert await naive() == EVIL
    assert not any(wanted in subject for subject in before), "the host did not even ask for it"
    assert victim.installed() == [f"modules/firewall/versions/1_2e0_2e0-{target.package[:12]}"]

    # In the manifest there is no word for it.
    for word in ("modules = ['edge']", "packages = ['evil']", "[install]\npip = 'evil'"):
        text = (
            manifest.parse(_manifest(data))
            .to_toml()
            .decode()
            .replace("[requires]\n", f"[requires]\n{word}\n")
        )
        with pytest.raises(Refused) as caught:
            manifest.parse(text.encode())
        assert caught.value.code == Code.MANIFEST_INVALID
        assert "unknown field" in caught.value.reason

    # And a file that nobody listed does not ride along.
    smuggled = with_member(data, "lib/zz_evil.py", EVIL)
    path = victim.repository.add_release(smuggled, "1.1.0")
    victim.publish()
    target = Running(version="1.1.0", package=victim.bus.blob(smuggled))
    with monkeypatch.context() as patch:
        honest = package.listing
        texts: list[bytes] = []

        def lenient(text: bytes, label: str) -> dict[str, str]:
            texts.append(text)
            return honest(text, label) | {"lib/zz_evil.py": hashed(EVIL)}

        patch.setattr(package, "listing", lenient)
        patch.setattr(package, "_listing_of", lambda _: texts[-1])
        info = package.extract(_file(victim, smuggled), victim.place / "smuggled")
        assert (victim.place / "smuggled" / "lib/zz_evil.py").read_bytes() == EVIL, info.manifest.name
    await refused(
        victim.install(target), Code.PACKAGE_DIGEST, r"lib/zz_evil.py is there but not listed in digests.json"
    )


def _file(victim: Victim, data: bytes) -> Path:
    file = victim.place / "smuggled.lbm"
    file.write_bytes(data)
    return file


def _manifest(data: bytes) -> bytes:
    at = data.index(b"[module]")
    return data[at : data.index(b"\0", at)]


async def test_fast_forward(victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch) -> None:
    """With stolen online keys versions are pushed to the end, so that what the owners sign afterwards looks old."""

    async def attack(victim: Victim) -> bytes:
        honest = (victim.repository.snapshots, victim.repository.timestamps)
        victim.repository.snapshots = victim.repository.timestamps = 2**31
        victim.publish()
        await victim.trust.refresh()
        assert victim.trust.problem is None
        victim.repository.snapshots, victim.repository.timestamps = honest
        target = victim.release("1.0.0")
        await refused(victim.install(target), Code.TUF_INVALID, "must be >=")
        # The owners' way back: other online keys in a new root.
        victim.repository.rotate_root(snapshot=SigningKey.generate(), timestamp=SigningKey.generate())
        victim.publish()
        return await victim.install(target)

    with monkeypatch.context() as patch:
        # Without it the host goes on comparing with what the withdrawn keys signed.
        honest_load = TrustedMetadataSet.update_timestamp

        def stubborn(self: TrustedMetadataSet, data: bytes) -> Any:
            with monkeypatch.context() as inner:
                anybody_may_sign(inner)
                return honest_load(self, data)

        patch.setattr(TrustedMetadataSet, "update_timestamp", stubborn)
        await refused(attack(victims()), Code.TUF_INVALID, "must be >=")
    assert await attack(victims()) == b"honest\n"


@pytest.mark.parametrize("years", [0, -10, 10])
async def test_indefinite_freeze(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    """The broker keeps serving the same old metadata, under which a withdrawn release is still good.

    The host's clock is right, ten years behind, or ten years ahead.
    """

    async def attack(victim: Victim) -> bytes:
        target = victim.release("1.0.0", b"vulnerable\n")
        frozen = dict(victim.bus.messages)
        later = NOW + timedelta(days=30)
        await victim.trust.refresh()
        del victim.repository.releases.targets[target_path("firewall", "1.0.0")]
        victim.repository.releases.version += 1
        victim.publish(later)
        victim.now = later
        await victim.trust.refresh()  # it saw the news once: its floor is there
        victim.now = later + timedelta(days=3653) * (years // 10 if years else 0)
        (victim.store.tuf / "timestamp.json").unlink()  # nor does it remember versions: only time can tell
        (victim.store.tuf / "snapshot.json").unlink()
        victim.bus.messages = frozen
        return await victim.install(target)

    with monkeypatch.context() as patch:
        no_floor_of_time(patch) if years < 0 else nothing_expires(patch)
        assert await attack(victims()) == b"vulnerable\n"
    victim = victims()
    await refused(attack(victim), Code.TUF_EXPIRED, r"has expired: (timestamp|Final root)\.json is expired")
    assert victim.trust.problem is not None and victim.trust.problem.code == Code.TUF_EXPIRED, "it says so"
    assert victim.trust.trust is not None, "and keeps what it had"


async def test_a_clock_that_jumps_backwards_between_two_looks(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time further back: without the floor, metadata that expired long ago lives again."""

    async def attack(victim: Victim) -> list[Code | None]:
        found: list[Code | None] = []
        victim.now = NOW + timedelta(days=200)
        victim.publish(victim.now - timedelta(hours=1))
        stale = victim.now - timedelta(days=2)
        for back in (timedelta(0), timedelta(days=3), timedelta(days=150), timedelta(days=3653)):
            victim.now = NOW + timedelta(days=200) - back
            await victim.trust.refresh()
            found.append(victim.trust.problem.code if victim.trust.problem else None)
            victim.repository.timestamps += 1
            victim.repository.publish_timestamp(
                stale, victim.repository.files[f"{victim.repository.snapshots}.snapshot.json"]
            )
            victim.bus.metadata(victim.repository.files)
        return found

    with monkeypatch.context() as patch:
        no_floor_of_time(patch)
        assert await attack(victims()) == [None, None, None, None]
    assert await attack(victims()) == [None, *[Code.TUF_EXPIRED] * 3]


async def test_mix_and_match(victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of two states are combined: today's snapshot with the releases of yesterday, when a bad one was still good."""

    async def attack(victim: Victim) -> bytes:
        target = victim.release("1.0.0", b"vulnerable\n")
        yesterday = victim.repository.files[
            f"{victim.repository.releases.version}.{victim.repository.role}.json"
        ]
        del victim.repository.releases.targets[target_path("firewall", "1.0.0")]
        victim.repository.releases.version += 1
        victim.publish()
        name = f"{victim.repository.releases.version}.{victim.repository.role}.json"
        victim.bus.metadata({name: yesterday})
        return await victim.install(target)

    def unmatched(self: TrustedMetadataSet, data: bytes, role: str, delegator: str) -> Any:
        found, _, _ = self._load_data(Targets, data, self[delegator], role)
        self._add(role, found, delegator)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TrustedMetadataSet, "update_delegated_targets", unmatched)
        patch.setattr(
            DurableUpdater,
            "_download_metadata",
            lambda self, role, _, version=None: Updater._download_metadata(self, role, 1 << 20, version),
        )
        assert await attack(victims()) == b"vulnerable\n"
    victim = victims()
    await refused(attack(victim), Code.TUF_INVALID, "a file is longer than it may be: 3.module-firewall.json")
    assert victim.installed() == []


async def test_rollback(victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is served as it was an hour ago: correctly signed, not expired, and with a withdrawn release."""

    async def attack(victim: Victim) -> bytes:
        target = victim.release("1.0.0", b"vulnerable\n")
        before = dict(victim.bus.messages)
        del victim.repository.releases.targets[target_path("firewall", "1.0.0")]
        victim.repository.releases.version += 1
        victim.publish(NOW + timedelta(hours=1))
        await victim.trust.refresh()
        assert victim.trust.problem is None
        victim.bus.messages = before
        return await victim.install(target)

    with monkeypatch.context() as patch:
        nothing_is_remembered(patch)
        assert await attack(victims()) == b"vulnerable\n"
    victim = victims()
    await refused(attack(victim), Code.TUF_INVALID, r"New timestamp version \d must be >= \d")
    assert victim.installed() == []


async def test_key_compromise_below_threshold(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two keys of a module's family is stolen; the broker and both online keys as well."""

    async def attack(victim: Victim) -> bytes:
        repository, second = victim.repository, signing.tuf_key(SigningKey.generate())
        delegations = repository.targets.delegations
        assert delegations is not None and delegations.roles is not None
        role = delegations.roles[repository.role]
        delegations.keys[second.keyid] = second
        role.keyids.append(second.keyid)
        role.threshold = 2
        repository.targets.version += 1
        return await victim.install(victim.release("6.6.6", EVIL))

    with monkeypatch.context() as patch:
        one_signature_is_enough(patch)
        assert await attack(victims()) == EVIL
    victim = victims()
    await refused(attack(victim), Code.TUF_INVALID, "module-firewall was signed by 1/2 keys")
    assert victim.installed() == []


async def test_wrong_software_by_another_familys_key(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may release one module signs a release of another."""

    async def attack(victim: Victim) -> bytes:
        repository, key = victim.repository, SigningKey.generate()
        signing.delegate(repository.targets, "edge", key)
        repository.targets.version += 1
        data = archive("6.6.6", {PAYLOAD: EVIL})
        path = target_path("firewall", "6.6.6")
        release = signing.release(path, victim.bus.blob(data), len(data), "6.6.6", "stable")
        edge = signing.sign(signing.new_targets(NOW, version=1, files={path: release}), key)
        repository.files["1.module-edge.json"] = edge
        repository.publish()
        signed = {
            "targets": repository.files[f"{repository.targets.version}.targets.json"],
            repository.role: repository.files[f"{repository.releases.version}.{repository.role}.json"],
            "module-edge": edge,
        }
        repository.publish_snapshot(NOW, signed)
        victim.bus.metadata(repository.files)
        return await victim.install(Running(version="6.6.6", package=victim.bus.blob(data)))

    with monkeypatch.context() as patch:
        patch.setattr(DelegatedRole, "is_delegated_path", lambda *_: True)
        honest = DelegatedRole.from_dict.__func__

        def lenient(kind: type[DelegatedRole], data: dict[str, Any]) -> DelegatedRole:
            found = honest(kind, data)
            found.terminating = False
            return found

        patch.setattr(DelegatedRole, "from_dict", classmethod(lenient))
        patch.setattr(DelegatedRole, "to_dict", _terminating(DelegatedRole.to_dict))
        assert await attack(victims()) == EVIL
    victim = victims()
    await refused(attack(victim), Code.PACKAGE_UNKNOWN, "nobody entitled to has signed firewall 6.6.6")
    assert victim.installed() == []


def _terminating(
    honest: Callable[[DelegatedRole], dict[str, Any]],
) -> Callable[[DelegatedRole], dict[str, Any]]:
    """What was signed says terminating, which the lenient reader forgets."""
    return lambda role: honest(role) | {"terminating": True}


async def test_wrong_software_under_the_right_name(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family's own key signs, as version 2, the package of version 1: an old hole under a new number."""

    async def attack(victim: Victim) -> bytes:
        old = archive("1.0.0", {PAYLOAD: b"vulnerable\n"})
        victim.repository.add_release(old, "2.0.0")
        victim.publish()
        return await victim.install(Running(version="2.0.0", package=victim.bus.blob(old)))

    with monkeypatch.context() as patch:
        honest = package.inspect

        def credulous(file: Path, **how: Any) -> Any:
            info = honest(file, **how)
            return msgspec.structs.replace(info, manifest=info.manifest.with_version("2.0.0"))

        patch.setattr(package, "inspect", credulous)
        assert await attack(victims()) == b"vulnerable\n"
    victim = victims()
    await refused(attack(victim), Code.PACKAGE_UNKNOWN, "the package is firewall 1.0.0, not firewall 2.0.0")
    assert victim.installed() == []


async def test_wrong_content_under_the_right_digest(
    victims: Callable[[], Victim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker stores other content on the subjects of a signed package."""

    async def attack(victim: Victim) -> bytes:
        target = victim.release("1.0.0")
        swapped = archive("1.0.0", {PAYLOAD: b"evil!!\n"})
        assert len(swapped) == len(archive("1.0.0", {PAYLOAD: b"honest\n"}))
        victim.bus.blob(swapped, target.package)
        return await victim.install(target)

    monkeypatch.setattr(install, "RETRIES_S", ())
    with monkeypatch.context() as patch:
        target = hashed(archive("1.0.0", {PAYLOAD: b"honest\n"}))
        patch.setattr(blobs, "_digest_of", lambda _: target)
        honest = package.inspect
        patch.setattr(package, "inspect", lambda file, **_: honest(file))
        extract = package.extract
        patch.setattr(package, "extract", lambda file, into, **_: extract(file, into))
        assert await attack(victims()) == b"evil!!\n"
    victim = victims()
    await refused(attack(victim), Code.BLOB_DIGEST, "has the digest")
    assert victim.installed() == []


def hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
