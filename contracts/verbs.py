"""Who may do what: for each command, the service that decides on it and the role that its signature needs.

The one table. Services check it for an early answer (`services/_runtime/commands.py`); what a host acts on, it checks itself
against the same roles (`host/decide.py`). An admin may do everything; a role holds in the workspaces that the trust document
names, or in all of them (`*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from loopback.contracts.messages import (
    Command,
    EntitlementPut,
    HostInvite,
    HostMove,
    HostPut,
    MetadataPublish,
    PoolPut,
    ReleasePublish,
    RolloutAbort,
    RolloutApprove,
    RolloutPause,
    RolloutResume,
    RolloutStart,
    WorkspacePut,
)
from loopback.contracts.trustdoc import Role


class Verb(NamedTuple):
    """`service` decides, `role` is needed in the command's workspace, `what` says it to people."""

    service: str
    role: Role
    what: str


VERBS: Final[Mapping[type[Command], Verb]] = {
    WorkspacePut: Verb("eligibility", Role.ADMIN, "create or change a workspace"),
    EntitlementPut: Verb("eligibility", Role.ADMIN, "let hosts have a module, or no longer"),
    HostPut: Verb("eligibility", Role.ADMIN, "record a host's key, labels and addresses, or take it away"),
    HostInvite: Verb("eligibility", Role.ADMIN, "invite a host"),
    HostMove: Verb("eligibility", Role.ADMIN, "move a host to another workspace (admin of both)"),
    PoolPut: Verb("eligibility", Role.BALANCER, "say which addresses a pool has (a balancer: its own pools)"),
    ReleasePublish: Verb("delivery", Role.RELEASER, "publish a release (in the workspace global)"),
    MetadataPublish: Verb("delivery", Role.ADMIN, "publish root, targets or trust metadata"),
    RolloutStart: Verb("activation", Role.RELEASER, "start a rollout"),
    RolloutApprove: Verb("activation", Role.APPROVER, "approve a rollout that somebody else started"),
    RolloutPause: Verb("activation", Role.RELEASER, "pause a rollout"),
    RolloutResume: Verb("activation", Role.RELEASER, "let a paused rollout go on"),
    RolloutAbort: Verb("activation", Role.RELEASER, "end a rollout and take its hosts back"),
}

#: What is signed and is no command: whoever signs a policy needs this role in the policy's workspace.
POLICY: Final = Verb("activation", Role.AUTHOR, "sign a policy")


def kind(command: type[Command]) -> str:
    """A command's type on the wire, as `rollout.start`."""
    return str(command.__struct_config__.tag)


def verb(command: type[Command]) -> str:
    """The verb in its subject, as `rollout-start`."""
    return kind(command).replace(".", "-")


def table() -> str:
    """The table as Markdown, as `docs/operate.md` has it."""
    rows = [(f"`{kind(command)}`", one) for command, one in VERBS.items()]
    rows.append(("a policy", POLICY))
    lines = [f"| {name} | {one.what} | {one.role} | {one.service} |" for name, one in rows]
    return "\n".join(("| signed | what it does | role | decided by |", "|---|---|---|---|", *lines))
