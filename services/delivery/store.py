"""The repository on the bus: read as one state, changed as one atomic batch, verified as a client would in between.

Replicas need no lock: a batch is stored only if the stream is still at the revision that was read, and the timestamp is its
last message. A process that dies leaves the earlier repository or the later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]  # tuf says no __all__

from loopback.contracts import subjects, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import ReleasePublish
from loopback.contracts.trustdoc import Trust
from loopback.services._runtime.bus import Bus, Conflict, Outgoing
from loopback.services.delivery import decide
from loopback.services.delivery.decide import Expiry, Repository, SigningKeys
from loopback.trust import blobs, changes, signing, standing
from loopback.trust.repository import MAX_ROOT_ROTATIONS, MAX_TRUST_DOCUMENT, TrustedRepository

ATTEMPTS: Final = 50  # times that a change is made anew because somebody else was faster
TIMESTAMP: Final = "timestamp.json"


class OnlineKeys:
    """The keys in `<home>/keys/online`. Those that a new root names are looked for again, so a rotation needs no restart."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, SigningKey] = {}

    @classmethod
    def load(cls, home: Path) -> OnlineKeys:
        """From `<home>/keys/online`. Raises Refused(SIGNATURE_INVALID) where there is none, or one does not read."""
        found = cls(home / "keys" / "online")
        found._look()
        if not found._held:
            raise Refused(
                Code.SIGNATURE_INVALID,
                f"there is no key file in {found._folder}",
                "run 'loopback keys init' or 'loopback up' first",
            )
        return found

    def choose(self, root: bytes) -> SigningKeys:
        """Those that this root names. Raises Refused(TUF_INVALID) where one is not here."""
        try:
            return decide.choose_keys(root, self._held)
        except Refused:
            self._look()
            return decide.choose_keys(root, self._held)

    def _look(self) -> None:
        keys = [SigningKey.load(path) for path in sorted(self._folder.glob("*.pem"))]
        self._held = {signing.tuf_key(key).keyid: key for key in keys}


