"""The TUF client where somebody was at its folder, its clock, its keys' names, or signed strange content."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib import parse

import pytest
from securesystemslib.signer import Signature, SSlibKey
from support_trust import NOW, Client, MemoryRepository, archive, refusal
from tuf.api.metadata import DelegatedRole, Metadata

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.trust import signing
from loopback.trust.repository import TrustedRepository

# The folder as somebody else may have left it.


def test_a_newer_root_of_the_same_repository_as_the_anchor_opens_no_way_back(
    repository: MemoryRepository, client: Client, tmp_path: Path
) -> None:
    """Shipping the second root as the pinned one must not make the host forget what it saw with the first."""
    old = repository.files["timestamp.json"]
    repository.rotate_root(snapshot=SigningKey.generate())
    repository.publish()
    client().refresh()
    TrustedRepository.pin(tmp_path / "tuf", repository.files["2.root.json"])
    repository.files["timestamp.json"] = old
    assert refusal(client().refresh) == Code.TUF_INVALID
    TrustedRepository.pin(tmp_path / "tuf", repository.pinned)
    assert refusal(client().refresh) == Code.TUF_INVALID


def test_a_root_that_its_own_keys_did_not_sign_is_never_pinned(
    repository: MemoryRepository, tmp_path: Path
) -> None:
    unsigned = signing.sign(repository.root, SigningKey.generate())
    assert refusal(lambda: TrustedRepository.pin(tmp_path / "tuf", unsigned)) == Code.TUF_INVALID
    assert not (tmp_path / "tuf").exists()


def test_one_key_under_two_names_counts_once(repository: MemoryRepository, client: Client) -> None:
    client().refresh()
    key = repository.keys["snapshot"]
    public = signing.tuf_key(key)
    alias = SSlibKey("alias", public.keytype, public.scheme, dict(public.keyval))
    repository.root.add_key(alias, "snapshot")
    repository.root.roles["snapshot"].threshold = 2
    repository.rotate_root()
    repository.publish()
    name = f"{repository.snapshots}.snapshot.json"
    twice = Metadata.from_bytes(repository.files[name])
    (one,) = twice.signatures.values()
    twice.signatures["alias"] = Signature("alias", one.signature)
    repository.files[name] = twice.to_bytes()
    repository.publish_timestamp(NOW, repository.files[name])
    with pytest.raises(Refused, match="snapshot was signed by 1/2 keys") as caught:
        client().refresh()
    assert caught.value.code == Code.TUF_INVALID


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "module-firewall"])
@pytest.mark.parametrize("how", ["garbage", "empty", "fifo", "link", "endless", "folder"])
def test_a_damaged_file_of_ours_is_fetched_again_and_never_waited_for(
    repository: MemoryRepository, client: Client, tmp_path: Path, role: str, how: str
) -> None:
    repository.add_release(archive(), "1.0.0")
    repository.publish()
    assert client().release("firewall", "1.0.0") is not None
    damage(tmp_path / "tuf" / f"{role}.json", how)
    if how == "folder":
        # It cannot be replaced by a file: said, not survived.
        assert refusal(lambda: client().release("firewall", "1.0.0")) == Code.HOST_DISK
    else:
        assert client().release("firewall", "1.0.0") is not None
        assert (tmp_path / "tuf" / f"{role}.json").stat().st_size < 10_000


@pytest.mark.parametrize("how", ["garbage", "fifo", "link", "endless"])
def test_an_old_root_that_somebody_put_there_is_not_believed(
    repository: MemoryRepository, client: Client, tmp_path: Path, how: str
) -> None:
    client().refresh()
    damage(tmp_path / "tuf" / "root_history" / "2.root.json", how)
    client().refresh()
    assert (tmp_path / "tuf" / "root.json").readlink() == Path("root_history/1.root.json")


def damage(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    if how == "fifo":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("/dev/zero")
    elif how == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.write(b"" if how == "empty" else b"{]")
            if how == "endless":
                file.truncate(8 << 30)


def test_a_folder_that_everybody_may_write_to_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "tuf").chmod(0o1777)
    assert refusal(client().refresh) == Code.TUF_INVALID


def test_somebody_elses_files_beside_ours_stay(client: Client, tmp_path: Path) -> None:
    kept = [
        tmp_path / "tuf" / name for name in ("notes.txt", "big.bin", ".profile.new", "root_history/README")
    ]
    client().refresh()
    for path in kept:
        path.write_bytes(b"x" * 2_000_000)
    left = tmp_path / "tuf" / ".timestamp.json.4711.new"
    left.write_bytes(b"half")
    client().refresh()
    assert all(path.exists() for path in kept)
    assert not left.exists()


def test_a_lock_that_is_never_let_go_is_an_answer_and_not_a_wait_for_ever(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopback.trust.repository.LOCK_S", 0.1)
    with (tmp_path / "tuf" / ".lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Refused, match="another process has been using") as caught:
            client().refresh()
        assert caught.value.code == Code.TUF_UNREACHABLE
    client().refresh()


def test_a_disk_that_fills_up_leaves_the_old_state_and_nothing_half_written(
    repository: MemoryRepository, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client().refresh()
    before = {p.name: p.read_bytes() for p in (tmp_path / "tuf").glob("*.json")}
    repository.publish()
    fsync, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(client().refresh) == Code.HOST_DISK
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path / "tuf").glob("*.json")} == before
    assert not list((tmp_path / "tuf").rglob("*.new")) and not list((tmp_path / "tuf").glob(".tuf-*"))
    client().load()


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Run it in a child that dies, as by SIGKILL, before its n-th change on the disk; whether it died."""
    child = os.fork()
    if child == 0:
        left = [step]

        def before(honest: Callable[..., object]) -> Callable[..., object]:
            def counted(*arguments: object, **keywords: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return honest(*arguments, **keywords)

            return counted

        for name in ("fsync", "link", "rename", "replace", "mkdir", "rmdir", "unlink", "symlink"):
            setattr(os, name, before(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_refresh_that_is_killed_anywhere_leaves_the_old_state_or_the_new_one_whole(
    repository: MemoryRepository, client: Client, tmp_path: Path
) -> None:
    """Also without a network, where nothing can be fetched that is missing from a half."""
    client().refresh()
    seen: set[bool] = set()
    for step in range(100):
        version = f"1.0.{step}"
        repository.rotate_root(snapshot=SigningKey.generate())
        path = repository.add_release(archive(version), version)
        repository.targets.version += 1
        repository.publish()
        before = client()
        before.load()
        died = killed_at(step, lambda: client().refresh())
        after = client()
        after.load()
        new = after.metadata("timestamp") == repository.files["timestamp.json"]
        seen.add(new)
        assert new or after.metadata("timestamp") == before.metadata("timestamp")
        assert (after.metadata("targets") == before.metadata("targets")) != new
        assert not list((tmp_path / "tuf").glob(".tuf-*"))
        client().refresh()
        assert client().find(path) is not None
        if not died:
            break
    else:
        pytest.fail("a refresh of a hundred changes and no end")
    assert seen == {False, True} and step > 10


# The clock's floor.


def issue(repository: MemoryRepository, issued: datetime, life: timedelta = timedelta(days=1)) -> None:
    """A timestamp that says it was issued then."""
    repository.timestamps += 1
    timestamp = signing.new_timestamp(
        NOW, version=repository.timestamps, snapshot=repository.files[f"{repository.snapshots}.snapshot.json"]
    )
    timestamp.unrecognized_fields[signing.ISSUED_FIELD] = issued.isoformat()
    timestamp.expires = issued + life
    repository.files["timestamp.json"] = signing.sign(timestamp, repository.keys["timestamp"])


def test_a_stolen_timestamp_key_cannot_push_the_clock_past_other_metadata(
    repository: MemoryRepository, client: Client
) -> None:
    """Else one lie about the time would lock every host out for ever."""
    issue(repository, NOW + timedelta(days=3650))
    client().refresh()
    repository.publish()
    client().refresh()


def test_new_timestamp_keys_end_what_the_old_ones_said_about_the_time(
    repository: MemoryRepository, client: Client
) -> None:
    """TUF's way back from a fast-forward attack, for the clock too."""
    issue(repository, NOW + timedelta(days=6))  # within the snapshot's week: the floor believes it
    client().refresh()
    repository.publish()
    assert refusal(client().refresh) == Code.TUF_EXPIRED, "the attack reaches the clock"
    repository.rotate_root(timestamp=SigningKey.generate())
    repository.publish()
    client().refresh()


@pytest.mark.parametrize(
    "content", [b"", b"9999-01-01", b"{}", b'{"issued":"9999-01-01T00:00:00Z","keys":[]}']
)
def test_a_floor_that_nobody_vouches_for_does_not_count(
    client: Client, tmp_path: Path, content: bytes
) -> None:
    client().refresh()
    (tmp_path / "tuf" / "clock-floor").write_bytes(content)
    client().refresh()


# Strange content, correctly signed.


@pytest.mark.parametrize(
    "custom",
    [
        {"depends": ["edge"], "nested": {"a": [1, {"b": None}]}},
        {"x" * 1000: "y" * 100_000},
        [],
        "text",
        7,
    ],
)
def test_custom_fields_of_any_shape_are_text_or_nothing(
    repository: MemoryRepository, client: Client, custom: object
) -> None:
    path = repository.add_release(archive(), "1.0.0")
    repository.releases.targets[path].unrecognized_fields["custom"] = custom
    repository.publish()
    found = client().find(path)
    assert found is not None
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in found.custom.items())
    assert bool(found.custom) == isinstance(custom, dict)


def test_custom_fields_cannot_be_endless(repository: MemoryRepository, client: Client) -> None:
    """Also where the snapshot announces the length: what is signed online does not lift a host's own limit."""
    path = repository.add_release(archive(), "1.0.0")
    repository.releases.targets[path].unrecognized_fields["custom"] = {"x": "y" * 800_000}
    repository.publish()
    assert refusal(lambda: client().find(path)) == Code.TUF_INVALID


@pytest.mark.parametrize("name", ["", ".", "..", "../..", "*", "a/b", "\0", "\ud800", "x" * 10_000, "%2e%2e"])
def test_a_release_of_a_strange_name_is_nobodys(
    repository: MemoryRepository, client: Client, tmp_path: Path, name: str
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    assert client().release(name, name) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["../evil", "/evil", "?", "#", "a" * 300, "."])
def test_a_delegated_role_of_a_strange_name_writes_nothing_outside(
    repository: MemoryRepository, client: Client, tmp_path: Path, name: str
) -> None:
    delegations = repository.targets.delegations
    assert delegations is not None and delegations.roles is not None
    key = repository.keys[repository.role]
    delegations.roles = {name: DelegatedRole(name, [signing.tuf_key(key).keyid], 1, True, paths=["x"])}
    repository.targets.version += 1
    releases = signing.new_targets(NOW, version=1, files={"x": signing.target("x", b"content")})
    data = signing.sign(releases, key)
    repository.files[f"1.{parse.quote(name, safe='')}.json"] = data
    repository.publish()
    snapshot = signing.new_snapshot(
        NOW, version=9, files={"targets": repository.files["2.targets.json"], name: data}
    )
    repository.files["9.snapshot.json"] = signing.sign(snapshot, repository.keys["snapshot"])
    repository.publish_timestamp(NOW, repository.files["9.snapshot.json"])
    if len(name) > 255:
        reader = client()
        assert refusal(lambda: reader.find("x")) == Code.HOST_DISK
        assert reader.find("y") is None, "and nobody else's role suffers from it"
    else:
        assert client().find("x") is not None
    assert [p.name for p in tmp_path.iterdir()] == ["tuf"]
    assert {p.name for p in (tmp_path / "tuf").iterdir() if p.is_dir()} == {"root_history"}


# How long it may take.


def test_a_server_that_answers_each_file_slowly_is_given_up_on_in_all(
    repository: MemoryRepository, client: Client, tmp_path: Path
) -> None:
    """Two hundred valid roots, each just in time, would otherwise hold a host for hours."""
    for _ in range(200):
        repository.rotate_root()
    repository.publish()
    asked: list[str] = []

    def slow(name: str) -> bytes | None:
        asked.append(name)
        time.sleep(0.02)
        return repository.fetch(name)

    patient = TrustedRepository(tmp_path / "tuf", slow, now=lambda: NOW, deadline_s=0.2)
    with pytest.raises(Refused, match=r"was not there after 0\.2 s in all") as caught:
        patient.refresh()
    assert caught.value.code == Code.TUF_UNREACHABLE
    assert len(asked) < 50
    patient = TrustedRepository(tmp_path / "tuf", repository.fetch, now=lambda: NOW)
    patient.refresh()
    assert patient.metadata("root") == repository.files["201.root.json"]


def test_pieces_are_read_no_further_than_a_file_may_be_long(
    repository: MemoryRepository, client: Client, tmp_path: Path
) -> None:
    pieces = 0

    def endless(name: str) -> Iterator[bytes] | None:
        nonlocal pieces
        if name != "timestamp.json":
            return None
        while True:
            pieces += 1
            yield b" " * 1024

    def fetch(name: str) -> Iterator[bytes] | None:
        return endless(name) if name == "timestamp.json" else None

    with pytest.raises(Refused, match="more than the 16384 bytes") as caught:
        TrustedRepository(tmp_path / "tuf", fetch, now=lambda: NOW).refresh()
    assert caught.value.code == Code.TUF_INVALID
    assert pieces == 17
