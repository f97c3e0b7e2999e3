"""What happens next in a rollout: `decide(workspace, rollout, now, recorded)`.

Pure: no clock, no randomness, no I/O. It looks only at the folded journal, so every replica decides alike, and after a kill
the next one goes on where the journal ends. It answers with the next few links; once they are folded it is asked again,
until it has nothing more to say. Rules:

1. Failed and vanished hosts both count against their wave, also after the wave is done, until the rollout ends.
2. A wave of errors is never complete: a wave that has hosts needs at least one success.
3. A host's deadline turns its silence into failure.
4. No verdict below the minimum sample (or the whole wave, where that is smaller).
5. At most `max_unavailable` of the hosts are in flight; one always may be.
6. An inconclusive answer is neither: where it decides, the rollout pauses for a person.
7. The way back is fast: it neither soaks nor waits for shares.
8. A scope that ends while hosts are still to be asked halts the rollout, also where `on_failure` is rollback: nothing
   failed, and the hosts that have the change keep it. Taking them back is for a person to say.
9. A rollout that returns when hosts no longer may is over; whoever has not returned is named.
10. A rollout that needs another operator's approval asks no host before it is there; a verdict against it ends it all the same.

Cost: in proportion to the hosts that change, not to the fleet.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from typing import Final

from loopback.contracts import journal, rolloutplan
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import WAY_BACK
from loopback.contracts.rolloutstate import (
    Rollout,
    Standing,
    State,
    WaveProgress,
    WaveState,
    Workspace,
)

BATCH_HOSTS: Final = (
    900  # hosts per decision: an atomic batch holds 1000 messages, one per host and the links
)
VERDICTS_WITHIN: Final = timedelta(
    hours=1
)  # after it was created; then nobody is expected to judge it any more
_JUDGES: Final = ("eligibility", "delivery")
_MOVING: Final = (WaveState.CANARY, WaveState.ACTIVE, WaveState.SOAKING)

Events = tuple[journal.AnyEvent, ...]


def decide(workspace: Workspace, rollout: Rollout, now: datetime, recorded: Container[str]) -> Events:
    """The next links of a rollout, to be written together; empty while there is nothing to do.

    `recorded` answers whether a host still has a signed record; without one it cannot be told anything.
    """
    if rollout.broken:
        return ()
    match rollout.state:
        case State.DRAFT | State.AWAITING_APPROVAL | State.READY:
            return _begin(rollout, now)
        case State.RUNNING | State.PAUSED | State.ROLLING_BACK:
            if expired := _expired(rollout, now):
                return (journal.Expired(hosts=expired, refusal=_DEADLINE),)
            if rollout.state is State.ROLLING_BACK:
                return _return(workspace, rollout, now, recorded)
            if failed := _failed(rollout):
                return failed
            return _run(workspace, rollout, now, recorded) if rollout.state is State.RUNNING else ()
        case State.DONE if now < rollout.start.scope.not_after:
            return _assign(workspace, rollout, list(rollout.again)[:BATCH_HOSTS], now, recorded)
        case _:
            return ()


def due(rollout: Rollout) -> datetime | None:
    """When there is something to decide even if nothing is reported until then; None for never."""
    match rollout.state:
        case State.DRAFT | State.AWAITING_APPROVAL:
            if rollout.state is State.AWAITING_APPROVAL and (rollout.judged or rollout.start.scope.absent):
                return rollout.start.scope.not_after
            return min(rollout.start.scope.not_after, rollout.created_at + VERDICTS_WITHIN)
        case State.READY:
            return rollout.start.scope.not_before
        case State.RUNNING | State.PAUSED | State.ROLLING_BACK:
            times = [rollout.deadlines[0][0]] if rollout.deadlines else []
            wave = rollout.wave
            if rollout.state is State.RUNNING and wave is not None and _soaked(rollout, wave) and wave.until:
                times.append(wave.until)
            if (
                rollout.state is State.ROLLING_BACK
                and datetime.max.replace(tzinfo=UTC) - rollout.return_until > WAY_BACK
            ):
                times.append(rollout.return_until + WAY_BACK)
            return min(times, default=None)
        case _:
            return None


_DEADLINE: Final = Refusal(
    Code.HOST_DEADLINE,
    "it gave no final answer within its deadline",
    "look at the host: 'loopback host show'",
)
_NO_RECORD: Final = Refusal(
    Code.ELIGIBILITY_NO_RECORD, "it has no signed record any more", "add it again with 'loopback host add'"
)


def _begin(rollout: Rollout, now: datetime) -> Events:
    scope = rollout.start.scope
    waits = rollout.state is State.AWAITING_APPROVAL
    if now >= scope.not_after and waits:
        return _refuse(
            Code.ROLLOUT_UNAPPROVED, f"nobody approved it before its time ended at {scope.not_after.isoformat()}",
            "start it again, and have another operator run 'loopback rollout approve' in time",
        )  # fmt: skip
    if now >= scope.not_after:
        return _refuse(
            Code.SCOPE_EXPIRED, f"its time ended at {scope.not_after.isoformat()} before it could start",
            "check that eligibility and delivery run, and start it again",
        )  # fmt: skip
    if not scope.absent:  # taking a module away needs neither a release nor a permission
        if not rollout.judged:
            return _unjudged(rollout) if now - rollout.created_at >= VERDICTS_WITHIN else ()
        for verdict in rollout.verdicts.values():
            if verdict.refusal is not None:
                return (journal.RolloutRefused(refusal=verdict.refusal),)
    if waits or now < scope.not_before:
        return ()
    eligible = [m for m in rollout.created.members if m.host not in rollout.skipped]
    waves = rolloutplan.plan(rollout.start.waves, eligible)
    if not waves[0].hosts:
        reasons = sorted({f"{r.code}: {r.reason}" for r in rollout.skipped.values()})
        what = (
            f"none of the {len(rollout.members)} selected hosts may have it"
            if not eligible
            else f"no host of the first wave {waves[0].name!r} may have it"
        )
        return _refuse(
            Code.ROLLOUT_NO_HOSTS, f"{what} ({'; '.join(reasons[:3])})",
            "see 'loopback eligibility explain HOST MODULE'",
        )  # fmt: skip
    return (journal.Started(waves=waves),)


def _refuse(code: Code, reason: str, next_step: str) -> Events:
    return (journal.RolloutRefused(refusal=Refusal(code, reason, next_step)),)


def _unjudged(rollout: Rollout) -> Events:
    silent = " and ".join(service for service in _JUDGES if service not in rollout.verdicts)
    return _refuse(
        Code.ROLLOUT_STATE,
        f"no word from {silent} within {VERDICTS_WITHIN.total_seconds() / 60:g} minutes",
        f"check that {silent} runs ('loopback up'), then start it again under another id",
    )


def _overdue(rollout: Rollout) -> Refusal:
    return Refusal(
        Code.SCOPE_EXPIRED,
        "the time that its operator signed for is over",
        f"start a new rollout for the rest, or 'loopback rollout abort {rollout.id}'",
    )


def _expired(rollout: Rollout, now: datetime) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for deadline, host, generation in rollout.deadlines:
        if deadline > now or len(found) >= BATCH_HOSTS:
            break
        progress = rollout.hosts[host]
        if progress.generation == generation and progress.standing in (Standing.ASSIGNED, Standing.RETURNING):
            found[host] = None
    return tuple(found)


def allowed(rollout: Rollout, wave: WaveProgress) -> int:
    """How many of a wave's hosts may fail."""
    return rolloutplan.share(rollout.start.gates.max_failed, len(wave.hosts))


