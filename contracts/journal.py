"""A rollout's journal: the links that activation writes, one after the other, and everybody may read.

Each link is stored on `subjects.rollout(workspace, rollout, event name)` in the workspace's stream. `seq` counts from 1
within the rollout and `prev` is the SHA-256 of the bytes of the link before (empty for the first), so a link that was
changed, cut out or put in is noticed. Whoever folds the links in order knows all there is to know: see `rolloutstate`.

Facts (verdict, observed, presence, expired) and decisions (all others) are links alike; decisions follow from facts already
journaled, never from anything that only one replica saw.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Literal

import msgspec

from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.desired import Running
from loopback.contracts.envelope import Envelope, payload_of
from loopback.contracts.messages import RolloutAbort, RolloutStart, Verdict, decode_command
from loopback.contracts.reports import Phase
from loopback.contracts.roster import Source

Health = Literal["ok", "degraded", "failed", "unknown"]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", omit_defaults=True):
    """What every event has: nothing but its name."""

    @property
    def name(self) -> str:
        """The event's name, the last token of its subject."""
        return str(self.__struct_config__.tag)


class Member(msgspec.Struct, frozen=True, omit_defaults=True):
    """A selected host, with those of its signed labels that the waves ask for."""

    host: str
    labels: dict[str, str] = {}


class Created(Event, frozen=True, tag="created"):
    """An operator's command was accepted. `members` are in the order in which waves take them.

    `envelope` is the signed RolloutStart, whole; `traceparent` its trace, of which every later decision is a part; `size`
    is the package's in bytes. It waits for `approvals_needed` other operators' signatures. `sources` fill the policy's sets.
    """

    envelope: Envelope
    command: str
    keyids: tuple[str, ...]
    operators: tuple[str, ...]
    members: tuple[Member, ...]
    module: str
    version: str
    package: str = ""
    size: int = 0
    policy: str | None = None
    policy_serial: int = 0
    traceparent: str = ""
    approvals_needed: int = 0
    sources: tuple[Source, ...] = ()

    def start(self) -> RolloutStart:
        """The command inside the envelope. Raises Refused(COMMAND_MALFORMED) where it is another one."""
        try:
            command = decode_command(payload_of(self.envelope))
        except msgspec.MsgspecError as error:
            raise Refused(Code.COMMAND_MALFORMED, f"the rollout's command is malformed: {error}") from None
        if not isinstance(command, RolloutStart):
            raise Refused(Code.COMMAND_MALFORMED, "the rollout's command is not a rollout.start")
        return command

    @property
    def target(self) -> Running | None:
        """What the rollout wants hosts to run; None for absent."""
        if not self.package:
            return None
        return Running(self.version, self.package, self.policy, self.policy_serial)


class Approved(Event, frozen=True, tag="approved"):
    """Another operator signed the rollout too. `envelope` is the signed RolloutApprove, whole; hosts ask to see it."""

    envelope: Envelope
    keyids: tuple[str, ...]
    operators: tuple[str, ...]


class VerdictGiven(Event, frozen=True, tag="verdict"):
    """Eligibility or delivery has spoken."""

    verdict: Verdict


class PlannedWave(msgspec.Struct, frozen=True, kw_only=True):
    """One wave, with its hosts in order."""

    name: str
    hosts: tuple[str, ...]
    soak_s: float = 0.0


class Started(Event, frozen=True, tag="started"):
    """Both verdicts are good: these hosts, in these waves. Hosts that eligibility refused are in none."""

    waves: tuple[PlannedWave, ...]


class WaveStarted(Event, frozen=True, tag="wave-started"):
    """A wave begins; `wave` is its index from 0."""

    wave: int


class Assignment(msgspec.Struct, frozen=True, omit_defaults=True):
    """One host's new desired generation. `expected`: what it is believed to have promoted."""

    host: str
    generation: int
    expected: Running | None = None


class Assigned(Event, frozen=True, tag="assigned"):
    """Desired states were written, in the same atomic batch. `returning`: back to what each host came from."""

    wave: int
    hosts: tuple[Assignment, ...]
    not_after: datetime
    returning: bool = False


