"""What a hostile packet, a kill at the wrong moment and devices that come and go cannot do to the firewall."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_bpf import wait_for
from support_datapath import (
    HOST4,
    HOST_MAC,
    PEER_MAC,
    TCP,
    UDP,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    Raw,
    World,
    inside,
    policy_of,
    to_host,
    to_host6,
    to_peer,
)

from loopback.bpf import hooks, layout, objects, rtnl
from loopback.bpf.build import compile_object
from loopback.bpf.objects import Map
from loopback.bpf.rtnl import Device
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import compile as compiler
from loopback.modules.firewall import pins, slots

pytestmark = pytest.mark.kernel

SHUT = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
OPEN = "version: 1\ndefault: {ingress: accept, egress: accept}\n"
PROBE = to_host(UDP(sport=4000, dport=9))


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture(scope="module")
def other_release(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same structures, other programs."""
    folder = tmp_path_factory.mktemp("other") / "programs"
    shutil.copytree(Path(layout.__file__).parent / "programs", folder)
    source = folder / "firewall.bpf.c"
    text = source.read_text()
    assert "#define HEADERS 256" in text
    source.write_text(text.replace("#define HEADERS 256", "#define HEADERS 192"))
    compile_object(source, folder / "firewall.bpf.o")
    return (folder / "firewall.bpf.o").read_bytes()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def egress_program(world: World, device: str = "eth0") -> int:
    with inside(world.host):
        return hooks.tc_program(socket.if_nametoindex(device), hooks.TC_EGRESS)


# ── packets ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_flow_of_one_device_opens_no_other(world: World) -> None:
    """The tuple of an allowed flow, forged by somebody where the rule does not hold."""
    datapath = world.enforce(
        SHUT + "rules:\n  - {name: lan, iface: eth0, proto: udp, ports: 100, action: accept}\n"
    )
    ip("-n", world.host, "link", "add", "wan0", "type", "veth", "peer", "name", "wan1")
    for name in ("wan0", "wan1"):
        ip("-n", world.host, "link", "set", name, "up")
    frame = to_host(UDP(sport=4000, dport=100), Raw(b"0123456789abcdef"))
    assert world.arriving(frame) == [True]
    with inside(world.host):
        datapath.cover()
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with wire:
        wire.bind(("wan1", 0))
        for _ in range(3):
            wire.send(bytes(frame))
    wait_for(lambda: datapath.totals()["ingress.default.drop"] >= 3)
    assert datapath.totals()["ingress.flow.accept"] == 0
    assert world.arriving(frame) == [True]


def test_a_rule_for_a_bridge_holds_though_its_port_let_the_packet_in(world: World) -> None:
    ip("-n", world.host, "addr", "flush", "dev", "eth0")
    ip("-n", world.host, "link", "add", "br0", "address", HOST_MAC, "type", "bridge")
    ip("-n", world.host, "link", "set", "eth0", "master", "br0")
    ip("-n", world.host, "link", "set", "br0", "up")
    ip("-n", world.host, "addr", "add", f"{HOST4}/24", "dev", "br0")
    datapath = world.enforce(
        OPEN + "rules:\n  - {name: not-here, iface: br0, proto: udp, ports: 4242, action: drop}\n"
    )
    assert {a.device for a in datapath.attachments} == {"eth0", "br0"}
    with inside(world.host):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((HOST4, 4242))
        server.setblocking(False)
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        other.bind((HOST4, 4243))
        other.settimeout(60)
    with inside(world.peer):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server, other, client:
        for _ in range(3):
            client.sendto(b"x", (HOST4, 4242))
        client.sendto(b"behind them", (HOST4, 4243))
        assert other.recv(100) == b"behind them"
        with pytest.raises(BlockingIOError):
            server.recv(100)
    assert datapath.counters()["not-here"][0] == 3


