"""python-tuf's client as we run it: bounded and timed fetches, files that survive a power cut, our ids of keys.

python-tuf decides what verifies. What it does not do: it renames files into place without flushing them, waits for a
server as long as it drips, reads whatever lies in its folder, counts one key under two names as two, forgets who signed,
and takes its time from a clock that can be set back. Private attributes of its `Updater` are used here and nowhere
else; tests/unit/test_trust_repository.py notices when one of them changes its meaning.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib import parse

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

# python-tuf and securesystemslib re-export their public names without saying so to type checkers.
from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api import exceptions
from tuf.api.metadata import Root, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from loopback.contracts.codes import Refused
from loopback.contracts.keys import PublicKey, is_sound

#: A file by its name, whole or in pieces; None where there is none. What it raises counts as unreachable.
Fetch = Callable[[str], bytes | Iterable[bytes] | None]

ROOT_LINK: Final = "root.json"
HISTORY: Final = "root_history"
PINNED: Final = "pinned-root"  # not *.json: in a conforming client's folder those are the roles'
_URL = "repository:///"
_STAGE = ".tuf-next"  # files of a commit that is being prepared
_STAGED = ".tuf-staged"  # files of a commit that counts
_ROOT_NAME = re.compile(r"[0-9]+\.root\.json")
_SCRATCH_NAME = re.compile(r"\.(.+\.json|clock-floor|pinned-root)\.[0-9]+\.new")


class _Fetcher(FetcherInterface):
    """Lets python-tuf fetch through a function, in memory, and no longer than a deadline in all."""

    def __init__(self, fetch: Fetch, deadline_s: float) -> None:
        self._fetch_file = fetch
        self.seconds = deadline_s
        self.restart()

    def restart(self) -> None:
        """Begin to count the time anew."""
        self._until = time.monotonic() + self.seconds

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(_URL)
        data = self._fetch_file(name)
        if data is None:
            raise exceptions.DownloadHTTPError(f"{name} is not in the repository", 404)
        return iter((data,)) if isinstance(data, bytes) else iter(data)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Like python-tuf's own, which goes through a temporary file, and takes as long as it takes."""
        name = url.removeprefix(_URL)
        self._in_time(name)
        chunks = self.fetch(url)
        data = bytearray()
        try:
            for chunk in chunks:
                data += chunk
                if len(data) > max_length:
                    raise exceptions.DownloadLengthMismatchError(
                        f"{name} has more than the {max_length} bytes it may have"
                    )
                self._in_time(name)
        except exceptions.DownloadError:
            raise
        except Exception as error:
            raise exceptions.DownloadError(f"{name} broke off") from error
        finally:
            if close := getattr(chunks, "close", None):
                close()
        return bytes(data)

    def _in_time(self, name: str) -> None:
        if time.monotonic() > self._until:
            raise exceptions.SlowRetrievalError(f"{name} was not there after {self.seconds:g} s in all")


class Loaded(msgspec.Struct, frozen=True):
    """Metadata as it was read: the file's bytes, what they say, what of them is signed, signatures by TUF key id."""

    data: bytes
    signed: Any
    payload: bytes = b""
    signatures: dict[str, Any] = {}