def capacity(rollout: Rollout) -> int:
    """How many hosts may be in flight at once."""
    return max(1, rolloutplan.share(rollout.start.max_unavailable, len(rollout.hosts)))


def _failed(rollout: Rollout) -> Events:
    for index, wave in enumerate(rollout.waves[: rollout.current + 1]):
        failed, limit = wave.counts[Standing.FAILED], allowed(rollout, wave)
        sample = min(rollout.start.gates.min_sample, len(wave.hosts))
        too_many = failed > limit and wave.answered >= sample
        # A wave that was good may lose its last success later, while others of it never could confirm.
        settled = wave.state in (WaveState.SOAKING, WaveState.DONE) and not wave.open
        all_bad = failed > 0 and (
            failed == len(wave.hosts) or (settled and not wave.counts[Standing.PROMOTED])
        )
        if not (too_many or all_bad):
            continue
        first = next(p for h in wave.hosts if (p := rollout.hosts[h]).standing is Standing.FAILED)
        why = first.failure or Refusal(Code.MODULE_UNHEALTHY, f"it reported {first.phase} and {first.health}")
        refusal = Refusal(
            why.code,
            f"wave {wave.name!r} failed: {failed} of {wave.answered} hosts that answered, {limit} may; "
            f"first {first.host!r}: {why.reason}",
            f"see 'loopback rollout show {rollout.id}'",
        )
        events: list[journal.AnyEvent] = [
            journal.WaveFailed(wave=index, failed=failed, answered=wave.answered, allowed=limit),
            journal.Halted(refusal=refusal),
        ]
        if rollout.start.scope.on_failure == "rollback":
            events.append(journal.RollingBack(reason=refusal.reason))
        return tuple(events)
    return ()