def test_no_syn_passes_as_part_of_the_flow_whose_ports_it_has(world: World) -> None:
    world.stop_adopting(world.enforce(SHUT))
    assert world.leaving(to_peer(TCP(sport=22, dport=40000, flags="S"))) == [True]
    frames = [
        to_host(TCP(sport=40000, dport=22, flags=flags)) for flags in ("S", "SF", "SP", "SU", "SFPU", "SA")
    ]
    assert world.arriving(*frames) == [False] * 5 + [True]


def test_a_forged_reset_does_not_shorten_a_connections_life(world: World) -> None:
    datapath = world.enforce(SHUT + "rules:\n  - {name: web, proto: tcp, ports: 8080, action: accept}\n")

    def stages() -> list[str]:
        return [flow.stage for flow in datapath.flows()]

    with contextlib.ExitStack() as stack:
        with inside(world.host):
            server = stack.enter_context(socket.create_server((HOST4, 8080)))
        with inside(world.peer):
            client = stack.enter_context(socket.create_connection((HOST4, 8080), 60))
        accepted = stack.enter_context(server.accept()[0])
        accepted.settimeout(60)
        ours = client.getsockname()[1]
        assert stages() == ["open"]
        assert world.arriving(to_host(TCP(sport=ours, dport=8080, flags="R", seq=7))) == [True]
        client.sendall(b"alive")
        assert accepted.recv(100) == b"alive"
        wait_for(lambda: stages() == ["open"])
    wait_for(lambda: stages() != ["open"])


def test_later_ipv6_fragments_follow_though_the_first_has_options(world: World) -> None:
    world.enforce(SHUT + "rules:\n  - {name: names, proto: udp, ports: 53, action: accept}\n")

    def pieces(port: int, number: int) -> list[object]:
        first = [
            IPv6ExtHdrFragment(m=1, id=number, nh=60),
            IPv6ExtHdrDestOpt(nh=17),
            UDP(sport=2000, dport=port, len=200),
        ]
        later = [IPv6ExtHdrFragment(offset=9, id=number, nh=60), Raw(b"y" * 64)]
        return [to_host6(*first, Raw(b"x" * 44)), to_host6(*later)]

    assert world.arriving(*pieces(53, 5)) == [True, True]
    assert world.arriving(*pieces(54, 6)) == [False, False]


def test_a_flood_of_new_flows_does_not_push_out_live_ones(world: World) -> None:
    def datagrams(sports: range, dport: int) -> list[bytes]:
        """Without building each anew."""
        frame = bytearray(bytes(to_host(UDP(sport=0, dport=dport, chksum=0))))
        return [bytes(frame[:34] + sport.to_bytes(2, "big") + frame[36:]) for sport in sports]

    datapath = world.open(flows=1024)
    world.enforce(SHUT + "rules:\n  - {name: names, proto: udp, ports: 53, action: accept}\n", datapath)
    live = datagrams(range(7000, 7020), 6000)
    assert not any(world.raw(*live)), "they are answers alone"
    assert all(world.leaving(*[to_peer(UDP(sport=6000, dport=7000 + n)) for n in range(20)]))
    assert all(world.raw(*live))
    for base in range(1024, 1024 + 8 * 1024, 128):
        assert all(world.raw(*datagrams(range(base, base + 128), 53)))
        assert all(world.raw(*live)), f"after {base - 1024} new flows"


# ── devices ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_restart_covers_a_device_that_was_made_anew_meanwhile(world: World) -> None:
    world.enforce(SHUT).close()
    ip("-n", world.host, "link", "del", "eth0")
    ip(
        "-n", world.host, "link", "add", "eth0", "address", HOST_MAC,
        "type", "veth", "peer", "name", "eth0", "address", PEER_MAC, "netns", world.peer,
    )  # fmt: skip
    again = world.open()
    assert again.adopted
    with inside(world.host):
        assert again.uncovered() == []


