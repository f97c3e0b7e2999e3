"""The values of the policy language: each is read by one function, which stands beside the JSON Schema that describes it.

A reader takes what the text says and returns what the model holds, or raises `Wrong`, which says what is wrong with the value
and what would be right. Where the value stands is the caller's business.
"""

from __future__ import annotations

import difflib
import functools
import re
import socket
from collections.abc import Callable, Collection
from typing import Any, Final, TypeVar

from loopback.modules.firewall.model import Action, Direction, Limit, PortRange, Prefix
from loopback.modules.firewall.policy_text import Path, quote

MAX_LIST: Final = 1000  # values in one field of one rule; more belong in a set
MAX_SAMPLE: Final = 1_000_000
MAX_RATE: Final = 10_000_000.0  # packets a second; above it a limit limits nothing
MIN_RATE: Final = 1 / 86_400  # one packet a day
MAX_BURST: Final = 1_000_000
IFNAMSIZ: Final = 15  # bytes of an interface name, by the kernel

PROTOCOLS: Final = {
    "icmp": 1, "igmp": 2, "ipip": 4, "tcp": 6, "udp": 17, "dccp": 33, "gre": 47, "esp": 50, "ah": 51, "icmpv6": 58, "ospf": 89,
    "vrrp": 112, "sctp": 132, "udplite": 136,
}  # fmt: skip
PROTOCOL_NAMES: Final = {number: name for name, number in PROTOCOLS.items()}
ICMP, TCP, UDP, ICMPV6 = PROTOCOLS["icmp"], PROTOCOLS["tcp"], PROTOCOLS["udp"], PROTOCOLS["icmpv6"]
#: Protocols whose first four bytes are two ports.
WITH_PORTS: Final = frozenset(PROTOCOLS[kind] for kind in ("tcp", "udp", "dccp", "sctp", "udplite"))

