"""Activation keeps rosters true on a real broker: records and pools change, replicas race, streams are wiped."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from activation_fleet import Fleet, fleet
from activation_world import start_command
from support import Place, eventually
from support_fleet import OPERATOR, WORKSPACE, fields

from loopback.contracts import envelope, hostrecord, roster, subjects
from loopback.contracts.messages import Policy, PoolPut
from loopback.contracts.roster import Roster, Source
from loopback.services._runtime.bus import Unavailable
from loopback.services.activation import rosters

pytestmark = pytest.mark.broker
WEB, SHOP = Source(labels={"role": "web"}), Source(pool="shop")
PATIENCE = 60.0


@pytest.fixture
async def place(any_broker: Place) -> AsyncIterator[Fleet]:
    async with fleet(any_broker) as found:
        await found.add_hosts("db-1", labels={"role": "db"})
        yield found


async def put_host(found: Fleet, name: str, *addresses: str, **changed: Any) -> None:
    """A host's record, new or changed; nobody runs there."""
    if name not in found.hosts:
        await found.add_hosts(name)
    known = {"labels": {"role": "web"}, "addresses": addresses}
    await found.hosts[name].fake.put(**known | changed)


async def start(found: Fleet, name: str = "r1", **sources: Source) -> None:
    """A rollout whose policy's sets these sources fill."""
    signed = Policy(
        workspace=WORKSPACE, module="firewall", name="web", serial=1, content=msgspec.Raw(b'{"version":1}'),
        issued_at=datetime.now(UTC), sources=sources,
    )  # fmt: skip
    data = envelope.seal_bytes(envelope.POLICY, msgspec.json.encode(signed), OPERATOR)
    await found.put_blob(data)
    command = start_command(name, datetime.now(UTC), policy=hashlib.sha256(data).hexdigest(), policy_serial=1)
    result = await found.send(command)
    assert result.ok, result.refusal


async def read(found: Fleet, source: Source) -> tuple[Roster, list[str]] | None:
    """The stored roster, and who is in its slices; None while the two do not agree, or there is none."""
    stored = await found.admin.last(subjects.STREAM_ROSTERS, subjects.roster(WORKSPACE, source.key))
    if stored is None:
        return None
    made = roster.decode(envelope.payload_of(envelope.parse(stored.data)))
    names = []
    for number, digest in enumerate(made.slices):
        if digest:
            one = await found.admin.last(
                subjects.STREAM_ROSTERS, subjects.slice_of(WORKSPACE, source.key, number)
            )
            if one is None or hashlib.sha256(one.data).hexdigest() != digest:
                return None
            for member in roster.decode_slice(one.data).members:
                if source.pool:
                    command = msgspec.json.decode(envelope.payload_of(member.envelope), type=PoolPut)
                    names.append(f"{command.pool} {command.serial}")
                else:
                    names.append(hostrecord.read_envelope(member.envelope, member.claim, WORKSPACE).host)
    return made, sorted(names)


async def holds(found: Fleet, source: Source, *names: str) -> Roster:
    """Wait until exactly these are in it."""

    async def check() -> Roster | None:
        now = await read(found, source)
        return now[0] if now is not None and now[1] == sorted(names) else None

    made = await eventually(check, PATIENCE)
    assert made is not None
    return made


async def test_rosters_follow_records_and_pools_from_the_first_rollout_on(place: Fleet) -> None:
    await put_host(place, "web-1", "10.0.0.1")
    await put_host(place, "nowhere")
    assert await read(place, WEB) is None, "nobody asked for it yet"
    heard: asyncio.Queue[Roster] = asyncio.Queue()

    async def on(message: Any) -> None:
        heard.put_nowait(roster.decode(envelope.payload_of(envelope.parse(message.data))))

    await place.client.subscribe(subjects.rosters(WORKSPACE, WEB.key), cb=on)
    await place.client.flush()
    await start(place, web=WEB, backends=SHOP)
    first = await holds(place, WEB, "web-1")
    await holds(place, SHOP)
    await put_host(place, "web-2", "10.0.0.2")
    second = await holds(place, WEB, "web-1", "web-2")
    await put_host(place, "web-1", "10.0.0.1", labels={"role": "db"})
    await holds(place, WEB, "web-2")
    await put_host(place, "web-2", "10.0.0.2", absent=True)
    last = await holds(place, WEB)
    assert first.issued_at < second.issued_at < last.issued_at
    async with asyncio.timeout(PATIENCE):
        while (await heard.get()) != last:
            pass

    pool = PoolPut(**fields(), pool="shop", serial=7, addresses=("10.1.0.1",))
    await place.world.put("pool", "shop", pool)
    await holds(place, SHOP, "shop 7")
    gone = PoolPut(**fields(), pool="shop", serial=8, absent=True)
    await place.world.put("pool", "shop", gone)
    await holds(place, SHOP, "shop 8")


