"""Careless readers of archives, and how to see the harm that one of them came to. The standard library only."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

MANY = 3000  # members or folders
MANY_BYTES = 64 * 1024 * 1024  # what a bomb swells to at least


class Place(NamedTuple):
    """Where a shape is tried: `inside` is to be written to, `outside` is not and holds a file `victim`."""

    inside: Path
    outside: Path


Harm = Callable[[bytes, Place], str | None]


def everything(folder: Path) -> dict[str, bytes | str]:
    """A folder's content: of files their bytes, of others what they are."""
    return {
        str(path): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else oct(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


def careless_tar(data: bytes, place: Place, **options: Any) -> None:
    """tarfile as everybody used it: whatever it trips over, it has written by then what it has written."""
    with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data), **options) as tar:
        for member in tar:
            with contextlib.suppress(Exception):
                if hasattr(tarfile, "fully_trusted_filter"):
                    tar.extract(member, place.inside, filter="fully_trusted")
                else:
                    tar.extract(member, place.inside)


def filtered_tar(data: bytes, place: Place) -> None:
    """tarfile with the filter for data, where this Python has it."""
    if hasattr(tarfile, "data_filter"):
        with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(place.inside, filter="data")


def careless_zip(data: bytes, place: Place) -> None:
    """A zip reader by hand: a path is joined and opened, a link is made as the mode says."""
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as found:
        for member in found.infolist():
            path = str(place.inside) + "/" + member.filename
            if member.filename.startswith("/"):
                path = member.filename
            with contextlib.suppress(OSError):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                if stat.S_ISLNK(member.external_attr >> 16):
                    Path(path).symlink_to(found.read(member).decode())
                else:
                    Path(path).write_bytes(found.read(member))


def escapes(*readers: Callable[[bytes, Place], None]) -> Callable[[bytes, Place], str | None]:
    """Something outside is made or changed by one of these readers; or inside, a link leads there."""

    def harm(data: bytes, place: Place) -> str | None:
        for reader in readers or (careless_tar,):
            before = everything(place.outside)
            there = set(place.inside.parent.iterdir())
            reader(data, place)
            after = everything(place.outside)
            changed = [name for name in after if before.get(name) != after[name]]
            changed += sorted(set(place.inside.parent.iterdir()) - there)
            links = [path for path in inside(place) if path.is_symlink() and leads_out(path, place)]
            shutil.rmtree(place.inside)
            place.inside.mkdir()
            if changed:
                return f"{reader.__name__} writes {changed[0]}"
            if links:
                return f"{reader.__name__} leaves {links[0]}, which leads outside"
        return None

    return harm


def inside(place: Place) -> list[Path]:
    """Everything that was written inside, as far down as a path can name it."""
    found = []
    for top, folders, files in os.walk(place.inside, onerror=lambda error: None):
        if len(top) < 3000:
            found += [Path(top) / name for name in (*folders, *files)]
    return found


def leads_out(path: Path, place: Place) -> bool:
    try:
        return not path.resolve().is_relative_to(place.inside.resolve())
    except (OSError, RuntimeError):
        return False


def leaves(what: Callable[[Path], bool], said: str) -> Callable[[bytes, Place], str | None]:
    """A careless reader leaves such a thing inside."""

    def harm(data: bytes, place: Place) -> str | None:
        careless_tar(data, place)
        found = [path for path in inside(place) if what(path)]
        return f"leaves {found[0]}, {said}" if found else None

    return harm


def swells(data: bytes, place: Place) -> str | None:
    """What it unpacks to, or says that it will, is far more than it has."""
    announced = 0
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as found:
            announced = sum(member.file_size for member in found.infolist())
    elif data[:2] == b"\x1f\x8b":
        announced = len(gzip.decompress(data))
    else:
        with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                announced += member.size
    if announced < max(MANY_BYTES, 100 * len(data)):
        return None
    return f"{len(data)} bytes swell to {announced}"


def many(data: bytes, place: Place) -> str | None:
    """A careless reader fills the folder with entries."""
    careless_tar(data, place)
    found = len(inside(place))
    return f"makes {found} entries" if found >= MANY else None


def endless(data: bytes, place: Place) -> str | None:
    """A reader that walks the members never comes to an end, or sees more of them than there are blocks."""
    seen = 0
    with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for _ in tar:
            seen += 1
            if seen > len(data) // 512:
                return "tarfile goes round in circles"
    return None


def disagree(data: bytes, place: Place) -> str | None:
    """Two readers see different members: what one checked is not what the other unpacks."""
    plain = []
    at = 0
    while at + 512 <= len(data) and data[at : at + 512] != bytes(512):
        head = data[at : at + 512]
        prefix = head[345:500].split(b"\0")[0]
        name = head[:100].split(b"\0")[0]
        digits = head[124:136].strip(b"\0 ")
        size = int(digits, 8) if digits and set(digits) <= set(b"01234567") else 0
        plain.append((f"{prefix.decode('latin-1')}/" if prefix else "") + name.decode("latin-1"))
        at += 512 + size + -size % 512
    read: list[str] = []
    with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as tar:
        read = [member.name for member in tar]
    return (
        f"one reader sees {sorted(plain)[:4]}, another {sorted(read)[:4]}"
        if sorted(plain) != sorted(read)
        else None
    )


def overwrites(data: bytes, place: Place) -> str | None:
    """The second member of a name replaces the first, which was the one that somebody looked at."""
    careless_tar(data, place)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        first = tar.extractfile(next(m for m in tar if m.name == "lib/a.py"))
        looked_at = first.read() if first else b""
    found = (place.inside / "lib/a.py").read_bytes()
    return f"a look says {looked_at!r}, the disk {found!r}" if found != looked_at else None


def collides(key: Callable[[str], str], where: str) -> Callable[[bytes, Place], str | None]:
    """Two members are one file where names are compared like this."""

    def harm(data: bytes, place: Place) -> str | None:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            names = tar.getnames()
        return (
            f"{names} are {len({key(n) for n in names})} files {where}"
            if len({key(n) for n in names}) < len(names)
            else None
        )

    return harm


def on_windows(data: bytes, place: Place) -> str | None:
    """A reader that takes names as Windows does leaves its folder, or names a stream or another file."""
    base = PureWindowsPath("C:/base")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for name in tar.getnames():
            path = base / name
            if (
                ".." in path.parts
                or not path.is_relative_to(base)
                or name != name.rstrip(". ")
                or ":" in name
            ):
                return f"{name!r} becomes {path}"
    return None


def odd(data: bytes, place: Place) -> str | None:
    """A name that a terminal, a log or a shell takes for something else, or that no text can hold."""
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        for name in tar.getnames():
            if not name.isprintable() or name.startswith("-") or len(name) > 1000:
                return f"prints {name[:40]!r}"
    return None


def passes(data: bytes, place: Place) -> str | None:
    """A reader that is not strict takes it for a good archive."""
    with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = tar.getnames()
        return f"tarfile takes it: {names[:3]}" if names else None
    return None


def blind(data: bytes, place: Place) -> str | None:
    """A reader that looks at no checksum takes the member."""
    name = data[:100].split(b"\0")[0]
    return f"without the checksum, {name.decode()} is a file like any other" if name else None


def size_of(data: bytes) -> int:
    """The size that tarfile takes the last member to have."""
    with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for found in tar:
            return found.size
    return 0


def names_of(data: bytes) -> list[str] | None:
    """The members that tarfile sees, None where it sees no archive."""
    with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()
    return None
