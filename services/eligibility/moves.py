"""A host's move to another workspace: two records in one atomic write, and word to the host until it has heard it."""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from loopback.contracts import hostrecord, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import HostMove, Record
from loopback.contracts.trustdoc import Role
from loopback.services._runtime.bus import Bus, Stored
from loopback.services._runtime.commands import Accepted, CommandContext, Trusts
from loopback.services.eligibility.handlers import Handlers, check_place, event, parse
from loopback.services.eligibility.identities import Identities
from loopback.services.eligibility.store import Fleet, Source

log = logging.getLogger(__name__)
_TAKEN: Final = "choose another host or workspace, or withdraw that one first ('loopback host revoke')"


class Moves:
    """The service's hands for moves."""

    def __init__(
        self, bus: Bus, fleet: Fleet, handlers: Handlers, identities: Identities, trust: Trusts
    ) -> None:
        self._bus = bus
        self._fleet = fleet
        self._handlers = handlers
        self._identities = identities
        self._trust = trust

    async def move(self, context: CommandContext) -> Accepted:
        """Withdraw the record in the old workspace and make it in the new one, both by the same signed command.

        Raises Conflict where either changed in between: it is decided again.
        """
        command = context.command
        assert isinstance(command, HostMove)
        check_move(command)
        for workspace in (command.workspace, command.to):
            await self._handlers.require_workspace(workspace)
        await self._authorise(context, command)
        place, detail = context.stored.sequence, {"host": command.host, "to": command.to}
        old = await self._identities.record(command.workspace, hostrecord.KIND, command.host)
        new = await self._identities.record(command.to, hostrecord.KIND, command.host)
        known = [_body(stored).sequence if stored else 0 for stored in (old, new)]
        if max(known) > place:
            return Accepted(detail={**detail, "superseded_by": str(max(known))})
        if known != [place, place]:  # else it was redelivered
            judge(command, _body(old) if old else None, _body(new) if new else None)
            await self._fleet.caught_up(self._bus, Source.RECORDS)
            records = [
                Record(
                    kind=hostrecord.KIND,
                    name=command.host,
                    workspace=workspace,
                    envelope=context.envelope,
                    at=context.now,
                    operators=tuple(context.operators),
                    sequence=place,
                )
                for workspace in (command.workspace, command.to)
            ]
            await self._bus.batch(
                [
                    event(
                        subjects.record(record.workspace, hostrecord.KIND, record.name),
                        record,
                        f"move-{command.id}-{subjects.token(record.workspace)}",
                        context.now,
                        stored.sequence if stored else 0,
                    )
                    for record, stored in zip(records, (old, new), strict=True)
                ]
            )
        await self._identities.tell_move(command.workspace, command.host, command, context.envelope)
        return Accepted(detail=detail)

    async def _authorise(self, context: CommandContext, command: HostMove) -> None:
        """Its signers' role where the host goes; that where it comes from was asked. Raises Refused(COMMAND_UNAUTHORISED)."""
        try:
            (await self._trust.current()).authorise(context.keyids, Role.ADMIN, command.to)
        except Refused:
            if not await self._trust.look_again():
                raise
            (await self._trust.current()).authorise(context.keyids, Role.ADMIN, command.to)

    async def on_inventory(self, stored: Stored) -> None:
        """A host has joined where it was moved away from: it has not heard of it, so it is told again."""
        parsed = parse(stored)
        if parsed is None:
            return
        host = parsed.workspace, parsed.rest[0]
        if (move := self._fleet.moved.get(host)) is not None:
            await self._identities.tell_move(*host, *move)


def judge(command: HostMove, old: Record | None, new: Record | None) -> None:
    """Whether a host is where it is to be taken from, and its place is free. Raises Refused."""
    found = hostrecord.of(old) if old is not None else None
    if found is None or found.absent:
        raise Refused(
            Code.ELIGIBILITY_NO_RECORD,
            f"there is no host {command.host!r} in {command.workspace!r}",
            "see 'loopback hosts'",
        )
    if found.public_key.lower() != command.public_key.lower():
        raise Refused(
            Code.COMMAND_CONFLICT,
            f"public_key: the record of {command.host!r} names another key",
            "look at the record again ('loopback host show') and sign the move anew",
        )
    if new is not None and not hostrecord.of(new).absent:
        raise Refused(
            Code.COMMAND_CONFLICT, f"to: there is a host {command.host!r} in {command.to!r} already", _TAKEN
        )


def check_move(command: HostMove) -> None:
    """Refuse a move that leads nowhere. Raises Refused(COMMAND_MALFORMED) naming the field."""
    check_place(command.labels, command.addresses)
    try:
        PublicKey.parse(command.public_key)
        subjects.workspace_stream(command.to)
    except Refused as error:
        raise Refused(Code.COMMAND_MALFORMED, f"the move does not read: {error.reason}") from None
    if command.to == command.workspace:
        raise Refused(Code.COMMAND_MALFORMED, f"to: the host is in {command.to!r}", "name another workspace")


def _body(stored: Stored) -> Record:
    return msgspec.json.decode(stored.data, type=Record)
