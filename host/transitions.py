"""How one module's state moves: pure functions from state to state, each written to disk before anything is done.

    IDLE → ACCEPTED → DOWNLOADING → VERIFYING → STAGED → TRIAL → PROMOTED
    before the trial: REJECTED (nothing happened)      on trial: ROLLING_BACK → ROLLED_BACK | ROLLBACK_FAILED, UNCONFIRMED
    absent: ACCEPTED → REMOVED                         side exits: QUARANTINED, LOOP_ABORTED

`promoted` changes in `promote` and `removed` only, in one write each. So whoever reads the disk finds the old or the new
state, and `recover` has to know nothing but that state.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Final

import msgspec
from msgspec.structs import replace

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.desired import DesiredModule, Running
from loopback.contracts.reports import FINAL, Phase
from loopback.host.state import ModuleState, Quarantined, Trial

MAX_ATTEMPTS: Final = 5  # interruptions of one target before the host stops trying it
MAX_SIGNED: Final = 16  # verified packages whose signers are remembered; two packages are kept on disk
MAX_REASON: Final = 1024  # characters of a reason that is kept and reported
MAX_QUARANTINE: Final = 64  # entries kept; the oldest give way

#: Refusals that say nothing about the version or policy: no quarantine.
_NOT_ITS_FAULT: Final = frozenset(
    {
        Code.HOST_DISK,
        Code.HOST_FAULT,
        Code.HOST_UNCONFIRMED,
        Code.HOST_LOOP,
        Code.BLOB_MISSING,
        Code.KERNEL_UNSUPPORTED,
    }
)


class _Issued(msgspec.Struct, frozen=True):
    """Of an operator's command that was verified before: when it was signed."""

    issued_at: Time


_ISSUED: Final = Decoder(msgspec.json.Decoder(_Issued))


def brief(refusal: Refusal) -> Refusal:
    """The refusal, no longer than a report has room for: modules and peers have written parts of it."""
    return Refusal(refusal.code, _cut(refusal.reason), _cut(refusal.next_step))


def fault(error: Exception) -> Refusal:
    """What is said of a mistake of the agent's own."""
    reason = f"the agent failed at it: {type(error).__name__}: {error}"
    return brief(Refusal(Code.HOST_FAULT, reason, "look at the agent's log"))


def _cut(text: str) -> str:
    text = text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"
    return text.encode("utf-8", "replace").decode()  # a lone surrogate, as of a path, could not be sent


def finished(state: ModuleState) -> bool:
    """Whether the entry in hand has come to its end, for better or worse."""
    return state.phase in FINAL or state.phase is Phase.IDLE


def accept(state: ModuleState, entry: DesiredModule) -> ModuleState:
    """Take an entry in hand that passed every check."""
    if entry.generation == state.generation and not finished(state):
        return state
    return replace(
        state,
        generation=entry.generation,
        rollout=entry.rollout,
        scope=scope_digest(entry),
        scope_at=_newest(state, entry),
        phase=Phase.ACCEPTED,
        step="accept",
        target=entry.running,
        returning=entry.returning,
        attempts=_attempts(state, entry.running),
        refusal=None,
    )


def scope_digest(entry: DesiredModule) -> str:
    """Which operator's command an entry follows from: the way back is open by the very one that led there."""
    return hashlib.sha256(entry.scope.payload.encode()).hexdigest()


def _newest(state: ModuleState, entry: DesiredModule) -> datetime | None:
    """When the newest rollout that was obeyed forward was signed. The way back is one of the rollout that it undoes."""
    try:
        at = _ISSUED.decode(envelope.payload_of(entry.scope)).issued_at
    except (Refused, msgspec.MsgspecError):
        return state.scope_at  # nothing that passed the checks is without
    if entry.returning or (state.scope_at is not None and at <= state.scope_at):
        return state.scope_at
    return at


def step(state: ModuleState, name: str, phase: Phase) -> ModuleState:
    """About to take a step."""
    return replace(state, step=name, phase=phase)


def signed(state: ModuleState, package: str, signers: tuple[str, ...]) -> ModuleState:
    """A package was verified; `signers` are the ids of the keys that signed its release."""
    others = [item for item in state.signers.items() if item[0] != package]
    return replace(state, signers=dict([*others[1 - MAX_SIGNED :], (package, signers)]))


def settle(state: ModuleState, entry: DesiredModule) -> ModuleState:
    """An entry that asks for what holds already."""
    return replace(
        state,
        generation=entry.generation,
        rollout=entry.rollout,
        scope_at=_newest(state, entry),
        target=state.promoted,
        attempts=_attempts(state, state.promoted),
        returning=entry.returning,
        phase=Phase.PROMOTED if state.promoted else Phase.REMOVED,
        step="",
        refusal=None,
    )


def reject(
    state: ModuleState, refusal: Refusal, entry: DesiredModule | None = None, phase: Phase = Phase.REJECTED
) -> ModuleState:
    """The entry in hand (or `entry`, newly seen) is refused and nothing was changed."""
    if entry is not None:
        state = replace(
            state,
            generation=entry.generation, rollout=entry.rollout, target=entry.running, returning=entry.returning,
            attempts=_attempts(state, entry.running),
        )  # fmt: skip
    if refusal.code is Code.HOST_QUARANTINED:
        phase = Phase.QUARANTINED
    elif refusal.code is Code.HOST_LOOP:
        phase = Phase.LOOP_ABORTED
    return replace(state, phase=phase, refusal=brief(refusal), step="")


def begin_trial(state: ModuleState, trial_s: float) -> ModuleState:
    """From here on there is something to undo: a failure or an interruption goes back to `promoted`."""
    assert state.target is not None
    changed = state.promoted is None or state.promoted.package != state.target.package
    trial = Trial(running=state.target, generation=state.generation, trial_s=trial_s, package_changed=changed)
    return replace(state, step="start-trial", phase=Phase.TRIAL, trial=trial)


