"""How rollouts look: as JSON for programs, as text for people, and as a live table on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loopback.cli import printing
from loopback.contracts import journal
from loopback.contracts.codes import Refusal
from loopback.contracts.desired import Running
from loopback.contracts.exposure import Exposure
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutstate import HostProgress, Rollout, Standing, State, WaveProgress, WaveState

_COLOURS = {
    State.AWAITING_APPROVAL: "yellow", State.DONE: "green", State.RUNNING: "cyan", State.PAUSED: "yellow", State.HALTED: "red",
    State.ROLLING_BACK: "yellow", State.ROLLED_BACK: "yellow", State.ROLLBACK_INCOMPLETE: "red", State.CANCELED: "red",
}  # fmt: skip


def summary(rollout: Rollout) -> dict[str, Any]:
    """One line of a listing, as values."""
    return {
        "rollout": rollout.id,
        "workspace": rollout.workspace,
        "module": rollout.created.module,
        "version": rollout.created.version or "absent",
        "state": str(rollout.state),
        "hosts": len(rollout.hosts) or len(rollout.members),
        "promoted": rollout.counts[Standing.PROMOTED],
        "failed": rollout.counts[Standing.FAILED],
        "started_by": list(rollout.created.operators),
        "approved_by": list(rollout.approved_by),
        "created_at": rollout.created_at,
        "ended_at": rollout.ended_at,
    }


def full(rollout: Rollout) -> dict[str, Any]:
    """Everything about one rollout, as values."""
    return {
        **summary(rollout),
        "reason": rollout.reason,
        "refusal": _refusal(rollout.refusal),
        "by": list(rollout.by),
        "operators": list(rollout.created.operators),
        "approvals": {"needed": rollout.created.approvals_needed, "by": list(rollout.approved_by)},
        "command": rollout.created.command,
        "package": rollout.created.package,
        "policy": rollout.created.policy,
        "policy_serial": rollout.created.policy_serial,
        "trace_id": rollout.trace_id,
        "journal": {"links": rollout.seq, "head": rollout.head, "broken": rollout.broken},
        "waves": [
            {
                "name": wave.name,
                "state": str(wave.state),
                "soak_s": wave.soak_s,
                "until": wave.until,
                "hosts": list(wave.hosts),
                "counts": {str(s): n for s, n in wave.counts.items() if n},
            }
            for wave in rollout.waves
        ],
        "host_states": {host: _host(progress) for host, progress in rollout.hosts.items()},
        "skipped": {host: _refusal(why) for host, why in rollout.skipped.items()},
    }


def _host(progress: HostProgress) -> dict[str, Any]:
    return {
        "standing": str(progress.standing),
        "generation": progress.generation,
        "phase": str(progress.phase) if progress.phase else None,
        "health": progress.health,
        "enforcing": progress.enforcing,
        "promoted": running(progress.promoted),
        "came_from": running(progress.origin),
        "refusal": _refusal(progress.refusal),
        "failure": _refusal(progress.failure),
        "since": progress.since,
    }


def _refusal(refusal: Refusal | None) -> dict[str, str] | None:
    if refusal is None:
        return None
    return {"code": str(refusal.code), "reason": refusal.reason, "next_step": refusal.next_step}


def running(found: Running | None) -> str | None:
    """A version and its policy in a few characters."""
    if found is None:
        return None
    return found.version + (f" policy {found.policy_serial}" if found.policy else "")


def words(rollout: Rollout) -> str:
    """A rollout for people: its state, its waves, and every host that is not simply promoted."""
    created = rollout.created
    what = f"{created.module} {created.version}" if created.package else f"{created.module} absent"
    lines = [f"{rollout.id}  {rollout.state}  {what}  by {', '.join(created.operators)}"]
    if rollout.approved_by:
        lines.append(f"  approved by {', '.join(rollout.approved_by)}")
    if rollout.state is State.AWAITING_APPROVAL:
        lines.append(f"  waits until {_until(rollout)} for another operator's approval")
        lines.append(f"  next: {approve_next(rollout)}")
    if rollout.broken:
        lines.append(f"  its journal is broken: {rollout.broken}")
    if rollout.reason:
        lines.append(f"  {rollout.reason}" + (f"  [{rollout.refusal.code}]" if rollout.refusal else ""))
    if rollout.refusal is not None and rollout.refusal.next_step:
        lines.append(f"  next: {rollout.refusal.next_step}")
    width = max((len(w.name) for w in rollout.waves), default=0)
    for wave in rollout.waves:
        lines.append(f"  {wave.name.ljust(width)}  {wave.state!s:<12} {_counts(wave)}")
    for host, progress in rollout.hosts.items():
        fine = progress.standing in (Standing.PENDING, Standing.PROMOTED, Standing.RETURNED)
        if fine and not progress.failure:
            continue
        why = f": {progress.failure.reason}  [{progress.failure.code}]" if progress.failure else ""
        phase = f" ({progress.phase})" if progress.phase else ""
        lines.append(f"    {host}  {progress.standing}{phase}{why}")
    for host, refusal in rollout.skipped.items():
        lines.append(f"    {host}  skipped: {refusal.reason}  [{refusal.code}]")
    if rollout.trace_id:
        lines.append(f"  trace {rollout.trace_id}")
    return "\n".join(map(printing.printable, lines))


def approve_next(rollout: Rollout) -> str:
    """The command that another operator has to run."""
    return f"loopback rollout approve {rollout.id} --workspace {rollout.workspace}"


def _until(rollout: Rollout) -> str:
    return rollout.start.scope.not_after.strftime("%Y-%m-%d %H:%M UTC")


def exposed(found: Iterable[Exposure]) -> list[str]:
    """What a signature permits, in lines."""
    items = list(found)
    lines = ["exposure: with this signature, whoever had activation's key could"]
    lines += [f"  + {item.says}  [{item.id}]" for item in items if item.can]
    lines.append("and could not")
    lines += [f"  - {item.says}  [{item.id}]" for item in items if not item.can]
    return lines


def _counts(wave: WaveProgress) -> str:
    found = [f"{n} {standing}" for standing, n in wave.counts.items() if n]
    return f"{len(wave.hosts)} hosts" + (f": {', '.join(found)}" if found else "")


#: What was said last of each host: its phase, and why it refused.
Shown = dict[str, tuple[Phase, str]]


def line(rollout: Rollout, link: journal.Link, shown: Shown) -> str:
    """One event for a plain log; empty for those that say nothing to a person, or nothing new. Keeps `shown`."""
    at = link.at.strftime("%H:%M:%S")
    return printing.printable(f"{at}  {said}") if (said := _said(rollout, link.event, shown)) else ""


def _observed(event: journal.Observed, shown: Shown) -> str:
    groups: dict[tuple[Phase, str], list[str]] = {}
    for seen in event.hosts:
        now = (seen.phase, _short(seen.refusal.reason) if seen.refusal else "")
        if shown.get(seen.host) != now:
            shown[seen.host] = now
            groups.setdefault(now, []).append(seen.host)
    return "; ".join(
        f"{_names(hosts)} {phase}" + (f": {why}" if why else "") for (phase, why), hosts in groups.items()
    )


def _short(reason: str, most: int = 160) -> str:
    return reason if len(reason) <= most else reason[: most - 1] + "…"


def _said(rollout: Rollout, event: journal.AnyEvent, shown: Shown) -> str:
    def wave(index: int) -> str:
        return f"wave {rollout.waves[index].name!r}"

    match event:
        case journal.Created():
            what = f"{event.module} {event.version or 'absent'}"
            waits = ", waits for another operator's approval" if event.approvals_needed else ""
            return f"created: {what} for {len(event.members)} hosts{_by(event.operators)}{waits}"
        case journal.Approved():
            return f"approved{_by(event.operators)}"
        case journal.VerdictGiven(verdict=verdict):
            against = f"no: {verdict.refusal.reason}" if verdict.refusal else "yes"
            some = f", but not for {len(verdict.refused)} hosts" if verdict.refused else ""
            return f"{verdict.service} says {against}{some}"
        case journal.Started():
            return f"started: {len(event.waves)} waves"
        case journal.WaveStarted(wave=index):
            return f"{wave(index)} begins: {_names(rollout.waves[index].hosts)}"
        case journal.Assigned(hosts=hosts, returning=returning):
            for assignment in hosts:
                shown.pop(assignment.host, None)  # the same phase again is another turn's
            return f"{'told to return' if returning else 'assigned'}: {_names([a.host for a in hosts])}"
        case journal.Observed():
            return _observed(event, shown)
        case journal.PresenceSeen(lost=lost):
            return f"lost: {_names(lost)}"
        case journal.Expired(hosts=hosts, refusal=refusal):
            return f"{_names(hosts)}: {refusal.reason}"
        case journal.WaveSoaking(wave=index, until=until):
            return f"{wave(index)} soaks until {until.strftime('%H:%M:%S')} UTC"
        case journal.WaveDone(wave=index):
            return f"{wave(index)} is done"
        case journal.WaveFailed(wave=index, failed=failed, answered=answered, allowed=allowed):
            return f"{wave(index)} failed: {failed} of {answered} answers, {allowed} may"
        case journal.WaveInconclusive(wave=index, inconclusive=count):
            return f"{wave(index)} is inconclusive: {count} hosts could not confirm"
        case journal.Paused(reason=reason, operators=by):
            return f"paused{_by(by)}: {reason}"
        case journal.Resumed(operators=by):
            return f"resumed{_by(by)}"
        case journal.Halted(refusal=refusal):
            return f"HALTED: {refusal.reason}"
        case journal.RollingBack(operators=by):
            return f"rolling back{_by(by)}"
        case journal.Done():
            return "DONE"
        case journal.RolledBack():
            return "ROLLED BACK: every updated host runs again what it came from"
        case journal.RollbackIncomplete(hosts=hosts):
            return f"ROLLBACK INCOMPLETE: not heard of: {_names(hosts)}"
        case journal.Canceled(reason=reason, operators=by):
            return f"CANCELED{_by(by)}: {reason}"
        case journal.RolloutRefused(refusal=refusal):
            return f"REFUSED: {refusal.reason}  [{refusal.code}]"


def _by(operators: tuple[str, ...]) -> str:
    return f" by {', '.join(operators)}" if operators else ""


def _names(hosts: Any, most: int = 4) -> str:
    found = list(hosts)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more if found else "no host"


def live(rollout: Rollout, recent: list[str], now: datetime) -> RenderableType:
    """The table that `watch` redraws on a terminal."""
    created = rollout.created
    title = Text.assemble(
        (rollout.id, "bold"), "  ", (str(rollout.state), _COLOURS.get(rollout.state, "cyan")),
        f"  {created.module} {created.version or 'absent'}",
    )  # fmt: skip
    table = Table(box=None, pad_edge=False, show_header=False)
    for wave in rollout.waves:
        done = len(wave.hosts) - wave.open
        soaking = wave.state is WaveState.SOAKING and wave.until is not None
        left = f" {max(0, int((wave.until - now).total_seconds()))} s left" if soaking and wave.until else ""
        table.add_row(
            f"  {wave.name}",
            ProgressBar(total=max(1, len(wave.hosts)), completed=done, width=24),
            f"{wave.state}{left}",
            _counts(wave),
        )
    return Group(title, table, *(Text("  " + said, style="dim") for said in recent[-6:]))
