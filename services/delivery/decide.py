"""Delivery's rules: what may be published, what the next metadata is, what a rollout may rely on. No I/O, no clock.

1. Metadata that people sign (root, targets, a module's releases) is published as it came; it must verify as any client
   would verify it, its version must follow, and a published release never changes its content.
2. Snapshot and timestamp are signed here, over everything current, the timestamp over the snapshot.
3. A release is what its signer, its command and its package's own manifest agree on.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]  # tuf says no __all__

from loopback.contracts import journal, trustcheck
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.envelope import POLICY, open_envelope, parse
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Policy, Release, ReleasePublish, decode_policy
from loopback.contracts.trustdoc import Role, Trust
from loopback.trust import changes, signing, standing
from loopback.trust.manifest import Manifest
from loopback.trust.repository import MAX_ROOT, MAX_TARGETS, TargetInfo, target_path

MAX_FILES: Final = 16  # metadata files in one command
RENEW_AT: Final = 0.5  # part of a file's life after which it is signed anew


class Repository(msgspec.Struct, frozen=True):
    """What is published: the bytes of every root, of the timestamp, of its snapshot and of the files that this names.

    `revision` is the stream's last sequence when it was read. `anew` holds the current files by role where timestamp and
    snapshot are not to be believed: their keys are being replaced, and versions are counted anew.
    """

    files: dict[str, bytes]
    revision: int
    anew: dict[str, bytes] | None = None

    def current(self) -> dict[str, bytes]:
        """Targets files, top-level and delegated, by role."""
        if self.anew is not None:
            return self.anew
        meta = signing.parse(Snapshot, self.snapshot).meta
        return {
            name.removesuffix(".json"): self.files[f"{info.version}.{name}"] for name, info in meta.items()
        }

    @property
    def timestamp(self) -> bytes:
        """The timestamp file."""
        return self.files["timestamp.json"]

    @property
    def snapshot(self) -> bytes:
        """The snapshot file that the timestamp names."""
        version = signing.parse(Timestamp, self.timestamp).snapshot_meta.version
        return self.files[signing.filename("snapshot", version)]

    @property
    def root_version(self) -> int:
        """The newest root's version."""
        return max(int(n.split(".")[0]) for n in self.files if n.endswith(".root.json"))

    @property
    def root(self) -> bytes:
        """The newest root."""
        return self.files[signing.filename("root", self.root_version)]

    @property
    def versions(self) -> tuple[int, int]:
        """Of snapshot and timestamp, from which the next ones are counted."""
        if self.anew is not None:
            return 0, 0
        return signing.parse(Snapshot, self.snapshot).version, signing.parse(
            Timestamp, self.timestamp
        ).version


class SigningKeys(msgspec.Struct, frozen=True):
    """With which keys snapshot and timestamp are signed: those that the root names."""

    snapshot: tuple[SigningKey, ...]
    timestamp: tuple[SigningKey, ...]


class Expiry(msgspec.Struct, frozen=True):
    """How long a role's metadata still counts; `due` from when on somebody must be told."""

    role: str
    remaining: timedelta
    due: bool


def incoming(metadata: Mapping[str, str]) -> dict[str, bytes]:
    """The files that a command carries. Raises Refused(TUF_INVALID) naming the file."""
    found: dict[str, bytes] = {}
    for name, text in metadata.items():
        try:
            found[name] = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise _invalid(f"metadata: {name[:80]!r} is not base64") from None
    return checked(found)


