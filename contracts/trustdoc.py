"""The trust document: which key may do what in which workspace. It is the TUF target `trust.json`.

Services consult it for an early answer, hosts for the real one, both through `authorise`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.keys import PublicKey

TARGET: Final = "trust.json"
EVERY_WORKSPACE: Final = "*"


class Role(StrEnum):
    """What an operator may do. An admin may do everything; the others only what they say."""

    VIEWER = "viewer"
    AUTHOR = "author"  # signs policies
    APPROVER = "approver"  # second signature
    RELEASER = "releaser"  # publishes releases, starts rollouts
    ADMIN = "admin"  # workspaces, entitlements, host records


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A person: `public_key` in hex, `roles` by workspace (`*` for every one)."""

    name: str
    public_key: str
    roles: dict[str, tuple[Role, ...]]


class TrustDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Operators, and the keys with which services sign what hosts obey (`services["activation"]`), in hex."""

    version: int
    operators: tuple[Operator, ...]
    services: dict[str, tuple[str, ...]]


_DECODER = Decoder(msgspec.json.Decoder(TrustDocument))


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
        """From the target's bytes. Raises Refused(TUF_INVALID)."""
        try:
            return cls(_DECODER.decode(data))
        except msgspec.MsgspecError as error:
            raise Refused(Code.TUF_INVALID, f"the trust document is malformed: {error}") from None

    def roles(self, keyid: str, workspace: str) -> frozenset[Role]:
        """The roles of a key in a workspace; empty for an unknown key."""
        operator = self.operators.get(keyid)
        if operator is None:
            return frozenset()
        return frozenset(operator.roles.get(workspace, ()) + operator.roles.get(EVERY_WORKSPACE, ()))

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
