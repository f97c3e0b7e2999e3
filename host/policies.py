"""What makes a policy's bytes a policy that may run here. Pure."""

from __future__ import annotations

import hashlib

import msgspec

from loopback.contracts import envelope, messages
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.trustdoc import Role, Trust


def check_policy(data: bytes, target: Running, module: str, workspace: str, trust: Trust) -> messages.Policy:
    """Verify a policy's envelope against the target that names it, and decode it.

    Raises Refused: BLOB_DIGEST, ENVELOPE_*, SIGNATURE_*, COMMAND_UNAUTHORISED, POLICY_MALFORMED, POLICY_SERIAL.
    """
    if hashlib.sha256(data).hexdigest() != target.policy:
        raise Refused(Code.BLOB_DIGEST, "the policy's content is not what its digest says", "fetch it again")
    payload, signers = envelope.open_envelope(envelope.parse(data), envelope.POLICY, trust.operator_keys)
    policy = read_policy(payload)
    _check_place(policy, module, workspace)
    trust.authorise(signers, Role.AUTHOR, workspace)
    _check_serial(policy, target)
    return policy


def _check_place(policy: messages.Policy, module: str, workspace: str) -> None:
    if policy.workspace != workspace or policy.module != module:
        raise Refused(
            Code.POLICY_MALFORMED, f"the policy is for {policy.module!r} in workspace {policy.workspace!r}"
        )


def _check_serial(policy: messages.Policy, target: Running) -> None:
    if policy.serial != target.policy_serial:
        raise Refused(
            Code.POLICY_SERIAL, f"the policy says serial {policy.serial}, the rollout {target.policy_serial}"
        )


def read_policy(payload: bytes) -> messages.Policy:
    """Decode a policy's payload. Raises Refused(POLICY_MALFORMED)."""
    try:
        return messages.decode_policy(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.POLICY_MALFORMED, f"the policy is malformed: {error}") from None


def kept_policy(data: bytes, target: Running) -> messages.Policy:
    """A policy that was verified when it came, found by its digest. Raises Refused(BLOB_DIGEST, POLICY_MALFORMED)."""
    if hashlib.sha256(data).hexdigest() != target.policy:
        raise Refused(
            Code.BLOB_DIGEST, "the policy on disk is not what its digest says", "have it rolled out again"
        )
    return read_policy(envelope.payload_of(envelope.parse(data)))
