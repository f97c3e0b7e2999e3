"""What a host says: signed reports (envelope type `envelope.REPORT`) on its own `from` subject.

`host` and `workspace` are inside the signed payload and must agree with the record of the signing key. `seq` grows with
every report of one incarnation, so late and repeated ones are recognised.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

import msgspec

from loopback.contracts.codes import Refusal
from loopback.contracts.desired import Running


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
    at: datetime


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
    `enforcing` is what the module itself says of the kernel; `adopted` that it took over what it found pinned.
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


class Status(Report, frozen=True, tag_field="type", tag="status"):
    """The host's whole state, sent whenever any of it changes. `agent` says "degraded" while a module fails."""

    agent: Literal["ok", "degraded"]
    generation: int
    modules: tuple[ModuleStatus, ...] = ()
    refusal: Refusal | None = None


class Heartbeat(Report, frozen=True, tag_field="type", tag="heartbeat"):
    """The host is there. Sent every `interval_s` seconds."""

    generation: int
    agent: Literal["ok", "degraded"]
    interval_s: float


AnyReport = Inventory | Status | Heartbeat

_DECODER: msgspec.json.Decoder[AnyReport] = msgspec.json.Decoder(AnyReport)


def decode(payload: bytes) -> AnyReport:
    """Decode a report. Raises msgspec.ValidationError naming the field at fault."""
    return _DECODER.decode(payload)
