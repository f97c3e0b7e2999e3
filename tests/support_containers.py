"""NATS in containers: an engine in a network namespace of its own, and an image made from the server's static binary."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import docker
import pytest
from support import Place
from testcontainers.core.container import DockerContainer

from loopback.services._runtime.broker import server_program

IMAGE = "loopback-nats:test"
_ENGINES = itertools.count()
READY_S = 60.0


class NoEngine(Exception):
    """There is no container engine here, or it does not run."""


def no_containers(reason: NoEngine) -> NoReturn:
    """Skip a test for want of an engine; in CI, where one is installed, that is a failure."""
    if os.environ.get("CI") and shutil.which("dockerd"):
        pytest.fail(f"a container engine is installed but does not run: {reason}")
    pytest.skip(f"no container engine: {reason}")


class Engine:
    """A running dockerd. Containers on its host network are reached at `address`."""

    def __init__(self, socket_path: Path, address: str) -> None:
        self.url = f"unix://{socket_path}"
        self.address = address


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """Run dockerd until the block ends, without touching this machine's network. Raises NoEngine."""
    if os.geteuid() != 0:
        raise NoEngine("a container engine needs root")
    if shutil.which("dockerd") is None:
        raise NoEngine("dockerd is not installed")
    # The behaviour suite holds one for the whole run; a test may need one of its own beside it.
    nth = next(_ENGINES)
    tag = f"{os.getpid() % 100000}x{nth}"
    namespace, here, there = f"lbt{tag}", f"lbt{tag}a", f"lbt{tag}b"
    net = f"198.{18 + nth % 2}.{(os.getpid() + nth // 2) % 250}"
    with ExitStack() as stack:
        try:
            _run("ip", "netns", "add", namespace)
            stack.callback(_run, "ip", "netns", "del", namespace)
            _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", namespace)
            _run("ip", "addr", "add", f"{net}.1/30", "dev", here)
            _run("ip", "link", "set", here, "up")
            for words in (f"addr add {net}.2/30 dev {there}", f"link set {there} up", "link set lo up"):
                _run("ip", "-n", namespace, *words.split())
        except subprocess.CalledProcessError as error:
            raise NoEngine(f"no network namespace: {error.stderr.strip()}") from None
        path = folder / "docker.sock"
        log = stack.enter_context((folder / "dockerd.log").open("wb"))
        # nsenter, because "ip netns exec" would mount another /sys.
        daemon = subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{namespace}", "dockerd", "-H", f"unix://{path}"),
                *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                *("--pidfile", str(folder / "pid"), "--bridge=none", "--iptables=false", "--ip6tables=false"),
            ],
            stdout=log,
            stderr=log,
        )
        stack.callback(_stop, daemon, folder)
        found = Engine(path, f"{net}.2")
        _await_engine(daemon, found, folder / "dockerd.log")
        _import_image(found)
        before = {name: os.environ.get(name) for name in ("DOCKER_HOST", "TESTCONTAINERS_RYUK_DISABLED")}
        stack.callback(_restore, before)
        os.environ.update(DOCKER_HOST=found.url, TESTCONTAINERS_RYUK_DISABLED="true")
        yield found


def _await_engine(daemon: subprocess.Popen[bytes], found: Engine, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    path = Path(found.url.removeprefix("unix://"))
    while True:
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise NoEngine(f"dockerd does not run: {log.read_text()[-400:]}")
        if path.exists():
            # its socket is there before it answers, and the client asks for its version when it is made
            with contextlib.suppress(docker.errors.DockerException, OSError):
                client = docker.DockerClient(base_url=found.url)
                try:
                    client.ping()
                    return
                finally:
                    client.close()
        daemon_wait(daemon, 0.05)


def daemon_wait(daemon: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait a moment, less when the daemon ends."""
    try:
        daemon.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _import_image(found: Engine) -> None:
    """No registry is needed: the server is one static file."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(Path(server_program()).resolve(), arcname="nats-server")
    repository, _, tag = IMAGE.partition(":")
    client = docker.APIClient(base_url=found.url)
    try:
        client.import_image_from_data(archive.getvalue(), repository=repository, tag=tag)
    finally:
        client.close()


def _stop(daemon: subprocess.Popen[bytes], folder: Path) -> None:
    daemon.terminate()
    try:
        daemon.wait(60)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(str(folder))), reverse=True):
        subprocess.run(["umount", "-l", mount], check=False)


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


class ContainerPlace(Place):
    """With a server in a container, on the same configuration and credentials."""

    def __init__(self, home: Path, engine: Engine) -> None:
        super().__init__(home)
        self._engine = engine
        self._container: DockerContainer | None = None

    async def start(self) -> None:
        await asyncio.to_thread(self._start)
        self.url = f"nats://{self._engine.address}:4222"

    def _start(self) -> None:
        if self._container is None:
            place = str(self.home / "nats")
            self._container = (
                DockerContainer(IMAGE, network_mode="host")
                .with_volume_mapping(place, place, "rw")
                .with_command(["/nats-server", "-c", f"{place}/nats.conf", "-a", self._engine.address])
            )
            self._container.start()
        else:
            self._container.get_wrapped_container().start()
        deadline = time.monotonic() + READY_S
        while True:
            try:
                with socket.create_connection((self._engine.address, 4222), 1) as probe:
                    if probe.recv(16).startswith(b"INFO"):
                        return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    async def kill(self) -> None:
        assert self._container is not None
        await asyncio.to_thread(self._container.get_wrapped_container().kill)
        await asyncio.to_thread(self._container.get_wrapped_container().wait)

    async def close(self) -> None:
        await super().close()
        if self._container is not None:
            await asyncio.to_thread(self._container.stop)
            await asyncio.to_thread(self._container.get_docker_client().client.close)
