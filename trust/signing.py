"""Making TUF metadata: what the operator's command does with offline keys and delivery with online ones.

Values in, signed bytes out; clocks and keys are passed in. Consistent snapshots: every file but `timestamp.json` carries
its version in its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# python-tuf and securesystemslib re-export their public names without saying so to type checkers.
from securesystemslib.signer import CryptoSigner, Key  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from loopback.contracts.keys import SigningKey

#: In timestamp metadata: when it was signed. Clients take it as a floor for their clock.
ISSUED_FIELD: Final = "x-loopback-issued"

ROOT_LIFE: Final = timedelta(days=730)  # renewed by hand with offline keys
TARGETS_LIFE: Final = timedelta(days=365)  # the same
SNAPSHOT_LIFE: Final = timedelta(days=7)  # renewed by delivery
TIMESTAMP_LIFE: Final = timedelta(days=1)  # bounds how long somebody can hide news from a host

_S = TypeVar("_S", Root, Targets, Snapshot, Timestamp)


def signer(key: SigningKey) -> CryptoSigner:
    """A key as python-tuf signs with it."""
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(key.raw))


def tuf_key(key: SigningKey) -> Key:
    """A key's public half as it stands in metadata."""
    return signer(key).public_key


def delegated_role(module: str) -> str:
    """The role that signs a module's releases."""
    return f"module-{module}"


def filename(role: str, version: int) -> str:
    """The file of a role's version."""
    return "timestamp.json" if role == "timestamp" else f"{version}.{role}.json"


def sign(signed: _S, *keys: SigningKey) -> bytes:
    """Signed metadata as a file's bytes."""
    metadata: Metadata[_S] = Metadata(signed)
    for key in keys:
        metadata.sign(signer(key), append=True)
    return metadata.to_bytes()


def parse(kind: type[_S], data: bytes) -> _S:
    """What a metadata file says, unverified. Raises tuf's RepositoryError, or ValueError for another type."""
    signed = Metadata.from_bytes(data).signed
    if not isinstance(signed, kind):
        raise ValueError(f"expected {kind.__name__} metadata, found {signed.type}")
    return signed


def new_root(
    now: datetime,
    *,
    root: SigningKey,
    targets: SigningKey,
    snapshot: SigningKey,
    timestamp: SigningKey,
    version: int = 1,
) -> Root:
    """A root with one key per role."""
    found = Root(version=version, expires=_whole(now + ROOT_LIFE), consistent_snapshot=True)
    for role, key in (("root", root), ("targets", targets), ("snapshot", snapshot), ("timestamp", timestamp)):
        found.add_key(tuf_key(key), role)
    return found


def new_targets(now: datetime, *, version: int, files: Mapping[str, TargetFile]) -> Targets:
    """Targets metadata, top-level or delegated, without delegations."""
    return Targets(version=version, expires=_whole(now + TARGETS_LIFE), targets=dict(files))


def delegate(targets: Targets, module: str, key: SigningKey) -> None:
    """Let `key` sign the releases of `module`, and nothing else."""
    if targets.delegations is None:
        targets.delegations = Delegations({}, {})
    assert targets.delegations.roles is not None
    role = delegated_role(module)
    public = tuf_key(key)
    targets.delegations.keys[public.keyid] = public
    # One star spans no slash in TUF's patterns: modules/<module>/<version>/<file>.
    targets.delegations.roles[role] = DelegatedRole(
        role, [public.keyid], 1, terminating=True, paths=[f"modules/{module}/*/*"]
    )


def target(path: str, data: bytes, custom: Mapping[str, str] | None = None) -> TargetFile:
    """A target entry for this content."""
    found = TargetFile.from_data(path, data, ["sha256"])
    if custom:
        found.unrecognized_fields["custom"] = dict(custom)
    return found


def release(path: str, sha256: str, size: int, version: str, channel: str) -> TargetFile:
    """The target entry of a release; the package's content is the blob of this digest."""
    found = TargetFile(size, {"sha256": sha256}, path)
    found.unrecognized_fields["custom"] = {"channel": channel, "version": version}
    return found


def new_snapshot(now: datetime, *, version: int, files: Mapping[str, bytes]) -> Snapshot:
    """A snapshot that names these targets files: role → file bytes."""
    meta = {
        f"{role}.json": MetaFile.from_data(parse(Targets, data).version, data, ["sha256"])
        for role, data in sorted(files.items())
    }
    return Snapshot(version=version, expires=_whole(now + SNAPSHOT_LIFE), meta=meta)


def new_timestamp(now: datetime, *, version: int, snapshot: bytes) -> Timestamp:
    """A timestamp that names this snapshot file."""
    meta = MetaFile.from_data(parse(Snapshot, snapshot).version, snapshot, ["sha256"])
    return Timestamp(
        version=version,
        expires=_whole(now + TIMESTAMP_LIFE),
        snapshot_meta=meta,
        unrecognized_fields={ISSUED_FIELD: _whole(now).isoformat()},
    )


def _whole(time: datetime) -> datetime:
    return time.replace(microsecond=0)
