"""The policy language: from text to a `FirewallPolicy`, or to everything that is wrong with it.

The language itself is in `policy_tables.py`; docs/policy.md explains it to people. Here it is read: fields first, then whether
they make sense together, and everything found wrong is told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final, NamedTuple

import msgspec

from loopback.contracts.codes import Code
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.model import (
    Action,
    Direction,
    FirewallPolicy,
    Packet,
    PacketTest,
    Prefix,
    Rule,
)
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS, Wrong
from loopback.modules.firewall.policy_tables import (
    DEFAULT,
    LABEL_SET,
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

_FEW: Final = 16  # prefixes of a set that are looked through for their families, for every rule that names it


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
        sets = self.sets(top.get("sets", {}))
        rules = self.rules(top.get("rules", []), sets)
        tests = self.tests(top.get("tests", []))
        if self.wrong:
            raise _Enough
        return FirewallPolicy(default=default, sets=sets, rules=rules, tests=tests)

    def default(self, plain: Any) -> dict[Direction, Action]:
        try:
            found = read_table(plain, DEFAULT, "default")
        except Wrong as error:
            self.blame(error, ("default",))
            return {}
        return {Direction.INGRESS: found["ingress"], Direction.EGRESS: found["egress"]}

    def sets(self, plain: Any) -> dict[str, tuple[Prefix, ...]]:
        found: dict[str, tuple[Prefix, ...]] = {}
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
            found[key] = ()  # a set that is wrong is still known to rules
            try:
                fields.name(key)
            except Wrong as error:
                self.blame(Wrong(error.message, error.hint, key=True), ("sets", key))
            try:
                found[key] = _label_set(value) if isinstance(value, dict) else prefixes(value)
            except Wrong as error:
                self.blame(error, ("sets", key))
        return found

    def rules(self, plain: Any, sets: Mapping[str, tuple[Prefix, ...]]) -> tuple[Rule, ...]:
        found: list[Rule] = []
        names: dict[str, int] = {}
        for index, item in enumerate(self.listed(plain, "rules", MAX_RULES)):
            try:
                rule = _rule(read_table(item, RULE, "rule"), sets, self.lines.get(("rules", index), 0))
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


def _label_set(plain: dict[str, Any]) -> tuple[Prefix, ...]:
    read = read_table(plain, LABEL_SET, "set by labels")
    if "prefixes" not in read:
        raise Wrong(
            "sets by label are not available yet: nothing fills this one",
            "list its addresses under 'prefixes', which are then held to 'within' and 'max'",
        )
    filled: tuple[Prefix, ...] = read["prefixes"]
    if len(filled) > read["max"]:
        raise Wrong(
            f"{len(filled)} prefixes are more than the set's own max of {read['max']}", "", ("prefixes",)
        )
    for index, prefix in enumerate(filled):
        if not any(_inside(prefix, outer) for outer in read["within"]):
            raise Wrong(f"{fields.show(prefix)} lies outside the set's own 'within'", "", ("prefixes", index))
    return filled


def _inside(prefix: Prefix, outer: Prefix) -> bool:
    bits = 32 if prefix.family == 4 else 128
    return (
        prefix.family == outer.family
        and prefix.length >= outer.length
        and prefix.address >> (bits - outer.length) == outer.address >> (bits - outer.length)
    )


def _rule(read: dict[str, Any], sets: Mapping[str, tuple[Prefix, ...]], line: int) -> Rule:
    """A rule from its fields, once they make sense together."""
    protocols: tuple[int, ...] = read.get("proto", ())
    for key in ("ports", "source_ports"):
        if key in read and (not protocols or not WITH_PORTS.issuperset(protocols)):
            given = ", ".join(fields.PROTOCOL_NAMES.get(p, str(p)) for p in protocols if p not in WITH_PORTS)
            raise Wrong(
                f"{given} has no ports" if given else "ports need a protocol that has them",
                "write 'proto: tcp', 'proto: udp' or 'proto: [tcp, udp]'", (key,),
            )  # fmt: skip
    icmp: tuple[tuple[int, int | None], ...] = ()
    if "icmp" in read:
        if protocols not in ((ICMP,), (ICMPV6,)):
            raise Wrong(
                "types have other numbers in icmp and icmpv6, so the rule must name one of them",
                "write 'proto: icmp' or 'proto: icmpv6', and one rule for each where both are meant", ("icmp",),
            )  # fmt: skip
        try:
            icmp = fields.many(read["icmp"], lambda item: fields.icmp(item, protocols[0]))
        except Wrong as error:
            raise Wrong(error.message, error.hint, ("icmp", *error.path)) from None
    if "limit" in read and read["action"] is not Action.ACCEPT:
        raise Wrong(
            "a rule that drops only so many packets lets the others on to later rules",
            "drop without a limit, or limit the rule that accepts",
            ("limit",),
        )
    sources, source_sets = _endpoints(read.get("from", ()), sets, "from")
    destinations, destination_sets = _endpoints(read.get("to", ()), sets, "to")
    _families(read, sets)
    return Rule(
        name=read["name"], direction=read.get("direction", Direction.INGRESS), sources=sources, source_sets=source_sets,
        destinations=destinations, destination_sets=destination_sets, protocols=protocols, ports=read.get("ports", ()),
        source_ports=read.get("source_ports", ()), icmp=icmp, states=read.get("state", frozenset()),
        interfaces=read.get("iface", ()), action=read["action"], log_sample=read["log"]["sample"] if "log" in read else 0,
        limit=read.get("limit"), line=line,
    )  # fmt: skip


def _endpoints(
    read: tuple[Prefix | str, ...], sets: Mapping[str, Any], key: str
) -> tuple[tuple[Prefix, ...], tuple[str, ...]]:
    literal: list[Prefix] = []
    named: list[str] = []
    for index, item in enumerate(read):
        if isinstance(item, Prefix):
            literal.append(item)
        elif item in sets:
            named.append(item)
        else:
            known = ", ".join(list(sets)[:8]) or "none is defined"
            raise Wrong(
                f"there is no set {quote(item)}", fields.near(item, sets, "@") or f"sets: {known}",
                (key, index) if len(read) > 1 else (key,),
            )  # fmt: skip
    return tuple(literal), tuple(dict.fromkeys(named))


def _families(read: dict[str, Any], sets: Mapping[str, tuple[Prefix, ...]]) -> None:
    """Refuse a rule that can match nothing because its parts are of different address families."""

    def of(key: str) -> set[int]:
        found: set[int] = set()
        for item in read.get(key, ()):
            if isinstance(item, Prefix):
                found.add(item.family)
            elif 0 < len(sets[item]) <= _FEW:
                found.update(p.family for p in sets[item])
            else:  # empty until it is filled, or big enough to hold both
                return {4, 6}
        return found or {4, 6}

    both = of("from") & of("to")
    if not both:
        raise Wrong(
            "'from' and 'to' are of different address families: nothing matches both",
            "write one rule per family",
            ("to",),
        )
    protocols = read.get("proto", ())
    for number, family in ((ICMP, 4), (ICMPV6, 6)):
        if protocols == (number,) and family not in both:
            kind = fields.PROTOCOL_NAMES[number]
            other = fields.PROTOCOL_NAMES[ICMPV6 if number == ICMP else ICMP]
            raise Wrong(
                f"{kind} is IPv{family}'s, and no address of this rule is",
                f"write 'proto: {other}'",
                ("proto",),
            )


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
    reason has one line for each of up to ten problems, as `file:line:column: field: what is wrong`.
    """
    return _read(Source(data, source))


def load(path: FilePath) -> LoadedPolicy:
    """Read a policy file. Raises OSError, and PolicyRefused as `parse` does."""
    return loads(path.read_bytes(), str(path))


def loads(data: bytes, source: str = "policy") -> LoadedPolicy:
    """The same as `parse`, with the plain values and the text kept."""
    found = Source(data, source)
    return LoadedPolicy(_read(found), found.plain, found.text)


def to_json(plain: Any) -> bytes:
    """The canonical JSON of a policy's plain values: keys sorted, no spaces; what is signed and sent to hosts."""
    return msgspec.json.encode(plain, order="sorted")


def read_packet(data: bytes, source: str = "packet") -> Packet:
    """A packet from one JSON or YAML mapping; `null` is as good as absent. Raises PolicyRefused as `parse` does."""
    text = Source(data, source)
    try:
        return packet(text.plain)
    except Wrong as error:
        raise _refusal(text, [(Mark(error.path, error.key), error)]) from None
