"""Making archives by hand, byte by byte where it has to be. The standard library only."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import warnings
import zipfile
from typing import Any

from archive_readers import Place

MANIFEST = b'[module]\nname = "corpus"\nversion = "1.0.0"\nentry = ["bin/run"]\n'


def block(
    name: bytes,
    size: bytes = b"",
    kind: bytes = b"0",
    link: bytes = b"",
    prefix: bytes = b"",
    mode: bytes = b"0000644",
    **fields: bytes,
) -> bytes:
    """A header whose checksum is right, whatever else is."""
    head = bytearray(512)
    head[0:100] = name[:100].ljust(100, b"\0")
    head[100:108] = mode.ljust(8, b"\0")
    head[108:116] = fields.get("uid", b"0000000").ljust(8, b"\0")
    head[116:124] = b"0000000\0"
    head[124:136] = (size or b"%011o" % 0).ljust(12, b"\0")
    head[136:148] = b"00000000000\0"
    head[156:157] = kind
    head[157:257] = link[:100].ljust(100, b"\0")
    head[257:265] = b"ustar\x0000"
    head[329:337] = head[337:345] = b"0000000\0"
    head[345:500] = prefix.ljust(155, b"\0")
    return checked(head)


def sparse(size: int) -> bytes:
    """A GNU sparse file of this size without any content."""
    head = bytearray(block(b"big", kind=b"S"))
    head[386:410] = b"00000000000\0" * 2
    head[483:495] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    return checked(head)


def checked(head: bytearray) -> bytes:
    """The header with a right checksum."""
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def member(name: str | bytes, content: bytes = b"x\n", **fields: Any) -> bytes:
    """A header and its content."""
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return block(raw, b"%011o" % len(content), **fields) + content + bytes(-len(content) % 512)


def packed(*members: bytes, end: bytes = bytes(1024)) -> bytes:
    """Members as they come, and the end of an archive."""
    return b"".join(members) + end


def good(**more: bytes) -> bytes:
    """A right package, but for what is added; `__` in a name is a slash and `_dot_` a dot."""
    files = {"bin/run": b"#!/bin/sh\n", "lib/a.py": b"x = 1\n", "module.toml": MANIFEST}
    files |= {name.replace("__", "/").replace("_dot_", "."): data for name, data in more.items()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["digests.json"] = json.dumps(digests, sort_keys=True, indent=0).encode()
    parts = [
        member(n, d, mode=b"0000755" if n.startswith("bin/") else b"0000644")
        for n, d in sorted(files.items())
    ]
    return packed(*parts)


def extended(records: dict[str, str], *members: bytes, kind: bytes = b"x") -> bytes:
    """Members behind a pax header (kind x: for the next one, g: for all)."""
    body = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        length = len(text) + 1
        while length != len(str(length)) + len(text):
            length = len(str(length)) + len(text)
        body += str(length).encode() + text
    return packed(member("pax", body, kind=kind), *members)


def gnu_long(name: bytes, *members: bytes, kind: bytes = b"L") -> bytes:
    """Members behind a GNU header with the next one's name (L) or link target (K)."""
    return packed(member("././@LongLink", name + b"\0", kind=kind), *members)


def tar_of(
    *members: tuple[str, bytes, str], content: bytes = b"harm\n", fmt: int = tarfile.USTAR_FORMAT
) -> bytes:
    """By tarfile: (name, type, link target); plain files get the content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as tar:
        for name, kind, target in members:
            found = tarfile.TarInfo(name)
            found.type, found.linkname, found.mode = kind, target, 0o755 if kind == tarfile.DIRTYPE else 0o644
            found.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(found, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return out.getvalue()


REG, SYM, LNK, DIR = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


def beyond_path_max(place: Place) -> bytes:
    """Links whose resolved path grows over PATH_MAX, so that `realpath` stops resolving and the filter believes the rest
    (CVE-2025-4517)."""
    component, steps, path = "d" * 247, "abcdefghijklmnop", ""
    members: list[tuple[str, bytes, str]] = []
    for step in steps:
        members += [(f"{path}{component}", DIR, ""), (f"{path}{step}", SYM, component)]
        path = f"{path}{component}/"
    link = "/".join(steps) + "/" + "l" * 254
    members.append((link, SYM, "../" * len(steps)))
    up = link + "/.." * 1 + "/outside"
    return tar_of(
        *members,
        ("escape", SYM, up),
        ("victim", LNK, "escape/victim"),
        ("victim", REG, ""),
        fmt=tarfile.PAX_FORMAT,
    )


def hard_link_to_deeper_link(place: Place) -> bytes:
    """A hard link to a symbolic link that is harmless where it lies, and leads outside from where the hard link lies."""
    return tar_of(
        ("a/b/c", DIR, ""), ("a/b/c/link", SYM, "../../../x"), ("moved", LNK, "a/b/c/link"), ("x", DIR, ""),
        ("moved/victim", REG, ""),
    )  # fmt: skip


def zip_of(*members: tuple[str, bytes, int]) -> bytes:
    """By zipfile: (name, content, mode)."""
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content, mode in members:
            found = zipfile.ZipInfo(name)
            found.external_attr = mode << 16
            found.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(found, content)
    return out.getvalue()


def overlapping_zip(place: Place) -> bytes:
    """Many entries of the directory that share one compressed content."""
    data = zip_of(("a", bytes(8 * 1024 * 1024), 0o100644))
    end = data.rindex(b"PK\5\6")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    entry = data[start:end]
    entries = b"".join(entry[:46] + b"%c" % (97 + n) + entry[47:] for n in range(20))
    tail = bytearray(data[end:])
    tail[8:12] = struct.pack("<HH", 20, 20)
    tail[12:16] = struct.pack("<I", len(entries))
    return data[:start] + entries + bytes(tail)
