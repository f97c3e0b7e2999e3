"""A policy on its way from a file to a rollout: read, checked and signed, its content inside the envelope or apart from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from loopback.cli import context, uploading
from loopback.contracts import envelope
from loopback.contracts.abi import MAX_CONTENT
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Blob, Policy
from loopback.contracts.roster import Source
from loopback.modules.firewall import policy as firewall
from loopback.modules.firewall.policy_text import MAX_TEXT

_NULL: Final = msgspec.Raw(b"null")
_SMALLER: Final = (
    "merge prefixes and rules, let rules share a set instead of repeating its prefixes, or have hosts with other labels get a "
    "policy of their own"
)

READERS: Final[dict[str, Callable[[Path], bytes]]] = {
    "firewall": lambda path: firewall.to_json(firewall.load(path).plain)
}


def _sources(found: bytes) -> dict[str, Source]:
    filled = firewall.parse(found, "policy.json").filled
    return {name: Source(labels=one.labels, pool=one.pool) for name, one in filled.items()}


#: What fills the sets of a policy with this content, by module.
SOURCES: Final[dict[str, Callable[[bytes], dict[str, Source]]]] = {"firewall": _sources}


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """A signed policy. `content` is None where the envelope holds it; `size` is the content's, in bytes."""

    envelope: bytes
    content: bytes | None
    serial: int
    size: int

    @property
    def digest(self) -> str:
        """What the policy is called everywhere."""
        return hashlib.sha256(self.envelope).hexdigest()

    def plain(self) -> dict[str, Any]:
        """For programs."""
        apart = None if self.content is None else hashlib.sha256(self.content).hexdigest()
        return {"digest": self.digest, "serial": self.serial, "size": self.size, "blob": apart}

    def words(self) -> str:
        """For people."""
        apart = "" if self.content is None else ", stored apart from what is signed, by its digest"
        return f"policy serial {self.serial}: {self.size:,} bytes{apart}"


def content(path: Path, module: str) -> bytes:
    """The policy's content as JSON; checked by the module's own reader where this installation knows the module.

    Raises Refused: POLICY_TOO_LARGE, POLICY_MALFORMED and the reader's own, naming the file; OSError.
    """
    if (size := path.stat().st_size) > MAX_TEXT:
        raise _too_large(f"{path}: {size:,} bytes of text are more than the {MAX_TEXT:,} that are read")
    reader = READERS.get(module)
    if reader is not None:
        data = reader(path)
    else:
        data = path.read_bytes()
        try:
            msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise Refused(
                Code.POLICY_MALFORMED, f"{path}: not JSON: {error}", "policies of this module are JSON"
            ) from None
    if len(data) > MAX_CONTENT:
        raise _too_large(
            f"{path}: the policy has {len(data):,} bytes as JSON; modules are given {MAX_CONTENT:,} at most"
        )
    return data


def _too_large(reason: str) -> Refused:
    return Refused(Code.POLICY_TOO_LARGE, reason, _SMALLER)


def sign(
    found: bytes, *, workspace: str, module: str, name: str, serial: int, at: datetime, key: SigningKey
) -> Signed:
    """Sign it, with what fills its sets. What fits into one envelope is inside, all else is named there by digest and size."""
    policy = Policy(
        workspace=workspace,
        module=module,
        name=name,
        serial=serial,
        content=msgspec.Raw(found),
        issued_at=at,
        sources=SOURCES[module](found) if module in SOURCES else {},
    )
    if len(found) < envelope.MAX_ENVELOPE:
        data = envelope.seal_bytes(envelope.POLICY, msgspec.json.encode(policy), key)
        if len(data) <= envelope.MAX_ENVELOPE:
            return Signed(envelope=data, content=None, serial=serial, size=len(found))
    blob = Blob(hashlib.sha256(found).hexdigest(), len(found))
    policy = msgspec.structs.replace(policy, content=_NULL, blob=blob)
    data = envelope.seal_bytes(envelope.POLICY, msgspec.json.encode(policy), key)
    return Signed(envelope=data, content=found, serial=serial, size=len(found))


async def store(session: context.Session, signed: Signed) -> None:
    """Store it: the content first, so that a policy that can be found is whole. Raises Refused(BLOB_DIGEST)."""
    if signed.content is not None:
        with uploading.shown("the policy's content", signed.size) as progress:
            await session.put_blob(signed.content, progress)
    await session.put_blob(signed.envelope)
