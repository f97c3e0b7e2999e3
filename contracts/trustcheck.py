"""Whether a trust document can be lived with: asked before it is signed, and by delivery before it is published."""

from __future__ import annotations

from loopback.contracts.codes import Code, Refused
from loopback.contracts.trustdoc import EVERY_WORKSPACE, Role, Trust


def regulated_workspaces(trust: Trust) -> list[str]:
    """Named workspaces in which a rollout needs a second signature; `*` itself where every one is, and none is named."""
    document = trust.document
    named = {w for w in document.workspaces if w != EVERY_WORKSPACE}
    named |= {w for o in document.operators for w in o.roles if w != EVERY_WORKSPACE}
    found = sorted(w for w in named if trust.rules(w).regulated)
    return found or ([EVERY_WORKSPACE] if trust.rules(EVERY_WORKSPACE).regulated else [])


def check(trust: Trust) -> None:
    """Raises Refused(TUF_INVALID) where it locks everybody out, or nothing could start in a regulated workspace."""
    document = trust.document
    if not any(Role.ADMIN in o.roles.get(EVERY_WORKSPACE, ()) for o in document.operators):
        raise _invalid("nobody would be admin of every workspace any more", "leave or make one")
    if not document.services.get("activation"):
        raise _invalid("it names no key of activation, whose word hosts act on", "leave one")
    keys = [operator.public_key.lower() for operator in document.operators]
    for operator in document.operators:
        if keys.count(operator.public_key.lower()) > 1:
            raise _invalid(
                f"{operator.name} shares a key with somebody else", "give everybody a key of their own"
            )
    for workspace in regulated_workspaces(trust):
        starters, approvers = (_who(trust, role, workspace) for role in (Role.RELEASER, Role.APPROVER))
        if not any(a != s for a in approvers for s in starters):
            raise _invalid(
                f"in the regulated workspace {workspace!r} nobody could approve what another starts"
                f" (may start: {', '.join(sorted(starters)) or 'nobody'};"
                f" may approve: {', '.join(sorted(approvers)) or 'nobody'})",
                "give a second person the role approver there first: 'loopback keys operator NAME --role approver'",
            )


def _who(trust: Trust, role: Role, workspace: str) -> set[str]:
    return {o.name for k, o in trust.operators.items() if trust.roles(k, workspace) & {role, Role.ADMIN}}


def _invalid(said: str, next_step: str) -> Refused:
    return Refused(Code.TUF_INVALID, f"trust.json: {said}", next_step)
