"""The second half of `test_tuf_conformance.py`: content, and delegations on the way to it."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from support_simulator import Simulator, TufClient
from tuf.api.metadata import TargetFile

from loopback.cli import tufclient

# Content.


@pytest.mark.parametrize("path", ["file.txt", "path/to/a/file.txt", "odd name+é?#.txt", "..", "a/../../b"])
@pytest.mark.parametrize("hashes", [False, True])
def test_content_is_brought_from_where_it_is_and_stays_in_its_folder(
    client: TufClient, repo: Simulator, path: str, hashes: bool
) -> None:
    repo.hashes = hashes
    repo.add("targets", path, b"content")
    repo.publish("targets", "snapshot", "timestamp")
    if path == "..":  # no name for a file
        assert client.download(path) == 1
    else:
        assert client.download(path) == 0
        assert client.downloaded() == [b"content"]
    assert sorted(p.name for p in client.artifacts.parent.iterdir()) == [
        "artifacts",
        "initial.json",
        "metadata",
    ]


@pytest.mark.parametrize("instead", [b"malicious", b"", b"good content and more", b"good conten"])
def test_substituted_content_is_refused_and_not_kept(
    client: TufClient, repo: Simulator, instead: bytes
) -> None:
    repo.add("targets", "one", b"good content")
    repo.add("targets", "two", b"good content")
    repo.publish("targets", "snapshot", "timestamp")
    assert client.download("one") == 0
    repo.content = {"one": instead, "two": instead}
    assert client.download("one") == 0, "what is here and right is not fetched again"
    assert client.download("two") == 1
    assert client.downloaded() == [b"good content"]


def test_content_that_is_here_is_not_asked_for_again(client: TufClient, repo: Simulator) -> None:
    repo.add("targets", "file", b"content")
    repo.publish("targets", "snapshot", "timestamp")
    assert client.download("file") == 0
    assert sum(a.startswith("content") for a in repo.asked) == 1
    assert client.download("file") == 0
    assert sum(a.startswith("content") for a in repo.asked) == 1
    next(client.artifacts.iterdir()).write_bytes(b"changed")
    assert client.download("file") == 0
    assert sum(a.startswith("content") for a in repo.asked) == 2


def test_content_that_changes_often_is_followed_and_replaced(client: TufClient, repo: Simulator) -> None:
    for number in range(11):
        repo.add("targets", "file", b"content %d" % number)
        repo.publish("targets", "snapshot", "timestamp")
        if number % 5 == 0:
            assert client.download("file") == 0
            assert client.downloaded() == [b"content %d" % number]
            repo.content["file"] = b"malicious %d" % number
            repo.publish("targets", "snapshot", "timestamp")
            client.download("file")
            assert client.downloaded() == [b"content %d" % number]


def test_content_over_the_limit_is_not_asked_for(client: TufClient, repo: Simulator) -> None:
    repo.targets.targets["huge"] = TargetFile(1 << 40, {"sha256": "0" * 64}, "huge")
    repo.publish("targets", "snapshot", "timestamp")
    assert client.download("huge") == 1
    assert not any(a.startswith("content") for a in repo.asked)


# Delegations: (delegator, role, what) in order of appearance, and the order of search.

ANY: dict[str, Any] = {}
GRAPHS: dict[str, tuple[list[tuple[str, str, dict[str, Any]]], list[str]]] = {
    "one": ([("targets", "A", ANY)], ["A"]),
    "two beside each other": ([("targets", "A", ANY), ("targets", "B", ANY)], ["A", "B"]),
    "two levels": ([("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY)], ["A", "B", "C"]),
    "depth first": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", ANY), ("A", "D", ANY)], ["A", "C", "D", "B"]
    ),
    "depth first, three levels": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", ANY), ("C", "D", ANY)], ["A", "C", "D", "B"]
    ),
    "terminating": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", {"terminating": True}), ("A", "D", ANY)], ["A", "C"]
    ),
    "terminating, but for its own": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", {"terminating": True}), ("C", "D", ANY)],
        ["A", "C", "D"],
    ),
    "terminating where it does not match": (
        [("targets", "A", {"terminating": True, "paths": ["*.py"]}), ("targets", "B", ANY)], ["B"]
    ),
    "other paths": ([("targets", "A", {"paths": ["*.py"]}), ("targets", "B", ANY), ("A", "C", ANY)], ["B"]),
    "other paths below": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", {"paths": ["*.py"]}), ("C", "D", ANY)], ["A", "B"]
    ),
    "a circle": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY), ("C", "D", ANY), ("D", "B", ANY)],
        ["A", "B", "C", "D"],
    ),
    "two that delegate to one": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY), ("A", "C", ANY)], ["A", "C", "B"]
    ),
    "two that delegate to one, by other paths": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY), ("A", "C", {"paths": ["*.py"]})],
        ["A", "B", "C"],
    ),
    "a hash prefix that matches": (
        [("targets", "A", {"paths": None, "prefixes": [hashlib.sha256(b"missing").hexdigest()[:2]]})], ["A"]
    ),
    "a hash prefix that does not": ([("targets", "A", {"paths": None, "prefixes": ["zz"]})], []),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_delegations_are_searched_in_order(client: TufClient, repo: Simulator, name: str) -> None:
    graph, order = GRAPHS[name]
    for delegator, role, what in graph:
        repo.delegate(delegator, role, **what)
    repo.publish(*dict.fromkeys(role for _, role, _ in graph), "targets", "snapshot", "timestamp")
    assert client.download("missing") == 1
    searched = [a.partition(".")[2] for a in repo.asked[4:]]
    assert searched == order


@pytest.mark.parametrize(
    ("path", "order", "found"),
    [
        ("targetfile", [], True),
        ("README.md", ["A"], True),
        ("releases/x/x_v1", ["B", "C"], True),
        ("releases/y/y_v1.zip", ["B", "D"], True),
        ("releases/z/z_v1.zip", ["B"], False),
    ],
)
def test_a_target_is_found_where_every_delegation_on_the_way_allows_it(
    client: TufClient, repo: Simulator, path: str, order: list[str], found: bool
) -> None:
    repo.delegate("targets", "A", paths=["*.doc", "*.md"])
    repo.delegate("targets", "B", paths=["releases/*/*"])
    repo.delegate("B", "C", paths=["releases/x/*"])
    repo.delegate("B", "D", paths=["releases/y/*.zip"])
    repo.add("targets", "targetfile", b"t")
    repo.add("A", "README.md", b"a")
    repo.add("C", "releases/x/x_v1", b"x")
    repo.add("D", "releases/y/y_v1.zip", b"y")
    repo.add("D", "releases/z/z_v1.zip", b"z")
    repo.publish("A", "B", "C", "D", "targets", "snapshot", "timestamp")
    assert client.download(path) == (0 if found else 1)
    assert client.downloaded() == ([repo.content[path]] if found else [])
    searched = [a.partition(".")[2] for a in repo.asked[4:] if not a.startswith("content")]
    assert searched == order


def test_hash_bins_are_followed_to_the_one_that_matches(client: TufClient, repo: Simulator) -> None:
    roles = repo.bins(3, "bin")
    role = roles.get_role_for_target("file")
    repo.add(role, "file", b"content")
    repo.publish(*roles.get_roles(), "targets", "snapshot", "timestamp")
    assert client.download("file") == 0
    assert [a for a in repo.asked if "bin" in a] == [f"1.{role}"]


@pytest.mark.parametrize("name", ["?", "#", "/role", "../role", "a b", "é", "%2e"])
def test_odd_role_names_are_quoted_in_requests_and_file_names(
    client: TufClient, repo: Simulator, name: str
) -> None:
    repo.delegate("targets", name)
    repo.publish(name, "targets", "snapshot", "timestamp")
    assert client.download("missing") == 1
    assert client.trusted() == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2, name: 1}
    assert not list(client.metadata.parent.glob("role*"))


def test_no_more_delegations_are_visited_than_the_limit(client: TufClient, repo: Simulator) -> None:
    names = [f"r{number}" for number in range(tufclient.LIMITS.delegations + 20)]
    for name in names:
        repo.delegate("targets", name)
        repo.signers[name] = repo.signers[names[0]]
    assert repo.targets.delegations is not None and repo.targets.delegations.roles is not None
    for role in repo.targets.delegations.roles.values():
        role.keyids[:] = [repo.signers[names[0]][0].public_key.keyid]
    repo.add(names[-1], "file", b"content")
    repo.publish(*names, "targets", "snapshot", "timestamp")
    assert client.download("file") == 1
    assert len(repo.asked[4:]) == tufclient.LIMITS.delegations


def test_a_delegated_role_signed_by_somebody_else_is_refused(client: TufClient, repo: Simulator) -> None:
    repo.delegate("targets", "role")
    repo.add("role", "file", b"content")
    repo.signers["role"] = [repo.fresh()]
    repo.publish("role", "targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    assert client.download("file") == 1
    assert set(client.trusted()) == {"root", "timestamp", "snapshot", "targets"}
