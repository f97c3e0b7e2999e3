"""Every parser of bytes from outside, one entry each: `@target(name, family)` above a function that returns (run, seeds).

`run(data)` must end in nothing but what `allowed` names, what the parser's callers expect. Where bytes were taken, it goes on
to what is done with them next, and checks what must hold then: what was decoded encodes to the same, an archive is canonical.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from unittest import mock

import msgspec
from securesystemslib.formats import encode_canonical
from support_trust import MemoryRepository, archive, described, manifest

from loopback.cli import rolloutfile
from loopback.contracts.codes import Refused
from loopback.contracts.keys import SigningKey
from loopback.host import config, link
from loopback.services._runtime.settings import read_identity
from loopback.trust import attest, package, signing, updater
from loopback.trust import manifest as manifests
from loopback.trust.repository import TrustedRepository

from . import targets_firewall as targets_firewall  # these enter their own, before those here
from . import targets_messages as targets_messages
from .registry import InMemory, Made, target
from .registry import codes as codes
from .registry import make as make
from .registry import names as names

# Trust


@target("manifest", "text")
def _manifest() -> Made:
    def run(data: bytes) -> None:
        found = manifests.parse(data)
        plain = msgspec.structs.replace(found, build=manifests.BuildTable())
        assert manifests.parse(found.to_toml()) == plain
        assert found.to_toml() == plain.to_toml()

    shipped = (Path(manifests.__file__).parent.parent / "modules/firewall/module.toml").resolve()
    return run, (shipped.read_bytes(), manifest().to_toml())


@target("archive", "tar")
def _archive() -> Made:
    shown = InMemory()

    def run(data: bytes) -> None:
        info = package.inspect(shown.holding(data), sha256=None)
        again = b"".join(
            package.header(m.path, m.size) + data[m.offset : m.offset + m.size] + bytes(-m.size % 512)
            for m in info.members
        )
        assert again + bytes(1024) == data, "an archive was taken that is not the canonical one"
        assert all(not m.path.startswith(("/", ".")) and ".." not in m.path.split("/") for m in info.members)

    small = {"lib/a.py": b"x = 1\n", "bin/run": b"#!/bin/sh\n", "l" * 60 + "/" + "n" * 80: b""}
    return run, (archive(), package.build(small, manifest()), package.build({}, manifest()))


@target("sbom", "json")
def _sbom() -> Made:
    return _attested(attest.SBOM)


@target("provenance", "json")
def _provenance() -> Made:
    return _attested(attest.PROVENANCE)


def _attested(name: str) -> Made:
    shown = InMemory()
    path = shown.holding(described({"lib/a.py": b"x = 1\n"}, manifest()))
    info = package.inspect(path)
    documents = {n: package.read(path, info, n, most=1 << 20) for n in (attest.SBOM, attest.PROVENANCE)}

    def run(data: bytes) -> None:
        attest.check(
            info.digests, info.manifest, lambda wanted: data if wanted == name else documents[wanted]
        )

    return run, (documents[name],)


@target("tuf", "prefixed-json")
def _tuf() -> Made:
    """One metadata file of a good repository; the first byte says which, and whether its key signs what came of it.

    Files that cannot matter are left out of a run: where no root is tried, the client pins the newest one.
    """
    good = MemoryRepository()
    good.add_release(archive(), "1.0.0")
    good.publish()
    first = good.pinned
    good.rotate_root()
    current = {
        "timestamp.json": good.keys["timestamp"],
        f"{good.snapshots}.snapshot.json": good.keys["snapshot"],
        f"{good.targets.version}.targets.json": good.keys["targets"],
        f"{good.releases.version}.{good.role}.json": good.keys[good.role],
        "2.root.json": good.keys["root"],
    }
    order = list(current)
    top = Path(
        tempfile.mkdtemp(prefix="fuzz-tuf-", dir="/dev/shm")
    )  # memory: flushing is not what is tried here
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    folders = []
    for number, pinned in enumerate((good.files["2.root.json"], first)):
        TrustedRepository.pin(top / str(number), pinned)
        folders.append((top / str(number), {p.name for p in (top / str(number)).iterdir()}))

    def run(data: bytes) -> None:
        choice = (data[0] & 0x7F) % len(order) if data else 0
        name, content = order[choice], data[1:]
        if data and data[0] & 0x80:
            content = _signed_again(content, current[name])
        folder, kept = folders[name == "2.root.json"]
        for path in folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        files = {**good.files, name: content}
        client = TrustedRepository(folder, files.get, now=lambda: datetime(2026, 11, 1, 13, tzinfo=UTC))
        # flushing, in threads of its own, is three quarters of the time, and no parser
        with mock.patch.object(updater, "_flush", lambda paths: None):
            client.refresh()
        client.release("firewall", "1.0.0")

    return run, tuple(
        bytes((n | flag,)) + good.files[name] for n, name in enumerate(order) for flag in (0, 0x80)
    )


def _signed_again(data: bytes, key: SigningKey) -> bytes:
    """The same metadata with a signature that holds; the bytes themselves where they are no metadata at all."""
    try:
        found = msgspec.json.decode(data)
        payload = encode_canonical(found["signed"]).encode()
        keyid = signing.tuf_key(key).keyid
        return msgspec.json.encode(
            {**found, "signatures": [{"keyid": keyid, "sig": key.sign(payload).hex()}]}
        )
    except Exception:  # a mutation that cannot be signed anew is tried as it is
        return data


# Modules, hosts and people


@target("rollout-file", "text")
def _rollout_file() -> Made:
    seed = b"""rollout: web-2026-11
