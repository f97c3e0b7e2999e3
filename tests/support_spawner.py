"""A host's disk with signed packages and a spawner, but no agent and no broker: what a stolen agent has in hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support_host import Signers

from loopback.contracts import subjects
from loopback.contracts.desired import Running
from loopback.contracts.keys import SigningKey
from loopback.host import cgroups
from loopback.host.config import Allow, HostConfig, write_config
from loopback.host.launch import Launch
from loopback.host.spawner_client import SpawnedChild, SpawnerClient
from loopback.host.state import version_name
from loopback.trust import package, signing
from loopback.trust.manifest import LimitsTable, Manifest, ModuleTable
from loopback.trust.repository import target_path

MODULE = "probe"

#: What a probe begins with: everything it needs to try things and to tell.
PRELUDE = """
import ctypes, errno, json, os, resource, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
found = {}
def call(name, function):
    ctypes.set_errno(0)
    try:
        result = function()
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
        return
    found[name] = errno.errorcode[ctypes.get_errno()] if isinstance(result, int) and result < 0 else "ok"
def tell(): print("FOUND " + json.dumps(found), flush=True)
"""


class Disk:
    """A state directory as an agent leaves it, the pinned root, host.toml, and the keys of everybody who signs."""

    def __init__(
        self, place: Path, *, module: str = MODULE, capabilities: tuple[str, ...] = (),
        settings: dict[str, Any] | None = None, **allow: Any,
    ) -> None:  # fmt: skip
        self.place = place
        self.module = module
        self.signers = Signers(module)
        self.releases = signing.new_targets(datetime.now(UTC), version=1, files={})
        self.number = 0
        keys = self.signers.tuf
        root = signing.new_root(
            datetime.now(UTC), **{n: keys[n] for n in ("root", "targets", "snapshot", "timestamp")}
        )
        (place / "root.json").write_bytes(signing.sign(root, keys["root"]))
        (place / "host.creds").write_text("a secret of this host\n")
        self.config = HostConfig(
            host="h", workspace="w", url="nats://127.0.0.1:1", creds=place / "host.creds", root=place / "root.json",
            state_dir=place / "state",
            allow=Allow(**{"modules": (module,), "capabilities": capabilities} | allow),
            modules={module: settings} if settings else {},
        )  # fmt: skip
        self.toml = place / "host.toml"
        write_config(self.config, self.toml)
        self.module_dir = self.config.state_dir / "modules" / subjects.token(module)
        (self.module_dir / "versions").mkdir(parents=True)
        (self.module_dir / "data").mkdir()
        (self.config.state_dir / "tuf").mkdir()

    def unpack(
        self, code: str, version: str = "1.0", module: str = MODULE, limits: Any = None, **table: Any
    ) -> Launch:
        """Build a package and unpack it as the agent would; nothing is signed by this."""
        fields = {"name": module, "version": version, "entry": ("{python}", "-P", "-m", "probe")} | table
        manifest = Manifest(module=ModuleTable(**fields), limits=LimitsTable(**(limits or {})))
        data = package.build({"lib/probe.py": (PRELUDE + code).encode()}, manifest)
        archive = self.place / f"{module}-{version}.lbm"
        archive.write_bytes(data)
        return self.unpack_archive(archive, module, version)

    def unpack_archive(self, archive: Path, module: str, version: str) -> Launch:
        """Unpack what was built elsewhere."""
        digest = package.inspect(archive).digest
        folder = self.module_dir.parent / subjects.token(module) / "versions" / version_name(
            Running(version=version, package=digest)
        )  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        package.extract(archive, folder)
        return Launch(
            module=module, version=version, argv=("-",), env={}, cwd=folder, log=self.place / "log", package=digest
        )  # fmt: skip

    def sign(self, spec: Launch, key: SigningKey | None = None, delegated: SigningKey | None = None) -> None:
        """Publish it: the repository's metadata as the agent would have fetched it, one version higher each time."""
        self.number += 1
        keys, role, now = self.signers.tuf, signing.delegated_role(self.module), datetime.now(UTC)
        path = target_path(spec.module, spec.version)
        size = (self.place / f"{spec.module}-{spec.version}.lbm").stat().st_size
        self.releases.targets[path] = signing.release(path, spec.package, size, spec.version, "stable")
        self.releases.version = self.number
        targets = signing.new_targets(now, version=self.number, files={})
        signing.delegate(targets, self.module, delegated or keys[role])
        tuf = self.config.state_dir / "tuf"
        (tuf / "targets.json").write_bytes(signing.sign(targets, keys["targets"]))
        (tuf / f"{role}.json").write_bytes(signing.sign(self.releases, key or delegated or keys[role]))

    def signed(self, code: str, **more: Any) -> Launch:
        """A package that is unpacked and published."""
        spec = self.unpack(code, **more)
        self.sign(spec)
        return spec

    def folder(self, spec: Launch) -> Path:
        """Where it lies unpacked."""
        return spec.cwd

    @asynccontextmanager
    async def spawner(self, without: str = "") -> AsyncIterator[SpawnerClient]:
        """A running spawner; `without` is code that takes a defence out of it first."""
        program = ("-m", "loopback.host.spawner")
        if without:
            program = (
                "-c",
                f"import sys\n{without}\nfrom loopback.host import spawner\nspawner.main(sys.argv[1:])",
            )
        client = SpawnerClient.begin(self.toml, self.config, program)
        client.listen()
        try:
            yield client
        finally:
            await client.close()
            cgroups.find().leave()

    async def run(self, client: SpawnerClient, spec: Launch) -> Probe:
        """Start it; raises Refused as the spawner does."""
        ours, theirs = socket.socketpair()
        output, written = os.pipe()
        try:
            child = await client.start(spec, theirs.fileno(), written)
        except BaseException:
            ours.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(written)
        return Probe(child, ours, output)

    async def found(self, client: SpawnerClient, spec: Launch) -> dict[str, Any]:
        """Run a probe to its end; what it tells."""
        with contextlib.closing(await self.run(client, spec)) as probe:
            return await probe.found()


class Probe:
    """A started probe: its end of the socket, and its output."""

    def __init__(self, child: SpawnedChild, sock: socket.socket, output: int) -> None:
        self.child = child
        self.sock = sock
        self.output = output

    @property
    def pid(self) -> int:
        return self.child.pid

    def close(self) -> None:
        self.sock.close()
        os.close(self.output)

    async def line(self, start: str = "FOUND ") -> str:
        """The first line of its output that begins so, without that."""

        def read() -> str:
            text = b""
            while chunk := os.read(self.output, 65536):
                text += chunk
                for line in text.decode().splitlines(keepends=True):
                    if line.startswith(start) and line.endswith("\n"):
                        return line[len(start) :].strip()
            raise AssertionError(text.decode())

        async with asyncio.timeout(60):
            return await asyncio.to_thread(read)

    async def found(self) -> dict[str, Any]:
        """What it tells, once it has ended."""
        answer: dict[str, Any] = json.loads(await self.line())
        async with asyncio.timeout(60):
            await self.child.wait()
        return answer


def status(pid: int) -> dict[str, str]:
    """`/proc/PID/status` by name."""
    return dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )


def sockets(pid: int) -> set[str]:
    """The inodes of the sockets that a process has open."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a file it had open for a moment, say below /proc
            links.append(str(entry.readlink()))
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def internet(pid: int) -> set[str]:
    """The inodes of every TCP and UDP socket of its network namespace, among other words."""
    kinds = ("tcp", "tcp6", "udp", "udp6")
    return set(" ".join(Path(f"/proc/{pid}/net/{kind}").read_text() for kind in kinds).split())
