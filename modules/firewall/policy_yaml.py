"""YAML, read from the parser's events: no tags, no surprises, bounded in depth and in what aliases may expand to.

Words and numbers are resolved as YAML 1.2 does: `yes`, `on` and `22:30` are text, `010` is not eight. Built from events
rather than PyYAML's constructors, so nothing in a text can name a Python type, and depth costs no recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)
from yaml.reader import Reader

from loopback.modules.firewall.policy_text import MAX_DEPTH, Mark, Path, Place, place_of, quote

MAX_VALUES: Final = 4_000_000  # values after aliases are expanded; a million prefixes and 100k rules fit

_LOADER: Any = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # the C parser is ten times faster, where it was built
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,16}")
_FLOAT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})?\.[0-9]{1,18}(?:[eE][-+]?[0-9]{1,2})?")
_WORDS: Final = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_TAGS: Final = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq"))


class Malformed(Exception):
    """The text is no YAML that we read."""

    def __init__(self, place: Place | None, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.place = place
        self.message = message
        self.hint = hint


def _place(mark: Any) -> Place | None:
    return Place(mark.line + 1, mark.column + 1) if mark is not None else None


def _line(mark: Any) -> int:
    return int(mark.line) + 1


def _events(text: str) -> Iterator[Any]:
    """The parser's events, its errors as ours."""
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        said = error.problem or error.context or "it does not read"
        place = _place(error.problem_mark or error.context_mark)
        rows = text.split("\n")[place.line - 1 : place.line] if place else []
        tab = "tab" in said or any(row[place.column - 1 :].startswith("\t") for row in rows if place)
        raise Malformed(place, f"not YAML: {said}", "indent with spaces" if tab else "") from None
    except yaml.YAMLError as error:  # a reader error: characters that YAML does not allow
        wrong = Reader.NON_PRINTABLE.search(text)
        place = place_of(text, wrong.start()) if wrong else None
        raise Malformed(place, f"not YAML: {str(error).splitlines()[0]}") from None


def scalar(event: ScalarEvent) -> Any:
    """The value of one scalar."""
    if event.tag is not None and event.tag not in _TAGS:
        raise Malformed(
            _place(event.start_mark), f"the tag {quote(event.tag)} is not allowed", "leave it out"
        )
    text: str = event.value
    if (event.style is not None and event.style != "") or event.tag is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Open:
    """A collection whose end has not come yet."""

    __slots__ = ("anchor", "before", "expect_key", "key", "value")

    def __init__(self, value: Any, anchor: str | None, before: int) -> None:
        self.value = value
        self.anchor = anchor
        self.before = before  # how many values had been counted when it began
        self.key: str = ""
        self.expect_key = isinstance(value, dict)


def read(text: str) -> tuple[Any, dict[Path, int]]:
    """The one document of a text as plain values, and the lines of what its top lists hold. Raises Malformed."""
    lines: dict[Path, int] = {}
    top: list[Any] = []
    stack: list[_Open] = []
    anchors: dict[str, tuple[Any, int]] = {}
    count = documents = 0
    for event in _events(text):
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise Malformed(
                    _place(event.start_mark), "there is a second document", "put each policy in its own file"
                )
            continue
        if isinstance(event, CollectionEndEvent):
            done = stack.pop()
            if done.anchor is not None:
                anchors[done.anchor] = (done.value, count - done.before)
            continue
        if not isinstance(event, NodeEvent):
            continue
        place = event.start_mark
        opened: _Open | None = None
        value: Any
        if isinstance(event, ScalarEvent):
            value = scalar(event)
            count += 1
            if event.anchor is not None:
                anchors[event.anchor] = (value, 1)
        elif isinstance(event, AliasEvent):
            if event.anchor not in anchors:  # unknown, or an alias of what it stands in
                raise Malformed(_place(place), f"the alias *{event.anchor} names nothing that is complete")
            value, weight = anchors[event.anchor]
            count += weight
        else:
            assert isinstance(event, MappingStartEvent | SequenceStartEvent)
            if event.tag is not None and event.tag not in _TAGS:
                raise Malformed(_place(place), f"the tag {quote(event.tag)} is not allowed", "leave it out")
            value = {} if isinstance(event, MappingStartEvent) else []
            opened = _Open(value, event.anchor, count)
            count += 1
        if count > MAX_VALUES:
            raise Malformed(_place(place), f"more than {MAX_VALUES} values once its aliases are expanded")
        if len(stack) == 2 and isinstance(stack[1].value, list):
            lines[(stack[0].key, len(stack[1].value))] = _line(place)
        _put(top, stack, value, place)
        if opened is not None:
            stack.append(opened)
            if len(stack) > MAX_DEPTH:
                raise Malformed(_place(place), f"nested more than {MAX_DEPTH} deep")
    return (top[0] if top else None), lines


def _put(top: list[Any], stack: list[_Open], value: Any, mark: Any) -> None:
    """Hand a value to the collection that is open."""
    if not stack:
        top.append(value)
        return
    inner = stack[-1]
    if isinstance(inner.value, list):
        inner.value.append(value)
    elif inner.expect_key:
        if isinstance(value, bool | float | dict | list) or value is None:
            raise Malformed(_place(mark), f"a key is a word, not {quote(value)}", "quote it")
        inner.key = str(value)
        if inner.key in inner.value:
            raise Malformed(_place(mark), f"the key {quote(inner.key)} is there twice", "keep one of them")
        inner.value[inner.key] = None
        inner.expect_key = False
    else:
        inner.value[inner.key] = value
        inner.expect_key = True


def marks(text: str) -> Iterator[tuple[Mark, Place]]:
    """Every key and value of a text that `read` accepts, in order, with its place; not what aliases repeat."""
    path: list[str | int] = []
    kinds: list[bool] = []  # for each open collection: whether it is a mapping
    for event in _events(text):
        if isinstance(event, CollectionEndEvent):
            kinds.pop()
            path.pop()
            _step(path, kinds)
            continue
        if not isinstance(event, NodeEvent):
            continue
        place = _place(event.start_mark) or Place(1, 1)
        if kinds and kinds[-1] and path[-1] == _AWAITING_KEY:
            value = scalar(event) if isinstance(event, ScalarEvent) else f"*{event.anchor}"
            path[-1] = str(value)
            yield Mark(tuple(path), key=True), place
            continue
        yield Mark(tuple(path)), place
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            kinds.append(isinstance(event, MappingStartEvent))
            path.append(_AWAITING_KEY if kinds[-1] else 0)
        else:
            _step(path, kinds)


_AWAITING_KEY: Final = -1  # stands in a path where a mapping's next key will be


def _step(path: list[str | int], kinds: list[bool]) -> None:
    """A value is complete: on to the next index or key."""
    if kinds:
        last = path[-1]
        path[-1] = _AWAITING_KEY if kinds[-1] else (last + 1 if isinstance(last, int) else 0)