workspace: prod
module: firewall
version: 1.2.0
selector: {labels: {role: web}}
waves:
  - {name: canary, count: 1, labels: {role: web}, soak: 10m}
  - {name: quarter, percent: 25, soak: 30m}
  - {name: rest, percent: 100}
gates: {max_failed: 2%, min_sample: 1}
max_unavailable: 10%
host_deadline: 5m
on_failure: rollback
"""
    return (lambda data: rolloutfile.loads(data, Path("/nowhere/web.yaml"))), (seed,)


HOST_TOML: Final = b"""host = "web-1"
workspace = "prod"
url = "nats://127.0.0.1:4222"
creds = "host.creds"
root = "root.json"
state_dir = "/var/lib/loopback"
heartbeat_s = 10.0
[allow]
modules = ["firewall"]
capabilities = ["CAP_BPF"]
publishers = []
[modules.firewall]
interfaces = ["eth0"]
"""


@target("host-toml", "text")
def _host_toml() -> Made:
    path = Path("/etc/loopback/host.toml")

    def run(data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return  # `load` refuses it, by the same exception
        found = config.parse(text, path)
        assert set(found.allow.publishers) <= {p for p in found.allow.publishers if len(p) == 64}

    return run, (HOST_TOML,)


CREDENTIALS: Final = b"""-----BEGIN NATS USER JWT-----
eyJ0eXAiOiJKV1QifQ.eyJuYW1lIjoiYWN0aXZhdGlvbiJ9.c2ln
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
SUAM4UBB7OHOKXJRDO42NIU6SFXLTVAXWIYTJ54RZQU3ESHAQ74ULSC76U
------END USER NKEY SEED------
"""


@target("credentials", "text")
def _credentials() -> Made:
    shown = InMemory()
    base = config.parse(HOST_TOML.decode(), Path("/etc/loopback/host.toml"))

    def run(data: bytes) -> None:
        path = shown.holding(data)
        errors = []
        for read in (
            lambda: link.signing_key(msgspec.structs.replace(base, creds=path)),
            lambda: read_identity(path),
        ):
            try:
                read()
            except Refused as refused:
                errors.append(refused)
        if errors:
            raise errors[0]

    return run, (CREDENTIALS,)
