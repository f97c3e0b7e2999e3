"""Prefixes: one as a value, and many as packed bytes, read from text a million at a time.

A list of IPv4 prefixes is read without touching any of them alone: what remains of the text without its digits must be the
dots, slashes and commas of such a list; then the numbers are decoded as one array, and bits beyond the lengths looked for in
whole columns of bytes. Whatever is not plainly right goes back to the caller, who reads one by one and says what is wrong.
"""

from __future__ import annotations

import gc
import itertools
import operator
import socket
import struct
import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, Literal

import msgspec

RECORD4: Final = 5  # bytes: address in network order, then length
RECORD6: Final = 17
_DIGITS: Final = b"0123456789"
_TO_COMMAS: Final = bytes.maketrans(b"./", b",,")
_PIECE: Final = 200_000  # characters decoded at once
_HEX: Final = b"0123456789abcdefABCDEF"
#: For each byte of an IPv4 address: from a prefix's length to the bits of that byte beyond it; all for lengths that cannot be.
_BEYOND4: Final = tuple(
    bytes(0xFF >> min(max(length - 8 * place, 0), 8) if length <= 32 else 0xFF for length in range(256))
    for place in range(4)
)
_BEYOND6: Final = tuple((1 << (128 - length)) - 1 for length in range(129))
#: Lists as long as the machine allows are sorted in this many heaps, by their leading bits: comparing neighbours in memory is
#: twice as fast as comparing across 64 MB.
_HEAP_BITS: Final = 12
_WORTH_HEAPS: Final = 50_000


class Prefix(msgspec.Struct, frozen=True, order=True):
    """An address prefix. `address` is an integer of 32 or 128 bits whose bits beyond `length` are zero."""

    family: Literal[4, 6]
    address: int
    length: int


class PrefixTable(msgspec.Struct, frozen=True):
    """A set of prefixes, each once, in order: by family, address, length. Iterates as `Prefix`.

    `packed4` holds 5 bytes for each IPv4 prefix, the address in network order and the length; `packed6` 17 likewise. So their
    bytes are sorted as the prefixes are. Made by `of`, `read_json` or `read_texts`, which see to the order.
    """

    packed4: bytes = b""
    packed6: bytes = b""

    @classmethod
    def of(cls, prefixes: Collection[Prefix]) -> PrefixTable:
        """The table of any prefixes; a table is its own."""
        if isinstance(prefixes, PrefixTable):
            return prefixes
        found = sorted(set(prefixes))
        return cls(
            b"".join((p.address << 8 | p.length).to_bytes(RECORD4) for p in found if p.family == 4),
            b"".join((p.address << 8 | p.length).to_bytes(RECORD6) for p in found if p.family == 6),
        )

    def __len__(self) -> int:
        return len(self.packed4) // RECORD4 + len(self.packed6) // RECORD6

    def __iter__(self) -> Iterator[Prefix]:
        for key in self.keys4():
            yield Prefix(4, key >> 8, key & 0xFF)
        for key in self.keys6():
            yield Prefix(6, key >> 8, key & 0xFF)

    def __contains__(self, prefix: object) -> bool:
        if not isinstance(prefix, Prefix):
            return False
        size, packed = (RECORD4, self.packed4) if prefix.family == 4 else (RECORD6, self.packed6)
        wanted = (prefix.address << 8 | prefix.length).to_bytes(size)
        low, high = 0, len(packed) // size
        while low < high:
            middle = (low + high) // 2
            if packed[middle * size : (middle + 1) * size] < wanted:
                low = middle + 1
            else:
                high = middle
        return packed[low * size : (low + 1) * size] == wanted

    def keys4(self) -> array[int]:
        """`address << 8 | length` of each IPv4 prefix, ascending, as unsigned 64-bit integers."""
        return _spread(self.packed4)

    def keys6(self) -> list[int]:
        """The same of each IPv6 prefix."""
        packed = self.packed6
        return [int.from_bytes(packed[at : at + RECORD6]) for at in range(0, len(packed), RECORD6)]

    @property
    def families(self) -> frozenset[int]:
        """Of which families there is at least one."""
        return frozenset(({4} if self.packed4 else set()) | ({6} if self.packed6 else set()))


def read_json(text: bytes) -> PrefixTable | None:
    """The table of a JSON list of prefixes and addresses, where every one is plainly right; else None, whatever the reason."""
    try:
        if b":" not in text:
            found = _octets(msgspec.json.format(text, indent=-1)[1:-1])
            if found is not None:
                return PrefixTable(_sorted4(found))
        return read_texts(msgspec.json.decode(text, type=list[str]))
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return None


def read_texts(texts: Sequence[str]) -> PrefixTable | None:
    """The table of prefixes and addresses as text, where every one is plainly right; else None, whatever the reason."""
    try:
        joined = "".join(texts)
    except TypeError:  # not all of them are text
        return None
    if '"' in joined or "," in joined or not joined.isascii():
        return None
    colons = ":" in joined
    del joined
    six = [text for text in texts if ":" in text] if colons else []
    four = texts if not six else [text for text in texts if ":" not in text]
    packed4: bytes | None = b""
    packed6: bytes | None = b""
    if four:
        octets = _octets(('"' + '","'.join(four) + '"').encode())
        packed4 = None if octets is None else _sorted4(octets)
    if six and packed4 is not None:
        packed6 = _six(six)
    return None if packed4 is None or packed6 is None else PrefixTable(packed4, packed6)


