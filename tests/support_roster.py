"""Rosters as activation publishes them, or as somebody does who has its key."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec
from support_host import WORKSPACE, World

from loopback.contracts import envelope, roster, subjects
from loopback.contracts.desired import Running
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostPut, PoolPut
from loopback.contracts.roster import Member, Roster, Source
from loopback.services._runtime.wire import Outgoing

WEB, SHOP = Source(labels={"role": "web"}), Source(pool="shop")


class Desk:
    """Signs members as an operator, and publishes rosters of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._last: datetime | None = None

    def host(self, name: str, *addresses: str, key: SigningKey | None = None, **changed: Any) -> Member:
        """A host's record, signed now."""
        signers = self.world.signers
        known = {"public_key": "00" * 32, "labels": {"role": "web"}, "addresses": addresses, "host": name}
        return Member(signers.command(HostPut(**signers.times() | known | changed), *([key] if key else [])))

    def pool(self, serial: int, *addresses: str, key: SigningKey | None = None, **changed: Any) -> Member:
        """A word on the pool shop."""
        signers = self.world.signers
        known = {"pool": "shop", "serial": serial, "addresses": addresses}
        return Member(signers.command(PoolPut(**signers.times() | known | changed), *([key] if key else [])))

    async def publish(
        self, source: Source, members: Mapping[str, Member], *, key: SigningKey | None = None, **changed: Any
    ) -> Roster:
        """Store slices and roster, later than the one before."""
        slices = roster.cut(members)
        now = self.world.signers.clock()
        at = now if self._last is None else max(now, self._last + timedelta(microseconds=1))
        self._last = at
        made = Roster(workspace=WORKSPACE, source=source, slices=roster.digests(slices), issued_at=at)
        made = msgspec.structs.replace(made, **changed)
        for number, data in enumerate(slices):
            if data:
                subject = subjects.slice_of(WORKSPACE, source.key, number)
                await self.world.bus.publish(Outgoing(subject, data))
        signed = envelope.seal_bytes(
            envelope.ROSTER, msgspec.json.encode(made), key or self.world.signers.activation
        )
        await self.world.bus.publish(Outgoing(subjects.roster(WORKSPACE, source.key), signed))
        return made


async def with_sets(
    world: World,
    running: Running,
    serial: int,
    content: Mapping[str, object] | None = None,
    **sources: Source,
) -> Running:
    """The same version with a policy whose sets these sources fill, published."""
    data, digest = world.signers.policy(serial, {"serial": serial, **(content or {})}, sources=sources)
    await world.blob(data)
    return msgspec.structs.replace(running, policy=digest, policy_serial=serial)
