"""What whoever has activation's key can do to sets that hosts' labels and pools fill, and what he cannot.

The host half runs against a real broker, a real agent and a real module; the bounds against the real firewall and packets.
Each attack first reaches its target with exactly one defence taken out.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support import Place, eventually
from support_datapath import UDP, to_host
from support_datapath import World as Network
from support_host import World
from support_roster import SHOP, WEB, Desk, with_sets
from support_stolen import nothing

from loopback.contracts import hostrecord
from loopback.contracts.abi import Filled
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import payload_of
from loopback.contracts.reports import Phase
from loopback.contracts.roster import decode
from loopback.host import filling, roster
from loopback.modules.firewall import filling as bounds
from loopback.modules.firewall import policy as policies

PATIENCE = 60.0
broker_test = pytest.mark.broker
Removal = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
async def world(broker: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(filling, "AGAIN_S", 0.3)
    monkeypatch.setattr(filling, "SPREAD_S", 0.05)
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


def enforced(world: World) -> dict[str, Any]:
    path = world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


async def filled(world: World, **wanted: list[str]) -> None:
    await eventually(
        lambda: enforced(world).get("fills", {}) == wanted and "deadline" not in enforced(world), PATIENCE
    )


async def refused(world: World, code: Code, **still: list[str]) -> None:
    """The host says why, and enforces what it did."""

    async def check() -> bool:
        one = await world.module()
        return (
            one is not None
            and one.health == "degraded"
            and one.refusal is not None
            and one.refusal.code is code
        )

    await eventually(check, PATIENCE)
    assert enforced(world).get("fills") == still


async def prepared(world: World, desk: Desk) -> None:
    """A host that was told to follow the label and the pool."""
    await desk.publish(WEB, {"web-1": desk.host("web-1", "10.0.0.1")})
    await desk.publish(SHOP, {"shop": desk.pool(2, "10.1.0.2")})


async def running(world: World) -> None:
    target = await with_sets(world, await world.release("1.0"), 1, web=WEB, backends=SHOP)
    assert (await world.reached(await world.desire(target))).phase is Phase.PROMOTED
    await filled(world, web=["10.0.0.1"], backends=["10.1.0.2"])


def without_members_signatures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(roster.hostrecord, "verify", lambda e, c, w, t: hostrecord.read_envelope(e, c, w))


@broker_test
async def test_an_address_of_the_thiefs_own_choice_is_in_no_set(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(world)
    await prepared(world, desk)
    good = desk.host("web-1", "10.0.0.1")
    thief = world.signers.activation
    async with world.agent():
        await running(world)
        with monkeypatch.context() as lenient:
            without_members_signatures(lenient)
            await desk.publish(WEB, {"web-1": good, "evil": desk.host("evil", "10.0.0.66", key=thief)})
            await filled(world, web=["10.0.0.1", "10.0.0.66"], backends=["10.1.0.2"])
        await desk.publish(WEB, {"web-1": good})
        await filled(world, web=["10.0.0.1"], backends=["10.1.0.2"])
        await desk.publish(WEB, {"web-1": good, "worse": desk.host("worse", "10.0.0.67", key=thief)})
        await refused(world, Code.SIGNATURE_UNKNOWN_KEY, web=["10.0.0.1"], backends=["10.1.0.2"])
        await desk.publish(SHOP, {"shop": desk.pool(3, "10.1.0.66", key=thief)})
        await refused(world, Code.SIGNATURE_UNKNOWN_KEY, web=["10.0.0.1"], backends=["10.1.0.2"])


@broker_test
async def test_another_hosts_record_is_not_taken_for_one_of_the_set(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(world)
    await prepared(world, desk)
    good = desk.host("web-1", "10.0.0.1")
    bastion = desk.host("bastion", "10.0.0.9", labels={"role": "db"})
    async with world.agent():
        await running(world)
        with monkeypatch.context() as lenient:
            lenient.setattr(roster, "_check_belongs", nothing)
            await desk.publish(WEB, {"web-1": good, "bastion": bastion})
            await filled(world, web=["10.0.0.1", "10.0.0.9"], backends=["10.1.0.2"])
        await desk.publish(WEB, {"web-1": good})
        await filled(world, web=["10.0.0.1"], backends=["10.1.0.2"])
        again = desk.host("bastion", "10.0.0.9", labels={"role": "db"})
        await desk.publish(WEB, {"web-1": good, "bastion": again})
        await refused(world, Code.ROSTER_INVALID, web=["10.0.0.1"], backends=["10.1.0.2"])


@broker_test
async def test_an_older_pool_and_a_host_that_left_do_not_come_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(world)
    old_pool, left = desk.pool(1, "10.1.0.1"), desk.host("web-0", "10.0.0.77")
    await prepared(world, desk)
    good = desk.host("web-1", "10.0.0.1")
    async with world.agent():
        await running(world)
        with monkeypatch.context() as lenient:
            lenient.setattr(roster, "_check_newer", nothing)
            await desk.publish(SHOP, {"shop": old_pool})
            await filled(world, web=["10.0.0.1"], backends=["10.1.0.1"])
        await desk.publish(SHOP, {"shop": desk.pool(3, "10.1.0.3")})
        await filled(world, web=["10.0.0.1"], backends=["10.1.0.3"])
        for replayed in (old_pool, desk.pool(3, "10.1.0.99")):
            await desk.publish(SHOP, {"shop": replayed})
            await refused(world, Code.ROSTER_OLDER, web=["10.0.0.1"], backends=["10.1.0.3"])
        await desk.publish(SHOP, {"shop": desk.pool(4, "10.1.0.4")})
        await desk.publish(WEB, {"web-1": good, "web-0": left})
        await filled(world, web=["10.0.0.1", "10.0.0.77"], backends=["10.1.0.4"])
        await desk.publish(WEB, {"web-1": good})
        await filled(world, web=["10.0.0.1"], backends=["10.1.0.4"])
        await desk.publish(WEB, {"web-1": good, "web-0": left})
        await refused(world, Code.ROSTER_OLDER, web=["10.0.0.1"], backends=["10.1.0.4"])


@broker_test
async def test_a_pool_is_not_left_out_without_its_balancers_word(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(world)
    await prepared(world, desk)
    async with world.agent():
        await running(world)
        with monkeypatch.context() as lenient:
            lenient.setattr(roster, "_check_pool_stays", nothing)
            await desk.publish(SHOP, {})
            await filled(world, web=["10.0.0.1"], backends=[])
        await desk.publish(SHOP, {"shop": desk.pool(3, "10.1.0.3")})
        await filled(world, web=["10.0.0.1"], backends=["10.1.0.3"])
        await desk.publish(SHOP, {})
        await refused(world, Code.ROSTER_OLDER, web=["10.0.0.1"], backends=["10.1.0.3"])


@broker_test
async def test_a_roster_that_activation_did_not_sign_is_not_believed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(world)
    await prepared(world, desk)
    web_2 = desk.host("web-2", "10.0.0.2")
    async with world.agent():
        await running(world)
        with monkeypatch.context() as lenient:
            lenient.setattr(roster, "opened", lambda signed, *_: decode(payload_of(signed)))
            await desk.publish(WEB, {"web-2": web_2}, key=world.key)
            await filled(world, web=["10.0.0.2"], backends=["10.1.0.2"])
        await desk.publish(WEB, {}, key=world.key)
        await refused(world, Code.SIGNATURE_UNKNOWN_KEY, web=["10.0.0.2"], backends=["10.1.0.2"])


@broker_test
async def test_nobody_has_the_last_word_for_ever_by_dating_a_roster_ahead(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(world)
    await prepared(world, desk)
    ahead = world.signers.clock() + timedelta(days=400)
    web_2, web_3, web_4 = (desk.host(f"web-{n}", f"10.0.0.{n}") for n in (2, 3, 4))
    async with world.agent() as agent:
        await running(world)
        await desk.publish(WEB, {"web-2": web_2}, issued_at=ahead)
        await refused(world, Code.ROSTER_INVALID, web=["10.0.0.1"], backends=["10.1.0.2"])
        await desk.publish(WEB, {"web-3": web_3})
        await filled(world, web=["10.0.0.3"], backends=["10.1.0.2"])
        with monkeypatch.context() as lenient:
            lenient.setattr(roster, "START_SKEW", timedelta(days=1000))
            await desk.publish(WEB, {"web-2": web_2}, issued_at=ahead)
            await filled(world, web=["10.0.0.2"], backends=["10.1.0.2"])
        await desk.publish(WEB, {"web-4": web_4})
        agent.filler.look()
        await desk.publish(SHOP, {"shop": desk.pool(3, "10.1.0.3")})
        await filled(world, web=["10.0.0.2"], backends=["10.1.0.3"])  # and web-4 is never heard of


@broker_test
async def test_what_is_left_to_the_thief_is_to_leave_hosts_out_and_to_be_silent(world: World) -> None:
    """ADR 0020 says so; this is not a defence, but the edge of the promise."""
    desk = Desk(world)
    await prepared(world, desk)
    async with world.agent():
        await running(world)
        await desk.publish(WEB, {})
        await filled(world, web=[], backends=["10.1.0.2"])


# ── bounds, in the kernel ────────────────────────────────────────────────────────────────────────────────────────────────────

OUTSIDE, SECOND = "192.0.2.1", "10.77.0.3"
POLICY = policies.parse(
    b'{"version":1,"default":{"ingress":"drop","egress":"accept"},"sets":{"web":{"labels":{"role":"web"},'
    b'"within":["10.77.0.0/24"],"max":1}},"rules":[{"name":"web","from":"@web","action":"accept"}]}',
    "policy.json",
)


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


def web(*addresses: str) -> dict[str, Filled]:
    return {"web": Filled(labels={"role": "web"}, addresses=list(addresses))}


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("check", "wanted", "code"),
    [
        ("_check_within", web(OUTSIDE), Code.SET_OUTSIDE),
        ("_check_max", web("10.77.0.2", SECOND), Code.SET_TOO_LARGE),
    ],
)
def test_not_even_what_operators_signed_opens_more_than_the_policy_bounds(
    network: Network, monkeypatch: pytest.MonkeyPatch, check: str, wanted: dict[str, Filled], code: Code
) -> None:
    attacker = wanted["web"].addresses[-1]
    packets = [to_host(UDP(sport=sport, dport=9), src=attacker) for sport in (1001, 1002, 1003)]
    datapath = network.enforce(bounds.filled(POLICY, web()))
    assert network.arriving(packets[0]) == [False]
    with monkeypatch.context() as lenient:
        lenient.setattr(bounds, check, nothing)
        network.enforce(bounds.filled(POLICY, wanted), datapath)
        assert network.arriving(packets[1]) == [True]
    network.enforce(bounds.filled(POLICY, web()), datapath)
    with pytest.raises(Refused) as caught:
        network.enforce(bounds.filled(POLICY, wanted), datapath)
    assert caught.value.code is code
    assert network.arriving(packets[2]) == [False]
