"""What operators let be asked of one module here: checks 7 to 20 of `decide`, entry by entry. Pure.

What is signed is opened once for each content and trust document and remembered: a host is shown the same record, start and
approval many times, and an Ed25519 signature takes a fifth of a millisecond to verify.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Final

import msgspec

from loopback.contracts import approvals, envelope, hostrecord, messages
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import MAX_TRIAL_S, START_SKEW, WAY_BACK, DesiredModule, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.exposure import is_below
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.keys import PublicKey
from loopback.contracts.trustdoc import Role, Trust, WorkspaceRules
from loopback.host import floors, transitions
from loopback.host.state import ModuleState

#: Contents of each kind that are remembered: those of a document of a few modules, and of the one before it.
OPENED: Final = 32


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who this host is, and which modules its owner allows."""

    host: str
    workspace: str
    key: PublicKey
    modules: tuple[str, ...]


class Answer(StrEnum):
    """What an entry comes to."""

    CHANGE = "change"  # work to do
    SAME = "same"  # it holds already
    STALE = "stale"  # handled earlier
    REFUSED = "refused"


def check_entry(
    entry: DesiredModule, own: ModuleState, identity: Identity, record: HostRecord | None,
    no_record: Refusal | None, floor: datetime | None, trust: Trust, now: datetime,
) -> tuple[Answer, datetime | None]:  # fmt: skip
    """The answer to one entry, and the latest time that an operator signed for in it. Raises Refused."""
    # 7
    if entry.generation < own.generation:
        return Answer.STALE, None
    resumed = entry.generation == own.generation
    if resumed:
        _within(
            "generation",
            entry.running == own.target and entry.rollout == own.rollout,
            f"generation {entry.generation} of {entry.module} asked for something else before",
            Code.HOST_GENERATION,
            "",
        )
        if transitions.finished(own):
            return Answer.STALE, None
    # 8
    if entry.module not in identity.modules:
        raise Refused(
            Code.HOST_NOT_ALLOWED,
            f"this host's owner does not allow the module {entry.module!r}",
            "add it to [allow] modules in host.toml there",
        )
    # 5, 6
    if record is None:
        refusal = no_record or Refusal(Code.ELIGIBILITY_NO_RECORD, "there is no record of this host")
        raise Refused(refusal.code, refusal.reason, refusal.next_step)
    # 9
    start, digest, signers = _command(entry.scope, trust, Role.RELEASER, identity.workspace)
    if not isinstance(start, messages.RolloutStart):
        raise Refused(Code.SCOPE_VIOLATION, "the scope is another kind of command than rollout.start")
    # 10
    _check_names(entry, start, identity.workspace)
    # 11
    abort = None
    if entry.returning:
        abort = _abort(entry, trust, identity.workspace)
        _check_way_back(entry, own, start, abort)
    else:
        _check_forward(entry, start)
    _within(
        "trial_s",
        start.trial_s <= entry.trial_s <= max(MAX_TRIAL_S, start.trial_s),
        f"a trial of {entry.trial_s:g} s is not the {start.trial_s:g} s that were signed",
    )
    # 12
    _check_selector(start.scope.selector, record)
    rules = trust.rules(identity.workspace)
    if not entry.returning:
        # 13
        if rules.regulated:
            names = frozenset(trust.operators[keyid].name for keyid in signers)
            asked = approvals.Start(identity.workspace, start.rollout, digest, names)
            _check_approved(entry.approvals, asked, trust)
        # 14
        _check_order(own, start)
    # 15
    signed_at = later(abort.issued_at if abort else None, start.issued_at)
    if entry.running == own.promoted:
        return Answer.SAME, signed_at
    # 16
    time = _time(now, floor, signed_at)
    if not resumed:
        _check_time(entry, start.scope, abort, time)
    # 17
    if not (resumed and entry.returning):
        _check_floor(entry, own, rules, time)
    # 18
    _check_expected(entry, own)
    # 19, 20
    if not entry.returning:
        _check_serial(entry, own)
        _check_quarantine(entry, own)
    if entry.running is not None and entry.running == own.target and own.attempts >= transitions.MAX_ATTEMPTS:
        refusal = transitions.loop_refusal(own)
        raise Refused(refusal.code, refusal.reason, refusal.next_step)
    return Answer.CHANGE, signed_at


