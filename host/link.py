"""The host's connection to the bus, with nothing but its own subjects.

It reads by direct get (subject form) and its one subscription, writes its own `from` subjects, and has an inbox prefix of
its own. It connects in the background and for ever: nothing on the host waits for the broker to be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.host.config import HostConfig

REQUEST_S: Final = 5.0  # one direct get or acknowledged report
CONNECT_S: Final = 3.0
PING_S: Final = 5  # a silent broker is noticed after two of these
RECONNECT_S: Final = 0.5  # between attempts, with as much again of jitter: a fleet must not come back at once

_TOO_LARGE: Final = 10054  # JetStream: message size exceeds maximum allowed

log = logging.getLogger("loopback.host")


class _Problem(msgspec.Struct, frozen=True):
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct, frozen=True):
    error: _Problem | None = None


class Link:
    """One connection. `joined` is called after every (re)connection, `desired` with each desired state's bytes."""

    def __init__(
        self,
        config: HostConfig,
        joined: Callable[[], None],
        desired: Callable[[bytes, dict[str, str]], Awaitable[None]],
    ) -> None:
        self.config = config
        self._joined = joined
        self._desired = desired
        self._nc: Client | None = None
        self._subject = subjects.desired(config.workspace, config.host)
        self._stream = subjects.workspace_stream(config.workspace)

    @property
    def connected(self) -> bool:
        """Whether there is a connection right now."""
        return self._nc is not None and self._nc.is_connected

    async def run(self) -> None:
        """Connect and subscribe, trying for ever; the client then keeps the connection up until `close`."""
        while self._nc is None:
            try:
                await self._connect()
            except (OSError, TimeoutError, nats.errors.Error) as error:
                log.info("no broker at %s: %s", self.config.url, error or type(error).__name__)
                await asyncio.sleep(RECONNECT_S * (1 + random.random()))  # noqa: S311  jitter, not a secret

    async def close(self) -> None:
        """Send what is still in the buffers, and disconnect."""
        nc, self._nc = self._nc, None
        if nc is not None:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await nc.flush()
            with contextlib.suppress(nats.errors.Error, OSError):
                await nc.close()

    async def publish(self, what: str, data: bytes, headers: dict[str, str], *, acknowledged: bool) -> bool:
        """Write to an own `from` subject; whether it was taken (unacknowledged: whether it could be sent).

        Raises Refused(ENVELOPE_TOO_LARGE) for what the broker will never take.
        """
        nc = self._nc
        if nc is None or not nc.is_connected:
            return False
        subject = subjects.from_host(self.config.workspace, self.config.host, what)
        try:
            if not acknowledged:
                await nc.publish(subject, data, headers=headers)
                return True
            with heeding_cancellation():
                answer = await nc.request(subject, data, timeout=REQUEST_S, headers=headers)
        except nats.errors.MaxPayloadError:
            raise Refused(
                Code.ENVELOPE_TOO_LARGE, f"{len(data)} bytes are more than the broker takes"
            ) from None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.info("%s was not taken: %s", what, error or type(error).__name__)
            return False
        return _taken(answer.data)

    async def get(self, subject: str) -> tuple[bytes, dict[str, str]] | None:
        """The last stored message of a subject, or None. Raises Refused(BLOB_MISSING) while the broker is out of reach."""
        nc = self._nc
        if nc is None or not nc.is_connected:
            raise _unreachable("there is no connection to the broker")
        return await _direct_get(nc, self._stream_of(subject), subject)

    async def own_desired(self) -> tuple[bytes, dict[str, str]] | None:
        """The host's own last desired state, or None where there is none. Raises Refused(BLOB_MISSING)."""
        return await self.get(self._subject)

    async def probe(self, seconds: float) -> bool:
        """Whether a new connection, made now, is answered within so many seconds with this host's own permissions."""
        try:
            async with asyncio.timeout(seconds):
                nc = Client()
                try:
                    with heeding_cancellation():
                        await nc.connect(
                            **self._options(),
                            allow_reconnect=False,
                            connect_timeout=max(1, int(seconds)),
                            max_reconnect_attempts=0,
                        )
                    await _direct_get(nc, self._stream, self._subject)
                finally:
                    await _discard(nc)
        except (OSError, TimeoutError, Refused, nats.errors.Error) as error:
            log.info(
                "a new connection to the control plane was not answered: %s", error or type(error).__name__
            )
            return False
        return True

    async def _connect(self) -> None:
        async def joined() -> None:
            self._joined()

        async def arrived(message: Msg) -> None:
            await self._desired(message.data, dict(message.headers or {}))

        async def lost() -> None:
            log.warning("the connection to the broker is lost; what is promoted goes on")

        lasting: dict[str, Any] = {
            "max_reconnect_attempts": -1,
            "connect_timeout": CONNECT_S,
            "reconnect_time_wait": RECONNECT_S * (1 + random.random()),  # noqa: S311  jitter, not a secret
            "ping_interval": PING_S,
            "max_outstanding_pings": 2,
            "reconnected_cb": joined,
            "disconnected_cb": lost,
        }
        nc = Client()
        try:
            with heeding_cancellation():
                await nc.connect(**self._options(), **lasting)
            subject = subjects.to_host(self.config.workspace, self.config.host, "desired")
            await nc.subscribe(subject, cb=arrived)
        except BaseException:
            await _discard(nc)
            raise
        self._nc = nc
        self._joined()

    def _options(self) -> dict[str, Any]:
        tls = ssl.create_default_context(cafile=str(self.config.ca)) if self.config.ca else None
        return {
            "servers": [self.config.url],
            "user_credentials": str(self.config.creds),
            "inbox_prefix": subjects.inbox(self.config.host).encode(),
            "name": f"host {self.config.host}",
            "error_cb": _noted,
            **({"tls": tls} if tls else {}),
        }

    def _stream_of(self, subject: str) -> str:
        if subject.startswith("lb.blob."):
            return subjects.STREAM_BLOBS
        return subjects.STREAM_TUF if subject.startswith("lb.tuf.") else self._stream


