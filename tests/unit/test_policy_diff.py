"""What changes between two policies is shown to whoever approves: every line of it, in any size."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.cli import policydiff


def content(*rules: str, sets: dict[str, list[str]] | None = None) -> bytes:
    plain = {"version": 1, "sets": sets or {}, "rules": [{"name": name, "action": "drop"} for name in rules]}
    return json.dumps(plain).encode()


@pytest.fixture
def as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policydiff, "LARGE", 0)


def test_a_small_policy_is_compared_field_by_field() -> None:
    before, after = b'{"version":1,"default":"accept"}', b'{"version":1,"default":"drop"}'
    assert policydiff.diff(before, after) == ('-  "default": "accept"', '+  "default": "drop"')


def test_a_large_policy_is_compared_rule_by_rule_and_prefix_by_prefix(as_large: None) -> None:
    before = content("a", "b", "c", sets={"office": ["203.0.113.0/24", "198.51.100.0/24"]})
    after = content("a", "x", "c", sets={"office": ["203.0.113.0/24"]})
    assert policydiff.diff(before, after) == (
        '-sets.office: "198.51.100.0/24"',
        '-rules: {"name":"b","action":"drop"}',
        '+rules: {"name":"x","action":"drop"}',
    )
    assert policydiff.diff(after, after) == ()
    assert len(policydiff.diff(None, after)) == 5


def test_a_rule_that_only_moved_is_shown_since_the_first_match_wins(as_large: None) -> None:
    found = policydiff.diff(content("a", "b", "c", "d"), content("b", "c", "d", "a"))
    assert [line[:1] + json.loads(line.split(": ", 1)[1])["name"] for line in found] == ["-a", "+a"]


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_lines_shown_lead_from_one_policy_to_the_other(old: list[str], new: list[str]) -> None:
    """Taking away what has a minus and leaving out what has a plus leaves the same on both sides, in order."""
    shown = list(policydiff._large(old, new))
    removed, added = ([line[1:] for line in shown if line[0] == sign] for sign in "-+")
    assert len(old) - len(removed) == len(new) - len(added)
    assert sorted([*old, *added]) == sorted([*new, *removed])
    assert (old == new) == (not shown)


def test_a_hundred_thousand_rules_in_another_order_are_compared_too() -> None:
    names = [f"r{number}" for number in range(100_000)]
    found = policydiff.diff(content(*names), content(*reversed(names)))
    assert len(found) == 2 * (len(names) - 1)
