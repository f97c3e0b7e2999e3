"""`loopback tuf-client` does what the public TUF client conformance suite asks of a client, against a server of ours.

The suite itself (theupdateframework/tuf-conformance) is not on the package index. From a checkout of it, with our
environment on the path: `pytest tuf_conformance --entrypoint "loopback tuf-client"`. What it tests, by our names here:

 basics      init without a request, refresh asks root, timestamp, snapshot, targets in this order, download refreshes first,
             no or unsigned or malformed first root, same version with other content, versions and hashes that do not match,
             unknown fields, unversioned files without consistent snapshots, local files damaged or gone, bytes kept as served
 roots       every rotation of keys and thresholds with and without enough signatures, many versions at once, a gap, a repeat
 other keys  the same for timestamp, snapshot and targets; one key under several names; a threshold that is not met; every
             algorithm; signatures broken, missing, twice; unknown hash algorithms of keys
 time        each role expired, delegated ones too, at the first sight and later; expired local files still guard
 rollback    of timestamp, snapshot, targets, with hashes and without; roles missing; ways back from a fast-forward by new keys
 content     with and without directories and hash prefixes, substituted, changed often, cached, expired
 delegations order of search, cycles, terminating, paths, hash prefixes, hash bins, odd names, how many
"""

from __future__ import annotations

import json

import pytest
from support_simulator import ALGORITHMS, Made, Server, Simulator, TufClient
from tuf.api.metadata import Metadata

from loopback.cli import tufclient

FIRST = ["2.root", "timestamp", "1.snapshot", "1.targets"]


# As a program.


def test_the_program_follows_the_protocol_from_init_to_download(made: Made, repo: Simulator) -> None:
    client = made(repo, subprocess=True)
    repo.add("targets", "dir/file.txt", b"content")
    repo.publish("targets", "snapshot", "timestamp")
    assert client.init(repo.last("root")) == 0
    assert client.refresh() == 0
    assert repo.asked == ["2.root", "timestamp", "2.snapshot", "2.targets"]
    assert client.trusted() == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}
    assert client.download("dir/file.txt") == 0
    assert client.downloaded() == [b"content"]
    assert client.download("dir/other.txt") == 1


def test_the_program_says_one_for_whatever_is_wrong(made: Made, repo: Simulator) -> None:
    client = made(repo, subprocess=True)
    assert client.refresh() == 1, "nothing was pinned"
    assert client.init(b"{") == 1
    assert client._run("--no-such-option") == 1
    assert client._run("init") == 1


# Basics.


def test_init_and_refresh_ask_for_each_role_once_in_order(client: TufClient, repo: Simulator) -> None:
    assert client.refresh() == 0
    assert repo.asked == FIRST
    assert client.trusted() == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
    assert all(client.kept(role) == repo.last(role) for role in client.trusted()), (
        "kept as served, byte for byte"
    )


def test_download_refreshes_first(client: TufClient, repo: Simulator) -> None:
    assert client.download("nothing") == 1
    assert repo.asked == FIRST


def test_options_may_stand_behind_the_command(made: Made, repo: Simulator, server: Server) -> None:
    client = made(repo)
    assert client.init(repo.last("root")) == 0
    url = f"{server.address(repo)}/metadata"
    assert tufclient.run(["refresh", "--metadata-dir", str(client.metadata), "--metadata-url", url]) == 0


@pytest.mark.parametrize("what", ["version", "signature", "type", "expires"])
def test_a_first_root_that_does_not_hold_leads_nowhere(made: Made, repo: Simulator, what: str) -> None:
    root = json.loads(repo.last("root"))
    if what == "signature":
        root["signatures"][0]["sig"] = "00" * 64
    elif what == "type":
        root["signed"]["_type"] = "targets"
    else:
        del root["signed"][what]
    client = made(repo)
    assert client.init(json.dumps(root).encode()) == 1
    assert client.refresh() == 1
    assert repo.asked == []


def test_other_content_under_the_same_version_of_the_timestamp_is_not_taken(
    client: TufClient, repo: Simulator
) -> None:
    assert client.refresh() == 0
    before = client.kept("timestamp")
    repo.timestamp.snapshot_meta.version = 100
    repo.publish("timestamp", bump=False)
    assert client.refresh() == 0
    assert client.kept("timestamp") == before


@pytest.mark.parametrize("role", ["snapshot", "targets"])
@pytest.mark.parametrize("what", ["length", "hash", "version"])
def test_what_does_not_match_the_role_that_names_it_is_refused(
    client: TufClient, repo: Simulator, role: str, what: str
) -> None:
    assert client.refresh() == 0
    repo.hashes = True
    if role == "targets":
        repo.publish("targets")
        about = repo.snapshot.meta["targets.json"]
    else:
        repo.publish("targets", "snapshot")
        about = repo.timestamp.snapshot_meta
    if what == "length":
        about.length -= 1
    elif what == "hash":
        about.hashes = {"sha256": "0" * 64}
    else:
        about.version += 1
        repo.files[f"3.{role}.json"] = repo.files[f"2.{role}.json"]
    repo.publish(*(("snapshot", "timestamp") if role == "targets" else ("timestamp",)))
    assert client.refresh() == 1
    assert client.trusted()[role] == 1


