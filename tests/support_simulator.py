"""A TUF repository over HTTP that tests can bend: any roles, keys, versions and times; and our client as they start it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib import parse

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

from loopback.cli import tufclient

TOP = ("root", "timestamp", "snapshot", "targets")
ALGORITHMS: dict[str, Callable[[], CryptoSigner]] = {
    "ed25519": CryptoSigner.generate_ed25519,
    "ecdsa": CryptoSigner.generate_ecdsa,
    "rsa-pss": CryptoSigner.generate_rsa,
    "rsa-pkcs1": lambda: CryptoSigner.generate_rsa(scheme="rsa-pkcs1v15-sha256"),
}


@cache
def _pool(algorithm: str, number: int) -> CryptoSigner:
    """Keys are made once: an RSA key takes tens of milliseconds."""
    return ALGORITHMS[algorithm]()


class Simulator:
    """One repository. Change its parts, then `publish` what changed; `asked` is what was asked for, in order."""

    def __init__(self, algorithm: str = "ed25519") -> None:
        self.algorithm = algorithm
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.expires = self.now + timedelta(days=30)
        self.signed: dict[str, Any] = {
            "root": Root(expires=self.expires, consistent_snapshot=True),
            "timestamp": Timestamp(expires=self.expires),
            "snapshot": Snapshot(expires=self.expires),
            "targets": Targets(expires=self.expires),
        }
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.files: dict[str, bytes] = {}
        self.content: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.hashes = False  # whether snapshot and timestamp name lengths and hashes
        self.prefixed = True  # whether content is served under its hash
        self._keys = 0
        self._published: dict[str, list[bytes]] = {}
        for role in TOP:
            self.key(role)
        self.publish("targets", "snapshot", "timestamp", "root")

    @property
    def root(self) -> Root:
        return self.signed["root"]

    @property
    def targets(self) -> Targets:
        return self.signed["targets"]

    @property
    def timestamp(self) -> Timestamp:
        return self.signed["timestamp"]

    @property
    def snapshot(self) -> Snapshot:
        return self.signed["snapshot"]

    def fresh(self, algorithm: str = "") -> CryptoSigner:
        """A key that this repository did not use before."""
        self._keys += 1
        made = _pool(algorithm or self.algorithm, self._keys)
        return CryptoSigner(made._private_key, deepcopy(made.public_key))

    def key(self, role: str, signer: CryptoSigner | None = None) -> CryptoSigner:
        """One key more for a top-level role."""
        signer = signer or self.fresh()
        self.root.add_key(signer.public_key, role)
        self.signers.setdefault(role, []).append(signer)
        return signer

    def rotate(self, role: str) -> None:
        """Other keys for a top-level role. Publish the root, and what it signs, afterwards."""
        for keyid in list(self.root.roles[role].keyids):
            self.root.revoke_key(keyid, role)
        count, self.signers[role] = len(self.signers[role]), []
        for _ in range(count):
            self.key(role)

    def delegate(
        self, delegator: str, role: str, *, paths: Iterable[str] | None = ("*",), prefixes: Iterable[str] | None = None,
        terminating: bool = False, expires: datetime | None = None,
    ) -> None:  # fmt: skip
        """A delegation, last in its delegator's order, and the role where there is none of this name."""
        whose: Targets = self.signed[delegator]
        whose.delegations = whose.delegations or Delegations({}, {})
        assert whose.delegations.roles is not None
        signer = (self.signers.get(role) or [self.fresh()])[0]
        self.signers[role] = [signer]
        whose.delegations.keys[signer.public_key.keyid] = signer.public_key
        whose.delegations.roles[role] = DelegatedRole(
            role, [signer.public_key.keyid], 1, terminating,
            list(paths) if paths is not None else None, list(prefixes) if prefixes is not None else None,
        )  # fmt: skip
        self.signed.setdefault(role, Targets(expires=expires or self.expires))

    def bins(self, bits: int, prefix: str) -> SuccinctRoles:
        """Delegate everything to hash bins."""
        signer = self.fresh()
        found = SuccinctRoles([signer.public_key.keyid], 1, bits, prefix)
        self.targets.delegations = Delegations({signer.public_key.keyid: signer.public_key}, None, found)
        for name in found.get_roles():
            self.signed[name] = Targets(expires=self.expires)
            self.signers[name] = [signer]
        return found

    def add(self, role: str, path: str, data: bytes) -> None:
        """A target and its content."""
        self.signed[role].targets[path] = TargetFile.from_data(path, data, ["sha256"])
        self.content[path] = data

    def publish(self, *roles: str, bump: bool = True) -> None:
        """Sign these roles, in this order, one version up if they were published before, and have the others name them."""
        for role in roles:
            if bump and role in self._published:
                self.signed[role].version += 1
            metadata: Metadata[Any] = Metadata(self.signed[role])
            for signer in self.signers[role]:
                metadata.sign(signer, append=True)
            self.put(role, metadata.to_bytes())

    def put(self, role: str, data: bytes) -> None:
        """Serve these bytes as the role's present version, and have the others name them."""
        version = self.signed[role].version
        self._published.setdefault(role, []).append(data)
        name = parse.quote(role, safe="")
        self.files[f"{name}.json"] = self.files[f"{version}.{name}.json"] = data
        about = MetaFile.from_data(version, data, ["sha256"]) if self.hashes else MetaFile(version)
        if role == "snapshot":
            self.timestamp.snapshot_meta = about
        elif role not in TOP or role == "targets":
            self.snapshot.meta[f"{role}.json"] = about

    def last(self, role: str) -> bytes:
        """The bytes published last."""
        return self._published[role][-1]

    def serve(self, path: str) -> bytes | None:
        """What is at this path below the repository's address."""
        kind, _, rest = path.partition("/")
        if kind == "metadata":
            self.asked.append(rest.removesuffix(".json"))
            versioned = self.root.consistent_snapshot or rest.endswith(".root.json")
            if rest != "timestamp.json" and rest.partition(".")[0].isdigit() != bool(versioned):
                return None
            return self.files.get(rest)
        name = parse.unquote(rest)
        self.asked.append("content " + name)
        if self.root.consistent_snapshot and self.prefixed:
            folder, slash, file = name.rpartition("/")
            digest, _, file = file.partition(".")
            name = folder + slash + file
            known = [
                t.targets[name] for t in self.signed.values() if isinstance(t, Targets) and name in t.targets
            ]
            if digest not in (k.hashes["sha256"] for k in known):
                return None
        return self.content.get(name)


