"""Inputs that still look like what they came from: mutations of bytes, text, trees (JSON, msgpack) and archives.

Everything follows from the generator that is passed in, so that a seed makes the same inputs again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Any, Final

import msgspec

MAX_INPUT: Final = 64 * 1024  # bytes; parsers have limits of their own, which the nasty values try

_DEEP: Final = json.loads("[" * 60 + "]" * 60)
#: Values that some program somewhere did not expect.
NASTY: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 255, 65536, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0,
    1e308, 5e-324, float("inf"), float("nan"), "", " ", "\0", "a\nb", "\x7f", "\x1b[2J", "é", "e\u0301", "\u202e", "\ud800",
    "🦀", "x" * 300, "*", ">", ".", "..", "../../etc/passwd", "/etc/passwd", "-", "_2e", "_zz", "0x10", "1e9", "NaN", "null",
    "a" * 64, "A" * 64, "0" * 64, "0" * 63, "1.0", "1.0.0", "1!2.0", "v1", "9" * 400, "10.0.0.0/8", "::/0", "0.0.0.0/33", "@x",
    "1-65535", "65536", "10/s", "1/0s", "2026-11-25T00:00:00Z", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59",
    "2026-11-25T00:00:00", "2026-02-30T00:00:00Z", "AAAA", "====", "eyJ9", "nats://x", [], {}, [[]], {"": ""}, _DEEP,
    [None] * 50,
)  # fmt: skip
_TOKENS: Final = (
    b"\0", b"\r\n", b"\r\n\r\n", b"\n", b"\t", b": ", b"=", b"{", b"}", b"[", b"]", b'"', b"'", b"'''", b"&a", b"*a", b"<<: ",
    b"!!x", b"---\n", b"...", b"%YAML 9\n", b"#", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf4\x90\x80\x80",
    b"-1", b"1e999", b"99999999999999999999", b"null", b"true", b"[allow]\n", b"__proto__", b"%s%n", b"\\u0000", b"\\ud800",
    b"[" * 200, b"{" * 200,
)  # fmt: skip
_NUMBER = re.compile(rb"\d+")

Mutation = Callable[[bytes, Random, Sequence[bytes]], bytes]


def mutate(data: bytes, family: str, random: Random, pool: Sequence[bytes]) -> bytes:
    """Another input near `data`; `pool` has others to take parts from."""
    if random.random() < 0.15:
        return _bytes(data, random, pool)[:MAX_INPUT]
    made = FAMILIES[family](data, random, pool)
    while random.random() < 0.3:
        # cut in between too: what is repeated three hundred times twice over is gigabytes
        made = FAMILIES[family](made[:MAX_INPUT], random, pool)
    return made[:MAX_INPUT]


def _bytes(data: bytes, random: Random, pool: Sequence[bytes]) -> bytes:
    size = len(data)
    at = random.randrange(size + 1)
    end = min(size, at + random.choice((1, 1, 2, 4, 8, 32, 512)))
    kind = random.randrange(8)
    if kind == 0 and size:
        at = min(at, size - 1)
        return data[:at] + bytes((data[at] ^ 1 << random.randrange(8),)) + data[at + 1 :]
    if kind == 1:
        return data[:at] + random.randbytes(end - at) + data[end:]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:at] + data[at:end] * random.choice((2, 2, 9)) + data[end:]
    if kind == 4:
        return data[:at] + random.choice(_TOKENS) + data[at if random.random() < 0.5 else end :]
    if kind == 5:
        other = random.choice(pool)
        return data[:at] + other[random.randrange(len(other) + 1) :]
    if kind == 6:
        return data[:at]
    numbers = list(_NUMBER.finditer(data[:4096]))
    if not numbers:
        return data + random.choice(_TOKENS)
    chosen = random.choice(numbers)
    number = str(random.choice((0, 1, -1, 255, 2**31, 2**63, 2**64, 10**40))).encode()
    return data[: chosen.start()] + number + data[chosen.end() :]


def _text(data: bytes, random: Random, pool: Sequence[bytes]) -> bytes:
    """By lines and words: for TOML, YAML, credentials and headers."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    kind = random.randrange(7)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[random.randrange(len(lines))])
    elif kind == 2:
        others = random.choice(pool).split(b"\n")
        lines[at] = random.choice(others)
    elif kind == 3:
        indent = random.choice((b"", b" ", b"  ", b"    ", b"\t", b"- "))
        lines[at] = indent + lines[at].lstrip()
    elif kind == 4:
        head, mark, _ = lines[at].partition(random.choice((b"=", b":", b": ")))
        lines[at] = head + mark + b" " + _json(random.choice(NASTY))
    elif kind == 5:
        words = re.split(rb"(\W+)", lines[at])
        words[random.randrange(len(words))] = _json(random.choice(NASTY)).strip(b'"')
        lines[at] = b"".join(words)
    else:
        return _bytes(data, random, pool)
    return b"\n".join(lines)