#: ICMP names: (type, code or None for any), as RFC 792 and RFC 4443 number them.
ICMP_TYPES: Final[dict[int, dict[str, tuple[int, int | None]]]] = {
    ICMP: {
        "echo-reply": (0, None), "destination-unreachable": (3, None), "network-unreachable": (3, 0),
        "host-unreachable": (3, 1), "protocol-unreachable": (3, 2), "port-unreachable": (3, 3),
        "fragmentation-needed": (3, 4), "admin-prohibited": (3, 13), "source-quench": (4, None), "redirect": (5, None),
        "echo-request": (8, None), "router-advertisement": (9, None), "router-solicitation": (10, None),
        "time-exceeded": (11, None), "parameter-problem": (12, None), "timestamp-request": (13, None),
        "timestamp-reply": (14, None),
    },
    ICMPV6: {
        "destination-unreachable": (1, None), "no-route": (1, 0), "admin-prohibited": (1, 1), "address-unreachable": (1, 3),
        "port-unreachable": (1, 4), "packet-too-big": (2, None), "time-exceeded": (3, None), "parameter-problem": (4, None),
        "echo-request": (128, None), "echo-reply": (129, None), "router-solicitation": (133, None),
        "router-advertisement": (134, None), "neighbour-solicitation": (135, None),
        "neighbour-advertisement": (136, None), "redirect": (137, None),
    },
}  # fmt: skip
STATES: Final = ("new", "established", "related", "invalid")
FLAGS: Final = {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ece": 64, "cwr": 128}
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


T = TypeVar("T")


class Wrong(Exception):
    """A value that cannot be. `path` leads from the field to the value, `key` says that the key itself is wrong."""

    def __init__(self, message: str, hint: str = "", path: Path = (), *, key: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path = path
        self.key = key


def choice(value: Any, allowed: Collection[str], what: str) -> str:
    """One of a few words."""
    if isinstance(value, str) and value in allowed:
        return value
    raise Wrong(
        f"{quote(value)} is no {what}; write {alternatives(allowed)}",
        near(value, allowed) or f"write {alternatives(allowed)}",
    )


def alternatives(words: Collection[str]) -> str:
    """`a, b or c`."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else str(last)


def near(value: Any, known: Collection[str], prefix: str = "") -> str:
    """`did you mean 'x'?` where known words are close, else nothing."""
    close = (
        difflib.get_close_matches(value[:80], list(known)[:5000], 2, 0.6) if isinstance(value, str) else []
    )
    return f"did you mean {' or '.join(repr(prefix + word) for word in close)}?" if close else ""


def many(value: Any, one: Callable[[Any], T], most: int = MAX_LIST) -> tuple[T, ...]:
    """One value or a list of them, each read by `one`."""
    if not isinstance(value, list):
        return (one(value),)
    if not value:
        raise Wrong("an empty list matches nothing", "leave the field out where any value will do")
    if len(value) > most:
        raise Wrong(f"{len(value)} values are more than the {most} allowed", "put addresses into a set")
    found = []
    for index, item in enumerate(value):
        try:
            found.append(one(item))
        except Wrong as error:
            raise Wrong(error.message, error.hint, (index, *error.path), key=error.key) from None
    return tuple(found)


def one_or_more(item: dict[str, Any]) -> dict[str, Any]:
    """The schema of `many`."""
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_LIST}]}


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────
NAME_PATTERN: Final = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAME_SCHEMA: Final = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
_NAME = re.compile(NAME_PATTERN)


def name(value: Any) -> str:
    """The name of a rule or a set."""
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    hint = "quote it" if isinstance(value, int | float) else "for example 'allow-ssh'"
    raise Wrong(
        f"{quote(value)} is no name: letters, digits, '.', '_' and '-', at most 64, a letter or digit first",
        hint,
    )


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────
DIRECTION_SCHEMA: Final = {"enum": ["ingress", "egress"]}
ACTION_SCHEMA: Final = {"enum": ["accept", "drop"]}
_DIRECTIONS: Final = {"ingress": Direction.INGRESS, "egress": Direction.EGRESS}
_ACTIONS: Final = {"accept": Action.ACCEPT, "drop": Action.DROP}


def direction(value: Any) -> Direction:
    """`ingress` or `egress`."""
    return _DIRECTIONS[choice(value, _DIRECTIONS, "direction")]


def action(value: Any) -> Action:
    """`accept` or `drop`."""
    return _ACTIONS[choice(value, _ACTIONS, "action")]


STATE_SCHEMA: Final = one_or_more({"enum": list(STATES)})


def states(value: Any) -> frozenset[str]:
    """States of a connection."""
    return frozenset(many(value, lambda word: choice(word, STATES, "state")))


INTERFACE_SCHEMA: Final = one_or_more({"type": "string", "pattern": f"^[^\\s/*]{{1,{IFNAMSIZ}}}$"})


def interface(value: Any) -> str:
    """The name of a network interface."""
    if not isinstance(value, str):
        raise Wrong(f"{quote(value)} is no interface name", "for example 'eth0'")
    if "*" in value or "?" in value:
        raise Wrong(
            f"{quote(value)}: patterns are not available, name each interface", "for example [eth0, eth1]"
        )
    if (
        not value
        or len(value.encode(errors="replace")) > IFNAMSIZ
        or "/" in value
        or value.split() != [value]
    ):
        raise Wrong(
            f"{quote(value)} is no interface name: 1 to {IFNAMSIZ} bytes, no '/' and no space",
            "for example 'eth0'",
        )
    return value


# ── addresses ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
PREFIX_SCHEMA: Final = {"type": "string", "pattern": "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$"}
ADDRESS_SCHEMA: Final = {"type": "string", "pattern": "^[0-9A-Fa-f:.]+$"}
_EXAMPLE: Final = "for example 203.0.113.0/24 or 2001:db8::/32"


def show(prefix: Prefix) -> str:
    """A prefix as people write it."""
    return f"{address_text(prefix.family, prefix.address)}/{prefix.length}"


def address_text(family: int, address: int) -> str:
    """An address as people write it."""
    if family == 4:
        return socket.inet_ntop(socket.AF_INET, address.to_bytes(4))
    return socket.inet_ntop(socket.AF_INET6, address.to_bytes(16))


@functools.lru_cache(maxsize=65_536)
def _prefix(text: str) -> Prefix:
    host, slash, tail = text.partition("/")
    try:
        if ":" in host:
            family, bits, number = 6, 128, int.from_bytes(socket.inet_pton(socket.AF_INET6, host))
        else:
            family, bits, number = 4, 32, int.from_bytes(socket.inet_pton(socket.AF_INET, host))
    except (OSError, ValueError):  # ValueError: a NUL or what UTF-8 cannot say
        raise Wrong(f"{quote(text)} is no address or prefix", _EXAMPLE) from None
    if not slash:
        return Prefix(4 if family == 4 else 6, number, bits)
    if not (tail.isascii() and tail.isdecimal() and len(tail) <= 3 and int(tail) <= bits):
        raise Wrong(f"{quote(text)}: a prefix of IPv{family} is 0 to {bits} bits long", _EXAMPLE)
    length = int(tail)
    network = number >> (bits - length) << (bits - length)
    if network != number:
        right = show(Prefix(4 if family == 4 else 6, network, length))
        raise Wrong(
            f"{quote(text)} has bits set beyond its length; the prefix is {right}",
            f"write {right}, or the address alone",
        )
    return Prefix(4 if family == 4 else 6, number, length)


def prefix(value: Any) -> Prefix:
    """An address or a prefix; an address alone is a prefix of full length."""
    if not isinstance(value, str):
        raise Wrong(f"{quote(value)} is no address or prefix", _EXAMPLE)
    return _prefix(value)


ENDPOINT_SCHEMA: Final = one_or_more(
    {"anyOf": [PREFIX_SCHEMA, {"type": "string", "pattern": f"^@{NAME_PATTERN}$"}]}
)


def endpoint(value: Any) -> Prefix | str:
    """A prefix, or the name of a set behind an `@`."""
    if isinstance(value, str) and value[:1] == "@":
        return name(value[1:])
    if isinstance(value, str) and value[:1].isalpha() and ":" not in value and "." not in value:
        raise Wrong(f"{quote(value)} is no address", f"a set is named '@{value}'")
    return prefix(value)


# ── protocols and ports ───────────────────────────────────────────────────────────────────────────────────────────────────
PROTOCOL_SCHEMA: Final = {
    "anyOf": [{"enum": list(PROTOCOLS)}, {"type": "integer", "minimum": 0, "maximum": 255},
              {"type": "string", "pattern": "^[0-9]{1,3}$"}]
}  # fmt: skip


def whole(value: Any, low: int, high: int, what: str) -> int:
    """An integer within bounds."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise Wrong(f"{quote(value)} is no {what}: a whole number from {low} to {high}", f"write {low} to {high}")


def protocol(value: Any) -> int:
    """An IP protocol by name or number."""
    if isinstance(value, str):
        known = PROTOCOLS.get(value)
        if known is not None:
            return known
        if not (value.isascii() and value.isdecimal() and len(value) <= 3):
            raise Wrong(
                f"{quote(value)} is no protocol; write one of {', '.join(PROTOCOLS)}, or a number",
                near(value.lower(), PROTOCOLS) or "write a name or a number",
            )
        value = int(value)
    return whole(value, 0, 255, "protocol number")


PORTS_SCHEMA: Final = one_or_more(
    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 65_535},
               {"type": "string", "pattern": "^[0-9]{1,5}(-[0-9]{1,5})?$"}]}
)  # fmt: skip
_RANGE = re.compile(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?")


@functools.lru_cache(maxsize=65_536)
def _ports(text: str) -> PortRange:
    found = _RANGE.fullmatch(text)
    if not found:
        raise Wrong(
            f"{quote(text)} is no port: a number or a range such as '8000-8100'", "ports are 0 to 65535"
        )
    low = int(found[1])
    high = int(found[2] or found[1])
    if max(low, high) > 65_535:
        raise Wrong(f"{quote(text)}: ports are 0 to 65535", "ports are 0 to 65535")
    if high < low:
        raise Wrong(f"{quote(text)} is an empty range: it ends before it begins", f"write '{high}-{low}'")
    return PortRange(low, high)


def port(value: Any) -> PortRange:
    """A port, or a range of them as text."""
    if isinstance(value, str):
        return _ports(value)
    number = whole(value, 0, 65_535, "port")
    return PortRange(number, number)


# ── ICMP ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────
_ICMP_NAMES: Final = sorted({word for names in ICMP_TYPES.values() for word in names})
ICMP_SCHEMA: Final = one_or_more(
    {"anyOf": [{"enum": _ICMP_NAMES}, {"type": "integer", "minimum": 0, "maximum": 255},
               {"type": "string", "pattern": "^[0-9]{1,3}(/[0-9]{1,3})?$"}]}
)  # fmt: skip
_TYPE_CODE = re.compile(r"([0-9]{1,3})(?:/([0-9]{1,3}))?")


def icmp(value: Any, of: int) -> tuple[int, int | None]:
    """An ICMP type, with a code or without, of protocol `of` (1 or 58)."""
    names = ICMP_TYPES[of]
    if isinstance(value, str):
        if value in names:
            return names[value]
        found = _TYPE_CODE.fullmatch(value)
        if not found:
            kind = PROTOCOL_NAMES[of]
            raise Wrong(
                f"{quote(value)} is no type of {kind}; write a name, a number, or type/code such as '3/4'",
                near(value, names) or f"{kind} knows {', '.join(names)}",
            )
        code = None if found[2] is None else whole(int(found[2]), 0, 254, "ICMP code")
        return whole(int(found[1]), 0, 255, "ICMP type"), code
    return whole(value, 0, 255, "ICMP type"), None


# ── limits and logs ───────────────────────────────────────────────────────────────────────────────────────────────────────
RATE_SCHEMA: Final = {
    "anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": MAX_RATE},
              {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?/[smhd]$"}]
}  # fmt: skip
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*/\s*([smhd])")


def rate(value: Any) -> float:
    """Packets per second, from a number or from `10/s`, `600/m`, `1/h`."""
    per_second: float
    if isinstance(value, str):
        found = _RATE.fullmatch(value)
        if not found:
            raise Wrong(
                f"{quote(value)} is no rate: packets per second, minute, hour or day",
                "for example 10/s or 600/m",
            )
        per_second = float(found[1]) / _UNITS[found[2]]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        per_second = float(value) if abs(value) <= 2 * MAX_RATE else 2 * MAX_RATE
    else:
        raise Wrong(f"{quote(value)} is no rate", "for example 10/s or 600/m")
    if not MIN_RATE <= per_second <= MAX_RATE:
        raise Wrong(
            f"{quote(value)}: a rate is from one packet a day to {MAX_RATE:.0f} a second",
            "for example 10/s or 600/m",
        )
    return per_second


def burst(value: Any) -> int:
    """Packets that may come at once."""
    return whole(value, 1, MAX_BURST, "burst")


def sample(value: Any) -> int:
    """One in how many packets."""
    return whole(value, 1, MAX_SAMPLE, "sample")


def limit(parts: dict[str, Any]) -> Limit:
    """A token bucket from its parts, already read."""
    per_second = parts["rate"]
    return Limit(per_second, parts.get("burst", max(1, round(per_second))), parts.get("per", "rule"))


# ── packets ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
TCP_FLAGS_SCHEMA: Final = {
    "anyOf": [{"type": "integer", "minimum": 0, "maximum": 255}, {"type": "string"},
              {"type": "array", "items": {"enum": list(FLAGS)}}]
}  # fmt: skip
_LETTERS: Final = {"f": 1, "s": 2, "r": 4, "p": 8, "a": 16, "u": 32, "e": 64, "c": 128}


def tcp_flags(value: Any) -> int:
    """TCP flags: a number, names (`syn,ack` or a list), or letters (`SA`)."""
    if isinstance(value, str):
        if re.fullmatch(r"0x[0-9a-fA-F]{1,2}|[0-9]{1,3}", value):
            return whole(int(value, 0) if value[:2] == "0x" else int(value), 0, 255, "set of TCP flags")
        words = [word for word in re.split(r"[\s,|+]+", value.lower()) if word]
        if not all(word in FLAGS for word in words) and value.lower().strip("fsrpauec") == "":
            return functools.reduce(lambda flags, letter: flags | _LETTERS[letter], value.lower(), 0)
        value = words
    if isinstance(value, list):
        return functools.reduce(lambda flags, word: flags | FLAGS[choice(word, FLAGS, "TCP flag")], value, 0)
    return whole(value, 0, 255, "set of TCP flags")


def address(value: Any) -> str:
    """One address, in the form people write it."""
    if not isinstance(value, str) or "/" in value:
        raise Wrong(f"{quote(value)} is no address", "for example 203.0.113.9 or 2001:db8::9")
    found = _prefix(value)
    return address_text(found.family, found.address)


def octet(value: Any) -> int:
    """A byte: an ICMP type or code of a packet."""
    return whole(value, 0, 255, "byte")


def packet_port(value: Any) -> int:
    """A port of a packet."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 5:
        value = int(value)
    return whole(value, 0, 65_535, "port")
