"""Policies and programs change under traffic: no mixture, nothing unfiltered, and the kernel falls back alone."""

from __future__ import annotations

import contextlib
import ctypes as ct
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
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
    program,
    to_host,
)

from loopback.bpf import hooks, layout, rtnl, sharing
from loopback.bpf.flood import Flood
from loopback.bpf.hooks import XdpLink
from loopback.bpf.objects import Program
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.pins import Pins

pytestmark = pytest.mark.kernel

PACKETS = 1_000_000
COMMITS = 100
OPEN = "version: 1\ndefault: {ingress: accept, egress: accept}\n"
SHUT = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
#: More than are spelt out as entries, so that sets and rules are two structures.
MANY = ", ".join(f"192.0.2.{host}" for host in range(100))
#: Each drops the packet: by its set, or by its rule. Rules of one with the set of the other would accept it.
EVEN, ODD = (
    f"{SHUT}sets: {{guests: [{guest}, {MANY}]}}\n"
    f"rules:\n  - {{name: guest, from: '@guests', proto: udp, ports: {port}, action: accept}}\n"
    for guest, port in (("198.51.100.0/24", 7777), (f"{PEER4}/32", 8888))
)
PACKET = bytes(
    Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER4, dst=HOST4) / UDP(sport=4000, dport=7777) / (b"x" * 18)
)


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)  # a waiter that spins takes a core from whom it waits for


@contextlib.contextmanager
def flooding(world: World, frame: bytes = PACKET) -> Iterator[Flood]:
    """The frame from the peer to the host, without pause."""
    with inside(world.peer):
        index = next(d.index for d in rtnl.devices() if d.name == "eth0")
        with Flood(index, frame) as flood:
            flood.start()
            until(lambda: flood.sent > 0)
            yield flood
            flood.stop()


def judged(datapath: Datapath, reason: str, verdict: str) -> int:
    return datapath.totals()[f"ingress.{reason}.{verdict}"]


def accepted(datapath: Datapath) -> int:
    return sum(judged(datapath, reason, "accept") for reason in ("rule", "default", "flow"))


def test_no_packet_meets_a_mixture_of_two_policies(world: World) -> None:
    datapath = world.enforce(EVEN)
    even, odd = policy_of(EVEN), policy_of(ODD)
    before = judged(datapath, "default", "drop")
    with flooding(world):
        commits = 0
        while commits < COMMITS or judged(datapath, "default", "drop") - before < PACKETS:
            world.enforce(odd if commits % 2 == 0 else even, datapath, trial_s=60)
            with inside(world.host):
                datapath.confirm()
            commits += 1
            assert commits < 5000, "the flood is too slow"
    totals = datapath.totals()
    assert totals["ingress.default.drop"] - before >= PACKETS
    assert accepted(datapath) == 0, f"in {totals}"
    assert totals["ingress.broken.drop"] == 0
    assert totals["slot.0.drop"] > 0 and totals["slot.1.drop"] > 0, "both slots judged packets"


def test_a_mixture_would_be_seen(world: World) -> None:
    """The measure itself: with the sets of one policy put under the rules of the other, packets are accepted."""
    datapath = world.enforce(EVEN)
    with flooding(world):
        with inside(world.host):
            datapath.stage(policy_of(ODD), "ab" * 32)
        active = datapath.generation & 1
        theirs, ours = _first_set(datapath, active ^ 1), _first_set(datapath, active)
        memory = datapath._maps["arena"].memory()
        for mine, other, size in ((ours.root, theirs.root, 8), (ours.changes, theirs.changes, 16)):
            at, source = active * datapath._pins.half + mine, (active ^ 1) * datapath._pins.half + other
            memory[at : at + size] = memory[source : source + size]
        until(lambda: accepted(datapath) > 0)


def _first_set(datapath: Datapath, index: int) -> layout.Set:
    """The head of set 1, IPv4: two intervals here, so its parts have 8 and 16 bytes."""
    memory, half = datapath._maps["arena"].memory(), index * datapath._pins.half
    slot = layout.Slot.from_buffer_copy(memory[half : half + ct.sizeof(layout.Slot)])
    at = half + slot.sets + 2 * ct.sizeof(layout.Set)
    return layout.Set.from_buffer_copy(memory[at : at + ct.sizeof(layout.Set)])


def test_a_replaced_program_leaves_no_unfiltered_packet(world: World) -> None:
    datapath = world.enforce(SHUT)
    with flooding(world):
        link = XdpLink.pinned(next((world.root / "links").iterdir()))
        first = Program.pinned(next(world.root.glob("set-*")) / "fw_xdp")
        second = _again(datapath)
        try:
            for turn in range(200):
                link.update(second if turn % 2 == 0 else first)
            until(lambda: judged(datapath, "default", "drop") > 100_000)
        finally:
            for thing in (link, first, second):
                thing.close()
    assert accepted(datapath) == 0
    assert world.received() == 0, "what was not judged would have reached the stack"


