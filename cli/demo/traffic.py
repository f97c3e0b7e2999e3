"""The process that sends and receives real packets in a namespace; the demo talks to it in JSON lines.

    python -m loopback.cli.demo.traffic serve TCP,TCP,… UDP,UDP,…     echo servers; {"do": "counts"} tells what arrived
    python -m loopback.cli.demo.traffic client                        {"do": "probe", …}, {"do": "flood", …}, {"do": "stop"}

A probe is one TCP connection or UDP exchange with an echo; `ok` means that the echo came back.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections import Counter
from typing import Any, cast

ECHO = b"loopback-demo-probe"
FLOOD_BURST = 64  # packets between two looks at the clock and the stop flag


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, port: int, arrived: Counter[str]) -> None:
        self.port = port
        self.arrived = arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own datagram transports are no subclasses of DatagramTransport on every supported Python.
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.arrived[f"udp/{self.port}"] += 1
        self.transport.sendto(data, addr)


async def serve(tcp: list[int], udp: list[int]) -> None:
    """Echo on every port, over IPv4 and IPv6, until standard input closes."""
    arrived: Counter[str] = Counter()

    def on_tcp(port: int) -> Any:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            arrived[f"tcp/{port}"] += 1
            try:
                while data := await reader.read(4096):
                    writer.write(data)
                    await writer.drain()
            except ConnectionError:
                pass  # the peer went away, which is its right
            finally:
                writer.close()

        return echo

    servers = [await asyncio.start_server(on_tcp(port), ["0.0.0.0", "::"], port) for port in tcp]  # noqa: S104  in a namespace
    loop = asyncio.get_running_loop()
    for port in udp:
        for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104  in a namespace
            sock = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            sock.bind((any_address, port))
            await loop.create_datagram_endpoint(lambda port=port: _Udp(port, arrived), sock=sock)  # type: ignore[misc]
    _say({"ready": True})
    reader = await _lines()
    while await reader.readline():
        _say(dict(arrived))
    for server in servers:
        server.close()


async def _probe(order: dict[str, Any]) -> bool:
    target, port, wait = order["to"], order["port"], order.get("timeout", 1.0)
    source = (order["from"], 0) if order.get("from") else None
    try:
        async with asyncio.timeout(wait):
            if order["proto"] == "tcp":
                reader, writer = await asyncio.open_connection(target, port, local_addr=source)
                try:
                    writer.write(ECHO)
                    return await reader.readexactly(len(ECHO)) == ECHO
                finally:
                    writer.close()
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[bytes] = loop.create_future()

            class Exchange(asyncio.DatagramProtocol):
                def datagram_received(self, data: bytes, addr: Any) -> None:
                    if not answer.done():
                        answer.set_result(data)

            transport, _ = await loop.create_datagram_endpoint(
                Exchange, local_addr=source, remote_addr=(target, port)
            )
            try:
                transport.sendto(ECHO)
                return await answer == ECHO
            finally:
                transport.close()
    except (TimeoutError, OSError, asyncio.IncompleteReadError):
        return False


class _Flood:
    """UDP packets as fast as one thread sends them, from one address to several."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.sent: Counter[str] = Counter()
        self.stopping = threading.Event()
        self.targets = [(to, order["port"]) for to in order["to"]]
        family = socket.AF_INET6 if ":" in order["to"][0] else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.bind((order["from"], order.get("sport", 0)))
        self.pause = order.get("pause_s", 0.0)
        self.until = time.monotonic() + order.get("max_s", 60.0)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.stopping.is_set() and time.monotonic() < self.until:
            for target in self.targets:
                for _ in range(FLOOD_BURST):
                    try:
                        self.sock.sendto(ECHO, target)
                    except OSError:
                        continue  # a full queue: it was not sent, so it is not counted
                    self.sent[target[0]] += 1
            if self.pause:
                self.stopping.wait(self.pause)

    def stop(self) -> dict[str, int]:
        self.stopping.set()
        self.thread.join()
        self.sock.close()
        return dict(self.sent)


async def client() -> None:
    """Carry out orders until standard input closes. Probes in one order run side by side."""
    reader = await _lines()
    flood: _Flood | None = None
    _say({"ready": True})
    while line := await reader.readline():
        order = json.loads(line)
        match order["do"]:
            case "probe":
                _say({"ok": await asyncio.gather(*(_probe(one) for one in order["probes"]))})
            case "flood":
                flood = _Flood(order)
                _say({"flooding": True})
            case "sent":
                _say(dict(flood.sent) if flood else {})
            case "stop":
                sent = await asyncio.to_thread(flood.stop) if flood else {}
                flood = None
                _say(sent)
            case other:
                _say({"error": f"unknown order {other!r}"})
    if flood:
        flood.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve([int(p) for p in sys.argv[2].split(",")], [int(p) for p in sys.argv[3].split(",")]))
    elif sys.argv[1:2] == ["client"]:
        asyncio.run(client())
    else:
        sys.exit("usage: python -m loopback.cli.demo.traffic serve TCP,… UDP,… | client")
