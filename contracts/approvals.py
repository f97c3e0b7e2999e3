"""Whether a rollout has its second signature: the one rule, for activation, host and command line (ADR 0016).

In a regulated workspace a rollout needs a `RolloutApprove` by an approver who is none of those that signed the start.
Operators are compared by name: a person with two keys is one person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import Envelope
from loopback.contracts.messages import RolloutApprove, decode_command
from loopback.contracts.trustdoc import Role, Trust

#: Approvals that one rollout takes, and a desired state carries: one counts, the others are those whose signer lost it.
MAX_APPROVALS: Final = 8
_NEXT: Final = "have an approver who did not start it run 'loopback rollout approve {}'"


class Start(NamedTuple):
    """What is to be approved: the payload's SHA-256 in hex, and the names of all operators who signed it."""

    workspace: str
    rollout: str
    digest: str
    signers: frozenset[str]


def start_of(signed: Envelope, workspace: str, rollout: str, trust: Trust) -> Start:
    """A start command as an approval names it. Raises Refused like `envelope.open_envelope`."""
    payload, keyids = envelope.open_envelope(signed, envelope.COMMAND, trust.operator_keys)
    names = frozenset(trust.operators[keyid].name for keyid in keyids)
    return Start(workspace, rollout, hashlib.sha256(payload).hexdigest(), names)


def check(signed: Envelope, start: Start, trust: Trust) -> tuple[str, ...]:
    """The names of the operators by whose signature this envelope approves the start.

    Raises Refused: ROLLOUT_UNAPPROVED where it approves something else or is by those who signed the start,
    COMMAND_UNAUTHORISED where no signer is an approver, COMMAND_MALFORMED, and an envelope's own codes.
    """
    payload, keyids = envelope.open_envelope(signed, envelope.COMMAND, trust.operator_keys)
    try:
        command = decode_command(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.COMMAND_MALFORMED, f"the approval is malformed: {error}") from None

    def other(reason: str) -> Refused:
        return Refused(Code.ROLLOUT_UNAPPROVED, reason, _NEXT.format(start.rollout))

    if not isinstance(command, RolloutApprove):
        raise other("the approval is another kind of command than rollout.approve")
    if command.workspace != start.workspace:
        raise other(f"the approval is for the workspace {command.workspace!r}")
    if command.rollout != start.rollout:
        raise other(f"the approval is that of rollout {command.rollout!r}, not {start.rollout!r}")
    if command.start != start.digest:
        raise other(
            f"what was approved is the start {command.start[:12]!r}, not {start.digest[:12]!r}, which is asked for"
        )
    names = trust.authorise(keyids, Role.APPROVER, start.workspace)
    if others := tuple(name for name in names if name not in start.signers):
        return others
    raise other(f"{', '.join(sorted(set(names)))} signed the start too; an approval is another operator's")


def approvers(found: Iterable[Envelope], start: Start, trust: Trust) -> tuple[str, ...]:
    """Who approves the start: the names of the first approval that counts.

    Raises Refused(ROLLOUT_UNAPPROVED) where none does, with why the last one does not.
    """
    why = "no approval came with it"
    for number, one in enumerate(found):
        if number >= MAX_APPROVALS:
            break
        try:
            return check(one, start, trust)
        except Refused as refused:
            why = refused.reason
    raise Refused(
        Code.ROLLOUT_UNAPPROVED,
        f"in the regulated workspace {start.workspace!r} rollout {start.rollout!r} needs a second operator: {why}",
        _NEXT.format(start.rollout),
    )
