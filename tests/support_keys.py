"""An installation with real keys, a real broker, real delivery and real TUF clients, worked on with the real command."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from support import Place, eventually
from support_trust import described, manifest
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Root
from tuf.ngclient import FetcherInterface, Updater

from loopback.cli import ceremony, context, keys, main, module
from loopback.cli import home as installation
from loopback.contracts import subjects
from loopback.contracts.codes import Refused
from loopback.contracts.keys import SigningKey
from loopback.services._runtime import service
from loopback.services._runtime.bus import Bus, Outgoing
from loopback.services._runtime.settings import read_identity
from loopback.services.delivery import app
from loopback.services.delivery.keeper import Keeper
from loopback.trust import signing, standing
from loopback.trust.repository import TrustedRepository, target_path


class _Files(FetcherInterface):
    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix("repository:///")
        if name not in self.files:
            raise DownloadHTTPError(name, 404)
        return iter((self.files[name],))


class Client:
    """Somebody who pinned a root once: as python-tuf's own client, and as a host of ours. Both remember what they saw."""

    def __init__(self, folder: Path, pinned: bytes) -> None:
        self._folder = folder
        self._pinned = pinned
        (folder / "theirs").mkdir(parents=True)
        TrustedRepository.pin(folder / "ours", pinned)

    def follow(self, files: dict[str, bytes]) -> TrustedRepository:
        """Fetch and verify with both. Raises Refused, or python-tuf's errors."""
        ours = TrustedRepository(self._folder / "ours", files.get)
        ours.refresh()
        self.theirs(files).refresh()
        return ours

    def theirs(self, files: dict[str, bytes]) -> Updater:
        """python-tuf's own client, as it comes."""
        return Updater(
            str(self._folder / "theirs"), "repository:///", fetcher=_Files(files), bootstrap=self._pinned
        )

    def offline(self) -> TrustedRepository:
        """Our host with nothing but what it verified earlier."""
        found = TrustedRepository(self._folder / "ours", lambda _: None)
        found.load()
        return found

    def pin(self, root: bytes) -> None:
        """What a person does on the host by hand."""
        TrustedRepository.pin(self._folder / "ours", root)
        self._pinned = root
        shutil.rmtree(
            self._folder / "theirs"
        )  # python-tuf keeps no pin of its own: another root, another folder
        (self._folder / "theirs").mkdir()


class Installation:
    """A home on a real broker. `loopback` runs the command as a person would."""

    def __init__(
        self,
        place: Place,
        tmp_path: Path,
        plan: ceremony.Plan = ceremony.ONE_EACH,
        passphrase: bytes | None = None,
    ) -> None:
        self.place = place
        self.home = place.home
        self.tmp_path = tmp_path
        self.bus: Bus
        installation.begin(self.home, None)
        seed = read_identity(self.home / "creds" / "activation.creds").seed
        keys.init_keys(
            self.home, SigningKey.from_nkey(seed).public.text, plan=plan, protect=lambda _: passphrase
        )
        context.save(
            self.home, url=place.url, creds="creds/operator.creds", operator_key="keys/operators/admin.pem"
        )
        self._clients = 0
        self.keepers: list[Keeper] = []  # of the replicas that run

    @contextlib.asynccontextmanager
    async def delivery(self, replicas: int = 1) -> AsyncIterator[None]:
        """Delivery's processes, here as tasks; they end as on SIGTERM."""
        stop = asyncio.Event()
        keepers = self.keepers = []

        class Known(Keeper):
            """A keeper that tests can have look at once, and not in a minute."""

            def __init__(self, *arguments: Any, **keywords: Any) -> None:
                super().__init__(*arguments, **keywords)
                keepers.append(self)

        with mock.patch.object(app, "Keeper", Known):
            async with asyncio.TaskGroup() as group:
                for number in range(replicas):
                    settings = self.place.settings("delivery", instance=str(number))
                    group.create_task(service.run("delivery", settings, app.start, stop=stop))
                try:
                    await eventually(lambda: len(keepers) == replicas)
                    await eventually(self.published)
                    yield
                finally:
                    stop.set()

    async def published(self) -> dict[str, bytes]:
        """Every metadata file on the bus, by name."""
        stored = await self.bus.read(subjects.STREAM_TUF, ["lb.tuf.>"])
        return {str(subjects.tuf_name(s.subject)): s.data for s in stored}

    async def root(self) -> Root:
        """The newest root on the bus."""
        files = await self.published()
        newest = max(standing.versions(files, "root"))
        return signing.parse(Root, files[signing.filename("root", newest)])

    async def client(self) -> Client:
        """Somebody new, who pins the root of this home and has seen what is published now."""
        self._clients += 1
        found = Client(
            self.tmp_path / f"client-{self._clients}", (self.home / "tuf" / "root.json").read_bytes()
        )
        found.follow(await self.published())
        return found

    async def loopback(self, *arguments: object, home: Path | None = None) -> tuple[int, str]:
        """Run the command; its exit code, and all that it said."""

        def run() -> tuple[int, str]:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    main.main(["--home", str(home or self.home), *map(str, arguments)])
                except SystemExit as ended:
                    return int(ended.code or 0), said.getvalue()
            return 0, said.getvalue()

        code, said = await asyncio.to_thread(run)
        assert "Traceback" not in said
        return code, said

    async def done(self, *arguments: object) -> str:
        """Run the command, which must succeed; what it said."""
        code, said = await self.loopback(*arguments)
        assert code == 0, said
        return said

    def package(self, version: str, name: str = "firewall") -> Path:
        """A small package of this version."""
        path = self.tmp_path / f"{name}-{version}.lbm"
        path.write_bytes(described({"lib/x.py": version.encode()}, manifest(name, version)))
        return path

    async def release(self, version: str, name: str = "firewall") -> None:
        """Publish a small package of this version with the keys at hand."""
        async with context.connect(self.context()) as session:
            installation.begin(self.home, None)
            await module.publish(session, self.package(version, name))

    def context(self) -> context.Context:
        """How the command connects."""
        installation.begin(self.home, None)
        return context.load()

    async def put(self, files: dict[str, bytes]) -> None:
        """Write metadata past delivery, as a thief of its credentials does; the timestamp last."""
        for name in sorted(files, key=lambda n: (n == "timestamp.json", n)):
            await self.bus.publish(Outgoing(subjects.tuf(name), files[name]))

    def key(self, folder: str, name: str) -> SigningKey:
        """One of the home's keys."""
        return SigningKey.load(self.home / "keys" / folder / f"{name}.pem")


def now() -> datetime:
    """UTC."""
    return datetime.now(UTC)


def refused(client: Client, files: dict[str, bytes]) -> str:
    """Why a host of ours does not accept this."""
    try:
        client.follow(files)
    except Refused as refusal:
        return str(refusal.code)
    return ""


def has(client: TrustedRepository, version: str, name: str = "firewall") -> bool:
    """Whether a release is signed."""
    return client.find(target_path(name, version)) is not None
