"""What a host says of its modules: pure, from their states on disk and what is seen of their processes.

A module says as much as it likes; what is passed on of it has bounds, so that no module can silence its host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Final, Literal, Protocol

import msgspec

from loopback.contracts.abi import HealthReport
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.reports import MAX_BYTES, ModuleStatus, Phase, Status
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.host.floors import noncompliant
from loopback.host.state import ModuleState
from loopback.host.trial import unwell

Health = Literal["ok", "degraded", "failed", "unknown"]

_FAILURES: Final = frozenset(
    {Phase.ROLLED_BACK, Phase.ROLLBACK_FAILED, Phase.QUARANTINED, Phase.LOOP_ABORTED}
)


MAX_METRICS: Final = 256  # figures of one module: its totals and about a hundred rules
MAX_NAME: Final = 200  # characters of a figure's name


def bounded(metrics: Mapping[str, float]) -> dict[str, float]:
    """The first MAX_METRICS figures with a usable name and a finite value; modules name what matters most first."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if len(found) == MAX_METRICS:
            break
        if 0 < len(name) <= MAX_NAME and math.isfinite(value):
            found[name] = value
    return found


def fitted(report: Status) -> Status:
    """The report, small enough to be taken: without figures where it has too many, the largest modules' first."""
    most = MAX_BYTES["status"]
    while len(msgspec.json.encode(report)) > most:
        largest = max(report.modules, key=lambda m: len(m.metrics), default=None)
        if largest is None or not largest.metrics:
            break  # the reporter refuses it, and says so
        report = msgspec.structs.replace(
            report,
            modules=tuple(
                msgspec.structs.replace(m, metrics={}) if m is largest else m for m in report.modules
            ),
        )
    return report


class Seen(Protocol):
    """What is seen of a module's process; a Supervisor is one."""

    adopted: bool
    health: HealthReport | None
    problem: Refusal | None
    unfilled: Refusal | None
    metrics: dict[str, float]


def modules(
    states: Mapping[str, ModuleState], seen: Mapping[str, Seen], rules: WorkspaceRules, time: datetime
) -> tuple[ModuleStatus, ...]:
    """Every module that has a state, by name; `rules` are the workspace's, by the host's own trust document."""
    return tuple(
        msgspec.structs.replace(
            module(states[name], seen.get(name)), noncompliant=noncompliant(states[name], rules, time)
        )
        for name in sorted(states)
    )


def module(state: ModuleState, seen: Seen | None) -> ModuleStatus:
    """One module. Its refusal is the entry's own, or else why it is not well now."""
    report = seen.health if seen else None
    health: Health = report.state if report else "unknown"
    refusal = state.refusal
    if seen is not None and seen.problem is not None:
        health, refusal = "failed", refusal or seen.problem
    elif report is not None and report.state != "ok" and state.promoted is not None:
        refusal = refusal or unwell(report, state.promoted)
    elif seen is not None and seen.unfilled is not None and report is not None:
        health, refusal = "degraded", refusal or seen.unfilled
    return ModuleStatus(
        module=state.module,
        phase=state.phase,
        generation=state.generation,
        rollout=state.rollout,
        promoted=state.promoted,
        trial=state.trial.running if state.trial else None,
        health=health,
        enforcing=bool(report and report.enforcing),
        adopted=bool(seen and seen.adopted),
        refusal=refusal,
        metrics=dict(seen.metrics) if seen else {},
    )


def agent(found: tuple[ModuleStatus, ...]) -> Literal["ok", "degraded"]:
    """Degraded while a module is not well, or failed here and nothing runs in its place."""
    for one in found:
        hopeless = one.refusal is not None and one.refusal.code is Code.KERNEL_UNSUPPORTED
        nothing_instead = one.promoted is None and (one.phase in _FAILURES or hopeless)
        if one.health in ("degraded", "failed") or nothing_instead or one.phase is Phase.ROLLBACK_FAILED:
            return "degraded"
    return "ok"