class DurableUpdater(Updater):
    """An Updater that keeps its files durably and in one go, in `commit`, and knows who signed what it found.

    `clock(root)` is the time against which expiry is judged, once the newest root is known.
    """

    def __init__(
        self,
        folder: Path,
        root: bytes,
        fetch: Fetch,
        *,
        config: UpdaterConfig,
        clock: Callable[[Root], datetime],
        deadline_s: float,
    ) -> None:
        self._pending: dict[str, bytes] = {}
        self._anchor = root
        self._folder = folder
        self._clock = clock
        self._asked = ("", "")
        self._bounded = _Fetcher(fetch, deadline_s)
        self._longest = max(
            config.timestamp_max_length, config.snapshot_max_length, config.targets_max_length
        )
        _sweep(folder, config.root_max_length)
        super().__init__(str(folder), _URL, fetcher=self._bounded, config=config, bootstrap=root)
        trusted: Any = self._trusted_set
        load = trusted._load_data
        # By identity: a file may be read and its signatures hold, and still not become what is trusted. Each entry keeps
        # its object alive, so that no identity is used twice. The anchor was verified when it was pinned.
        self._loaded = {id(trusted.root): Loaded(root, trusted.root)}

        def remember(kind: type[Any], data: bytes, delegator: Any = None, role: str | None = None) -> Any:
            found = load(kind, data, delegator, role)
            for whose in (delegator, found[0] if kind is Root else None):
                if whose is not None:
                    count_keys(whose, role or kind.type, found[1], found[2])
            self._loaded[id(found[0])] = Loaded(data, *found)
            return found

        trusted._load_data = remember

    @property
    def root(self) -> Root:
        """The newest verified root."""
        return self._trusted_set.root

    @property
    def timestamp(self) -> Timestamp:
        """The verified timestamp; only after `refresh`."""
        return self._trusted_set.timestamp

    def expiries(self) -> tuple[datetime, ...]:
        """When each verified role but timestamp ends; only after `refresh`."""
        trusted = self._trusted_set
        return (trusted.root.expires, trusted.snapshot.expires, trusted.targets.expires)

    def refresh(self) -> None:
        """As python-tuf does it; what it stumbles over is a RepositoryError too."""
        with _sense():
            super().refresh()

    def search(self, path: str) -> TargetFile | None:
        """`get_targetinfo` with its time counted from now."""
        self._bounded.restart()
        with _sense():
            return self.get_targetinfo(path)

    def download(self, path: str, fetch: Fetch, length: int) -> bytes:
        """Content of at most so many bytes, by the same rules as metadata. Raises DownloadError."""
        return _Fetcher(fetch, self._bounded.seconds).download_bytes(path, length)

    def verified(self, role: str) -> Loaded | None:
        """What was verified as this role, if anything was."""
        signed: Any = self._trusted_set.get(role)
        return None if signed is None else self._loaded[id(signed)]

    def signers(self) -> tuple[str, ...]:
        """The keys, by our ids, that signed the metadata in which the last target was found."""
        role, delegator = self._asked
        loaded = self.verified(role)
        whose: Any = self._trusted_set[delegator]
        assert loaded is not None
        result = whose.get_verification_result(role, loaded.payload, loaded.signatures)
        return tuple(sorted({key_id(key) for key in result.signed.values()}))

    def keep(self, path: Path, data: bytes) -> None:
        """Have `commit` keep this file too."""
        self._pending[str(path)] = data

    def commit(self) -> None:
        """Keep what was verified since the last time, all of it or nothing, whenever the power fails. Raises OSError.

        The files are written into a folder beside their place; its renaming is what counts, and whoever comes next takes
        up what it holds. Files are flushed side by side, since the disk's journal then has one commit for all: of
        a first refresh, waiting for the disk is most.
        """
        pending, self._pending = self._pending, {}  # also where one of them can never be kept
        fresh = {Path(n): d for n, d in pending.items() if read_plain(Path(n), len(d)) != d}
        if fresh:
            try:
                self._stage(fresh)
            except OSError:
                with contextlib.suppress(OSError):
                    discard(self._folder)
                raise
            _flush([self._folder])
            take_up(self._folder)
        link = self._folder / ROOT_LINK  # for other clients' eyes: nothing is read through it here
        target = f"{HISTORY}/{self.root.version}.root.json"
        if not link.is_symlink() or str(link.readlink()) != target:
            scratch = _scratch(link)
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(target)
            scratch.replace(link)

    def _stage(self, fresh: dict[Path, bytes]) -> None:
        stage = self._folder / _STAGE
        (stage / HISTORY).mkdir(parents=True)
        unflushed = [stage, stage / HISTORY]
        for path, data in fresh.items():
            place = stage / path.relative_to(self._folder)
            if data is not self._anchor or not _linked(self._folder / PINNED, data, place):
                _write(place, data)
                unflushed.append(place)
        _flush(unflushed)
        stage.replace(self._folder / _STAGED)

    def _download_metadata(self, rolename: str, length: int, version: int | None = None) -> bytes:
        """A length that snapshot or timestamp announce may be shorter than our limit, never longer."""
        own = {"root": "root", "timestamp": "timestamp", "snapshot": "snapshot"}.get(rolename, "targets")
        limit: int = getattr(self.config, f"{own}_max_length")
        return super()._download_metadata(rolename, min(length, limit), version)

    def _load_local_metadata(self, rolename: str) -> bytes:
        data = read_plain(self._folder / f"{parse.quote(rolename, '')}.json", self._longest)
        if data is None or len(data) > self._longest:
            raise FileNotFoundError(f"there is no {rolename} here")
        return data

    def _load_timestamp(self) -> None:
        self._trusted_set.reference_time = self._clock(self.root)
        super()._load_timestamp()

    def _load_targets(self, role: str, parent_role: str) -> Targets:
        found = super()._load_targets(role, parent_role)
        self._asked = (role, parent_role)  # the search stops at the role that has the target
        return found

    def _persist_file(self, filename: str, data: bytes) -> None:
        self._pending[filename] = data

    def _update_root_symlink(self) -> None:
        """In `commit`: python-tuf removes the link before it makes the new one."""


