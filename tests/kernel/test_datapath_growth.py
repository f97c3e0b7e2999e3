"""Larger policies and other releases: what lives longer than a policy is carried over, and every packet is judged."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_bpf import wait_for
from support_datapath import (
    HOST4,
    HOST_MAC,
    IP,
    PEER4,
    PEER_MAC,
    UDP,
    Ether,
    World,
    inside,
    policy_of,
    to_host,
    to_peer,
)

from loopback.bpf import hooks, layout, sharing
from loopback.bpf.hooks import XdpLink
from loopback.bpf.objects import Map, Program
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import holding
from loopback.modules.firewall.pins import CORE
from loopback.modules.firewall.store import Room

pytestmark = pytest.mark.kernel

TC_ACT_SHOT = 2
SMALL = 1 << 14
SHUT = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
COUNTED = "  - {name: counted, proto: udp, ports: 53, action: accept}\n"
FEW = f"{SHUT}rules:\n{COUNTED}"
DENIED = bytes(
    Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER4, dst=HOST4) / UDP(sport=4000, dport=7777) / (b"x" * 18)
)


class Killed(BaseException):
    """The process dies here."""


def many(rules: int) -> str:
    """A policy that needs more than a small slot, with the same first rule."""
    return FEW + "".join(
        f"  - {{name: r{n}, from: 10.{n >> 8}.{n & 255}.0/24, proto: tcp, ports: {n + 1}, action: accept}}\n"
        for n in range(rules)
    )


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def sets(world: World) -> list[str]:
    return sorted(path.name for path in world.root.glob("set-*"))


def begun(world: World) -> list[bool]:
    """A flow of the host's, whose answers nothing but the flow lets in."""
    return world.leaving(to_peer(UDP(sport=6000, dport=6001)))


def answered(world: World) -> list[bool]:
    return world.arriving(to_host(UDP(sport=6001, dport=6000)))


def test_a_policy_that_needs_more_room_gets_it_and_nothing_is_lost(world: World) -> None:
    datapath = world.enforce(FEW, world.open(half=SMALL))
    assert begun(world) == [True] and answered(world) == [True]
    assert world.arriving(to_host(UDP(sport=1, dport=53))) == [True]
    epoch, flows = datapath.generation, datapath.totals()["flows_created"]
    with inside(world.host):
        datapath.stage(policy_of(many(400)), "ab" * 32)
    assert datapath._pins.half == layout.MIN_HALF
    assert datapath.generation == epoch, "staging changes nothing for any packet"
    assert answered(world) == [True]
    assert world.arriving(to_host(UDP(sport=2, dport=54))) == [False]
    assert world.arriving(to_host(UDP(sport=1, dport=53))) == [True]
    with inside(world.host):
        datapath.commit(0)
    assert answered(world) == [True]
    assert datapath.totals()["flows_created"] == flows, "it is the same flow still"
    assert datapath.counters()["counted"][0] == 2
    assert datapath.totals()["ingress.broken.drop"] == 0
    assert len(sets(world)) == 1


