"""Changes of trust on their way to delivery: metadata that people sign, one after the other, and the content that it names.

A change is one file, so that it can be carried from one machine to the next. It brings the root and the targets on which it
builds, so that a machine without a connection can say what it is about to sign and whose signatures are missing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.trust import signing

FORMAT: Final = 1
MAX_CHANGE: Final = (
    16 * 1024 * 1024
)  # bytes; sixteen metadata files of the greatest size, and a trust document

#: The name of a metadata file that people sign.
NAME: Final = re.compile(
    r"(?P<version>[1-9][0-9]{0,9})\.(?P<role>root|targets|module-[a-z][a-z0-9-]{0,63})\.json"
)


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`metadata` files by name and `blobs` that they name, built on `base`, the published "root" and "targets".

    `words` say for people what it is.
    """

    metadata: dict[str, bytes]
    blobs: tuple[bytes, ...] = ()
    base: dict[str, bytes] = {}
    words: tuple[str, ...] = ()
    format: int = FORMAT


class Need(NamedTuple):
    """What one file needs: `threshold` signatures by `keys`, of which `have` are there; `whose` names the role for people."""

    file: str
    whose: str
    threshold: int
    keys: dict[str, PublicKey]
    have: frozenset[str]

    @property
    def missing(self) -> int:
        """How many signatures are missing."""
        return max(0, self.threshold - len(self.have))


_DECODER: Final = Decoder(msgspec.json.Decoder(Change))


def encode(change: Change) -> bytes:
    """As a file."""
    return msgspec.json.format(msgspec.json.encode(change), indent=1) + b"\n"


def decode(data: bytes, name: str) -> Change:
    """From the bytes of the file `name`. Raises Refused(TUF_INVALID)."""
    if len(data) > MAX_CHANGE:
        raise Refused(
            Code.TUF_INVALID, f"{name}: {len(data)} bytes are more than the {MAX_CHANGE} of a change"
        )
    try:
        found = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise Refused(
            Code.TUF_INVALID,
            f"{name} is no change of trust: {error}",
            "name a file that 'loopback keys' wrote",
        ) from None
    if found.format != FORMAT:
        raise Refused(Code.TUF_INVALID, f"{name} has format {found.format}; this version knows {FORMAT}")
    for file in found.metadata:
        if NAME.fullmatch(file) is None:
            raise Refused(Code.TUF_INVALID, f"{name}: {file[:80]!r} is no file that people sign")
    return found


def needs(change: Change) -> list[Need]:
    """Whose signatures every file needs. A root needs those of the root before it and its own. Raises Refused(TUF_INVALID)."""
    try:
        return list(_needs(change))
    except (RepositoryError, ValueError) as error:
        raise Refused(Code.TUF_INVALID, f"the change does not read: {error}") from None


def missing(change: Change) -> str:
    """What is missing, in words; empty where everything is signed."""
    return "; ".join(
        f"{need.file}: {need.missing} of the {need.threshold} signatures of {need.whose} missing"
        f" (keys {', '.join(sorted(k.keyid[:12] for i, k in need.keys.items() if i not in need.have))})"
        for need in needs(change)
        if need.missing
    )


def sign(change: Change, key: SigningKey) -> Change:
    """The change with this key's signatures wherever they count; the same one where they count nowhere, or are there."""
    metadata = dict(change.metadata)
    keyid = signing.tuf_key(key).keyid
    for need in needs(change):
        if keyid in need.keys and keyid not in need.have:
            metadata[need.file] = signing.countersign(metadata[need.file], key)
    return msgspec.structs.replace(change, metadata=metadata)


def content(change: Change) -> dict[str, bytes]:
    """Its blobs by SHA-256."""
    return {hashlib.sha256(data).hexdigest(): data for data in change.blobs}


def role_of(file: str) -> str:
    """The role of a metadata file's name."""
    return file.split(".")[-2]


def _needs(change: Change) -> Iterator[Need]:
    by_role = {role_of(name): name for name in change.metadata}
    before = signing.parse(Root, change.base["root"]) if "root" in change.base else None
    root = before
    if "root" in by_role:
        name = by_role["root"]
        root = signing.parse(Root, change.metadata[name])
        if before is not None:
            yield _need(change, name, before, "root", f"root version {before.version}")
        yield _need(change, name, root, "root", f"root version {root.version}")
    targets = signing.parse(Targets, change.base["targets"]) if "targets" in change.base else None
    if "targets" in by_role:
        name = by_role["targets"]
        targets = signing.parse(Targets, change.metadata[name])
        if root is None:
            raise ValueError("it does not bring the root that says who signs targets")
        yield _need(change, name, root, "targets", "targets")
    for role, name in sorted(by_role.items()):
        if role.startswith("module-"):
            if targets is None:
                raise ValueError(f"it does not bring the targets that say who signs {role}")
            yield _need(change, name, targets, role, role)


def _need(change: Change, name: str, delegator: Root | Targets, role: str, whose: str) -> Need:
    threshold, keys = signing.role_keys(delegator, role)
    return Need(name, whose, threshold, keys, signing.signed_by(change.metadata[name], delegator, role))
