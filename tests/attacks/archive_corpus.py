"""Hostile archives, made by code: a name, the harm each does to a careless reader, and the code with which ours refuses it.

Only the standard library and `loopback.trust.package` are needed, so that every interpreter can run it as a script:
`python archive_corpus.py FOLDER` tries every shape and prints what happened as JSON.
"""

from __future__ import annotations

import gzip
import json
import stat
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

from archive_making import (
    DIR,
    LNK,
    REG,
    SYM,
    beyond_path_max,
    block,
    extended,
    gnu_long,
    good,
    hard_link_to_deeper_link,
    member,
    overlapping_zip,
    packed,
    sparse,
    tar_of,
    zip_of,
)
from archive_readers import (
    MANY,
    MANY_BYTES,
    Harm,
    Place,
    blind,
    careless_tar,
    careless_zip,
    collides,
    disagree,
    endless,
    escapes,
    filtered_tar,
    leaves,
    many,
    names_of,
    odd,
    on_windows,
    overwrites,
    passes,
    size_of,
    swells,
)
from archive_trying import Shape, harm_of, refusal_of

UNSAFE, MALFORMED, LARGE, TRUNCATED, DIGEST = (
    "package.unsafe-member", "package.malformed", "package.too-large", "package.truncated", "package.digest"
)  # fmt: skip
SHAPES: list[Shape] = []


def shape(name: str, code: str, data: bytes | Callable[[Place], bytes], harm: Harm) -> None:
    SHAPES.append(Shape(name, code, data if callable(data) else lambda place: data, harm))


# 1. traversal in tar
for label, path in {
    "the folder above": "../outside/new",
    "down and further up": "lib/../../outside/new",
    "with a dot before": "./../outside/new",
    "many steps": "lib/x/../../../outside/new",
}.items():
    shape(f"traversal/tar: {label}", UNSAFE, packed(member("lib/x/a.py"), member(path)), escapes())