@contextmanager
def _sense() -> Iterator[None]:
    """Metadata that python-tuf reads and then stumbles over, such as a role's name that is no text, does not verify."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise exceptions.RepositoryError(f"it makes no sense: {type(error).__name__}: {error}") from error


def count_keys(whose: Any, role: str, payload: bytes, signatures: dict[str, Any]) -> None:
    """A threshold counts keys, not the names that a delegator gave them, and none for which anybody can sign.

    Raises UnsignedMetadataError.
    """
    needed = whose.get_delegated_role(role)
    if needed.threshold < 2 and not any(map(_is_weak, _known_keys(whose, needed.keyids))):
        return
    result = whose.get_verification_result(role, payload, signatures)
    keys = {key_id(key) for key in result.signed.values() if not _is_weak(key)}
    if len(keys) < needed.threshold:
        raise exceptions.UnsignedMetadataError(f"{role} was signed by {len(keys)}/{needed.threshold} keys")


def _known_keys(whose: Any, keyids: list[str]) -> Iterator[Key]:
    for keyid in keyids:
        with contextlib.suppress(ValueError):  # one that is named and not there signs nothing
            yield whose.get_key(keyid)


def _is_weak(key: Key) -> bool:
    """An Ed25519 key of small order: the library that python-tuf verifies with takes one signature for every message."""
    if key.keytype != "ed25519":
        return False
    try:
        return not is_sound(bytes.fromhex(str(key.keyval.get("public", ""))))
    except ValueError:  # no key at all, under which nothing verifies
        return False


def key_id(key: Key) -> str:
    """Our id of a key in TUF metadata; python-tuf's own ids are names that whoever delegates may choose.

    Ed25519: the SHA-256 of the 32 raw bytes, as in envelopes and trust documents (`PublicKey.keyid`). RSA and ECDSA: the
    SHA-256 of the DER SubjectPublicKeyInfo. Others: the SHA-256 of the JSON of type and value with sorted keys.
    """
    public = str(key.keyval.get("public", ""))
    try:
        if key.keytype == "ed25519":
            return PublicKey.parse(public).keyid
        spki = load_pem_public_key(public.encode()).public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        )
    except (Refused, ValueError, UnsupportedAlgorithm):
        spki = json.dumps({"keytype": key.keytype, "keyval": key.keyval}, sort_keys=True).encode()
    return hashlib.sha256(spki).hexdigest()


def read_plain(path: Path, limit: int) -> bytes | None:
    """A plain file's bytes, one more than `limit` at most; None where there is none. Waits for no FIFO, follows no link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR):
            return None
        raise
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        return file.read(limit + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file so that after a power cut it is either the old or the new one, whole."""
    scratch = _scratch(path)
    try:
        _write(scratch, data, mode)
        _flush([scratch])
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_up(folder: Path) -> bool:
    """Put in place what a commit decided on; whether there was any. Raises OSError."""
    staged = folder / _STAGED
    if not staged.is_dir():
        return False
    for place, into in ((staged / HISTORY, folder / HISTORY), (staged, folder)):
        if place.is_dir():
            into.mkdir(exist_ok=True)
            for file in place.iterdir():
                file.replace(into / file.name)
            place.rmdir()
    return True


def discard(folder: Path) -> None:
    """Remove what a commit did not decide on. Raises OSError."""
    if (folder / _STAGE).is_dir():
        shutil.rmtree(folder / _STAGE)


def _sweep(folder: Path, limit: int) -> None:
    """End what somebody who was killed had begun, and remove old roots that cannot be any, which python-tuf reads unasked.

    Only names that are made here: somebody may have pointed us at a folder with files of theirs. Raises OSError.
    """
    history = folder / HISTORY
    history.mkdir(exist_ok=True)
    discard(folder)
    if take_up(folder):
        _flush([folder, history])
    for place in (folder, history):
        with os.scandir(place) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                odd = not stat.S_ISREG(about.st_mode) or about.st_size > limit
                old = place == history and odd and _ROOT_NAME.fullmatch(entry.name)
                if old or _SCRATCH_NAME.fullmatch(entry.name):
                    Path(entry.path).unlink(missing_ok=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _linked(durable: Path, data: bytes, name: Path) -> bool:
    """Another name for a file that was flushed already, where it has this content and the file system allows it."""
    try:
        os.link(durable, name, follow_symlinks=False)
    except OSError:
        return False
    if read_plain(name, len(data)) == data:
        return True
    name.unlink()
    return False


def _flush(paths: list[Path]) -> None:
    """Make files, or folders' entries, durable, at the same time. Raises OSError."""

    def flush(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    if len(paths) < 2:
        for path in paths:
            flush(path)
        return
    with ThreadPoolExecutor(len(paths)) as pool:
        for done in [pool.submit(flush, path) for path in paths]:
            done.result()
