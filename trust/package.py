"""Packages: `.lbm`, an uncompressed ustar archive in one canonical form.

There is exactly one archive for a set of files: members sorted by name, regular files only, fixed owner, mode and time.
A reader rebuilds each header from name and size and compares bytes, so links, devices, folders, extensions (pax, GNU, sparse),
odd modes, duplicates and hidden data have no encoding at all. Files under `bin/` are executable, no other is.
`module.toml` is the manifest, `digests.json` maps every other file to its SHA-256; `sbom.cdx.json` and `provenance.json` say
what is in it and how it was made (attest.py).

Verification steps, in order: 1 size of the archive · 2 canonical headers and safe names · 3 caps on members and sizes ·
4 end of archive, nothing behind it · 5 every content against `digests.json`, none missing, none more · 6 the manifest.
Nothing is written to a destination before all of them held.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.trust import attest
from loopback.trust import manifest as manifests
from loopback.trust.manifest import Manifest

MAX_PACKAGE: Final = 64 * 1024 * 1024  # bytes; the firewall has under 3 MiB
MAX_MEMBERS: Final = 2000
MAX_FILE: Final = 32 * 1024 * 1024  # bytes of one member
MAX_DIGESTS: Final = 512 * 1024  # bytes; 2000 members of 200 bytes
MAX_FOLDERS: Final = 256  # all of them are open while unpacking; the usual limit is 1024 open files
MAX_NAME: Final = 200  # bytes of a member's whole path
MAX_DEPTH: Final = 16  # folders within folders
MANIFEST: Final = "module.toml"
DIGESTS: Final = "digests.json"
SUFFIX: Final = ".lbm"
BLOCK: Final = 512  # bytes; everything in an archive begins at a multiple

_READ: Final = 1024 * 1024  # bytes hashed at a time
_SEGMENT = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.+-]*[A-Za-z0-9_+-])?")
_KINDS = {
    b"\0": "an old-style file",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a FIFO",
}
_LISTING = Decoder(msgspec.json.Decoder(dict[str, str]))
_NEW_BUILD = "build the package again with 'loopback module build'"


class Member(msgspec.Struct, frozen=True):
    """One file: `offset` of its content in the archive and `size`, in bytes; `sha256` in hex once that was verified."""

    path: str
    offset: int
    size: int
    sha256: str = ""


class PackageInfo(msgspec.Struct, frozen=True):
    """A verified package. `digest` is the SHA-256 of the archive, in hex."""

    manifest: Manifest
    digest: str
    size: int
    members: tuple[Member, ...]

    @property
    def digests(self) -> dict[str, str]:
        """Path → SHA-256 of every file."""
        return {member.path: member.sha256 for member in self.members}


def build(files: Mapping[str, bytes], manifest: Manifest, described: attest.Build | None = None) -> bytes:
    """The archive of these files (path → content) and this manifest; the same input gives the same bytes.

    `described` is what they were made of, for SBOM and provenance; without them a package cannot be published.
    Raises Refused(PACKAGE_UNSAFE_MEMBER | PACKAGE_TOO_LARGE) for what no reader would accept.
    """
    made = {MANIFEST, DIGESTS} if described is None else {MANIFEST, DIGESTS, attest.SBOM, attest.PROVENANCE}
    if made & files.keys():
        raise Refused(
            Code.PACKAGE_UNSAFE_MEMBER,
            f"{', '.join(sorted(made))} are made by the build, not passed as files",
        )
    whole = {**files, MANIFEST: manifest.to_toml()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in whole.items()}
    if described is not None:
        documents = attest.describe(digests, manifest, described)
        whole |= documents
        digests |= {name: hashlib.sha256(data).hexdigest() for name, data in documents.items()}
    whole[DIGESTS] = _listing_of(digests)
    parts: list[bytes] = []
    previous = ""
    for name in sorted(whole):
        check_name(name, previous)
        data = whole[name]
        _check_member_size(name, len(data))
        parts += (header(name, len(data)), data, bytes(-len(data) % BLOCK))
        previous = name
    _check_tree(list(whole))
    archive = b"".join(parts) + bytes(2 * BLOCK)
    if len(archive) > MAX_PACKAGE or len(whole) > MAX_MEMBERS:
        raise _too_large(f"{len(whole)} files in {len(archive)} bytes")
    return archive


def inspect(package: Path, *, sha256: str | None = None) -> PackageInfo:
    """Verify a package completely without unpacking it.

    `sha256` is the archive's digest where it is known. Raises Refused: PACKAGE_DIGEST, PACKAGE_TRUNCATED,
    PACKAGE_MALFORMED, PACKAGE_UNSAFE_MEMBER, PACKAGE_TOO_LARGE, MANIFEST_*.
    """
    with _open(package) as file:
        return _inspect(file, package.name, sha256)


def read(package: Path, info: PackageInfo, name: str, *, most: int) -> bytes:
    """The content of one file of a verified package, at most so many bytes.

    Raises Refused: PACKAGE_MALFORMED where there is none, PACKAGE_TOO_LARGE, PACKAGE_DIGEST where it changed since.
    """
    member = next((m for m in info.members if m.path == name), None)
    if member is None:
        raise Refused(Code.PACKAGE_MALFORMED, f"{package.name} holds no {name}", _NEW_BUILD)
    if member.size > most:
        raise _too_large(f"{name} of {package.name} has {member.size} bytes")
    with _open(package) as file:
        data = b"".join(_content(file, member))
    if hashlib.sha256(data).hexdigest() != member.sha256:
        raise Refused(Code.PACKAGE_DIGEST, f"{package.name} changed while it was read", "try again")
    return data


def check_described(package: Path, info: PackageInfo) -> attest.Described:
    """Whether a verified package says of itself what publishing demands: SBOM and provenance.

    Raises Refused: PACKAGE_SBOM, PACKAGE_PROVENANCE, PACKAGE_TOO_LARGE.
    """
    return attest.check(
        info.digests, info.manifest, lambda name: read(package, info, name, most=attest.MAX_DOCUMENT)
    )


def extract(package: Path, into: Path, *, sha256: str | None = None) -> PackageInfo:
    """Verify a package and unpack it into the new folder `into`, durably.

    The folder must not exist; it appears whole, or not at all where something is refused (a kill can leave a part of it:
    unpack below a temporary name and rename). Raises Refused like `inspect`, FileExistsError, OSError from the disk.
    """
    with _open(package) as file:
        info = _inspect(file, package.name, sha256)
        parent = os.open(into.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.mkdir(into.name, 0o755, dir_fd=parent)
            try:
                _write(file, info.members, parent, into.name)
                os.fsync(parent)
            except BaseException:
                shutil.rmtree(into.name, ignore_errors=True, dir_fd=parent)
                raise
        finally:
            os.close(parent)
    return info


def listing(text: bytes, label: str) -> dict[str, str]:
    """Read a `digests.json`: path → SHA-256. Raises Refused(PACKAGE_MALFORMED)."""
    try:
        return _LISTING.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.PACKAGE_MALFORMED, f"{label}: {DIGESTS}: {error}", _NEW_BUILD) from None


def _listing_of(digests: Mapping[str, str]) -> bytes:
    """The one form of `digests.json`: no name twice, nothing hidden in blanks."""
    return json.dumps(digests, sort_keys=True, indent=0).encode()


def mode(path: str) -> int:
    """The permissions of the file with this path, in an archive and on disk."""
    return 0o755 if path.startswith("bin/") else 0o644


def check_name(name: str, previous: str = "") -> None:
    """Raises Refused(PACKAGE_UNSAFE_MEMBER) for a path that leaves the folder, is odd, or out of order."""
    shown = repr(name[:120])
    if name.startswith("/"):
        raise _unsafe(f"the member {shown} has an absolute path")
    segments = name.split("/")
    if ".." in segments:
        raise _unsafe(f"the member {shown} climbs out of its folder")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise _unsafe(
            f"the member {shown} has a name with other characters than A-Z a-z 0-9 _ . + -, or a dot at an end"
        )
    if len(name) > MAX_NAME or len(segments) > MAX_DEPTH:
        raise _unsafe(f"the member {shown} is over {MAX_NAME} bytes or {MAX_DEPTH} folders deep")
    if name == previous:
        raise _unsafe(f"the member {shown} appears twice")
    if name < previous:
        raise _unsafe(f"the member {shown} is out of order")


def header(name: str, size: int) -> bytes:
    """The one ustar header of a file with this path and size (POSIX.1-1988, 512 bytes)."""
    prefix, short = "", name
    if len(name) > 100:
        # ustar splits a longer path at a slash; the latest possible one, so that there is only one way
        at = name.rfind("/", 0, 156)
        prefix, short = name[:at], name[at + 1 :]
        if at < 0 or len(short) > 100:
            raise _unsafe(f"the member {name[:120]!r} has a path that ustar cannot hold")
    fields = (
        short.encode().ljust(100, b"\0"),
        b"%07o\0" % mode(name),
        b"%07o\0" % 0,
        b"%07o\0" % 0,
        b"%011o\0" % size,
        b"%011o\0" % 0,
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(32),
        bytes(32),
        b"%07o\0" % 0,
        b"%07o\0" % 0,
        prefix.encode().ljust(155, b"\0"),
        bytes(12),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _inspect(file: io.BufferedReader, label: str, sha256: str | None) -> PackageInfo:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_PACKAGE:
        raise _too_large(f"{label} has {size} bytes")
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and digest != sha256:
        raise Refused(
            Code.PACKAGE_DIGEST,
            f"{label} has the digest {digest[:12]}, not {sha256[:12]}",
            "fetch it again; it was damaged or is another package",
        )
    members = tuple(_members(file, label, size))
    _check_tree([m.path for m in members])
    by_path = {m.path: m for m in members}
    for name in (MANIFEST, DIGESTS):
        if name not in by_path:
            raise Refused(Code.PACKAGE_MALFORMED, f"{label} holds no {name}", _NEW_BUILD)
    if by_path[DIGESTS].size > MAX_DIGESTS:
        raise _too_large(f"{DIGESTS} of {label} has {by_path[DIGESTS].size} bytes")
    if by_path[MANIFEST].size > manifests.MAX_MANIFEST:
        raise _too_large(f"{MANIFEST} of {label} has {by_path[MANIFEST].size} bytes")
    text = b"".join(_content(file, by_path[DIGESTS]))
    listed = listing(text, label)
    if listed.keys() != by_path.keys() - {DIGESTS}:
        wrong = min(listed.keys() ^ (by_path.keys() - {DIGESTS}))
        said = "is listed but not there" if wrong in listed else "is there but not listed"
        raise Refused(Code.PACKAGE_DIGEST, f"{label}: {wrong} {said} in {DIGESTS}", _NEW_BUILD)
    if text != _listing_of(listed):
        raise Refused(Code.PACKAGE_MALFORMED, f"{label}: {DIGESTS} is not in its one form", _NEW_BUILD)
    for member in members:
        if member.path == DIGESTS:
            continue
        found = hashlib.sha256()
        for part in _content(file, member):
            found.update(part)
        if found.hexdigest() != listed[member.path]:
            raise Refused(
                Code.PACKAGE_DIGEST, f"{label}: the content of {member.path} was changed", _NEW_BUILD
            )
    manifest = manifests.parse(b"".join(_content(file, by_path[MANIFEST])), f"{label}: {MANIFEST}")
    listed[DIGESTS] = hashlib.sha256(text).hexdigest()
    verified = tuple(msgspec.structs.replace(m, sha256=listed[m.path]) for m in members)
    return PackageInfo(manifest, digest, size, verified)


def _members(file: io.BufferedReader, label: str, size: int) -> Iterator[Member]:
    """Walk the headers; ends after a proper end of archive."""
    position, count, previous = 0, 0, ""
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise _truncated(label, position + len(block))
        position += BLOCK
        if block == bytes(BLOCK):
            rest = file.read(BLOCK + 1)
            if len(rest) < BLOCK and rest == bytes(len(rest)):
                raise _truncated(label, size)
            if rest != bytes(BLOCK):
                raise Refused(Code.PACKAGE_MALFORMED, f"{label} has data behind its end", _NEW_BUILD)
            return
        member = _member(block, position, label)
        check_name(member.path, previous)
        if block != header(member.path, member.size):
            raise Refused(
                Code.PACKAGE_MALFORMED,
                f"{label}: the header of {member.path} is not in canonical form (owner, mode, time or an extension)",
                _NEW_BUILD,
            )
        _check_member_size(member.path, member.size)
        count += 1
        if count > MAX_MEMBERS:
            raise _too_large(f"{label} has more than {MAX_MEMBERS} files")
        padded = member.size + -member.size % BLOCK
        if position + padded > size:
            raise _truncated(label, size)
        file.seek(position + member.size)
        if file.read(padded - member.size).strip(b"\0"):
            raise Refused(Code.PACKAGE_MALFORMED, f"{label}: data is hidden behind {member.path}", _NEW_BUILD)
        yield member
        position += padded
        previous = member.path


def _member(block: bytes, offset: int, label: str) -> Member:
    """What a header block says of name and size, with a refusal that names what it is instead of a file."""
    if block[257:265] != b"ustar\x0000":
        raise Refused(
            Code.PACKAGE_MALFORMED, f"{label} is not a ustar archive at byte {offset - BLOCK}", _NEW_BUILD
        )
    short, prefix = (block[a:b].split(b"\0", 1)[0].decode("latin-1") for a, b in ((0, 100), (345, 500)))
    name = f"{prefix}/{short}" if prefix else short
    kind = block[156:157]
    if kind != b"0":
        raise _unsafe(
            f"the member {name[:120]!r} is {_KINDS.get(kind, 'an extension header')}, not a plain file"
        )
    digits = block[124:136].rstrip(b"\0 ")
    if not re.fullmatch(rb"[0-7]{1,11}", digits):
        raise Refused(Code.PACKAGE_MALFORMED, f"{label}: {name[:120]!r} has no proper size", _NEW_BUILD)
    return Member(name, offset, int(digits, 8))


def _content(file: io.BufferedReader, member: Member) -> Iterator[bytes]:
    file.seek(member.offset)
    left = member.size
    while left:
        part = file.read(min(left, _READ))
        if not part:
            raise _truncated(member.path, member.size - left)
        left -= len(part)
        yield part


def _write(file: io.BufferedReader, members: tuple[Member, ...], parent: int, name: str) -> None:
    """Write every member below the folder `name` of the descriptor `parent`, following no link on the way."""
    with contextlib.ExitStack() as stack:
        folders: dict[str, int] = {}

        def folder(path: str) -> int:
            if path not in folders:
                above, _, last = path.rpartition("/")
                at = folder(above) if path else parent
                if path:
                    os.mkdir(last, 0o755, dir_fd=at)
                descriptor = os.open(last or name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                stack.callback(os.close, descriptor)
                folders[path] = descriptor
            return folders[path]

        for member in members:
            above, _, last = member.path.rpartition("/")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(last, flags, mode(member.path), dir_fd=folder(above))
            with os.fdopen(descriptor, "wb") as target:
                os.fchmod(descriptor, mode(member.path))
                seen = hashlib.sha256()
                for part in _content(file, member):
                    seen.update(part)
                    target.write(part)
                # the archive could have been changed since it was inspected
                if seen.hexdigest() != member.sha256:
                    raise Refused(
                        Code.PACKAGE_DIGEST, f"the content of {member.path} changed while unpacking"
                    )
                target.flush()
                os.fsync(descriptor)
        for descriptor in reversed(folders.values()):
            os.fsync(descriptor)


def _check_tree(names: list[str]) -> None:
    """No name may be a file and a folder at once, nor differ from another in case alone; and folders are few."""
    files = set(names)
    folders: set[str] = set()
    spelt: dict[str, str] = {}
    for name in names:
        above = name
        while "/" in above:
            above = above.rpartition("/")[0]
            folders.add(above)
            if above in files:
                raise _unsafe(f"{above!r} is a file, and {name!r} lies in it")
    for name in (*names, *sorted(folders)):
        other = spelt.setdefault(name.lower(), name)
        if other != name:  # one file on a disk that tells no case
            raise _unsafe(f"{name!r} and {other!r} differ in nothing but case")
    if len(folders) > MAX_FOLDERS:
        raise _too_large(f"{len(folders)} folders")


def _check_member_size(name: str, size: int) -> None:
    if size > MAX_FILE:
        raise _too_large(f"the member {name!r} has {size} bytes, over {MAX_FILE}")


@contextlib.contextmanager
def _open(package: Path) -> Iterator[io.BufferedReader]:
    try:
        descriptor = os.open(package, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Refused(
            Code.PACKAGE_UNKNOWN, f"there is no package {package}", "make one with 'loopback module build'"
        ) from None
    try:  # before it becomes a file object, which complains of a folder by its number alone
        plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    if not plain:
        os.close(descriptor)
        raise Refused(
            Code.PACKAGE_MALFORMED,
            f"{package} is no plain file",
            "name the .lbm file itself, as 'loopback module build' printed it",
        )
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _unsafe(said: str) -> Refused:
    return Refused(Code.PACKAGE_UNSAFE_MEMBER, said, "do not install it; ask whoever built it")


def _too_large(said: str) -> Refused:
    return Refused(Code.PACKAGE_TOO_LARGE, f"{said}: over what is accepted")


def _truncated(label: str, at: int) -> Refused:
    return Refused(Code.PACKAGE_TRUNCATED, f"{label} ends early, after {at} bytes", "fetch it again")
