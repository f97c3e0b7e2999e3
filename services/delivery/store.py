"""The repository on the bus: read as one state, changed as one atomic batch, verified as a client would in between.

Replicas need no lock: a batch is stored only if the stream is still at the revision that was read, and the timestamp is its
last message. A process that dies leaves the earlier repository or the later one.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
from tuf.api.metadata import Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]  # tuf says no __all__

from loopback.contracts import subjects, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import ReleasePublish
from loopback.contracts.trustdoc import Trust
from loopback.services._runtime.bus import Bus, Conflict, Outgoing
from loopback.services.delivery import decide
from loopback.services.delivery.decide import Repository
from loopback.trust import blobs, signing
from loopback.trust.repository import MAX_ROOT_ROTATIONS, MAX_TRUST_DOCUMENT, TrustedRepository

ATTEMPTS: Final = 50  # times that a change is made anew because somebody else was faster
TIMESTAMP: Final = "timestamp.json"


class OnlineKeys(msgspec.Struct, frozen=True):
    """The keys that delivery holds."""

    snapshot: SigningKey
    timestamp: SigningKey

    @classmethod
    def load(cls, home: Path) -> OnlineKeys:
        """From `<home>/keys/online`. Raises Refused(SIGNATURE_INVALID)."""
        place = home / "keys" / "online"
        return cls(SigningKey.load(place / "snapshot.pem"), SigningKey.load(place / "timestamp.pem"))


class Store:
    """Reads and changes the repository. `pinned` is the root that clients start from, `scratch` a folder for checking."""

    def __init__(self, bus: Bus, keys: OnlineKeys, pinned: bytes, scratch: Path) -> None:
        self._bus = bus
        self._keys = keys
        self._pinned = pinned
        self._scratch = scratch

    async def load(self) -> Repository | None:
        """What is published now; None where nothing is."""
        revision = await self._bus.revision(subjects.STREAM_TUF)
        files: dict[str, bytes] = {}
        timestamp = await self._file(TIMESTAMP)
        if timestamp is None:
            return None
        files[TIMESTAMP] = timestamp
        snapshot_version = signing.parse(Timestamp, timestamp).snapshot_meta.version
        name = signing.filename("snapshot", snapshot_version)
        files[name] = await self._required(name)
        for role, info in signing.parse(Snapshot, files[name]).meta.items():
            files[f"{info.version}.{role}"] = await self._required(f"{info.version}.{role}")
        for version in range(1, MAX_ROOT_ROTATIONS):
            found = await self._file(signing.filename("root", version))
            if found is None:
                break
            files[signing.filename("root", version)] = found
        return Repository(files, revision)

    async def publish(self, incoming: Mapping[str, bytes], release: ReleasePublish | None = None) -> None:
        """Publish these files. With `release`, only if they sign what that command says.

        Files that are published already change nothing. Raises Refused: TUF_CONFLICT, TUF_INVALID, TUF_EXPIRED, BLOB_*;
        Conflict where others were faster every time.
        """
        for attempt in range(ATTEMPTS):
            try:
                return await self._publish(incoming, release)
            except Conflict:
                # spreads replicas that met
                await asyncio.sleep(random.uniform(0, 0.02 * min(attempt + 1, 10)))  # noqa: S311
        raise Conflict(f"the repository was changed {ATTEMPTS} times meanwhile")

    async def _publish(self, incoming: Mapping[str, bytes], release: ReleasePublish | None) -> None:
        repository = await self.load()
        if repository is None:
            raise Refused(
                Code.TUF_UNREACHABLE,
                "there is no repository yet",
                "start delivery with the home in which 'loopback keys init' was run",
            )
        now = await self._bus.now()
        added = decide.additions(repository, incoming)
        files = decide.next_files(
            repository, added, now, snapshot_key=self._keys.snapshot, timestamp_key=self._keys.timestamp
        )
        await asyncio.to_thread(self._verify, repository, files, now, release)
        if added:
            await self._check_trust(repository, files)
            await self._write(files, repository.revision)

    async def renew(self) -> bool:
        """Sign snapshot and timestamp anew where they are past half of their life; whether something was written."""
        repository = await self.load()
        if repository is None:
            return False
        files = decide.next_files(
            repository,
            {},
            await self._bus.now(),
            snapshot_key=self._keys.snapshot,
            timestamp_key=self._keys.timestamp,
        )
        if not files:
            return False
        try:
            await self._write(files, repository.revision)
        except Conflict:
            return False  # another replica, or a release, was faster; both renew
        return True

    async def import_seed(self, seed: Path) -> bool:
        """Publish the repository that `loopback keys init` made, into an empty stream; whether that was done here."""
        revision = await self._bus.revision(subjects.STREAM_TUF)
        found = await asyncio.to_thread(_read_seed, seed)
        if found is None or await self._file(TIMESTAMP) is not None:
            return False
        files, content = found
        for digest, data in content.items():
            await self.put_blob(digest, data)
        try:
            await self._write(files, revision)
        except Conflict:
            return False
        return True

    async def put_blob(self, sha256: str, data: bytes) -> None:
        """Store content; what is there stays."""
        for number, chunk in enumerate(blobs.split(data)):
            try:
                await self._bus.publish(
                    Outgoing(subjects.blob(sha256, number), chunk, blobs.headers(len(data)))
                )
            except Conflict:
                continue  # one message per subject: it is there

    async def blob_message(self, subject: str) -> tuple[bytes, dict[str, str]] | None:
        """One chunk, for `blobs.download`."""
        found = await self._bus.last(subjects.STREAM_BLOBS, subject)
        return (found.data, found.headers) if found else None

    def _verify(
        self,
        repository: Repository,
        files: Mapping[str, bytes],
        now: datetime,
        release: ReleasePublish | None,
    ) -> None:
        """A client that has the present state must accept these files. Raises Refused. Runs in a thread."""
        after = {**repository.files, **files}
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            place = Path(folder)
            TrustedRepository.pin(place, self._pinned)
            try:
                TrustedRepository(place, repository.files.get, now=lambda: now).refresh()
            except Refused as refused:
                if refused.code != Code.TUF_EXPIRED:  # that is what renewal is for
                    raise
            client = TrustedRepository(place, after.get, now=lambda: now)
            client.refresh()
            for name, data in files.items():
                role = name.split(".")[-2]
                if role.startswith("module-") and client.metadata(role) != data:
                    raise Refused(
                        Code.TUF_INVALID,
                        f"{name}: the targets name no key for it",
                        f"let a key sign it first: 'loopback keys family {role.removeprefix('module-')}'",
                    )
            if release is not None:
                decide.check_target(release, client.release(release.module, release.version))

    async def _check_trust(self, repository: Repository, files: Mapping[str, bytes]) -> None:
        """A new trust document must be stored, read, and leave somebody in charge. Raises Refused."""
        name = next((n for n in files if n.endswith(".targets.json")), None)
        if name is None:
            return
        old, new = (
            signing.parse(Targets, data).targets.get(trustdoc.TARGET)
            for data in (repository.current()["targets"], files[name])
        )
        if new is None:
            raise Refused(Code.TUF_INVALID, f"{name} has no {trustdoc.TARGET}", "sign it again with one")
        if old is None or new.hashes != old.hashes:
            decide.check_trust(await self._trust(new), await self._trust(old) if old else None)

    async def _trust(self, target: TargetFile) -> Trust:
        return Trust.decode(
            await blobs.read(
                self.blob_message,
                target.hashes.get("sha256", ""),
                max_size=MAX_TRUST_DOCUMENT,
                size=target.length,
            )
        )

    async def _write(self, files: Mapping[str, bytes], revision: int) -> int:
        return await self._bus.batch(
            [Outgoing(subjects.tuf(name), data) for name, data in files.items()], expected_last=revision
        )

    async def _file(self, name: str) -> bytes | None:
        found = await self._bus.last(subjects.STREAM_TUF, subjects.tuf(name))
        return found.data if found else None

    async def _required(self, name: str) -> bytes:
        found = await self._file(name)
        if found is None:
            raise Conflict(f"{name} is gone: the repository changed while it was read")
        return found


def _read_seed(seed: Path) -> tuple[dict[str, bytes], dict[str, bytes]] | None:
    """Metadata by file name, the timestamp last, and content by digest; None where there is no seed."""
    if not (seed / TIMESTAMP).is_file():
        return None
    paths = sorted(seed.glob("*.json"), key=lambda p: (p.name == TIMESTAMP, p.name))
    files = {path.name: path.read_bytes() for path in paths}
    return files, {path.name: path.read_bytes() for path in sorted((seed / "blobs").iterdir())}
