"""The verifying TUF client: one implementation for hosts, services and the operator's command.

python-tuf does the verification of the TUF workflow (§5 of the specification); this file gives it a place to keep what
it verified, a fetcher, limits, a clock that cannot be turned back, and our words for what went wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib import parse

import msgspec

# python-tuf re-exports its public names without saying so to type checkers.
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, TargetFile  # type: ignore[attr-defined]
from tuf.ngclient import UpdaterConfig  # type: ignore[attr-defined]

from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.trust.signing import ISSUED_FIELD
from loopback.trust.updater import (
    HISTORY,
    PINNED,
    DurableUpdater,
    Fetch,
    count_keys,
    discard,
    key_id,
    read_plain,
    take_up,
    write_durably,
)

__all__ = ["Fetch", "Limits", "TargetInfo", "TrustedRepository", "key_id", "target_path", "write_durably"]

MAX_ROOT_ROTATIONS: Final = 256  # roots followed in one refresh; python-tuf's own figure
MAX_DELEGATIONS: Final = 64  # delegated roles visited in one search; one per module family
MAX_ROOT: Final = 256 * 1024  # bytes; a root of a dozen keys has 5 KiB
MAX_TIMESTAMP: Final = 16 * 1024  # bytes; a timestamp has under 1 KiB
MAX_SNAPSHOT: Final = 768 * 1024  # bytes; one NATS message with headers stays below 1 MiB
MAX_TARGETS: Final = 768 * 1024  # bytes, the same; about 3000 releases of one module
MAX_TRUST_DOCUMENT: Final = 512 * 1024  # bytes; about 2000 operators
MAX_CONTENT: Final = 256 * 1024 * 1024  # bytes of one target that `download` brings, through memory
MAX_LOCAL: Final = 1024 * 1024  # bytes of a file of our own: more than any of them
DEADLINE_S: Final = 120.0  # for all that one refresh or search fetches; a slow drip ends here
LOCK_S: Final = 150.0  # for others' turns in one folder: more than one of them may take
LOCK_AGAIN_S: Final = 0.01

_FLOOR = "clock-floor"
_NEVER = datetime.min.replace(tzinfo=UTC)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RETRY = "try again; if it stays, check that delivery runs and renews the metadata"
_ATTACK = (
    "somebody may be serving manipulated metadata: compare with 'loopback keys show' before anything else"
)


class _Floor(msgspec.Struct, frozen=True):
    """When the newest verified timestamp was issued, and the keys (`key_id`) that are the repository's for saying so."""

    issued: datetime
    keys: tuple[str, ...]


