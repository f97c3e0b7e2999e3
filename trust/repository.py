"""The verifying TUF client: one implementation for hosts, services and the operator's command.

python-tuf does the verification of the TUF workflow (§5 of the specification); this file gives it a place to keep what
it verified, a fetcher, limits, a clock that cannot be turned back, and our words for what went wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

# python-tuf re-exports its public names without saying so to type checkers.
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Timestamp  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.trust.signing import ISSUED_FIELD

Fetch = Callable[[str], bytes | None]

MAX_ROOT_ROTATIONS: Final = 256  # roots followed in one refresh; python-tuf's own figure
MAX_DELEGATIONS: Final = 64  # delegated roles visited in one search; one per module family
MAX_ROOT: Final = 256 * 1024  # bytes; a root of a dozen keys has 5 KiB
MAX_TIMESTAMP: Final = 16 * 1024  # bytes; a timestamp has under 1 KiB
MAX_SNAPSHOT: Final = 768 * 1024  # bytes; one NATS message with headers stays below 1 MiB
MAX_TARGETS: Final = 768 * 1024  # bytes, the same; about 3000 releases of one module
MAX_TRUST_DOCUMENT: Final = 512 * 1024  # bytes; about 2000 operators

_URL = "repository:///"
_PINNED = "pinned.root.json"
_FLOOR = "clock-floor"
_RETRY = "try again; if it stays, check that delivery runs and renews the metadata"
_ATTACK = (
    "somebody may be serving manipulated metadata: compare with 'loopback keys show' before anything else"
)


class TargetInfo(msgspec.Struct, frozen=True):
    """A verified target: `length` in bytes, SHA-256 in hex, and what its signer said about it."""

    path: str
    length: int
    sha256: str
    custom: dict[str, str] = {}


class _Fetcher(FetcherInterface):
    """Lets python-tuf fetch through a function from filename to bytes."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch_file = fetch

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(_URL)
        data = self._fetch_file(name)
        if data is None:
            raise exceptions.DownloadHTTPError(f"{name} is not in the repository", 404)
        return iter((data,))


