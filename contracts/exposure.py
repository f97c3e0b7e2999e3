"""What an operator's signature under a rollout permits to whoever has activation's key: `exposure(start, rules, hosts)`.

Pure. It is what a host checks (`host/decide.py`, `host/scope.py`), said the other way round: `rollout plan` and `rollout
approve` print it before anybody signs, and `make test-stolen-activation` tries each item on a host, in a test named after
its `id`.
Ids never change their meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from packaging.version import InvalidVersion, Version

from loopback.contracts.desired import MAX_GENERATION_STEP, MAX_TRIAL_S, START_SKEW, WAY_BACK
from loopback.contracts.messages import RolloutStart, Scope
from loopback.contracts.trustdoc import WorkspaceRules

CAN: Final = (
    "change-at-once",
    "other-matching-hosts",
    "skip-pacing",
    "ignore-steering",
    "way-back",
    "back-and-forth",
    "stretch-trial",
    "withhold",
    "leave-out",
    "misreport",
    "generation-step",
)
CANNOT: Final = (
    "unapproved",
    "below-floor",
    "unpinned-publisher",
    "other-content",
    "other-module",
    "other-workspace",
    "other-hosts",
    "outside-times",
    "older-policy",
    "older-rollout",
    "put-in",
    "skip-trial",
    "retry-failed",
    "owner-allow-list",
    "generation-jump",
)
_DAYS: Final = "%Y-%m-%d %H:%M:%S UTC"
_LATEST: Final = datetime.max.replace(tzinfo=UTC) - WAY_BACK  # where the calendar ends


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is possible (`can`) or is not. `says` is a sentence for people, `values` its figures for programs."""

    id: str
    can: bool
    says: str
    values: dict[str, str | int | float | bool | list[str] | None] = {}


def exposure(start: RolloutStart, rules: WorkspaceRules, hosts: Iterable[str]) -> tuple[Exposure, ...]:
    """Everything that activation in the wrong hands can do with this start, and what it cannot, as hosts check it.

    `rules` are the workspace's by the trust document, `hosts` the names of those that the selector takes now.
    """
    named = sorted(hosts)
    return (*_can(start, rules, named), *_cannot(start, rules, named))


def _can(start: RolloutStart, rules: WorkspaceRules, hosts: Sequence[str]) -> Iterable[Exposure]:
    scope = start.scope
    first, last = scope.not_before - START_SKEW, scope.not_after
    condition = "once another operator has approved it, " if rules.regulated else ""
    yield Exposure(
        id="change-at-once",
        can=True,
        says=f"{condition}{_what(start)} on {_count(hosts)} at the same moment, any time from {_at(first)} to "
        f"{_at(last)} by each "
        "host's clock; a host that was asked in time may finish, or begin again after an interruption, later",
        values={
            "hosts": list(hosts),
            "count": len(hosts),
            "module": start.module,
            "version": None if scope.absent else start.version,
            "package": None if scope.absent else scope.packages.get(start.version),
            "policy": scope.policy,
            "policy_serial": scope.policy_serial,
            "from": first.isoformat(),
            "until": last.isoformat(),
            "needs_approval": rules.regulated,
        },
    )
    if not scope.selector.hosts or scope.selector.labels:
        yield Exposure(
            id="other-matching-hosts",
            can=True,
            says=f"the same on every other host of {scope.workspace} for which an admin signed a record that the "
            f"selector ({_selector(scope)}) "
            "matches: one signed in that time, or an earlier one as long as the host was shown none that is newer",
            values={"labels": [f"{k}={v}" for k, v in sorted(scope.selector.labels.items())]},
        )
    yield Exposure(
        id="skip-pacing",
        can=True,
        says="in any order and all together: without canary, waves, soak, gates, max_unavailable and the verdicts "
        "of eligibility and delivery",
    )
    yield Exposure(
        id="ignore-steering",
        can=True,
        says="also while the rollout is paused, and after it was halted, aborted or canceled: hosts are not told "
        "of these",
    )
    until = min(last, _LATEST) + WAY_BACK
    floor = rules.floors.get(start.module)
    by_abort = scope.on_failure == "halt"
    yield Exposure(
        id="way-back",
        can=True,
        says="take each host that made the change back to what it ran before (nothing, where nothing ran), "
        + (
            f"only with a 'rollout abort' that an operator signed, until {_hours()} after its signing or the "
            "scope's end, whichever is later"
            if by_abort
            else f"until {_at(until)}, or with a 'rollout abort' that an operator signed until {_hours()} after its signing"
        )
        + ", also where the change was good; no approval is asked for it"
        + (f"; to no version below {floor.version} once that floor is in force" if floor else ""),
        values={"until": None if by_abort else until.isoformat(), "needs_abort": by_abort},
    )
    yield Exposure(
        id="back-and-forth",
        can=True,
        says="do both, forth and back, as often as it likes within these times",
    )
    if not scope.absent:
        longest = max(MAX_TRIAL_S, start.trial_s)
        yield Exposure(
            id="stretch-trial",
            can=True,
            says=f"keep each host on trial for up to {longest:g} s instead of {start.trial_s:g} s",
            values={"signed_s": start.trial_s, "longest_s": longest},
        )
    yield Exposure(
        id="withhold",
        can=True,
        says="tell some hosts, or all, nothing: neither of this rollout nor of its way back, of other rollouts or "
        "of new records; they stay as they are",
    )
    if scope.policy is not None:
        yield Exposure(
            id="leave-out",
            can=True,
            says="leave hosts out of the policy's sets that labels fill, where it has such, as if their records were "
            "not there; and show them, or a pool, as they were before an operator's last word",
        )
    yield Exposure(
        id="misreport",
        can=True,
        says="write into the rollout's journal what did not happen, so that 'rollout show' says it, and have hosts "
        "witness it: they change nothing on the ground of another journal until activation's key is replaced; "
        "'loopback host show' has the hosts' own signed reports",
    )
    yield Exposure(
        id="generation-step",
        can=True,
        says=f"raise a host's generation by up to {MAX_GENERATION_STEP} with each document; once activation is in "
        "the right hands again it goes on above",
        values={"step": MAX_GENERATION_STEP},
    )


