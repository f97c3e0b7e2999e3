"""Devices above and beside the wire: loopback, VLANs, macvlan, tunnels. The policy holds on each; asked twice, it cuts nothing.

VLAN devices and WireGuard are tried where the kernel has them; Debian's has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator

import pytest
from support_datapath import HOST4, HOST6, PEER4, TCP, World, inside, to_host

from loopback.modules.firewall.model import Direction

pytestmark = pytest.mark.kernel

SHUT = "version: 1\ndefault: {ingress: drop, egress: drop}\n"
CLOSED = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
WEB = "rules:\n  - {name: web, proto: tcp, ports: 8080, action: accept}\n"
WAIT_S = 60


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def ip(namespace: str, *words: str) -> None:
    subprocess.run(["ip", "-n", namespace, *words], check=True, capture_output=True)


def has(kind: str) -> bool:
    """Whether the kernel makes devices of a kind."""
    made = subprocess.run(
        ["unshare", "--net", "sh", "-c", f"ip link add a0 type veth peer name a1 && ip link add {kind}"],
        capture_output=True, check=False,
    )  # fmt: skip
    return made.returncode == 0


def exchange(one: socket.socket, other: socket.socket) -> None:
    for speaks, hears in ((one, other), (other, one)):
        hears.settimeout(WAIT_S)
        speaks.sendall(b"hello")
        assert hears.recv(100) == b"hello"


@contextlib.contextmanager
def connected(
    server: str, client: str, address: str, port: int = 8080
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the one that began it, the one that took it)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        with inside(server):
            listening = stack.enter_context(socket.create_server((address, port), family=family))
        with inside(client):
            began = stack.enter_context(socket.create_connection((address, port), WAIT_S))
        yield began, stack.enter_context(listening.accept()[0])


def refused(server: str, client: str, address: str, port: int) -> None:
    """Nobody gets through to a port at which somebody listens."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(server):
        listening = socket.create_server((address, port), family=family)
    with inside(client):
        trying = socket.socket(family, socket.SOCK_STREAM)
    with listening, trying:
        trying.settimeout(1.5)
        with pytest.raises(TimeoutError):
            trying.connect((address, port))


# ── loopback ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

TO_ITSELF = ["127.0.0.1", "::1", HOST4, HOST6]


@pytest.mark.parametrize("address", TO_ITSELF)
def test_what_a_host_says_to_itself_is_nobodys_business(world: World, address: str) -> None:
    with connected(world.host, world.host, address) as before:
        datapath = world.enforce(SHUT)
        exchange(*before)
        with connected(world.host, world.host, address, 8081) as after:
            exchange(*after)
    assert "lo" not in {one.device for one in datapath.attachments}


LO = "rules:\n  - {name: in, iface: lo, action: accept}\n  - {name: out, direction: egress, iface: lo, action: accept}\n"


@pytest.mark.parametrize("address", TO_ITSELF)
def test_a_loopback_that_is_named_is_guarded_and_its_connections_live(world: World, address: str) -> None:
    """Both hooks see the same packet, and each judges it once."""
    datapath = world.open(interfaces=["*", "lo"])
    with connected(world.host, world.host, address) as before:
        world.enforce(SHUT + LO, datapath)
        exchange(*before)
        with connected(world.host, world.host, address, 8081) as after:
            exchange(*after)
            flows = {flow.dport: flow for flow in datapath.flows() if flow.protocol == 6}
            assert {8080, 8081} <= flows.keys()
            assert set(flows[8081].sides) == set(Direction)
            world.enforce(SHUT + LO + "  - {name: more, proto: udp, ports: 1, action: accept}\n", datapath)
            exchange(*after)
        with inside(world.host):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            nobody = socket.socket(family, socket.SOCK_DGRAM)
        with nobody:
            nobody.connect((address, 9))
            nobody.settimeout(WAIT_S)
            nobody.send(b"x")
            with pytest.raises(ConnectionRefusedError):  # the error about it comes back
                nobody.recv(1)
        world.enforce(SHUT, datapath)
        refused(world.host, world.host, address, 8082)


