"""Every change that the agent makes to the disk goes through here, so that faults can be put in one place.

A method either did the whole change, durably, or raised Refused(HOST_DISK) with the old content in place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopback.contracts.codes import Code, Refused


class Disk:
    """The real disk. Tests subclass it to fail or to stop at any step."""

    def read(self, path: Path) -> bytes | None:
        """A file's content; None where there is none."""
        with _words(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def exists(self, path: Path) -> bool:
        """Whether there is something; a link that leads nowhere is nothing."""
        return path.exists()

    def names(self, folder: Path) -> list[str]:
        """What is in a folder, sorted; empty where there is none."""
        with _words(folder):
            try:
                return sorted(entry.name for entry in folder.iterdir())
            except FileNotFoundError:
                return []

    def folder(self, path: Path) -> None:
        """Make a folder and what is above it, for its owner only."""
        with _words(path):
            if not path.is_dir():
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.sync(path.parent)

    def write(self, path: Path, data: bytes) -> None:
        """Replace a file: after a power cut it is the old or the new one, whole."""
        scratch = path.with_name(f".{path.name}.new")
        with _words(path):
            try:
                handle = os.open(
                    scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
                )
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                scratch.rename(path)
            except OSError:
                scratch.unlink(missing_ok=True)
                raise
            self.sync(path.parent)

    def link(self, path: Path, target: str | None) -> None:
        """Make `path` a symbolic link to `target` in one rename, or take it away."""
        with _words(path):
            now = str(path.readlink()) if path.is_symlink() else None
            if now == target:
                return
            if target is None:
                path.unlink()
            else:
                scratch = path.with_name(f".{path.name}.new")
                scratch.unlink(missing_ok=True)
                scratch.symlink_to(target)
                scratch.rename(path)
            self.sync(path.parent)

    def adopt(self, scratch: Path, path: Path) -> None:
        """Rename a finished, durable folder into place; one that is there already is kept."""
        with _words(path):
            if path.exists():
                shutil.rmtree(scratch)
            else:
                scratch.rename(path)
            self.sync(path.parent)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with everything in it; nothing there is fine."""
        with _words(path):
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except FileNotFoundError:
                return
            self.sync(path.parent)

    def sync(self, folder: Path) -> None:
        """Make a folder's entries durable."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(
            Code.HOST_DISK,
            f"{path}: {error.strerror or error}",
            "free or repair the disk; nothing was changed",
        ) from None