class Server(ThreadingHTTPServer):
    """Serves simulators by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Simulator] = {}

    def add(self, repository: Simulator) -> Simulator:
        """Serve it too; the same."""
        self.repositories[f"r{len(self.repositories)}"] = repository
        return repository

    def address(self, repository: Simulator) -> str:
        """Where it is served."""
        return f"{self.url}/{next(n for n, r in self.repositories.items() if r is repository)}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


Made = Callable[..., "TufClient"]


class _Handler(BaseHTTPRequestHandler):
    server: Server
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        name, _, path = self.path.lstrip("/").partition("/")
        repository = self.server.repositories.get(name)
        data = repository.serve(path) if repository else None
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *_: object) -> None:
        """Tests look at `asked`."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server for as long as the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class TufClient:
    """Our client as the public suite starts it: `subprocess` says whether as a program, or through the same function."""

    def __init__(self, place: Path, url: str, *, subprocess: bool = False) -> None:
        self.metadata, self.artifacts = place / "metadata", place / "artifacts"
        self.metadata.mkdir(parents=True)
        self.artifacts.mkdir()
        self._place = place
        self._url = url
        self._subprocess = subprocess

    def init(self, root: bytes) -> int:
        file = self._place / "initial.json"
        file.write_bytes(root)
        return self._run("--metadata-dir", str(self.metadata), "init", str(file))

    def refresh(self, now: datetime | None = None) -> int:
        url = f"{self._url}/metadata/"
        return self._run("--metadata-url", url, "--metadata-dir", str(self.metadata), "refresh", now=now)

    def download(self, path: str, now: datetime | None = None) -> int:
        return self._run(
            "--metadata-url", f"{self._url}/metadata/", "--metadata-dir", str(self.metadata), "--target-name", path,
            "--target-dir", str(self.artifacts), "--target-base-url", f"{self._url}/targets/", "download", now=now,
        )  # fmt: skip

    def trusted(self) -> dict[str, int]:
        """The version of each role it keeps."""
        return {
            parse.unquote(p.name.removesuffix(".json")): Metadata.from_bytes(p.read_bytes()).signed.version
            for p in self.metadata.glob("*.json")
        }

    def kept(self, role: str) -> bytes | None:
        """The bytes of a role it keeps."""
        path = self.metadata / f"{parse.quote(role, safe='')}.json"
        return path.read_bytes() if path.exists() else None

    def downloaded(self) -> list[bytes]:
        """Every file below the folder for artifacts, oldest first."""
        files = [p for p in self.artifacts.rglob("*") if p.is_file()]
        return [p.read_bytes() for p in sorted(files, key=lambda p: p.stat().st_mtime_ns)]

    def _run(self, *arguments: str, now: datetime | None = None) -> int:
        if self._subprocess:
            assert now is None
            program = Path(sys.executable).with_name("loopback")
            return subprocess.run([program, "tuf-client", *arguments], timeout=60, check=False).returncode
        return tufclient.run(list(arguments), **({"now": lambda: now} if now else {}))
