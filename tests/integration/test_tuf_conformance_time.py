"""What `test_tuf_conformance` lists under time and rollback: expired metadata, older versions, and the ways back."""

from __future__ import annotations

from datetime import timedelta

import pytest
from support_simulator import Simulator, TufClient

FIRST = ["2.root", "timestamp", "1.snapshot", "1.targets"]


# Time.


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_an_expired_role_is_refused_and_an_expired_root_is_kept(
    client: TufClient, repo: Simulator, role: str
) -> None:
    assert client.refresh() == 0
    repo.signed[role].expires = repo.now - timedelta(days=1)
    repo.publish("root", "targets", "snapshot", "timestamp")
    assert client.refresh() == 1
    assert client.trusted()["root"] == 2
    order = ["root", "timestamp", "snapshot", "targets"]
    for later in order[max(1, order.index(role)) :]:
        assert client.trusted()[later] == 1


def test_an_intermediate_root_may_have_expired(client: TufClient, repo: Simulator) -> None:
    repo.root.expires = repo.now - timedelta(days=1)
    repo.publish("root")
    repo.root.expires = repo.expires
    repo.publish("root")
    assert client.refresh() == 0
    assert client.trusted()["root"] == 3


def test_expired_local_files_still_guard_what_comes_next(client: TufClient, repo: Simulator) -> None:
    repo.timestamp.expires = repo.now + timedelta(days=7)
    repo.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    repo.timestamp.expires = repo.now + timedelta(days=21)
    repo.publish("timestamp")
    later = repo.now + timedelta(days=18)
    repo.timestamp.version = 1
    repo.publish("timestamp", bump=False)
    assert client.refresh(later) == 1, "an older one is a rollback, also when ours has expired"
    repo.timestamp.version = 3
    repo.publish("targets", "snapshot", "timestamp")
    assert client.refresh(later) == 0
    assert client.trusted() == {"root": 1, "timestamp": 4, "snapshot": 3, "targets": 3}


def test_an_expired_delegated_role_is_used_neither_at_first_sight_nor_later(
    client: TufClient, repo: Simulator
) -> None:
    repo.delegate("targets", "role", paths=["in/*"], expires=repo.now - timedelta(days=1))
    repo.add("role", "in/first", b"first")
    repo.add("role", "in/second", b"second")
    repo.publish("role", "targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    assert client.download("in/first") == 1
    assert set(client.trusted()) == {"root", "timestamp", "snapshot", "targets"}
    repo.signed["role"].expires = repo.now + timedelta(days=7)
    repo.publish("role", "snapshot", "timestamp")
    assert client.download("in/first") == 0
    later = repo.now + timedelta(days=18)
    assert client.download("in/second", later) == 1
    repo.signed["role"].expires = repo.now + timedelta(days=21)
    repo.publish("role", "snapshot", "timestamp")
    assert client.download("in/second", later) == 0
    assert client.downloaded() == [b"first", b"second"]


# Rollback, and ways back from a fast-forward.


def test_an_older_timestamp_is_refused(client: TufClient, repo: Simulator) -> None:
    repo.publish("timestamp")
    assert client.refresh() == 0
    repo.timestamp.version = 1
    repo.publish("timestamp", bump=False)
    assert client.refresh() == 1
    assert client.trusted()["timestamp"] == 2
    assert repo.asked[-1] == "timestamp"


@pytest.mark.parametrize("hashes", [False, True])
def test_an_older_snapshot_is_refused(client: TufClient, repo: Simulator, hashes: bool) -> None:
    repo.hashes = hashes
    repo.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    repo.snapshot.version = 1
    repo.publish("snapshot", bump=False)
    repo.publish("timestamp")
    assert client.refresh() == 1
    assert (client.trusted()["timestamp"], client.trusted()["snapshot"]) == (2, 2)
    assert repo.asked[-1] == "timestamp"


@pytest.mark.parametrize("hashes", [False, True])
def test_older_targets_are_refused(client: TufClient, repo: Simulator, hashes: bool) -> None:
    repo.hashes = hashes
    repo.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    repo.targets.version = 1
    repo.publish("targets", bump=False)
    repo.publish("snapshot", "timestamp")
    assert client.refresh() == 1
    assert (client.trusted()["snapshot"], client.trusted()["targets"]) == (2, 2)


def test_a_snapshot_that_lost_a_role_is_refused(client: TufClient, repo: Simulator) -> None:
    repo.delegate("targets", "role")
    repo.publish("role", "targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    del repo.snapshot.meta["role.json"]
    repo.publish("snapshot", "timestamp")
    assert client.refresh() == 1
    assert client.trusted()["snapshot"] == 2


def test_a_role_that_no_snapshot_names_ends_the_search(client: TufClient, repo: Simulator) -> None:
    repo.delegate("targets", "role")
    repo.add("role", "file", b"content")
    repo.publish("role")
    del repo.snapshot.meta["role.json"]
    repo.publish("targets", "snapshot", "timestamp")
    assert client.download("file") == 1
    assert client.downloaded() == []


def test_a_snapshot_newer_than_the_timestamp_says_is_not_taken(client: TufClient, repo: Simulator) -> None:
    repo.publish("targets", "snapshot")
    repo.files["1.snapshot.json"] = repo.last("snapshot")
    assert client.refresh() == 1
    assert client.trusted() == {"root": 1, "timestamp": 1}
    assert repo.asked[-1] == "1.snapshot"


def test_an_older_snapshot_that_no_timestamp_names_is_not_even_asked_for(
    client: TufClient, repo: Simulator
) -> None:
    repo.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    repo.files["2.snapshot.json"] = repo.files["1.snapshot.json"]
    assert client.refresh() == 0
    assert client.trusted()["snapshot"] == 2
    assert repo.asked[-1] == "timestamp"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_new_keys_are_the_way_back_from_a_fast_forward(client: TufClient, repo: Simulator, role: str) -> None:
    repo.signed[role].version = 99_999
    repo.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    assert client.trusted()[role] == 100_000
    for rotated in {
        "targets": ["snapshot"],
        "snapshot": ["snapshot", "timestamp"],
        "timestamp": ["timestamp"],
    }[role]:
        repo.rotate(rotated)
    repo.publish("root")
    repo.signed[role].version = 0
    repo.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    assert client.trusted()[role] == 1