def _again(datapath: Datapath) -> Program:
    """A second copy of the XDP program, on the same maps."""
    loaded = datapath._pins.load(reuse=datapath._maps)
    kept = loaded.programs.pop("fw_xdp")
    loaded.close()
    return kept


def test_unconfirmed_the_kernel_falls_back_with_everything_dead(world: World) -> None:
    datapath = world.enforce(OPEN)
    world.enforce(SHUT, datapath, trial_s=0.3)
    first = datapath.generation
    datapath.close()
    probe = to_host(UDP(dport=9))
    assert world.arriving(probe) == [False]
    until(lambda: world.arriving(probe) == [True])
    found = world.open()
    assert found.generation != first
    assert found.totals()["past_deadline"] > 0


def test_too_late_a_confirmation_is_refused(world: World) -> None:
    now = [time.clock_gettime_ns(time.CLOCK_BOOTTIME)]
    datapath = world.open(boot_ns=lambda: now[0])
    world.enforce(OPEN, datapath)
    world.enforce(SHUT, datapath, trial_s=60)
    now[0] += 61 * 10**9
    with pytest.raises(Refused) as refused, inside(world.host):
        datapath.confirm()
    assert refused.value.code is Code.HOST_UNCONFIRMED
    assert world.arriving(to_host(UDP(dport=9))) == [True]
    assert datapath.word()[2] == 0


def test_confirmed_it_stays(world: World) -> None:
    datapath = world.enforce(OPEN)
    world.enforce(SHUT, datapath, trial_s=60)
    with inside(world.host):
        datapath.confirm()
    assert datapath.word()[1:] == (0, 0)
    assert world.arriving(to_host(UDP(dport=9))) == [False]


def test_a_revert_of_the_first_policy_leaves_nothing_on_the_devices(world: World) -> None:
    datapath = world.enforce(SHUT, trial_s=60)
    assert world.arriving(to_host(UDP(dport=9))) == [False]
    with inside(world.host):
        datapath.revert()
        assert datapath.generation == 0
        index = next(d.index for d in rtnl.devices() if d.name == "eth0")
        assert hooks.tc_program(index, hooks.TC_EGRESS) == 0
    assert not list((world.root / "links").iterdir())
    assert world.arriving(to_host(UDP(dport=9))) == [True]


def test_nothing_can_be_staged_over_a_trial(world: World) -> None:
    datapath = world.enforce(OPEN)
    world.enforce(SHUT, datapath, trial_s=60)
    with pytest.raises(Refused, match="waits for its confirmation"), inside(world.host):
        datapath.stage(policy_of(OPEN), "cd" * 32)


def test_a_policy_whose_test_fails_changes_nothing(world: World) -> None:
    datapath = world.enforce(OPEN)
    before = datapath.word()
    text = (
        SHUT + "tests:\n  - {packet: {src: 10.0.0.1, dst: 10.0.0.2, proto: tcp, dport: 22}, expect: accept}\n"
    )
    with pytest.raises(Refused, match=r"line 4.*expects accept.*but the default says drop") as refused:
        world.enforce(text, datapath)
    assert refused.value.code is Code.POLICY_TEST_FAILED
    assert datapath.word() == before
    with pytest.raises(Refused, match="nothing is staged"), inside(world.host):
        datapath.commit(1)


def test_a_restart_adopts_what_enforces(world: World) -> None:
    world.enforce(SHUT).close()
    assert world.arriving(to_host(UDP(dport=9))) == [False], "without any process"
    again = world.open()
    assert again.adopted
    assert again.digest is not None and again.generation == 1
    with inside(world.host):
        assert again.uncovered() == []
    world.enforce(OPEN, again)
    assert world.arriving(to_host(UDP(dport=9))) == [True]


def test_a_restart_without_its_state_folder_knows_the_policy_still(world: World) -> None:
    datapath = world.enforce(SHUT)
    digest = datapath.digest
    datapath.close()
    for path in world.state.iterdir():
        path.unlink()
    assert world.open().digest == digest


def test_removed_nothing_is_left(world: World) -> None:
    datapath = world.enforce(SHUT)
    with inside(world.host):
        datapath.remove()
        index = next(d.index for d in rtnl.devices() if d.name == "eth0")
        assert not rtnl.has_clsact(index)
    datapath.close()
    assert not world.root.exists()
    assert world.arriving(to_host(UDP(dport=9))) == [True]


