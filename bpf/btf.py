"""Read the BTF of an object file: how the compiler laid out every structure.

Only so much of ELF and BTF as that takes, with no tool and no kernel (Documentation/bpf/btf.rst describes the format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from loopback.contracts.codes import Code, Refused

ELF_MAGIC: Final = b"\x7fELF\x02\x01"  # 64 bits, little-endian
BTF_MAGIC: Final = 0xEB9F
_INT, _POINTER, _ARRAY, _STRUCT, _UNION, _ENUM, _ENUM64 = 1, 2, 3, 4, 5, 6, 19
_SIZED: Final = {_INT, _STRUCT, _UNION, _ENUM, 16, _ENUM64}  # 16: a floating-point number
_ALIASES: Final = {8, 9, 10, 11, 18}  # typedef, volatile, const, restrict, type tag
#: Bytes after the common 12 of each kind: (once, for each of its members).
_TRAILERS: Final = {
    _INT: (4, 0),
    _ARRAY: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    13: (0, 8),  # function prototype
    14: (4, 0),  # variable
    15: (0, 12),  # section
    17: (4, 0),  # declaration tag
    _ENUM64: (0, 12),
}
_POINTER_SIZE: Final = 8
_MAX_ALIASES: Final = 64  # a chain of typedefs that is longer is a loop


@dataclass(frozen=True)
class Field:
    """One member of a structure; offset and size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Layout:
    """A structure as compiled."""

    size: int
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class _Type:
    name: str
    kind: int
    members: int
    bitfields: bool
    size_or_type: int
    at: int  # where its trailer begins


def structures(data: bytes) -> dict[str, Layout]:
    """Every named structure of an object file, by its name in C. Raises Refused(PACKAGE_MALFORMED)."""
    try:
        return _Btf(_section(data, b".BTF")).structures()
    except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
        raise Refused(
            Code.PACKAGE_MALFORMED, f"the object's BTF cannot be read: {error}", "compile it with clang -g"
        ) from None


def _section(data: bytes, wanted: bytes) -> bytes:
    if not data.startswith(ELF_MAGIC):
        raise ValueError("this is no 64-bit little-endian ELF file")
    (headers,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, headers + i * entry_size) for i in range(count)]
    names_at = sections[names_index][4]
    for name, _, _, _, offset, size in sections:
        start = names_at + name
        if data[start : data.index(b"\0", start)] == wanted:
            return data[offset : offset + size]
    raise ValueError(f"it has no section {wanted.decode()}")


class _Btf:
    def __init__(self, data: bytes) -> None:
        magic, _, _, length, types, types_length, strings, strings_length = struct.unpack_from(
            "<HBBIIIII", data
        )
        if magic != BTF_MAGIC:
            raise ValueError("wrong magic number")
        self._data = data
        self._strings = data[length + strings : length + strings + strings_length]
        self._types = [_Type("void", 0, 0, False, 0, 0)]  # number 0 is void
        self._types.extend(self._read(length + types, length + types + types_length))

    def _read(self, at: int, end: int) -> Iterator[_Type]:
        while at < end:
            name, info, size_or_type = struct.unpack_from("<III", self._data, at)
            kind, members = info >> 24 & 0x1F, info & 0xFFFF
            yield _Type(self._text(name), kind, members, bool(info >> 31), size_or_type, at + 12)
            once, each = _TRAILERS.get(kind, (0, 0))
            at += 12 + once + each * members

    def _text(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _size(self, number: int) -> int:
        elements = 1
        for _ in range(_MAX_ALIASES):
            found = self._types[number]
            if found.kind in _SIZED:
                return elements * found.size_or_type
            if found.kind == _POINTER:
                return elements * _POINTER_SIZE
            if found.kind == _ARRAY:
                number, _, count = struct.unpack_from("<III", self._data, found.at)
                elements *= count
            elif found.kind in _ALIASES:
                number = found.size_or_type
            else:
                return 0
        raise ValueError("a type refers to itself")

    def _fields(self, found: _Type) -> Iterator[Field]:
        for index in range(found.members):
            name, number, bits = struct.unpack_from("<III", self._data, found.at + 12 * index)
            if found.bitfields:
                bits &= 0xFFFFFF
            yield Field(self._text(name), bits // 8, self._size(number))

    def structures(self) -> dict[str, Layout]:
        return {
            found.name: Layout(found.size_or_type, tuple(self._fields(found)))
            for found in self._types
            if found.kind == _STRUCT and found.name
        }
