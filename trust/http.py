"""A repository over HTTP: `fetcher(base)` is a `Fetch` for metadata or content below an address.

Nothing is believed, so little is needed, but what there is must end: a whole answer has one deadline, which also a server that
drips bytes or headers meets (the timeouts of the usual libraries begin anew with each byte), and it is read in pieces, so
that whoever asked stops at the length that was signed. No cookies, no compression, no credentials; redirections are
followed a few times, and never to another scheme, unless to https.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Final
from urllib import parse

import loopback
from loopback.contracts.codes import Code, Refused
from loopback.trust.updater import Fetch

ANSWER_S: Final = 30.0  # one answer, from connecting to its last byte
REDIRECTIONS: Final = 3
PIECE: Final = 64 * 1024  # bytes read at a time

_ABSENT: Final = frozenset({403, 404})  # object stores answer 403 for what is not there
_MOVED: Final = frozenset({301, 302, 303, 307, 308})
_SAFE: Final = (
    "/%!$&'()*+,;=:@~"  # stays in a path as it is (RFC 3986); names in metadata are encoded already
)


def fetcher(base: str, *, answer_s: float = ANSWER_S, tls: ssl.SSLContext | None = None) -> Fetch:
    """What lies below this http or https address, by its relative path. Raises Refused(NAME_INVALID) for another.

    The Fetch returns None for what is not there; it raises ConnectionError, TimeoutError or http.client.HTTPException.
    """
    _taken_apart(base)
    base = base if base.endswith("/") else base + "/"

    def fetch(path: str) -> Iterator[bytes] | None:
        return _get(base + parse.quote(path, safe=_SAFE), time.monotonic() + answer_s, tls)

    return fetch


def _get(url: str, until: float, tls: ssl.SSLContext | None) -> Iterator[bytes] | None:
    """The pieces of an answer, or None where there is none."""
    for _ in range(REDIRECTIONS + 1):
        answer = _Answer(url, until, tls)
        try:
            status = answer.begin()
            if status == http.client.OK:
                return answer
            location = answer.location() if status in _MOVED else None
        except BaseException:
            answer.close()
            raise
        answer.close()
        if status in _ABSENT:
            return None
        if location is None:
            raise ConnectionError(f"{url} answers with HTTP status {status}")
        url = _followed(url, location)
    raise ConnectionError(f"{url} redirects more than {REDIRECTIONS} times")


class _Answer(Iterator[bytes]):
    """One request and its answer, on a connection of its own that is cut when the time is over."""

    def __init__(self, url: str, until: float, tls: ssl.SSLContext | None) -> None:
        place = _taken_apart(url)
        self._url = url
        self._target = (place.path or "/") + (f"?{place.query}" if place.query else "")
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{url} did not answer in time")
        host = str(place.hostname)
        if place.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, place.port, timeout=left, context=tls or ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(host, place.port, timeout=left)
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        self._late = False
        self._timer = threading.Timer(left, self._cut)
        self._timer.daemon = True

    def begin(self) -> int:
        """Connect, ask and read the headers; the status."""
        self._timer.start()
        with self._in_time():
            headers = {"User-Agent": f"loopback/{loopback.__version__}", "Accept-Encoding": "identity"}
            self._connection.connect()
            self._socket = self._connection.sock  # the connection forgets it where the server will close it
            self._connection.request("GET", self._target, headers=headers)
            self._response = self._connection.getresponse()
            return self._response.status

    def location(self) -> str | None:
        """Where a redirection leads."""
        return self._response.getheader("Location") if self._response else None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """The next piece of the body, as it arrives; the connection ends with the last one."""
        try:
            with self._in_time():
                piece = self._response.read1(PIECE) if self._response else b""
        except BaseException:
            self.close()
            raise
        if not piece:
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """End the connection, also before the body's end."""
        self._timer.cancel()
        if self._response is not None:
            self._response.close()
            self._response = None
        self._connection.close()

    def _cut(self) -> None:
        self._late = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """What a cut connection looks like is a timeout, also where it looks like the end."""
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError):
            if not self._late:
                raise
        if self._late:
            raise TimeoutError(f"{self._url} did not answer in time")


def _followed(url: str, location: str) -> str:
    """Where a redirection leads. Raises ConnectionError where it may not."""
    target = parse.urljoin(url, location)
    before, after = parse.urlsplit(url).scheme, parse.urlsplit(target).scheme
    if after not in (before, "https"):
        raise ConnectionError(f"{url} redirects to another scheme: {target[:200]}")
    return target


def _taken_apart(url: str) -> parse.SplitResult:
    try:
        place = parse.urlsplit(url)
        place.port  # noqa: B018  raises where it is none
    except ValueError as error:
        raise Refused(Code.NAME_INVALID, f"{url[:200]!r} is no address: {error}") from None
    if place.scheme not in ("http", "https") or not place.hostname or place.username is not None:
        raise Refused(
            Code.NAME_INVALID,
            f"{url[:200]!r} is no http or https address without credentials",
            "write it as https://HOST/PATH/",
        )
    return place
