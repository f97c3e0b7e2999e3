"""Who may have what: pure rules, applied in one fixed order.

    1 record        the host has an operator-signed record in its workspace
    2 release       the module has such a release
    3 floor         the version is not below the workspace's floor, where the trust document sets one
    4 entitlement   the workspace has an entitlement for the module
    5 labels        … whose labels the host's record carries
    6 version       … whose range holds the version
    7 channel       … whose channel is the release's
    8 inventory     the host has said, signed, what it is
    9 abi           module and agent share a version of the module ABI
   10 agent         the agent's version is in the range that the release asks for
   11 architecture  the release was built for the host's processor
   12 kernel        the kernel is not older than the release's floor
   13 feature       the kernel has every feature that the release asks for

The first rule that fails gives the refusal its code; the rest is not asked, since an answer without the one before means
little. Of several entitlements the one that gets furthest counts, so that a person sees how close it was; among those that
hold, the first by name is the one that the offer names.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from loopback.contracts import hostrecord
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.envelope import payload_of
from loopback.contracts.exposure import is_below
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.messages import (
    Check,
    EntitlementPut,
    HostPut,
    OfferedVersion,
    PoolPut,
    Record,
    Release,
    decode_command,
)
from loopback.contracts.reports import Inventory
from loopback.contracts.trustdoc import Floor

MAX_LABELS: Final = 64  # per host or entitlement; they travel inside every desired state
MAX_LABEL: Final = 128  # characters of a label's name, and of its value
MAX_POOL: Final = 4096  # addresses and prefixes of one pool; a signed command of them has about 100 KiB
MAX_SERIAL: Final = 2**53  # what every reader of JSON still counts exactly
MAX_RELEASES: Final = 50  # per module in one offer, the newest; it bounds an offer to some tens of kilobytes

_POOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KERNEL = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})(?:\.([0-9]{1,9}))?")  # int() refuses thousands of digits


class Judged(NamedTuple):
    """The rules that were applied to one host and release, in order, and the refusal of the last one if it failed."""

    checks: tuple[Check, ...]
    rule: str
    refusal: Refusal | None


def check_pool(command: PoolPut) -> None:
    """Refuse a pool that could not be used. Raises Refused(COMMAND_MALFORMED) naming the field."""
    if not _POOL.fullmatch(command.pool):
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"pool: {command.pool[:80]!r} is no name that a policy could give",
            "use letters, digits, '.', '_' and '-', at most 64, a letter or digit first",
        )
    if not 0 < command.serial < MAX_SERIAL:
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"serial: {command.serial} is not from 1 to {MAX_SERIAL - 1}",
            "begin with 1 and count up",
        )
    if len(command.addresses) > MAX_POOL:
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"addresses: {len(command.addresses)} are more than the {MAX_POOL} allowed",
            "split the pool",
        )
    if command.absent and command.addresses:
        raise Refused(Code.COMMAND_MALFORMED, "addresses: a pool that is taken away has none")
    for address in command.addresses:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            hint = str(error) if "host bits" in str(error) else "no address or prefix"
            raise Refused(
                Code.COMMAND_MALFORMED,
                f"addresses: {address[:60]!r} is {hint}",
                "write it like 192.0.2.7, 192.0.2.0/28 or 2001:db8::7",
            ) from None


def check_serial(command: PoolPut, before: Record) -> None:
    """Refuse a word on a pool that is no newer than the last. Raises Refused(POOL_SERIAL)."""
    known = decode_command(payload_of(before.envelope))
    if isinstance(known, PoolPut) and command.serial <= known.serial:
        raise Refused(
            Code.POOL_SERIAL,
            f"serial: {command.serial} is not above {known.serial}, the last of pool {command.pool!r}",
            f"sign it again with serial {known.serial + 1} or above",
        )


def check_newer(command: HostPut, before: Record) -> None:
    """Refuse a host's record that was signed before the one that there is: hosts would refuse it too, and every roster
    that it stands in. Raises Refused(COMMAND_CONFLICT).
    """
    try:
        known = hostrecord.of(before).issued_at
    except Refused:
        return  # hosts do not believe that one
    if command.issued_at < known:
        raise Refused(
            Code.COMMAND_CONFLICT,
            f"issued_at: it was signed at {command.issued_at.isoformat()}, before the record of {command.host!r} "
            f"that there is ({known.isoformat()})",
            "compare the clocks of the operators' machines, and sign it again",
        )


def kernel_version(text: str) -> tuple[int, int, int] | None:
    """Major, minor and patch at the start of a kernel's release name (`6.1.0-18-amd64`); None if it has none."""
    found = _KERNEL.match(text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def in_range(version: str, specifier: str) -> bool:
    """Whether a version is in a PEP 440 range. Pre-releases count: channels, not version names, hold them back.

    What is no version or no range is in no range; neither is a version with a number of thousands of digits, which a host
    may claim and `int` refuses.
    """
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except ValueError:
        return False


def labels_match(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether every wanted label is there with that value."""
    return all(labels.get(name) == value for name, value in wanted.items())


def judge(
    record: HostRecord | None,
    inventory: Inventory | None,
    entitlements: Iterable[EntitlementPut],
    release: Release,
    floor: Floor | None = None,
) -> OfferedVersion:
    """Whether a host may have a release: every rule above, in that order.

    `entitlements` and `floor` are the host's workspace's. The answer names the rules; it raises nothing.
    """
    judged = _apply(record, inventory, entitlements, release, floor)
    return OfferedVersion(
        module=release.module,
        version=release.version,
        digest=release.digest,
        rule=judged.rule,
        refusal=judged.refusal,
        checks=judged.checks,
    )


_NO_RECORD = Refusal(
    Code.ELIGIBILITY_NO_RECORD,
    "no operator-signed record names this host in its workspace",
    "add it with 'loopback host add'",
)


def _apply(
    record: HostRecord | None,
    inventory: Inventory | None,
    entitlements: Iterable[EntitlementPut],
    release: Release,
    floor: Floor | None,
) -> Judged:
    checks: list[Check] = []

    def refuse(check: Check, refusal: Refusal) -> Judged:
        return Judged((*checks, check), f"{check.rule}: {check.detail}", refusal)

    if record is None or record.absent:
        return refuse(Check("record", False, "none"), _NO_RECORD)
    checks += [
        Check("record", True, f"{record.host} in {record.workspace}"),
        Check("release", True, f"{release.module} {release.version} on {release.channel}"),
    ]
    if floor is not None:
        below = is_below(release.version, floor.version)
        check = Check("floor", not below, f"≥ {floor.version} (release is {release.version})")
        if below:
            return refuse(
                check,
                Refusal(
                    Code.HOST_BELOW_FLOOR,
                    f"{release.module} {release.version} is below {floor.version}, the floor in {record.workspace!r}",
                    f"choose {floor.version} or newer, or have the trust document changed",
                ),
            )
        checks.append(check)
    best = max(
        (_entitled(entitlement, record, release) for entitlement in _of(entitlements, release.module)),
        key=lambda judged: len(judged.checks) + (judged.refusal is None),
        default=_unentitled(record, release),
    )
    checks += best.checks
    if best.refusal is not None:
        return Judged(tuple(checks), best.rule, best.refusal)
    named = [best.rule]
    for check, code, next_step in _requirements(inventory, release):
        if not check.passed:
            reason = f"{release.module} {release.version} needs {check.rule} {check.detail}"
            if code is Code.ELIGIBILITY_NO_INVENTORY:
                reason = f"{record.host!r} has not said yet what it is"
            return refuse(check, Refusal(code, reason, next_step))
        checks.append(check)
        if not check.detail.startswith("any"):
            named.append(f"{check.rule} {check.detail}")
    return Judged(tuple(checks), ", ".join(named), None)


def _of(entitlements: Iterable[EntitlementPut], module: str) -> Sequence[EntitlementPut]:
    return sorted((e for e in entitlements if e.module == module and not e.absent), key=lambda e: e.name)


def _unentitled(record: HostRecord, release: Release) -> Judged:
    return Judged(
        (Check("entitlement", False, f"none for {release.module}"),),
        f"entitlement: none for {release.module}",
        Refusal(
            Code.ELIGIBILITY_NO_ENTITLEMENT,
            f"the workspace {record.workspace!r} has no entitlement for {release.module!r}",
            "add one with 'loopback entitlement put'",
        ),
    )


def _entitled(entitlement: EntitlementPut, record: HostRecord, release: Release) -> Judged:
    """How far one entitlement carries one host and release: rules 4 to 7."""
    name = f'entitlement "{entitlement.name}"'
    checks = [Check("entitlement", True, f'"{entitlement.name}"')]
    wanted = ", ".join(f"{k}={v}" for k, v in sorted(entitlement.labels.items())) or "any"
    has = ", ".join(f"{k}={v}" for k, v in sorted(record.labels.items())) or "none"
    steps = (
        (
            Check("labels", labels_match(entitlement.labels, record.labels), f"{wanted} (host has {has})"),
            Code.ELIGIBILITY_LABELS,
            f"{name} is for hosts with {wanted}; {record.host!r} has {has}",
            "change the host's labels ('loopback host add') or the entitlement's ('loopback entitlement put')",
        ),
        (
            Check(
                "version",
                in_range(release.version, entitlement.versions),
                f"{entitlement.versions or 'any'} (release is {release.version})",
            ),
            Code.ELIGIBILITY_VERSION,
            f"{name} allows versions {entitlement.versions or 'any'}, not {release.version}",
            "choose a version in that range, or widen it with 'loopback entitlement put'",
        ),
        (
            Check(
                "channel",
                entitlement.channel == release.channel,
                f"{entitlement.channel} (release is on {release.channel})",
            ),
            Code.ELIGIBILITY_CHANNEL,
            f"{name} follows the channel {entitlement.channel!r}; the release is on {release.channel!r}",
            "publish the release on that channel, or entitle another one with 'loopback entitlement put'",
        ),
    )
    for check, code, reason, next_step in steps:
        checks.append(check)
        if not check.passed:
            return Judged(
                tuple(checks), f"{name}, {check.rule}: {check.detail}", Refusal(code, reason, next_step)
            )
    return Judged(tuple(checks), name, None)


def _requirements(inventory: Inventory | None, release: Release) -> Iterable[tuple[Check, Code, str]]:
    """Rules 8 to 13, each as (check, code of its refusal, next step)."""
    if inventory is None:
        yield (
            Check("inventory", False, "none yet"),
            Code.ELIGIBILITY_NO_INVENTORY,
            "start its agent with 'loopback host run'; it reports when it joins",
        )
        return
    needs = release.requirements
    yield (
        Check("inventory", True, "any"),
        Code.ELIGIBILITY_NO_INVENTORY,
        "",
    )
    yield (
        Check(
            "abi",
            needs.abi_min <= inventory.abi_max and inventory.abi_min <= needs.abi_max,
            f"{needs.abi_min}–{needs.abi_max} (agent speaks {inventory.abi_min}–{inventory.abi_max})",
        ),
        Code.ELIGIBILITY_ABI,
        "update the agent, or release the module for the agent's ABI",
    )
    yield (
        Check(
            "agent",
            not needs.agent or in_range(inventory.agent_version, needs.agent),
            f"{needs.agent or 'any'} (host has {inventory.agent_version})",
        ),
        Code.ELIGIBILITY_AGENT,
        "update the agent on the host",
    )
    yield (
        Check(
            "architecture",
            not needs.architectures or inventory.architecture in needs.architectures,
            f"{' or '.join(needs.architectures) or 'any'} (host is {inventory.architecture})",
        ),
        Code.ELIGIBILITY_ARCHITECTURE,
        "release the module for this architecture",
    )
    yield (
        Check(
            "kernel",
            _kernel_new_enough(inventory.kernel, needs.kernel),
            f"≥ {needs.kernel} (host has {inventory.kernel})" if needs.kernel else "any",
        ),
        Code.ELIGIBILITY_KERNEL,
        "boot a newer kernel on the host, or choose a release with a lower floor",
    )
    absent = [f for f in needs.features if f not in inventory.features]
    wanted = ", ".join(needs.features) or "any"
    yield (
        Check("feature", not absent, f"{wanted} (host lacks {', '.join(absent)})" if absent else wanted),
        Code.ELIGIBILITY_FEATURE,
        "boot a kernel with these features on the host",
    )


def _kernel_new_enough(has: str, needs: str) -> bool:
    if not needs:
        return True
    floor, kernel = kernel_version(needs), kernel_version(has)
    return floor is not None and kernel is not None and kernel >= floor


def check_entitlement(entitlement: EntitlementPut) -> None:
    """Refuse an entitlement that could never be applied. Raises Refused(COMMAND_MALFORMED) naming the field."""
    try:
        SpecifierSet(entitlement.versions).contains("1")  # it reads the numbers only when it compares
    except ValueError:
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"versions: {entitlement.versions!r} is no version range",
            "write it like '>=1.0,<2'; empty means any version",
        ) from None
    if not entitlement.module or not entitlement.channel:
        field = "channel" if entitlement.module else "module"
        raise Refused(Code.COMMAND_MALFORMED, f"{field}: it is empty", f"name the {field}")
    check_labels(entitlement.labels)


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse labels that are too many, too long or nameless. Raises Refused(COMMAND_MALFORMED)."""
    if len(labels) > MAX_LABELS:
        raise Refused(
            Code.COMMAND_MALFORMED,
            f"labels: {len(labels)} are more than the {MAX_LABELS} allowed",
            "use fewer labels",
        )
    for name, value in labels.items():
        if not name or len(name) > MAX_LABEL or len(value) > MAX_LABEL:
            raise Refused(
                Code.COMMAND_MALFORMED,
                f"labels: {name[:40]!r} is empty, or it or its value is longer than {MAX_LABEL} characters",
                "choose shorter labels",
            )


def version_key(version: str) -> tuple[bool, Version | str]:
    """Sorts versions as people mean them; what is no version comes before every one that is, by its letters."""
    try:
        return (True, Version(version))
    except ValueError:
        return (False, version)


def offered(
    record: HostRecord | None,
    inventory: Inventory | None,
    entitlements: Sequence[EntitlementPut],
    releases: Iterable[Release],
    floors: Mapping[str, Floor] | None = None,
) -> tuple[OfferedVersion, ...]:
    """Everything one host may or may not have, by module, newest version first; nothing for a host without record.

    `floors` are its workspace's, by module.
    """
    if record is None or record.absent:
        return ()
    by_module: dict[str, list[Release]] = {}
    for release in releases:
        by_module.setdefault(release.module, []).append(release)
    return tuple(
        judge(record, inventory, entitlements, release, (floors or {}).get(module))
        for module in sorted(by_module)
        for release in sorted(
            by_module[module], key=lambda r: (version_key(r.version), r.digest), reverse=True
        )[:MAX_RELEASES]
    )


def refused_hosts(
    hosts: Iterable[str],
    records: Mapping[str, HostRecord],
    inventories: Mapping[str, Inventory],
    entitlements: Sequence[EntitlementPut],
    release: Release,
    floor: Floor | None = None,
) -> dict[str, Refusal]:
    """Which of a rollout's hosts may not have its release, and why. Records and inventories are by host."""
    judged = {
        host: judge(records.get(host), inventories.get(host), entitlements, release, floor).refusal
        for host in hosts
    }
    return {host: refusal for host, refusal in judged.items() if refusal is not None}


def no_release(module: str, version: str) -> Refusal:
    """A rollout's version and package digest that no published release has."""
    return Refusal(
        Code.ELIGIBILITY_NO_RELEASE,
        f"there is no release {version} of {module!r} with the package digest that was signed",
        "publish it with 'loopback module publish', then start the rollout again",
    )
