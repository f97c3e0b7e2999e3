"""How live connections are found: of this process, of a port, and in a table of flows; with sockets on loopback."""

from __future__ import annotations

import ctypes as ct
import mmap
import socket
import struct

import pytest

from loopback.bpf import layout, rtnl
from loopback.contracts.abi import Connection
from loopback.host.connections import own_connections
from loopback.modules.firewall import live
from loopback.modules.firewall.model import Direction


def connected(
    address: str, family: socket.AddressFamily
) -> tuple[socket.socket, socket.socket, socket.socket]:
    listening = socket.create_server((address, 0), family=family)
    client = socket.create_connection(listening.getsockname()[:2], 60)
    return listening, client, listening.accept()[0]


def seen_from(one: socket.socket) -> Connection:
    local, remote = one.getsockname(), one.getpeername()
    return Connection(local=local[0], local_port=local[1], remote=remote[0], remote_port=remote[1])


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_session_is_found_by_the_port_it_came_to_and_only_while_it_lasts(
    address: str, family: socket.AddressFamily
) -> None:
    listening, client, server = connected(address, family)
    port = listening.getsockname()[1]
    with listening:
        with client, server:
            assert list(live.sessions([port])) == [seen_from(server)]
            assert seen_from(client) not in list(live.sessions([port]))
            assert {seen_from(client), seen_from(server)} <= set(own_connections())
        assert not list(live.sessions([port]))


def test_an_ipv4_session_of_a_socket_of_both_families_is_ipv4() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), 60) as client, listening.accept()[0] as server:
            (found,) = live.sessions([port])
            assert found == Connection(
                local="127.0.0.1", local_port=port, remote="127.0.0.1", remote_port=client.getsockname()[1]
            )
            assert live.plain(server.getpeername()[0]) == "127.0.0.1"


def test_looking_at_ones_own_connections_leaves_no_descriptor_open() -> None:
    with socket.socket() as _unconnected:
        before = own_connections()
        first = socket.socket()
        number = first.fileno()
        first.close()
        assert own_connections() == before
        with socket.socket() as again:
            assert again.fileno() == number


def test_the_device_of_a_connection_is_where_its_packets_leave() -> None:
    lo = next(device.index for device in rtnl.devices() if device.loopback)
    assert rtnl.device_to("127.0.0.1", "127.0.0.1") == lo
    assert rtnl.device_to("203.0.113.9", "198.51.100.7") == 0  # no address of ours


@pytest.mark.parametrize(("ours", "theirs"), [("10.0.0.1", "10.0.0.2"), ("fd00::2", "fd00::1")])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_connections_flow_is_found_by_its_ends(ours: str, theirs: str, swapped: bool) -> None:
    (low, low_port), (high, high_port) = sorted([(ours, 22), (theirs, 50000)])
    flow = layout.Flow(life=1000, seen=50, born=10, swapped=swapped, stage=1)
    for half, address in (("low", low), ("high", high)):
        number = live._number(address)
        setattr(flow.key, half, (ct.c_uint8 * 16)(*struct.pack("=2Q", number >> 64, number % 2**64)))
    flow.key.low_port, flow.key.high_port = low_port, high_port
    flow.key.protocol, flow.key.family = 6, 6 if ":" in ours else 4
    flow.sides[0].allowed, flow.sides[0].ifindex = 3, 7
    table = mmap.mmap(-1, mmap.PAGESIZE)
    table[384 : 384 + 128] = bytes(flow)
    connection = Connection(local=ours, local_port=22, remote=theirs, remote_port=50000)
    found = live.flow_of(connection, memoryview(table), 60, 100, {})
    assert found is not None
    begun = (high, high_port) if swapped else (low, low_port)
    assert (found.src, found.sport) == begun
    asked = live.packets(connection, Direction.INGRESS, "eth0", found, {7: "eth0"})
    assert (asked[0].src, asked[0].sport, asked[0].dst, asked[0].dport) == (theirs, 50000, ours, 22)
    assert len(asked) == (1 if begun == (theirs, 50000) else 2)
    assert live.flow_of(connection, memoryview(table), 5000, 100, {}) is None, "it has expired"
    stranger = Connection(local=ours, local_port=23, remote=theirs, remote_port=50000)
    assert live.flow_of(stranger, memoryview(table), 60, 100, {}) is None
