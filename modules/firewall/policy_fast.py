"""The quick way through a policy that is right: JSON whose rules were mostly read before.

One rule of ten thousand changes, and the text of all of them comes again. So the text is cut into its rules at C speed, and a
rule whose very text was in one of the last two policies is taken as it was read then; the same for tests and sets. What is new
goes through the readers that everything goes through.

This reader never says what is wrong: for whatever is not plainly right it returns None, and the slow way decides. It must take
nothing that the slow way refuses, and read it as the slow way does (tests/unit/test_policy_fast.py).
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from loopback.modules.firewall import policy_columns, policy_rules
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.model import (
    Direction,
    FilledSet,
    FirewallPolicy,
    PacketTest,
    PrefixTable,
    Rule,
)
from loopback.modules.firewall.policy_fields import Wrong
from loopback.modules.firewall.policy_tables import (
    DEFAULT,
    MAX_RULES,
    MAX_SET,
    MAX_SETS,
    MAX_TESTS,
    POLICY,
    RULE,
    TEST,
    VERSION,
    prefixes,
    read_table,
)
from loopback.modules.firewall.policy_text import MAX_TEXT, read_json
from loopback.modules.firewall.prefixes import no_collection
from loopback.modules.firewall.prefixes import read_json as read_prefixes

_KEY = re.compile(rb'[ \t\n\r]*"([^"\\]*)"[ \t\n\r]*:[ \t\n\r]*')
_COMMA = re.compile(rb"[ \t\n\r]*,")
_END = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*")
_BEGIN = re.compile(rb"[ \t\n\r]*\{")
MANY: Final = 32  # rules, from which on it pays to read them by columns
_WORTH_DIGEST: Final = 4096  # bytes; the text of a longer set is remembered by its SHA-256
_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])

T = TypeVar("T")


class _NotPlain(Exception):
    """Not plainly right."""


class _Memo(Generic[T]):
    """What the texts of the last two lists mean."""

    def __init__(self) -> None:
        self._now: dict[bytes, T] = {}
        self._before: dict[bytes, T] = {}

    def clear(self) -> None:
        self._now, self._before = {}, {}

    def find(self, texts: Sequence[bytes]) -> list[T | None]:
        found: list[T | None] = list(map(self._now.get, texts))
        if None in found:
            found = [self._before.get(t) if f is None else f for t, f in zip(texts, found, strict=True)]
        return found

    def keep(self, texts: Sequence[bytes], found: Sequence[T], *, only: bool = False) -> None:
        """These are the last; with `only`, what was before them is forgotten."""
        if only:
            self._now, self._before = dict(zip(texts, found, strict=True)), {}
        elif len(texts) != len(self._now) or not all(map(self._now.__contains__, texts)):
            self._now, self._before = dict(zip(texts, found, strict=True)), self._now


_rules: Final[_Memo[Rule]] = _Memo()
_tests: Final[_Memo[PacketTest]] = _Memo()
_sets: Final[_Memo[PrefixTable | FilledSet]] = _Memo()


_families: dict[str, frozenset[int]] = {}  # of sets; all remembered rules were found to make sense with them
_LOCK: Final = threading.Lock()


def forget() -> None:
    """Read everything anew next time; for tests and measurements."""
    with _LOCK:
        for memo in (_rules, _tests, _sets):
            memo.clear()
        for known in _KNOWN.values():
            known.clear()


def read(data: bytes) -> FirewallPolicy | None:
    """The policy of a JSON text that is plainly right; else None, whatever the reason."""
    if len(data) > MAX_TEXT or _BEGIN.match(data) is None:
        return None
    try:
        with _LOCK, no_collection():
            return _policy(data)
    except (_NotPlain, Wrong, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _policy(data: bytes) -> FirewallPolicy:
    top, places = _members(data)
    if not {"version", "default"} <= top.keys() <= POLICY.keys() or bytes(top["version"]) != b"%d" % VERSION:
        raise _NotPlain
    default = read_table(read_json(bytes(top["default"]).decode()), DEFAULT, "default")
    sets, filled, bounds = policy_rules.parted(_named(bytes(top["sets"])) if "sets" in top else {})
    lined = b"\n" in data.strip()
    items, lines = _items(data, top, places, "rules", MAX_RULES, lined)
    rules = _rules.find(items)
    _read_rules(items, rules, bounds)
    found: list[Rule] = rules  # type: ignore[assignment]  # none is None any more
    if len({rule.name for rule in found}) != len(found):
        raise _NotPlain
    global _families
    families = {name: policy_rules.set_families(table) for name, table in bounds.items()}
    if families != _families:
        _check_sets(found, bounds)
    _rules.keep(items, found, only=families != _families)
    _families = families
    if lined:
        found = [msgspec.structs.replace(rule, line=line) for rule, line in zip(found, lines, strict=True)]
    return FirewallPolicy(
        default={Direction.INGRESS: default["ingress"], Direction.EGRESS: default["egress"]},
        sets=sets,
        rules=tuple(found),
        tests=_read_tests(data, top, places, lined),
        filled=filled,
    )


def _read_rules(items: Sequence[bytes], rules: list[Rule | None], sets: Mapping[str, PrefixTable]) -> None:
    """Read what is not known, all at once where it is much."""

    def one(text: bytes) -> Rule:
        return policy_rules.rule(_fields(msgspec.json.decode(text)), sets, 0)

    places = [at for at, rule in enumerate(rules) if rule is None]
    if len(places) >= MANY:
        made = policy_columns.read([items[at] for at in places], sets, one)
        if made is not None:
            for at, rule in zip(places, made, strict=True):
                rules[at] = rule
            return
    for at, plain in _read_new(items, rules):
        rules[at] = policy_rules.rule(_fields(plain), sets, 0)


def _read_tests(
    data: bytes, top: Mapping[str, msgspec.Raw], places: Mapping[str, int], lined: bool
) -> tuple[PacketTest, ...]:
    items, lines = _items(data, top, places, "tests", MAX_TESTS, lined)
    tests = _tests.find(items)
    for at, plain in _read_new(items, tests):
        read = read_table(plain, TEST, "test")
        tests[at] = PacketTest(read["packet"], read["expect"], 0)
    found: list[PacketTest] = tests  # type: ignore[assignment]  # none is None any more
    _tests.keep(items, found)
    if lined:
        found = [msgspec.structs.replace(test, line=line) for test, line in zip(found, lines, strict=True)]
    return tuple(found)


def _members(text: bytes) -> tuple[dict[str, msgspec.Raw], dict[str, int]]:
    """An object's members and their offsets. Of a repeated key the decoder keeps the last, so each is looked for."""
    found = _MEMBERS.decode(text)
    places: dict[str, int] = {}
    begun = _BEGIN.match(text)
    at = begun.end() if begun else 0
    while found:
        key = _KEY.match(text, at)
        if key is None:
            raise _NotPlain
        name = key[1].decode()
        value = bytes(found[name]) if name in found and name not in places else b""
        if not value or not text.startswith(value, key.end()):
            raise _NotPlain
        places[name] = key.end()
        at = key.end() + len(value)
        comma = _COMMA.match(text, at)
        if comma is None:
            break
        at = comma.end()
    if len(places) != len(found) or (found and _END.fullmatch(text, at) is None):
        raise _NotPlain
    return found, places


