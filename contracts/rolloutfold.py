"""How a workspace's state follows from its links: `fold(workspace, link bytes)`.

Everybody who folds the same links has the same state: activation's replicas decide on it (`services/activation/decide.py`),
the command line shows it. It only records what links say; what should happen next is not its business.
One link costs time in proportion to the hosts it names, never to the fleet; repeated links change no rollout.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

from loopback.contracts import journal
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import MAX_LEARNT_GENERATION, Running
from loopback.contracts.journal import Observation
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutstate import (
    FINAL,
    MAX_OVERTAKEN,
    MAX_REBIRTHS,
    Entry,
    HostProgress,
    Rollout,
    Standing,
    State,
    WaveProgress,
    WaveState,
    Workspace,
)  # fmt: skip

_FAILURES: Final = frozenset(
    {Phase.ROLLED_BACK, Phase.ROLLBACK_FAILED, Phase.REJECTED, Phase.QUARANTINED, Phase.LOOP_ABORTED}
)
_FINISHED: Final = _FAILURES - {Phase.ROLLBACK_FAILED} | {Phase.PROMOTED, Phase.REMOVED, Phase.UNCONFIRMED}
_UNWELL: Final = frozenset({"degraded", "failed"})
_ASKING: Final = frozenset(
    {State.RUNNING, State.PAUSED, State.DONE}
)  # where a host may be told the same again


def fold(workspace: Workspace, data: bytes) -> journal.Link | None:
    """Take in the next link; None for one that was already there or that does not continue its chain.

    Raises msgspec.ValidationError for bytes that are no link. A rollout whose chain is broken stays as it was and is
    marked `broken`: nobody decides on it any more. So is one with a link that speaks of what there is not.
    The workspace's own chain takes in whatever is stored among the links, be it a good link or not.
    """
    digest = journal.digest(data)
    workspace.links += 1
    workspace.head = journal.chained(workspace.head, digest)
    link = journal.decode(data)
    rollout = workspace.rollouts.get(link.rollout)
    if rollout is None:
        if not isinstance(link.event, journal.Created):
            return None
        try:
            rollout = workspace.rollouts[link.rollout] = Rollout(link, link.event)
        except Refused as refused:
            raise msgspec.ValidationError(refused.reason) from None
    if link.seq <= rollout.seq or rollout.broken:
        return None
    if link.seq != rollout.seq + 1 or link.prev != rollout.head or link.workspace != workspace.name:
        rollout.broken = f"link {link.seq} does not continue link {rollout.seq}"
        workspace.attention.pop(rollout.id, None)
        return None
    rollout.seq = link.seq
    rollout.head = digest
    rollout.updated_at = link.at
    try:
        _apply(workspace, rollout, link.event, link.at)
        while rollout.deadlines and _stale(rollout, rollout.deadlines[0]):
            rollout.deadlines.popleft()
    except Exception as error:  # whatever one link does, the other rollouts of the workspace go on
        rollout.broken = f"link {link.seq} cannot follow: {type(error).__name__}: {error}"
        workspace.attention.pop(rollout.id, None)
        return None
    if rollout.state in FINAL and rollout.ended_at is None:
        rollout.ended_at = link.at
    if rollout.attention:
        workspace.attention[rollout.id] = None
    else:
        workspace.attention.pop(rollout.id, None)
    return link


def entry_for(rollout: Rollout, event: journal.Assigned, assignment: journal.Assignment) -> Entry:
    """What an assignment tells its host."""
    running = rollout.created.target
    if event.returning:
        running = rollout.hosts[assignment.host].origin
    return Entry(
        module=rollout.created.module,
        running=running,
        generation=assignment.generation,
        rollout=rollout.id,
        expected=assignment.expected,
        not_after=event.not_after,
        returning=event.returning,
    )


def _stale(rollout: Rollout, due: tuple[datetime, str, int]) -> bool:
    progress = rollout.hosts[due[1]]
    return progress.generation != due[2] or progress.standing not in (Standing.ASSIGNED, Standing.RETURNING)


def _apply(workspace: Workspace, rollout: Rollout, event: journal.AnyEvent, at: datetime) -> None:
    match event:
        case journal.VerdictGiven(verdict=verdict):
            rollout.verdicts[verdict.service] = verdict
            if verdict.service == "eligibility":
                rollout.skipped = {h: why for h, why in verdict.refused.items() if h in rollout.members}
            if rollout.state is State.DRAFT and rollout.judged:
                rollout.state = State.READY
        case journal.Approved(envelope=approval, operators=by):
            rollout.approvals += (approval,)
            rollout.approved_by |= dict.fromkeys(by)
            enough = len(rollout.approved_by) >= rollout.created.approvals_needed
            if rollout.state is State.AWAITING_APPROVAL and enough:
                rollout.state = State.READY if rollout.judged else State.DRAFT
        case journal.Started():
            _started(workspace, rollout, event, at)
        case journal.WaveStarted(wave=index):
            rollout.current = index
            canary = index == 0 and len(rollout.waves) > 1
            rollout.waves[index].state = WaveState.CANARY if canary else WaveState.ACTIVE
        case journal.Assigned():
            for assignment in event.hosts:
                _assign(workspace, rollout, event, assignment, at)
        case journal.Observed(hosts=observations):
            for observation in observations:
                _observe(workspace, rollout, observation, at)
        case journal.PresenceSeen(lost=lost):
            for host in lost:
                _lost(rollout, host, at)
        case journal.Expired(hosts=hosts, refusal=refusal):
            for host in hosts:
                _expire(rollout, host, refusal, at)
        case journal.WaveSoaking(wave=index, until=until):
            rollout.waves[index].state = WaveState.SOAKING
            rollout.waves[index].until = until
        case journal.WaveDone(wave=index):
            rollout.waves[index].state = WaveState.DONE
        case journal.WaveFailed(wave=index):
            rollout.waves[index].state = WaveState.FAILED
        case journal.WaveInconclusive(wave=index):
            rollout.waves[index].state = WaveState.INCONCLUSIVE
        case journal.Paused(reason=reason, operators=by):
            rollout.state, rollout.reason, rollout.by = State.PAUSED, reason, by
        case journal.Resumed(reason=reason, operators=by):
            _resumed(rollout, at)
            rollout.reason, rollout.by = reason, by
        case journal.Halted(refusal=refusal):
            rollout.state, rollout.refusal, rollout.reason = State.HALTED, refusal, refusal.reason
        case journal.RollingBack(reason=reason, operators=by, envelope=abort):
            rollout.state, rollout.reason, rollout.by = State.ROLLING_BACK, reason, by
            rollout.abort = abort
            if (asked := event.asked_at()) is not None:
                rollout.return_until = max(rollout.return_until, asked)
            rollout.again.clear()
            rollout.returns = tuple(
                h for h, p in rollout.hosts.items() if p.generation and workspace.owns(rollout, h)
            )
            rollout.to_return = dict.fromkeys(rollout.returns)
        case journal.Done():
            rollout.state = State.DONE
        case journal.RolledBack() | journal.RollbackIncomplete():
            complete = isinstance(event, journal.RolledBack)
            rollout.state = State.ROLLED_BACK if complete else State.ROLLBACK_INCOMPLETE
            rollout.to_return.clear()
            rollout.again.clear()
            if isinstance(event, journal.RollbackIncomplete):
                for host in event.hosts:
                    rollout.move(rollout.hosts[host], Standing.STRANDED, at)
            for wave in rollout.waves:
                if wave.state not in (WaveState.PENDING, WaveState.FAILED):
                    wave.state = WaveState.ROLLED_BACK
        case journal.Canceled(reason=reason, operators=by):
            rollout.state, rollout.reason, rollout.by = State.CANCELED, reason, by
        case journal.RolloutRefused(refusal=refusal):
            rollout.state, rollout.refusal, rollout.reason = State.CANCELED, refusal, refusal.reason
        case journal.Created(sources=sources):
            workspace.sources |= {source.key: source for source in sources}


def _started(workspace: Workspace, rollout: Rollout, event: journal.Started, at: datetime) -> None:
    rollout.state = State.RUNNING
    rollout.waves = [WaveProgress(planned) for planned in event.waves]
    for index, wave in enumerate(rollout.waves):
        for host in wave.hosts:
            rollout.hosts[host] = HostProgress(host, index, at)
    rollout.counts[Standing.PENDING] = len(rollout.hosts)
    if rollout.created.policy is not None:
        workspace.serials[rollout.created.module] = (rollout.created.policy_serial, rollout.created.policy)


def _assign(
    workspace: Workspace, rollout: Rollout, event: journal.Assigned, assignment: journal.Assignment, at: datetime
) -> None:  # fmt: skip
    progress = rollout.hosts[assignment.host]
    ledger = workspace.ledger(assignment.host)
    entry = entry_for(rollout, event, assignment)
    ledger.generation = assignment.generation
    ledger.module(entry.module).entry = entry
    progress.generation = assignment.generation
    progress.observations = 0
    if event.returning:
        if progress.standing is not Standing.RETURNING:
            progress.retries = 0
        rollout.to_return.pop(assignment.host, None)
        rollout.again.pop(assignment.host, None)
        rollout.move(progress, Standing.RETURNING, at)
    else:
        progress.origin = assignment.expected
        rollout.move(progress, Standing.ASSIGNED, at)
        _unqueue(rollout, progress)
    rollout.deadlines.append((event.not_after, assignment.host, assignment.generation))


def _unqueue(rollout: Rollout, progress: HostProgress) -> None:
    rollout.again.pop(progress.host, None)
    wave = rollout.waves[progress.wave]
    while wave.next < len(wave.hosts) and not rollout.hosts[wave.hosts[wave.next]].fresh:
        wave.next += 1


def _once_more(rollout: Rollout, progress: HostProgress, at: datetime) -> None:
    if progress.standing is not Standing.RETURNING:
        rollout.move(progress, Standing.PENDING, at)
    if (
        progress.host not in rollout.to_return
    ):  # it will be told to return anyway, and must not be told twice at once
        rollout.again[progress.host] = None


def _observe(workspace: Workspace, rollout: Rollout, seen: Observation, at: datetime) -> None:
    ledger = workspace.ledger(seen.host)
    module = ledger.module(rollout.created.module)
    reborn = bool(module.incarnation and seen.incarnation and seen.incarnation != module.incarnation)
    if reborn:
        ledger.retire(module.incarnation)
    ledger.incarnation = module.incarnation = seen.incarnation or module.incarnation
    module.seq = seen.seq if reborn else max(module.seq, seen.seq)
    # It obeyed a document that no link speaks of: one with activation's key, but not by way of this journal.
    overtaken = 0 < seen.document <= MAX_LEARNT_GENERATION and ledger.generation <= seen.document
    if overtaken:
        ledger.generation = seen.document
    module.promoted = seen.promoted
    progress = rollout.hosts.get(seen.host)
    if progress is None:
        return
    progress.observations += 1
    progress.rebirths += reborn
    progress.phase, progress.promoted, progress.health = seen.phase, seen.promoted, seen.health
    progress.refusal, progress.enforcing = seen.refusal, seen.enforcing
    progress.incarnation = seen.incarnation or progress.incarnation
    if not workspace.owns(rollout, seen.host):
        return
    if reborn and progress.rebirths > MAX_REBIRTHS:
        _give_up(rollout, progress, at)
    elif reborn and progress.standing in (Standing.ASSIGNED, Standing.PROMOTED):
        # An agent that lost its disk starts from nothing: what it was told names an incarnation that is gone.
        if rollout.state in _ASKING:
            _once_more(rollout, progress, at)
    elif seen.generation == progress.generation:
        _answer(rollout, progress, seen, at)
    elif overtaken and progress.overtaken < MAX_OVERTAKEN:
        progress.overtaken += 1
        forward = progress.standing is Standing.ASSIGNED and rollout.state in _ASKING
        if forward or (progress.standing is Standing.RETURNING and rollout.state is State.ROLLING_BACK):
            _once_more(rollout, progress, at)  # it takes what it was told for old


def _give_up(rollout: Rollout, progress: HostProgress, at: datetime) -> None:
    """A host that loses its disk again and again keeps nothing that it is told."""
    before = progress.standing
    if (
        before in (Standing.FAILED, Standing.RETURNED, Standing.STRANDED)
        or progress.host in rollout.to_return
    ):
        return
    rollout.move(progress, Standing.STRANDED if before is Standing.RETURNING else Standing.FAILED, at)
    _unqueue(rollout, progress)
    progress.failure = Refusal(
        Code.HOST_INCARNATION,
        f"its agent came back {progress.rebirths} times without what it had stored",
        "find out what empties its state folder; then start a new rollout",
    )


def _answer(rollout: Rollout, progress: HostProgress, seen: Observation, at: datetime) -> None:
    mismatch = (
        seen.phase is Phase.REJECTED and seen.refusal is not None and seen.refusal.code is Code.HOST_EXPECTED
    )
    if mismatch and progress.retries == 0 and progress.standing in (Standing.ASSIGNED, Standing.RETURNING):
        # It said what it really has, so it is asked once more on that ground.
        progress.retries += 1
        _once_more(rollout, progress, at)
        return
    match progress.standing:
        case Standing.ASSIGNED:
            standing = _judge(seen, rollout.created.target)
            if standing is not None:
                rollout.move(progress, standing, at)
                progress.failure = _why(seen) if standing is not Standing.PROMOTED else None
        case Standing.PROMOTED if rollout.state is not State.DONE:
            if _judge(seen, rollout.created.target) is Standing.FAILED:
                rollout.move(progress, Standing.FAILED, at)
                progress.failure = _why(seen)
        case Standing.RETURNING | Standing.STRANDED:
            # Back is who finished with the entry and runs what it came from, by whichever way.
            if seen.phase in _FINISHED and seen.promoted == progress.origin:
                rollout.move(progress, Standing.RETURNED, at)
            elif seen.phase in _FAILURES:
                rollout.move(progress, Standing.STRANDED, at)
        case _:
            pass


def _why(seen: Observation) -> Refusal:
    return seen.refusal or Refusal(Code.MODULE_UNHEALTHY, f"it reported {seen.phase} and {seen.health}")


def _judge(seen: Observation, target: Running | None) -> Standing | None:
    """What an answer makes of an assigned host; None while it works."""
    if seen.phase is Phase.UNCONFIRMED:
        return Standing.INCONCLUSIVE
    if seen.phase is Phase.REJECTED and seen.refusal and seen.refusal.code is Code.ROLLOUT_UNAPPROVED:
        return Standing.INCONCLUSIVE  # nothing was tried: it waits for a person, as the host does
    if seen.phase in _FAILURES:
        return Standing.FAILED
    if seen.phase in (Phase.PROMOTED, Phase.REMOVED):
        # Success is claimed by running exactly the target and being well, not by the name of the phase.
        good = seen.promoted == target and seen.health not in _UNWELL
        return Standing.PROMOTED if good else Standing.FAILED
    return None


def _lost(rollout: Rollout, host: str, at: datetime) -> None:
    progress = rollout.hosts.get(host)
    if progress is None or rollout.state not in (State.RUNNING, State.PAUSED):
        return
    watched = rollout.waves[progress.wave].state is not WaveState.DONE
    if progress.standing is Standing.ASSIGNED or (progress.standing is Standing.PROMOTED and watched):
        progress.failure = Refusal(
            Code.HOST_LOST, "it vanished during the rollout", "see 'loopback host show' for its last word"
        )
        rollout.move(progress, Standing.FAILED, at)


def _expire(rollout: Rollout, host: str, refusal: Refusal, at: datetime) -> None:
    progress = rollout.hosts[host]
    if rollout.state is State.ROLLING_BACK and (
        progress.standing is Standing.RETURNING or refusal.code is Code.ELIGIBILITY_NO_RECORD
    ):
        rollout.to_return.pop(host, None)
        rollout.again.pop(host, None)
        rollout.move(progress, Standing.STRANDED, at)
        progress.failure = progress.failure or refusal
    elif progress.standing in (Standing.ASSIGNED, Standing.PENDING):
        rollout.move(progress, Standing.FAILED, at)
        _unqueue(rollout, progress)
        progress.failure = refusal


def _resumed(rollout: Rollout, at: datetime) -> None:
    rollout.state = State.RUNNING
    wave = rollout.wave
    if wave is None or wave.state is not WaveState.INCONCLUSIVE:
        return
    canary = rollout.current == 0 and len(rollout.waves) > 1
    wave.state = WaveState.CANARY if canary else WaveState.ACTIVE
    for host in wave.hosts:
        if rollout.hosts[host].standing is Standing.INCONCLUSIVE:
            _once_more(rollout, rollout.hosts[host], at)
