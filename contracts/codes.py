"""Stable refusal codes, and the exception that carries one.

A code never changes its meaning and is never reused. What a person reads is `reason` (what is wrong, naming the file,
line or field) and `next_step` (what to do about it); what a program compares is `code`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Code(StrEnum):
    """Why something was refused. The part before the dot says whose input it was."""

    # envelopes and signatures
    ENVELOPE_MALFORMED = "envelope.malformed"
    ENVELOPE_UNSIGNED = "envelope.unsigned"
    ENVELOPE_TYPE = "envelope.wrong-type"
    ENVELOPE_TOO_LARGE = "envelope.too-large"
    SIGNATURE_INVALID = "signature.invalid"
    SIGNATURE_UNKNOWN_KEY = "signature.unknown-key"
    SIGNATURE_WEAK_KEY = "signature.weak-key"
    # commands
    COMMAND_MALFORMED = "command.malformed"
    COMMAND_WRONG_SUBJECT = "command.wrong-subject"
    COMMAND_EXPIRED = "command.expired"
    COMMAND_NOT_YET_VALID = "command.not-yet-valid"
    COMMAND_REPLAYED = "command.replayed"
    COMMAND_UNAUTHORISED = "command.unauthorised"
    COMMAND_UNKNOWN = "command.unknown"
    COMMAND_CONFLICT = "command.conflict"
    WORKSPACE_UNKNOWN = "workspace.unknown"
    NAME_INVALID = "name.invalid"
    # eligibility
    ELIGIBILITY_NO_ENTITLEMENT = "eligibility.no-entitlement"
    ELIGIBILITY_LABELS = "eligibility.labels"
    ELIGIBILITY_VERSION = "eligibility.version"
    ELIGIBILITY_CHANNEL = "eligibility.channel"
    ELIGIBILITY_KERNEL = "eligibility.kernel"
    ELIGIBILITY_FEATURE = "eligibility.kernel-feature"
    ELIGIBILITY_ARCHITECTURE = "eligibility.architecture"
    ELIGIBILITY_ABI = "eligibility.abi"
    ELIGIBILITY_AGENT = "eligibility.agent-version"
    ELIGIBILITY_NO_INVENTORY = "eligibility.no-inventory"
    ELIGIBILITY_NO_RECORD = "eligibility.no-record"
    ELIGIBILITY_NO_RELEASE = "eligibility.no-release"
    # packages, manifests, TUF
    PACKAGE_MALFORMED = "package.malformed"
    PACKAGE_DIGEST = "package.digest"
    PACKAGE_TRUNCATED = "package.truncated"
    PACKAGE_TOO_LARGE = "package.too-large"
    PACKAGE_UNSAFE_MEMBER = "package.unsafe-member"
    PACKAGE_UNKNOWN = "package.unknown"
    PACKAGE_SBOM = "package.sbom"
    PACKAGE_PROVENANCE = "package.provenance"
    MANIFEST_INVALID = "manifest.invalid"
    MANIFEST_ABI = "manifest.abi"
    MANIFEST_CAPABILITY = "manifest.capability"
    TUF_INVALID = "tuf.invalid"
    TUF_EXPIRED = "tuf.expired"
    TUF_UNREACHABLE = "tuf.unreachable"
    TUF_CONFLICT = "tuf.conflict"
    BLOB_MISSING = "blob.missing"
    BLOB_DIGEST = "blob.digest"
    # policies
    POLICY_MALFORMED = "policy.malformed"
    POLICY_INVALID = "policy.invalid"
    POLICY_SERIAL = "policy.serial"
    POLICY_TEST_FAILED = "policy.test-failed"
    POLICY_TOO_LARGE = "policy.too-large"
    # what fills a policy's sets
    SET_UNFILLED = "set.unfilled"
    SET_OUTSIDE = "set.outside"
    SET_TOO_LARGE = "set.too-large"
    ROSTER_OLDER = "roster.older"
    ROSTER_INVALID = "roster.invalid"
    POOL_SERIAL = "pool.serial"
    # rollouts
    ROLLOUT_UNKNOWN = "rollout.unknown"
    ROLLOUT_EXISTS = "rollout.exists"
    ROLLOUT_STATE = "rollout.state"
    ROLLOUT_INVALID = "rollout.invalid"
    ROLLOUT_NO_HOSTS = "rollout.no-hosts"
    ROLLOUT_UNAPPROVED = "rollout.unapproved"
    JOURNAL_REWRITTEN = "journal.rewritten"
    # the host's view of a desired state
    SCOPE_VIOLATION = "scope.violation"
    SCOPE_EXPIRED = "scope.expired"
    HOST_WRONG_HOST = "host.wrong-host"
    HOST_INCARNATION = "host.wrong-incarnation"
    HOST_GENERATION = "host.old-generation"
    HOST_EXPECTED = "host.expected-mismatch"
    HOST_NOT_ALLOWED = "host.not-allowed"
    HOST_QUARANTINED = "host.quarantined"
    HOST_LOOP = "host.loop-aborted"
    HOST_DISK = "host.disk"
    HOST_UNCONFIRMED = "host.unconfirmed"
    HOST_DEADLINE = "host.deadline"
    HOST_LOST = "host.lost"
    HOST_FAULT = "host.fault"
    HOST_BELOW_FLOOR = "host.below-floor"
    HOST_PUBLISHER = "host.publisher"
    HOST_CLONED = "host.cloned"
    HOST_DEBUG_OFF = "host.debug-off"
    # identities
    IDENTITY_TOKEN = "identity.token"  # noqa: S105 — a code, no password
    IDENTITY_CLAIM = "identity.claim"
    IDENTITY_REVOKED = "identity.revoked"
    # modules
    MODULE_START = "module.start"
    MODULE_DIED = "module.died"
    MODULE_ABI = "module.abi"
    MODULE_TIMEOUT = "module.timeout"
    MODULE_UNHEALTHY = "module.unhealthy"
    KERNEL_UNSUPPORTED = "kernel.unsupported"
    KERNEL_REFUSED = "kernel.refused"
    # reports
    REPORT_MALFORMED = "report.malformed"
    REPORT_UNKNOWN_HOST = "report.unknown-host"
    REPORT_IMPERSONATION = "report.impersonation"
    # a person's own files
    CONFIG_INVALID = "config.invalid"


class Refusal(msgspec.Struct, frozen=True, omit_defaults=True):
    """A refusal as it crosses the wire."""

    code: Code
    reason: str
    next_step: str = ""


class Refused(Exception):
    """Input from outside was refused; nothing was changed.

    Raised at any boundary, and turned into a `Refusal` on the wire, a line on stderr, or a status of a host.
    """

    def __init__(self, code: Code, reason: str, next_step: str = "") -> None:
        super().__init__(f"{code}: {reason}" + (f" ({next_step})" if next_step else ""))
        self.code = code
        self.reason = reason
        self.next_step = next_step

    @property
    def refusal(self) -> Refusal:
        """This refusal as a value for the wire."""
        return Refusal(self.code, self.reason, self.next_step)
