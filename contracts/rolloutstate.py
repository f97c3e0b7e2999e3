"""What a workspace's rollouts are, as folded from their journals by `rolloutfold.fold`.

These are the only mutable values in contracts: a fold over a large fleet cannot copy its state at every link. Nobody but
`rolloutfold` changes them.
"""

from __future__ import annotations

from collections import Counter, deque
from datetime import datetime
from enum import StrEnum
from typing import Final

import msgspec

from loopback.contracts import journal
from loopback.contracts.codes import Refusal
from loopback.contracts.desired import Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.messages import RolloutStart, Verdict
from loopback.contracts.reports import Phase
from loopback.contracts.roster import Source


class State(StrEnum):
    """Where a rollout is."""

    DRAFT = "DRAFT"  # created; eligibility and delivery have not both spoken
    AWAITING_APPROVAL = "AWAITING_APPROVAL"  # created; another operator has to sign it too
    READY = "READY"  # both have; its time may not have come
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    HALTED = "HALTED"
    ROLLING_BACK = "ROLLING_BACK"
    DONE = "DONE"
    ROLLED_BACK = "ROLLED_BACK"
    ROLLBACK_INCOMPLETE = "ROLLBACK_INCOMPLETE"
    CANCELED = "CANCELED"


#: States in which a rollout has ended.
FINAL: Final = frozenset({State.DONE, State.ROLLED_BACK, State.ROLLBACK_INCOMPLETE, State.CANCELED})
#: States in which nobody else may roll the same module out to its hosts.
HOLDING: Final = frozenset(
    {State.DRAFT, State.AWAITING_APPROVAL, State.READY, State.RUNNING, State.PAUSED, State.ROLLING_BACK}
)


#: So often an agent may come back without its disk in one rollout and be told again; with the next time the host has failed.
MAX_REBIRTHS: Final = 3
#: So often in one rollout a host that turns out to stand above what it was told is told again at once.
MAX_OVERTAKEN: Final = 3
#: Earlier incarnations of a host that are remembered, so that a late report of one is recognised.
MAX_PAST: Final = 16


class WaveState(StrEnum):
    """Where a wave is. The first wave of several is the canary while hosts change."""

    PENDING = "PENDING"
    CANARY = "CANARY"
    ACTIVE = "ACTIVE"
    SOAKING = "SOAKING"
    DONE = "DONE"
    FAILED = "FAILED"
    INCONCLUSIVE = "INCONCLUSIVE"
    ROLLED_BACK = "ROLLED_BACK"


class Standing(StrEnum):
    """Where one host is in a rollout."""

    PENDING = "pending"
    ASSIGNED = "assigned"  # in flight
    PROMOTED = "promoted"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    RETURNING = "returning"
    RETURNED = "returned"
    STRANDED = "stranded"  # told to return, not heard of in time


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What a host was last told about one module."""

    module: str
    running: Running | None
    generation: int
    rollout: str
    expected: Running | None
    not_after: datetime
    returning: bool = False


class ModuleLedger:
    """One module on one host over all rollouts: what it was last told, and what was last journaled of what it said.

    `seq` and `incarnation` are those of the report behind the last observation of this module: one report speaks of several
    modules, and each of them is journaled in its own rollout.
    """

    __slots__ = ("entry", "incarnation", "promoted", "seq")

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.promoted: Running | None = None
        self.incarnation = ""
        self.seq = 0


class HostLedger:
    """One host over all rollouts of the workspace. `past` are the last incarnations that another one has followed."""

    __slots__ = ("generation", "incarnation", "modules", "past")

    def __init__(self) -> None:
        self.generation = 0
        self.incarnation = ""
        self.past: dict[str, None] = {}
        self.modules: dict[str, ModuleLedger] = {}

    def module(self, name: str) -> ModuleLedger:
        """The module's ledger, made when missing."""
        found = self.modules.get(name)
        if found is None:
            found = self.modules[name] = ModuleLedger()
        return found

    def retire(self, incarnation: str) -> None:
        """Another incarnation followed this one."""
        self.past[incarnation] = None
        while len(self.past) > MAX_PAST:
            del self.past[next(iter(self.past))]


class HostProgress:
    """One host in one rollout. `origin` is what it had promoted before, `generation` 0 until it is assigned.

    `refusal` is what it said last; `failure` why it failed or was inconclusive, kept as evidence after it returned.
    `rebirths` counts how often it came back as a new incarnation, `overtaken` how often it stood above what it was told.
    """

    __slots__ = (
        "enforcing", "failure", "generation", "health", "host", "incarnation", "observations", "origin", "overtaken", "phase",
        "promoted", "rebirths", "refusal", "retries", "since", "standing", "wave",
    )  # fmt: skip

    def __init__(self, host: str, wave: int, since: datetime) -> None:
        self.host = host
        self.wave = wave
        self.since = since
        self.standing = Standing.PENDING
        self.generation = 0
        self.origin: Running | None = None
        self.retries = 0
        self.observations = 0
        self.rebirths = 0
        self.overtaken = 0
        self.phase: Phase | None = None
        self.promoted: Running | None = None
        self.health: journal.Health = "unknown"
        self.enforcing = False
        self.incarnation = ""
        self.refusal: Refusal | None = None
        self.failure: Refusal | None = None

    @property
    def fresh(self) -> bool:
        """Whether it still waits for its first turn."""
        return self.standing is Standing.PENDING and self.generation == 0