class Observation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one verified status says of the rollout's module on one host.

    `document` is the generation that the host itself stands at, where it got there by a document that no link speaks of.
    """

    host: str
    phase: Phase
    generation: int
    incarnation: str = ""
    seq: int = 0
    promoted: Running | None = None
    health: Health = "unknown"
    enforcing: bool = False
    refusal: Refusal | None = None
    document: int = 0


class Observed(Event, frozen=True, tag="observed"):
    """What hosts reported, many in one link."""

    hosts: tuple[Observation, ...]


class PresenceSeen(Event, frozen=True, tag="presence"):
    """Hosts of this rollout that vanished or came back, by telemetry."""

    lost: tuple[str, ...] = ()
    back: tuple[str, ...] = ()


class Expired(Event, frozen=True, tag="expired"):
    """Hosts that said nothing final within their deadline, or cannot be reached for want of a record."""

    hosts: tuple[str, ...]
    refusal: Refusal


class WaveSoaking(Event, frozen=True, tag="wave-soaking"):
    """Every host of the wave has answered, well enough; it must stay so until `until`."""

    wave: int
    until: datetime


class WaveDone(Event, frozen=True, tag="wave-done"):
    """The wave is good."""

    wave: int


class WaveFailed(Event, frozen=True, tag="wave-failed"):
    """Too many of the wave's hosts failed or vanished: `failed` of `answered` answers, where `allowed` may."""

    wave: int
    failed: int
    answered: int
    allowed: int


class WaveInconclusive(Event, frozen=True, tag="wave-inconclusive"):
    """Hosts could not confirm a change that may be good: no verdict; a pause follows."""

    wave: int
    inconclusive: int


class Paused(Event, frozen=True, tag="paused"):
    """No host is newly assigned until somebody resumes. Without operators, the rollout paused itself."""

    reason: str
    operators: tuple[str, ...] = ()


class Resumed(Event, frozen=True, tag="resumed"):
    """It goes on; hosts that were inconclusive are asked again."""

    reason: str = ""
    operators: tuple[str, ...] = ()


class Halted(Event, frozen=True, tag="halted"):
    """It stopped for good, for this reason."""

    refusal: Refusal


class RollingBack(Event, frozen=True, tag="rolling-back"):
    """Every host that was assigned goes back to what it came from.

    `envelope` is the signed RolloutAbort, where an operator asked for it; hosts ask to see it.
    """

    reason: str
    operators: tuple[str, ...] = ()
    envelope: Envelope | None = None

    def asked_at(self) -> datetime | None:
        """When an operator signed that hosts return; None where the rollout decided so itself. Raises like `Created.start`."""
        if self.envelope is None:
            return None
        try:
            command = decode_command(payload_of(self.envelope))
        except msgspec.MsgspecError as error:
            raise Refused(Code.COMMAND_MALFORMED, f"the rollout's abort is malformed: {error}") from None
        if not isinstance(command, RolloutAbort):
            raise Refused(Code.COMMAND_MALFORMED, "the rollout's abort is not a rollout.abort")
        return command.issued_at


class Done(Event, frozen=True, tag="done"):
    """Every wave is done."""


class RolledBack(Event, frozen=True, tag="rolled-back"):
    """Every host that was assigned runs again what it came from."""


class RollbackIncomplete(Event, frozen=True, tag="rollback-incomplete"):
    """These hosts have not said that they are back. Their desired states stay; they return when they can."""

    hosts: tuple[str, ...]


class Canceled(Event, frozen=True, tag="canceled"):
    """Ended before any host was assigned."""

    reason: str
    operators: tuple[str, ...] = ()


class RolloutRefused(Event, frozen=True, tag="refused"):
    """It never started: a verdict against it, or no host left."""

    refusal: Refusal


AnyEvent = (
    Created
    | Approved
    | VerdictGiven
    | Started
    | WaveStarted
    | Assigned
    | Observed
    | PresenceSeen
    | Expired
    | WaveSoaking
    | WaveDone
    | WaveFailed
    | WaveInconclusive
    | Paused
    | Resumed
    | Halted
    | RollingBack
    | Done
    | RolledBack
    | RollbackIncomplete
    | Canceled
    | RolloutRefused
)


class Link(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="rollout"):
    """One link of the chain. `at` is the broker's time."""

    rollout: str
    workspace: str
    seq: int
    prev: str
    at: datetime
    event: AnyEvent


_DECODER = Decoder(msgspec.json.Decoder(Link))


def encode(link: Link) -> bytes:
    """The bytes that are stored and hashed."""
    return msgspec.json.encode(link)


def decode(data: bytes) -> Link:
    """Decode a link. Raises msgspec.ValidationError naming the field at fault."""
    return _DECODER.decode(data)


def digest(data: bytes) -> str:
    """What the next link's `prev` must be."""
    return hashlib.sha256(data).hexdigest()


def chained(head: str, link: str) -> str:
    """The workspace's chain after a link of this digest: the SHA-256 of `head` (empty before the first) and it, in hex.

    It runs over the links of all rollouts of a workspace in the order in which its stream has them.
    """
    return hashlib.sha256(f"{head}{link}".encode()).hexdigest()
