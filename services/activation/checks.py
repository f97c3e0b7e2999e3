"""What must be true of a rollout before it is created: its release, its policy, its peers. Reads only what is passed in.

The pure half of the command handlers; `handlers.py` fetches, this judges. All raise Refused and change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime

import msgspec

from loopback.contracts import approvals, envelope, exposure
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import Envelope
from loopback.contracts.messages import Release, RolloutStart, decode_policy
from loopback.contracts.rolloutstate import FINAL, HOLDING, Rollout, State, Workspace
from loopback.contracts.roster import MAX_SOURCES, Source
from loopback.contracts.trustdoc import Role, Trust, WorkspaceRules


def new(workspace: Workspace, start: RolloutStart, now: datetime) -> None:
    """Refuse an id that is taken and a scope whose time is over. Raises ROLLOUT_EXISTS, SCOPE_EXPIRED."""
    if start.rollout in workspace.rollouts:
        raise Refused(
            Code.ROLLOUT_EXISTS,
            f"there is already a rollout {start.rollout!r} in workspace {workspace.name!r}",
            "choose another id; ids are never used twice",
        )
    if start.scope.not_after <= now:
        raise Refused(
            Code.SCOPE_EXPIRED,
            f"scope.not_after: {start.scope.not_after.isoformat()} is over",
            "sign a new scope",
        )


def peers(workspace: Workspace, start: RolloutStart, hosts: Iterable[str]) -> None:
    """Refuse a second rollout of the same module on the same hosts. Raises COMMAND_CONFLICT naming the first."""
    selected = set(hosts)
    for name in workspace.attention:
        other = workspace.rollouts[name]
        if other.created.module != start.module or other.state not in HOLDING:
            continue
        if shared := sorted(selected & other.members):
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            raise Refused(
                Code.COMMAND_CONFLICT,
                f"rollout {name!r} of {start.module} is {other.state} and holds host {shared[0]!r}{more}",
                f"wait for it, or end it with 'loopback rollout abort {name}'",
            )


def order(workspace: Workspace, start: RolloutStart, hosts: Iterable[str]) -> None:
    """Refuse a start that was signed before one of the same module that its hosts were asked to obey: they refuse it too.

    Raises COMMAND_CONFLICT.
    """
    selected = set(hosts)
    for other in workspace.rollouts.values():
        if other.created.module != start.module or other.start.issued_at <= start.issued_at:
            continue
        asked = sorted(h for h in other.hosts.keys() & selected if other.hosts[h].generation)
        if asked:
            raise Refused(
                Code.COMMAND_CONFLICT,
                f"it was signed at {start.issued_at.isoformat()}, before rollout {other.id!r} "
                f"({other.start.issued_at.isoformat()}), which {asked[0]!r} may have obeyed already",
                "sign it again",
            )


def rules(start: RolloutStart, found: WorkspaceRules) -> None:
    """Refuse what every host would refuse by the workspace's rules. Raises HOST_BELOW_FLOOR, HOST_PUBLISHER."""
    if start.scope.absent:
        return
    floor = found.floors.get(start.module)
    if floor is not None and exposure.is_below(start.version, floor.version):
        raise Refused(
            Code.HOST_BELOW_FLOOR,
            f"version: {start.module} {start.version} is below {floor.version}, the floor in {start.workspace!r}",
            f"choose {floor.version} or newer, or have the trust document changed",
        )
    if found.regulated and not found.publishers.get(start.module):
        raise Refused(
            Code.HOST_PUBLISHER,
            f"module: {start.workspace!r} is regulated, and nobody is pinned as publisher of {start.module!r} there",
            "have publishers pinned in the trust document",
        )


def release(start: RolloutStart, found: Release | None) -> int:
    """The package's size. Raises PACKAGE_UNKNOWN, SCOPE_VIOLATION where the catalog says something else of the digest."""
    digest = start.scope.packages[start.version]
    if found is None:
        raise Refused(
            Code.PACKAGE_UNKNOWN,
            f"scope.packages[{start.version}]: no release of {start.module!r} has the digest {digest[:12]}…",
            "publish it with 'loopback module publish', or see 'loopback module list'",
        )
    if (found.module, found.version) != (start.module, start.version):
        raise Refused(
            Code.SCOPE_VIOLATION,
            f"scope.packages[{start.version}]: that package is {found.module} {found.version}",
            "sign the digest that the catalog names for this version",
        )
    return found.size