def _run(workspace: Workspace, rollout: Rollout, now: datetime, recorded: Container[str]) -> Events:
    wave = rollout.wave
    if wave is None:
        return (journal.WaveStarted(wave=0),)
    room = min(capacity(rollout) - rollout.in_flight, BATCH_HOSTS)
    doubtful = wave.counts[Standing.FAILED] + wave.counts[Standing.INCONCLUSIVE] > allowed(rollout, wave)
    # Once doubts outnumber what may fail, only hosts that the sample still needs are touched.
    sampling = wave.counts[Standing.INCONCLUSIVE] == 0 and wave.answered < rollout.start.gates.min_sample
    if room > 0 and (not doubtful or sampling):
        hosts = list(islice(_queue(rollout, wave), room))
        if hosts:
            if now >= rollout.start.scope.not_after:
                return (journal.Halted(refusal=_overdue(rollout)),)
            return _assign(workspace, rollout, hosts, now, recorded)
    if rollout.in_flight or wave.state not in _MOVING:
        return ()
    if wave.state is WaveState.SOAKING:
        over = _soaked(rollout, wave) and wave.until is not None and now >= wave.until
        return _next(rollout) if over else ()
    return _settle(rollout, wave, now, doubtful)


def _soaked(rollout: Rollout, wave: WaveProgress) -> bool:
    """Whether only time is missing: a host that lost its disk may have to be asked again while its wave soaks."""
    return wave.state is WaveState.SOAKING and not wave.open and not rollout.in_flight


def _queue(rollout: Rollout, wave: WaveProgress) -> Iterator[str]:
    yield from rollout.again
    for index in range(wave.next, len(wave.hosts)):
        if rollout.hosts[wave.hosts[index]].fresh:
            yield wave.hosts[index]


def _settle(rollout: Rollout, wave: WaveProgress, now: datetime, doubtful: bool) -> Events:
    """Nobody is in flight and nobody more is to be asked: what the wave has come to."""
    inconclusive = wave.counts[Standing.INCONCLUSIVE]
    no_success = bool(wave.hosts) and not wave.counts[Standing.PROMOTED]
    too_few = wave.answered < min(rollout.start.gates.min_sample, len(wave.hosts))
    if inconclusive and (doubtful or no_success or too_few):
        reason = f"wave {wave.name!r} is inconclusive: {inconclusive} hosts could not confirm the change"
        if unapproved := _unapproved(rollout, wave):
            reason = (
                f"wave {wave.name!r} is inconclusive: {unapproved} hosts change nothing without another operator's "
                f"approval ('loopback rollout approve {rollout.id}', then 'loopback rollout resume {rollout.id}')"
            )
        return (
            journal.WaveInconclusive(wave=rollout.current, inconclusive=inconclusive),
            journal.Paused(reason=reason),
        )
    if wave.soak_s > 0 and wave.hosts:
        until = now + timedelta(seconds=wave.soak_s)
        return (journal.WaveSoaking(wave=rollout.current, until=until),)
    return _next(rollout)


def _unapproved(rollout: Rollout, wave: WaveProgress) -> int:
    """How many hosts of the wave miss an approval; it may be that their workspace became regulated meanwhile."""
    waiting = (rollout.hosts[h] for h in wave.hosts)
    return sum(
        p.standing is Standing.INCONCLUSIVE
        and p.failure is not None
        and p.failure.code is Code.ROLLOUT_UNAPPROVED
        for p in waiting
    )


def _next(rollout: Rollout) -> Events:
    done = journal.WaveDone(wave=rollout.current)
    if rollout.current + 1 < len(rollout.waves):
        return (done, journal.WaveStarted(wave=rollout.current + 1))
    return (done, journal.Done())


def _assign(
    workspace: Workspace, rollout: Rollout, hosts: list[str], now: datetime, recorded: Container[str],
    *, returning: bool = False,
) -> Events:  # fmt: skip
    if missing := tuple(h for h in hosts if h not in recorded):
        return (journal.Expired(hosts=missing, refusal=_NO_RECORD),)
    if not hosts:
        return ()
    module = rollout.created.module
    found = []
    for host in hosts:
        ledger = workspace.hosts.get(host)
        generation = (ledger.generation if ledger else 0) + 1
        known = ledger.modules.get(module) if ledger else None
        expected = known.promoted if known else None
        found.append(journal.Assignment(host, generation, expected))
    not_after = now + timedelta(seconds=rollout.start.host_deadline_s)
    return (
        journal.Assigned(
            wave=max(rollout.current, 0), hosts=tuple(found), not_after=not_after, returning=returning
        ),
    )


def _return(workspace: Workspace, rollout: Rollout, now: datetime, recorded: Container[str]) -> Events:
    if now - rollout.return_until >= WAY_BACK:
        return _returned(rollout)
    left = list(islice(chain(rollout.to_return, rollout.again), BATCH_HOSTS))
    if left:
        return _assign(workspace, rollout, left, now, recorded, returning=True)
    if rollout.counts[Standing.RETURNING]:
        return ()
    return _returned(rollout)


def _returned(rollout: Rollout) -> Events:
    stranded = tuple(h for h in rollout.returns if rollout.hosts[h].standing is not Standing.RETURNED)
    return (journal.RollbackIncomplete(hosts=stranded),) if stranded else (journal.RolledBack(),)