def test_nobody_uses_a_flow_of_the_loopback_from_the_wire(world: World) -> None:
    """Who forges the host's own address has the tuple of a connection that the host has with itself, but not its device."""
    datapath = world.open(interfaces=["*", "lo"])
    world.enforce(SHUT + LO, datapath)
    world.stop_adopting(datapath)
    with connected(world.host, world.host, HOST4) as (client, server):
        exchange(client, server)
        port = client.getsockname()[1]
        forged = [
            to_host(TCP(sport=port, dport=8080, flags="A"), src=HOST4),
            to_host(TCP(sport=8080, dport=port, flags="A"), src=HOST4),
            to_host(TCP(sport=8080, dport=port, flags="R"), src=HOST4),
        ]
        assert world.arriving(*forged) == [False] * 3
        exchange(client, server)


# ── two devices, one packet ───────────────────────────────────────────────────────────────────────────────────────────────────


def macvlan(world: World) -> str:
    """A device of its own address above eth0; the address."""
    address = "02:78:00:00:00:01"
    ip(
        world.host,
        "link",
        "add",
        "mac0",
        "link",
        "eth0",
        "address",
        address,
        "type",
        "macvlan",
        "mode",
        "bridge",
    )
    ip(world.host, "link", "set", "mac0", "up")
    ip(world.host, "addr", "add", "10.78.0.1/24", "dev", "mac0")
    ip(world.peer, "addr", "add", "10.78.0.2/24", "dev", "eth0")
    # eth0 would answer for it as well, and the packets never come by mac0
    ip(world.peer, "neigh", "add", "10.78.0.1", "lladdr", address, "dev", "eth0")
    return "10.78.0.1"


STACKED = [
    pytest.param("macvlan", id="macvlan"),
    pytest.param("vlan", id="vlan"),
    pytest.param("qinq", id="qinq"),
]


def stacked(world: World, kind: str) -> tuple[str, str]:
    """A device above eth0 of the host, and the peer's like: (its name, its address)."""
    if kind == "macvlan":
        return "mac0", macvlan(world)
    if not has("link a0 name a0.7 type vlan id 7"):
        pytest.skip("this kernel has no VLAN devices (8021q); Debian's has")
    for namespace, address in ((world.host, "10.78.0.1"), (world.peer, "10.78.0.2")):
        words = ("link", "add", "link", "eth0", "name", "v7", "type", "vlan", "id", "7")
        ip(namespace, *words, *(("protocol", "802.1ad") if kind == "qinq" else ()))
        ip(namespace, "link", "set", "v7", "up")
        name = "v7"
        if kind == "qinq":
            ip(namespace, "link", "add", "link", "v7", "name", "v8", "type", "vlan", "id", "8")
            ip(namespace, "link", "set", "v8", "up")
            name = "v8"
        ip(namespace, "addr", "add", f"{address}/24", "dev", name)
    return name, "10.78.0.1"


@pytest.mark.parametrize("kind", STACKED)
def test_a_packet_that_passes_two_devices_pays_once_and_is_let_in_or_not(world: World, kind: str) -> None:
    name, address = stacked(world, kind)
    limited = WEB.replace("action: accept", "action: accept, limit: {rate: 1/h, burst: 1}")
    datapath = world.enforce(SHUT + limited)
    assert {"eth0", name} <= {one.device for one in datapath.attachments}
    with connected(world.host, world.peer, address) as ends:
        exchange(*ends)
        assert datapath.totals()["ingress.flow.accept"] > 3, "it was asked on both"
        assert [flow.dport for flow in datapath.flows() if flow.protocol == 6] == [8080]
        world.enforce(SHUT + limited + "  - {name: more, proto: udp, ports: 1, action: accept}\n", datapath)
        exchange(*ends)
        refused(world.host, world.peer, address, 8081)
        with inside(world.peer), socket.socket() as second, pytest.raises(TimeoutError):
            second.settimeout(1.5)
            second.connect((address, 8080))
        world.enforce(SHUT, datapath)
        ends[0].sendall(b"too late")
        ends[1].settimeout(0.5)
        with pytest.raises(TimeoutError):
            ends[1].recv(100)


@pytest.mark.parametrize("kind", STACKED)
def test_a_rule_for_the_upper_device_has_to_name_the_lower_one_too(world: World, kind: str) -> None:
    """The packet comes by both, and each is asked."""
    name, address = stacked(world, kind)
    through = [name] if kind != "qinq" else ["v7", name]
    only = WEB.replace("name: web", f"name: web, iface: {name}")
    both = WEB.replace("name: web", f"name: web, iface: [eth0, {', '.join(through)}]")
    datapath = world.enforce(CLOSED + only)
    refused(world.host, world.peer, address, 8080)
    world.enforce(CLOSED + both, datapath)
    with connected(world.host, world.peer, address) as ends:
        exchange(*ends)
        world.enforce(CLOSED + only, datapath)
        ends[0].sendall(b"too late")
        ends[1].settimeout(0.5)
        with pytest.raises(TimeoutError):
            ends[1].recv(100)


