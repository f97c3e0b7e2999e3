"""`loopback host revoke`: take a host's record away, and with it its way onto the bus."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import typer

from loopback.cli import context, fleetio, revoke
from loopback.contracts import hostrecord, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.messages import HostPut, Record


def revoke_command(
    host: Annotated[str, typer.Argument(help="The host.")],
    workspace: Annotated[str | None, typer.Option("--workspace", help="The host's workspace.")] = None,
    old_keys: Annotated[
        bool,
        typer.Option(
            "--old-keys", help="Only the keys that it had before its present one; its record stays."
        ),
    ] = False,
) -> None:
    """Withdraw a host's record and revoke its key: it is disconnected at once and never let in again.

    What it enforces goes on until its agent is removed. The machine may come back with a new key:

      loopback host revoke web-1
      loopback host invite web-1 --workspace prod > token
    """

    async def run() -> tuple[int, int | None]:
        async with context.connect() as session:
            place = await fleetio.any_workspace(session, workspace)
            if old_keys:
                keys = await earlier_keys(session, host, place)
            else:
                record = await fleetio.recorded(session, host, workspace)
                await withdraw(session, record)
                keys = [PublicKey.parse(record.public_key)]
            return len(keys), await cut_off(session, keys)

    count, servers = asyncio.run(run())
    what = f"{count} earlier keys of {host} are" if old_keys else f"{host} is"
    if servers is None:
        before = "" if old_keys else f"{host} is no longer known, but its key still connects: "
        typer.echo(
            f"{before}keys/nats is not in this home\n"
            f"next: run 'loopback host revoke {host} --old-keys' where that is",
            err=True,
        )
        raise typer.Exit(1)
    told = (
        f"{servers} server{'s' * (servers != 1)} told"
        if servers
        else "no server reached; it holds from the next start on"
    )
    typer.echo(f"{what} revoked ({told})", err=True)


async def withdraw(session: context.Session, record: hostrecord.HostRecord) -> None:
    """Take a host's record away."""
    await session.send(
        HostPut(
            **context.new_command_fields(record.workspace),
            host=record.host,
            public_key=record.public_key,
            absent=True,
        ),
        "eligibility",
    )


async def cut_off(session: context.Session, keys: list[PublicKey]) -> int | None:
    """Revoke these keys on the bus: how many servers were told. None: this home does not hold the keys for that."""
    home, servers = session.context.home, 0
    if not await asyncio.to_thread((home / "keys" / "nats" / "account.nk").exists):
        return None
    for key in keys:
        servers = await revoke.revoke(home, session.context.url, key)
    return servers


async def earlier_keys(session: context.Session, host: str, workspace: str) -> list[PublicKey]:
    """Every key that a host ever had, but for one that any record names now. Raises Refused(ELIGIBILITY_NO_RECORD)."""
    now = {h.public_key.lower() for h in await fleetio.hosts(session)}
    found: dict[str, None] = {}
    stored = await session.read(subjects.STREAM_FLEET, [subjects.record(workspace, hostrecord.KIND, host)])
    for message in stored:
        found[hostrecord.of(msgspec.json.decode(message.data, type=Record)).public_key.lower()] = None
    if not stored:
        raise Refused(
            Code.ELIGIBILITY_NO_RECORD, f"no record ever named the host {host!r}", "see 'loopback hosts'"
        )
    return [PublicKey.parse(key) for key in found if key and key not in now]