def _check_names(entry: DesiredModule, start: messages.RolloutStart, workspace: str) -> None:
    scope = start.scope
    _within("workspace", scope.workspace == workspace, f"the scope is for the workspace {scope.workspace!r}")
    _within(
        "module",
        entry.module == scope.module == start.module,
        f"the scope is for the module {scope.module!r}, not {entry.module!r}",
    )
    _within(
        "rollout",
        entry.rollout == start.rollout,
        f"the scope is that of rollout {start.rollout!r}, not {entry.rollout!r}",
    )


def _check_forward(entry: DesiredModule, start: messages.RolloutStart) -> None:
    scope, target = start.scope, entry.running
    if target is None:
        _within("running", scope.absent, "the scope does not allow to take the module away")
        return
    _within("running", not scope.absent, "the scope only allows to take the module away")
    _within(
        "version",
        target.version == start.version,
        f"the scope is for {start.version}, not {target.version}",
    )
    _within(
        "package",
        scope.packages.get(target.version) == target.package,
        f"package {target.package[:12]} is not the {target.version} that the scope names",
    )
    _within(
        "policy",
        target.policy == scope.policy,
        f"policy {(target.policy or 'none')[:12]} is not the scope's",
    )
    _within(
        "policy_serial",
        target.policy_serial == scope.policy_serial,
        f"policy serial {target.policy_serial} is not the scope's {scope.policy_serial}",
    )


def _check_way_back(
    entry: DesiredModule, own: ModuleState, start: messages.RolloutStart, abort: messages.RolloutAbort | None
) -> None:
    """Back leads to what this host promoted: what holds now, or what held before this very command changed it."""
    if entry.running == own.promoted:
        return
    _within(
        "returning",
        own.previous_rollout == entry.rollout and entry.running == own.previous,
        f"{_words(entry.running)} is not what this host ran before rollout {entry.rollout!r}",
    )
    _within(
        "scope",
        own.previous_scope in ("", transitions.scope_digest(entry)),  # "": written by an agent of before
        f"what was changed here by rollout {entry.rollout!r} followed from another command",
    )
    _check_halt(entry, start, abort)


def _check_halt(
    entry: DesiredModule, start: messages.RolloutStart, abort: messages.RolloutAbort | None
) -> None:
    if start.scope.on_failure == "halt" and abort is None:
        raise Refused(
            Code.SCOPE_VIOLATION,
            f"rollout {entry.rollout!r} was signed to halt where it fails, not to go back",
            "abort it with 'loopback rollout abort', which an operator signs",
        )


def _abort(entry: DesiredModule, trust: Trust, workspace: str) -> messages.RolloutAbort | None:
    """The operator's abort of this entry's rollout, where it carries one."""
    if entry.abort is None:
        return None
    command, _, _ = _command(entry.abort, trust, Role.RELEASER, workspace)
    if not isinstance(command, messages.RolloutAbort):
        raise Refused(Code.SCOPE_VIOLATION, "the abort is another kind of command than rollout.abort")
    _within(
        "abort",
        command.rollout == entry.rollout,
        f"the abort is that of rollout {command.rollout!r}, not {entry.rollout!r}",
    )
    return command


def _check_selector(selector: messages.Selector, record: HostRecord) -> None:
    if selector.hosts:
        _within("selector", record.host in selector.hosts, "the selector does not name this host")
    for label, value in selector.labels.items():
        _within(
            "selector",
            record.labels.get(label) == value,
            f"the selector wants {label}={value}, this host has {record.labels.get(label, 'none')!r}",
        )


def _time(now: datetime, *signed: datetime | None) -> datetime:
    """The time, never earlier than what somebody signed for."""
    return max(filter(None, (now, *signed)))


def _check_time(
    entry: DesiredModule, scope: messages.Scope, abort: messages.RolloutAbort | None, time: datetime
) -> None:
    """Whether a change may still be started. Differences, since sums leave the calendar for times signed at its edge."""
    if entry.returning:
        until = later(abort.issued_at if abort else None, scope.not_after)
        _within(
            "way back",
            time - until < WAY_BACK,
            f"the way back closed {WAY_BACK.total_seconds() / 3600:g} h after {until.isoformat()}",
            Code.SCOPE_EXPIRED,
            "abort the rollout, or start a new one that leads there",
        )
    else:
        begins, ends = scope.not_before, scope.not_after
        _within(
            "not_before",
            begins - time <= START_SKEW,
            f"the scope holds only from {begins.isoformat()} on",
            Code.SCOPE_EXPIRED,
            "",
        )
        _within(
            "not_after",
            time < ends,
            f"the scope ended at {ends.isoformat()}",
            Code.SCOPE_EXPIRED,
            "start a new rollout",
        )
    if entry.not_after is not None:
        _within(
            "deadline",
            time < entry.not_after,
            f"the time to start this change ended at {entry.not_after.isoformat()}",
            Code.HOST_DEADLINE,
            "",
        )


