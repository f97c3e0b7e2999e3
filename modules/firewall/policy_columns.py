"""Many new rules at once, column by column: what a field's text means is found once for all rules that say the same.

Ten thousand rules are a few hundred ports, a handful of protocols and some thousand prefixes. So the texts become typed values
in C, and each column of them is looked up; only what is left, a `Rule` from its fields, is made rule by rule. Part of the quick
way (policy_fast.py), and like it this never says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from loopback.modules.firewall import policy_rules
from loopback.modules.firewall.model import Direction, Prefix, PrefixTable, Rule
from loopback.modules.firewall.policy_fields import NAME_PATTERN
from loopback.modules.firewall.policy_tables import RULE

_NAMES: Final = re.compile(rf"(?:{NAME_PATTERN}\n)*+")

T = TypeVar("T")
_Words = str | tuple[str, ...]
_Numbers = int | str | tuple[int | str, ...]


class _Plain(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True, gc=False):
    """A rule as its text has it, its keys in the order of canonical JSON."""

    action: str
    direction: str | UnsetType = UNSET
    from_: _Words | UnsetType = msgspec.field(default=UNSET, name="from")
    icmp: Any = UNSET
    iface: Any = UNSET
    limit: Any = UNSET
    log: Any = UNSET
    name: str
    ports: _Numbers | UnsetType = UNSET
    proto: _Numbers | UnsetType = UNSET
    source_ports: _Numbers | UnsetType = UNSET
    state: Any = UNSET
    to: _Words | UnsetType = UNSET


#: What has no column: a rule that says any of it is read by itself.
_ODD: Final = ("icmp", "iface", "limit", "log", "state")
_RULES: Final = msgspec.json.Decoder(list[_Plain])
_Side = tuple[tuple[Prefix, ...], tuple[str, ...], frozenset[int]]


def read(
    texts: Sequence[bytes], sets: Mapping[str, PrefixTable], one: Callable[[bytes], Rule]
) -> list[Rule] | None:
    """The rules of these texts, or None where keys are in another order than in canonical JSON, repeated or unknown.

    `one` reads a single rule, whose text repeats no key. Raises Wrong for what is wrong, and what `one` raises.
    """
    joined = b"[" + b",".join(texts) + b"]"
    try:
        plain = _RULES.decode(joined)
    except msgspec.ValidationError:
        return None
    written = msgspec.json.encode(plain)  # without what was repeated, and in our order
    if written != joined and written != msgspec.json.format(joined, indent=-1):
        return None
    if not _are_names([p.name for p in plain]):
        return None
    actions = _column([p.action for p in plain], RULE["action"].read)
    directions = _column([p.direction for p in plain], _reader("direction", Direction.INGRESS))
    protocols = _column([p.proto for p in plain], _reader("proto", ()))
    ports = _column([p.ports for p in plain], _reader("ports", ()))
    source_ports = _column([p.source_ports for p in plain], _reader("source_ports", ()))
    sources = _column([p.from_ for p in plain], _side("from", sets))
    destinations = _column([p.to for p in plain], _side("to", sets))
    # whether fields make sense together depends on no more than this of them: one rule of each shape is asked
    shapes = zip(
        protocols, map(bool, ports), map(bool, source_ports),
        [side[2] for side in sources], [side[2] for side in destinations], strict=True,
    )  # fmt: skip
    for text in dict(zip(shapes, texts, strict=True)).values():
        one(text)
    made = [
        Rule(
            name=p.name, action=action, direction=direction, sources=source[0], source_sets=source[1],
            destinations=destination[0], destination_sets=destination[1], protocols=protocol, ports=port,
            source_ports=source_port,
        )
        for p, action, direction, source, destination, protocol, port, source_port in zip(
            plain, actions, directions, sources, destinations, protocols, ports, source_ports, strict=True
        )
    ]  # fmt: skip
    for key in _ODD:
        if f'"{key}":'.encode() in written:
            for at, p in enumerate(plain):
                if getattr(p, key) is not UNSET:
                    made[at] = one(texts[at])
    return made


def _are_names(found: Sequence[str]) -> bool:
    lines = "\n".join([*found, ""])
    return lines.count("\n") == len(found) and _NAMES.fullmatch(lines) is not None


def _column(values: Iterable[Any], read: Callable[[Any], T]) -> list[T]:
    values = list(values)
    found = {value: read(value) for value in dict.fromkeys(values)}
    return list(map(found.__getitem__, values))


def _reader(key: str, absent: Any) -> Callable[[Any], Any]:
    """The reader of a field, for values whose lists are tuples."""

    def read_field(value: Any) -> Any:
        if value is UNSET:
            return absent
        return RULE[key].read(list(value) if type(value) is tuple else value)

    return read_field


def _side(key: str, sets: Mapping[str, PrefixTable]) -> Callable[[Any], _Side]:
    """Prefixes, sets, and the families that both can match."""
    read_field = _reader(key, ())

    def read_side(value: Any) -> _Side:
        literal, named = policy_rules.endpoints(read_field(value), sets, key)
        return literal, named, policy_rules.families(literal, named, sets)

    return read_side
