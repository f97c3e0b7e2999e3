"""The agent keeps sets filled: real broker, real module processes, rosters as activation signs them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import Place, eventually
from support_host import World
from support_roster import SHOP, WEB, Desk, with_sets

from loopback.contracts.codes import Code
from loopback.contracts.reports import ModuleStatus, Phase
from loopback.host import filling

pytestmark = pytest.mark.broker
PATIENCE = 60.0


@pytest.fixture
async def world(broker: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(filling, "AGAIN_S", 0.3)
    monkeypatch.setattr(filling, "SPREAD_S", 0.05)
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


def in_kernel(world: World) -> dict[str, Any]:
    path = world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


async def filled(world: World, **wanted: list[str]) -> None:
    """Wait until the module's sets are that, confirmed."""
    await eventually(
        lambda: in_kernel(world).get("fills") == wanted and "deadline" not in in_kernel(world), PATIENCE
    )


async def told(world: World, health: str, code: Code | None = None) -> ModuleStatus:
    """Wait until the host says so of its module."""

    async def check() -> ModuleStatus | None:
        found = await world.module()
        said = found.refusal.code if found and found.refusal else None
        return found if found and found.health == health and said is code else None

    found = await eventually(check, PATIENCE)
    assert found is not None
    return found


async def test_a_set_follows_hosts_and_a_pool_without_another_rollout(world: World) -> None:
    desk = Desk(world)
    target = await with_sets(world, await world.release("1.0"), 1, web=WEB, backends=SHOP)
    web_1 = desk.host("web-1", "10.0.0.1/24", "2001:db8::1")
    await desk.publish(WEB, {"web-1": web_1})
    await desk.publish(SHOP, {"shop": desk.pool(1, "10.1.0.0/28")})
    async with world.agent():
        generation = await world.desire(target)
        assert (await world.reached(generation)).phase is Phase.PROMOTED
        await filled(world, web=["10.0.0.1", "2001:db8::1"], backends=["10.1.0.0/28"])
        await desk.publish(WEB, {"web-1": web_1, "web-2": desk.host("web-2", "10.0.0.2")})
        await filled(world, web=["10.0.0.1", "10.0.0.2", "2001:db8::1"], backends=["10.1.0.0/28"])
        await desk.publish(SHOP, {"shop": desk.pool(2, absent=True)})
        await desk.publish(WEB, {"web-1": web_1})
        await filled(world, web=["10.0.0.1", "2001:db8::1"], backends=[])
        assert (await told(world, "ok")).generation == generation, "nobody was asked for anything"


async def test_many_hosts_come_and_go_slice_by_slice(world: World) -> None:
    desk = Desk(world)
    target = await with_sets(world, await world.release("1.0"), 1, {"max": 200}, web=WEB)
    members = {f"web-{n}": desk.host(f"web-{n}", f"10.0.0.{n}") for n in range(100)}
    made = await desk.publish(WEB, members)
    assert len(made.slices) == 8
    async with world.agent():
        assert (await world.reached(await world.desire(target))).phase is Phase.PROMOTED
        await filled(world, web=sorted(f"10.0.0.{n}" for n in range(100)))
        del members["web-7"]
        await desk.publish(WEB, members | {"web-200": desk.host("web-200", "10.0.0.200")})
        await filled(world, web=sorted(f"10.0.0.{n}" for n in (*range(100), 200) if n != 7))


async def test_what_a_module_refuses_leaves_the_last_contents_until_better_ones_come(world: World) -> None:
    desk = Desk(world)
    target = await with_sets(world, await world.release("1.0"), 1, {"max": 1}, web=WEB)
    web_1 = desk.host("web-1", "10.0.0.1")
    await desk.publish(WEB, {"web-1": web_1})
    async with world.agent():
        assert (await world.reached(await world.desire(target))).phase is Phase.PROMOTED
        web_2 = desk.host("web-2", "10.0.0.2")
        await desk.publish(WEB, {"web-1": web_1, "web-2": web_2})
        found = await told(world, "degraded", Code.SET_TOO_LARGE)
        assert found.enforcing and found.promoted == target
        assert in_kernel(world)["fills"] == {"web": ["10.0.0.1"]}
        await desk.publish(WEB, {"web-2": web_2})
        await filled(world, web=["10.0.0.2"])
        await told(world, "ok")


async def test_contents_that_cut_the_host_off_are_taken_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(world)
    target = await with_sets(world, await world.release("1.0"), 1, web=WEB)
    await desk.publish(WEB, {"web-1": desk.host("web-1", "10.0.0.1")})
    async with world.agent() as agent:
        assert (await world.reached(await world.desire(target))).phase is Phase.PROMOTED
        cut = True

        async def probe(seconds: float) -> bool:
            return not cut

        monkeypatch.setattr(agent.link, "probe", probe)
        web_2 = desk.host("web-2", "10.0.0.2")
        await desk.publish(WEB, {"web-2": web_2})
        await told(world, "degraded", Code.HOST_UNCONFIRMED)
        await eventually(lambda: in_kernel(world).get("fills") == {"web": ["10.0.0.1"]}, PATIENCE)
        cut = False
        await filled(world, web=["10.0.0.2"])
        await told(world, "ok")


async def test_a_policy_whose_sets_nobody_fills_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "FIRST_S", (0.1,))
    version = await world.release("1.0")
    before = await world.with_policy(version, 1)
    target = await with_sets(world, version, 2, web=WEB)
    async with world.agent():
        assert (await world.reached(await world.desire(before))).phase is Phase.PROMOTED
        found = await world.reached(await world.desire(target, expected=before, rollout="r2"))
        assert found.refusal is not None and found.refusal.code is Code.SET_UNFILLED
        assert found.promoted == before and in_kernel(world)["policy"] == before.policy


async def test_a_module_that_knows_no_fill_gets_its_policy_again(world: World) -> None:
    desk = Desk(world)
    target = await with_sets(world, await world.release("1.0", "knows-no-fill"), 1, web=WEB)
    await desk.publish(WEB, {"web-1": desk.host("web-1", "10.0.0.1")})
    async with world.agent():
        assert (await world.reached(await world.desire(target))).phase is Phase.PROMOTED
        await desk.publish(WEB, {"web-2": desk.host("web-2", "10.0.0.2")})
        await filled(world, web=["10.0.0.2"])


async def test_after_a_restart_without_a_broker_the_last_contents_hold(world: World) -> None:
    desk = Desk(world)
    target = await with_sets(world, await world.release("1.0"), 1, web=WEB)
    await desk.publish(WEB, {"web-1": desk.host("web-1", "10.0.0.1")})
    async with world.agent():
        assert (await world.reached(await world.desire(target))).phase is Phase.PROMOTED
        await desk.publish(WEB, {"web-2": desk.host("web-2", "10.0.0.2")})
        await filled(world, web=["10.0.0.2"])
    (
        world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
    ).unlink()  # the machine starts again
    async with world.agent(url="nats://127.0.0.1:1"):
        await filled(world, web=["10.0.0.2"])
