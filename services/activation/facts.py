"""Which of the things that hosts and other services say are worth a link in a rollout's journal.

Pure. Most reports change nothing that a decision could rest on; those stay out of the journal. What is a fact is judged
against the folded journal, so a report that is repeated, late or delivered to another replica is recognised everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from loopback.contracts import journal
from loopback.contracts.codes import Code
from loopback.contracts.desired import MAX_LEARNT_GENERATION
from loopback.contracts.journal import Observation
from loopback.contracts.messages import Presence, Verdict
from loopback.contracts.reports import FINAL, ModuleStatus, Phase, Status
from loopback.contracts.rolloutstate import (
    MAX_REBIRTHS,
    HostLedger,
    HostProgress,
    ModuleLedger,
    Standing,
    State,
    WaveState,
    Workspace,
)
from loopback.services.activation import sizes

MAX_OBSERVATIONS: Final = (
    100  # links' worth of one host per assignment: a host that flaps cannot flood the journal
)
_WORTH: Final = FINAL | {Phase.TRIAL, Phase.IDLE}
_UNWELL: Final = frozenset({"degraded", "failed"})


def observations(workspace: Workspace, status: Status) -> list[tuple[str, Observation]]:
    """What a verified status adds to the journals: (rollout id, observation) for each module that a rollout moved."""
    ledger = workspace.hosts.get(status.host)
    if ledger is None or status.incarnation in ledger.past:
        return []
    said = {m.module: sizes.report(m) for m in status.modules if m.module in ledger.modules}
    found = []
    for module, known in ledger.modules.items():
        incarnation = status.incarnation or known.incarnation
        if known.entry is None or (incarnation == known.incarnation and status.seq <= known.seq):
            continue
        reborn = bool(known.incarnation) and incarnation != known.incarnation
        rollout = workspace.rollouts[known.entry.rollout]
        progress = rollout.hosts.get(status.host)
        report = said.get(module)
        ahead = not reborn and _ahead(ledger, status)
        if report is None and (reborn or ahead):
            report = ModuleStatus(module=module, phase=Phase.IDLE, generation=0)
        if report is None or progress is None or rollout.broken:
            continue
        if reborn and progress.rebirths > MAX_REBIRTHS:
            continue  # that it fails is journaled; nothing that it says in this rollout matters any more
        flood = progress.observations >= MAX_OBSERVATIONS
        if reborn or (ahead and not flood) or _news(known, progress, report):
            found.append((rollout.id, _observation(status, report, status.generation if ahead else 0)))
    return found


def _ahead(ledger: HostLedger, status: Status) -> bool:
    """Whether the host obeyed a document that activation does not know of: above what it was told, or in its place."""
    taken = status.refusal is not None and status.refusal.code is Code.HOST_GENERATION
    lowest = ledger.generation if taken else ledger.generation + 1
    return lowest <= status.generation <= MAX_LEARNT_GENERATION


def _news(known: ModuleLedger, progress: HostProgress, report: ModuleStatus) -> bool:
    if progress.observations >= MAX_OBSERVATIONS:
        return False
    if report.promoted != known.promoted:
        return True
    if report.generation != progress.generation or report.phase not in _WORTH:
        return False
    code = report.refusal.code if report.refusal else None
    before = progress.refusal.code if progress.refusal else None
    if progress.observations == 0 or report.phase is not progress.phase or code != before:
        return True
    return (report.health in _UNWELL) != (
        progress.health in _UNWELL
    ) or report.enforcing != progress.enforcing


def _observation(status: Status, report: ModuleStatus, document: int) -> Observation:
    return Observation(
        host=status.host,
        phase=report.phase,
        generation=report.generation,
        incarnation=status.incarnation,
        seq=status.seq,
        promoted=report.promoted,
        health=report.health,
        enforcing=report.enforcing,
        refusal=report.refusal,
        document=document,
    )


def presence(workspace: Workspace, seen: Presence) -> list[str]:
    """The rollouts for which it matters that this host vanished or came back."""
    found = []
    for rollout_id in workspace.attention:
        rollout = workspace.rollouts[rollout_id]
        progress = rollout.hosts.get(seen.host)
        if progress is None or rollout.state not in (State.RUNNING, State.PAUSED):
            continue
        # As `rolloutfold` has it: what would change nothing is no news, or it would be news for ever.
        watched = rollout.waves[progress.wave].state is not WaveState.DONE
        counts = progress.standing is Standing.ASSIGNED or (
            progress.standing is Standing.PROMOTED and watched
        )
        if seen.lost and counts:
            found.append(rollout_id)
    return found


def verdict(workspace: Workspace, seen: Verdict) -> bool:
    """Whether a verdict is the first of its service for a rollout that waits for it."""
    rollout = workspace.rollouts.get(seen.rollout)
    return (
        rollout is not None
        and rollout.state in (State.DRAFT, State.AWAITING_APPROVAL)
        and not rollout.broken
        and seen.workspace == workspace.name
        and seen.service not in rollout.verdicts
    )


def events(
    workspace: Workspace, statuses: Iterable[Status], presences: Iterable[Presence], verdicts: Iterable[Verdict],
) -> Mapping[str, list[journal.AnyEvent]]:  # fmt: skip
    """The links for everything that came in: at most one of a kind per rollout. What is no news is left out.

    Of several statuses of one host the newest counts; a later call finds the earlier ones out of date.
    """
    seen: dict[str, dict[str, Observation]] = {}
    for status in statuses:
        for rollout_id, observation in observations(workspace, status):
            hosts = seen.setdefault(rollout_id, {})
            before = hosts.get(status.host)
            if (
                before is None
                or before.incarnation != observation.incarnation
                or before.seq < observation.seq
            ):
                hosts[status.host] = observation
    found: dict[str, list[journal.AnyEvent]] = {}
    for given in {(v.rollout, v.service): v for v in verdicts if verdict(workspace, v)}.values():
        found.setdefault(given.rollout, []).append(journal.VerdictGiven(verdict=given))
    for rollout_id, hosts in seen.items():
        found.setdefault(rollout_id, []).append(journal.Observed(hosts=tuple(hosts.values())))
    lost: dict[str, dict[str, bool]] = {}
    for change in presences:
        for rollout_id in presence(workspace, change):
            lost.setdefault(rollout_id, {})[change.host] = change.lost
    for rollout_id, changes in lost.items():
        gone = tuple(h for h, is_lost in changes.items() if is_lost)
        found.setdefault(rollout_id, []).append(journal.PresenceSeen(lost=gone))
    return found
