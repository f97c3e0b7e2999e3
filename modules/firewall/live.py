"""The connections of a host, as the kernel knows them: those by which it is managed, and what a staged policy would do to them;
and all that are there when the firewall is first switched on.

They are found by NETLINK_SOCK_DIAG (sock_diag(7)), which needs no right and no file. A session is asked about twice: as the new
connection that it would have to be after it broke, and as the flow that the connection table has of it, since a connection that
was taken over may stand there the other way round.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from loopback.bpf import rtnl
from loopback.bpf.netlink import DUMP, ask
from loopback.contracts.abi import Connection
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy_fields
from loopback.modules.firewall.filling import inside
from loopback.modules.firewall.flows import Flow, at_key, original
from loopback.modules.firewall.model import Direction, Packet, Prefix, Rule
from loopback.modules.firewall.packets import Verdict

SSH: Final = (22,)  # where operators' sessions end, unless the host's settings say otherwise
_SOCK_DIAG: Final = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY: Final = 20
_ESTABLISHED: Final = 1 << 1
_HALF_CLOSED: Final = 1 << 4 | 1 << 5 | 1 << 8  # one end said that it is done
_LISTENING: Final = 1 << 10
_TCP: Final = 6
_REQUEST = struct.Struct(
    "=BBBxI2s46x"
)  # struct inet_diag_req_v2 up to the local port, by which the kernel filters
_ANSWER = struct.Struct(">4x2H16s16s")  # struct inet_diag_msg up to the remote address
_KEY = struct.Struct("=4Q2H2B2x")  # struct fw_flow_key
_MAPPED: Final = bytes(10) + b"\xff\xff"


def sessions(ports: Iterable[int]) -> Iterator[Connection]:
    """The established TCP connections to these ports of this host. Raises OSError."""
    for port in ports:
        yield from _sockets(_ESTABLISHED, port)


def connections() -> Iterator[tuple[Connection, Direction]]:
    """The TCP connections of this host, and by whom each was begun: who listens at its port did not. Raises OSError."""
    listening = {one.local_port for one in _sockets(_LISTENING)}
    for one in _sockets(_ESTABLISHED | _HALF_CLOSED):
        yield one, Direction.INGRESS if one.local_port in listening else Direction.EGRESS


def _sockets(states: int, port: int = 0) -> Iterator[Connection]:
    """Sockets in these states, of a local port or of all."""
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _REQUEST.pack(family, _TCP, 0, states, struct.pack(">H", port))
        for _, body in ask(_BY_FAMILY, request, DUMP, _SOCK_DIAG):
            here, there, local, remote = _ANSWER.unpack_from(body)
            yield Connection(
                local=_text(family, local),
                local_port=here,
                remote=_text(family, remote),
                remote_port=there,
            )


def _text(family: int, address: bytes) -> str:
    if family == socket.AF_INET:
        return socket.inet_ntop(family, address[:4])
    return plain(socket.inet_ntop(family, address))


def plain(address: str) -> str:
    """An address as packets have it: IPv4 where a socket of both families shows it mapped, and without a scope."""
    address = address.split("%")[0]
    if ":" not in address:
        return address
    data = socket.inet_pton(socket.AF_INET6, address)
    if data.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, data[12:])
    return socket.inet_ntop(socket.AF_INET6, data)


def beginning(connection: Connection, begun: Direction, device: str, tcp_flags: int | None = None) -> Packet:
    """The packet that began a connection; with `tcp_flags`, a later one of the same side."""
    ours = (plain(connection.local), connection.local_port)
    theirs = (plain(connection.remote), connection.remote_port)
    source, destination = (ours, theirs) if begun is Direction.EGRESS else (theirs, ours)
    return Packet(
        direction=begun,
        src=source[0],
        dst=destination[0],
        protocol=_TCP,
        sport=source[1],
        dport=destination[1],
        tcp_flags=tcp_flags,
        iface=device,
    )


def packets(
    connection: Connection, begun: Direction, device: str, flow: Flow | None, devices: Mapping[int, str]
) -> list[Packet]:
    """What a policy must accept, as new, for a connection to live: what began it, and what its flow is judged by."""
    found = [beginning(connection, begun, device)]
    if flow is not None:
        for direction, side in flow.sides.items():
            packet = original(flow, direction, devices.get(side.ifindex, ""))
            if packet not in found:
                found.append(packet)
    return found


def within(connection: Connection, networks: Sequence[Prefix]) -> bool:
    """Whether a connection's other end is in one of the networks; everywhere counts where none is given."""
    address = policy_fields.prefix(plain(connection.remote))
    return not networks or any(inside(address, one) for one in networks)


def names_peer(rule: Rule, direction: Direction) -> bool:
    """Whether a rule says by networks which peers it means, as packets of this direction have them."""
    if direction is Direction.INGRESS:
        prefixes, sets = rule.sources, rule.source_sets
    else:
        prefixes, sets = rule.destinations, rule.destination_sets
    return bool(prefixes or sets) and all(one.length for one in prefixes)


def flow_of(
    connection: Connection, entries: memoryview, now: int, rate: int, names: Mapping[int, str]
) -> Flow | None:
    """The connection's flow in a table, None where it has none."""
    ends = sorted(
        (_halves(_number(plain(address))), port)
        for address, port in (
            (connection.local, connection.local_port),
            (connection.remote, connection.remote_port),
        )
    )
    family = 6 if ":" in plain(connection.local) else 4
    (low, low_port), (high, high_port) = ends
    key = _KEY.pack(*low, *high, low_port, high_port, _TCP, family)
    return at_key(key, entries, now, rate, names)


def _number(address: str) -> int:
    if ":" in address:
        return int.from_bytes(socket.inet_pton(socket.AF_INET6, address))
    return int.from_bytes(_MAPPED + socket.inet_pton(socket.AF_INET, address))


def _halves(number: int) -> tuple[int, int]:
    return number >> 64, number & 0xFFFFFFFFFFFFFFFF


def device_of(connection: Connection) -> int:
    """The number of the device that a connection's packets leave by, 0 where there is none. Raises OSError."""
    return rtnl.device_to(plain(connection.remote), plain(connection.local))


def would_end(one: Connection, operator: bool, packet: Packet, verdict: Verdict) -> Refused:
    """What is said where a policy would end a connection by which the host is managed."""
    whose = (
        f"a session at port {one.local_port}" if operator else "this host's connection to the control plane"
    )
    why = f"rule {verdict.rule!r}" if verdict.rule else f"the {verdict.reason}"
    return Refused(
        Code.POLICY_TEST_FAILED,
        f"{whose} would end: {why} drops {packet.direction.name.lower()} {packet.src} port {packet.sport} → "
        f"{packet.dst} port {packet.dport} on {packet.iface or 'its device'}",
        "allow it by a rule; to end it, close it first, or drop its network by a rule that names it (from); "
        "management_from in host.toml says whose sessions count"
        if operator
        else "allow it by a rule",
    )
