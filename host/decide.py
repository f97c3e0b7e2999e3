"""What a host makes of a desired state: `check_desired` says what is asked and whether it may be, `plan` how it is done.

Pure: verification needs keys and times, which are passed in. The host believes activation only that somebody may be
asked now, or taken back to what it came from; everything else must lie inside what an operator signed. The checks, in order:

 of the document                                         of each entry
 1 signed by activation                                   7 older than what was handled: nothing to do
 2 for this host and workspace                            8 the module may run here (local allow-list)
 3 for this incarnation                                   9 the scope: signed by a releaser of this workspace
 4 well-formed; generations grow, one content each       10 scope, command and entry name the same rollout and module
 of the host's record, for every entry                   11 forward: version, package, policy, serial and trial lie in it
 5 signed by an admin of this workspace, not older          back: only to what this host itself ran before it, and
                                                            where the scope says halt, only by an operator's abort
 6 for this host and its key                             12 the selector matches the signed labels
                                                         13 it asks for what holds already: done
                                                         14 the time to start the change (never earlier than signed times);
                                                            the way back closes a day after the scope or an operator's abort
                                                         15 the host promoted what the sender expects
                                                         16 policy serials only grow, but for the promoted policy itself
                                                         17 neither quarantined here nor interrupted too often
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

import msgspec

from loopback.contracts import desired, envelope, messages
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import WAY_BACK, DesiredModule, DesiredState, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import PublicKey
from loopback.contracts.trustdoc import Role, Trust
from loopback.host import transitions
from loopback.host.form import check_form
from loopback.host.state import HostState, ModuleState

SKEW: Final = timedelta(minutes=5)  # how far a host's clock may be behind the operator's
MAX_TRIAL_S: Final = 3600.0  # a trial longer than that is a mistake, or keeps a host busy on purpose
ACTIVATION: Final = "activation"


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


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One entry and its answer; `refusal` where it is REFUSED."""

    entry: DesiredModule
    answer: Answer
    refusal: Refusal | None = None


class Older(Refused):
    """A document of an earlier generation: a late or repeated message, and nobody's mistake."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A document that this host obeys. `state` is the host's own state with what it learnt from it."""

    document: DesiredState
    entries: tuple[Checked, ...]
    state: HostState


def check_desired(
    signed: Envelope,
    identity: Identity,
    state: HostState,
    modules: Mapping[str, ModuleState],
    trust: Trust,
    now: datetime,
) -> Accepted:
    """Check a desired state. Raises Refused where the whole document is, for checks 1–4; entries are refused one by one."""
    # 1
    keys = trust.service_keys.get(ACTIVATION, {})
    payload, _ = envelope.open_envelope(signed, envelope.DESIRED, keys)
    try:
        document = desired.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.ENVELOPE_MALFORMED, f"the desired state is malformed: {error}") from None
    # 2
    if document.host != identity.host or document.workspace != identity.workspace:
        raise Refused(
            Code.HOST_WRONG_HOST,
            f"the desired state is for {document.host!r} in {document.workspace!r}, "
            f"this is {identity.host!r} in {identity.workspace!r}",
        )
    # 3
    if document.incarnation and document.incarnation != state.incarnation:
        raise Refused(
            Code.HOST_INCARNATION,
            "the desired state was made for this host before it lost its state",
            "it is made again once the host's report was seen",
        )
    # 4
    check_form(document)
    digest = hashlib.sha256(payload).hexdigest()
    if document.generation < state.generation:
        raise Older(
            Code.HOST_GENERATION,
            f"generation {document.generation} is older than {state.generation}, obeyed last",
        )
    if document.generation == state.generation and state.document not in ("", digest):
        raise Refused(
            Code.HOST_GENERATION,
            f"there is another desired state of generation {document.generation}",
            "two writers made one generation; look at activation's journal",
        )
    record, refusal, record_at = _record(document.record, identity, state, trust)
    learnt = msgspec.structs.replace(
        state,
        generation=document.generation,
        document=digest,
        journal_head=document.journal_head or state.journal_head,
    )
    if record_at is not None:
        learnt = msgspec.structs.replace(
            learnt,
            record_at=_later(state.record_at, record_at),
            clock_floor=_later(learnt.clock_floor, record_at),
        )
    entries = []
    for entry in document.modules:
        own = modules.get(entry.module) or ModuleState(module=entry.module)
        try:
            answer, signed_at = _check_entry(
                entry, own, identity, record, refusal, learnt.clock_floor, trust, now
            )
            if signed_at is not None:
                learnt = msgspec.structs.replace(learnt, clock_floor=_later(learnt.clock_floor, signed_at))
            entries.append(Checked(entry=entry, answer=answer))
        except Refused as refused:
            entries.append(Checked(entry=entry, answer=Answer.REFUSED, refusal=refused.refusal))
    return Accepted(document=document, entries=tuple(entries), state=learnt)


