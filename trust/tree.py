"""Unpacked packages: whether a folder is, file by file, what was signed.

There is one archive for a set of files, so the archive's digest, which TUF, the operator's scope and the desired state all
name, can be computed again from what lies on disk. Nothing that is kept beside the folder has to be believed.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loopback.contracts.codes import Code, Refused
from loopback.trust import package

_READ: Final = 1024 * 1024  # bytes hashed at a time
_NEXT: Final = "install the package again"


def digest_of_tree(folder: Path) -> str:
    """The SHA-256, in hex, of the one archive that unpacks to this folder.

    Every path, content and size counts, so that a missing, changed or added file gives another digest. Raises
    Refused(PACKAGE_DIGEST | PACKAGE_UNSAFE_MEMBER | PACKAGE_TOO_LARGE) for what no package unpacks to: links and devices,
    other names or modes, empty folders, folders that others may write to.
    """
    whole = hashlib.sha256()
    count = total = 0
    for path, file in _files(folder):
        size = os.fstat(file.fileno()).st_size
        count, total = count + 1, total + size
        if count > package.MAX_MEMBERS or total > package.MAX_PACKAGE:
            raise Refused(Code.PACKAGE_TOO_LARGE, f"{folder} holds more than any package", _NEXT)
        whole.update(package.header(path, size))
        read = 0
        while part := file.read(min(_READ, size - read)):
            read += len(part)
            whole.update(part)
        if read != size:
            raise Refused(Code.PACKAGE_DIGEST, f"{folder / path} changes while it is read", _NEXT)
        whole.update(bytes(-size % package.BLOCK))
    whole.update(bytes(2 * package.BLOCK))
    return whole.hexdigest()


def verify(folder: Path, *, sha256: str) -> None:
    """Whether a folder is what the archive with this digest unpacks to; ask before anything in it is started.

    Nothing may be missing or added: run Python with PYTHONDONTWRITEBYTECODE=1.
    Raises Refused(PACKAGE_DIGEST | PACKAGE_UNSAFE_MEMBER | PACKAGE_TOO_LARGE) naming the file where it can be told.
    """
    if digest_of_tree(folder) != sha256:
        raise Refused(Code.PACKAGE_DIGEST, f"{folder}{_what_differs(folder)}", _NEXT)


def _what_differs(folder: Path) -> str:
    """In words, and by its own listing, which whoever changed it may have changed too: nothing is decided by it."""
    found = {path: hashlib.file_digest(file, "sha256").hexdigest() for path, file in _files(folder)}
    if package.DIGESTS not in found:
        return f" has no {package.DIGESTS}"
    text = (folder / package.DIGESTS).read_bytes()[: package.MAX_DIGESTS]
    try:
        listed = package.listing(text, str(folder))
    except Refused as refused:
        return f": {refused.reason}"
    del found[package.DIGESTS]
    wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
    if not wrong:
        return " is a package, but not the one that was signed"
    name = wrong[0]
    said = "is missing" if name not in found else "is not listed" if name not in listed else "was changed"
    return f"/{name} {said} ({len(wrong)} such files)"


def _files(folder: Path) -> Iterator[tuple[str, io.FileIO]]:
    """Every file below a folder, opened without following a link, in the order of an archive."""
    try:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise Refused(Code.PACKAGE_DIGEST, f"{folder} cannot be read: {error.strerror}", _NEXT) from None
    try:
        yield from _below(root, "", 1)
    finally:
        os.close(root)


def _below(folder: int, prefix: str, depth: int) -> Iterator[tuple[str, io.FileIO]]:
    if depth > package.MAX_DEPTH:
        raise _unsafe(prefix, f"is over {package.MAX_DEPTH} folders deep")
    if os.fstat(folder).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unsafe(prefix or "the folder itself", "can be written to by others")
    entries = []
    for name in os.listdir(folder):
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        is_folder = stat.S_ISDIR(status.st_mode)
        if not is_folder and not stat.S_ISREG(status.st_mode):
            raise _unsafe(prefix + name, "is no plain file")
        package.check_name(prefix + name)
        # With its slash a folder sorts as the paths below it do.
        entries.append((f"{name}/" if is_folder else name, name, is_folder))
    if not entries:
        raise Refused(
            Code.PACKAGE_DIGEST, f"the folder {prefix or '.'} is empty, as no package has it", _NEXT
        )
    for _, name, is_folder in sorted(entries):
        if is_folder:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            try:
                yield from _below(descriptor, f"{prefix}{name}/", depth + 1)
            finally:
                os.close(descriptor)
            continue
        path = prefix + name
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != package.mode(path):
                raise _unsafe(path, f"has another mode than {package.mode(path):o}")
            yield path, file


def _unsafe(path: str, said: str) -> Refused:
    return Refused(Code.PACKAGE_UNSAFE_MEMBER, f"{path} {said}", _NEXT)
