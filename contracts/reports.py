"""What a host says: signed reports (envelope type `envelope.REPORT`) on its own `from` subject.

`host` and `workspace` are inside the signed payload and must agree with the record of the signing key. `seq` grows with
every report of one incarnation, so late and repeated ones are recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final, Literal

import msgspec

from loopback.contracts import envelope, subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.desired import Running
from loopback.contracts.keys import PublicKey


class Phase(StrEnum):
    """Where a host is with one module's desired entry."""

    IDLE = "idle"
    ACCEPTED = "accepted"
    WAITING_WINDOW = "waiting-window"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    STAGED = "staged"
    TRIAL = "trial"
    PROMOTED = "promoted"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"
    ROLLBACK_FAILED = "rollback-failed"
    REMOVED = "removed"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"
    LOOP_ABORTED = "loop-aborted"
    UNCONFIRMED = "unconfirmed"


#: Phases in which the host has finished with the entry's generation, for better or worse.
FINAL: frozenset[Phase] = frozenset(
    {
        Phase.PROMOTED,
        Phase.ROLLED_BACK,
        Phase.ROLLBACK_FAILED,
        Phase.REMOVED,
        Phase.REJECTED,
        Phase.QUARANTINED,
        Phase.LOOP_ABORTED,
        Phase.UNCONFIRMED,
    }
)


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every report has."""

    host: str
    workspace: str
    incarnation: str
    seq: int
    at: Time


class Inventory(Report, frozen=True, tag_field="type", tag="inventory"):
    """What the host is. Features are names such as `btf`, `xdp`, `bpf-loop`, `ringbuf`; see host/inventory."""

    kernel: str
    architecture: str
    agent_version: str
    abi_min: int
    abi_max: int
    features: tuple[str, ...] = ()
    python: str = ""
    boot_id: str = ""
    modules: tuple[str, ...] = ()


class ModuleStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One module on one host.

    `phase`, `generation` and `rollout` speak of the desired entry being worked on; `promoted` is what holds now;
    `enforcing` is what the module itself says of the kernel; `adopted` that it took over what it found pinned;
    `noncompliant` why what holds now is not what the workspace's rules ask for.
    """

    module: str
    phase: Phase
    generation: int
    rollout: str = ""
    promoted: Running | None = None
    trial: Running | None = None
    health: Literal["ok", "degraded", "failed", "unknown"] = "unknown"
    enforcing: bool = False
    adopted: bool = False
    refusal: Refusal | None = None
    metrics: dict[str, float] = {}
    noncompliant: Refusal | None = None


class Witness(msgspec.Struct, frozen=True, omit_defaults=True):
    """The head of the workspace's journal after so many links, as a desired state that this host obeyed said it.

    `at` is the host's own time.
    """

    links: int
    head: str
    at: Time | None = None


class Status(Report, frozen=True, tag_field="type", tag="status"):
    """The host's whole state, sent whenever any of it changes. `agent` says "degraded" while a module fails.

    `witness` is what it knows of the workspace's journal, `witnesses` what it knew before, oldest first and thinned out: a
    newer desired state cannot make it forget that there was another journal.
    """

    agent: Literal["ok", "degraded"]
    generation: int
    modules: tuple[ModuleStatus, ...] = ()
    refusal: Refusal | None = None
    witness: Witness | None = None
    witnesses: tuple[Witness, ...] = ()


class Heartbeat(Report, frozen=True, tag_field="type", tag="heartbeat"):
    """The host is there. Sent every `interval_s` seconds.

    `run` names the agent's process, anew at each start: two that speak at once under one key are two machines.
    """

    generation: int
    agent: Literal["ok", "degraded"]
    interval_s: float
    run: str = ""


AnyReport = Inventory | Status | Heartbeat

#: Bytes of each kind of report. Telemetry keeps one of each for a few incarnations in one message of the bus, so a host that
#: says more than this would have its view, and with it its share of telemetry's time, wait for ever.
MAX_BYTES: Final = {"inventory": 16 * 1024, "status": 160 * 1024, "heartbeat": 4 * 1024}

