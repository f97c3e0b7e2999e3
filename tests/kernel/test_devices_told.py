"""What the firewall hears of devices: lists that are whole, and none left behind that came and went while it looked."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import Iterator

import pytest
from support import eventually
from support_datapath import World, inside

from loopback.bpf import hooks, rtnl
from loopback.bpf.netlink import DUMP, ask
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.attach import Attachment
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.module import FirewallModule

pytestmark = pytest.mark.kernel

SHUT = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
MANY = 300  # devices: what the kernel tells of them takes several pieces


def ip(world: World, *words: str) -> None:
    subprocess.run(["ip", "-n", world.host, *words], check=True, capture_output=True)


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def many(world: World) -> None:
    lines = "".join(f"link add d{n} type veth peer name d{n + 1}\n" for n in range(0, MANY, 2))
    subprocess.run(["ip", "-n", world.host, "-batch", "-"], input=lines, text=True, check=True)


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_list_that_changed_while_it_was_told_is_no_list(world: World) -> None:
    many(world)
    with inside(world.host):
        with contextlib.closing(ask(18, rtnl._LINKS, DUMP)) as answers:
            next(answers)
            ip(world, "link", "add", "amid0", "type", "veth", "peer", "name", "amid1")
            with pytest.raises(InterruptedError):
                for _ in answers:
                    pass
        names = {one.name for one in rtnl.devices()}
    assert names == {"lo", "eth0", "amid0", "amid1"} | {f"d{n}" for n in range(MANY)}


def test_no_device_is_left_out_while_others_come_and_go(world: World) -> None:
    many(world)
    lasting = {"lo", "eth0"} | {f"d{n}" for n in range(MANY)}
    ended = threading.Event()

    def churn() -> None:
        turn = 0
        while not ended.is_set():
            turn += 1
            ip(world, "link", "add", f"n{turn}", "type", "veth", "peer", "name", f"p{turn}")
            ip(world, "link", "del", f"n{turn}")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        with inside(world.host):
            for _ in range(300):
                assert {one.name for one in rtnl.devices()} >= lasting
    finally:
        ended.set()
        thread.join()


# ── the module ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Listening(FirewallModule):
    """The module on a datapath that a test made, hearing of devices as it does after a start."""

    def __init__(self, datapath: Datapath) -> None:
        super().__init__()
        self._datapath = datapath
        self.policy = self._committed = datapath.digest
        self._monitor = rtnl.monitor()

    async def __aenter__(self) -> Listening:
        assert self._monitor is not None
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._on_devices)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(remove=False)

    def names(self) -> set[str]:
        return {one.device for one in self._attachments()}

    def idle(self) -> bool:
        return self._cover is not None and self._cover.done()


def test_a_device_that_came_and_went_while_others_were_covered_is_not_told_of_any_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after it, the devices are the same."""
    datapath, real, looks = world.enforce(SHUT), Datapath.cover, []

    def cover(one: Datapath) -> list[Attachment]:
        looks.append(one)
        if len(looks) > 1:
            return real(one)
        ip(world, "link", "add", "brief0", "type", "veth", "peer", "name", "brief1")
        found = real(one)
        assert "brief0" in {each.device for each in found}
        ip(world, "link", "del", "brief0")
        return found

    async def hears() -> None:
        async with Listening(datapath) as module:
            ip(world, "link", "add", "kept0", "type", "veth", "peer", "name", "kept1")
            await eventually(lambda: bool(looks) and module.idle())
            assert module.names() == {"eth0", "kept0", "kept1"}
            assert (await module.health()).state == "ok"

    monkeypatch.setattr(Datapath, "cover", cover)
    with inside(world.host):
        asyncio.run(hears())


def test_a_device_that_the_kernel_refused_to_guard_is_tried_again_when_health_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No news of it come when the kernel would take it now."""
    datapath, real, poor = world.enforce(SHUT), hooks.tc_attach, [True]

    def attach(index: int, point: int, program: object) -> None:
        if poor:
            raise Refused(Code.KERNEL_REFUSED, "kernel: there is no memory for a filter just now")
        real(index, point, program)  # type: ignore[arg-type]

    async def heals() -> None:
        async with Listening(datapath) as module:
            ip(world, "link", "add", "late0", "type", "veth", "peer", "name", "late1")
            await eventually(module.idle)
            report = await module.health()
            assert (report.state, report.code) == ("degraded", Code.KERNEL_REFUSED)
            assert "late0" in report.reason
            poor.clear()
            await eventually(module.idle)
            assert (await module.health()).state == "ok"

    monkeypatch.setattr(hooks, "tc_attach", attach)
    with inside(world.host):
        asyncio.run(heals())
