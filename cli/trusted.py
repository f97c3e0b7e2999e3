"""What the command line believes: the trust document and the releases, verified by the operator's own TUF client.

Nothing that a person is asked to sign rests on what a service says of itself.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec

from loopback.cli import context, trustpublish
from loopback.contracts import envelope, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import Policy, decode_policy
from loopback.contracts.trustdoc import Role, Trust
from loopback.trust.repository import TargetInfo, TrustedRepository


class Trusted(NamedTuple):
    """The trust document, and the repository that has it."""

    trust: Trust
    repository: TrustedRepository

    async def release(self, module: str, version: str) -> TargetInfo | None:
        """A release as its publishers signed it; None where nobody entitled has."""
        return await asyncio.to_thread(self.repository.release, module, version)


async def trusted(session: context.Session) -> Trusted:
    """Refresh, verify, and read the trust document. Raises Refused(TUF_*, BLOB_*)."""
    repository = await trustpublish.repository(session)
    info = await asyncio.to_thread(repository.find, trustdoc.TARGET)
    if info is None:
        raise Refused(
            Code.TUF_INVALID, f"the repository has no {trustdoc.TARGET}", "see 'loopback keys show'"
        )
    content = await session.blob(info.sha256, info.length)
    trust = await asyncio.to_thread(repository.trust_document, lambda _digest, _size: content)
    return Trusted(trust, repository)


async def policy(
    session: context.Session, digest: str, module: str, workspace: str, trust: Trust
) -> tuple[Policy, tuple[str, ...]]:
    """A stored policy and the authors who signed it, every check of a host's included. Content that is stored apart is put in.

    Raises Refused: BLOB_*, ENVELOPE_*, SIGNATURE_*, COMMAND_UNAUTHORISED, POLICY_MALFORMED.
    """
    data = await session.blob(digest, max_size=envelope.MAX_ENVELOPE)
    payload, keyids = envelope.open_envelope(envelope.parse(data), envelope.POLICY, trust.operator_keys)
    authors = trust.authorise(keyids, Role.AUTHOR, workspace)
    try:
        found = decode_policy(payload)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise Refused(Code.POLICY_MALFORMED, f"the policy {digest[:12]} is malformed: {error}") from None
    if (found.workspace, found.module) != (workspace, module):
        raise Refused(
            Code.POLICY_MALFORMED,
            f"the policy {digest[:12]} is for {found.module!r} in workspace {found.workspace!r}",
        )
    if found.blob is not None:
        content = await session.blob(found.blob.sha256, found.blob.size)
        found = msgspec.structs.replace(found, content=msgspec.Raw(content), blob=None)
    return found, authors
