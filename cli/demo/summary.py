"""What the demo counted, as it is written to summary.json. Every figure is taken from what happened."""

from __future__ import annotations

import msgspec


class HostLine(msgspec.Struct):
    """One host at the end."""

    id: str
    kernel: str = ""
    module: str = ""
    version: str = ""
    policy: str = ""
    generation: int = 0
    enforcing: bool = False


class Traffic(msgspec.Struct):
    """Connections and exchanges that should have passed, and that should not."""

    allowed_ok: int = 0
    allowed_failed: int = 0
    denied_blocked: int = 0
    denied_leaked: int = 0


class Swap(msgspec.Struct):
    """Packets sent, and those accepted that only a mixture of two policies accepts, while policies were committed."""

    packets: int = 0
    commits: int = 0
    mixed_verdicts: int = 0


class WaveLine(msgspec.Struct):
    """One wave of a rollout."""

    name: str
    state: str
    hosts: list[str]


class RolloutLine(msgspec.Struct):
    """One rollout as its journal tells it."""

    id: str
    module: str
    version: str
    state: str
    waves: list[WaveLine]
    trace_id: str


class Crash(msgspec.Struct):
    """Denied packets sent while agent and module were dead, those that arrived, and whether the restart adopted."""

    packets_sent: int = 0
    leaked: int = 0
    adopted: bool = False


class Trace(msgspec.Struct):
    """The first rollout's trace."""

    spans: int = 0
    services: list[str] = []
    hosts: list[str] = []


class Summary(msgspec.Struct):
    """build/demo/summary.json."""

    hosts: list[HostLine] = []
    traffic: Traffic = msgspec.field(default_factory=Traffic)
    swap: Swap = msgspec.field(default_factory=Swap)
    rollouts: list[RolloutLine] = []
    crash: Crash = msgspec.field(default_factory=Crash)
    trace: Trace = msgspec.field(default_factory=Trace)
    residue: list[str] = []
    duration_s: float = 0.0
    enforcement: str = "kernel"