MAX_INCARNATION: Final = 200  # characters; every desired state repeats it

_DECODER: Decoder[AnyReport] = Decoder(msgspec.json.Decoder(AnyReport))


def decode(payload: bytes) -> AnyReport:
    """Decode a report. Raises msgspec.ValidationError naming the field at fault."""
    return _DECODER.decode(payload)


def sender(subject: str) -> tuple[str, str, str]:
    """Workspace, host and kind that a `from` subject names: a claim, until `open_report` has checked it.

    Raises Refused(REPORT_MALFORMED).
    """
    try:
        parsed = subjects.parse(subject)
    except Refused as error:
        raise Refused(Code.REPORT_MALFORMED, error.reason) from None
    if parsed.area != "from" or len(parsed.rest) != 2:
        raise Refused(Code.REPORT_MALFORMED, f"{subject[:120]!r} is no subject that a host writes to")
    return parsed.workspace, parsed.rest[0], parsed.rest[1]


def open_signed(data: bytes, subject: str, payload_type: str, key: PublicKey | None) -> bytes:
    """The payload of what a host signed and sent on its own subject; `key` is the one in the host's record.

    Raises Refused: REPORT_UNKNOWN_HOST without a key, REPORT_IMPERSONATION where another key signed it or the
    signature does not hold, REPORT_MALFORMED where it is no signed message of that type.
    """
    _, host, _ = sender(subject)
    if key is None:
        raise Refused(
            Code.REPORT_UNKNOWN_HOST,
            f"no record names the host {host!r}",
            "add it with 'loopback host add', or stop the agent that reports under this name",
        )
    try:
        payload, _ = envelope.open_envelope(envelope.parse(data), payload_type, {key.keyid: key})
    except Refused as error:
        if error.code in (Code.SIGNATURE_INVALID, Code.SIGNATURE_UNKNOWN_KEY):
            raise Refused(
                Code.REPORT_IMPERSONATION,
                f"a message on {host!r}'s subject was not signed with {host!r}'s key: {error.reason}",
                "revoke the credentials of whoever sent it; the message was dropped",
            ) from None
        raise Refused(Code.REPORT_MALFORMED, error.reason) from None
    return payload


def open_report(data: bytes, subject: str, key_of: Callable[[str, str], PublicKey | None]) -> AnyReport:
    """Verify a report: signed with the key recorded for the host its subject names, and speaking for that host.

    `key_of(workspace, host)` is the recorded key. Everybody who acts on reports comes through here. Raises Refused
    with REPORT_MALFORMED, REPORT_UNKNOWN_HOST or REPORT_IMPERSONATION.
    """
    workspace, host, kind = sender(subject)
    payload = open_signed(data, subject, envelope.REPORT, key_of(workspace, host))
    if len(payload) > (most := MAX_BYTES.get(kind, 0)):
        raise Refused(
            Code.REPORT_MALFORMED,
            f"{host!r} sent {len(payload)} bytes as its {kind[:20]!r}; {most} are allowed",
        )
    try:
        report = decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.REPORT_MALFORMED, f"{host!r} sent no report: {error}") from None
    if (report.host, report.workspace) != (host, workspace):
        raise Refused(
            Code.REPORT_IMPERSONATION,
            f"{host!r} in {workspace!r} sent a report for {report.host!r} in {report.workspace!r}",
            "look at that host: its agent is misconfigured or stolen; the report was dropped",
        )
    if len(report.incarnation) > MAX_INCARNATION:
        raise Refused(
            Code.REPORT_MALFORMED,
            f"{host!r} names an incarnation of {len(report.incarnation)} characters; {MAX_INCARNATION} are allowed",
        )
    if isinstance(report, Heartbeat) and len(report.run) > MAX_INCARNATION:
        raise Refused(Code.REPORT_MALFORMED, f"{host!r} names its run with {len(report.run)} characters")
    if type(report).__name__.lower() != kind:
        raise Refused(Code.REPORT_MALFORMED, f"{host!r} sent another kind of report on its {kind!r} subject")
    return report