def _octets(listed: bytes) -> bytes | None:
    """Records in the order of `"10.0.0.0/8","192.0.2.1"`; None where it is not exactly of that form, or a prefix is wrong."""
    if not listed:
        return b""
    bones = listed.translate(None, _DIGITS)
    count = bones.count(b",") + 1
    slashes = bones.count(b"/")
    if slashes not in (0, count):  # both kinds in one list
        listed = b",".join(item if b"/" in item else item[:-1] + b'/32"' for item in listed.split(b","))
        bones = listed.translate(None, _DIGITS)
    bone = b'".../",' if slashes else b'"...",'
    if bones != (bone * count)[:-1]:
        return None
    try:
        octets = _numbers(listed.translate(_TO_COMMAS, b'"'))
    except (msgspec.MsgspecError, ValueError):  # 01, a number that is absent, or one above 255
        return None
    if not slashes:
        records = bytearray(RECORD4 * count)
        for place in range(4):
            records[place::RECORD4] = octets[place::4]
        records[4::RECORD4] = b"\x20" * count
        return bytes(records)
    lengths = octets[4::RECORD4]
    for place, beyond in enumerate(_BEYOND4):
        if int.from_bytes(octets[place::RECORD4]) & int.from_bytes(lengths.translate(beyond)):
            return None
    return octets if max(lengths) <= 32 else None


def _numbers(listed: bytes) -> bytes:
    """Numbers behind commas as bytes; in pieces, so that the lists of them stay in the processor's cache."""
    decode = msgspec.json.Decoder(list[int]).decode
    found = bytearray()
    at = 0
    while True:
        to = listed.find(b",", at + _PIECE)
        if to < 0:
            return bytes(found + bytes(decode(b"[%b]" % listed[at:])))
        found += bytes(decode(b"[%b]" % listed[at:to]))
        at = to + 1


def _spread(records: bytes) -> array[int]:
    """IPv4 records as integers of 64 bits."""
    wide = bytearray(len(records) // RECORD4 * 8)
    for place in range(RECORD4):
        wide[3 + place :: 8] = records[place::RECORD4]
    keys = array("Q")
    keys.frombytes(wide)
    if sys.byteorder == "little":
        keys.byteswap()
    return keys


def _sorted4(records: bytes) -> bytes:
    """The records in order, each once."""
    keys: Sequence[int] = _spread(records)
    if all(map(operator.lt, keys, itertools.islice(keys, 1, None))):
        return records
    keys = _in_heaps(keys) if len(keys) >= _WORTH_HEAPS else sorted(keys)
    apart = [*map(operator.ne, keys, itertools.islice(keys, 1, None)), True]
    keys = keys if all(apart) else list(itertools.compress(keys, apart))
    wide = struct.pack(f">{len(keys)}Q", *keys)
    found = bytearray(len(wide) // 8 * RECORD4)
    for place in range(RECORD4):
        found[place::RECORD4] = wide[3 + place :: 8]
    return bytes(found)


def _in_heaps(keys: Iterable[int]) -> list[int]:
    heaps: list[list[int]] = [[] for _ in range(1 << _HEAP_BITS)]
    shift = 40 - _HEAP_BITS
    ordered: list[int] = []
    with no_collection():
        for key in keys:
            heaps[key >> shift].append(key)
        for heap in heaps:
            heap.sort()
            ordered += heap
    return ordered


class no_collection:
    """No garbage collection meanwhile: a million new objects would be looked through again and again."""

    def __enter__(self) -> None:
        self._was = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._was:
            gc.enable()


def _six(texts: list[str]) -> bytes | None:
    """IPv6 records in order, each once; None where one is wrong."""
    listed = ",".join(texts)
    count = len(texts)
    if listed.count("/") != count:
        texts = [text if "/" in text else text + "/128" for text in texts]
        listed = ",".join(texts)
    if listed.encode().translate(None, _HEX + b":.") != (b"/," * count)[:-1]:
        return None
    parts = listed.replace("/", ",").split(",")
    try:
        lengths = msgspec.json.decode(f"[{','.join(parts[1::2])}]", type=list[int])
        inet_pton = socket.inet_pton
        records = [
            inet_pton(socket.AF_INET6, host) + length.to_bytes()
            for host, length in zip(parts[::2], lengths, strict=True)
        ]
    except (msgspec.MsgspecError, OSError, ValueError, OverflowError):
        return None
    if max(lengths) > 128:
        return None
    beyond = _BEYOND6
    if any(int.from_bytes(record) >> 8 & beyond[record[16]] for record in records):
        return None
    if not all(map(operator.lt, records, itertools.islice(records, 1, None))):
        records = sorted(set(records))
    return b"".join(records)
