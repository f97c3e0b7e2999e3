"""The policy language as tables: each field with its reader, its schema and one line about it.

`policy.py` walks these tables to read a policy and `schema.py` prints them as the published JSON Schema, so the two cannot
differ. docs/policy.md explains the language to people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.model import Direction, Packet, PrefixTable
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS, Wrong
from loopback.modules.firewall.policy_text import quote
from loopback.modules.firewall.prefixes import read_texts

VERSION: Final = 1
MAX_RULES: Final = 100_000
MAX_SETS: Final = 1_000
MAX_SET: Final = 1_000_000  # prefixes in one set
MAX_TESTS: Final = 10_000


class Field(NamedTuple):
    """One field: how its value is read, how the schema describes it, and whether it must be there."""

    read: Callable[[Any], Any]
    schema: Mapping[str, Any]
    about: str
    required: bool = False


def _untouched(value: Any) -> Any:
    return value


def read_table(value: Any, table: Mapping[str, Field], what: str, *, null: bool = False) -> dict[str, Any]:
    """Read a mapping by its table; with `null`, null is as good as absent. Raises Wrong for the first thing amiss."""
    if not isinstance(value, dict):
        raise Wrong(f"{quote(value)} is no {what}", f"write a mapping with {', '.join(table)}")
    found = {}
    for key, item in value.items():
        field = table.get(key)
        if field is None:
            raise unknown(key, table, what)
        if item is None and null:
            continue
        try:
            found[key] = field.read(item)
        except Wrong as error:
            raise Wrong(error.message, error.hint, (key, *error.path), key=error.key) from None
    for key, field in table.items():
        if field.required and key not in found:
            raise Wrong(f"a {what} needs {key!r}", f"add {key!r}: {field.about}")
    return found


def unknown(key: str, table: Mapping[str, Field], what: str) -> Wrong:
    """What to say of a key that a table does not have."""
    hint = fields.near(key, table)
    if key == "<<":
        hint = "merge keys are not read; write the fields out"
    return Wrong(
        f"unknown field {quote(key)} in a {what}", hint or f"it has {', '.join(table)}", (key,), key=True
    )


LIMIT: Final = {
    "rate": Field(fields.rate, fields.RATE_SCHEMA, "packets per second, or 10/s, 600/m, 1/h, 1/d", True),
    "burst": Field(
        fields.burst, {"type": "integer", "minimum": 1, "maximum": fields.MAX_BURST},
        "packets that may come at once; one second's worth when absent",
    ),
    "per": Field(
        lambda value: fields.choice(value, ("rule", "source"), "kind of limit"), {"enum": ["rule", "source"]},
        "one bucket for the rule, or one for each source address; rule when absent",
    ),
}  # fmt: skip
LOG: Final = {
    "sample": Field(
        fields.sample, {"type": "integer", "minimum": 1, "maximum": fields.MAX_SAMPLE},
        "report one in this many packets", True,
    ),
}  # fmt: skip
RULE: Final = {
    "name": Field(fields.name, fields.NAME_SCHEMA, "unique; counters and reports carry it", True),
    "direction": Field(
        fields.direction, fields.DIRECTION_SCHEMA, "ingress (arrives at the host; when absent) or egress (leaves it)"
    ),
    "from": Field(
        lambda value: fields.many(value, fields.endpoint), fields.ENDPOINT_SCHEMA, "source addresses, prefixes, @sets"
    ),
    "to": Field(
        lambda value: fields.many(value, fields.endpoint), fields.ENDPOINT_SCHEMA, "destination addresses, prefixes, @sets"
    ),
    "proto": Field(
        lambda value: fields.many(value, fields.protocol), fields.one_or_more(fields.PROTOCOL_SCHEMA),
        "protocols by name or number",
    ),
    "ports": Field(
        lambda value: fields.many(value, fields.port), fields.PORTS_SCHEMA, "destination ports and ranges, of tcp, udp, sctp …"
    ),
    "source_ports": Field(
        lambda value: fields.many(value, fields.port), fields.PORTS_SCHEMA, "source ports and ranges, of tcp, udp, sctp …"
    ),
    "icmp": Field(
        _untouched, fields.ICMP_SCHEMA, "types by name or number, or type/code, of proto icmp or of proto icmpv6"
    ),
    "state": Field(
        fields.states, fields.STATE_SCHEMA, "states of the packet's connection: new, established, related, invalid"
    ),
    "iface": Field(
        lambda value: fields.many(value, fields.interface), fields.INTERFACE_SCHEMA,
        "interfaces by which it arrives or leaves",
    ),
    "action": Field(fields.action, fields.ACTION_SCHEMA, "accept or drop", True),
    "log": Field(lambda value: read_table(value, LOG, "log"), {"$ref": "#/$defs/log"}, "report a sample of its packets"),
    "limit": Field(
        lambda value: fields.limit(read_table(value, LIMIT, "limit")), {"$ref": "#/$defs/limit"},
        "match only so many packets; the others go on to the next rule",
    ),
}  # fmt: skip
_ICMP_TYPE_SCHEMA: Final = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": 255},
        {"enum": fields.ICMP_SCHEMA["anyOf"][0]["anyOf"][0]["enum"]},
    ]
}
_PORT: Final = {"type": "integer", "minimum": 0, "maximum": 65_535}
PACKET: Final = {
    "direction": Field(fields.direction, fields.DIRECTION_SCHEMA, "ingress when absent"),
    "src": Field(fields.address, fields.ADDRESS_SCHEMA, "source address", True),
    "dst": Field(fields.address, fields.ADDRESS_SCHEMA, "destination address", True),
    "proto": Field(fields.protocol, fields.PROTOCOL_SCHEMA, "protocol by name or number", True),
    "sport": Field(fields.packet_port, _PORT, "source port; 0 when absent"),
    "dport": Field(fields.packet_port, _PORT, "destination port; 0 when absent"),
    "icmp_type": Field(_untouched, _ICMP_TYPE_SCHEMA, "ICMP type, a number or a name; 0 when absent"),
    "icmp_code": Field(fields.octet, {"type": "integer", "minimum": 0, "maximum": 255}, "ICMP code; 0 when absent"),
    "tcp_flags": Field(
        fields.tcp_flags, fields.TCP_FLAGS_SCHEMA, "a number, names (syn,ack) or letters (SA); a SYN when absent"
    ),
    "iface": Field(fields.interface, {"type": "string"}, "interface by which it arrives or leaves"),
    "state": Field(
        lambda value: fields.choice(value, fields.STATES, "state"), {"enum": list(fields.STATES)},
        "state of its connection; new when absent",
    ),
}  # fmt: skip
TEST: Final = {
    "packet": Field(lambda value: packet(value), {"$ref": "#/$defs/packet"}, "a packet", True),
    "expect": Field(fields.action, fields.ACTION_SCHEMA, "drop or accept", True),
}
DEFAULT: Final = {
    "ingress": Field(
        fields.action, fields.ACTION_SCHEMA, "what happens to arriving packets that no rule matches", True
    ),
    "egress": Field(
        fields.action, fields.ACTION_SCHEMA, "what happens to leaving packets that no rule matches", True
    ),
}
_LABELS_SCHEMA: Final = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
_PREFIXES_SCHEMA: Final = {"type": "array", "items": fields.PREFIX_SCHEMA, "maxItems": MAX_SET}


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise Wrong(f"{quote(value)} are no labels", "for example {role: web}")
    for key, text in value.items():
        if not isinstance(text, str) or not text:
            raise Wrong(f"{quote(text)} is no label value: it is text", "quote it", (key,))
    return value


def prefixes(value: Any) -> PrefixTable:
    """The prefixes of a set, which may be none."""
    if isinstance(value, list) and not value:
        return PrefixTable()
    if isinstance(value, str) and value[:1] == "@":
        raise Wrong(f"{quote(value)}: sets do not nest", "name both sets where they are used")
    if isinstance(value, list) and len(value) <= MAX_SET:
        all_right = read_texts(value)
        if all_right is not None:
            return all_right
    return PrefixTable.of(fields.many(value, fields.prefix, MAX_SET))


FILLED_SET: Final = {
    "labels": Field(_labels, _LABELS_SCHEMA, "labels of the hosts whose addresses fill the set"),
    "pool": Field(fields.name, fields.NAME_SCHEMA, "the load balancer's pool that fills the set"),
    "within": Field(
        lambda value: fields.many(value, fields.prefix), {**_PREFIXES_SCHEMA, "minItems": 1},
        "every prefix that fills the set must lie inside one of these", True
    ),
    "max": Field(
        lambda value: fields.whole(value, 1, MAX_SET, "size"), {"type": "integer", "minimum": 1, "maximum": MAX_SET},
        "the most prefixes the set may hold", True,
    ),
    "prefixes": Field(prefixes, _PREFIXES_SCHEMA, "prefixes that are always in it"),
}  # fmt: skip
POLICY: Final = {
    "version": Field(_untouched, {"const": VERSION}, "version of this language: 1", True),
    "default": Field(
        _untouched, {"$ref": "#/$defs/default"}, "what happens to packets that no rule matches, per direction", True
    ),
    "sets": Field(_untouched, {"$ref": "#/$defs/sets"}, "named sets of prefixes"),
    "rules": Field(
        _untouched, {"type": "array", "items": {"$ref": "#/$defs/rule"}, "maxItems": MAX_RULES}, "the first match wins"
    ),
    "tests": Field(
        _untouched, {"type": "array", "items": {"$ref": "#/$defs/test"}, "maxItems": MAX_TESTS},
        "assertions that must hold before a policy is committed",
    ),
}  # fmt: skip


def packet(plain: Any) -> Packet:
    """A packet from plain values; null is as good as absent. Raises Wrong."""
    read = read_table(plain, PACKET, "packet", null=True)
    src, dst, protocol = read["src"], read["dst"], read["proto"]
    if (":" in src) != (":" in dst):
        raise Wrong(
            f"{quote(src)} and {quote(dst)} are of different address families",
            "give two of one family",
            ("dst",),
        )
    of_family = {ICMP: False, ICMPV6: True}.get(protocol)
    if of_family is not None and of_family != (":" in src):
        right = "icmpv6" if ":" in src else "icmp"
        raise Wrong(
            f"{fields.PROTOCOL_NAMES[protocol]} does not go between these addresses",
            f"write {right}",
            ("proto",),
        )
    kind, code = 0, read.get("icmp_code", 0)
    if of_family is not None and "icmp_type" in read:
        try:
            kind, named = fields.icmp(read["icmp_type"], protocol)
        except Wrong as error:
            raise Wrong(error.message, error.hint, ("icmp_type",)) from None
        code = named if named is not None else code
    ports = protocol in WITH_PORTS  # a port or type that the protocol has not is left out of account
    return Packet(
        direction=read.get("direction", Direction.INGRESS), src=src, dst=dst, protocol=protocol,
        sport=read.get("sport", 0) if ports else 0, dport=read.get("dport", 0) if ports else 0,
        icmp_type=kind if of_family is not None else 0, icmp_code=code if of_family is not None else 0,
        tcp_flags=read.get("tcp_flags"), iface=read.get("iface", ""), state=read.get("state", "new"),
    )  # fmt: skip