def test_a_renamed_device_keeps_nothing_after_removal(world: World) -> None:
    datapath = world.enforce(SHUT, world.open(interfaces=["eth0"]))
    ip("-n", world.host, "link", "set", "eth0", "name", "wan0")
    with inside(world.host):
        assert datapath.uncovered() == ["eth0"], "it is told"
        datapath.remove()
        assert not rtnl.has_clsact(socket.if_nametoindex("wan0"))
    assert egress_program(world, "wan0") == 0


def test_a_device_that_new_settings_leave_out_is_left(world: World) -> None:
    ip("-n", world.host, "link", "add", "two0", "type", "veth", "peer", "name", "two1")
    world.enforce(SHUT).close()
    assert egress_program(world, "two0")
    again = world.open(interfaces=["eth0"])
    assert again.adopted and [a.device for a in again.attachments] == ["eth0"]
    assert egress_program(world, "two0") == 0
    assert egress_program(world) != 0


def test_a_device_that_goes_during_a_commit_is_no_problem(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    datapath = world.open()
    going = Device(index=99999, name="gone0", kind=1, up=True)
    there, real, real_create = [going], rtnl.devices, hooks.XdpLink.create

    def create(index: int, chosen: objects.Program) -> hooks.XdpLink:
        if index == going.index:
            there.clear()
        return real_create(index, chosen)

    with inside(world.host):
        datapath.stage(policy_of(SHUT), "ab" * 32)
        monkeypatch.setattr(rtnl, "devices", lambda: [*real(), *there])
        monkeypatch.setattr(hooks.XdpLink, "create", create)
        datapath.commit(0)
    assert not there
    monkeypatch.undo()
    assert [a.device for a in datapath.attachments] == ["eth0"]
    assert world.arriving(PROBE) == [False]


# ── two buffers, two processes, two releases ──────────────────────────────────────────────────────────────────────────────────


def test_a_new_release_changes_no_program_before_its_commit(world: World, other_release: bytes) -> None:
    """News of a device come while it has not even staged; and its trial can still be undone."""
    world.enforce(SHUT)
    before = egress_program(world)
    second = world.open(other_release)
    ip("-n", world.host, "link", "add", "new0", "type", "veth", "peer", "name", "new1")
    with inside(world.host):
        second.cover()
    assert egress_program(world) == before
    assert egress_program(world, "new0") == before, "the release in charge guards the new device"
    world.enforce(OPEN, second, trial_s=60)
    assert egress_program(world) != before
    with inside(world.host):
        second.revert()
    assert egress_program(world) == egress_program(world, "new0") == before
    assert world.arriving(PROBE) == [False]


def test_a_release_killed_while_it_takes_over_is_undone_by_the_old_one(
    world: World, other_release: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.enforce(SHUT)
    ip("-n", world.host, "link", "add", "two0", "type", "veth", "peer", "name", "two1")
    first = world.open()
    before = egress_program(world)
    second = world.open(other_release)
    attached = 0
    real = hooks.tc_attach

    def dies(index: int, point: int, chosen: objects.Program) -> None:
        nonlocal attached
        attached += 1
        if attached == 2:
            raise Killed
        real(index, point, chosen)

    with inside(world.host):
        second.stage(policy_of(OPEN), "ab" * 32)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(hooks, "tc_attach", dies)
            second.commit(60)
    first.close()
    second.close()
    assert world.arriving(PROBE) == [False]
    third = world.open()
    assert third.adopted
    assert egress_program(world) == egress_program(world, "two0") == before
    ip("-n", world.host, "link", "add", "new0", "type", "veth", "peer", "name", "new1")
    with inside(world.host):
        third.cover()
        assert third.uncovered() == [], "the trial is forgotten"


@pytest.mark.parametrize("steps", range(5))
def test_killed_at_any_step_of_staging_the_successor_goes_on(
    world: World, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = "rules:\n  - {name: a, iface: eth0, proto: udp, ports: 1, action: drop}\n"
    datapath = world.enforce(SHUT + named)
    digest, left = datapath.digest, steps
    real_put, real_pin, real_fill = Map.update_fd, pins.Pins.replace, slots.Slots.fill

    def step() -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    def put(self: Map, index: int, inner: Map) -> None:
        step()
        real_put(self, index, inner)

    def pin(self: pins.Pins, name: str, one: Map) -> None:
        step()
        real_pin(self, name, one)

    def fill(self: slots.Slots, index: int, slot: bytes, epoch: int, mark: bytes) -> None:
        at = index * self._pins.half
        self._set.maps["arena"].memory()[at : at + 4] = bytes(4)
        step()
        real_fill(self, index, slot, epoch, mark)

    with inside(world.host), monkeypatch.context() as patched:
        patched.setattr(slots.Slots, "fill", fill)
        patched.setattr(Map, "update_fd", put)
        patched.setattr(pins.Pins, "replace", pin)
        with pytest.raises(Killed):
            datapath.stage(policy_of(OPEN + named), "ab" * 32)
            step()
    datapath.close()
    assert world.arriving(PROBE) == [False]
    again = world.open()
    assert again.adopted and again.digest == digest
    assert world.arriving(PROBE) == [False]
    world.enforce(OPEN, again)
    assert world.arriving(PROBE) == [True]
    assert again.totals()["ingress.broken.drop"] == 0


def test_nobody_commits_what_another_process_staged(world: World) -> None:
    first = world.enforce(SHUT)
    second = world.open()
    with inside(world.host):
        first.stage(policy_of(SHUT), "01" * 32)
        second.stage(policy_of(OPEN), "02" * 32)
        with pytest.raises(Refused, match="another process") as refused:
            first.commit(0)
        assert refused.value.code is Code.MODULE_ABI
        assert world.arriving(PROBE) == [False]
        first.stage(policy_of(OPEN), "03" * 32)
        second.stage(policy_of(SHUT), "04" * 32)
        second.commit(0)
        with pytest.raises(Refused, match="another process"):
            first.commit(0)
    assert world.arriving(PROBE) == [False]
    assert second.totals()["ingress.broken.drop"] == 0


def test_what_expired_cannot_be_confirmed_after_another_staging(world: World) -> None:
    datapath = world.enforce(OPEN)
    world.enforce(SHUT, datapath, trial_s=0.1)
    wait_for(lambda: world.arriving(PROBE) == [True])
    with inside(world.host):
        datapath.stage(policy_of(OPEN), "ab" * 32)
        with pytest.raises(Refused) as refused:
            datapath.confirm()
    assert refused.value.code is Code.HOST_UNCONFIRMED


@pytest.mark.parametrize("steps", [0, 1, 4, 12, 18])
def test_killed_while_it_removes_itself_it_can_start_again(
    world: World, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    datapath = world.enforce(SHUT)
    real, left = Path.unlink, steps

    def unlink(self: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if world.root in self.parents:
            left -= 1
            if left < 0:
                raise Killed
        real(self, missing_ok)

    with inside(world.host), monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "unlink", unlink)
        datapath.remove()
    datapath.close()
    assert world.arriving(PROBE) == [True]
    world.enforce(SHUT)
    assert world.arriving(PROBE) == [False]


def test_a_counter_given_to_another_rule_begins_at_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(*names: str) -> str:
        rules = [
            f"  - {{name: {name}, proto: udp, ports: {53 + n}, action: accept}}\n"
            for n, name in enumerate(names)
        ]
        return SHUT + "rules:\n" + "".join(rules)

    real = compiler.assign
    monkeypatch.setattr(compiler, "assign", lambda known, names, _capacity: real(known, names, capacity=3))
    datapath = world.enforce(named("old"))
    assert world.arriving(to_host(UDP(sport=4000, dport=53))) == [True]
    world.enforce(named("kept"), datapath)
    assert world.arriving(to_host(UDP(sport=4001, dport=53))) == [True]
    world.enforce(named("a", "b"), datapath)
    assert set(datapath.counters()) == {"kept", "a", "b"}
    assert datapath.counters()["a"] == datapath.counters()["b"] == (0, 0)
    assert datapath.counters()["kept"][0] == 1