def _record(
    signed: Envelope | None, identity: Identity, state: HostState, trust: Trust
) -> tuple[messages.HostPut | None, Refusal | None, datetime | None]:
    """The host's own record, or why there is none (checks 5 and 6); and when the newest of this host was signed.

    A record that takes the host away is remembered as well: an older one cannot bring it back.
    """
    known: datetime | None = None
    try:
        if signed is None:
            raise Refused(Code.ELIGIBILITY_NO_RECORD, "the desired state carries no record of this host")
        command = _command(signed, trust, Role.ADMIN, identity.workspace)
        if not isinstance(command, messages.HostPut):
            raise Refused(Code.SCOPE_VIOLATION, "the host's record is another kind of command")
        if state.record_at is not None and command.issued_at < state.record_at:
            raise Refused(
                Code.SCOPE_VIOLATION,
                "the host's record is older than the one known here",
                "send the newest one",
            )
        if command.host != identity.host:
            raise Refused(Code.SCOPE_VIOLATION, f"the record is that of {command.host!r}")
        known = command.issued_at
        if command.public_key != identity.key.text:
            raise Refused(Code.SCOPE_VIOLATION, "the record names another key than this host's")
        if command.absent:
            raise Refused(Code.ELIGIBILITY_NO_RECORD, "an operator took this host's record away")
    except Refused as refused:
        return None, refused.refusal, known
    return command, None, known


