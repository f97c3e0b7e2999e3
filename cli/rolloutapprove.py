"""What somebody who approves a rollout puts their name to: gathered, verified and shown before anything is signed.

The approver does not believe activation either: the start is the envelope that its operator signed, the package is what TUF
says of it, policy and hosts are what their signers say. Activation only says where to look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from loopback.cli import context, fleetio, policydiff, printing, rolloutview, trusted
from loopback.contracts import approvals, envelope, exposure, hostrecord, rolloutplan
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.exposure import Exposure
from loopback.contracts.keys import KeyFile
from loopback.contracts.messages import Policy, RolloutApprove, RolloutStart, decode_command
from loopback.contracts.rolloutstate import Rollout, Workspace
from loopback.contracts.trustdoc import Role, Trust, WorkspaceRules

DIFF_LINES: Final = 20  # of a policy's changes, unless all of them are asked for


class PolicyReview(msgspec.Struct, frozen=True, kw_only=True):
    """The policy: who signed it, and how it differs from the one in use (`before`: its serial; None where there is none)."""

    name: str
    serial: int
    digest: str
    authors: tuple[str, ...]
    before: int | None
    added: int
    removed: int
    diff: tuple[str, ...]


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is approved with one signature. `publishers` are key ids, `hosts` those that the selector takes."""

    start: RolloutStart
    digest: str
    signers: tuple[str, ...]
    rules: WorkspaceRules
    package: Running | None
    size: int
    publishers: tuple[str, ...]
    policy: PolicyReview | None
    hosts: tuple[str, ...]
    exposure: tuple[Exposure, ...]


async def review(session: context.Session, workspace: Workspace, rollout: Rollout) -> Review:
    """Gather and verify. Raises Refused where something is not what its signer signed, or every host would refuse it."""
    found = await trusted.trusted(session)
    start, digest, signers = _start(rollout, workspace.name, found.trust)
    _require_another(session.context.operator_key, rollout.id, signers, found.trust)
    rules = found.trust.rules(workspace.name)
    size = 0
    publishers: tuple[str, ...] = ()
    if not start.scope.absent:
        size, publishers = await _package(found, start, rules)
    hosts = await _hosts(session, start, found.trust)
    policy = None
    if start.scope.policy is not None:
        policy = await _policy(session, start, workspace, found.trust)
    return Review(
        start=start,
        digest=digest,
        signers=tuple(sorted(signers)),
        rules=rules,
        package=None
        if start.scope.absent
        else Running(start.version, start.scope.packages[start.version], start.scope.policy),
        size=size,
        publishers=publishers,
        policy=policy,
        hosts=hosts,
        exposure=exposure.exposure(start, rules, hosts),
    )


def _start(rollout: Rollout, workspace: str, trust: Trust) -> tuple[RolloutStart, str, frozenset[str]]:
    signed = rollout.created.envelope
    named = approvals.start_of(signed, workspace, rollout.id, trust)
    _, keyids = envelope.open_envelope(signed, envelope.COMMAND, trust.operator_keys)
    trust.authorise(keyids, Role.RELEASER, workspace)
    start = decode_command(envelope.payload_of(signed))  # it was decoded before, when the journal was folded
    if not isinstance(start, RolloutStart) or (start.rollout, start.workspace) != (rollout.id, workspace):
        raise Refused(
            Code.SCOPE_VIOLATION,
            f"what activation shows as the start of {rollout.id!r} in {workspace!r} is another command",
            "approve nothing; find out who has activation's key",
        )
    rolloutplan.check(start)
    return start, named.digest, named.signers


def _require_another(key: Path, rollout: str, signers: frozenset[str], trust: Trust) -> None:
    """Say no before a person has read and confirmed it all, where the answer could only be no."""
    public = KeyFile.read(key).public
    operator = trust.operators.get(public.keyid) if public else None
    if operator is not None and operator.name in signers:
        raise Refused(
            Code.ROLLOUT_UNAPPROVED,
            f"{operator.name} signed the start too; an approval is another operator's",
            f"have an approver who did not start it run 'loopback rollout approve {rollout}'; on this machine, with their key: "
            "'loopback --operator-key FILE rollout approve …'",
        )


async def _package(
    found: trusted.Trusted, start: RolloutStart, rules: WorkspaceRules
) -> tuple[int, tuple[str, ...]]:
    wanted = start.scope.packages[start.version]
    target = await found.release(start.module, start.version)
    if target is None or target.sha256 != wanted:
        has = f"has {target.sha256[:12]} for it" if target else "does not have that version"
        raise Refused(
            Code.PACKAGE_UNKNOWN,
            f"the start names package {wanted[:12]} as {start.module} {start.version}; the repository {has}",
            "hosts would refuse it: have the rollout aborted",
        )
    pinned = rules.publishers.get(start.module)
    if (pinned is not None or rules.regulated) and not set(target.signers) & set(pinned or ()):
        raise Refused(
            Code.HOST_PUBLISHER,
            f"{start.module} {start.version} was signed by {_keys(target.signers)}; "
            f"{start.workspace!r} pins {_keys(pinned or ())}",
            "hosts would refuse it: have the rollout aborted",
        )
    return target.length, target.signers