def test_more_rules_than_counters_make_more_and_old_counts_stay(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MIN_COUNTERS", 8)
    monkeypatch.setattr(holding, "FIRST", Room(half=layout.MIN_HALF, counters=8))
    datapath = world.enforce(FEW)
    assert world.arriving(to_host(UDP(sport=1, dport=53))) == [True]
    world.enforce(many(20), datapath)
    assert datapath._pins.counters == 32
    assert world.arriving(to_host(UDP(sport=2, dport=53))) == [True]
    assert datapath.counters()["counted"][0] == 2
    world.enforce(many(40), datapath)
    datapath.close()
    again = world.open()
    assert again.adopted and again._pins.counters == 64
    assert world.arriving(to_host(UDP(sport=3, dport=53))) == [True]
    assert again.counters()["counted"][0] == 3
    assert set(again.counters()) == {"counted", *(f"r{n}" for n in range(40))}


def test_growing_under_a_flood_lets_nothing_by(world: World) -> None:
    """Many times over, since the moment at which devices change programs is short."""
    datapath = world.enforce(FEW, world.open(half=SMALL))
    with world.flooded(DENIED), inside(world.host):
        for turn in range(12):
            datapath._grow(datapath._pins.half * 2, datapath._pins.counters)
            datapath.stage(policy_of(FEW if turn % 2 else SHUT), f"{turn + 1:064x}")
            datapath.commit(0)
    totals = datapath.totals()
    assert totals["ingress.default.drop"] > 100_000
    assert totals["ingress.broken.drop"] == 0
    assert sum(totals[f"ingress.{reason}.accept"] for reason in ("rule", "default", "flow")) == 0
    assert world.received() == 0


STEPS = 45


@pytest.mark.parametrize("steps", range(0, STEPS, 2))
def test_killed_at_any_step_of_growing_the_successor_goes_on(
    world: World, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pin, every unpinning and every change of a device's program is a step."""
    subprocess.run(
        ["ip", "-n", world.host, "link", "add", "two0", "type", "veth", "peer", "name", "two1"], check=True
    )
    datapath = world.enforce(FEW, world.open(half=SMALL))
    assert begun(world) == [True] and answered(world) == [True]
    assert world.arriving(to_host(UDP(sport=1, dport=53))) == [True]
    digest, left = datapath.digest, steps

    def step() -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    def counted(real: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            if not isinstance(given[0], Path) or world.root in given[0].parents:
                step()
            return real(*given, **named)

        return call

    with inside(world.host), monkeypatch.context() as patched:
        for owner, name in (
            (Map, "pin"), (Program, "pin"), (Path, "unlink"), (Path, "rmdir"), (XdpLink, "update"),
            (hooks, "tc_attach"),
        ):  # fmt: skip
            patched.setattr(owner, name, counted(getattr(owner, name)))
        with pytest.raises(Killed):
            datapath._grow(layout.MIN_HALF, datapath._pins.counters)
            assert steps > STEPS - 15, "growing has more steps than this test takes"
            raise Killed
    datapath.close()
    assert world.arriving(to_host(UDP(sport=2, dport=54))) == [False]
    assert answered(world) == [True]
    again = world.open()
    assert again.adopted and again.digest == digest
    assert len(sets(world)) == 1
    with inside(world.host):
        assert again.uncovered() == []
    assert answered(world) == [True]
    assert again.counters()["counted"][0] == 1
    world.enforce(many(400), again)
    assert answered(world) == [True]
    assert world.arriving(to_host(UDP(sport=2, dport=54))) == [False]
    assert again.totals()["ingress.broken.drop"] == 0


def test_a_device_that_cannot_be_switched_leaves_everything_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    datapath = world.enforce(FEW, world.open(half=SMALL))
    before, word = sets(world), datapath.word()
    real, failed = hooks.tc_attach, 0

    def fails(*given: Any) -> None:
        nonlocal failed
        failed += 1
        if failed == 1:
            raise Refused(Code.KERNEL_REFUSED, "kernel: not this time")
        real(*given)

    with inside(world.host), monkeypatch.context() as patched:
        patched.setattr(hooks, "tc_attach", fails)
        with pytest.raises(Refused, match="not this time"):
            datapath.stage(policy_of(many(400)), "ab" * 32)
        assert datapath.uncovered() == []
    assert sets(world) == before and datapath.word() == word
    world.enforce(many(400), datapath)
    assert world.arriving(to_host(UDP(sport=2, dport=54))) == [False]


def test_an_entry_that_leads_nowhere_lets_nothing_pass(world: World) -> None:
    datapath = world.enforce(FEW)
    entries = [
        program for name, program in datapath._programs.items() if name.startswith(("fw_tc_", "fw_l3_"))
    ]
    frame = bytes(to_peer(UDP(sport=6000, dport=6001)))
    assert [entry.run(frame)[0] for entry in entries].count(TC_ACT_SHOT) < len(entries) == 4
    datapath._maps[CORE].delete(bytes(4))
    assert [entry.run(frame)[0] for entry in entries] == [TC_ACT_SHOT] * 4


def test_only_its_own_programs_hold_on_to_the_core_of_a_set(world: World) -> None:
    small = world.enforce(FEW, world.open(half=SMALL))
    before = small._maps[CORE].id
    world.enforce(many(400), small)
    assert small._maps[CORE].id != before
    small.close()
    assert begun(world) == [True], "the pin keeps it when nobody has it open"


def test_a_policy_that_no_slot_can_hold_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    datapath = world.enforce(FEW)
    before, pinned = datapath.word(), sets(world)
    monkeypatch.setattr(layout, "MAX_HALF", SMALL)
    with pytest.raises(Refused, match="that a slot has") as refused, inside(world.host):
        datapath.stage(policy_of(many(400)), "ab" * 32)
    assert refused.value.code is Code.POLICY_INVALID
    assert "sets in the place of" in refused.value.next_step
    assert datapath.word() == before and sets(world) == pinned


def test_a_kernel_without_room_for_large_arrays_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 GiB is too much for every kernel, as 4 MiB is before Linux 6.0."""
    with pytest.raises(Refused, match=r"before Linux 6\.0") as refused:
        world.open(half=1 << 30)
    assert refused.value.code is Code.KERNEL_UNSUPPORTED


# ── another release ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changed", ["arena", "counters", "totals", "config", "flows", "events", "buckets"])
def test_a_release_with_one_other_structure_keeps_every_other_map(
    world: World, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.enforce(FEW)
    digest = first.digest
    assert begun(world) == [True] and answered(world) == [True]
    assert world.arriving(to_host(UDP(sport=1, dport=53))) == [True]
    ids = {name: one.id for name, one in first._maps.items()}
    epoch = first.generation
    first.close()
    monkeypatch.setitem(sharing.CHANGED, changed, 99)
    second = world.open()
    assert not second.adopted
    fresh = {name for name, one in second._maps.items() if one.id != ids[name]}
    assert fresh == {CORE} | ({"arena", "interfaces"} if changed == "arena" else {changed})
    world.enforce(many(10), second, trial_s=60)
    assert second.generation == epoch + 1
    if changed != "flows":
        assert answered(world) == [True]
    if changed != "counters":
        assert second.counters()["counted"][0] == 1
    with inside(world.host):
        second.revert()
    assert second.generation == epoch
    if changed != "flows":
        assert answered(world) == [True], "the older release knows the flow still"
    assert world.arriving(to_host(UDP(sport=2, dport=54))) == [False]
    world.enforce(many(10), second)
    assert len(sets(world)) == 1
    assert second.digest != digest
    assert world.arriving(to_host(UDP(sport=2, dport=54))) == [False]
    assert second.totals()["ingress.broken.drop"] == 0


def test_a_release_on_trial_falls_back_to_the_policy_before_with_its_own_programs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is alive to put the older programs back: the newer ones judge by their copy of the older policy."""
    first = world.enforce(FEW)
    epoch, digest = first.generation, first.digest
    first.close()
    monkeypatch.setitem(sharing.CHANGED, "arena", 99)
    second = world.open()
    world.enforce("version: 1\ndefault: {ingress: accept, egress: accept}\n", second, trial_s=0.3)
    second.close()
    wait_for(lambda: world.arriving(to_host(UDP(sport=2, dport=54))) == [False])
    assert world.arriving(to_host(UDP(sport=1, dport=53))) == [True]
    third = world.open()
    assert third.generation == epoch and third.digest == digest
    assert third.totals()["ingress.broken.drop"] == 0


def test_a_release_that_has_grown_is_taken_over_in_its_size(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    datapath = world.enforce(many(400), world.open(half=SMALL))
    ids = {name: one.id for name, one in datapath._maps.items()}
    datapath.close()
    monkeypatch.setitem(sharing.CHANGED, "events", 99)
    second = world.open()
    assert second._pins.half == layout.MIN_HALF
    assert {name for name, one in second._maps.items() if one.id != ids[name]} == {CORE, "events"}


def test_where_the_policy_in_force_is_not_known_a_release_with_other_slots_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit would have nothing to fall back to."""
    world.enforce(FEW).close()
    for path in world.state.iterdir():
        path.unlink()
    monkeypatch.setitem(sharing.CHANGED, "arena", 99)
    second = world.open()
    with pytest.raises(Refused, match="nothing to fall back to") as refused, inside(world.host):
        second.stage(policy_of(SHUT), "ab" * 32)
    assert refused.value.code is Code.MODULE_ABI
    assert world.arriving(to_host(UDP(sport=2, dport=54))) == [False]
    assert world.arriving(to_host(UDP(sport=1, dport=53))) == [True]


# ── grace periods ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_what_changes_waits_for_packets_under_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    datapath = world.enforce(FEW)
    waits: list[str] = []
    real = Map.update_fd

    def counted(self: Map, index: int, inner: Map) -> None:
        waits.append(self.name)
        real(self, index, inner)

    monkeypatch.setattr(Map, "update_fd", counted)
    with inside(world.host):
        datapath.stage(policy_of(FEW), "01" * 32)
        assert waits == ["fence"], "the slot was read before the last commit"
        datapath.stage(policy_of(SHUT), "02" * 32)
        assert waits == ["fence"], "nobody has read it since"
        datapath.commit(60)
        datapath.revert()
        datapath.stage(policy_of(SHUT), "03" * 32)
        assert waits == ["fence"] * 2, "the trial was read, though the word is what it was"
        named = f"{FEW}  - {{name: a, iface: eth0, action: drop}}\n"
        datapath.stage(policy_of(named), "04" * 32)
        datapath.stage(policy_of(SHUT), "05" * 32)
        datapath.stage(policy_of(SHUT), "06" * 32)
        assert waits == ["fence"] * 2 + ["interfaces"] * 2


def test_a_confirmed_policy_is_kept_for_a_later_release(world: World) -> None:
    datapath = world.enforce(FEW, trial_s=60)
    with inside(world.host):
        datapath.confirm()
    datapath.close()
    kept = world.open()._store.promoted()
    assert kept is not None and kept.policy == policy_of(FEW)