class TargetInfo(msgspec.Struct, frozen=True):
    """A verified target: `length` in bytes, SHA-256 in hex, and what its signers said about it.

    `signers` are the ids (`key_id`) of the keys whose signatures over the metadata that names the target hold, sorted.
    """

    path: str
    length: int
    sha256: str
    custom: dict[str, str] = {}
    signers: tuple[str, ...] = ()


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a repository is followed: roots in one refresh, delegated roles in one search, bytes of a file.

    The defaults are the host's. `config` is the same without `content`.
    """

    root_rotations: int = MAX_ROOT_ROTATIONS
    delegations: int = MAX_DELEGATIONS
    root: int = MAX_ROOT
    timestamp: int = MAX_TIMESTAMP
    snapshot: int = MAX_SNAPSHOT
    targets: int = MAX_TARGETS
    content: int = MAX_CONTENT

    def config(self) -> UpdaterConfig:
        """As python-tuf wants it."""
        return UpdaterConfig(
            max_root_rotations=self.root_rotations,
            max_delegations=self.delegations,
            root_max_length=self.root,
            timestamp_max_length=self.timestamp,
            snapshot_max_length=self.snapshot,
            targets_max_length=self.targets,
        )


class TrustedRepository:
    """A TUF client with its memory in `metadata_dir`.

    `fetch(filename)` returns a metadata file's bytes ("timestamp.json", "2.root.json", …), whole or in pieces, or None where
    there is none; what it raises counts as unreachable, and so does what takes more than `deadline_s` seconds in one call
    of `refresh` or `find`. Everything is synchronous and does blocking I/O: call it in a thread. Uses of one folder, also by
    several processes, take turns. `now` is the clock, for expiry; it counts no earlier than the latest verified timestamp
    was issued, so a clock set back does not revive expired metadata.
    """

    def __init__(
        self,
        metadata_dir: Path,
        fetch: Fetch,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        limits: Limits = Limits(),  # noqa: B008  frozen
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._dir = metadata_dir
        self._fetch = fetch
        self._now = now
        self._limits = limits
        self._deadline_s = deadline_s
        self._updater: DurableUpdater | None = None

    @classmethod
    def pin(cls, metadata_dir: Path, root: bytes) -> None:
        """Make `root` the folder's anchor of trust. The same root again changes nothing.

        Another version that was verified here belongs to the same repository: what is known of it stays, so that
        shipping a newer anchor opens no way back to older metadata. Any other root starts afresh.
        Raises Refused: TUF_INVALID where it is no root metadata signed by its own keys, HOST_DISK.
        """
        with _words():
            version = _own_root(root)
            metadata_dir.mkdir(parents=True, exist_ok=True)
            with _locked(metadata_dir):
                pinned = _read(metadata_dir, PINNED)
                if pinned == root:
                    return
                take_up(metadata_dir)
                if _read(metadata_dir, f"{HISTORY}/{version}.root.json") != root:
                    _forget(metadata_dir)
                write_durably(metadata_dir / PINNED, root)

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
        found = self._find(target)
        if found is None:
            return None
        entry, signers = found
        sha256 = entry.hashes.get("sha256")
        if sha256 is None or not _SHA256.fullmatch(sha256):
            raise Refused(Code.TUF_INVALID, f"the target {target[:200]} has no SHA-256")
        custom = entry.custom if isinstance(entry.custom, dict) else {}
        return TargetInfo(target, entry.length, sha256, {str(k): str(v) for k, v in custom.items()}, signers)

    def metadata(self, role: str) -> bytes:
        """The verified metadata file of a role: "root", "targets", "snapshot", "timestamp" or "module-…".

        Raises Refused(TUF_INVALID) where there is none.
        """
        if self._updater is None:
            self.refresh()
        assert self._updater is not None
        if role.startswith("module-"):
            self.find(f"modules/{role.removeprefix('module-')}/-/-")  # loads the delegated role on the way
        found = self._updater.verified(role)
        if found is None:
            raise Refused(Code.TUF_INVALID, f"the repository has no role {role}")
        return found.data

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

    def download(self, target: str, fetch: Fetch, folder: Path, *, prefixed: bool = True) -> Path | None:
        """Bring a target's content below `folder`, for clients without NATS; its file, or None where nobody signed it.

        `fetch(path)` brings content by its path below the repository's place for targets, under its hash where the
        repository keeps consistent snapshots and `prefixed` holds. What is there already and right is not fetched again.
        The file's name is the target path, percent-encoded. Raises Refused like `refresh`; BLOB_DIGEST for other content.
        """
        found = self._find(target)
        if found is None:
            return None
        entry, _ = found
        if entry.length > self._limits.content:
            raise Refused(
                Code.PACKAGE_TOO_LARGE,
                f"the target {target[:200]} has {entry.length} bytes; at most {self._limits.content} are accepted",
            )
        with _words():
            assert self._updater is not None
            place = folder / parse.quote(target, safe="")
            held = read_plain(place, entry.length)
            if held is not None and _matches(entry, held):
                return place
            hashed = prefixed and bool(self._updater.root.consistent_snapshot)
            data = self._updater.download(target_file(entry, hashed=hashed), fetch, entry.length)
            if not _matches(entry, data):
                raise Refused(
                    Code.BLOB_DIGEST,
                    f"the content of {target[:200]} is not what was signed",
                    "it was damaged or swapped; have it published again",
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(place, data)
        return place

    def _find(self, target: str) -> tuple[TargetFile, tuple[str, ...]] | None:
        if self._updater is None:
            self.refresh()
        updater = self._updater
        assert updater is not None
        with _words(), _locked(self._dir):
            try:
                found = updater.search(target)
            finally:
                updater.commit()
            return None if found is None else (found, updater.signers())

    def _load(self, fetch: Fetch) -> None:
        root = self._read(PINNED)
        if root is None:
            raise Refused(
                Code.TUF_INVALID, f"no root is pinned in {self._dir}", "pin the repository's root.json first"
            )
        with _words(), _locked(self._dir):
            if self._dir.stat().st_mode & stat.S_IWOTH:
                raise Refused(
                    Code.TUF_INVALID,
                    f"everybody may write to {self._dir}, where trusted metadata is kept",
                    f"chmod o-w {self._dir}, and pin the root again",
                )
            updater = DurableUpdater(
                self._dir,
                root,
                fetch,
                config=self._limits.config(),
                clock=lambda root: max(self._now(), self._floor(root)),
                deadline_s=self._deadline_s,
            )
            try:
                updater.refresh()
                self._raise_floor(updater)
            finally:
                updater.commit()
        self._updater = updater

    @property
    def clock_floor(self) -> datetime:
        """It is no earlier than this: when the newest timestamp that was verified here was issued."""
        return self._floor(self._updater.root) if self._updater else _NEVER

    def _floor(self, root: Root) -> datetime:
        """No verified metadata is older than this, as long as the keys that said so are the repository's."""
        try:
            floor = msgspec.json.decode(self._read(_FLOOR) or b"", type=_Floor)
        except msgspec.MsgspecError:
            return _NEVER
        return floor.issued if floor.keys == _timestamp_keys(root) else _NEVER

    def _raise_floor(self, updater: DurableUpdater) -> None:
        """Remember when the timestamp was issued.

        The stolen key of a timestamp may lie about it: a time at which other metadata is out of date would lock the host
        out, so it is not taken; and a root with other timestamp keys ends what the old ones said (TUF's own way back
        from a fast-forward attack).
        """
        timestamp = updater.timestamp
        issued = _time(str(timestamp.unrecognized_fields.get(ISSUED_FIELD, "")))
        if issued > self._floor(updater.root) and issued < min(timestamp.expires, *updater.expiries()):
            floor = _Floor(issued, _timestamp_keys(updater.root))
            updater.keep(self._dir / _FLOOR, msgspec.json.encode(floor))

    def _read(self, name: str) -> bytes | None:
        return _read(self._dir, name)


