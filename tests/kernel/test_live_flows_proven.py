"""The connections by which a host is managed, against a staged policy: real sockets, the real program, the module's process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from support_datapath import HOST4, HOST6, PEER4, PEER6, World, inside, policy_of

from loopback.contracts.abi import Connection
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import live
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import FirewallPolicy

pytestmark = pytest.mark.kernel

OPEN = "version: 1\ndefault: {ingress: accept, egress: accept}\n"
SHUT = "version: 1\ndefault: {ingress: drop, egress: drop}\n"
ANSWERING = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
BROKER, SSH = 4222, 22


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


@contextlib.contextmanager
def connection(
    server: str, client: str, address: str, port: int
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the one that began it, the one that took it), from one namespace to another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        with inside(server):
            listening = stack.enter_context(socket.create_server((address, port), family=family))
        with inside(client):
            began = stack.enter_context(socket.create_connection((address, port), 10))
        took = stack.enter_context(listening.accept()[0])
        took.settimeout(10)
        yield began, took


def of(began: socket.socket) -> Connection:
    local, remote = began.getsockname(), began.getpeername()
    return Connection(local=local[0], local_port=local[1], remote=remote[0], remote_port=remote[1])


def proved(
    world: World, datapath: Datapath, text: str | FirewallPolicy, *control: Connection
) -> Refused | None:
    """Stage, prove, and commit where that is allowed; what was refused."""
    with inside(world.host):
        datapath.stage(policy_of(text) if isinstance(text, str) else text)
        try:
            datapath.prove_live(control, live.SSH)
        except Refused as refused:
            with pytest.raises(Refused, match="nothing is staged"):
                datapath.commit(0)
            return refused
        datapath.commit(0)
        return None


@pytest.mark.parametrize(("address", "peer"), [(HOST4, PEER4), (HOST6, PEER6)])
@pytest.mark.parametrize("before", [None, OPEN])
def test_a_policy_that_would_end_an_operators_session_is_not_committed(
    world: World, address: str, peer: str, before: str | None
) -> None:
    datapath = world.enforce(before) if before else world.open()
    with connection(world.host, world.peer, address, SSH) as (operator, session):
        generation = datapath.generation
        refused = proved(world, datapath, ANSWERING)
        assert refused is not None and refused.code is Code.POLICY_TEST_FAILED
        assert f"a session at port 22 would end: the default drops ingress {peer}" in refused.reason
        assert datapath.generation == generation
        operator.sendall(b"still here")
        assert session.recv(100) == b"still here"
        allowing = ANSWERING + "rules:\n  - {name: ssh, iface: eth0, proto: tcp, ports: 22, action: accept}\n"
        assert proved(world, datapath, allowing) is None
        operator.sendall(b"and after")
        assert session.recv(100) == b"and after"


def test_without_the_proof_the_session_is_cut(world: World) -> None:
    datapath = world.enforce(OPEN)
    with connection(world.host, world.peer, HOST4, SSH) as (operator, session):
        world.enforce(ANSWERING, datapath)
        session.settimeout(1)
        operator.sendall(b"nobody hears")
        with pytest.raises(TimeoutError):
            session.recv(100)


@pytest.mark.parametrize("address", [PEER4, PEER6])
def test_a_policy_that_would_end_the_connection_to_the_broker_is_not_committed(
    world: World, address: str
) -> None:
    datapath = world.enforce(OPEN)
    with connection(world.peer, world.host, address, BROKER) as (agent, broker):
        refused = proved(world, datapath, SHUT, of(agent))
        assert refused is not None and refused.code is Code.POLICY_TEST_FAILED
        assert "connection to the control plane would end: the default drops egress" in refused.reason
        out = f"rules:\n  - {{name: bus, direction: egress, proto: tcp, ports: {BROKER}, action: accept}}\n"
        assert proved(world, datapath, SHUT + out, of(agent)) is None
        agent.sendall(b"x")
        assert broker.recv(10) == b"x"


def test_a_session_that_was_taken_over_the_other_way_round_is_asked_about_as_it_stands(world: World) -> None:
    with connection(world.host, world.peer, HOST4, SSH) as (operator, session):
        datapath = world.enforce(
            ANSWERING + "rules:\n  - {name: ssh, proto: tcp, ports: 22, action: accept}\n"
        )
        session.sendall(b"the host speaks first")
        assert operator.recv(100) == b"the host speaks first"
        (flow,) = [one for one in datapath.flows() if SSH in (one.sport, one.dport)]
        assert flow.sport == SSH
        only_in = SHUT + "rules:\n  - {name: ssh, proto: tcp, ports: 22, action: accept}\n"
        refused = proved(world, datapath, only_in)
        assert refused is not None and "drops egress" in refused.reason


def test_connections_that_pass_no_covered_device_are_no_hindrance(world: World) -> None:
    datapath = world.open()
    with connection(world.host, world.host, "127.0.0.1", SSH) as (inner, _):
        assert proved(world, datapath, SHUT, of(inner)) is None
