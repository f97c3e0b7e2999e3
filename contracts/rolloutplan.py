"""Which hosts a rollout takes, in which order and in which waves; and what is wrong with one that makes no sense.

Pure, and shared: activation decides by it, and the command line shows the same plan before anything is sent.
Every refusal names the field, as `waves[1].percent`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loopback.contracts.codes import Code, Refused
from loopback.contracts.journal import Member, PlannedWave
from loopback.contracts.messages import RolloutStart, Selector, Wave
from loopback.contracts.subjects import token

MAX_WAVES: Final = 100
MAX_SCOPE_DAYS: Final = 90  # how long one signature may let hosts be changed
MAX_SOAK_S: Final = MAX_SCOPE_DAYS * 86400.0  # a longer soak outlives every scope, and at last every calendar
_ROUNDING: Final = 1e-9  # 0.1 × 30 is 3.0000000000000004: shares are compared with this much slack


def invalid(field: str, problem: str, next_step: str = "") -> Refused:
    """The refusal of one field of a rollout."""
    return Refused(Code.ROLLOUT_INVALID, f"{field}: {problem}", next_step or f"correct {field}")


def share(fraction: float, of: int) -> int:
    """How many whole hosts a fraction allows."""
    return math.floor(fraction * of + _ROUNDING)


def check(start: RolloutStart) -> None:
    """Refuse a rollout whose fields contradict each other. Raises Refused(ROLLOUT_INVALID | SCOPE_VIOLATION | NAME_INVALID)."""
    token(start.rollout)
    token(start.module)
    _check_scope(start)
    if not start.waves:
        raise invalid("waves", "there is none", "name at least one wave, the canary")
    if len(start.waves) > MAX_WAVES:
        raise invalid("waves", f"{len(start.waves)} waves are more than the {MAX_WAVES} allowed")
    names: set[str] = set()
    named_hosts: dict[str, str] = {}
    percent = 0.0
    for index, wave in enumerate(start.waves):
        field = f"waves[{index}]"
        if not wave.name or wave.name in names:
            raise invalid(f"{field}.name", f"{wave.name!r} is empty or already the name of another wave")
        names.add(wave.name)
        percent = _check_wave(field, wave, percent)
        for host in wave.hosts:
            if host in named_hosts:
                raise invalid(f"{field}.hosts", f"host {host!r} is already in {named_hosts[host]}")
            named_hosts[host] = field
    if not 0 <= start.gates.max_failed <= 1:
        raise invalid("gates.max_failed", f"{start.gates.max_failed} is not a share from 0 to 1")
    if start.gates.min_sample < 1:
        raise invalid("gates.min_sample", f"{start.gates.min_sample} is below 1")
    if not 0 < start.max_unavailable <= 1:
        raise invalid("max_unavailable", f"{start.max_unavailable} is not a share above 0 and up to 1")
    if not 1 <= start.host_deadline_s <= 7 * 86400:
        raise invalid("host_deadline_s", f"{start.host_deadline_s} s is not between a second and a week")
    if not 0 < start.trial_s < start.host_deadline_s:
        raise invalid("trial_s", f"{start.trial_s} s is not above 0 and below host_deadline_s")


def _check_wave(field: str, wave: Wave, percent_before: float) -> float:
    ways = [n for n in ("count", "percent") if getattr(wave, n) is not None] + (
        ["hosts"] if wave.hosts else []
    )
    if len(ways) > 1:
        raise invalid(f"{field}.{ways[1]}", f"a wave has either {ways[0]} or {ways[1]}, not both")
    if not ways and not wave.labels:
        raise invalid(field, "it says nothing of its hosts", "give it count, percent, hosts or labels")
    if wave.count is not None and wave.count < 1:
        raise invalid(f"{field}.count", f"{wave.count} is below 1")
    if not 0 <= wave.soak_s <= MAX_SOAK_S:
        raise invalid(f"{field}.soak_s", f"{wave.soak_s:g} s is not between 0 and {MAX_SCOPE_DAYS} days")
    if len(set(wave.hosts)) != len(wave.hosts):
        raise invalid(f"{field}.hosts", "it names a host twice")
    if wave.percent is None:
        return percent_before
    if not 0 < wave.percent <= 100:
        raise invalid(f"{field}.percent", f"{wave.percent} is not above 0 and up to 100")
    if wave.percent <= percent_before:
        raise invalid(
            f"{field}.percent", f"{wave.percent:g} is not more than the {percent_before:g} of an earlier wave",
            "percents are cumulative, of all selected hosts: let them grow",
        )  # fmt: skip
    return wave.percent


def _check_scope(start: RolloutStart) -> None:
    scope = start.scope

    def outside(field: str, problem: str) -> Refused:
        return Refused(Code.SCOPE_VIOLATION, f"{field}: {problem}", "sign a scope that covers the command")

    if scope.workspace != start.workspace:
        raise outside("scope.workspace", f"{scope.workspace!r} is not the command's {start.workspace!r}")
    if scope.module != start.module:
        raise outside("scope.module", f"{scope.module!r} is not the command's {start.module!r}")
    if scope.absent:
        if scope.policy is not None:
            raise outside("scope.policy", "a rollout that removes the module has no policy")
    elif start.version not in scope.packages:
        raise outside("scope.packages", f"version {start.version!r} is not among them")
    for version, package in scope.packages.items():
        if len(package) != 64 or any(c not in "0123456789abcdef" for c in package):
            raise outside(f"scope.packages[{version}]", "it is not a SHA-256 in hex")
    if scope.policy is not None and scope.policy_serial < 1:
        raise outside("scope.policy_serial", f"{scope.policy_serial} is below 1")
    for name, at in (("not_before", scope.not_before), ("not_after", scope.not_after)):
        if at.tzinfo is None:
            raise outside(f"scope.{name}", "it has no time zone")
    if scope.not_after <= scope.not_before:
        raise outside("scope.not_after", "it is not after not_before")
    if (scope.not_after - scope.not_before).total_seconds() > MAX_SCOPE_DAYS * 86400:
        raise outside("scope.not_after", f"more than {MAX_SCOPE_DAYS} days after not_before")


def selects(selector: Selector, host: str, labels: Mapping[str, str]) -> bool:
    """Whether the selector takes this host."""
    if selector.hosts and host not in selector.hosts:
        return False
    return matches(selector.labels, labels)


def matches(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether every wanted label is there with its value."""
    return all(labels.get(key) == value for key, value in wanted.items())