def test_unknown_fields_are_signed_and_kept_and_nothing_else(client: TufClient, repo: Simulator) -> None:
    assert client.refresh() == 0
    repo.root.unrecognized_fields["custom"] = {"a": [1, {"b": "c"}]}
    repo.root.roles["root"].unrecognized_fields["other"] = "value"
    keyid = repo.root.roles["root"].keyids[0]
    repo.root.keys[keyid].unrecognized_fields["keyid_hash_algorithms"] = ["md5"]
    for role in ("targets", "snapshot", "timestamp"):
        repo.signed[role].unrecognized_fields["x"] = {"y": None}
    repo.publish("root", "targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    assert client.trusted() == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}
    changed = json.loads(repo.last("root"))
    changed["signed"]["custom"]["a"] = []
    repo.root.version = 3
    repo.put("root", json.dumps(changed | {"signed": changed["signed"] | {"version": 3}}).encode())
    assert client.refresh() == 1, "and a change to one of them breaks the signature"


@pytest.mark.parametrize("version", ["1.0", "1.0.99", "1.2.3"])
def test_another_version_of_the_same_specification_is_read(
    client: TufClient, repo: Simulator, version: str
) -> None:
    repo.timestamp.spec_version = version
    repo.publish("timestamp")
    assert client.refresh() == 0


@pytest.mark.parametrize("version", ["2.0.0", "0.9", "", "one"])
def test_another_specification_is_refused(client: TufClient, repo: Simulator, version: str) -> None:
    assert client.refresh() == 0
    repo.timestamp.spec_version = version
    repo.publish("timestamp")
    assert client.refresh() == 1
    assert client.trusted()["timestamp"] == 1


def test_without_consistent_snapshots_files_have_no_version_and_content_no_hash(
    client: TufClient, repo: Simulator
) -> None:
    repo.root.consistent_snapshot = False
    repo.add("targets", "file", b"content")
    repo.publish("root", "targets", "snapshot", "timestamp")
    assert client.download("file") == 0
    assert repo.asked == ["2.root", "3.root", "timestamp", "snapshot", "targets", "content file"]
    assert client.downloaded() == [b"content"]


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("how", ["garbage", "gone"])
def test_a_local_file_that_was_damaged_is_fetched_again(
    client: TufClient, repo: Simulator, role: str, how: str
) -> None:
    assert client.refresh() == 0
    path = client.metadata / f"{role}.json"
    path.unlink() if how == "gone" else path.write_bytes(b"{")
    assert client.refresh() == 0
    assert client.kept(role) == repo.last(role)


def test_a_repository_that_cannot_be_reached_leaves_what_is_trusted(made: Made, repo: Simulator) -> None:
    client = made(repo)
    assert client.init(repo.last("root")) == 0
    assert client.refresh() == 0
    before = client.trusted()
    client._url = "http://127.0.0.1:1/none"
    assert client.refresh() == 1
    assert client.trusted() == before


# Roots.

ROTATIONS = {
    "one key for another": [([1], 1, [1]), ([2], 1, [2, 1]), ([2], 1, [2])],
    "with signatures that nobody asked for": [([1], 1, [3, 1, 4]), ([2], 1, [3, 2, 1, 4]), ([2], 1, [3, 2, 4])],
    "three of five, each time others": [(range(5), 3, [0, 2, 4]), (range(5), 3, [0, 4, 1]), (range(5), 3, [0, 1, 3])],
    "three of five, one replaced": [(range(5), 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 1])],
    "three of five, one replaced in between": [
        (range(5), 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 2, 4, 5]), ([0, 1, 3, 4, 5], 3, [0, 4, 5])
    ],
    "three of five, all replaced": [
        (range(5), 3, [0, 2, 4]), (range(5, 10), 3, [0, 2, 4, 5, 6, 7]), (range(5, 10), 3, [5, 6, 7])
    ],
    "a higher threshold": [([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [1, 2])],
    "a lower threshold": [([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1, 2]), ([1, 2, 3], 1, [1])],
    "a second key and threshold": [([1], 1, [1]), ([1, 2], 2, [1, 2])],
    "no: without the old key": [([1], 1, [1]), ([2], 1, [2, 3, 4])],
    "no: without the new key": [([1], 1, [1]), ([2], 1, [1, 3, 4])],
    "no: too few of the new": [(range(5), 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 2, 4])],
    "no: too few of the old": [(range(5), 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 5])],
    "no: below the new threshold": [([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [2])],
    "no: below the old threshold": [([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1])],
    "no: nobody": [([1], 1, [1]), ([1], 1, [])],
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_root_rotation(made: Made, repo: Simulator, name: str) -> None:
    keys = [repo.fresh() for _ in range(10)]
    repo.root.version = 0
    published = []
    for listed, threshold, signers in ROTATIONS[name]:
        for keyid in list(repo.root.roles["root"].keyids):
            repo.root.revoke_key(keyid, "root")
        for number in listed:
            repo.root.add_key(keys[number].public_key, "root")
        repo.root.roles["root"].threshold = threshold
        repo.signers["root"] = [keys[number] for number in signers]
        repo.publish("root")
        published.append(repo.last("root"))
    client = made(repo)
    assert client.init(published[0]) == 0
    refused = name.startswith("no: ")
    assert client.refresh() == (1 if refused else 0)
    assert client.kept("root") == published[-2 if refused else -1]


def test_many_roots_are_followed_in_one_refresh(client: TufClient, repo: Simulator) -> None:
    for _ in range(40):
        (old,) = repo.signers["root"]
        repo.rotate("root")
        repo.signers["root"].append(old)
        repo.publish("root")
        repo.signers["root"].remove(old)
    assert client.refresh() == 0
    assert client.trusted()["root"] == 41


@pytest.mark.parametrize("version", [1, 3])
def test_a_root_of_another_version_than_was_asked_for_is_refused(
    client: TufClient, repo: Simulator, version: int
) -> None:
    assert client.refresh() == 0
    repo.root.version = version
    repo.publish("root", bump=False)
    repo.files["2.root.json"] = repo.last("root")
    assert client.refresh() == 1
    assert client.trusted()["root"] == 1


# Other roles' keys.

SIGNINGS = {
    "one new key": ([2], 1, [2]),
    "signatures that nobody asked for": ([1], 1, [3, 1, 4]),
    "three of five": (range(5), 3, [0, 2, 4]),
    "other three of five": (range(5), 3, [2, 3, 4]),
    "no: not the new key": ([2], 1, [1, 3, 4]),
    "no: one of three is a stranger's": ([0, 1, 3, 4, 5], 3, [0, 2, 4]),
    "no: one too few": ([0, 1, 3, 4, 5], 3, [0, 4]),
    "no: nobody": ([1], 1, []),
}


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("name", SIGNINGS)
def test_signatures_of_other_roles(client: TufClient, repo: Simulator, role: str, name: str) -> None:
    listed, threshold, signers = SIGNINGS[name]
    keys = [repo.fresh() for _ in range(6)]
    for keyid in list(repo.root.roles[role].keyids):
        repo.root.revoke_key(keyid, role)
    for number in listed:
        repo.root.add_key(keys[number].public_key, role)
    repo.root.roles[role].threshold = threshold
    repo.signers[role] = [keys[number] for number in signers]
    repo.publish("root", "targets", "snapshot", "timestamp")
    refused = name.startswith("no: ")
    assert client.refresh() == (1 if refused else 0)
    assert client.trusted()["root"] == 2
    assert client.kept(role) == (None if refused else repo.last(role))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_usual_algorithm_is_verified(server: Server, made: Made, algorithm: str) -> None:
    repo = server.add(Simulator(algorithm))
    client = made(repo)
    assert client.init(repo.last("root")) == 0
    assert client.refresh() == 0
    repo.signers["timestamp"] = [repo.fresh()]
    repo.publish("timestamp")
    assert client.refresh() == 1


def test_one_key_under_many_names_signs_once(client: TufClient, repo: Simulator) -> None:
    assert client.refresh() == 0
    signer = repo.signers["snapshot"][0]
    names = [signer.public_key.keyid]
    for number in range(8):
        again = repo.fresh()
        again._private_key, again.public_key.keyval = signer._private_key, signer.public_key.keyval
        again.public_key.keyid = f"{number:064x}"
        repo.key("snapshot", again)
        names.append(again.public_key.keyid)
    repo.root.roles["snapshot"].threshold = 6
    repo.publish("root", "targets", "snapshot", "timestamp")
    assert len(Metadata.from_bytes(repo.last("snapshot")).signatures) == len(names)
    assert client.refresh() == 1
    assert client.trusted()["snapshot"] == 1


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("how", ["broken", "missing", "twice", "no list", "not hex"])
def test_a_signature_that_is_broken_missing_or_there_twice_is_refused(
    client: TufClient, repo: Simulator, role: str, how: str
) -> None:
    assert client.refresh() == 0
    repo.publish(*dict.fromkeys(("targets", "snapshot", "timestamp", "root")))
    document = json.loads(repo.last(role))
    signatures = document["signatures"]
    if how == "broken":
        signatures[0]["sig"] = ("0" if signatures[0]["sig"][0] != "0" else "1") + signatures[0]["sig"][1:]
    elif how == "missing":
        signatures.clear()
    elif how == "twice":
        signatures *= 2
    elif how == "no list":
        document["signatures"] = {}
    else:
        signatures[0]["sig"] = "zz"
    repo.files[f"2.{role}.json"] = json.dumps(document).encode()
    if role == "timestamp":
        repo.files["timestamp.json"] = repo.files["2.timestamp.json"]
    assert client.refresh() == 1
    assert client.trusted()[role] == 1