class WaveProgress:
    """One wave: its hosts in order, how many stand where, and which is next."""

    __slots__ = ("counts", "hosts", "name", "next", "soak_s", "state", "until")

    def __init__(self, planned: journal.PlannedWave) -> None:
        self.name = planned.name
        self.hosts = planned.hosts
        self.soak_s = planned.soak_s
        self.state = WaveState.PENDING
        self.until: datetime | None = None
        self.next = 0
        self.counts: Counter[Standing] = Counter({Standing.PENDING: len(planned.hosts)})

    @property
    def answered(self) -> int:
        """How many hosts gave an answer that counts, good or bad."""
        return self.counts[Standing.PROMOTED] + self.counts[Standing.FAILED]

    @property
    def open(self) -> int:
        """How many are still to answer."""
        return self.counts[Standing.PENDING] + self.counts[Standing.ASSIGNED]


class Rollout:
    """One rollout. `head` and `seq` are the chain's end; `broken` says why its journal is not to be believed."""

    def __init__(self, link: journal.Link, created: journal.Created) -> None:
        self.id = link.rollout
        self.workspace = link.workspace
        self.created = created
        self.start: RolloutStart = created.start()
        self.created_at = link.at
        self.updated_at = link.at
        self.ended_at: datetime | None = None
        self.state = State.AWAITING_APPROVAL if created.approvals_needed else State.DRAFT
        self.approvals: tuple[Envelope, ...] = ()
        self.approved_by: dict[str, None] = {}  # the names of operators, in order
        self.seq = 0
        self.head = ""
        self.broken = ""
        self.members = frozenset(m.host for m in created.members)
        self.verdicts: dict[str, Verdict] = {}
        self.waves: list[WaveProgress] = []
        self.current = -1
        self.hosts: dict[str, HostProgress] = {}
        self.skipped: dict[str, Refusal] = {}
        self.counts: Counter[Standing] = Counter()
        self.again: dict[str, None] = {}  # hosts to be asked once more, in order
        self.deadlines: deque[tuple[datetime, str, int]] = deque()
        self.returns: tuple[str, ...] = ()  # whom a rollback takes back
        self.to_return: dict[str, None] = {}  # those of them who were not told yet, in order
        self.abort: Envelope | None = (
            None  # the operator's command, where it was one that took the hosts back
        )
        self.return_until = self.start.scope.not_after  # WAY_BACK later hosts no longer return
        self.refusal: Refusal | None = None
        self.reason = ""
        self.by: tuple[str, ...] = ()

    @property
    def in_flight(self) -> int:
        """Hosts that were assigned and have not answered."""
        return self.counts[Standing.ASSIGNED]

    @property
    def judged(self) -> bool:
        """Whether eligibility and delivery have both spoken."""
        return {"eligibility", "delivery"} <= self.verdicts.keys()

    @property
    def wave(self) -> WaveProgress | None:
        """The wave that runs."""
        return self.waves[self.current] if 0 <= self.current < len(self.waves) else None

    @property
    def attention(self) -> bool:
        """Whether there may be something to decide."""
        if self.broken:
            return False
        return self.state in HOLDING or (self.state is State.DONE and bool(self.again))

    @property
    def trace_id(self) -> str:
        """The trace of the whole rollout, 32 hex digits, or empty."""
        parts = self.created.traceparent.split("-")
        return parts[1] if len(parts) == 4 else ""

    def move(self, progress: HostProgress, standing: Standing, at: datetime) -> None:
        """Put a host elsewhere, and keep the counts."""
        if progress.standing is standing:
            return
        for counts in (self.counts, self.waves[progress.wave].counts):
            counts[progress.standing] -= 1
            counts[standing] += 1
        progress.standing = standing
        progress.since = at


class Workspace:
    """Every rollout of a workspace and every host that one of them touched."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rollouts: dict[str, Rollout] = {}
        self.hosts: dict[str, HostLedger] = {}
        self.attention: dict[str, None] = {}  # rollouts in which something may be to decide
        self.serials: dict[str, tuple[int, str]] = {}  # module → last policy serial in use, and its digest
        self.sources: dict[str, Source] = {}  # what fills sets of policies that were ever accepted, by key
        self.links = 0  # so many links are in `head`, the workspace's chain (see `journal.chained`)
        self.head = ""

    def ledger(self, host: str) -> HostLedger:
        """The host's ledger, made when missing."""
        found = self.hosts.get(host)
        if found is None:
            found = self.hosts[host] = HostLedger()
        return found

    def owns(self, rollout: Rollout, host: str) -> bool:
        """Whether what the host was last told of the module comes from this rollout."""
        ledger = self.hosts.get(host)
        found = ledger.modules.get(rollout.created.module) if ledger else None
        return found is not None and found.entry is not None and found.entry.rollout == rollout.id