def members(start: RolloutStart, hosts: Mapping[str, Mapping[str, str]]) -> tuple[Member, ...]:
    """The selected ones of `hosts` (host → signed labels), in the rollout's own order.

    The order is that of SHA-256(rollout id, host): the same for everybody, and another in each rollout, so that it is
    not always the same hosts that go first. Only labels that waves ask for are kept.
    Raises Refused(ROLLOUT_NO_HOSTS | ROLLOUT_INVALID) where none is selected or a named host is unknown.
    """
    for host in start.scope.selector.hosts:
        if host not in hosts:
            raise invalid("scope.selector.hosts", f"host {host!r} has no record in {start.workspace!r}")
    chosen = {host for host, labels in hosts.items() if selects(start.scope.selector, host, labels)}
    if not chosen:
        raise Refused(
            Code.ROLLOUT_NO_HOSTS,
            f"the selector takes none of the {len(hosts)} hosts of workspace {start.workspace!r}",
            "see 'loopback hosts' for their labels",
        )
    for index, wave in enumerate(start.waves):
        for host in wave.hosts:
            if host not in chosen:
                raise invalid(f"waves[{index}].hosts", f"host {host!r} is unknown or not selected")
    wanted = {key for wave in start.waves for key in wave.labels}
    found = tuple(
        Member(host, {k: v for k, v in hosts[host].items() if k in wanted})
        for host in sorted(chosen, key=lambda h: order_key(start.rollout, h))
    )
    planned = plan(start.waves, found)
    for index, (wave, taken) in enumerate(zip(start.waves, planned, strict=True)):
        # A percentage may round to nothing in a small fleet; anything else that takes nobody is a mistake.
        if not taken.hosts and wave.percent is None:
            raise invalid(f"waves[{index}]", f"wave {wave.name!r} takes no host that is left")
    return found


def order_key(rollout: str, host: str) -> bytes:
    """By which hosts are ordered within a rollout."""
    return hashlib.sha256(f"{rollout}\0{host}".encode()).digest()


def plan(waves: Sequence[Wave], candidates: Iterable[Member]) -> tuple[PlannedWave, ...]:
    """Deal the candidates out to the waves. Linear in hosts × waves.

    `percent` counts cumulatively, of all candidates; a wave takes no host that a later wave names.
    """
    everyone = list(candidates)
    left: dict[str, Member] = {m.host: m for m in everyone}
    reserved = {host for wave in waves for host in wave.hosts}
    planned: list[PlannedWave] = []
    for wave in waves:
        if wave.hosts:
            named = set(wave.hosts)
            taken = [h for h, m in left.items() if h in named and matches(wave.labels, m.labels)]
        else:
            fits = [h for h, m in left.items() if h not in reserved and matches(wave.labels, m.labels)]
            size = len(fits)
            if wave.count is not None:
                size = wave.count
            elif wave.percent is not None:
                target = math.ceil(wave.percent / 100 * len(everyone) - _ROUNDING)
                size = max(0, target - (len(everyone) - len(left)))
            taken = fits[:size]
        for host in taken:
            del left[host]
        planned.append(PlannedWave(name=wave.name, hosts=tuple(taken), soak_s=wave.soak_s))
    return tuple(planned)
