"""Telemetry's view of one host, as it lies in the bucket LB_VIEW under `<workspace token>.<host token>`, in JSON.

It is made only of verified reports and the broker's stamps on them: the newest report of each kind, by the host's own
`seq`, of each of the last few incarnations. So neither late nor repeated nor reordered reports change what it says.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from loopback.contracts.decoding import Decoder
from loopback.contracts.reports import Heartbeat, Inventory, ModuleStatus, Status
from loopback.contracts.subjects import BUCKET_VIEW, token

STREAM: Final = f"KV_{BUCKET_VIEW}"
EVERY_SUBJECT: Final = f"$KV.{BUCKET_VIEW}.>"

DEFAULT_INTERVAL_S: Final = 15.0  # until the first heartbeat says how often it comes
MIN_INTERVAL_S: Final = 0.1
MAX_INTERVAL_S: Final = 300.0  # a host cannot hide its loss behind a claimed interval of years
LOST_AFTER: Final = 3  # heartbeats missed in a row
#: Two agents that spoke at once for longer than this are two machines. The last words of one that ended may be under way for
#: a moment while the next one begins.
OVERLAP: Final = timedelta(seconds=2)

State = Literal["ok", "degraded", "lost"]


class IncarnationView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one incarnation of a host said last. `last_at` is the broker's stamp on its newest report."""

    id: str
    last_at: datetime
    inventory: Inventory | None = None
    status: Status | None = None
    heartbeat: Heartbeat | None = None


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the agent: when, by the broker's clock, its first and its last heartbeat came."""

    id: str
    incarnation: str
    first_at: datetime
    last_at: datetime


class HostView(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="view", omit_defaults=True):
    """One host. `current` is the incarnation heard from last, `earlier` the ones before, newest first.

    `lost_at` is when, by the broker's clock, it was declared lost; None while it is there. `runs` are the last few runs of its
    agent, newest first.
    """

    host: str
    workspace: str
    current: IncarnationView
    earlier: tuple[IncarnationView, ...] = ()
    lost_at: datetime | None = None
    runs: tuple[RunView, ...] = ()

    @property
    def cloned(self) -> bool:
        """Whether two agents spoke at once under this host's key: its state and key are on two machines."""
        return any(
            min(a.last_at, b.last_at) - max(a.first_at, b.first_at) > OVERLAP
            for number, a in enumerate(self.runs)
            for b in self.runs[:number]
        )

    @property
    def inventory(self) -> Inventory | None:
        """What the host is, where it said so."""
        return self.current.inventory

    @property
    def status(self) -> Status | None:
        """What it runs, where it said so."""
        return self.current.status

    @property
    def modules(self) -> tuple[ModuleStatus, ...]:
        """Its modules, by its newest status."""
        return self.current.status.modules if self.current.status else ()

    @property
    def last_at(self) -> datetime:
        """The broker's stamp on its newest report."""
        return self.current.last_at

    @property
    def interval_s(self) -> float:
        """How often it says that it is there, in seconds, within sane bounds."""
        claimed = self.current.heartbeat.interval_s if self.current.heartbeat else DEFAULT_INTERVAL_S
        return min(max(claimed, MIN_INTERVAL_S), MAX_INTERVAL_S)

    @property
    def lost_after(self) -> datetime:
        """When silence becomes loss."""
        return self.last_at + timedelta(seconds=LOST_AFTER * self.interval_s)

    @property
    def state(self) -> State:
        """In one word."""
        if self.lost_at is not None:
            return "lost"
        said = [r for r in (self.current.status, self.current.heartbeat) if r is not None]
        newest = max(said, key=lambda r: r.seq, default=None)
        return newest.agent if newest else "ok"


_DECODER = Decoder(msgspec.json.Decoder(HostView))


def subject(workspace: str, host: str) -> str:
    """The stream subject behind the bucket's key of this host."""
    return f"$KV.{BUCKET_VIEW}.{token(workspace)}.{token(host)}"


def decode(data: bytes) -> HostView:
    """Decode a view. Raises msgspec.ValidationError naming the field at fault."""
    return _DECODER.decode(data)