def checked(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files that somebody sent, if they are what their names say. Raises Refused(TUF_INVALID) naming the file."""
    if len(files) > MAX_FILES:
        raise _invalid(f"metadata: {len(files)} files are more than the {MAX_FILES} allowed")
    for name, data in files.items():
        match = changes.NAME.fullmatch(name)
        if match is None:
            raise _invalid(f"metadata: {name[:80]!r} is no file that people sign (like 2.targets.json)")
        if len(data) > (MAX_ROOT if match["role"] == "root" else MAX_TARGETS):
            raise _invalid(f"metadata: {name} has {len(data)} bytes, more than clients accept")
        _version_in(name, match["role"], int(match["version"]), data)
    return dict(files)


def replaces_online(old: bytes, new: bytes) -> bool:
    """Whether the new root replaces every key of both online roles.

    Clients then forget the versions of timestamp and snapshot that they have seen, and with them those that a thief of these
    keys made unreachably high (TUF §5.3.11, fast-forward recovery).
    """
    before, after = signing.parse(Root, old), signing.parse(Root, new)
    return all(not set(before.roles[r].keyids) & set(after.roles[r].keyids) for r in signing.ONLINE)


def newest_root(files: Mapping[str, bytes]) -> bytes | None:
    """The newest root among files that people sign; None where there is none."""
    roots = [name for name in files if _role(name) == "root"]
    return files[max(roots, key=_version)] if roots else None


def salvaged(
    pinned: bytes, files: Mapping[str, bytes], added: Mapping[str, bytes], revision: int
) -> Repository:
    """The repository by the signatures of people alone. Raises Refused(TUF_INVALID)."""
    try:
        current = standing.standing(pinned, files).current()
    except Refused:  # only the change itself brings targets that verify
        current = standing.standing(pinned, {**files, **added}).current()
    return Repository(dict(files), revision, current)


def additions(repository: Repository, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of these files that are not published yet, roots first.

    A version is the one after the published: who could skip some could use them up, and nobody could publish any longer.
    Raises Refused(TUF_CONFLICT) where it is another, or a published release would change.
    """
    current = repository.current()
    found: dict[str, bytes] = {}
    root = repository.root_version
    for name in sorted(files, key=lambda n: (_role(n) != "root", _role(n), _version(n))):
        role, version, data = _role(name), _version(name), files[name]
        if repository.files.get(name) == data:
            continue
        if role == "root":
            root += 1
            if version != root:
                raise _conflict(name, f"the next root is version {root}")
        elif role in current:
            published = signing.parse(Targets, current[role])
            if repository.anew is None:
                if version <= published.version:
                    raise _conflict(name, f"version {published.version} is published already")
                if version != published.version + 1:
                    raise _conflict(name, f"the next version is {published.version + 1}")
            _check_unchanged(name, published, signing.parse(Targets, data))
        found[name] = data
    return found


def next_files(
    repository: Repository, added: Mapping[str, bytes], now: datetime, keys: SigningKeys
) -> dict[str, bytes]:
    """Everything to be written to publish `added`, the timestamp last; with nothing added, what is due for renewal.

    What `keys` did not sign is due as well: the root names other keys since.
    """
    written = dict(added)
    versions = repository.versions
    snapshot = b"" if repository.anew is not None else repository.snapshot
    if (
        added
        or repository.anew is not None
        or _due(signing.parse(Snapshot, snapshot).expires, signing.SNAPSHOT_LIFE, now)
        or not _signed(repository.root, "snapshot", snapshot)
    ):
        current = repository.current()
        newest = {_role(name): data for name, data in added.items() if _role(name) != "root"}
        version = versions[0] + 1
        snapshot = signing.sign(
            signing.new_snapshot(now, version=version, files=current | newest), *keys.snapshot
        )
        written[signing.filename("snapshot", version)] = snapshot
    if (
        written
        or _due(signing.parse(Timestamp, repository.timestamp).expires, signing.TIMESTAMP_LIFE, now)
        or not _signed(repository.root, "timestamp", repository.timestamp)
    ):
        written["timestamp.json"] = signing.sign(
            signing.new_timestamp(now, version=versions[1] + 1, snapshot=snapshot), *keys.timestamp
        )
    return written


def expiries(repository: Repository, now: datetime) -> list[Expiry]:
    """How long each role's published metadata still counts, the soonest first."""
    files: Iterable[tuple[str, Root | Targets | Snapshot | Timestamp]] = (
        ("root", signing.parse(Root, repository.root)),
        ("snapshot", signing.parse(Snapshot, repository.snapshot)),
        ("timestamp", signing.parse(Timestamp, repository.timestamp)),
        *((role, signing.parse(Targets, data)) for role, data in repository.current().items()),
    )
    found = [(role, signed.expires - now) for role, signed in files]
    return [
        Expiry(role, remaining, remaining < signing.warning(role))
        for role, remaining in sorted(found, key=lambda entry: entry[1])
    ]


def choose_keys(root: bytes, held: Mapping[str, SigningKey]) -> SigningKeys:
    """Of the keys held here, by python-tuf's ids, those that the root names. Raises Refused(TUF_INVALID): too few."""
    parsed = signing.parse(Root, root)
    found: dict[str, tuple[SigningKey, ...]] = {}
    for role in signing.ONLINE:
        threshold, named = signing.role_keys(parsed, role)
        found[role] = tuple(held[keyid] for keyid in named if keyid in held)
        if len(found[role]) < threshold:
            absent = ", ".join(key.keyid[:12] for keyid, key in named.items() if keyid not in held)
            raise Refused(
                Code.TUF_INVALID,
                f"root version {parsed.version} wants {role} signed with a key that is not here: {absent}",
                "put its file into keys/online of delivery's home; it is looked for again by itself",
            )
    return SigningKeys(found["snapshot"], found["timestamp"])


def check_trust(new: Trust, old: Trust | None) -> None:
    """Raises Refused(TUF_INVALID) for a trust document that is older than the present one or cannot be lived with."""
    if old is not None and new.document.version <= old.document.version:
        raise _invalid(
            f"trust.json: version {new.document.version} does not follow version {old.document.version}"
        )
    trustcheck.check(new)


def check_package(command: ReleasePublish, manifest: Manifest) -> None:
    """Raises Refused(MANIFEST_INVALID) where the package is another module's or version's than the command says."""
    for field, said, found in (
        ("module", command.module, manifest.name),
        ("version", command.version, manifest.version),
    ):
        if said != found:
            raise Refused(
                Code.MANIFEST_INVALID,
                f"module.{field}: the package says {found!r}, the command {said!r}",
                "publish the package under its own name and version",
            )


def check_target(command: ReleasePublish, target: TargetInfo | None) -> None:
    """Raises Refused where what the family's key signed is not what the command says."""
    path = target_path(command.module, command.version)
    if target is None:
        raise Refused(
            Code.PACKAGE_UNKNOWN,
            f"no metadata signs {path}",
            "send the module's delegated targets with the release in it",
        )
    if (target.sha256, target.length) != (command.digest, command.size):
        raise Refused(
            Code.PACKAGE_DIGEST,
            f"{path} is signed with {target.length} bytes and digest {target.sha256[:12]}, the command says "
            f"{command.size} bytes and {command.digest[:12]}",
            "publish a new version; a published one never changes",
        )
    signed = (target.custom.get("version"), target.custom.get("channel"))
    if signed != (command.version, command.channel):
        raise _invalid(
            f"{path} is signed as version {signed[0]!r} in channel {signed[1]!r}, the command says "
            f"{command.version!r} in {command.channel!r}"
        )


def release(command: ReleasePublish, manifest: Manifest, operators: tuple[str, ...], at: datetime) -> Release:
    """The catalog's entry."""
    return Release(
        module=command.module,
        version=command.version,
        digest=command.digest,
        size=command.size,
        target=target_path(command.module, command.version),
        channel=command.channel,
        requirements=manifest.requirements(),
        published_at=at,
        operators=operators,
    )


def same_release(known: Release, new: Release) -> bool:
    """Whether the catalog already says this."""
    return msgspec.structs.replace(known, published_at=new.published_at, operators=new.operators) == new


def judge_release(created: journal.Created, target: TargetInfo | None) -> Refusal | None:
    """Why a rollout may not rely on its release, or None. Its package must be the signed one, and inside its scope."""
    scope = created.start().scope
    path = target_path(created.module, created.version)
    if target is None:
        return Refusal(
            Code.PACKAGE_UNKNOWN,
            f"nobody entitled to has signed {path}",
            "publish it: 'loopback module publish'",
        )
    allowed = scope.packages.get(created.version)
    if not target.sha256 == created.package == allowed:
        return Refusal(
            Code.PACKAGE_DIGEST,
            f"{path} is signed with the digest {target.sha256[:12]}, the scope allows {(allowed or 'none')[:12]}",
            "start a rollout of the digest that was published",
        )
    if created.size and created.size != target.length:
        return Refusal(
            Code.PACKAGE_DIGEST, f"{path} has {target.length} signed bytes, the rollout says {created.size}"
        )
    return None


def check_policy(created: journal.Created, workspace: str, data: bytes, trust: Trust) -> Policy:
    """The rollout's policy, as hosts would read it. They judge for themselves; this answers earlier.

    Raises Refused: what hosts would say, ENVELOPE_*, SIGNATURE_*, COMMAND_UNAUTHORISED, POLICY_*.
    """
    payload, keyids = open_envelope(parse(data), POLICY, trust.operator_keys)
    trust.authorise(keyids, Role.AUTHOR, workspace)
    try:
        policy = decode_policy(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.POLICY_MALFORMED, f"the stored policy is no signed policy: {error}") from None
    if (policy.workspace, policy.module) != (workspace, created.module):
        raise Refused(
            Code.POLICY_INVALID,
            f"the policy was signed for {policy.module!r} in {policy.workspace!r}, not for {created.module!r} in "
            f"{workspace!r}",
            "sign it for this workspace",
        )
    if policy.serial != created.policy_serial:
        raise Refused(
            Code.POLICY_SERIAL,
            f"the policy has serial {policy.serial}, the rollout says {created.policy_serial}",
            "start the rollout with the policy's own serial",
        )
    return policy


def _due(expires: datetime, life: timedelta, now: datetime) -> bool:
    return expires - now < life * (1 - RENEW_AT)


def _signed(root: bytes, role: str, data: bytes) -> bool:
    parsed = signing.parse(Root, root)
    return len(signing.signed_by(data, parsed, role)) >= parsed.roles[role].threshold


def _check_unchanged(name: str, old: Targets, new: Targets) -> None:
    for path, target in old.targets.items():
        after = new.targets.get(path)
        if path.endswith(".lbm") and after is not None and after.hashes != target.hashes:
            raise _conflict(name, f"{path} is published with other content, and a version never changes")


def _version_in(name: str, role: str, version: int, data: bytes) -> None:
    try:
        signed = signing.parse(Root, data) if role == "root" else signing.parse(Targets, data)
    except (RepositoryError, ValueError) as error:
        raise _invalid(f"metadata: {name} does not read: {error}") from None
    if signed.version != version:
        raise _invalid(f"metadata: {name} holds version {signed.version}")


def _role(name: str) -> str:
    return name.split(".")[1]


def _version(name: str) -> int:
    return int(name.split(".")[0])


def _invalid(said: str) -> Refused:
    return Refused(Code.TUF_INVALID, said, "sign the metadata again with the operator's command")


def _conflict(name: str, said: str) -> Refused:
    return Refused(Code.TUF_CONFLICT, f"{name}: {said}", "sign again on top of what is published now")
