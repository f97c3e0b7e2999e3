"""Making TUF metadata: what the operator's command does with offline keys and delivery with online ones.

Values in, signed bytes out; clocks and keys are passed in. Consistent snapshots: every file but `timestamp.json` carries
its version in its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# python-tuf and securesystemslib re-export their public names without saying so to type checkers.
from securesystemslib.signer import CryptoSigner, Key, SSlibKey  # type: ignore[attr-defined]
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

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey, SigningKey

#: In timestamp metadata: when it was signed. Clients take it as a floor for their clock.
ISSUED_FIELD: Final = "x-loopback-issued"

ROOT_LIFE: Final = timedelta(days=730)  # renewed by hand with offline keys
TARGETS_LIFE: Final = timedelta(days=365)  # the same
SNAPSHOT_LIFE: Final = timedelta(days=7)  # renewed by delivery
TIMESTAMP_LIFE: Final = timedelta(days=1)  # bounds how long somebody can hide news from a host

TOP_ROLES: Final = ("root", "targets", "snapshot", "timestamp")
ONLINE: Final = ("snapshot", "timestamp")

#: Before its end, when a role's expiry is warned of. By hand: a quarter of a year, a month. By delivery, which renews at half
#: of a file's life: when renewal has failed for a further quarter of it.
ROOT_WARNING: Final = timedelta(days=90)
TARGETS_WARNING: Final = timedelta(days=30)
SNAPSHOT_WARNING: Final = SNAPSHOT_LIFE / 4
TIMESTAMP_WARNING: Final = TIMESTAMP_LIFE / 4

_S = TypeVar("_S", Root, Targets, Snapshot, Timestamp)

#: Keys that may stand for one role.
Keys = SigningKey | PublicKey | Sequence[SigningKey | PublicKey]


class RoleKeys(NamedTuple):
    """The keys of a role by python-tuf's ids, and how many of them must sign."""

    threshold: int
    keys: dict[str, PublicKey]


def warning(role: str) -> timedelta:
    """How long before its end a role's expiry is warned of."""
    online = {"root": ROOT_WARNING, "snapshot": SNAPSHOT_WARNING, "timestamp": TIMESTAMP_WARNING}
    return online.get(role, TARGETS_WARNING)


def life(role: str) -> timedelta:
    """How long a role's metadata counts from its signing on."""
    lives = {"root": ROOT_LIFE, "snapshot": SNAPSHOT_LIFE, "timestamp": TIMESTAMP_LIFE}
    return lives.get(role, TARGETS_LIFE)


def signer(key: SigningKey) -> CryptoSigner:
    """A key as python-tuf signs with it."""
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(key.raw))


def tuf_key(key: SigningKey | PublicKey) -> Key:
    """A key's public half as it stands in metadata. Raises Refused(SIGNATURE_WEAK_KEY): OpenSSL would take such a one."""
    public = (key.public if isinstance(key, SigningKey) else key).sound()
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(public.raw))


def public_key(key: Key) -> PublicKey:
    """A key of metadata as everything else names it. Raises Refused(TUF_INVALID) where it is none that we make."""
    if key.keytype != "ed25519":
        raise Refused(
            Code.TUF_INVALID, f"the key {key.keyid[:16]} is of another kind than Ed25519: {key.keytype}"
        )
    return PublicKey.parse(str(key.keyval.get("public", "")))


def role_keys(delegator: Root | Targets, role: str) -> RoleKeys:
    """Whose signatures a role's metadata needs. Raises Refused(TUF_INVALID) where `delegator` knows no such role."""
    try:
        found = delegator.get_delegated_role(role)
    except ValueError:
        module = role.removeprefix("module-")
        raise Refused(
            Code.TUF_INVALID,
            f"the {delegator.type} metadata knows no role {role}",
            f"let a key sign it first: 'loopback keys family {module}'" if module != role else "",
        ) from None
    keys = {keyid: public_key(delegator.get_key(keyid)) for keyid in found.keyids}
    return RoleKeys(found.threshold, keys)


def signed_by(data: bytes, delegator: Root | Targets, role: str) -> frozenset[str]:
    """Those keys of `role`, by python-tuf's ids, whose signatures over this file hold. Raises tuf's RepositoryError."""
    metadata = Metadata.from_bytes(data)
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return frozenset(result.signed)


def countersign(data: bytes, *keys: SigningKey) -> bytes:
    """The same file with these signatures as well."""
    metadata = Metadata.from_bytes(data)
    for key in keys:
        metadata.sign(signer(key), append=True)
    return metadata.to_bytes()


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


def unsigned(signed: Root | Targets) -> bytes:
    """The same as a file that has no signature yet."""
    metadata: Metadata[Any] = Metadata(signed)
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
    root: Keys,
    targets: Keys,
    snapshot: Keys,
    timestamp: Keys,
    version: int = 1,
    thresholds: Mapping[str, int] = {},
) -> Root:
    """A root with these keys for each role, of which one must sign unless `thresholds` says more."""
    found = Root(version=version, expires=_whole(now + ROOT_LIFE), consistent_snapshot=True)
    for role, keys in zip(TOP_ROLES, (root, targets, snapshot, timestamp), strict=True):
        set_keys(found, role, keys, thresholds.get(role, 1))
    return found


def set_keys(root: Root, role: str, keys: Keys, threshold: int) -> None:
    """Give a role these keys instead of those it has. Raises Refused(TUF_INVALID) where they are fewer than the threshold."""
    chosen = [tuf_key(key) for key in (keys if isinstance(keys, Sequence) else (keys,))]
    if not 1 <= threshold <= len({key.keyid for key in chosen}):
        raise Refused(Code.TUF_INVALID, f"{role}: {threshold} of {len(chosen)} keys cannot sign")
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    for key in chosen:
        root.add_key(key, role)
    root.roles[role].threshold = threshold


def renewed(signed: _S, now: datetime) -> _S:
    """The next version of it, with a whole life before it; `signed` itself is changed."""
    signed.version += 1
    lives = {"root": ROOT_LIFE, "snapshot": SNAPSHOT_LIFE, "timestamp": TIMESTAMP_LIFE}
    signed.expires = _whole(now + lives.get(signed.type, TARGETS_LIFE))
    return signed


def new_targets(now: datetime, *, version: int, files: Mapping[str, TargetFile]) -> Targets:
    """Targets metadata, top-level or delegated, without delegations."""
    return Targets(version=version, expires=_whole(now + TARGETS_LIFE), targets=dict(files))


def delegate(targets: Targets, module: str, *keys: SigningKey | PublicKey) -> None:
    """Let any of these keys sign the releases of `module`, and nothing else; no other key may any longer."""
    if targets.delegations is None:
        targets.delegations = Delegations({}, {})
    delegations = targets.delegations
    assert delegations.roles is not None
    role = delegated_role(module)
    chosen = {key.keyid: key for key in map(tuf_key, keys)}
    delegations.keys.update(chosen)
    # One star spans no slash in TUF's patterns: modules/<module>/<version>/<file>.
    delegations.roles[role] = DelegatedRole(
        role, list(chosen), 1, terminating=True, paths=[f"modules/{module}/*/*"]
    )
    used = {keyid for other in delegations.roles.values() for keyid in other.keyids}
    for keyid in [k for k in delegations.keys if k not in used]:
        del delegations.keys[keyid]


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