def _items(
    data: bytes, top: Mapping[str, msgspec.Raw], places: Mapping[str, int], key: str, most: int, lined: bool
) -> tuple[list[bytes], list[int]]:
    """The texts of a list's items, and, where that is asked for, the lines they begin in."""
    if key not in top:
        return [], []
    texts = list(map(bytes, _ITEMS.decode(top[key])))
    if len(texts) > most:
        raise _NotPlain
    lines = []
    if lined:
        at = places[key]
        line = 1 + data.count(b"\n", 0, at)
        for text in texts:
            begins = data.find(text, at)  # between two items there is only space and a comma
            line += data.count(b"\n", at, begins)
            lines.append(line)
            at = begins + len(text)
            line += text.count(b"\n")
    return texts, lines


def _read_new(texts: Sequence[bytes], found: Sequence[object]) -> list[tuple[int, Any]]:
    """The places that are still empty, with the plain values of their texts."""
    places = [at for at, known in enumerate(found) if known is None]
    if not places:
        return []
    joined = b"[" + b",".join(texts[at] for at in places) + b"]"
    plain = msgspec.json.decode(joined)
    # A repeated key is lost in decoding, and then the text does not come back; the slow decoder knows it from other reasons.
    if msgspec.json.encode(plain) != msgspec.json.format(joined, indent=-1):
        plain = read_json(joined.decode())
    return list(zip(places, plain, strict=True))


#: Fields whose readers depend on nothing but a text or a number, and what those were read as; bounded in `_fields`.
_KNOWN: Final[dict[str, dict[str | int, Any]]] = {
    key: {} for key in RULE if key not in ("name", "log", "limit", "icmp")
}
_LISTS: Final = _KNOWN.keys() - {"direction", "action"}  # of which a list of one means the one
_MOST_KNOWN: Final = 65_536  # texts remembered for each field


def _fields(plain: Any) -> dict[str, Any]:
    """The same as `read_table(plain, RULE, "rule")`, with what single texts mean remembered."""
    if not isinstance(plain, dict) or "name" not in plain or "action" not in plain:
        raise _NotPlain
    found = {}
    for key, value in plain.items():
        one = value[0] if type(value) is list and len(value) == 1 and key in _LISTS else value
        if key in _KNOWN and (type(one) is str or type(one) is int):  # no bool: True is 1 to a dict
            known = _KNOWN[key]
            read = known.get(one)
            if read is None:
                read = RULE[key].read(one)
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                known[one] = read
            found[key] = read
        elif key in RULE:
            found[key] = RULE[key].read(value)
        else:
            raise _NotPlain
    return found


def _named(text: bytes) -> dict[str, PrefixTable | FilledSet]:
    """The sets."""
    members, _ = _members(text)
    if len(members) > MAX_SETS:
        raise _NotPlain
    texts = [bytes(raw) for raw in members.values()]
    keys = [hashlib.sha256(text).digest() if len(text) > _WORTH_DIGEST else text for text in texts]
    tables = _sets.find(keys)
    for at, table in enumerate(tables):
        if table is None:
            tables[at] = _table(texts[at])
    found: list[PrefixTable | FilledSet] = tables  # type: ignore[assignment]  # none is None any more
    _sets.keep(keys, found)
    return {fields.name(name): table for name, table in zip(members, found, strict=True)}


def _table(text: bytes) -> PrefixTable | FilledSet:
    if text[:1] == b"[":
        found = read_prefixes(text)
        if found is not None and len(found) <= MAX_SET and text.count(b",") < MAX_SET:
            return found
    plain = read_json(text.decode())
    return policy_rules.filled_set(plain) if isinstance(plain, dict) else prefixes(plain)


def _check_sets(rules: Sequence[Rule], sets: Mapping[str, PrefixTable]) -> None:
    """Rules that were read before, beside other sets perhaps."""
    for rule in rules:
        if rule.source_sets or rule.destination_sets:
            if not all(name in sets for name in (*rule.source_sets, *rule.destination_sets)):
                raise _NotPlain
            policy_rules.check_families(rule, sets)