def _tree(value: Any, random: Random, other: Any) -> Any:
    """The same tree with one thing changed; what is not changed is shared."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        kind = random.randrange(12)
        made = dict(value)
        if kind == 0:
            del made[key]
        elif kind == 1:
            made[random.choice((str(key) + "x", "type", "verb", "id", "", "\ud800", "x" * 300))] = made.pop(
                key
            )
        elif kind == 2:
            made[random.choice(list(value))] = value[key]
        elif kind == 3 and isinstance(other, dict):
            made.update(dict([random.choice(list(other.items()))]) if other else {})
        else:
            made[key] = _tree(value[key], random, other.get(key) if isinstance(other, dict) else None)
        return made
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        kind = random.randrange(8)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[: at + 1] + value[at:]
        if kind == 2:
            return [*value[:at], random.choice(NASTY), *value[at:]]
        if kind == 3:
            return [value[at]] * random.choice((2, 17, 300))
        inner = random.choice(other) if isinstance(other, list) and other else None
        return [*value[:at], _tree(value[at], random, inner), *value[at + 1 :]]
    if isinstance(value, str) and random.random() < 0.4:
        raw = _bytes(value.encode("utf-8", "surrogatepass"), random, (b"x", b"\0"))
        return raw.decode("utf-8", "replace")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        number and abs(value) < 2**256 and random.random() < 0.5
    ):  # beyond it, numbers are text that json refuses
        return random.choice((value + 1, value - 1, -value, value * 2**32, float(value)))
    return random.choice(NASTY) if other is None or random.random() < 0.7 else other


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError, UnicodeError):
        return json.dumps(value).encode()


@lru_cache(maxsize=2048)
def _parsed(data: bytes) -> Any:
    """A tree, which is never changed: `_tree` copies what it changes. Raises ValueError, RecursionError."""
    return json.loads(data)


def _of_json(data: bytes, random: Random, pool: Sequence[bytes]) -> bytes:
    try:
        value = _parsed(data)
    except (ValueError, RecursionError):
        return _bytes(data, random, pool)
    try:
        other = _parsed(random.choice(pool))
    except (ValueError, RecursionError):
        other = None
    return _json(_tree(value, random, other))


def _of_prefixed_json(data: bytes, random: Random, pool: Sequence[bytes]) -> bytes:
    """One byte that chooses, and JSON."""
    prefix = data[:1] if random.random() < 0.9 else bytes((random.randrange(256),))
    return prefix + _of_json(data[1:], random, [other[1:] for other in (random.choice(pool),)])


def _of_msgpack(data: bytes, random: Random, pool: Sequence[bytes]) -> bytes:
    try:
        value = msgspec.msgpack.decode(data)
        other = msgspec.msgpack.decode(random.choice(pool))
        return msgspec.msgpack.encode(_tree(value, random, other))
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, TypeError):
        return _bytes(data, random, pool)


def _of_policy(data: bytes, random: Random, pool: Sequence[bytes]) -> bytes:
    """YAML by its lines, or, where it is JSON, by its tree."""
    return _of_json(data, random, pool) if data[:1] == b"{" else _text(data, random, pool)


def _of_tar(data: bytes, random: Random, pool: Sequence[bytes]) -> bytes:
    """A field of a header, a content, or the order of members; what is derived is put right again, most of the time."""
    members: list[tuple[bytearray, bytes]] = []
    at = 0
    while at + 512 <= len(data) and data[at : at + 1] != b"\0":
        header = bytearray(data[at : at + 512])
        digits = bytes(header[124:136]).strip(b"\0 ")
        size = int(digits, 8) if re.fullmatch(rb"[0-7]{1,7}", digits) else 0
        members.append((header, data[at + 512 : at + 512 + size]))
        at += 512 + size + -size % 512
    if not members:
        return _bytes(data, random, pool)
    chosen = random.randrange(len(members))
    header, content = members[chosen]
    kind = random.randrange(10)
    if kind < 3:  # name, mode, uid, gid, size, mtime, type, link, magic, user, group, device, prefix
        start, end = random.choice(
            ((0, 100), (100, 108), (108, 116), (116, 124), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265),
             (265, 297), (297, 329), (329, 337), (337, 345), (345, 500))
        )  # fmt: skip
        field = _bytes(bytes(header[start:end]).rstrip(b"\0"), random, (b"../x", b"x\0y", b"\x80\0\0\0\xff"))
        header[start:end] = field[: end - start].ljust(end - start, b"\0")
    elif kind < 6:
        content = _bytes(content, random, pool)
        header[124:136] = b"%011o\0" % len(content)
    elif kind == 6:
        del members[chosen]
    elif kind == 7:
        members.insert(random.randrange(len(members) + 1), (bytearray(header), content))
    elif kind == 8:
        random.shuffle(members)
    else:
        header[156:157] = random.choice(
            (b"0", b"1", b"2", b"5", b"6", b"L", b"K", b"x", b"g", b"S", b"V", b"\0")
        )
    if kind < 6 or kind == 9:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        members[chosen] = (header, content)
    if random.random() < 0.7:
        members = [_listed(members) if h[:13] == b"digests.json\0" else (h, c) for h, c in members]
    parts = [bytes(h) + c + bytes(-len(c) % 512) for h, c in members]
    return b"".join(parts) + bytes(random.choice((1024, 1024, 1024, 512, 0, 1536)))


def _listed(members: list[tuple[bytearray, bytes]]) -> tuple[bytearray, bytes]:
    """`digests.json`, right again."""
    names = [(bytes(h[:100]).rstrip(b"\0").decode("latin-1"), c) for h, c in members]
    digests = {n: hashlib.sha256(c).hexdigest() for n, c in names if n != "digests.json"}
    content = json.dumps(digests, sort_keys=True, indent=0).encode()
    header = bytearray(next(h for h, _ in members if h[:13] == b"digests.json\0"))
    header[124:136] = b"%011o\0" % len(content)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header, content


FAMILIES: Final[dict[str, Mutation]] = {
    "bytes": _bytes,
    "text": _text,
    "json": _of_json,
    "prefixed-json": _of_prefixed_json,
    "msgpack": _of_msgpack,
    "policy": _of_policy,
    "tar": _of_tar,
}
