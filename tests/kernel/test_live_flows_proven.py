"""The connections by which a host is managed, against a staged policy: real sockets, the real program, the module's process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

import pytest
from support_datapath import HOST4, HOST6, PEER4, PEER6, World, inside, policy_of

from loopback.contracts.abi import Connection
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import live
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import Direction, FirewallPolicy, Prefix
from loopback.modules.firewall.policy_fields import prefix

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
            began = stack.enter_context(socket.create_connection((address, port), 60))
        took = stack.enter_context(listening.accept()[0])
        took.settimeout(60)
        yield began, took


def of(began: socket.socket) -> Connection:
    local, remote = began.getsockname(), began.getpeername()
    return Connection(local=local[0], local_port=local[1], remote=remote[0], remote_port=remote[1])


def proved(
    world: World,
    datapath: Datapath,
    text: str | FirewallPolicy,
    *control: Connection,
    networks: Sequence[Prefix] = (),
) -> Refused | None:
    """Stage, prove, and commit where that is allowed; what was refused."""
    with inside(world.host):
        datapath.stage(policy_of(text) if isinstance(text, str) else text)
        try:
            datapath.prove_live(control, live.SSH, networks)
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


SSH_IN = "rules:\n  - {name: ssh, iface: eth0, proto: tcp, ports: 22, action: accept}\n"
BUS_OUT = f"rules:\n  - {{name: bus, direction: egress, iface: eth0, proto: tcp, ports: {BROKER}, action: accept}}\n"


@pytest.mark.parametrize("address", [HOST4, HOST6])
def test_a_session_from_before_is_known_as_the_operators_though_the_host_speaks_first(
    world: World, address: str
) -> None:
    with connection(world.host, world.peer, address, SSH) as (operator, session):
        datapath = world.enforce(OPEN)
        (flow,) = datapath.flows()
        assert (flow.dport, flow.direction, flow.stage) == (SSH, Direction.INGRESS, "open")
        session.sendall(b"the host speaks first")
        assert operator.recv(100) == b"the host speaks first"
        assert proved(world, datapath, SHUT + SSH_IN) is None, "so a rule for who begins is enough"
        operator.sendall(b"and is answered")
        assert session.recv(100) == b"and is answered"


@pytest.mark.parametrize("address", [PEER4, PEER6])
def test_the_hosts_own_connection_from_before_is_known_as_its_own_though_the_other_end_speaks_first(
    world: World, address: str
) -> None:
    with connection(world.peer, world.host, address, BROKER) as (agent, broker):
        datapath = world.enforce(OPEN)
        (flow,) = datapath.flows()
        assert (flow.dport, flow.direction) == (BROKER, Direction.EGRESS)
        broker.sendall(b"news")
        assert agent.recv(10) == b"news"
        assert proved(world, datapath, SHUT + BUS_OUT, of(agent)) is None
        broker.sendall(b"more")
        assert agent.recv(10) == b"more"


def test_a_connection_that_is_silent_while_the_firewall_is_switched_on_is_not_cut_later(world: World) -> None:
    """Neither rules nor defaults let a segment of theirs pass that belongs to no flow."""
    strict = SHUT + SSH_IN.replace("ports: 22", "ports: 22, state: new") + BUS_OUT.removeprefix("rules:\n")
    with (
        connection(world.host, world.peer, HOST4, SSH) as (operator, session),
        connection(world.peer, world.host, PEER4, BROKER) as (agent, broker),
        connection(world.host, world.peer, HOST4, 8080) as (stranger, served),
    ):
        world.stop_adopting(world.enforce(strict))
        for speaks, hears in ((session, operator), (operator, session), (broker, agent), (agent, broker)):
            hears.settimeout(60)
            speaks.sendall(b"at last")
            assert hears.recv(100) == b"at last"
        stranger.sendall(b"not allowed by any rule")
        served.settimeout(0.5)
        with pytest.raises(TimeoutError):
            served.recv(100)


def test_who_was_there_before_spends_no_token(world: World) -> None:
    limited = SHUT + SSH_IN.replace("action: accept", "action: accept, limit: {rate: 1/h, burst: 1}")
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(connection(world.host, world.peer, HOST4, SSH)) for _ in range(1)]
        with inside(world.peer):
            pairs += [
                (stack.enter_context(socket.create_connection((HOST4, SSH), 10)), None) for _ in range(3)
            ]  # in the backlog, and established
        world.enforce(limited)
        datapath = world.open()
        assert sorted(flow.stage for flow in datapath.flows()) == ["open"] * 4
        with inside(world.peer):
            stack.enter_context(socket.create_connection((HOST4, SSH), 10))


def test_a_session_that_stands_the_other_way_round_is_asked_about_as_it_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own segment came between the commit and the look at the host's sockets."""
    monkeypatch.setattr(Datapath, "_take_over", lambda self: None)
    with connection(world.host, world.peer, HOST4, SSH) as (operator, session):
        datapath = world.enforce(ANSWERING + SSH_IN)
        session.sendall(b"the host speaks first")
        assert operator.recv(100) == b"the host speaks first"
        (flow,) = [one for one in datapath.flows() if SSH in (one.sport, one.dport)]
        assert flow.sport == SSH
        refused = proved(world, datapath, SHUT + SSH_IN)
        assert refused is not None and "drops egress" in refused.reason


