"""How a change is done: steps as data, which `apply` takes one by one. Pure."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from loopback.contracts.desired import Running
from loopback.host.state import ModuleState


class StepName(StrEnum):
    """The steps of a change, in the order in which a plan may hold them."""

    DOWNLOAD = "download"
    VERIFY = "verify"
    STAGE = "stage"
    REMOVE = "remove"
    START_TRIAL = "start-trial"
    CONFIGURE = "configure"
    STAGE_POLICY = "stage-policy"
    COMMIT = "commit"
    WATCH_TRIAL = "watch-trial"
    CONFIRM = "confirm"
    PROMOTE = "promote"
    COLLECT = "collect"


class Undo(StrEnum):
    """What takes a step back, with everything that was done since the trial began."""

    NOTHING = "nothing"  # it left nothing that matters: a later collect sweeps it
    RESTORE = "restore"  # run again what is promoted, and have it enforce its policy


class Step(msgspec.Struct, frozen=True):
    """One step of a plan: data, carried out elsewhere."""

    name: StepName
    undo: Undo = Undo.NOTHING


def plan(
    state: ModuleState, target: Running | None, *, unpacked: bool, policy_here: bool
) -> tuple[Step, ...]:
    """The steps from what is promoted to `target`; `unpacked` and `policy_here` say what is on disk already.

    Every step up to STAGE is without effect. From START_TRIAL (or REMOVE) on there is something to undo. After PROMOTE,
    or a removal, nothing is undone any more.
    """
    if target is None:
        return (Step(StepName.REMOVE), Step(StepName.COLLECT))
    steps: list[Step] = []
    if not unpacked or (target.policy is not None and not policy_here):
        steps.append(Step(StepName.DOWNLOAD))
    steps.append(Step(StepName.VERIFY))
    if not unpacked:
        steps.append(Step(StepName.STAGE))
    if state.promoted is None or state.promoted.package != target.package:
        steps += [Step(StepName.START_TRIAL, Undo.RESTORE), Step(StepName.CONFIGURE, Undo.RESTORE)]
    else:
        steps.append(Step(StepName.START_TRIAL, Undo.RESTORE))
    if target.policy is not None:
        steps += [Step(StepName.STAGE_POLICY, Undo.RESTORE), Step(StepName.COMMIT, Undo.RESTORE)]
    steps.append(Step(StepName.WATCH_TRIAL, Undo.RESTORE))
    if target.policy is not None:
        steps.append(Step(StepName.CONFIRM, Undo.RESTORE))
    return (*steps, Step(StepName.PROMOTE, Undo.RESTORE), Step(StepName.COLLECT))
