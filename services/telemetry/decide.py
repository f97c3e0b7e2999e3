"""What telemetry makes of reports: pure rules.

`fold_view` is a join: whatever the order in which reports arrive, and however often, the view is the same. Within one
incarnation the host's own `seq` says which report of a kind is the newest; between incarnations the broker's stamps do.
So that an incarnation that only seemed older is not lost, the last few are kept beside the current one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final, NamedTuple, TypeVar

import msgspec

from loopback.contracts.reports import AnyReport, Heartbeat, Inventory, ModuleStatus, Status
from loopback.contracts.view import HostView, IncarnationView, RunView

KEPT_INCARNATIONS: Final = 4  # a host makes a new one only with empty state; more than this is not reordering
KEPT_RUNS: Final = 4  # of the agent; two that speak at once are always among the newest
MAX_MODULE_METRICS: Final = 64  # names per module over the fleet; further ones are not shown
_METRIC_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,99}")


def fold_view(view: HostView | None, report: AnyReport, at: datetime) -> HostView | None:
    """The view after a verified report that the broker stamped `at`, or None where it says nothing new.

    A lost host is back once something arrives that was stamped after its loss.
    """
    known = {i.id: i for i in (view.current, *view.earlier)} if view else {}
    before = known.get(report.incarnation)
    after = _heard(before, report, at)
    runs = _runs(view.runs if view else (), report, at)
    if view is not None and after == before and runs == view.runs:
        return None
    known[report.incarnation] = after
    newest, *rest = sorted(known.values(), key=lambda i: (i.last_at, i.id), reverse=True)[:KEPT_INCARNATIONS]
    lost_at = view.lost_at if view and view.lost_at and newest.last_at <= view.lost_at else None
    folded = HostView(
        host=report.host,
        workspace=report.workspace,
        current=newest,
        earlier=tuple(rest),
        lost_at=lost_at,
        runs=runs,
    )
    return None if folded == view else folded


def _runs(known: tuple[RunView, ...], report: AnyReport, at: datetime) -> tuple[RunView, ...]:
    """The agent's runs with this heartbeat in them: each from its first to its last, in whatever order they come."""
    if not isinstance(report, Heartbeat) or not report.run:
        return known
    found = {run.id: run for run in known}
    before = found.get(report.run)
    found[report.run] = RunView(
        id=report.run,
        incarnation=report.incarnation,
        first_at=min(before.first_at, at) if before else at,
        last_at=max(before.last_at, at) if before else at,
    )
    newest = sorted(found.values(), key=lambda run: (run.last_at, run.id), reverse=True)
    return tuple(newest[:KEPT_RUNS])


def _heard(before: IncarnationView | None, report: AnyReport, at: datetime) -> IncarnationView:
    before = before or IncarnationView(id=report.incarnation, last_at=at)
    last_at = max(before.last_at, at)
    match report:
        case Inventory():
            return msgspec.structs.replace(
                before, last_at=last_at, inventory=_newer(before.inventory, report)
            )
        case Status():
            return msgspec.structs.replace(before, last_at=last_at, status=_newer(before.status, report))
        case Heartbeat():
            return msgspec.structs.replace(
                before, last_at=last_at, heartbeat=_newer(before.heartbeat, report)
            )


_Report = TypeVar("_Report", Inventory, Status, Heartbeat)


def _newer(known: _Report | None, report: _Report) -> _Report:
    """The report with the higher `seq`; a host that says two things under one is taken at the greater bytes."""
    if known is None or report.seq > known.seq:
        return report
    if report.seq == known.seq and msgspec.json.encode(report) > msgspec.json.encode(known):
        return report
    return known


def mark_lost(view: HostView, now: datetime) -> HostView | None:
    """The view of a host whose silence has become loss by `now`, or None where it has not, or was already lost."""
    if view.lost_at is not None or now < view.lost_after:
        return None
    return msgspec.structs.replace(view, lost_at=now)


def next_deadline(views: Iterable[HostView]) -> datetime | None:
    """When the next host would become lost, if nothing more is heard; None where every one is lost or none is known."""
    return min((v.lost_after for v in views if v.lost_at is None), default=None)


def changed_phases(before: HostView | None, after: HostView, report: AnyReport) -> tuple[ModuleStatus, ...]:
    """The modules that a status moved to another phase of a rollout: what belongs into that rollout's trace."""
    if not isinstance(report, Status) or after.status != report:
        return ()
    known = {m.module: (m.rollout, m.generation, m.phase) for m in before.modules} if before else {}
    return tuple(
        m for m in report.modules if m.rollout and known.get(m.module) != (m.rollout, m.generation, m.phase)
    )


class ModuleCount(NamedTuple):
    """What modules are counted by."""

    module: str
    version: str
    health: str
    enforcing: bool


class FleetFigures(NamedTuple):
    """The fleet in numbers: hosts by (workspace, state), modules, each module's metrics summed, cloned hosts by workspace."""

    hosts: Mapping[tuple[str, str], int]
    modules: Mapping[ModuleCount, int]
    metrics: Mapping[tuple[str, str], float]
    cloned: Mapping[str, int]


def figures(views: Iterable[HostView]) -> FleetFigures:
    """Count the fleet. No host's name is in the answer: it would make as many series as there are hosts.

    Lost hosts count as lost, not with what they ran last, since nobody knows what they run now.
    """
    hosts: dict[tuple[str, str], int] = {}
    modules: dict[ModuleCount, int] = {}
    metrics: dict[tuple[str, str], float] = {}
    names: dict[str, int] = {}
    cloned: dict[str, int] = {}
    for view in views:
        if view.cloned:
            cloned[view.workspace] = cloned.get(view.workspace, 0) + 1
        place = (view.workspace, view.state)
        hosts[place] = hosts.get(place, 0) + 1
        if view.lost_at is not None:
            continue
        for module in view.modules:
            version = module.promoted.version if module.promoted else "none"
            count = ModuleCount(module.module, version, module.health, module.enforcing)
            modules[count] = modules.get(count, 0) + 1
            for name, value in module.metrics.items():
                key = (module.module, name)
                if key not in metrics:
                    if not _METRIC_NAME.fullmatch(name) or names.get(module.module, 0) >= MAX_MODULE_METRICS:
                        continue
                    names[module.module] = names.get(module.module, 0) + 1
                metrics[key] = metrics.get(key, 0.0) + value
    return FleetFigures(hosts, modules, metrics, cloned)