# ── without an Ethernet header ────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def tunnelled(world: World) -> Iterator[None]:
    """tun0 of the host and of the peer, with somebody between who carries packets from the one to the other."""
    wires = []
    with contextlib.ExitStack() as stack:
        for namespace, number in ((world.host, 1), (world.peer, 2)):
            ip(namespace, "tuntap", "add", "tun0", "mode", "tun")
            ip(namespace, "addr", "add", f"10.88.0.{number}/24", "dev", "tun0")
            ip(namespace, "-6", "addr", "add", f"fd88::{number}/64", "dev", "tun0", "nodad")
            with inside(namespace):
                wire = os.open("/dev/net/tun", os.O_RDWR)
                stack.callback(os.close, wire)
                fcntl.ioctl(
                    wire, 0x400454CA, struct.pack("16sH", b"tun0", 0x1001)
                )  # TUNSETIFF: IFF_TUN, IFF_NO_PI
            wires.append(wire)
            ip(namespace, "link", "set", "tun0", "up")
        ending, end = os.pipe()
        stack.callback(os.close, ending)

        def carry() -> None:
            across = {wires[0]: wires[1], wires[1]: wires[0]}
            while True:
                ready, _, _ = select.select([*wires, ending], [], [])
                if ending in ready:
                    return
                for one in ready:
                    os.write(across[one], os.read(one, 65536))

        carrier = threading.Thread(target=carry)
        carrier.start()
        stack.callback(carrier.join)
        stack.callback(os.close, end)
        yield


@pytest.mark.parametrize("address", ["10.88.0.1", "fd88::1"])
def test_connections_over_a_tunnel_are_followed_and_others_refused(world: World, address: str) -> None:
    with tunnelled(world):
        datapath = world.enforce(SHUT + WEB.replace("name: web", "name: web, iface: tun0"))
        assert {one.device: one.ingress for one in datapath.attachments}["tun0"] == "tc"
        with connected(world.host, world.peer, address) as ends:
            exchange(*ends)
            refused(world.host, world.peer, address, 8081)
            refused(world.host, world.peer, HOST4, 8080)
            exchange(*ends)


def test_wireguard_needs_its_datagrams_and_what_is_within_is_judged_by_itself(world: World) -> None:
    if not has("wg0 type wireguard") or shutil.which("wg") is None:
        pytest.skip("this kernel has no WireGuard, or there is no wg (wireguard-tools); Debian's has")
    keys = [subprocess.run(["wg", "genkey"], check=True, capture_output=True).stdout for _ in range(2)]
    public = [
        subprocess.run(["wg", "pubkey"], input=k, check=True, capture_output=True).stdout.decode().strip()
        for k in keys
    ]
    sides = ((world.host, 0, PEER4, 51820), (world.peer, 1, HOST4, 51821))
    for namespace, own, far, port in sides:
        ip(namespace, "link", "add", "wg0", "type", "wireguard")
        subprocess.run(
            ["ip", "netns", "exec", namespace, "wg", "set", "wg0", "listen-port", str(port), "private-key", "/proc/self/fd/0",
             "peer", public[1 - own], "allowed-ips", "10.89.0.0/24", "endpoint", f"{far}:{51821 - own}"],
            input=keys[own], check=True, capture_output=True,
        )  # fmt: skip
        ip(namespace, "addr", "add", f"10.89.0.{own + 1}/24", "dev", "wg0")
        ip(namespace, "link", "set", "wg0", "up")
    outer = "  - {name: outer, proto: udp, ports: 51820, iface: eth0, action: accept}\n"
    datapath = world.enforce(CLOSED + WEB.replace("name: web", "name: web, iface: wg0") + outer)
    assert {one.device: one.ingress for one in datapath.attachments}["wg0"] == "tc"
    with connected(world.host, world.peer, "10.89.0.1") as ends:
        exchange(*ends)
        refused(world.host, world.peer, "10.89.0.1", 8081)
        refused(world.host, world.peer, HOST4, 8080)
