"""A host's record: who it is, by an operator's word, and, where that word was an invitation, by its own as well.

Three commands make one: `HostPut` names the host's key; `HostInvite` names the key of a one-time token, with which the host
signs a `Claim` that names its own; `HostMove` takes a host to another workspace. Services read records with `read`, hosts
with `verify`; both lead to the same `HostRecord`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.contracts.messages import AnyCommand, HostInvite, HostMove, HostPut, Record, decode_command
from loopback.contracts.trustdoc import Role, Trust

KIND: Final = "host"  # of the records that are read here
#: Of the records that hold invitations. The host's own record, where there is one, stays in force until an invitation is
#: taken: then its command and the claim become the host's record.
INVITE: Final = "invite"
MAX_CLAIM: Final = timedelta(
    days=7
)  # how long an invitation may be open: a token is a secret that lies about


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a host says of itself: the invitation (the command's id) that it takes, and its own new key in hex.

    Envelope type `envelope.CLAIM`, signed with the token's key and with the host's own.
    """

    invite: str
    host: str
    workspace: str
    public_key: str
    at: Time


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A host as its record has it in one workspace. `absent`: it was withdrawn, has moved away, or was never claimed."""

    host: str
    workspace: str
    public_key: str
    labels: dict[str, str]
    addresses: tuple[str, ...]
    absent: bool
    issued_at: datetime


_CLAIMS: Decoder[Claim] = Decoder(msgspec.json.Decoder(Claim))


def claim(invite: HostInvite, token: SigningKey, host: SigningKey, at: datetime) -> Envelope:
    """The claim to an invitation, signed with the token's key and the host's."""
    return claim_to(invite.id, invite.host, invite.workspace, token, host, at)


def claim_to(
    invite: str, name: str, workspace: str, token: SigningKey, host: SigningKey, at: datetime
) -> Envelope:
    """The same, of the host `name`, for whoever has only the invitation's id."""
    payload = Claim(invite=invite, host=name, workspace=workspace, public_key=host.public.text, at=at)
    return envelope.seal(envelope.CLAIM, msgspec.json.encode(payload), token, host)


def open_claim(signed: Envelope, invite: HostInvite) -> Claim:
    """Verify a claim against its invitation. Raises Refused(IDENTITY_CLAIM) for any that does not hold."""
    token = PublicKey.parse(invite.claim_key)
    try:
        payload, _ = envelope.open_envelope(signed, envelope.CLAIM, {token.keyid: token})
        found = _CLAIMS.decode(payload)
        own = PublicKey.parse(found.public_key)
        _, signers = envelope.open_envelope(signed, envelope.CLAIM, {token.keyid: token, own.keyid: own})
    except (Refused, msgspec.MsgspecError, RecursionError) as error:
        said = error.reason if isinstance(error, Refused) else str(error)
        raise Refused(Code.IDENTITY_CLAIM, f"the claim to be {invite.host!r} does not hold: {said}") from None
    if own.keyid == token.keyid or own.keyid not in signers:
        raise Refused(
            Code.IDENTITY_CLAIM, f"the claim to be {invite.host!r} is not signed with the key that it names"
        )
    if (found.invite, found.host, found.workspace) != (invite.id, invite.host, invite.workspace):
        raise Refused(Code.IDENTITY_CLAIM, f"the claim is to another invitation than that of {invite.host!r}")
    return found


def peek(signed: Envelope) -> Claim:
    """What a claim says, unverified. Raises Refused(IDENTITY_CLAIM)."""
    try:
        return _CLAIMS.decode(envelope.payload_of(signed))
    except (Refused, msgspec.MsgspecError, RecursionError) as error:
        said = error.reason if isinstance(error, Refused) else str(error)
        raise Refused(Code.IDENTITY_CLAIM, f"the claim does not read: {said}") from None


def read(command: AnyCommand, claimed: Envelope | None, workspace: str) -> HostRecord:
    """The record that a decoded command makes in `workspace`; who signed the command is not looked at.

    Raises Refused: SCOPE_VIOLATION for another kind of command or workspace, IDENTITY_CLAIM for a claim that does not hold.
    """
    match command:
        case HostPut() if command.workspace == workspace:
            key, absent = command.public_key, command.absent
        case HostInvite() if command.workspace == workspace:
            taken = None if command.absent or claimed is None else open_claim(claimed, command)
            key, absent = (taken.public_key, False) if taken else ("", True)
        case HostMove() if workspace in (command.workspace, command.to):
            key, absent = command.public_key, workspace != command.to
        case _:
            raise Refused(
                Code.SCOPE_VIOLATION, f"this command makes no record of a host in workspace {workspace!r}"
            )
    return HostRecord(
        host=command.host,
        workspace=workspace,
        public_key=key,
        labels=dict(command.labels),
        addresses=command.addresses,
        absent=absent,
        issued_at=command.issued_at,
    )


def read_envelope(signed: Envelope, claimed: Envelope | None, workspace: str) -> HostRecord:
    """The same from a stored envelope. Raises Refused like `read`, and COMMAND_MALFORMED."""
    return read(_decoded(envelope.payload_of(signed)), claimed, workspace)


def of(record: Record) -> HostRecord:
    """The same from a record as eligibility stores it, which must be that of the host and workspace that it says.

    Raises Refused like `read_envelope`.
    """
    found = read_envelope(record.envelope, record.claim, record.workspace)
    if found.host != record.name:
        raise Refused(Code.SCOPE_VIOLATION, f"the record of {record.name!r} holds that of {found.host!r}")
    return found


def verify(signed: Envelope, claimed: Envelope | None, workspace: str, trust: Trust) -> HostRecord:
    """The record, with every signature checked: admins of the workspace, of both for a move, and the claim's.

    Raises Refused: ENVELOPE_*, SIGNATURE_*, COMMAND_MALFORMED, COMMAND_UNAUTHORISED, SCOPE_VIOLATION, IDENTITY_CLAIM.
    """
    payload, signers = envelope.open_envelope(signed, envelope.COMMAND, trust.operator_keys)
    command = _decoded(payload)
    record = read(command, claimed, workspace)
    for place in sorted({command.workspace, workspace, getattr(command, "to", workspace)}):
        trust.authorise(signers, Role.ADMIN, place)
    return record


def _decoded(payload: bytes) -> AnyCommand:
    try:
        return decode_command(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.COMMAND_MALFORMED, f"the operator's command is malformed: {error}") from None
