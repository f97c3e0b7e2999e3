"""The TUF client against HTTP servers that drip, lie, send people elsewhere or never end: every answer is bounded."""

from __future__ import annotations

import gzip
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support_simulator import Made, Simulator
from support_trust import NOW, MemoryRepository

from loopback.contracts.codes import Code, Refused
from loopback.trust import http
from loopback.trust.repository import TrustedRepository

Behave = Callable[[str, Callable[[bytes], None]], None]


@contextmanager
def behaving(behave: Behave) -> Iterator[str]:
    """A server that answers as it is told: `behave(path, send)`; its address. Sending to who left ends the answer."""
    stop = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            path = self.rfile.readline().split()[1].decode()
            while self.rfile.readline().strip():
                pass

            def send(data: bytes) -> None:
                if stop.is_set():
                    raise ConnectionError
                self.wfile.write(data)

            with suppress(ConnectionError):
                behave(path, send)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            stop.set()
            server.shutdown()
            thread.join()


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def read(base: str, path: str = "file", answer_s: float = 5.0) -> bytes | None:
    """All of an answer."""
    found = http.fetcher(base, answer_s=answer_s)(path)
    return None if found is None else b"".join(found)


def test_a_whole_answer_is_read_and_absence_is_none() -> None:
    def behave(path: str, send: Callable[[bytes], None]) -> None:
        send(
            ok(b"x" * 200_000) if path == "/file" else b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        )

    with behaving(behave) as base:
        assert read(base) == b"x" * 200_000
        assert read(base, "other") is None


@pytest.mark.parametrize("where", ["status", "headers", "body", "chunked"])
def test_a_drip_ends_at_the_deadline_however_steady_it_is(where: str) -> None:
    """A byte every few milliseconds satisfies each timeout of the usual kind for ever."""
    starts = {
        "status": b"HTTP/1.1 200 ",
        "headers": b"HTTP/1.1 200 OK\r\nX-Long: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    }

    def behave(_: str, send: Callable[[bytes], None]) -> None:
        send(starts[where])
        while True:
            send(b"1\r\nx\r\n" if where == "chunked" else b"x")
            time.sleep(0.01)

    with behaving(behave) as base, pytest.raises(TimeoutError, match="did not answer in time"):
        read(base, answer_s=0.3)  # and else it would go on for hours


def test_silence_ends_at_the_deadline_too() -> None:
    ended = threading.Event()
    with behaving(lambda _path, _send: bool(ended.wait(60)) or None) as base:
        with pytest.raises(TimeoutError):
            read(base, answer_s=0.2)
        ended.set()


def test_an_endless_file_is_read_no_further_than_it_may_be_long(tmp_path: Path) -> None:
    repository = MemoryRepository()
    sent = 0

    def behave(path: str, send: Callable[[bytes], None]) -> None:
        nonlocal sent
        if path != "/timestamp.json":
            send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            send(b" " * 65536)
            sent += 65536

    TrustedRepository.pin(tmp_path / "tuf", repository.pinned)
    with behaving(behave) as base:
        client = TrustedRepository(tmp_path / "tuf", http.fetcher(base), now=lambda: NOW)
        with pytest.raises(Refused, match="more than the 16384 bytes") as caught:
            client.refresh()
        assert caught.value.code == Code.TUF_INVALID
    assert sent < 64 * 1024 * 1024, "what the sockets' buffers hold, and no more"


@pytest.mark.parametrize(
    "target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "gopher://127.0.0.1/", "javascript:alert(1)"]
)
def test_a_redirection_to_another_scheme_is_not_followed(target: str) -> None:
    def behave(_: str, send: Callable[[bytes], None]) -> None:
        send(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())

    with behaving(behave) as base, pytest.raises(ConnectionError, match="redirects to another scheme"):
        read(base)


def test_a_redirection_on_the_same_scheme_is_followed_but_not_in_circles() -> None:
    asked: list[str] = []

    def behave(path: str, send: Callable[[bytes], None]) -> None:
        asked.append(path)
        if path == "/there":
            send(ok(b"content"))
        else:
            to = "/there" if path == "/file" else "/circle"
            send(f"HTTP/1.1 301 Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())

    with behaving(behave) as base:
        assert read(base) == b"content"
        asked.clear()
        with pytest.raises(ConnectionError, match="more than 3 times"):
            read(base, "circle")
        assert len(asked) == 4


def test_the_deadline_counts_all_redirections_together() -> None:
    def behave(path: str, send: Callable[[bytes], None]) -> None:
        time.sleep(0.15)
        send(f"HTTP/1.1 302 Found\r\nLocation: {path}x\r\nContent-Length: 0\r\n\r\n".encode())

    with behaving(behave) as base, pytest.raises(TimeoutError):
        read(base, answer_s=0.25)


@pytest.mark.parametrize(
    "status", ["500 Oops", "503 Busy", "204 No Content", "206 Partial", "401 Who", "999 What"]
)
def test_another_status_is_out_of_reach_and_not_absence(status: str) -> None:
    with (
        behaving(
            lambda _path, send: send(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        ) as base,
        pytest.raises(ConnectionError, match=f"HTTP status {status[:3]}"),
    ):
        read(base)


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0\0\0", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", b"X" * 100_000],
)
def test_what_is_no_http_is_out_of_reach(tmp_path: Path, answer: bytes) -> None:
    TrustedRepository.pin(tmp_path / "tuf", MemoryRepository().pinned)
    with behaving(lambda _path, send: send(answer)) as base:
        client = TrustedRepository(tmp_path / "tuf", http.fetcher(base), now=lambda: NOW)
        with pytest.raises(Refused) as caught:
            client.refresh()
        assert caught.value.code == Code.TUF_UNREACHABLE


def test_compression_is_neither_asked_for_nor_undone() -> None:
    """A few bytes would become gigabytes."""
    bomb = gzip.compress(b"\0" * 10_000_000)
    with behaving(lambda _path, send: send(ok(bomb, "Content-Encoding: gzip"))) as base:
        assert read(base) == bomb


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/passwd",
        "ftp://host/",
        "http://",
        "http://user:secret@host/",
        "http://host:x/",
        "host",
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(Refused) as caught:
        http.fetcher(url)
    assert caught.value.code == Code.NAME_INVALID


def test_the_command_explains_a_server_that_does_not_answer(
    made: Made, repo: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    client = made(repo)
    assert client.init(repo.last("root")) == 0
    client._url = "http://127.0.0.1:1"
    assert client.refresh() == 1
    said = capsys.readouterr()
    assert "[tuf.unreachable]" in said.err and "Connection refused" in said.err
    assert said.out == ""
