"""Who signed a release, from the pinned root on: signatures and delegations alone, from files on disk.

This is not the verifying client (`trust.repository`), which also holds expiry, snapshots and freshness; it is what the spawner
asks on its own before it starts anything, of metadata that a stolen agent may have put there. Run apart (`sealed.Verifier`).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeVar

# python-tuf re-exports its public names without saying so to type checkers.
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Targets, VerificationResult  # type: ignore[attr-defined]

from loopback.contracts.codes import Code
from loopback.host.sealed import MAX_METADATA, MAX_ROOTS, Verdict
from loopback.trust.repository import key_id, target_path

_S = TypeVar("_S", Root, Targets)


def check(pinned: bytes, folder: Path, module: str, version: str) -> Verdict:
    """What was signed for this release by somebody entitled to; a Verdict with a code where nobody did."""
    try:
        return _check(pinned, folder, target_path(module, version), f"{module} {version}")
    except FileNotFoundError as error:
        return Verdict(code=Code.TUF_INVALID, reason=f"there is no metadata {error.filename}")
    except (exceptions.RepositoryError, ValueError, OSError) as error:
        return Verdict(code=Code.TUF_INVALID, reason=f"the metadata does not verify: {error}"[:1000])


def _check(pinned: bytes, folder: Path, path: str, what: str) -> Verdict:
    root = _parse(pinned, Root)
    trusted: Root = root.signed
    for _ in range(MAX_ROOTS):
        name = folder / "root_history" / f"{trusted.version + 1}.root.json"
        try:
            following = _parse(_read(name), Root)
        except FileNotFoundError:
            break
        for judge in (trusted, following.signed):  # both the old keys and the new ones sign a rotation
            judge.verify_delegate("root", following.signed_bytes, following.signatures)
        if following.signed.version != trusted.version + 1:
            raise exceptions.BadVersionNumberError(f"{name.name} says version {following.signed.version}")
        trusted = following.signed
    top = _parse(_read(folder / "targets.json"), Targets)
    trusted.verify_delegate("targets", top.signed_bytes, top.signatures)
    versions = {"root": trusted.version, "targets": top.signed.version}
    delegations = top.signed.delegations
    if delegations is None:
        return Verdict(code=Code.PACKAGE_UNKNOWN, reason="the repository delegates no module")
    for delegate, terminating in delegations.get_roles_for_target(path):
        role = _parse(_read(folder / f"{delegate}.json"), Targets)
        top.signed.verify_delegate(delegate, role.signed_bytes, role.signatures)
        versions[delegate] = role.signed.version
        found = role.signed.targets.get(path)
        if found is not None:
            return Verdict(
                sha256=found.hashes.get("sha256", ""),
                versions=versions,
                signers=_signers(
                    top.signed.get_verification_result(delegate, role.signed_bytes, role.signatures)
                ),
            )
        if terminating:
            break
    return Verdict(code=Code.PACKAGE_UNKNOWN, reason=f"nobody entitled to has signed {what}")


def _signers(result: VerificationResult) -> tuple[str, ...]:
    return tuple(sorted({key_id(key) for key in result.signed.values()}))


def _parse(data: bytes, kind: type[_S]) -> Metadata[_S]:
    found = Metadata.from_bytes(data)
    if not isinstance(found.signed, kind):
        raise exceptions.RepositoryError(
            f"expected {kind.__name__.lower()} metadata, found {found.signed.type}"
        )
    return found


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise exceptions.RepositoryError(f"{path} is no plain file")
        data = file.read(MAX_METADATA + 1)
    if len(data) > MAX_METADATA:
        raise exceptions.RepositoryError(f"{path} has more than {MAX_METADATA} bytes")
    return data
