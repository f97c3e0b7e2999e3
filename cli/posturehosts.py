"""What is known of each host of a workspace, and why one is not as it should be. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

import msgspec
from packaging.version import InvalidVersion, Version

from loopback.cli import evidence, witnessing
from loopback.cli.audit import Examined
from loopback.contracts import reports, trustdoc, view
from loopback.contracts.codes import Refused
from loopback.contracts.desired import Running
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import Release, Requirements
from loopback.contracts.reports import Inventory, ModuleStatus, Status
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.contracts.view import HostView


class Seen(NamedTuple):
    """What is known of one host. `verified`: its status was, with the recorded key."""

    record: HostRecord
    status: Status | None
    inventory: Inventory | None
    view: HostView | None
    verified: bool


def seen_hosts(examined: Examined) -> dict[str, Seen]:
    """Every host with a record, by name, with its newest words: verified where they are still stored."""
    found = examined.evidence
    views: dict[str, HostView] = {}
    for stored in found.views:
        try:
            one = view.decode(stored.data) if stored.data else None
        except (msgspec.MsgspecError, RecursionError):
            continue
        if one is not None:
            views[one.host] = one
    words: dict[tuple[str, str], reports.AnyReport] = {}

    def key_of(workspace: str, host: str) -> PublicKey | None:
        record = examined.hosts.get(host) if workspace == found.workspace else None
        return PublicKey.parse(record.public_key) if record else None

    for stored in found.reports:
        try:
            report = reports.open_report(stored.data, stored.subject, key_of)
        except Refused:
            continue  # the audit names whose words do not verify
        words[report.host, type(report).__name__] = report
    answer = {}
    for name, record in sorted(examined.hosts.items()):
        status, inventory, known = (
            words.get((name, "Status")),
            words.get((name, "Inventory")),
            views.get(name),
        )
        assert status is None or isinstance(status, Status)
        assert inventory is None or isinstance(inventory, Inventory)
        answer[name] = Seen(
            record,
            status or (known.status if known else None),
            inventory or (known.inventory if known else None),
            known,
            status is not None,
        )
    return answer


def promoted(hosts: Mapping[str, Seen]) -> dict[tuple[str, Running], list[str]]:
    """Module and what is promoted of it → on which hosts, by their word."""
    found: dict[tuple[str, Running], list[str]] = {}
    for name, seen in hosts.items():
        for module in seen.status.modules if seen.status else ():
            if module.promoted is not None:
                found.setdefault((module.module, module.promoted), []).append(name)
    return found


class Judge:
    """Says of each host why it is not as it should be."""

    def __init__(self, examined: Examined, now: datetime) -> None:
        self.rules: WorkspaceRules = examined.trusted.trust.rules(examined.evidence.workspace)
        self.now = now
        self.releases: dict[tuple[str, str], Release] = {
            (r.module, r.digest): r for r in evidence.releases(examined.evidence)
        }
        self.targets = examined.trusted.targets
        self.witnesses = {h.host: h for h in examined.journal.hosts}

    def problems(self, name: str, seen: Seen, state: str) -> Iterable[str]:
        if state == "never seen":
            yield "never seen"
            return
        if state == "lost":
            yield "lost: nobody knows what it runs now"
        status = seen.status
        if status is not None:
            if status.agent == "degraded":
                yield "its agent says that it is degraded"
            if status.refusal is not None:
                yield f"it refuses what it is asked: {status.refusal.reason} [{status.refusal.code}]"
            for module in status.modules:
                yield from self._module_problems(module)
        if seen.view is not None and seen.view.cloned:
            yield "two agents spoke at once under its key: its key and state are on two machines"
        witness = self.witnesses.get(name)
        if witness is not None and witness.agreement in ("contradicts", "cut"):
            yield "it witnessed another journal than there is"
        if not seen.verified and status is not None:
            yield "its newest status could not be verified here"

    def _module_problems(self, module: ModuleStatus) -> Iterable[str]:
        name, running = module.module, module.promoted
        if module.noncompliant is not None:
            yield f"{name} is not what the rules ask for: {module.noncompliant.reason} [{module.noncompliant.code}]"
        if module.health in ("degraded", "failed"):
            why = f": {module.refusal.reason} [{module.refusal.code}]" if module.refusal else ""
            yield f"{name} is {module.health}{why}"
        elif module.refusal is not None:
            yield f"{name} {module.phase}: {module.refusal.reason} [{module.refusal.code}]"
        if running is None:
            return
        if not module.enforcing:
            yield f"{name} {running.version} is promoted but does not say that it enforces"
        release = self.releases.get((name, running.package))
        target = self.targets.get(release.target) if release else None
        if target is None or target.sha256 != running.package:
            yield f"{name} {running.version} ({running.package[:12]}) is no release that counts by the repository now"
        elif (pins := self.rules.publishers.get(name)) is not None and not set(pins) & set(target.signers):
            yield f"{name} {running.version} was not signed by a publisher that is pinned here"
        floor = self.rules.floors.get(name)
        if (
            floor is not None
            and (floor.not_before is None or floor.not_before <= self.now)
            and _below(running.version, floor)
        ):
            yield f"{name} {running.version} is below the floor {floor.version}"


def unmet(needs: Requirements, inventory: Inventory | None) -> str:
    """Why a host does not offer what a release needs; empty where it does."""
    if inventory is None:
        return "it has sent no inventory"
    if needs.kernel and _numbers(inventory.kernel) < _numbers(needs.kernel):
        return f"kernel {inventory.kernel} is older than {needs.kernel}"
    if missing := sorted(set(needs.features) - set(inventory.features)):
        return f"its kernel has no {', '.join(missing)}"
    if needs.architectures and inventory.architecture not in needs.architectures:
        return f"{inventory.architecture} is none of {', '.join(needs.architectures)}"
    return ""


def _numbers(kernel: str) -> tuple[int, ...]:
    found = []
    for part in kernel.split("-")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found[:3])


def _below(version: str, floor: trustdoc.Floor) -> bool:
    try:
        return Version(version) < Version(floor.version)
    except InvalidVersion:
        return True


def agreement(witness: witnessing.HostWitness | None) -> str:
    if witness is None:
        return "not asked"
    return {
        "confirms": f"confirms it up to link {witness.links}",
        "contradicts": f"has another head at link {witness.links}",
        "cut": f"witnessed {witness.links} links, which is more than there are",
        "nothing": "has witnessed nothing yet",
        "unverified": f"not verifiable: {witness.why}",
    }[witness.agreement]