shape("traversal/tar: an absolute path", UNSAFE, lambda p: packed(member(f"{p.outside}/new")), escapes())
shape(
    "traversal/tar: in the prefix of the name", UNSAFE, packed(member("outside/new", prefix=b"..")), escapes()
)
shape(
    "traversal/tar: an absolute prefix",
    UNSAFE,
    lambda p: packed(member("new", prefix=str(p.outside).encode())),
    escapes(),
)
shape("traversal/tar: over a file that is there", UNSAFE, packed(member("../outside/victim")), escapes())
shape("traversal/tar: backslashes", UNSAFE, packed(member("..\\..\\outside\\new")), on_windows)
shape("traversal/tar: a drive", UNSAFE, packed(member("D:/outside/new")), on_windows)
shape("traversal/tar: a drive's own folder", UNSAFE, packed(member("D:new")), on_windows)
shape("traversal/tar: a network share", UNSAFE, packed(member("\\\\server\\share\\new")), on_windows)
shape("traversal/tar: a stream of a file", UNSAFE, packed(member("lib/a.py:hidden")), on_windows)
# 2. traversal in zip
shape(
    "traversal/zip: the folder above",
    MALFORMED,
    zip_of(("../outside/new", b"x" * 999, 0o100644)) + bytes(512),
    escapes(careless_zip),
)
shape(
    "traversal/zip: an absolute path",
    MALFORMED,
    lambda p: zip_of((f"{p.outside}/new", b"x", 0o100644)) + bytes(512),
    escapes(careless_zip),
)
shape(
    "traversal/zip: through a link",
    MALFORMED,
    lambda p: zip_of(("d", str(p.outside).encode(), 0o120777), ("d/new", b"x", 0o100644)) + bytes(512),
    escapes(careless_zip),
)
shape(
    "traversal/zip: a link to a file",
    MALFORMED,
    lambda p: zip_of(("l", f"{p.outside}/victim".encode(), 0o120777), ("l", b"x", 0o100644)) + bytes(512),
    escapes(careless_zip),
)
shape(
    "traversal/zip: shorter than a block",
    TRUNCATED,
    zip_of(("../outside/new", b"x", 0o100644)),
    escapes(careless_zip),
)
shape(
    "traversal/zip: behind a good package",
    MALFORMED,
    good() + zip_of(("../outside/new", b"x", 0o100644)),
    escapes(careless_zip),
)
# 3. link chains
shape(
    "links: a symbolic link to outside",
    UNSAFE,
    lambda p: tar_of(("l", SYM, str(p.outside)), ("l/new", REG, "")),
    escapes(),
)
shape("links: a relative one", UNSAFE, tar_of(("l", SYM, "../outside"), ("l/new", REG, "")), escapes())
shape(
    "links: a chain of two",
    UNSAFE,
    tar_of(("a", SYM, ".."), ("b", SYM, "a/outside"), ("b/new", REG, "")),
    escapes(),
)
shape(
    "links: a chain through folders",
    UNSAFE,
    tar_of(("d/e", DIR, ""), ("d/e/up", SYM, "../.."), ("f", SYM, "d/e/up/../outside"), ("f/new", REG, "")),
    escapes(),
)
shape(
    "links: a file in place of a link",
    UNSAFE,
    lambda p: tar_of(("l", SYM, f"{p.outside}/victim"), ("l", REG, "")),
    escapes(),
)
shape(
    "links: a hard link to a file outside",
    UNSAFE,
    lambda p: tar_of(("l", LNK, "../outside/victim"), ("l", REG, "")),
    escapes(),
)
shape(
    "links: a hard link to a deeper symbolic link",
    UNSAFE,
    hard_link_to_deeper_link,
    escapes(filtered_tar, careless_tar),
)
shape("links: a path over PATH_MAX", UNSAFE, beyond_path_max, escapes(filtered_tar, careless_tar))
shape(
    "links: a link to itself",
    UNSAFE,
    tar_of(("l", SYM, "l")),
    leaves(lambda q: q.is_symlink(), "which leads nowhere"),
)
shape(
    "links: by a GNU long target",
    UNSAFE,
    lambda p: gnu_long(
        str(p.outside).encode(), block(b"l", kind=b"2", link=b"harmless"), member("l/new"), kind=b"K"
    ),
    escapes(),
)
shape(
    "links: by a pax target",
    UNSAFE,
    lambda p: extended(
        {"linkpath": str(p.outside)}, block(b"l", kind=b"2", link=b"harmless"), member("l/new")
    ),
    escapes(),
)
# 4. bombs
shape("bombs: a sparse file of a terabyte", UNSAFE, packed(sparse(1 << 40)), swells)
shape(
    "bombs: pax sparse",
    UNSAFE,
    extended(
        {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "big",
            "GNU.sparse.realsize": str(1 << 40),
        },
        member("GNUSparseFile.0/big", b"1\n0\n0\n".ljust(512, b"\0")),
    ),
    swells,
)
shape("bombs: gzip", MALFORMED, lambda p: gzip.compress(bytes(MANY_BYTES)), swells)
shape(
    "bombs: a gzip of a good package",
    MALFORMED,
    lambda p: gzip.compress(good(big=bytes(1000)), 0),
    lambda d, p: "tarfile reads it like a plain one" if names_of(d) else None,
)
shape("bombs: zip", MALFORMED, lambda p: zip_of(("big", bytes(MANY_BYTES), 0o100644)), swells)
shape("bombs: zip with overlapping entries", MALFORMED, overlapping_zip, swells)
shape("bombs: the largest octal size", LARGE, packed(block(b"big", b"77777777777")), swells)
shape(
    "bombs: a size in base 256",
    MALFORMED,
    packed(block(b"big", b"\x80" + (1 << 60).to_bytes(11, "big"))),
    swells,
)
shape(
    "bombs: a negative size in base 256",
    MALFORMED,
    packed(block(b"a"), block(b"b"), block(b"back", b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big"))),
    endless,
)
shape(
    "bombs: a negative size by pax",
    UNSAFE,
    packed(member("lib/a.py")[:0], extended({"size": "-2048"}, member("lib/a.py"))),
    lambda d, p: "tarfile takes a size below zero" if size_of(d) < 0 else None,
)
shape(
    "bombs: more members than allowed", LARGE, packed(*(member(f"f{n:05}", b"") for n in range(MANY))), many
)
shape(
    "bombs: more folders than allowed", LARGE, packed(*(member(f"d{n:05}/f", b"") for n in range(1900))), many
)
shape(
    "bombs: folders within folders",
    UNSAFE,
    packed(member("/".join("d" * 45), b"")),
    lambda d, p: leaves(lambda q: len(q.relative_to(p.inside).parts) > 40, "very deep")(d, p),
)
shape(
    "bombs: a member that overlaps the next one",
    MALFORMED,
    packed(block(b"lib/a.py", b"%011o" % 100), member("lib/b.py")),
    disagree,
)
# 5. duplicates
shape(
    "duplicates: the same name twice",
    UNSAFE,
    packed(member("lib/a.py", b"good\n"), member("lib/a.py", b"evil\n")),
    overwrites,
)
shape(
    "duplicates: not one after the other",
    UNSAFE,
    packed(member("lib/a.py", b"good\n"), member("lib/b.py"), member("lib/a.py", b"evil\n")),
    overwrites,
)
shape(
    "duplicates: with a dot between",
    UNSAFE,
    packed(member("lib/a.py", b"good\n"), member("lib/./a.py", b"evil\n")),
    overwrites,
)
shape(
    "duplicates: with two slashes",
    UNSAFE,
    packed(member("lib/a.py", b"good\n"), member("lib//a.py", b"evil\n")),
    overwrites,
)
shape(
    "duplicates: a file that is a folder too", UNSAFE, packed(member("lib", b"x"), member("lib/a.py")), passes
)
shape(
    "duplicates: in another case",
    UNSAFE,
    good(lib__A_dot_py=b"y = 1\n"),
    collides(str.lower, "where case counts for nothing"),
)
shape(
    "duplicates: a folder in another case",
    UNSAFE,
    good(LIB__b_dot_py=b"y = 1\n"),
    lambda d, p: "LIB and lib are one folder where case counts for nothing",
)
# 6. odd names
shape(
    "names: composed and decomposed",
    UNSAFE,
    packed(member("caf\u00e9"), member("cafe\u0301")),
    collides(lambda n: unicodedata.normalize("NFC", n), "once they are normalised"),
)
shape("names: a NUL", UNSAFE, extended({"path": "lib/a.py\0.txt"}, member("harmless")), odd)
shape(
    "names: hidden behind a NUL",
    MALFORMED,
    packed(member(b"lib/a.py\0/../../outside/new")),
    lambda d, p: "the bytes behind the NUL are another name" if b"outside" in d[:100] else None,
)
for label, text in {
    "a line break": "a\nb",
    "a carriage return": "a\rb",
    "an escape sequence": "a\x1b[2Jb",
    "a bidirectional override": "a\u202eb",
    "a leading dash": "-rf",
}.items():
    shape(f"names: {label}", UNSAFE, packed(member(text)), odd)
shape("names: no text at all", UNSAFE, packed(member(b"\xff\xfe\x80")), odd)
shape("names: a surrogate", UNSAFE, packed(member(b"a\xed\xa0\x80")), odd)
shape("names: a dot at the end", UNSAFE, packed(member("lib/a.")), on_windows)
shape("names: a blank at the end", UNSAFE, packed(member("lib/a ")), on_windows)
shape(
    "names: a hidden file",
    UNSAFE,
    packed(member(".profile")),
    leaves(lambda q: q.name == ".profile", "which a listing does not show"),
)
shape("names: very long", UNSAFE, extended({"path": "n" * 5000}, member("harmless")), odd)
shape("names: longer than allowed", UNSAFE, packed(member("n" * 99, prefix=b"p" * 120)), passes)
shape(
    "names: none",
    UNSAFE,
    packed(member("")),
    lambda d, p: "there is no name to check" if d[:1] == b"\0" else None,
)
shape("names: a folder", UNSAFE, packed(member("lib/", b"")), passes)
# 7. extensions that say otherwise than the header
shape("extensions: pax path", UNSAFE, extended({"path": "../outside/new"}, member("harmless")), escapes())
shape(
    "extensions: pax path for all",
    UNSAFE,
    extended({"path": "../outside/new"}, member("harmless"), kind=b"g"),
    escapes(),
)
shape(
    "extensions: pax size",
    UNSAFE,
    extended({"size": "1024"}, block(b"a", b"%011o" % 0), member("hidden", b"")),
    disagree,
)
shape(
    "extensions: pax charset",
    UNSAFE,
    extended({"hdrcharset": "BINARY", "path": "../outside/new"}, member("harmless")),
    escapes(),
)
shape("extensions: GNU long name", UNSAFE, gnu_long(b"../outside/new", member("harmless")), escapes())
shape("extensions: an unknown type", UNSAFE, packed(member("lib/a.py", kind=b"Z")), passes)
shape("extensions: a contiguous file", UNSAFE, packed(member("lib/a.py", kind=b"7")), passes)
shape("extensions: a volume header", UNSAFE, packed(member("lib/a.py", kind=b"V")), passes)
shape(
    "extensions: an old header",
    MALFORMED,
    packed(_old := block(b"lib/a.py")[:257] + bytes(255)),
    lambda d, p: "there is no sign of the format" if d[257:262] != b"ustar" else None,
)
# 8. cut and added
_whole = good()
for at in range(0, len(_whole), 512):
    shape(
        f"cut: after {at // 512} blocks",
        TRUNCATED,
        _whole[:at],
        lambda d, p: "less arrives than was sent" if len(d) < len(_whole) else None,
    )
shape(
    "cut: within a header",
    TRUNCATED,
    _whole[:300],
    lambda d, p: "less arrives than was sent" if len(d) < len(_whole) else None,
)
shape(
    "added: a second archive",
    MALFORMED,
    good() + packed(member("../outside/new")),
    escapes(lambda d, p: careless_tar(d, p, ignore_zeros=True)),
)
shape("added: zeros", MALFORMED, good() + bytes(512), passes)
shape("added: one byte", MALFORMED, good() + b"\0", passes)
shape(
    "added: content between members",
    MALFORMED,
    packed(member("bin/run", b"x")[:-1] + b"!", member("lib/a.py")),
    passes,
)
shape(
    "added: a file that is not listed",
    DIGEST,
    good()[:0] + packed(*[good()[:-1024]], member("zz.py"), end=bytes(1024)),
    leaves(lambda q: q.name == "zz.py", "which no digest covers"),
)
# 9. other things than files
for label, kind, is_such in (
    ("a character device", b"3", stat.S_ISCHR), ("a block device", b"4", stat.S_ISBLK), ("a FIFO", b"6", stat.S_ISFIFO),
):  # fmt: skip
    shape(
        f"kinds: {label}",
        UNSAFE,
        packed(block(b"thing", kind=kind)),
        leaves(lambda q, is_such=is_such: is_such(q.lstat().st_mode), f"which is {label}"),
    )
shape(
    "kinds: a folder",
    UNSAFE,
    packed(block(b"thing", kind=b"5")),
    leaves(lambda q: q.is_dir(), "an empty folder"),
)
# 10. headers
shape(
    "headers: a wrong checksum",
    MALFORMED,
    packed(member("lib/a.py")[:148] + b"0000001\0" + member("lib/a.py")[156:]),
    blind,
)
shape(
    "headers: a signed checksum",
    MALFORMED,
    packed(member("lib/a.py")[:148] + b"-000001\0" + member("lib/a.py")[156:]),
    blind,
)
shape(
    "headers: set-user-id",
    MALFORMED,
    packed(member("bin/run", mode=b"0004755")),
    leaves(lambda q: bool(q.stat().st_mode & stat.S_ISUID), "which runs as its owner"),
)
shape(
    "headers: for everybody to write",
    MALFORMED,
    packed(member("lib/a.py", mode=b"0000666")),
    leaves(lambda q: q.is_file() and bool(q.stat().st_mode & stat.S_IWOTH), "which everybody may change"),
)
shape(
    "headers: somebody else's",
    MALFORMED,
    packed(member("lib/a.py", uid=b"0001750")),
    leaves(lambda q: q.is_file() and q.stat().st_uid == 1000, "which is another user's"),
)
shape(
    "headers: sizes said otherwise",
    MALFORMED,
    packed(member("lib/a.py")[:124] + b"         2 \0" + member("lib/a.py")[136:]),
    blind,
)
shape("headers: out of order", UNSAFE, packed(member("lib/b.py"), member("lib/a.py")), passes)
shape(
    "headers: nothing but an end",
    MALFORMED,
    bytes(1024),
    lambda d, p: "it is an archive without a file" if names_of(d) == [] else None,
)


def main() -> None:
    folder = Path(sys.argv[1])
    results = {}
    for found in SHAPES:
        code, same = refusal_of(found, folder)
        results[found.name] = {
            "harm": harm_of(found, folder),
            "code": code,
            "wanted": found.code,
            "same": same,
        }
    print(
        json.dumps(
            {
                "python": sys.version.split()[0],
                "data_filter": hasattr(tarfile, "data_filter"),
                "shapes": results,
            }
        )
    )


if __name__ == "__main__":
    main()