def signing_key(config: HostConfig) -> SigningKey:
    """The host's key, from its credentials: its identity on the bus signs its reports.

    Raises Refused(CONFIG_INVALID) naming the file.
    """
    try:
        lines = config.creds.read_text().splitlines()
        seed = lines[next(i for i, line in enumerate(lines) if "BEGIN USER NKEY SEED" in line) + 1].strip()
        return SigningKey.from_nkey(seed)
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            Code.CONFIG_INVALID,
            f"the credentials {config.creds} cannot be read: {error}",
            "see creds in host.toml",
        ) from None
    except (StopIteration, IndexError, ValueError):
        raise Refused(
            Code.CONFIG_INVALID, f"{config.creds} holds no user key", "make them with 'loopback host add'"
        ) from None


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Being cancelled just as the answer comes is being cancelled.

    The client library waits with asyncio.wait_for, which in Python 3.11 returns the answer then and forgets the
    cancellation; an agent that was told to stop, or a trial's time that was over, went on.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


async def _discard(nc: Client) -> None:
    """Close a connection, also one that was cut off while it was made: its socket would stay."""
    # AssertionError: the client's way of saying that it did not even begin to connect.
    with contextlib.suppress(nats.errors.Error, OSError, AssertionError):
        await nc.close()


def _taken(answer: bytes) -> bool:
    """Whether an acknowledgement says so. Raises Refused(ENVELOPE_TOO_LARGE) where it says never."""
    try:
        error = msgspec.json.decode(answer, type=_Ack).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    if error is not None and error.err_code == _TOO_LARGE:
        raise Refused(Code.ENVELOPE_TOO_LARGE, f"the broker does not take it: {error.description}")
    return error is None


async def _direct_get(nc: Client, stream: str, subject: str) -> tuple[bytes, dict[str, str]] | None:
    try:
        with heeding_cancellation():
            message = await nc.request(subjects.direct_get(stream, subject), b"", timeout=REQUEST_S)
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise _unreachable(f"{subject} could not be read: {error or type(error).__name__}") from None
    headers = dict(message.headers or {})
    status = headers.get("Status", "")
    if status == "404":
        return None
    if status:
        raise _unreachable(f"{subject} could not be read: {headers.get('Description', status)}")
    if headers.get("Nats-Subject") != subject:
        # The broker does not check reply subjects, so somebody else's answer may have landed here.
        raise _unreachable(f"the answer for {subject} was another subject's")
    return message.data, headers


async def _noted(error: Exception) -> None:
    log.info("bus: %s", error or type(error).__name__)


def _unreachable(reason: str) -> Refused:
    return Refused(Code.BLOB_MISSING, reason, "check the broker and the network; it is tried again")
