"""A whole installation on this machine: the embedded broker and the services as children of this process.

`async with running(home, …) as installation:` is what `loopback up`, tests and the demo use.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from loopback.cli import certificates, context, creds, keys
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.services._runtime import streams
from loopback.services._runtime.broker import Broker, die_with
from loopback.services._runtime.bus import Bus, Conflict, Outgoing
from loopback.services._runtime.service import PORT_FILE
from loopback.services._runtime.settings import Settings, read_identity
from loopback.trust import blobs

READY_S: Final = 60.0
STOP_S: Final = 10.0
FIRST_BACKOFF_S: Final = 0.2
LONGEST_BACKOFF_S: Final = 10.0
STABLE_S: Final = 10.0  # who lived this long starts again without delay
POLL_S: Final = 0.05

log = logging.getLogger(__name__)
Say = Callable[[str], None]


class Child:
    """One replica of one service, started again whenever it ends."""

    def __init__(self, home: Path, name: str, instance: str, url: str, otlp: str, say: Say) -> None:
        self.name = name
        self.instance = instance
        self.log = home / "logs" / f"{name}-{instance}.log"
        self.restarts = 0
        self.process: asyncio.subprocess.Process | None = None
        self._say = say
        self._port = Settings(url=url, creds=home, home=home, instance=instance).state(name) / PORT_FILE
        self._arguments = [
            *(sys.executable, "-m", "loopback.cli.main", "--home", str(home), "service", name),
            *("--url", url, "--instance", instance, "--otlp-endpoint", otlp),
        ]

    @property
    def title(self) -> str:
        """Its name among its replicas."""
        return f"{self.name}-{self.instance}"

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self.process.pid if self.process and self.process.returncode is None else None

    async def supervise(self) -> None:
        """Start it, and again when it ends, until cancelled; then ask it to end, and wait."""
        backoff = FIRST_BACKOFF_S
        try:
            while True:
                started = time.monotonic()
                await self._start()
                assert self.process is not None
                status = await self.process.wait()
                backoff = (
                    FIRST_BACKOFF_S
                    if time.monotonic() - started > STABLE_S
                    else min(backoff * 2, LONGEST_BACKOFF_S)
                )
                self.restarts += 1
                self._say(f"{self.title} ended with {status}; again in {backoff:.1f} s (log: {self.log})")
                await asyncio.sleep(backoff)
        finally:
            await self.stop()

    async def _start(self) -> None:
        self._port.unlink(missing_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )

    async def stop(self) -> None:
        """Ask it to end, and end it where it does not."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            self._say(f"{self.title} did not end in {STOP_S:.0f} s and was killed")
            process.kill()
            await process.wait()

    def port(self) -> int | None:
        """Where it serves /readyz, once it says so."""
        try:
            return int(self._port.read_text())
        except (FileNotFoundError, ValueError):
            return None

    async def ready(self) -> bool:
        """Whether /readyz says so."""
        port = self.port()
        if port is None or self.pid is None:
            return False
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        try:
            writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
            line = await reader.readline()
        except OSError:
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return b" 200 " in line


class Installation:
    """What runs: the broker's address, and the services' processes by `<service>-<instance>`."""

    def __init__(self, home: Path, broker: Broker) -> None:
        self.home = home
        self.broker = broker
        self.children: dict[str, Child] = {}

    @property
    def url(self) -> str:
        """The broker's address."""
        return self.broker.url

    async def ready(self) -> None:
        """Until every service says it works. Raises Refused naming those that do not."""
        deadline = time.monotonic() + READY_S
        waiting = dict(self.children)
        while waiting:
            for title, child in list(waiting.items()):
                if await child.ready():
                    del waiting[title]
            if waiting and time.monotonic() > deadline:
                titles = ", ".join(sorted(waiting))
                raise Refused(
                    Code.MODULE_TIMEOUT,
                    f"not ready after {READY_S:.0f} s: {titles}",
                    f"read {next(iter(waiting.values())).log}",
                )
            await asyncio.sleep(POLL_S)