class Store:
    """Reads and changes the repository. `pinned` is the root that clients start from, `scratch` a folder for checking."""

    def __init__(self, bus: Bus, keys: OnlineKeys, pinned: bytes, scratch: Path) -> None:
        self._bus = bus
        self._keys = keys
        self._pinned = pinned
        self._pinned_version = signing.parse(Root, pinned).version
        self._scratch = scratch

    async def load(self) -> Repository | None:
        """What is published now; None where nothing is. Raises Refused(TUF_INVALID) where it does not read, and Conflict."""
        try:
            return await self._load()
        except (RepositoryError, ValueError) as error:
            raise Refused(
                Code.TUF_INVALID,
                f"the repository on the bus does not read: {error}",
                "somebody else wrote it: read docs/keys.md, 'stolen online keys'",
            ) from None

    async def _load(self) -> Repository | None:
        revision = await self._bus.revision(subjects.STREAM_TUF)
        files: dict[str, bytes] = {}
        timestamp = await self._file(TIMESTAMP)
        if timestamp is None:
            return None
        files[TIMESTAMP] = timestamp
        snapshot_version = signing.parse(Timestamp, timestamp).snapshot_meta.version
        name = signing.filename("snapshot", snapshot_version)
        files[name] = await self._required(name, revision)
        for role, info in signing.parse(Snapshot, files[name]).meta.items():
            files[f"{info.version}.{role}"] = await self._required(f"{info.version}.{role}", revision)
        for version in range(self._pinned_version, self._pinned_version + MAX_ROOT_ROTATIONS):
            found = await self._file(signing.filename("root", version))
            if found is None:
                break
            files[signing.filename("root", version)] = found
        if signing.filename("root", self._pinned_version) not in files:
            raise Refused(
                Code.TUF_INVALID,
                f"the bus has no root version {self._pinned_version}, which is pinned here",
                "give this delivery the root.json of its own bus",
            )
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
        repository = await self._before(incoming)
        if repository is None:
            raise Refused(
                Code.TUF_UNREACHABLE,
                "there is no repository yet",
                "start delivery with the home in which 'loopback keys init' was run",
            )
        now = await self._bus.now()
        added = decide.additions(repository, incoming)
        keys = await asyncio.to_thread(self._keys.choose, decide.newest_root(added) or repository.root)
        files = decide.next_files(repository, added, now, keys)
        await asyncio.to_thread(self._verify, repository, files, now, release)
        if added:
            await self._check_trust(repository, files)
            await self._write(files, repository.revision)

    async def _before(self, incoming: Mapping[str, bytes]) -> Repository | None:
        """What the change builds on. With new online keys, that is what stands without the old ones."""
        new = decide.newest_root(incoming)
        if new is not None:
            files, revision = await self._everything()
            old = standing.newest_root(self._pinned, files)
            if decide.replaces_online(old, new) and old != new:
                return decide.salvaged(self._pinned, files, incoming, revision)
        return await self.load()

    async def _everything(self) -> tuple[dict[str, bytes], int]:
        """Every file on the bus by name, and the revision before they were read."""
        revision = await self._bus.revision(subjects.STREAM_TUF)
        stored = await self._bus.read(subjects.STREAM_TUF, ["lb.tuf.>"])
        named = ((subjects.tuf_name(message.subject), message.data) for message in stored)
        return {name: data for name, data in named if name is not None}, revision

    async def adopt_pinned(self) -> bool:
        """Publish the pinned root where it was replaced by hand (`loopback keys replace-root`); whether that was done here.

        The roots before it cannot have signed it: their keys are lost. Whoever follows them refuses the repository from then
        on, until the new root is pinned there as well. Raises Refused(TUF_INVALID) where it is of another repository.
        """
        files, revision = await self._everything()
        name = signing.filename("root", self._pinned_version)
        if not files or files.get(name) == self._pinned:
            return False
        newest = max(standing.versions(files, "root"), default=0)
        if name in files or self._pinned_version != newest + 1:
            raise Refused(
                Code.TUF_INVALID,
                f"the pinned root, version {self._pinned_version}, does not follow the root on the bus, version {newest}",
                "give this delivery the root.json of its own bus",
            )
        added = {name: self._pinned}
        repository = decide.salvaged(self._pinned, {**files, **added}, {}, revision)
        keys = await asyncio.to_thread(self._keys.choose, self._pinned)
        # Clients that pin it begin with empty memories: nothing that they saw before counts any longer.
        written = decide.next_files(repository, added, await self._bus.now(), keys)
        try:
            await self._write(written, revision)
        except Conflict:
            return False
        return True

    async def import_changes(self, folder: Path) -> list[str]:
        """Publish the changes that lie in `folder` (`*.change`), for those who can sign, but not command; what became of each.

        A change carries the signatures that it needs, so it needs no operator: the way back where the last admin's key is lost,
        or where there is no trust document to judge a command by. Each file is renamed to `.done` or `.refused`.
        """
        said = []
        for path in await asyncio.to_thread(lambda: sorted(folder.glob("*.change"))):
            try:
                data = await asyncio.to_thread(path.read_bytes)
            except FileNotFoundError:
                continue  # another replica on this home was faster
            try:
                change = changes.decode(data, path.name)
                incoming = await asyncio.to_thread(decide.checked, change.metadata)
                for digest, content in changes.content(change).items():
                    await self.put_blob(digest, content)
                await self.publish(incoming)
                said.append(f"{path.name} was published: {', '.join(sorted(change.metadata))}")
                done = path.with_suffix(".done")
            except Refused as refused:
                if refused.code == Code.TUF_UNREACHABLE:
                    raise
                said.append(f"{path.name} was refused: {refused}")
                done = path.with_suffix(".refused")
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(path.replace, done)
        return said

    async def renew(self) -> bool:
        """Sign snapshot and timestamp anew where they are past half of their life; whether something was written."""
        repository = await self.load()
        if repository is None:
            return False
        keys = await asyncio.to_thread(self._keys.choose, repository.root)
        files = decide.next_files(repository, {}, await self._bus.now(), keys)
        if not files:
            return False
        try:
            await self._write(files, repository.revision)
        except Conflict:
            return False  # another replica, or a release, was faster; both renew
        return True

    async def expiries(self) -> list[Expiry]:
        """How long each role's metadata still counts."""
        repository = await self.load()
        return decide.expiries(repository, await self._bus.now()) if repository else []

    async def import_seed(self, seed: Path) -> bool:
        """Publish the repository that `loopback keys init` made, into an empty stream; whether that was done here.

        Raises Refused(TUF_INVALID) for one that no client would accept: once it is published, no other takes its place.
        """
        revision = await self._bus.revision(subjects.STREAM_TUF)
        found = await asyncio.to_thread(_read_seed, seed)
        if found is None or await self._file(TIMESTAMP) is not None:
            return False
        files, content = found
        await asyncio.to_thread(self._check_seed, seed, files, content)
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
                # Renewal is for the first, new online keys for whatever their thief signed.
                if refused.code != Code.TUF_EXPIRED and repository.anew is None:
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

    def _check_seed(self, seed: Path, files: Mapping[str, bytes], content: Mapping[str, bytes]) -> None:
        """A client accepts it; when is no matter, since what has expired meanwhile is renewed next. Runs in a thread."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            try:
                TrustedRepository.pin(Path(folder), files.get(signing.filename("root", 1), b""))
                client = TrustedRepository(
                    Path(folder), files.get, now=lambda: datetime.min.replace(tzinfo=UTC)
                )
                client.trust_document(lambda digest, _: content.get(digest, b""))
                for name in files:
                    if (role := name.split(".")[-2]).startswith("module-"):
                        client.metadata(role)
            except Refused as refused:
                raise Refused(
                    Code.TUF_INVALID,
                    f"the first repository, in {seed}, is damaged: {refused.reason}",
                    "restore it from a copy; where there is none, begin anew with 'loopback keys init' in an empty home",
                ) from None

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

    async def _required(self, name: str, revision: int) -> bytes:
        found = await self._file(name)
        if found is not None:
            return found
        if await self._bus.revision(subjects.STREAM_TUF) != revision:
            raise Conflict(f"{name} is gone: the repository changed while it was read")
        raise Refused(
            Code.TUF_INVALID,
            f"the repository on the bus names {name}, which is not there",
            "somebody else wrote it: read docs/keys.md, 'stolen online keys'",
        )


def _read_seed(seed: Path) -> tuple[dict[str, bytes], dict[str, bytes]] | None:
    """Metadata by file name, the timestamp last, and content by digest; None where there is no seed."""
    if not (seed / TIMESTAMP).is_file():
        return None
    paths = sorted(seed.glob("*.json"), key=lambda p: (p.name == TIMESTAMP, p.name))
    files = {path.name: path.read_bytes() for path in paths}
    return files, {path.name: path.read_bytes() for path in sorted((seed / "blobs").iterdir())}