def trial_process(state: ModuleState, pid: int, pid_start: int) -> ModuleState:
    """Remember which process runs the trial, so that a watchdog can end exactly that one."""
    return replace(state, trial=replace(state.trial, pid=pid, pid_start=pid_start)) if state.trial else state


def on_trial(state: ModuleState, generation: int) -> bool:
    """Whether this generation's trial still runs: false once the watchdog undid it."""
    trial = state.trial
    return trial is not None and trial.generation == generation and state.phase is Phase.TRIAL


def promote(state: ModuleState) -> ModuleState:
    """The trial passed: the one write by which the new state holds."""
    assert state.trial is not None
    running = state.trial.running
    raises = running.policy is not None and running.policy_serial > state.serial_floor
    return replace(
        state,
        phase=Phase.PROMOTED,
        step="",
        promoted=running,
        **_way_back(state),
        trial=None,
        attempts=0,
        refusal=None,
        serial_floor=running.policy_serial if raises else state.serial_floor,
        floor_policy=running.policy if raises else state.floor_policy,
    )


def removed(state: ModuleState) -> ModuleState:
    """The module is gone from process table and kernel."""
    return replace(
        state,
        phase=Phase.REMOVED,
        step="",
        promoted=None,
        **_way_back(state),
        trial=None,
        attempts=0,
        refusal=None,
    )


def _way_back(state: ModuleState) -> dict[str, Running | str | None]:
    """What is remembered of where this change came from; whoever has come back has nowhere further to go."""
    if state.returning:
        return {"previous": None, "previous_rollout": "", "previous_scope": ""}
    again = (state.previous_rollout, state.previous_scope) == (state.rollout, state.scope)
    return {
        "previous": state.previous if again else state.promoted,
        "previous_rollout": state.rollout,
        "previous_scope": state.scope,
    }


def roll_back(state: ModuleState, refusal: Refusal) -> ModuleState:
    """The trial failed: that decision comes first, so that an interruption from here on still ends in it."""
    return replace(state, phase=Phase.ROLLING_BACK, step="roll-back", refusal=brief(refusal))


def undo(state: ModuleState, *, restored: bool = True, reason: Refusal | None = None) -> ModuleState:
    """End a trial without promotion; used by agent, watchdog and recovery alike.

    A trial that had failed ends ROLLED_BACK (ROLLBACK_FAILED where `restored` is False) with what it ran quarantined;
    one that nobody finished ends UNCONFIRMED, to be tried again later, and after MAX_ATTEMPTS such ends LOOP_ABORTED.
    """
    if state.trial is None:
        return state
    if state.phase is Phase.ROLLING_BACK and state.refusal is not None:
        refusal = state.refusal
        phase = Phase.ROLLED_BACK
        if refusal.code is Code.HOST_UNCONFIRMED:
            phase = Phase.UNCONFIRMED
        if not restored:
            phase = Phase.ROLLBACK_FAILED
        found = replace(state, phase=phase, step="", trial=None)
        if refusal.code in _NOT_ITS_FAULT:
            return found
        return replace(found, quarantine=_with(state.quarantine, _suspect(state.trial, refusal)))
    found = replace(
        state,
        phase=Phase.UNCONFIRMED,
        step="",
        trial=None,
        refusal=reason
        or Refusal(
            Code.HOST_UNCONFIRMED,
            "the trial was interrupted before it could be confirmed, and was undone",
            "it is tried again when the rollout asks again",
        ),
    )
    return interrupted(found)


def interrupted(state: ModuleState) -> ModuleState:
    """Count an interruption of the target in hand; too many of them end it."""
    state = replace(state, attempts=state.attempts + 1)
    return reject(state, loop_refusal(state)) if state.attempts >= MAX_ATTEMPTS else state


def _attempts(state: ModuleState, target: Running | None) -> int:
    """Interruptions are counted against the target that met them, never against the next one."""
    return state.attempts if target is not None and target == state.target else 0


def loop_refusal(state: ModuleState) -> Refusal:
    """Why a target is not tried again."""
    return Refusal(
        Code.HOST_LOOP,
        f"it was interrupted {state.attempts} times on its way and is not tried again",
        "look at the agent's log for what ends it, then release another version",
    )


def quarantined(state: ModuleState, running: Running) -> Quarantined | None:
    """The quarantine that covers a target, if any."""
    for found in state.quarantine:
        if found.package == running.package and found.policy in (None, running.policy):
            return found
    return None


def recover(state: ModuleState) -> ModuleState:
    """What an agent that starts makes of the state it finds; it then makes the processes fit it.

    On trial → undone. Before the trial → the entry is still in hand and goes on when it is asked for again, unless it was
    interrupted too often. A removal goes on. Everything else holds as it is. Recovering twice changes nothing more,
    except that attempts are counted.
    """
    if state.trial is not None:
        return undo(state)
    if finished(state) or state.step == "remove":
        return state
    return interrupted(state)


def _suspect(trial: Trial, refusal: Refusal) -> Quarantined:
    """A new package is at fault itself, unless it refused the policy; without a new package it is the pair."""
    policy_refused = refusal.code.startswith("policy.")
    pair = trial.running.policy is not None and (policy_refused or not trial.package_changed)
    return Quarantined(
        package=trial.running.package, policy=trial.running.policy if pair else None, refusal=refusal
    )


def _with(known: tuple[Quarantined, ...], new: Quarantined) -> tuple[Quarantined, ...]:
    others = tuple(q for q in known if (q.package, q.policy) != (new.package, new.policy))
    return (*others, new)[-MAX_QUARANTINE:]
