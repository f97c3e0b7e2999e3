"""Messages on the bus, in JSON: frozen, tagged structs.

Commands (operator → service) travel inside DSSE envelopes of type `envelope.COMMAND`; their `id` is the CloudEvents id.
Records and facts that services publish are plain CloudEvents, since the bus's own permissions say who may write them and
no host acts on them. What a host acts on is in `desired.py`, what it says in `reports.py`.
Times are RFC 3339 in UTC; durations are seconds, digests SHA-256 in hex.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from loopback.contracts.abi import MAX_CONTENT
from loopback.contracts.codes import Refusal
from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.envelope import Envelope
from loopback.contracts.roster import Source

Environment = Literal["production", "staging", "sandbox"]


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every command has. `expires_at` is at most a day after `issued_at`."""

    id: str
    workspace: str
    issued_at: Time
    expires_at: Time


class WorkspacePut(Command, frozen=True, tag_field="type", tag="workspace.put"):
    """Create or change a workspace. Verb `workspace-put` of eligibility."""

    environment: Environment
    description: str = ""


class EntitlementPut(Command, frozen=True, tag_field="type", tag="entitlement.put"):
    """Let hosts with these labels have these versions of a module. Verb `entitlement-put` of eligibility.

    `versions` is a PEP 440 specifier (`>=1.0,<2`; empty means any), `labels` must all match the host's record;
    `absent` withdraws the entitlement of this name.
    """

    name: str
    module: str
    versions: str = ""
    channel: str = "stable"
    labels: dict[str, str] = {}
    absent: bool = False


class HostPut(Command, frozen=True, tag_field="type", tag="host.put"):
    """A host's record: its key, labels and addresses. Verb `host-put` of eligibility.

    The signed envelope itself is stored and carried in desired states, so that a host can check it.
    `public_key` is the host's Ed25519 key in hex.
    """

    host: str
    public_key: str
    labels: dict[str, str] = {}
    addresses: tuple[str, ...] = ()
    absent: bool = False


class HostInvite(Command, frozen=True, tag_field="type", tag="host.invite"):
    """Whoever holds a one-time token may be this host. Verb `host-invite` of eligibility.

    `claim_key` is the public half of the token's key, in hex: the host signs its own new key with the other half, once and
    before `claim_before` (see `hostrecord`). So neither the operator nor any service ever has the host's key, and no service
    can put another in its place. Until it is claimed there is no such host; `absent` takes an unclaimed invitation back.
    """

    host: str
    claim_key: str
    claim_before: Time
    labels: dict[str, str] = {}
    addresses: tuple[str, ...] = ()
    absent: bool = False


class HostMove(Command, frozen=True, tag_field="type", tag="host.move"):
    """Take a host from this command's workspace to the workspace `to`. Verb `host-move` of eligibility.

    It must be signed by an admin of both. The host keeps its key and starts there with a new incarnation.
    """

    host: str
    public_key: str
    to: str
    labels: dict[str, str] = {}
    addresses: tuple[str, ...] = ()


class PoolPut(Command, frozen=True, tag_field="type", tag="pool.put"):
    """The addresses of a load balancer's pool, all of them. Verb `pool-put` of eligibility.

    `serial` only grows: hosts that saw one take no earlier word on this pool. `absent` takes the pool away; sets that it
    filled are empty then.
    """

    pool: str
    serial: int
    addresses: tuple[str, ...] = ()
    absent: bool = False


class ReleasePublish(Command, frozen=True, tag_field="type", tag="release.publish"):
    """Publish a release whose blob is already stored. Verb `release-publish` of delivery, workspace `global`.

    `metadata` holds signed TUF metadata files, name → base64: the module's delegated targets, and whatever else the
    offline keys had to sign. Delivery verifies them as a client would before it signs snapshot and timestamp.
    """

    module: str
    version: str
    digest: str
    size: int
    metadata: dict[str, str]
    channel: str = "stable"


