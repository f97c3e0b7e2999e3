"""Version floors, and what runs against the rules of its workspace. Pure."""

from __future__ import annotations

from datetime import datetime

from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.exposure import is_below
from loopback.contracts.trustdoc import Floor, WorkspaceRules
from loopback.host.state import ModuleState


def in_force(floor: Floor, time: datetime) -> bool:
    """Whether a floor's time has come."""
    return floor.not_before is None or floor.not_before <= time


def refused(version: str, floor: Floor) -> Refused:
    """What is said of a version below its floor."""
    return Refused(
        Code.HOST_BELOW_FLOOR,
        f"version {version} is older than {floor.version}, the oldest that this workspace allows",
        f"roll out {floor.version} or newer",
    )


def noncompliant(state: ModuleState, rules: WorkspaceRules, time: datetime) -> Refusal | None:
    """Why what runs here is not what the workspace asks for, where that is so. It goes on running: nothing better did here.

    A version below a floor that is in force, or, where publishers are pinned, a package that none of them signed.
    """
    running = state.promoted
    if running is None:
        return None
    floor = rules.floors.get(state.module)
    if floor is not None and in_force(floor, time) and is_below(running.version, floor.version):
        return refused(running.version, floor).refusal
    pinned = rules.publishers.get(state.module)
    if pinned is None and not rules.regulated:
        return None
    if set(state.signers.get(running.package, ())) & set(pinned or ()):
        return None
    return Refusal(
        Code.HOST_PUBLISHER,
        f"version {running.version} was signed by no publisher that this workspace pins",
        "roll out a version that one of them signed",
    )
