"""How two policies differ, line by line, for the person who signs the second. Pure.

A small one is compared as indented JSON. One of a hundred thousand rules would have a million such lines, on which `difflib`
takes minutes: there a line is a whole rule, or one prefix of a set, and the longest run of lines that stay in order is found in
n·log n steps.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

import msgspec

LARGE: Final = 512 * 1024  # bytes of either content


def diff(before: bytes | None, after: bytes) -> tuple[str, ...]:
    """The lines that differ, with a `+` or a `-` before each; all of them where there was none before."""
    if len(after) <= LARGE and len(before or b"") <= LARGE:
        return tuple(_small(before, after))
    return tuple(_large(_compact(before) if before else [], _compact(after)))


def _small(before: bytes | None, after: bytes) -> Iterator[str]:
    old = _indented(before) if before else []
    for line in difflib.unified_diff(old, _indented(after), n=0, lineterm=""):
        if not line.startswith(("+++", "---", "@@")):
            yield line


def _indented(content: bytes) -> list[str]:
    return msgspec.json.format(content, indent=2).decode().splitlines()


def _compact(content: bytes) -> list[str]:
    """A line for each value two deep: `rules: {"name": …}`, `sets.office: "203.0.113.0/24"`."""
    return list(_leaves("", msgspec.json.decode(content), 2))


def _leaves(path: str, value: Any, depth: int) -> Iterator[str]:
    if depth and isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}" if path else key, inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            yield f"{path}: {msgspec.json.encode(inner).decode()}"
    else:
        yield f"{path}: {msgspec.json.encode(value).decode()}"


def _large(old: list[str], new: list[str]) -> Iterator[str]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, line in enumerate(new):
        places[line].append(place)
    used: dict[str, int] = defaultdict(int)
    pairs = []  # (place in old, place in new): the k-th time that a line occurs on both sides
    for place, line in enumerate(old):
        if (found := places.get(line)) is not None and used[line] < len(found):
            pairs.append((place, found[used[line]]))
            used[line] += 1
    at = 0
    start = 0
    for kept_old, kept_new in [*_rising(pairs), (len(old), len(new))]:
        yield from ("-" + line for line in old[start:kept_old])
        yield from ("+" + line for line in new[at:kept_new])
        start, at = kept_old + 1, kept_new + 1


def _rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of pairs in which both places rise (patience sorting)."""
    tops: list[int] = []  # the smallest second place that ends a run of each length
    ends: list[int] = []  # which pair that is
    before: list[int] = []
    for number, (_, second) in enumerate(pairs):
        length = bisect_left(tops, second)
        before.append(ends[length - 1] if length else -1)
        if length == len(tops):
            tops.append(second)
            ends.append(number)
        else:
            tops[length], ends[length] = second, number
    run = []
    number = ends[-1] if ends else -1
    while number >= 0:
        run.append(pairs[number])
        number = before[number]
    return run[::-1]