def _check_entry(
    entry: DesiredModule, own: ModuleState, identity: Identity, record: messages.HostPut | None,
    no_record: Refusal | None, floor: datetime | None, trust: Trust, now: datetime,
) -> tuple[Answer, datetime | None]:  # fmt: skip
    # 7
    if entry.generation < own.generation:
        return Answer.STALE, None
    resumed = entry.generation == own.generation
    if resumed:
        if entry.running != own.target or entry.rollout != own.rollout:
            raise Refused(
                Code.HOST_GENERATION,
                f"generation {entry.generation} of {entry.module} asked for something else before",
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
    start = _command(entry.scope, trust, Role.RELEASER, identity.workspace)
    if not isinstance(start, messages.RolloutStart):
        raise Refused(Code.SCOPE_VIOLATION, "the scope is another kind of command than rollout.start")
    scope = start.scope
    # 10
    _within(scope.workspace == identity.workspace, f"the scope is for the workspace {scope.workspace!r}")
    _within(
        entry.module == scope.module == start.module,
        f"the scope is for the module {scope.module!r}, not {entry.module!r}",
    )
    _within(
        entry.rollout == start.rollout,
        f"the scope is that of rollout {start.rollout!r}, not {entry.rollout!r}",
    )
    # 11
    abort = None
    if entry.returning:
        abort = _abort(entry, trust, identity.workspace)
        _check_way_back(entry, own, start, abort)
    else:
        _check_forward(entry, start)
    # 12
    if scope.selector.hosts:
        _within(identity.host in scope.selector.hosts, "the selector does not name this host")
    for label, value in scope.selector.labels.items():
        _within(
            record.labels.get(label) == value,
            f"the selector wants {label}={value}, this host has {record.labels.get(label, 'none')!r}",
        )
    # 13
    signed_at = _later(abort.issued_at if abort else None, start.issued_at)
    if entry.running == own.promoted:
        return Answer.SAME, signed_at
    # 14: differences, since sums leave the calendar for a time that somebody signed at its edge
    time = max(filter(None, (now, floor, signed_at)))
    if not resumed and entry.returning:
        until = _later(abort.issued_at if abort else None, scope.not_after)
        if time - until >= WAY_BACK:
            raise Refused(
                Code.SCOPE_EXPIRED,
                f"the way back closed {WAY_BACK.total_seconds() / 3600:g} h after {until.isoformat()}",
                "abort the rollout, or start a new one that leads there",
            )
    elif not resumed:
        if scope.not_before - time > SKEW:
            raise Refused(Code.SCOPE_EXPIRED, f"the scope holds only from {scope.not_before.isoformat()} on")
        if time >= scope.not_after:
            raise Refused(
                Code.SCOPE_EXPIRED, f"the scope ended at {scope.not_after.isoformat()}", "start a new rollout"
            )
    if not resumed and entry.not_after is not None and time >= entry.not_after:
        raise Refused(
            Code.HOST_DEADLINE, f"the time to start this change ended at {entry.not_after.isoformat()}"
        )
    # 15
    if entry.expected != own.promoted:
        raise Refused(
            Code.HOST_EXPECTED,
            f"the sender expects {_words(entry.expected)}, but this host promoted {_words(own.promoted)}",
            "ask again on the ground of this report",
        )
    # 16
    target = entry.running
    if target is not None and target.policy is not None and not entry.returning:
        known = {own.floor_policy, own.promoted.policy if own.promoted else None}
        if target.policy not in known and target.policy_serial <= own.serial_floor:
            raise Refused(
                Code.POLICY_SERIAL,
                f"the policy has serial {target.policy_serial}, this host has seen {own.serial_floor}",
                "sign the policy again with a higher serial",
            )
    # 17
    if target is not None:
        found = transitions.quarantined(own, target)
        if found is not None and not entry.returning:
            raise Refused(
                Code.HOST_QUARANTINED,
                f"{target.version} failed here before: {found.refusal.code}: {found.refusal.reason}",
                "release a corrected version or policy",
            )
        if own.target == target and own.attempts >= transitions.MAX_ATTEMPTS:
            refusal = transitions.loop_refusal(own)
            raise Refused(refusal.code, refusal.reason, refusal.next_step)
    return Answer.CHANGE, signed_at


def _check_forward(entry: DesiredModule, start: messages.RolloutStart) -> None:
    scope, target = start.scope, entry.running
    if target is None:
        _within(scope.absent, "the scope does not allow to take the module away")
        return
    _within(not scope.absent, "the scope only allows to take the module away")
    _within(target.version == start.version, f"the scope is for {start.version}, not {target.version}")
    _within(
        scope.packages.get(target.version) == target.package,
        f"package {target.package[:12]} is not the {target.version} that the scope names",
    )
    _within(target.policy == scope.policy, f"policy {(target.policy or 'none')[:12]} is not the scope's")
    _within(
        target.policy_serial == scope.policy_serial,
        f"policy serial {target.policy_serial} is not the scope's {scope.policy_serial}",
    )
    _within(
        start.trial_s <= entry.trial_s <= max(MAX_TRIAL_S, start.trial_s),
        f"a trial of {entry.trial_s:g} s is not the {start.trial_s:g} s that were signed",
    )


def _check_way_back(
    entry: DesiredModule, own: ModuleState, start: messages.RolloutStart, abort: messages.RolloutAbort | None
) -> None:
    """Back leads to what this host promoted: what holds now, or what held before this very command changed it."""
    if entry.running == own.promoted:
        return
    known = own.previous_rollout == entry.rollout and entry.running == own.previous
    _within(known, f"{_words(entry.running)} is not what this host ran before rollout {entry.rollout!r}")
    _within(
        own.previous_scope in ("", transitions.scope_digest(entry)),  # "": written by an agent of before
        f"what was changed here by rollout {entry.rollout!r} followed from another command",
    )
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
    command = _command(entry.abort, trust, Role.RELEASER, workspace)
    if not isinstance(command, messages.RolloutAbort):
        raise Refused(Code.SCOPE_VIOLATION, "the abort is another kind of command than rollout.abort")
    _within(
        command.rollout == entry.rollout,
        f"the abort is that of rollout {command.rollout!r}, not {entry.rollout!r}",
    )
    return command


def check_policy(data: bytes, target: Running, module: str, workspace: str, trust: Trust) -> messages.Policy:
    """Verify a policy's envelope against the target that names it, and decode it.

    Raises Refused: BLOB_DIGEST, ENVELOPE_*, SIGNATURE_*, COMMAND_UNAUTHORISED, POLICY_MALFORMED, POLICY_SERIAL.
    """
    if hashlib.sha256(data).hexdigest() != target.policy:
        raise Refused(Code.BLOB_DIGEST, "the policy's content is not what its digest says", "fetch it again")
    payload, signers = envelope.open_envelope(envelope.parse(data), envelope.POLICY, trust.operator_keys)
    policy = read_policy(payload)
    if policy.workspace != workspace or policy.module != module:
        raise Refused(
            Code.POLICY_MALFORMED, f"the policy is for {policy.module!r} in workspace {policy.workspace!r}"
        )
    trust.authorise(signers, Role.AUTHOR, workspace)
    if policy.serial != target.policy_serial:
        raise Refused(
            Code.POLICY_SERIAL, f"the policy says serial {policy.serial}, the rollout {target.policy_serial}"
        )
    return policy


def read_policy(payload: bytes) -> messages.Policy:
    """Decode a policy's payload. Raises Refused(POLICY_MALFORMED)."""
    try:
        return messages.decode_policy(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.POLICY_MALFORMED, f"the policy is malformed: {error}") from None


def kept_policy(data: bytes, target: Running) -> messages.Policy:
    """A policy that was verified when it came, found by its digest. Raises Refused(BLOB_DIGEST, POLICY_MALFORMED)."""
    if hashlib.sha256(data).hexdigest() != target.policy:
        raise Refused(
            Code.BLOB_DIGEST, "the policy on disk is not what its digest says", "have it rolled out again"
        )
    return read_policy(envelope.payload_of(envelope.parse(data)))


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


def _command(signed: Envelope, trust: Trust, role: Role, workspace: str) -> messages.AnyCommand:
    payload, signers = envelope.open_envelope(signed, envelope.COMMAND, trust.operator_keys)
    try:
        command = messages.decode_command(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.COMMAND_MALFORMED, f"the operator's command is malformed: {error}") from None
    if command.workspace != workspace:
        raise Refused(
            Code.SCOPE_VIOLATION, f"the operator's command is for the workspace {command.workspace!r}"
        )
    trust.authorise(signers, role, workspace)
    return command


def _within(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refused(
            Code.SCOPE_VIOLATION, otherwise, "have an operator sign a rollout whose scope covers it"
        )


def _later(one: datetime | None, other: datetime) -> datetime:
    return other if one is None or other > one else one


def _words(running: Running | None) -> str:
    if running is None:
        return "nothing"
    policy = f" with policy {running.policy[:12]}" if running.policy else ""
    return f"{running.version} ({running.package[:12]}){policy}"