class MetadataPublish(Command, frozen=True, tag_field="type", tag="metadata.publish"):
    """Publish new root, targets or trust metadata. Verb `metadata-publish` of delivery, workspace `global`."""

    metadata: dict[str, str]


class Wave(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One step of a rollout: at most one of `count`, `percent` (of all selected hosts, cumulative) or `hosts`.

    `labels` narrows from which hosts it takes; `soak_s` is how long it must stay good before the next wave.
    """

    name: str
    count: int | None = None
    percent: float | None = None
    hosts: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    soak_s: float = 0.0


class Gates(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """When a wave has failed: more than `max_failed` (0–1) of its hosts failed or vanished.

    No verdict is given below `min_sample` answers.
    """

    max_failed: float = 0.0
    min_sample: int = 1


class Selector(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which hosts: all labels must match, and where `hosts` is not empty the host must be named in it."""

    labels: dict[str, str] = {}
    hosts: tuple[str, ...] = ()


class Scope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits that the operator signs and each host checks: nothing outside them can be asked of a host.

    `packages` maps an allowed version to its package digest; `policy` is the digest of the signed policy's envelope.
    """

    workspace: str
    module: str
    packages: dict[str, str]
    policy: str | None
    policy_serial: int
    selector: Selector
    not_before: Time
    not_after: Time
    on_failure: Literal["rollback", "halt"] = "rollback"
    absent: bool = False


class RolloutStart(Command, frozen=True, tag_field="type", tag="rollout.start"):
    """Start a rollout. Verb `rollout-start` of activation.

    `version` must be a key of `scope.packages`. `host_deadline_s` turns a silent host into a failed one,
    `trial_s` is how long a host runs a change on trial before it promotes it.
    """

    rollout: str
    module: str
    version: str
    waves: tuple[Wave, ...]
    scope: Scope
    gates: Gates = Gates()
    max_unavailable: float = 1.0
    host_deadline_s: float = 300.0
    trial_s: float = 10.0
    policy_name: str = ""


class RolloutApprove(Command, frozen=True, tag_field="type", tag="rollout.approve"):
    """A second operator's signature under a rollout; verb `rollout-approve` of activation.

    `start` is the SHA-256, in hex, of the payload that the RolloutStart's signatures cover: it is that command which is
    approved, and no other of this name. Hosts of a regulated workspace ask to see it.
    """

    rollout: str
    start: str
    reason: str = ""


class RolloutPause(Command, frozen=True, tag_field="type", tag="rollout.pause"):
    """Stop taking new hosts; verb `rollout-pause`."""

    rollout: str
    reason: str = ""


class RolloutResume(Command, frozen=True, tag_field="type", tag="rollout.resume"):
    """Go on; verb `rollout-resume`."""

    rollout: str
    reason: str = ""


class RolloutAbort(Command, frozen=True, tag_field="type", tag="rollout.abort"):
    """End it and take the updated hosts back; verb `rollout-abort`."""

    rollout: str
    reason: str = ""


AnyCommand = (
    WorkspacePut
    | EntitlementPut
    | HostPut
    | HostInvite
    | HostMove
    | PoolPut
    | ReleasePublish
    | MetadataPublish
    | RolloutStart
    | RolloutApprove
    | RolloutPause
    | RolloutResume
    | RolloutAbort
)


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content that is stored apart from what names it: its SHA-256 in hex, and exactly so many bytes."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTENT)]


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A module's policy as an operator signs it (envelope type `envelope.POLICY`), stored as a blob.

    Its digest, everywhere, is the SHA-256 of the envelope's JSON bytes. `content` is what the module understands: for the
    firewall, the policy language as plain JSON values. Where it is too large for an envelope, it is null, and `blob` says what
    it is: the signature covers it through that digest. `serial` only grows within (workspace, module). `sources` says what
    fills which of its sets, by their names: what activation keeps rosters of, and what a host follows (see `roster`).
    """

    workspace: str
    module: str
    name: str
    serial: int
    content: msgspec.Raw
    issued_at: Time
    blob: Blob | None = None
    sources: dict[str, Source] = {}

    def __post_init__(self) -> None:
        if self.blob is not None and bytes(self.content) != b"null":
            raise ValueError("content must be null where there is a blob")


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="result", omit_defaults=True):
    """The outcome of a command, on its result subject. `sequence` is the command's place in LB_CMD."""

    command: str
    command_type: str
    ok: bool
    at: datetime
    service: str
    sequence: int
    refusal: Refusal | None = None
    detail: dict[str, str] = {}