def policy(workspace: Workspace, start: RolloutStart, blob: bytes | None, trust: Trust) -> tuple[Source, ...]:
    """What fills the policy's sets. Refuse a policy that is not there, not an author's, not for this module, or older than
    the last in use.

    Raises BLOB_MISSING, BLOB_DIGEST, POLICY_MALFORMED, POLICY_SERIAL, SCOPE_VIOLATION, COMMAND_UNAUTHORISED or an
    envelope's own codes.
    """
    digest, serial = start.scope.policy, start.scope.policy_serial
    if digest is None:
        return ()
    if blob is None:
        raise Refused(
            Code.BLOB_MISSING,
            f"scope.policy: the policy {digest[:12]}… is not stored",
            "store the signed policy before the rollout is started; 'loopback rollout start' does both",
        )
    if hashlib.sha256(blob).hexdigest() != digest:
        raise Refused(Code.BLOB_DIGEST, f"scope.policy: what is stored as {digest[:12]}… is something else")
    payload, keyids = envelope.open_envelope(envelope.parse(blob), envelope.POLICY, trust.operator_keys)
    trust.authorise(keyids, Role.AUTHOR, start.workspace)
    try:
        found = decode_policy(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(
            Code.POLICY_MALFORMED, f"scope.policy: the signed policy does not read: {error}"
        ) from None
    for field, said, wanted in (
        ("workspace", found.workspace, start.workspace),
        ("module", found.module, start.module),
        ("serial", found.serial, serial),
    ):
        if said != wanted:
            raise Refused(
                Code.SCOPE_VIOLATION,
                f"scope.policy: its {field} is {said!r}, the command's is {wanted!r}",
                "sign a policy and a scope that agree",
            )
    last, used = workspace.serials.get(start.module, (0, ""))
    if serial < last or (serial == last and digest != used):
        raise Refused(
            Code.POLICY_SERIAL,
            f"scope.policy_serial: {serial} is not above {last}, the last in use for {start.module!r}",
            f"sign the policy again with serial {last + 1}",
        )
    sources = {source.key: source for source in found.sources.values()}
    if len(sources) > MAX_SOURCES:
        raise Refused(
            Code.POLICY_INVALID,
            f"scope.policy: its sets are filled from {len(sources)} sources, more than the {MAX_SOURCES} allowed",
            "let sets share labels and pools",
        )
    return tuple(sources.values())


def find(workspace: Workspace, name: str) -> Rollout:
    """The rollout. Raises ROLLOUT_UNKNOWN, and ROLLOUT_STATE where its journal is not to be believed."""
    found = workspace.rollouts.get(name)
    if found is None:
        raise Refused(
            Code.ROLLOUT_UNKNOWN,
            f"there is no rollout {name!r} in workspace {workspace.name!r}",
            "see 'loopback rollout list'",
        )
    if found.broken:
        raise Refused(
            Code.ROLLOUT_STATE,
            f"the journal of rollout {name!r} is broken: {found.broken}",
            "find out who wrote to the workspace's stream; start a new rollout for its hosts",
        )
    return found


def may_approve(rollout: Rollout, signed: Envelope, trust: Trust, now: datetime) -> tuple[str, ...]:
    """The names of the operators by whom `signed` approves a rollout that needs it.

    It needs one while it waits for it; and also later, where its workspace is regulated by now and no approval counts that
    it has. Raises ROLLOUT_STATE, SCOPE_EXPIRED, and what `approvals.check` raises.
    """
    if rollout.state not in (State.DRAFT, State.AWAITING_APPROVAL, State.READY, State.RUNNING, State.PAUSED):
        raise _state(rollout, "approve", "it asks nothing more of hosts")
    start = approvals.start_of(rollout.created.envelope, rollout.workspace, rollout.id, trust)
    try:
        given = approvals.approvers(rollout.approvals, start, trust)
    except Refused:
        given = ()
    if given:
        raise _state(rollout, "approve", f"{', '.join(given)} approved it already")
    if rollout.state is not State.AWAITING_APPROVAL and not trust.rules(rollout.workspace).regulated:
        raise _state(rollout, "approve", f"{rollout.workspace!r} is not regulated: it needs no approval")
    if now >= rollout.start.scope.not_after:
        raise Refused(
            Code.SCOPE_EXPIRED,
            f"the time that rollout {rollout.id!r} was signed for is over",
            "have it started again",
        )
    names = approvals.check(signed, start, trust)
    if len(rollout.approvals) >= approvals.MAX_APPROVALS:
        raise _state(rollout, "approve", f"it has {len(rollout.approvals)} approvals that no longer count")
    return names


def may_pause(rollout: Rollout) -> None:
    """Only what runs can pause. Raises ROLLOUT_STATE."""
    if rollout.state is not State.RUNNING:
        raise _state(rollout, "pause", "only a running rollout pauses")


def may_resume(rollout: Rollout, now: datetime) -> None:
    """Only what is paused can go on, while its scope lasts. Raises ROLLOUT_STATE, SCOPE_EXPIRED."""
    if rollout.state is not State.PAUSED:
        raise _state(rollout, "resume", "only a paused rollout goes on")
    if now >= rollout.start.scope.not_after:
        raise Refused(
            Code.SCOPE_EXPIRED,
            f"the time that rollout {rollout.id!r} was signed for is over",
            f"start a new rollout, or 'loopback rollout abort {rollout.id}'",
        )


def may_abort(rollout: Rollout) -> None:
    """What has ended or is on its way back cannot be aborted. Raises ROLLOUT_STATE."""
    if rollout.state in FINAL or rollout.state is State.ROLLING_BACK:
        raise _state(rollout, "abort", "there is nothing left to abort")


def _state(rollout: Rollout, verb: str, why: str) -> Refused:
    return Refused(
        Code.ROLLOUT_STATE,
        f"cannot {verb} rollout {rollout.id!r}: it is {rollout.state}, and {why}",
        f"see 'loopback rollout show {rollout.id}'",
    )