def target_path(module: str, version: str) -> str:
    """Where a release is in the repository."""
    return f"modules/{module}/{version}/{module}-{version}.lbm"


def target_file(entry: TargetFile, *, hashed: bool) -> str:
    """Where a target's content is below the place for targets: with consistent snapshots, under its hash (TUF §6)."""
    if not hashed:
        return entry.path
    folder, slash, name = entry.path.rpartition("/")
    return f"{folder}{slash}{next(iter(entry.hashes.values()))}.{name}"


def _own_root(data: bytes) -> int:
    """The version of a root that its own keys signed. Raises Refused(TUF_INVALID)."""
    try:
        metadata: Metadata[Root] = Metadata.from_bytes(data)
        root = metadata.signed
        if root.type != "root":
            raise Refused(Code.TUF_INVALID, "the pinned file is TUF metadata, but no root")
        root.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        count_keys(root, "root", metadata.signed_bytes, metadata.signatures)
    except exceptions.UnsignedMetadataError as error:
        raise Refused(Code.TUF_INVALID, f"the pinned root does not hold by its own keys: {error}") from None
    except exceptions.RepositoryError as error:
        raise Refused(Code.TUF_INVALID, f"the pinned root is not TUF metadata: {error}") from None
    return root.version


def _forget(folder: Path) -> None:
    """Everything that was trusted because of another root. Raises OSError."""
    discard(folder)
    for stale in folder.glob("*.json"):
        stale.unlink()
    (folder / _FLOOR).unlink(missing_ok=True)
    history = folder / HISTORY
    if history.is_symlink():
        history.unlink()
    elif history.exists():
        shutil.rmtree(history)


def _matches(entry: TargetFile, data: bytes) -> bool:
    try:
        entry.verify_length_and_hashes(data)
    except exceptions.LengthOrHashMismatchError:
        return False
    return True


def _read(folder: Path, name: str) -> bytes | None:
    data = read_plain(folder / name, MAX_LOCAL)
    return None if data is None or len(data) > MAX_LOCAL else data


def _timestamp_keys(root: Root) -> tuple[str, ...]:
    return tuple(sorted({key_id(root.keys[k]) for k in root.roles["timestamp"].keyids if k in root.keys}))


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return _NEVER
    return found if found.tzinfo else found.replace(tzinfo=UTC)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in this folder. Raises Refused(TUF_UNREACHABLE) where somebody else does not end; OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(folder / ".lock", flags, 0o600)
    try:
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Refused(
                        Code.TUF_UNREACHABLE,
                        f"another process has been using {folder} for {LOCK_S:g} s",
                        f"see which one with 'fuser {folder / '.lock'}'",
                    ) from None
                time.sleep(LOCK_AGAIN_S)
        yield
    finally:
        os.close(descriptor)


def _behind(error: BaseException) -> exceptions.ExpiredMetadataError | None:
    """That what is here has expired, where this is why python-tuf asked for something newer."""
    before = error.__context__
    while before is not None and not isinstance(before, exceptions.ExpiredMetadataError):
        before = before.__context__
    return before


@contextmanager
def _words() -> Iterator[None]:
    """Turn python-tuf's exceptions into refusals."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise Refused(Code.TUF_EXPIRED, f"the repository's metadata has expired: {error}", _RETRY) from None
    except exceptions.DownloadLengthMismatchError as error:
        raise Refused(Code.TUF_INVALID, f"a file is longer than it may be: {error}", _ATTACK) from None
    except exceptions.DownloadError as error:
        if expired := _behind(error):
            raise Refused(
                Code.TUF_EXPIRED,
                f"the repository's metadata has expired: {expired}, and newer is out of reach",
                _RETRY,
            ) from None
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