class JournalEntry(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="journal", omit_defaults=True
):
    """What a service accepted or refused, who signed it, and when the broker had it.

    `sequence` is the command's place in LB_CMD, `sha256` the digest of what is stored there.
    """

    service: str
    event: str
    at: datetime
    command: str = ""
    command_type: str = ""
    keys: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    refusal: Refusal | None = None
    subject: str = ""
    detail: dict[str, str] = {}
    sequence: int = 0
    sha256: str = ""


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="record", omit_defaults=True):
    """A record that eligibility accepted: the operator-signed command, whole. kind: workspace, entitlement, host, invite, pool.

    `sequence` is the command's place in LB_CMD: of two records of one name, the higher one holds. A host's record is read
    with `hostrecord.read`; `claim` is the host's own word, where the operator's was an invitation.
    """

    kind: str
    name: str
    workspace: str
    envelope: Envelope
    at: datetime
    operators: tuple[str, ...] = ()
    sequence: int = 0
    claim: Envelope | None = None


class Requirements(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a release needs of a host, copied from its manifest."""

    abi_min: int = 1
    abi_max: int = 1
    kernel: str = ""
    features: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    agent: str = ""
    capabilities: tuple[str, ...] = ()


class Release(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="release", omit_defaults=True):
    """A published release, on its catalog subject. `target` is its TUF target path."""

    module: str
    version: str
    digest: str
    size: int
    target: str
    channel: str
    requirements: Requirements
    published_at: datetime
    operators: tuple[str, ...] = ()


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """One rule as it was applied: its name, whether it passed, and what was compared."""

    rule: str
    passed: bool
    detail: str = ""


class OfferedVersion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version and what eligibility says of it for one host; `refusal` is None where the host may have it.

    `rule` names the entitlement and requirements that decided, `checks` every rule in the order applied.
    """

    module: str
    version: str
    digest: str
    rule: str = ""
    refusal: Refusal | None = None
    checks: tuple[Check, ...] = ()


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="offer", omit_defaults=True):
    """Everything one host may or may not have, with the rule that says so."""

    host: str
    workspace: str
    versions: tuple[OfferedVersion, ...]
    at: datetime


class Verdict(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="verdict", omit_defaults=True):
    """Eligibility's or delivery's word on a rollout.

    Eligibility: `refused` maps each selected host that may not have the version to why. Delivery: `refusal` where the
    release is not completely there or does not verify.
    """

    rollout: str
    workspace: str
    service: str
    at: datetime
    refusal: Refusal | None = None
    refused: dict[str, Refusal] = {}


class Presence(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="presence", omit_defaults=True
):
    """Telemetry: a host was lost (no word for `silent_s` seconds) or is back."""

    host: str
    workspace: str
    lost: bool
    at: datetime
    silent_s: float = 0.0


_COMMANDS: Decoder[AnyCommand] = Decoder(msgspec.json.Decoder(AnyCommand))


def decode_command(payload: bytes) -> AnyCommand:
    """Decode a command. Raises msgspec.ValidationError naming the field at fault."""
    return _COMMANDS.decode(payload)


_POLICIES: Decoder[Policy] = Decoder(msgspec.json.Decoder(Policy))


def decode_policy(payload: bytes) -> Policy:
    """Decode a policy. Raises msgspec.ValidationError naming the field at fault."""
    return _POLICIES.decode(payload)
