"""What of a repository stands by its own signatures, whatever its timestamp says.

For the way back from stolen online keys: a thief may have signed a snapshot of files that do not exist, or versions that no
later one can exceed (fast-forward, TUF §1.5.2). Roots, targets and releases are signed by people and verify without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.contracts.codes import Code, Refused
from loopback.trust import signing

#: No honest history gets to this version of a file that people sign: it would be one a minute for two years.
PLAUSIBLE: Final = 1_000_000

_NAME: Final = re.compile(r"(?P<version>[1-9][0-9]{0,9})\.(?P<role>[a-z][a-z0-9-]{0,70})\.json")


class Standing(NamedTuple):
    """The newest root that follows from the pinned one, the newest targets that it accepts, and each family's newest file."""

    root: bytes
    targets: bytes
    families: dict[str, bytes]

    def current(self) -> dict[str, bytes]:
        """Targets files, top-level and delegated, by role: what a snapshot names."""
        return {"targets": self.targets, **self.families}


def newest_root(pinned: bytes, files: Mapping[str, bytes]) -> bytes:
    """The last of the roots that follow from `pinned`, each signed by the one before and by itself."""
    data, root = pinned, signing.parse(Root, pinned)
    while True:
        following = files.get(signing.filename("root", root.version + 1))
        if following is None or not _follows(root, following):
            return data
        data, root = following, signing.parse(Root, following)


def standing(pinned: bytes, files: Mapping[str, bytes]) -> Standing:
    """Of these files by name. Raises Refused(TUF_INVALID) where no targets verify."""
    data = newest_root(pinned, files)
    targets = newest(files, signing.parse(Root, data), "targets")
    if targets is None:
        raise Refused(
            Code.TUF_INVALID,
            "no targets metadata here is signed by the keys of the newest root",
            "publish targets that they signed: 'loopback keys renew targets'",
        )
    parsed = signing.parse(Targets, targets)
    roles = parsed.delegations.roles if parsed.delegations else None
    families = {role: newest(files, parsed, role) for role in roles or {}}
    return Standing(data, targets, {role: found for role, found in families.items() if found is not None})


def versions(files: Iterable[str], role: str) -> list[int]:
    """The versions of a role's files among these names; what is no such name is left out."""
    matches = (_NAME.fullmatch(name) for name in files)
    return [int(match["version"]) for match in matches if match is not None and match["role"] == role]


def newest(files: Mapping[str, bytes], delegator: Root | Targets, role: str) -> bytes | None:
    """A role's newest file that verifies; of implausible versions the lowest, and only where there is nothing else."""
    ordered = sorted(versions(files, role), key=lambda v: (v > PLAUSIBLE, v if v > PLAUSIBLE else -v))
    for version in ordered:
        data = files[signing.filename(role, version)]
        if verifies(delegator, role, data, version):
            return data
    return None


def _follows(root: Root, data: bytes) -> bool:
    return verifies(root, "root", data, root.version + 1) and verifies(
        signing.parse(Root, data), "root", data, root.version + 1
    )


def verifies(delegator: Root | Targets, role: str, data: bytes, version: int) -> bool:
    """Whether this is that version of a role's file, signed by as many of its keys as must."""
    try:
        signed = signing.parse(Root, data) if role == "root" else signing.parse(Targets, data)
        if signed.version != version:
            return False
        return len(signing.signed_by(data, delegator, role)) >= signing.role_keys(delegator, role).threshold
    except (RepositoryError, ValueError, Refused):
        return False