@pytest.mark.parametrize("bad", [WEB, SHOP], ids=["labels", "pool"])
async def test_a_roster_that_cannot_be_published_holds_up_no_other(
    place: Fleet, monkeypatch: pytest.MonkeyPatch, bad: Source
) -> None:
    good = SHOP if bad is WEB else WEB
    real = rosters.Rosters._refresh

    async def refresh(self: rosters.Rosters, workspace: str, source: Source) -> None:
        if source == bad:
            raise Unavailable("no answer")
        await real(self, workspace, source)

    await put_host(place, "web-1", "10.0.0.1")
    pool = PoolPut(**fields(), pool="shop", serial=1, addresses=("10.1.0.1",))
    await place.world.put("pool", "shop", pool)
    names = {WEB.key: "web-1", SHOP.key: "shop 1"}
    with monkeypatch.context() as broken:
        broken.setattr(rosters.Rosters, "_refresh", refresh)
        await start(place, web=WEB, backends=SHOP)
        await holds(place, good, names[good.key])
        assert await read(place, bad) is None
    await holds(place, bad, names[bad.key])


async def test_one_record_changes_one_slice_of_a_large_roster(place: Fleet) -> None:
    for number in range(40):
        await put_host(place, f"web-{number}", f"10.0.0.{number}")
    await start(place, web=WEB)
    before = await holds(place, WEB, *(f"web-{n}" for n in range(40)))
    assert len(before.slices) == 4
    await put_host(place, "web-7", "10.0.9.7")

    async def changed() -> Roster | None:
        found = await read(place, WEB)
        return found[0] if found is not None and found[0].slices != before.slices else None

    after = await eventually(changed, PATIENCE)
    assert after is not None
    assert sum(a != b for a, b in zip(before.slices, after.slices, strict=True)) == 1


async def test_two_replicas_agree_and_one_that_starts_later_goes_on(place: Fleet) -> None:
    await place.replica()
    await put_host(place, "web-1", "10.0.0.1")
    await start(place, web=WEB)
    await holds(place, WEB, "web-1")
    for one in place.replicas:
        await one.stop()
    place.replicas.clear()
    await put_host(place, "web-2", "10.0.0.2")
    await place.replica()
    made = await holds(place, WEB, "web-1", "web-2")
    await place.replica()
    await put_host(place, "web-3", "10.0.0.3")
    await holds(place, WEB, "web-1", "web-2", "web-3")
    stored = await place.admin.last(subjects.STREAM_ROSTERS, subjects.roster(WORKSPACE, WEB.key))
    assert stored is not None
    identity = place.hosts["web-1"].activation
    envelope.open_envelope(envelope.parse(stored.data), envelope.ROSTER, {identity.keyid: identity})
    assert made.issued_at < datetime.now(UTC) + timedelta(minutes=1)


async def test_a_wiped_stream_is_filled_again(place: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rosters, "LOOK_S", 0.2)
    await put_host(place, "web-1", "10.0.0.1")
    await start(place, web=WEB)
    before = await holds(place, WEB, "web-1")
    await place.admin.api(f"STREAM.PURGE.{subjects.STREAM_ROSTERS}", {})
    await put_host(place, "db-1", "10.0.0.9", labels={"role": "db"})  # nothing of it, but it wakes who sleeps
    after = await holds(place, WEB, "web-1")
    assert after.issued_at > before.issued_at, "hosts that knew the one before take it"


def test_the_time_of_a_roster_grows_unless_no_host_believes_the_last_one() -> None:
    now = datetime(2026, 11, 26, tzinfo=UTC)
    made = Roster(workspace=WORKSPACE, source=WEB, slices=("",), issued_at=now)
    assert rosters.issued(now, None) == now
    assert rosters.issued(now, made) == now + timedelta(microseconds=1)
    ahead = msgspec.structs.replace(made, issued_at=now + timedelta(minutes=1))
    assert rosters.issued(now, ahead) > ahead.issued_at
    stolen = msgspec.structs.replace(made, issued_at=now + timedelta(days=400))
    assert rosters.issued(now, stolen) == now