class _DurableUpdater(Updater):
    """An Updater whose files survive a power cut: python-tuf renames them into place without flushing."""

    def _persist_file(self, filename: str, data: bytes) -> None:
        write_durably(Path(filename), data)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file so that after a power cut it is either the old or the new one, whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TrustedRepository:
    """A TUF client with its memory in `metadata_dir`.

    `fetch(filename)` returns a metadata file's bytes ("timestamp.json", "2.root.json", …) or None where there is none;
    what it raises counts as unreachable. Everything is synchronous and does blocking I/O: call it in a thread. Uses of
    one folder, also by several processes, take turns. `now` is the clock, for expiry; it counts no earlier than the
    latest verified timestamp was issued, so a clock set back does not revive expired metadata.
    """

    def __init__(
        self, metadata_dir: Path, fetch: Fetch, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._dir = metadata_dir
        self._fetch = fetch
        self._now = now
        self._updater: Updater | None = None

    @classmethod
    def pin(cls, metadata_dir: Path, root: bytes) -> None:
        """Make `root` the folder's anchor of trust. The same root again changes nothing; another one starts afresh.

        Raises Refused(TUF_INVALID) where it is no root metadata.
        """
        try:
            if Metadata.from_bytes(root).signed.type != "root":
                raise Refused(Code.TUF_INVALID, "the pinned file is TUF metadata, but no root")
        except exceptions.RepositoryError as error:
            raise Refused(Code.TUF_INVALID, f"the pinned root is not TUF metadata: {error}") from None
        metadata_dir.mkdir(parents=True, exist_ok=True)
        with _locked(metadata_dir):
            pinned = metadata_dir / _PINNED
            if pinned.exists():
                if pinned.read_bytes() == root:
                    return
                for stale in metadata_dir.glob("*.json"):
                    stale.unlink()
                shutil.rmtree(metadata_dir / "root_history", ignore_errors=True)
            write_durably(pinned, root)

    def refresh(self) -> None:
        """Fetch and verify root chain, timestamp, snapshot and targets, and keep them.

        Raises Refused: TUF_EXPIRED, TUF_INVALID (a signature, version, length or hash is wrong), TUF_UNREACHABLE,
        HOST_DISK. What was trusted before stays trusted.
        """
        self._load(self._fetch)

    def load(self) -> None:
        """The same with nothing but what was verified earlier: works without a network, and expiry still counts."""
        self._load(lambda name: self._read(name) if name == "timestamp.json" else None)

    def find(self, target: str) -> TargetInfo | None:
        """The verified target of this path, or None where nobody entitled to has signed it.

        Refreshes first where neither `refresh` nor `load` was called. Raises Refused like `refresh`.
        """
        if self._updater is None:
            self.refresh()
        updater = self._updater
        assert updater is not None
        with _locked(self._dir), _words():
            found = updater.get_targetinfo(target)
        if found is None:
            return None
        sha256 = found.hashes.get("sha256")
        if sha256 is None:
            raise Refused(Code.TUF_INVALID, f"the target {target} has no SHA-256")
        custom = found.custom if isinstance(found.custom, dict) else {}
        return TargetInfo(target, found.length, sha256, {str(k): str(v) for k, v in custom.items()})

    def metadata(self, role: str) -> bytes:
        """The verified metadata file of a role: "root", "targets", "snapshot", "timestamp" or "module-…".

        Raises Refused(TUF_INVALID) where there is none.
        """
        if self._updater is None:
            self.refresh()
        if role.startswith("module-"):
            self.find(f"modules/{role.removeprefix('module-')}/-/-")  # loads the delegated role on the way
        data = self._read(f"{role}.json")
        if data is None:
            raise Refused(Code.TUF_INVALID, f"the repository has no role {role}")
        return data

    def release(self, module: str, version: str) -> TargetInfo | None:
        """The verified target of a module's release."""
        return self.find(target_path(module, version))

    def trust_document(self, read_blob: Callable[[str, int], bytes]) -> trustdoc.Trust:
        """The trust document: `read_blob(sha256, length)` brings its content, which is checked here.

        Raises Refused like `refresh`, and TUF_INVALID for missing, other or malformed content.
        """
        info = self.find(trustdoc.TARGET)
        if info is None:
            raise Refused(Code.TUF_INVALID, f"the repository has no {trustdoc.TARGET}")
        if info.length > MAX_TRUST_DOCUMENT:
            raise Refused(
                Code.TUF_INVALID, f"{trustdoc.TARGET} of {info.length} bytes is over {MAX_TRUST_DOCUMENT}"
            )
        data = read_blob(info.sha256, info.length)
        if len(data) != info.length or hashlib.sha256(data).hexdigest() != info.sha256:
            raise Refused(Code.TUF_INVALID, f"the content of {trustdoc.TARGET} is not what was signed")
        return trustdoc.Trust.decode(data)

    def _load(self, fetch: Fetch) -> None:
        root = self._read(_PINNED)
        if root is None:
            raise Refused(
                Code.TUF_INVALID, f"no root is pinned in {self._dir}", "pin the repository's root.json first"
            )
        with _locked(self._dir), _words():
            updater = _DurableUpdater(
                str(self._dir),
                _URL,
                fetcher=_Fetcher(fetch),
                config=UpdaterConfig(
                    max_root_rotations=MAX_ROOT_ROTATIONS,
                    max_delegations=MAX_DELEGATIONS,
                    root_max_length=MAX_ROOT,
                    timestamp_max_length=MAX_TIMESTAMP,
                    snapshot_max_length=MAX_SNAPSHOT,
                    targets_max_length=MAX_TARGETS,
                ),
                bootstrap=root,
            )
            # python-tuf offers no clock of its own choosing; a test holds it to this attribute.
            updater._trusted_set.reference_time = max(self._now(), self._floor())
            updater.refresh()
            self._raise_floor(updater._trusted_set.timestamp)
        self._updater = updater

    def _floor(self) -> datetime:
        data = self._read(_FLOOR)
        return _time(data.decode("ascii", "replace")) if data else datetime.min.replace(tzinfo=UTC)

    def _raise_floor(self, timestamp: Timestamp) -> None:
        issued = _time(str(timestamp.unrecognized_fields.get(ISSUED_FIELD, "")))
        if issued > self._floor():
            write_durably(self._dir / _FLOOR, issued.isoformat().encode())

    def _read(self, name: str) -> bytes | None:
        try:
            return (self._dir / name).read_bytes()
        except FileNotFoundError:
            return None


def target_path(module: str, version: str) -> str:
    """Where a release is in the repository."""
    return f"modules/{module}/{version}/{module}-{version}.lbm"


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _words() -> Iterator[None]:
    """Turn python-tuf's exceptions into refusals."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise Refused(Code.TUF_EXPIRED, f"the repository's metadata has expired: {error}", _RETRY) from None
    except exceptions.DownloadLengthMismatchError as error:
        raise Refused(
            Code.TUF_INVALID, f"a metadata file is longer than it may be: {error}", _ATTACK
        ) from None
    except exceptions.DownloadError as error:
        cause = error.__cause__
        said = f"{error}: {cause}" if cause else str(error)
        raise Refused(
            Code.TUF_UNREACHABLE, f"the repository's metadata is out of reach: {said}", _RETRY
        ) from None
    except exceptions.RepositoryError as error:
        said = str(error) or type(error).__name__
        raise Refused(
            Code.TUF_INVALID, f"the repository's metadata does not verify: {said}", _ATTACK
        ) from None
    except OSError as error:
        raise Refused(
            Code.HOST_DISK, f"the trusted metadata cannot be kept: {error}", "free or repair the disk"
        ) from None