def _check_expected(entry: DesiredModule, own: ModuleState) -> None:
    if entry.expected != own.promoted:
        raise Refused(
            Code.HOST_EXPECTED,
            f"the sender expects {_words(entry.expected)}, but this host promoted {_words(own.promoted)}",
            "ask again on the ground of this report",
        )


def _check_serial(entry: DesiredModule, own: ModuleState) -> None:
    target = entry.running
    if target is None or target.policy is None:
        return
    known = {own.floor_policy, own.promoted.policy if own.promoted else None}
    if target.policy not in known and target.policy_serial <= own.serial_floor:
        raise Refused(
            Code.POLICY_SERIAL,
            f"the policy has serial {target.policy_serial}, this host has seen {own.serial_floor}",
            "sign the policy again with a higher serial",
        )


def _check_quarantine(entry: DesiredModule, own: ModuleState) -> None:
    found = transitions.quarantined(own, entry.running) if entry.running is not None else None
    if found is not None and entry.running is not None:
        raise Refused(
            Code.HOST_QUARANTINED,
            f"{entry.running.version} failed here before: {found.refusal.code}: {found.refusal.reason}",
            "release a corrected version or policy",
        )


def _check_order(own: ModuleState, start: messages.RolloutStart) -> None:
    """An operator's older rollout stays valid until its scope ends; what was started after it must not be undone with it."""
    if own.scope_at is not None and start.issued_at < own.scope_at:
        raise Refused(
            Code.SCOPE_VIOLATION,
            f"rollout {start.rollout!r} of {start.issued_at.isoformat()} is older than the one obeyed last, "
            f"of {own.scope_at.isoformat()}",
            "start it again; if it was the newer one, set the clock of whoever signed it",
        )


def _check_floor(entry: DesiredModule, own: ModuleState, rules: WorkspaceRules, time: datetime) -> None:
    """Whether an entry installs a version that the workspace's rules call too old.

    What runs here already is not installed again: another policy for it is let through, so that a host which cannot have
    the newer version is still defended. On the way back the floor counts from its own time on: until then it may be taken,
    and after that no service undoes what closed a hole. A trial that fails needs nobody's leave to go back.
    """
    floor = rules.floors.get(entry.module)
    if floor is None or entry.running is None:
        return
    if own.promoted is not None and entry.running.package == own.promoted.package:
        return
    if is_below(entry.running.version, floor.version) and not (
        entry.returning and not floors.in_force(floor, time)
    ):
        raise floors.refused(entry.running.version, floor)


@lru_cache(OPENED)
def record_of(
    signed: Envelope, claim: Envelope | None, workspace: str, trust: Trust
) -> hostrecord.HostRecord:
    """`hostrecord.verify`, remembered."""
    return hostrecord.verify(signed, claim, workspace, trust)


@lru_cache(OPENED)
def _check_approved(found: tuple[Envelope, ...], start: approvals.Start, trust: Trust) -> tuple[str, ...]:
    return approvals.approvers(found, start, trust)


@lru_cache(OPENED)
def _command(
    signed: Envelope, trust: Trust, role: Role, workspace: str
) -> tuple[messages.AnyCommand, str, tuple[str, ...]]:
    """The command, the SHA-256 of its payload, and the ids of the keys that signed it."""
    payload, signers = envelope.open_envelope(signed, envelope.COMMAND, trust.operator_keys)
    try:
        command = messages.decode_command(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.COMMAND_MALFORMED, f"the operator's command is malformed: {error}") from None
    _within(
        "command",
        command.workspace == workspace,
        f"the operator's command is for the workspace {command.workspace!r}",
    )
    trust.authorise(signers, role, workspace)
    return command, hashlib.sha256(payload).hexdigest(), signers


def _within(
    field: str, holds: bool, otherwise: str, code: Code = Code.SCOPE_VIOLATION,
    next_step: str = "have an operator sign a rollout whose scope covers it",
) -> None:  # fmt: skip
    """`field` names what is compared, for whoever wants to know which comparison holds something."""
    if not holds:
        raise Refused(code, otherwise, next_step)


def later(one: datetime | None, other: datetime) -> datetime:
    return other if one is None or other > one else one


def _words(running: Running | None) -> str:
    if running is None:
        return "nothing"
    policy = f" with policy {running.policy[:12]}" if running.policy else ""
    return f"{running.version} ({running.package[:12]}){policy}"
