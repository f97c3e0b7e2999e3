"""The policy language: from text to a `FirewallPolicy`, or to everything that is wrong with it.

The language itself is in `policy_tables.py`; docs/policy.md explains it to people. Here it is read: fields first, then whether
they make sense together, and everything found wrong is told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import msgspec

from loopback.contracts.codes import Code
from loopback.modules.firewall import policy_fast, policy_rules
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.model import (
    Action,
    Direction,
    FilledSet,
    FirewallPolicy,
    Packet,
    PacketTest,
    PrefixTable,
    Rule,
)
from loopback.modules.firewall.policy_fields import Wrong
from loopback.modules.firewall.policy_tables import (
    DEFAULT,
    MAX_RULES,
    MAX_SETS,
    MAX_TESTS,
    POLICY,
    RULE,
    TEST,
    VERSION,
    packet,
    prefixes,
    read_table,
    unknown,
)
from loopback.modules.firewall.policy_text import (
    MAX_PROBLEMS,
    Mark,
    Path,
    PolicyRefused,
    Source,
    dotted,
    quote,
)


class _Reader:
    """Reads one policy and collects what is wrong with it."""

    def __init__(self, lines: Mapping[Path, int]) -> None:
        self.lines = lines
        self.wrong: list[tuple[Mark, Wrong]] = []

    def blame(self, error: Wrong, path: Path) -> None:
        self.wrong.append((Mark(path + error.path, error.key), error))
        if len(self.wrong) >= MAX_PROBLEMS:
            raise _Enough

    def policy(self, plain: Any) -> FirewallPolicy:
        if isinstance(plain, dict):  # an unknown field hides nothing else
            for key in [key for key in plain if key not in POLICY]:
                self.blame(unknown(key, POLICY, "policy"), ())
            plain = {key: value for key, value in plain.items() if key in POLICY}
        try:
            top = read_table(plain, POLICY, "policy")
        except Wrong as error:
            self.blame(error, ())
            raise _Enough from None
        if type(top["version"]) is not int or top["version"] != VERSION:
            hint = "write 'version: 1'" if quote(top["version"]) != "1" else ""
            self.blame(Wrong(f"{quote(top['version'])} is no version of this language", hint), ("version",))
            raise _Enough
        default = self.default(top["default"])
        sets, filled, bounds = policy_rules.parted(self.sets(top.get("sets", {})))
        rules = self.rules(top.get("rules", []), bounds)
        tests = self.tests(top.get("tests", []))
        if self.wrong:
            raise _Enough
        return FirewallPolicy(default=default, sets=sets, rules=rules, tests=tests, filled=filled)

    def default(self, plain: Any) -> dict[Direction, Action]:
        try:
            found = read_table(plain, DEFAULT, "default")
        except Wrong as error:
            self.blame(error, ("default",))
            return {}
        return {Direction.INGRESS: found["ingress"], Direction.EGRESS: found["egress"]}

    def sets(self, plain: Any) -> dict[str, PrefixTable | FilledSet]:
        found: dict[str, PrefixTable | FilledSet] = {}
        if not isinstance(plain, dict):
            self.blame(
                Wrong(
                    f"{quote(plain)} is no mapping of names to prefixes",
                    "for example {office: [203.0.113.0/24]}",
                ),
                ("sets",),
            )
            return found
        if len(plain) > MAX_SETS:
            self.blame(Wrong(f"{len(plain)} sets are more than the {MAX_SETS} allowed"), ("sets",))
        for key, value in plain.items():
            found[key] = PrefixTable()  # a set that is wrong is still known to rules
            try:
                fields.name(key)
            except Wrong as error:
                self.blame(Wrong(error.message, error.hint, key=True), ("sets", key))
            try:
                found[key] = policy_rules.filled_set(value) if isinstance(value, dict) else prefixes(value)
            except Wrong as error:
                self.blame(error, ("sets", key))
        return found

    def rules(self, plain: Any, sets: Mapping[str, PrefixTable]) -> tuple[Rule, ...]:
        found: list[Rule] = []
        names: dict[str, int] = {}
        for index, item in enumerate(self.listed(plain, "rules", MAX_RULES)):
            try:
                rule = policy_rules.rule(
                    read_table(item, RULE, "rule"), sets, self.lines.get(("rules", index), 0)
                )
                other = names.setdefault(rule.name, index)
                if other != index:
                    raise Wrong(
                        f"{quote(rule.name)} is the name of rules[{other}] already",
                        "give each rule a name of its own",
                        ("name",),
                    )
                found.append(rule)
            except Wrong as error:
                self.blame(error, ("rules", index))
        return tuple(found)

    def tests(self, plain: Any) -> tuple[PacketTest, ...]:
        found: list[PacketTest] = []
        for index, item in enumerate(self.listed(plain, "tests", MAX_TESTS)):
            try:
                read = read_table(item, TEST, "test")
                found.append(PacketTest(read["packet"], read["expect"], self.lines.get(("tests", index), 0)))
            except Wrong as error:
                self.blame(error, ("tests", index))
        return tuple(found)

    def listed(self, plain: Any, key: str, most: int) -> list[Any]:
        if plain is None:
            return []  # `rules:` with nothing below it
        if not isinstance(plain, list):
            self.blame(Wrong(f"{quote(plain)} is no list of {key}", "write one '- ' for each"), (key,))
            return []
        if len(plain) > most:
            self.blame(Wrong(f"{len(plain)} {key} are more than the {most} allowed"), (key,))
            return []
        return plain


class _Enough(Exception):
    """Reading ends here; what is wrong is in the reader."""


class LoadedPolicy(NamedTuple):
    """A policy, what it was read from as JSON-able values, and its text."""

    policy: FirewallPolicy
    plain: Any
    text: str


def _read(source: Source) -> FirewallPolicy:
    reader = _Reader(source.item_lines())
    try:
        return reader.policy(source.plain)
    except _Enough:
        raise _refusal(source, reader.wrong) from None


def _refusal(source: Source, wrong: list[tuple[Mark, Wrong]]) -> PolicyRefused:
    """Everything wrong, each at its place, or at the place of what holds it."""
    wanted = {Mark(mark.path[:depth]) for mark, _ in wrong for depth in range(len(mark.path) + 1)}
    places = source.places(wanted | {mark for mark, _ in wrong})

    def place(mark: Mark) -> Any:
        if mark in places:
            return places[mark]
        return next(
            (places[m] for d in range(len(mark.path), -1, -1) if (m := Mark(mark.path[:d])) in places), None
        )

    problems = (
        source.problem(place(mark), dotted(mark.path), error.message, error.hint) for mark, error in wrong
    )
    return PolicyRefused(Code.POLICY_INVALID, tuple(sorted(problems, key=lambda p: (p.line, p.column))))


def parse(data: bytes, source: str = "policy") -> FirewallPolicy:
    """Read a policy from JSON or YAML; `source` is how messages call it (a name ending in .json forbids YAML).

    Raises PolicyRefused, a Refused with POLICY_MALFORMED (no JSON or YAML) or POLICY_INVALID (not this language), whose
    reason has one line for each of up to ten problems, as `file:line:column: field: what is wrong`. What was read before in
    this process, rule by rule, is not read again.
    """
    return policy_fast.read(data) or _read(Source(data, source))


def load(path: FilePath) -> LoadedPolicy:
    """Read a policy file. Raises OSError, and PolicyRefused as `parse` does."""
    return loads(path.read_bytes(), str(path))


def loads(data: bytes, source: str = "policy") -> LoadedPolicy:
    """The same as `parse`, with the plain values and the text kept."""
    quick = policy_fast.read(data)
    if quick is not None:
        return LoadedPolicy(quick, msgspec.json.decode(data), data.decode())
    found = Source(data, source)
    return LoadedPolicy(_read(found), found.plain, found.text)


def to_json(plain: Any) -> bytes:
    """The canonical JSON of a policy's plain values: keys sorted, no spaces; what is signed and sent to hosts."""
    return msgspec.json.encode(plain, order="sorted")


def read_packet(data: bytes, source: str = "packet") -> Packet:
    """A packet from one JSON object; `null` is as good as absent. Raises PolicyRefused as `parse` does."""
    text = Source(data, source, packet=True)
    try:
        return packet(text.plain)
    except Wrong as error:
        raise _refusal(text, [(Mark(error.path, error.key), error)]) from None
