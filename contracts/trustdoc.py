"""The trust document: which key may do what in which workspace. It is the TUF target `trust.json`.

Services consult it for an early answer, hosts for the real one, both through `authorise`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

import msgspec
from packaging.version import InvalidVersion, Version

from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.keys import PublicKey

TARGET: Final = "trust.json"
EVERY_WORKSPACE: Final = "*"
EVERY_POOL: Final = "*"


class Role(StrEnum):
    """What an operator may do. An admin may do everything; the others only what they say."""

    VIEWER = "viewer"
    AUTHOR = "author"  # signs policies
    APPROVER = "approver"  # second signature
    RELEASER = "releaser"  # publishes releases, starts rollouts
    BALANCER = "balancer"  # says which addresses its own pools have: a load balancer's account
    ADMIN = "admin"  # workspaces, entitlements, host records


class Operator(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A person, or a load balancer: `public_key` in hex, `roles` by workspace (`*` for every one).

    `pools` names those that the role balancer is about (`*`: any); without them it may say nothing of any pool.
    """

    name: str
    public_key: str
    roles: dict[str, tuple[Role, ...]]
    pools: tuple[str, ...] = ()


class Floor(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The oldest version of a module that may be newly installed; from `not_before` on, an older one that runs is reported."""

    version: str
    not_before: Time | None = None


class WorkspaceRules(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What holds in a workspace, whatever any service says.

    `regulated`: a rollout needs a second operator's signature, publishers must be pinned, agent-side debugging is off.
    `publishers` maps a module to the ids of the keys of which one must have signed its release, `floors` to its oldest version.
    """

    regulated: bool = False
    publishers: dict[str, tuple[str, ...]] = {}
    floors: dict[str, Floor] = {}


class TrustDocument(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Operators, and the keys with which services sign what hosts obey (`services["activation"]`), in hex.

    `workspaces` holds the rules of each workspace by its name; those under `*` hold in every one.
    """

    version: int
    operators: tuple[Operator, ...]
    services: dict[str, tuple[str, ...]]
    workspaces: dict[str, WorkspaceRules] = {}


_DECODER = Decoder(msgspec.json.Decoder(TrustDocument))
_NO_RULES: Final = WorkspaceRules()
_ALWAYS: Final = datetime.min.replace(tzinfo=UTC)


def _strictness(floor: Floor) -> tuple[Version, float]:
    since = floor.not_before or _ALWAYS
    return Version(floor.version), -(since - _ALWAYS).total_seconds()


def _check(document: TrustDocument) -> None:
    """Refuse what would fail only when it is needed, or hold for anybody. Raises Refused(TUF_INVALID, SIGNATURE_WEAK_KEY)."""
    for keys in document.services.values():
        for text in keys:
            PublicKey.parse(text).sound()
    named: dict[str, str] = {}
    for operator in document.operators:
        other = named.setdefault(PublicKey.parse(operator.public_key).sound().keyid, operator.name)
        if other != operator.name:
            raise Refused(
                Code.TUF_INVALID,
                f"the trust document gives one key to two operators, {other!r} and {operator.name!r}",
                "give each their own: what a key signs is one person's word",
            )
    for workspace, rules in document.workspaces.items():
        for module, floor in rules.floors.items():
            try:
                Version(floor.version)
            except InvalidVersion:
                raise Refused(
                    Code.TUF_INVALID,
                    f"the trust document's floor of {module!r} in {workspace!r} is no version: {floor.version[:80]!r}",
                ) from None


class Trust:
    """A trust document made ready for questions."""

    def __init__(self, document: TrustDocument) -> None:
        self.document = document
        self.operators = {PublicKey.parse(o.public_key).keyid: o for o in document.operators}
        self.operator_keys = {k: PublicKey.parse(o.public_key) for k, o in self.operators.items()}
        self.service_keys = {
            name: {key.keyid: key for key in (PublicKey.parse(text) for text in keys)}
            for name, keys in document.services.items()
        }

    @classmethod
    def decode(cls, data: bytes) -> Trust:
        """From the target's bytes. Raises Refused(TUF_INVALID, SIGNATURE_WEAK_KEY)."""
        try:
            document = _DECODER.decode(data)
            _check(document)
            return cls(document)
        except msgspec.MsgspecError as error:
            raise Refused(Code.TUF_INVALID, f"the trust document is malformed: {error}") from None

    def roles(self, keyid: str, workspace: str) -> frozenset[Role]:
        """The roles of a key in a workspace; empty for an unknown key."""
        operator = self.operators.get(keyid)
        if operator is None:
            return frozenset()
        return frozenset(operator.roles.get(workspace, ()) + operator.roles.get(EVERY_WORKSPACE, ()))

    def rules(self, workspace: str) -> WorkspaceRules:
        """The rules of a workspace, together with those of every workspace: always the stricter.

        Regulated if either says so; a publisher must be pinned by both that name the module; the higher floor holds, and of
        two equal ones the earlier.
        """
        every = self.document.workspaces.get(EVERY_WORKSPACE, _NO_RULES)
        own = (
            self.document.workspaces.get(workspace, _NO_RULES) if workspace != EVERY_WORKSPACE else _NO_RULES
        )
        publishers = dict(every.publishers)
        for module, keys in own.publishers.items():
            publishers[module] = tuple(k for k in keys if k in publishers.get(module, keys))
        floors = dict(every.floors)
        for module, floor in own.floors.items():
            floors[module] = max(floors.get(module, floor), floor, key=_strictness)
        return WorkspaceRules(
            regulated=every.regulated or own.regulated, publishers=publishers, floors=floors
        )

    def authorise_pool(self, keyids: tuple[str, ...], pool: str, workspace: str) -> tuple[str, ...]:
        """The names of those among `keyids` who may say what this pool has: its balancers, and admins of the workspace.

        Raises Refused(COMMAND_UNAUTHORISED) where there is none.
        """
        names = self.authorise(keyids, Role.BALANCER, workspace)
        admins = {self.operators[k].name for k in keyids if Role.ADMIN in self.roles(k, workspace)}
        pools = {self.operators[k].name: self.operators[k].pools for k in keyids if k in self.operators}
        found = tuple(n for n in names if n in admins or {pool, EVERY_POOL} & set(pools[n]))
        if not found:
            raise Refused(
                Code.COMMAND_UNAUTHORISED,
                f"the pool {pool!r} is not among the pools of {', '.join(names)}",
                "ask an admin, or have the trust document changed ('loopback keys operator NAME --pool …')",
            )
        return found

    def authorise(self, keyids: tuple[str, ...], role: Role, workspace: str) -> tuple[str, ...]:
        """The names of the operators among `keyids` who have `role` (or admin) in `workspace`.

        Raises Refused(COMMAND_UNAUTHORISED) where there is none.
        """
        names = tuple(self.operators[k].name for k in keyids if self.roles(k, workspace) & {role, Role.ADMIN})
        if not names:
            signers = (
                ", ".join(self.operators[k].name for k in keyids if k in self.operators) or "nobody known"
            )
            raise Refused(
                Code.COMMAND_UNAUTHORISED,
                f"it needs the role {role} in workspace {workspace!r}; signed by {signers}",
                "ask somebody with that role, or have the trust document changed",
            )
        return names