def prepare(home: Path, listen: str) -> bool:
    """Make whatever an installation needs and does not have: keys, credentials, configuration. True: it was new."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    creds.init_home(home, listen=listen)
    fresh = not (home / "tuf" / "root.json").exists()
    if fresh:
        seed = read_identity(home / "creds" / "activation.creds").seed
        keys.init_keys(home, SigningKey.from_nkey(seed).public.text)
    return fresh


async def seed_repository(bus: Bus, home: Path) -> None:
    """Put the first TUF repository on the bus, once: content first, the timestamp that makes it count last."""
    place = home / "tuf" / "seed"
    if await bus.last(subjects.STREAM_TUF, subjects.tuf("timestamp.json")) is not None:
        return
    for path in sorted((place / "blobs").iterdir()):
        data = path.read_bytes()
        for number, chunk in enumerate(blobs.split(data)):
            with contextlib.suppress(Conflict):  # it is there already
                await bus.publish(Outgoing(subjects.blob(path.name, number), chunk, blobs.headers(len(data))))
    files = sorted(place.glob("*.json"), key=lambda path: (path.name == "timestamp.json", path.name))
    with contextlib.suppress(Conflict):  # somebody else was first
        await bus.batch(
            [Outgoing(subjects.tuf(path.name), path.read_bytes(), expected_subject_seq=0) for path in files]
        )


def save_context(home: Path, url: str) -> None:
    """Let the operator's command find this broker; which operator it is stays as it was."""
    path = home / "context.toml"
    known = tomllib.loads(path.read_text()) if path.exists() else {}
    if known.get("url") != url:
        first = min((home / "keys" / "operators").glob("*.pem")).relative_to(home)
        context.save(
            home,
            url=url,
            creds=known.get("creds", "creds/operator.creds"),
            operator_key=known.get("operator_key", str(first)),
        )


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Hold the home. Raises Refused where another process does."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Refused(
            Code.NAME_INVALID,
            f"another 'loopback up' runs on {home}",
            "stop it first, or name another --home",
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


@asynccontextmanager
async def running(
    home: Path,
    *,
    listen: str = "127.0.0.1:4222",
    replicas: int = 1,
    services: tuple[str, ...] = subjects.SERVICES,
    otlp: str = "",
    tls: bool = False,
    say: Say = log.info,
) -> AsyncIterator[Installation]:
    """Everything, until the block ends; then services and broker end in reverse order.

    The block begins once every service is ready. `tls` makes certificates, and from then on the home's broker speaks
    TLS alone. Raises Refused where something does not start.
    """
    with alone(home):
        if _keep_certificates(home, listen, tls):
            say(
                f"made a certificate for the broker in {home / 'tls'}; hosts elsewhere need ca.pem from there"
            )
        if prepare(home, listen):
            say(
                f"made keys, credentials and the first trust document in {home}; the keys are UNENCRYPTED, for trying out "
                "('loopback keys init' in a new --home makes encrypted ones)"
            )
        async with Broker(home, listen=listen) as broker, asyncio.TaskGroup() as group:
            say(f"broker on {broker.url} (log: {home / 'nats' / 'nats.log'})")
            admin = Settings(url=broker.url, creds=home / "creds" / "admin.creds", home=home)
            async with await Bus.connect(admin) as bus:
                await streams.ensure(bus)
                await seed_repository(bus, home)
            save_context(home, broker.url)
            installation = Installation(home, broker)
            tasks = [group.create_task(_keep_broker(broker, say))]
            for name in services:
                for number in range(1, replicas + 1):
                    child = Child(home, name, str(number), broker.url, otlp, say)
                    installation.children[child.title] = child
                    tasks.append(group.create_task(child.supervise()))
            try:
                await installation.ready()
                for child in installation.children.values():
                    say(f"{child.title} on http://127.0.0.1:{child.port()} (log: {child.log})")
                yield installation
            finally:
                for task in reversed(tasks):  # services first, and each waits for its process
                    task.cancel()


def _keep_certificates(home: Path, listen: str, wanted: bool) -> bool:
    """Have a certificate that is good a while, where TLS is wanted now or was once; whether one was made."""
    folder = home / "tls"
    if not wanted and not (folder / "server.pem").exists():
        return False
    names = {"localhost", "127.0.0.1", "::1", socket.gethostname(), listen.rpartition(":")[0].strip("[]")}
    return certificates.keep(folder, "server", sorted(names))


async def _keep_broker(broker: Broker, say: Say) -> None:
    backoff = FIRST_BACKOFF_S
    while True:
        started = time.monotonic()
        status = await broker.wait()
        backoff = (
            FIRST_BACKOFF_S if time.monotonic() - started > STABLE_S else min(backoff * 2, LONGEST_BACKOFF_S)
        )
        say(f"the broker ended with {status}; again in {backoff:.1f} s")
        await asyncio.sleep(backoff)
        await broker.start()