def _cannot(start: RolloutStart, rules: WorkspaceRules, hosts: Sequence[str]) -> Iterable[Exposure]:
    scope = start.scope
    if rules.regulated:
        yield Exposure(
            id="unapproved",
            can=False,
            says=f"change any host before another operator has approved this very command: {scope.workspace} is "
            "regulated",
        )
    floor = rules.floors.get(start.module)
    if floor is not None and not scope.absent:
        below = is_below(start.version, floor.version)
        yield Exposure(
            id="below-floor",
            can=False,
            says=f"newly install {start.module} below {floor.version}, the floor in {scope.workspace}"
            + (f": hosts refuse {start.version}" if below else ""),
            values={"floor": floor.version, "refused": below},
        )
    pinned = rules.publishers.get(start.module)
    if (pinned is not None or rules.regulated) and not scope.absent:
        who = ", ".join(key[:16] for key in pinned) if pinned else "nobody, so hosts refuse every package"
        yield Exposure(
            id="unpinned-publisher",
            can=False,
            says=f"install a package that none of the pinned publishers signed: {who}",
            values={"publishers": list(pinned or ())},
        )
    if scope.absent:
        other = f"install any version or policy of {start.module}"
    else:
        other = f"bring any other version, package or policy of {start.module}, or take it away from a host that ran it before"
    yield Exposure(id="other-content", can=False, says=other)
    yield Exposure(id="other-module", can=False, says=f"touch a module other than {start.module}")
    yield Exposure(
        id="other-workspace", can=False, says=f"touch a host of a workspace other than {scope.workspace}"
    )
    yield Exposure(
        id="other-hosts",
        can=False,
        says=f"touch a host that the selector ({_selector(scope)}) does not match by a record that an admin signed",
    )
    yield Exposure(
        id="outside-times",
        can=False,
        says="begin on a host before or after these times, by the host's clock, which is never behind a time that "
        "it saw signed",
    )
    if scope.policy is not None:
        yield Exposure(
            id="older-policy",
            can=False,
            says="bring back a policy with a lower serial than a host remembers, but for the way back",
        )
    yield Exposure(
        id="older-rollout",
        can=False,
        says=f"use this signature on a host that remembers a rollout of {start.module} that was signed later, "
        "but for the way back",
    )
    if scope.policy is not None:
        yield Exposure(
            id="put-in",
            can=False,
            says="put an address into such a set that no admin or balancer signed for, or that left it, or more than "
            "the policy's own 'within' and 'max' let in",
        )
    if not scope.absent:
        yield Exposure(
            id="skip-trial",
            can=False,
            says=f"shorten the trial of {start.trial_s:g} s: a host that is not healthy, or makes no new connection to "
            "the control plane, "
            "undoes the change by itself",
            values={"trial_s": start.trial_s},
        )
        yield Exposure(
            id="retry-failed",
            can=False,
            says="bring a version or policy to a host that remembers that it failed there",
        )
    yield Exposure(
        id="owner-allow-list",
        can=False,
        says="run a module, or give it a capability, that a host's owner does not allow in host.toml",
    )
    yield Exposure(
        id="generation-jump",
        can=False,
        says=f"push a host's generation by more than {MAX_GENERATION_STEP} at once, so that nobody could go on "
        "above it",
    )


def is_below(version: str, floor: str) -> bool:
    """Whether a version is below a floor; what is no PEP 440 version is."""
    try:
        return Version(version) < Version(floor)
    except InvalidVersion:
        return True


def _what(start: RolloutStart) -> str:
    scope = start.scope
    if scope.absent:
        return f"take {start.module} away"
    package = scope.packages.get(start.version, "")
    policy = f" and policy {scope.policy[:12]} (serial {scope.policy_serial})" if scope.policy else ""
    return f"bring {start.module} {start.version} (package {package[:12]}){policy}"


def _count(hosts: Sequence[str], most: int = 8) -> str:
    names = ", ".join(hosts[:most]) + (f" and {len(hosts) - most} more" if len(hosts) > most else "")
    return f"{len(hosts)} host{'' if len(hosts) == 1 else 's'}" + (f" ({names})" if hosts else "")


def _selector(scope: Scope) -> str:
    labels = [f"{k}={v}" for k, v in sorted(scope.selector.labels.items())]
    hosts = [f"one of {len(scope.selector.hosts)} named hosts"] if scope.selector.hosts else []
    return ", ".join((*labels, *hosts)) or "every host"


def _at(time: datetime) -> str:
    return time.strftime(_DAYS)


def _hours() -> str:
    return f"{WAY_BACK.total_seconds() / 3600:g} h"
