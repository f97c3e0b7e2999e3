"""What a host makes of a desired state: `check_desired` says what is asked and whether it may be.

Pure: verification needs keys and times, which are passed in. The host believes activation only that somebody may be
asked now, or taken back to what it came from; everything else must lie inside what an operator signed. The checks, in order:

 of the document                                         of each entry
 1 signed by activation                                   7 older than what was handled: nothing to do
 2 for this host and workspace                            8 the module may run here (local allow-list)
 3 for this incarnation; one that names none              9 the scope: signed by a releaser of this workspace
   was written after this state began                    10 scope, command and entry name the same rollout and module
 4 well-formed; generations grow, by a bounded           11 forward: version, package, policy and serial lie in it
   step, one content each                                   back: only to what this host itself ran before it, and
 of the host's record, for every entry                      where the scope says halt, only by an operator's abort
 5 signed by an admin of this workspace, not older          either: a trial no shorter than signed, nor without end
 6 for this host and its key                             12 the selector matches the signed labels
                                                         13 forward, in a regulated workspace: a second operator approved it
                                                         14 forward: no older rollout than the newest obeyed here
                                                         15 it asks for what holds already: done
                                                         16 the time to start the change (never earlier than signed times);
                                                            the way back closes a day after the scope or an operator's abort
                                                         17 no version below the workspace's floor is installed, nor, once
                                                            the floor is in force, gone back to
                                                         18 the host promoted what the sender expects
                                                         19 policy serials only grow, but for the promoted policy itself
                                                         20 neither quarantined here nor interrupted too often
                                                         21 forward: the journal behind it is not older than the one witnessed
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Final

import msgspec

from loopback.contracts import desired, envelope
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import (
    FIRST_GENERATION,
    MAX_GENERATION_STEP,
    START_SKEW,
    DesiredModule,
    DesiredState,
)
from loopback.contracts.envelope import Envelope
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.trustdoc import Trust
from loopback.host import witness
from loopback.host.form import check_form
from loopback.host.scope import Answer, Identity, check_entry, later, record_of
from loopback.host.state import HostState, ModuleState

ACTIVATION: Final = "activation"


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One entry and its answer; `refusal` where it is REFUSED."""

    entry: DesiredModule
    answer: Answer
    refusal: Refusal | None = None


class Older(Refused):
    """A document of an earlier generation: a late or repeated message, and nobody's mistake."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A document that this host obeys. `state` is the host's own state with what it learnt from it.

    `doubt` says that it contradicts the journal that this host witnessed: it leads back, but nowhere else.
    """

    document: DesiredState
    entries: tuple[Checked, ...]
    state: HostState
    doubt: Refusal | None = None


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
    payload, signers = envelope.open_envelope(signed, envelope.DESIRED, keys)
    try:
        document = desired.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.ENVELOPE_MALFORMED, f"the desired state is malformed: {error}") from None
    # 2–4
    _check_addressee(document, identity)
    _check_incarnation(document, state)
    check_form(document)
    digest = hashlib.sha256(payload).hexdigest()
    _check_generation(document, digest, state)
    # 5, 6
    record, refusal, record_at = _record(document, identity, state, trust)
    rewritten = witness.contradiction(state.witnesses, document)
    # Whose key was taken away may have lied about the journal too: it is said, but binds nobody any more.
    binding = rewritten is not None and (
        not state.witnessed_by or not keys.keys().isdisjoint(state.witnessed_by)
    )
    witnesses = state.witnesses
    if not binding:
        before = tuple(w for w in witnesses if not rewritten or w.links < document.journal_links)
        witnesses = witness.kept(before, document, now)
    learnt = msgspec.structs.replace(
        state,
        generation=document.generation,
        document=digest,
        witnesses=witnesses,
        witnessed_by=signers if witnesses != state.witnesses else state.witnessed_by,
    )
    if record_at is not None:
        learnt = msgspec.structs.replace(
            learnt,
            record_at=later(state.record_at, record_at),
            clock_floor=later(learnt.clock_floor, record_at),
        )
    entries = []
    for entry in document.modules:
        own = modules.get(entry.module) or ModuleState(module=entry.module)
        try:
            answer, signed_at = check_entry(
                entry, own, identity, record, refusal, learnt.clock_floor, trust, now
            )
            if signed_at is not None:
                learnt = msgspec.structs.replace(learnt, clock_floor=later(learnt.clock_floor, signed_at))
            if rewritten is not None and binding and answer is Answer.CHANGE and not entry.returning:
                raise Refused(rewritten.code, rewritten.reason, rewritten.next_step)
            entries.append(Checked(entry=entry, answer=answer))
        except Refused as refused:
            entries.append(Checked(entry=entry, answer=Answer.REFUSED, refusal=refused.refusal))
    return Accepted(document=document, entries=tuple(entries), state=learnt, doubt=rewritten)


