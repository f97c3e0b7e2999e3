"""Frames that no sane machine sends: the programs and a plain reader say the same of each, and the kernel says nothing."""

from __future__ import annotations

import plain_frames
import pytest
from fuzz import frames

pytestmark = pytest.mark.kernel

EXECUTIONS = 100_000


def test_a_hundred_thousand_mutated_frames_get_the_stated_answers() -> None:
    found = frames.tried(EXECUTIONS, seed=4, jobs=2)
    assert found["executions"] >= EXECUTIONS
    assert not found["findings"] and not found["kernel"]
    assert set(found["kinds"]) == {"parsed", "essential", "truncated", "unparsed"}
    assert min(found["kinds"].values()) > EXECUTIONS / 100, "each kind was tried often"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOST_EXTENSIONS", 7),
        ("MOST_VLANS", 1),
        ("WITH_PORTS", (6, 17, 33, 132)),
        ("EXTENSIONS", (0, 43, 44, 60)),
    ],
)
def test_a_reader_that_differs_in_one_thing_is_noticed(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_frames, name, value)
    assert frames.trial(20_000, seed=5).findings
