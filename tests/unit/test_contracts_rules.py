"""A workspace's rules, with those of every workspace: of the two, always the stricter holds."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import Floor, Operator, Trust, TrustDocument, WorkspaceRules

SOON = datetime(2026, 12, 1, tzinfo=UTC)


def trust(**workspaces: WorkspaceRules) -> Trust:
    named = {name.replace("every", "*"): rules for name, rules in workspaces.items()}
    return Trust(TrustDocument(version=1, operators=(), services={}, workspaces=named))


def test_a_workspace_without_rules_has_none() -> None:
    assert trust().rules("prod") == WorkspaceRules()


def test_regulated_everywhere_is_regulated_here() -> None:
    assert trust(every=WorkspaceRules(regulated=True), prod=WorkspaceRules()).rules("prod").regulated


def test_a_publisher_must_be_pinned_by_both() -> None:
    rules = trust(
        every=WorkspaceRules(publishers={"firewall": ("a", "b"), "edge": ("e",)}),
        prod=WorkspaceRules(publishers={"firewall": ("b", "c"), "probe": ("p",)}),
    ).rules("prod")
    assert rules.publishers == {"firewall": ("b",), "edge": ("e",), "probe": ("p",)}


def test_the_higher_floor_holds_by_version_and_not_by_letter() -> None:
    rules = trust(
        every=WorkspaceRules(floors={"firewall": Floor("1.9.0")}),
        prod=WorkspaceRules(floors={"firewall": Floor("1.10.0", SOON)}),
    ).rules("prod")
    assert rules.floors["firewall"] == Floor("1.10.0", SOON)


def test_of_two_equal_floors_the_earlier_holds() -> None:
    for first, second in ((None, SOON), (SOON, None)):
        rules = trust(
            every=WorkspaceRules(floors={"firewall": Floor("2.0", first)}),
            prod=WorkspaceRules(floors={"firewall": Floor("2.0", second)}),
        ).rules("prod")
        assert rules.floors["firewall"] == Floor("2.0")


versions = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda v: f"{v[0]}.{v[1]}")
rules = st.builds(
    WorkspaceRules,
    regulated=st.booleans(),
    publishers=st.dictionaries(
        st.sampled_from("mn"), st.lists(st.sampled_from("abc"), unique=True).map(tuple)
    ),
    floors=st.dictionaries(st.sampled_from("mn"), st.builds(Floor, versions)),
)


@given(rules, rules)
def test_together_they_never_allow_what_one_of_them_forbids(
    every: WorkspaceRules, own: WorkspaceRules
) -> None:
    both = trust(every=every, prod=own).rules("prod")
    for one in (every, own):
        assert both.regulated >= one.regulated
        for module, keys in one.publishers.items():
            assert set(both.publishers[module]) <= set(keys)
        for module, floor in one.floors.items():
            assert Version(both.floors[module].version) >= Version(floor.version)


def test_a_floor_that_is_no_version_is_refused_when_the_document_is_read() -> None:
    document = TrustDocument(
        version=1,
        operators=(),
        services={},
        workspaces={"prod": WorkspaceRules(floors={"m": Floor("newest")})},
    )
    with pytest.raises(Refused) as caught:
        Trust.decode(msgspec.json.encode(document))
    assert caught.value.code is Code.TUF_INVALID and "newest" in caught.value.reason


def test_one_key_is_not_two_operators() -> None:
    """The second would silently take the first one's name and roles; what one key signs is one person's word."""
    key = SigningKey.generate().public.text
    both = tuple(Operator(name, text, {}) for name, text in (("ann", key), ("bob", key.upper())))
    with pytest.raises(Refused, match="one key to two operators, 'ann' and 'bob'"):
        Trust.decode(msgspec.json.encode(TrustDocument(version=1, operators=both, services={})))
