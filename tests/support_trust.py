"""A small TUF repository in memory, with real keys and signatures, that tests can attack."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import Operator, Role, TrustDocument
from loopback.trust import attest, package, signing
from loopback.trust.manifest import Manifest, ModuleTable
from loopback.trust.repository import TrustedRepository, target_path

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
Client = Callable[..., TrustedRepository]


def refusal(action: Callable[[], object]) -> Code:
    """The code with which this is refused."""
    with pytest.raises(Refused) as caught:
        action()
    return caught.value.code


def manifest(name: str = "firewall", version: str = "1.0.0", **module: object) -> Manifest:
    """A small manifest."""
    table = {"name": name, "version": version, "entry": ("{python}", "-m", name)} | module
    return Manifest(module=ModuleTable(**table))


def archive(version: str = "1.0.0", files: Mapping[str, bytes] | None = None) -> bytes:
    """A small package."""
    return described(files or {"lib/loopback/__init__.py": b"x = 1\n"}, manifest(version=version))


def described(files: Mapping[str, bytes], made: Manifest, **changes: Any) -> bytes:
    """A package with SBOM and provenance, as if its files were its sources."""
    sources = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    fields: dict[str, Any] = {"sources": sources, "tools": {"python": "3.11.2"}}
    return package.build(files, made, attest.Build(**fields | changes))


class MemoryRepository:
    """Files by name, as they would be on the bus; `publish` makes everything current consistent."""

    def __init__(self, module: str = "firewall") -> None:
        self.module = module
        self.role = signing.delegated_role(module)
        self.keys = {
            name: SigningKey.generate() for name in ("root", "targets", "snapshot", "timestamp", self.role)
        }
        self.operator = SigningKey.generate()
        self.trust = msgspec.json.encode(
            TrustDocument(
                version=1,
                operators=(Operator("admin", self.operator.public.text, {"*": tuple(Role)}),),
                services={"activation": (SigningKey.generate().public.text,)},
            )
        )
        self.root = signing.new_root(
            NOW, **{n: self.keys[n] for n in ("root", "targets", "snapshot", "timestamp")}
        )
        self.targets = signing.new_targets(
            NOW, version=1, files={trustdoc.TARGET: signing.target(trustdoc.TARGET, self.trust)}
        )
        signing.delegate(self.targets, module, self.keys[self.role])
        self.releases = signing.new_targets(NOW, version=1, files={})
        self.files: dict[str, bytes] = {"1.root.json": signing.sign(self.root, self.keys["root"])}
        self.snapshots = self.timestamps = 0
        self.publish(NOW)

    @property
    def pinned(self) -> bytes:
        """The first root."""
        return self.files["1.root.json"]

    def fetch(self, name: str) -> bytes | None:
        """For a TrustedRepository."""
        return self.files.get(name)

    def add_release(self, data: bytes, version: str, channel: str = "stable") -> str:
        """Sign a release; its target path. Not visible before `publish`."""
        path = target_path(self.module, version)
        digest = hashlib.sha256(data).hexdigest()
        self.releases.version += 1
        self.releases.targets[path] = signing.release(path, digest, len(data), version, channel)
        return path

    def publish(self, now: datetime = NOW) -> None:
        """Sign what is current."""
        signed = {
            "targets": signing.sign(self.targets, self.keys["targets"]),
            self.role: signing.sign(self.releases, self.keys[self.role]),
        }
        self.files[f"{self.targets.version}.targets.json"] = signed["targets"]
        self.files[f"{self.releases.version}.{self.role}.json"] = signed[self.role]
        self.publish_snapshot(now, signed)

    def publish_snapshot(self, now: datetime, signed: Mapping[str, bytes]) -> None:
        """Sign a snapshot of these files by role, and a timestamp of it."""
        self.snapshots += 1
        snapshot = signing.sign(
            signing.new_snapshot(now, version=self.snapshots, files=signed), self.keys["snapshot"]
        )
        self.files[f"{self.snapshots}.snapshot.json"] = snapshot
        self.publish_timestamp(now, snapshot)

    def publish_timestamp(self, now: datetime, snapshot: bytes) -> None:
        """Sign a timestamp of this snapshot."""
        self.timestamps += 1
        self.files["timestamp.json"] = signing.sign(
            signing.new_timestamp(now, version=self.timestamps, snapshot=snapshot), self.keys["timestamp"]
        )

    def rotate_root(self, *, signers: tuple[SigningKey, ...] | None = None, **keys: SigningKey) -> None:
        """A next root in which these roles have new keys, signed by the old and the new root key unless told otherwise."""
        before = self.keys["root"]
        for role, key in keys.items():
            for keyid in list(self.root.roles[role].keyids):
                self.root.revoke_key(keyid, role)
            self.root.add_key(signing.tuf_key(key), role)
            self.keys[role] = key
        self.root.version += 1
        chosen = signers if signers is not None else tuple(dict.fromkeys((before, self.keys["root"])))
        self.files[f"{self.root.version}.root.json"] = signing.sign(self.root, *chosen)