def _check_addressee(document: DesiredState, identity: Identity) -> None:
    if document.host != identity.host or document.workspace != identity.workspace:
        raise Refused(
            Code.HOST_WRONG_HOST,
            f"the desired state is for {document.host!r} in {document.workspace!r}, "
            f"this is {identity.host!r} in {identity.workspace!r}",
        )


def _check_incarnation(document: DesiredState, state: HostState) -> None:
    """A host that lost its state forgot which generations, rollouts and serials it has seen: what was made for the host of
    before must not reach it. Activation cannot name the incarnation of a host that it never heard of; what it says to such
    a one is at least not older than the state.
    """
    if document.incarnation and document.incarnation != state.incarnation:
        raise Refused(
            Code.HOST_INCARNATION,
            "the desired state was made for this host before it lost its state",
            "it is made again once the host's report was seen",
        )
    if not document.incarnation and state.since is not None and state.since - document.issued_at > START_SKEW:
        raise Refused(
            Code.HOST_INCARNATION,
            f"the desired state names no incarnation and is of {document.issued_at.isoformat()}, "
            f"before this host's state began at {state.since.isoformat()}",
            "compare the clocks of this host and of activation; a newer desired state is obeyed",
        )


def _check_generation(document: DesiredState, digest: str, state: HostState) -> None:
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
    highest = state.generation + MAX_GENERATION_STEP if state.generation else FIRST_GENERATION - 1
    if document.generation > highest:
        raise Refused(
            Code.HOST_GENERATION,
            f"generation {document.generation} is too far above {state.generation}, obeyed last",
            f"go on from the host's own report, by at most {MAX_GENERATION_STEP} at a time",
        )


def _record(
    document: DesiredState, identity: Identity, state: HostState, trust: Trust
) -> tuple[HostRecord | None, Refusal | None, datetime | None]:
    """The host's own record, or why there is none (checks 5 and 6); and when the newest of this host was signed.

    A record that takes the host away is remembered as well: an older one cannot bring it back.
    """
    known: datetime | None = None
    try:
        if document.record is None:
            raise Refused(Code.ELIGIBILITY_NO_RECORD, "the desired state carries no record of this host")
        record = record_of(document.record, document.claim, identity.workspace, trust)
        _check_newest(record, state)
        if record.host != identity.host:
            raise Refused(Code.SCOPE_VIOLATION, f"the record is that of {record.host!r}")
        known = record.issued_at
        if record.absent:
            raise Refused(Code.ELIGIBILITY_NO_RECORD, "an operator took this host's record away")
        _check_key(record, identity)
    except Refused as refused:
        return None, refused.refusal, known
    return record, None, known


def _check_newest(record: HostRecord, state: HostState) -> None:
    if state.record_at is not None and record.issued_at < state.record_at:
        raise Refused(
            Code.SCOPE_VIOLATION, "the host's record is older than the one known here", "send the newest one"
        )


def _check_key(record: HostRecord, identity: Identity) -> None:
    if record.public_key.lower() != identity.key.text:
        raise Refused(Code.SCOPE_VIOLATION, "the record names another key than this host's")