async def _hosts(session: context.Session, start: RolloutStart, trust: Trust) -> tuple[str, ...]:
    found: dict[str, dict[str, str]] = {}
    for record in await fleetio.stored_records(session, hostrecord.KIND, start.workspace):
        try:
            host = hostrecord.verify(record.envelope, record.claim, start.workspace, trust)
        except Refused:
            continue  # a host does not believe that record either
        if not host.absent:
            found[host.host] = host.labels
    return tuple(
        sorted(h for h, labels in found.items() if rolloutplan.selects(start.scope.selector, h, labels))
    )


async def _policy(
    session: context.Session, start: RolloutStart, workspace: Workspace, trust: Trust
) -> PolicyReview:
    digest = start.scope.policy or ""
    found, authors = await trusted.policy(session, digest, start.module, start.workspace, trust)
    if found.serial != start.scope.policy_serial:
        raise Refused(
            Code.POLICY_SERIAL,
            f"the policy says serial {found.serial}, the start {start.scope.policy_serial}",
            "hosts would refuse it: have the rollout aborted",
        )
    before: Policy | None = None
    _, used = workspace.serials.get(start.module, (0, ""))
    if used:
        before, _ = await trusted.policy(session, used, start.module, start.workspace, trust)
    diff = await asyncio.to_thread(
        policydiff.diff, bytes(before.content) if before else None, bytes(found.content)
    )
    return PolicyReview(
        name=found.name,
        serial=found.serial,
        digest=digest,
        authors=authors,
        before=before.serial if before else None,
        added=sum(line.startswith("+") for line in diff),
        removed=sum(line.startswith("-") for line in diff),
        diff=diff,
    )


def command(found: Review, fields: dict[str, Any], reason: str) -> RolloutApprove:
    """The approval of exactly what was shown."""
    return RolloutApprove(**fields, rollout=found.start.rollout, start=found.digest, reason=reason)


def words(found: Review, *, whole_diff: bool = False) -> str:
    """What is approved, for the person who does."""
    start, scope = found.start, found.start.scope
    regulated = "regulated" if found.rules.regulated else "not regulated"
    lines = [
        f"rollout {start.rollout} in {start.workspace} ({regulated})",
        f"  started by {', '.join(found.signers)} at {start.issued_at:%Y-%m-%d %H:%M:%S} UTC; start {found.digest}",
    ]
    if found.package is None:
        lines.append(f"  takes the module {start.module} away")
    else:
        lines.append(
            f"  module {start.module} {start.version}, package {found.package.package}, {found.size} bytes"
        )
        pinned = found.rules.publishers.get(start.module)
        counts = f", pinned: {_keys(k for k in found.publishers if k in pinned)}" if pinned else ""
        lines.append(f"    published by key {_keys(found.publishers)}{counts}")
    if (policy := found.policy) is not None:
        lines.append(
            f"  policy {policy.name}, serial {policy.serial}, {policy.digest}, signed by {', '.join(policy.authors)}"
        )
        against = (
            f"against serial {policy.before}" if policy.before is not None else "and there was none before"
        )
        lines.append(f"    {policy.added} lines added, {policy.removed} removed, {against}")
        shown = policy.diff if whole_diff else policy.diff[:DIFF_LINES]
        lines += [f"      {line}" for line in shown]
        if len(shown) < len(policy.diff):
            lines.append(f"      … {len(policy.diff) - len(shown)} more; all with --diff")
    lines.append(f"  {len(found.hosts)} hosts match now: {_some(found.hosts)}")
    lines.append(f"  waves: {'; '.join(_wave(wave) for wave in start.waves)}")
    lines.append(
        f"  a wave fails with more than {start.gates.max_failed:.1%} of its hosts (sample {start.gates.min_sample}); "
        f"at most {start.max_unavailable:.1%} in flight; trial {start.trial_s:g} s; then {scope.on_failure}"
    )
    lines.append(
        f"  valid from {scope.not_before:%Y-%m-%d %H:%M:%S} to {scope.not_after:%Y-%m-%d %H:%M:%S} UTC"
    )
    lines += rolloutview.exposed(found.exposure)
    return "\n".join(printing.printable(line) for line in lines)


def plain(found: Review) -> dict[str, Any]:
    """The same for programs."""
    start = found.start
    return {
        "rollout": start.rollout,
        "workspace": start.workspace,
        "regulated": found.rules.regulated,
        "start": found.digest,
        "started_by": found.signers,
        "module": start.module,
        "version": start.version,
        "package": found.package.package if found.package else None,
        "publishers": found.publishers,
        "policy": msgspec.to_builtins(found.policy),
        "hosts": found.hosts,
        "selector": msgspec.to_builtins(start.scope.selector),
        "waves": msgspec.to_builtins(start.waves),
        "valid": {"from": start.scope.not_before, "until": start.scope.not_after},
        "exposure": msgspec.to_builtins(found.exposure),
    }


def _wave(wave: Any) -> str:
    parts = [f"{wave.count} hosts"] if wave.count is not None else []
    parts += [f"up to {wave.percent:g}%"] if wave.percent is not None else []
    parts += [", ".join(wave.hosts)] if wave.hosts else []
    parts += [f"with {k}={v}" for k, v in sorted(wave.labels.items())]
    parts += [f"soak {wave.soak_s:g} s"] if wave.soak_s else []
    return f"{wave.name} ({', '.join(parts)})"


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _keys(keyids: Iterable[str]) -> str:
    return ", ".join(keyid[:16] for keyid in sorted(keyids)) or "nobody"