# ── a stranger at a management port ───────────────────────────────────────────────────────────────────────────────────────────

BANNED = "  - {name: banned, from: '%s', action: drop}\n"


@pytest.mark.parametrize(("address", "peer"), [(HOST4, PEER4), (HOST6, PEER6)])
def test_whom_a_policy_drops_by_his_network_cannot_hold_it_up(world: World, address: str, peer: str) -> None:
    """He only has to connect and wait. What ends him is meant, and told; a rule for everybody is not about him."""
    datapath = world.enforce(OPEN)
    with connection(world.host, world.peer, address, SSH) as (stranger, session):
        for everybody in ("0.0.0.0/0", "::/0"):
            if (":" in everybody) == (":" in peer):
                assert proved(world, datapath, OPEN + "rules:\n" + BANNED % everybody) is not None
        assert (
            proved(world, datapath, OPEN + "rules:\n  - {name: none, proto: tcp, action: drop}\n") is not None
        )
        with inside(world.host):
            datapath.stage(policy_of(OPEN + "rules:\n" + BANNED % peer))
            (ended,) = datapath.prove_live((), live.SSH)
            datapath.commit(0)
        assert live.plain(ended.remote) == peer
        stranger.sendall(b"nobody hears")
        session.settimeout(0.5)
        with pytest.raises(TimeoutError):
            session.recv(100)


def test_a_session_that_has_ended_holds_nothing_up(world: World) -> None:
    """Its sockets stay for hours: nobody told them."""
    datapath = world.enforce(OPEN)
    with connection(world.host, world.peer, HOST4, SSH):
        assert proved(world, datapath, OPEN + "rules:\n" + BANNED % PEER4) is None
        assert proved(world, datapath, ANSWERING) is None
        assert proved(world, datapath, OPEN) is None
        assert proved(world, datapath, ANSWERING) is not None, "now it would live again"


def test_where_the_operators_networks_are_known_only_they_count_and_whatever_drops_them(world: World) -> None:
    datapath = world.enforce(OPEN)
    office, elsewhere = [prefix("10.77.0.2/31"), prefix("fd77::/64")], [prefix("10.78.0.0/16")]
    with connection(world.host, world.peer, HOST4, SSH):
        assert proved(world, datapath, ANSWERING, networks=office) is not None
        assert proved(world, datapath, OPEN + "rules:\n" + BANNED % PEER4, networks=office) is not None
        assert proved(world, datapath, ANSWERING, networks=elsewhere) is None


def test_connections_that_pass_no_covered_device_are_no_hindrance(world: World) -> None:
    datapath = world.open()
    with connection(world.host, world.host, "127.0.0.1", SSH) as (inner, _):
        assert proved(world, datapath, SHUT, of(inner)) is None