def test_devices_that_appear_later_are_covered(world: World) -> None:
    datapath = world.enforce(
        SHUT + "rules:\n  - {name: late, iface: late0, proto: udp, ports: 9, action: accept}\n"
    )
    subprocess.run(
        ["ip", "-n", world.host, "link", "add", "late0", "type", "veth", "peer", "name", "late1"], check=True
    )
    with inside(world.host):
        assert set(datapath.uncovered()) == {"late0", "late1"}
        found = datapath.cover()
        assert {(a.device, a.ingress) for a in found} == {
            ("eth0", "native"),
            ("late0", "native"),
            ("late1", "native"),
        }
        assert datapath.uncovered() == []
        late = next(d.index for d in rtnl.devices() if d.name == "late0")
        inner = datapath._set.inner[f"interfaces-{datapath.generation & 1}"]
        assert inner.lookup(late.to_bytes(4, "little")) == (1).to_bytes(8, "little")
    subprocess.run(["ip", "-n", world.host, "link", "del", "late0"], check=True)
    with inside(world.host):
        assert [a.device for a in datapath.cover()] == ["eth0"]


def test_where_another_program_holds_xdp_ingress_is_filtered_in_tc(world: World) -> None:
    loaded = Pins(None, program()).open(64)
    with inside(world.host):
        index = next(d.index for d in rtnl.devices() if d.name == "eth0")
        holder = XdpLink.create(index, loaded.programs["fw_xdp"])  # enforces nothing: its word is 0
    try:
        datapath = world.enforce(SHUT + "rules:\n  - {name: a, proto: udp, ports: 9, action: accept}\n")
        assert [(a.ingress, a.note) for a in datapath.attachments] == [("tc", "the XDP slot is taken")]
        frames = [bytes(to_host(UDP(dport=port)) / b"x") for port in (9, 10, 10)]
        for frame in frames:
            world._wires[world.peer].send(frame)
        until(lambda: judged(datapath, "default", "drop") == 2 and judged(datapath, "rule", "accept") == 1)
    finally:
        holder.close()
        loaded.close()


def test_the_views_agree_with_the_kernel_on_the_word() -> None:
    word = layout.active_word(0x1_0005, 0x1_0004, 77)
    assert layout.split_word(word) == (5, 4, 77)


def test_a_release_with_other_shared_structures_starts_from_the_policy_that_holds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maps are fresh: were they empty, a trial that nobody confirms would fall back to no firewall at all."""
    first = world.enforce(SHUT)
    digest = first.digest
    first.close()
    monkeypatch.setitem(sharing.CHANGED, "active", 99)
    second = world.open()
    assert not second.adopted
    world.enforce(OPEN, second, trial_s=0.5)
    assert world.arriving(to_host(UDP(dport=9))) == [True]
    second.close()
    until(lambda: world.arriving(to_host(UDP(dport=9))) == [False])
    third = world.open()
    assert third.adopted and third.digest == digest


def test_a_release_with_other_shared_structures_is_undone_by_revert(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.enforce(SHUT)
    monkeypatch.setitem(sharing.CHANGED, "active", 99)
    second = world.open()
    world.enforce(OPEN, second, trial_s=60)
    with inside(world.host):
        second.revert()
    assert world.arriving(to_host(UDP(dport=9))) == [False]
    before = judged(first, "default", "drop")
    assert world.arriving(to_host(UDP(dport=9))) == [False]
    assert judged(first, "default", "drop") == before + 1, "the older programs and maps judge again"


def test_devices_without_ethernet_are_filtered_in_tc(world: World) -> None:
    subprocess.run(["ip", "-n", world.host, "tuntap", "add", "tun0", "mode", "tun"], check=True)
    subprocess.run(["ip", "-n", world.host, "addr", "add", "10.88.0.1/24", "dev", "tun0"], check=True)
    with inside(world.host):
        wire = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        try:
            fcntl.ioctl(
                wire, 0x400454CA, struct.pack("16sH", b"tun0", 0x1001)
            )  # TUNSETIFF: IFF_TUN, IFF_NO_PI
            subprocess.run(["ip", "-n", world.host, "link", "set", "tun0", "up"], check=True)
            datapath = world.enforce(SHUT + "rules:\n  - {name: a, proto: udp, ports: 9, action: accept}\n")
            assert {a.device: a.ingress for a in datapath.attachments} == {"eth0": "native", "tun0": "tc"}
            for port in (9, 10, 10):
                os.write(wire, bytes(IP(src="10.88.0.2", dst="10.88.0.1") / UDP(sport=1000, dport=port)))
            until(
                lambda: judged(datapath, "default", "drop") == 2 and judged(datapath, "rule", "accept") == 1
            )
        finally:
            os.close(wire)
