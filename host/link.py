"""The host's connection to the bus, with nothing but its own subjects.

It reads by direct get (subject form) and its one subscription, writes its own `from` subjects, and has an inbox prefix of
its own. It connects in the background and for ever: nothing on the host waits for the broker to be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
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
from loopback.trust import natsjwt, tls
from loopback.trust.disconnect import disconnect

REQUEST_S: Final = 5.0  # one direct get or acknowledged report
CONNECT_S: Final = 3.0
ATTEMPT_S: Final = (
    15.0  # then a connection is made anew: after a failed TLS handshake the client library waits for ever
)
PING_S: Final = 5  # a silent broker is noticed after two of these
RECONNECT_S: Final = 0.5  # between attempts, with as much again of jitter: a fleet must not come back at once

#: Whoever the broker refuses is refused the next time, too, until somebody does something: the first wait, doubled with each
#: refusal up to the longest, of which a half is jitter. Nine thousand hosts then ask about 200 times a second together, each a
#: handshake and one signature to check; and one that is let in again is back within a minute of that.
REFUSED_FIRST_S: Final = 1.0
REFUSED_LONGEST_S: Final = 60.0
LOOK_S: Final = (
    1.0  # how often it is looked whether the credentials file is another meanwhile, which ends the wait
)

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
        *,
        key: SigningKey,
        jwt: Callable[[], str],
        told: Callable[[bytes], None],
        heard: Callable[[str, bytes], None] = lambda key, data: None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`jwt` is asked for the credentials of each connection, `told` gets what is said of this host's identity, `heard` each
        roster that `follow` asked for, by its key.

        `chance` is a number from 0 to 1, for jitter.
        """
        self.config = config
        self._joined = joined
        self._desired = desired
        self._key = key
        self._jwt = jwt
        self._told = told
        self._heard = heard
        self._keys: set[str] = set()
        self._chance = chance
        self._nc: Client | None = None
        self._ended = asyncio.Event()
        self._refused = False
        self._refusals = 0  # since the broker let this host in, or since it has other credentials

    @property
    def _subject(self) -> str:
        return subjects.desired(self.config.workspace, self.config.host)

    @property
    def _stream(self) -> str:
        return subjects.workspace_stream(self.config.workspace)

    @property
    def connected(self) -> bool:
        """Whether there is a connection right now."""
        return self._nc is not None and self._nc.is_connected

    async def run(self) -> None:
        """Connect and subscribe, for ever. The client keeps a connection up by itself; where the server ends one for good, as
        when credentials expire, there is another. After a refusal it waits longer and longer."""
        while True:
            self._ended.clear()
            self._refused = False
            try:
                await self._connect()
                self._refusals = 0
                await self._ended.wait()
            except (OSError, TimeoutError, Refused, nats.errors.Error) as error:
                log.info("no broker at %s: %s", self.config.url, error or type(error).__name__)
            if self._refused:
                self._ended.clear()
                with heeding_cancellation():
                    await self.close()  # the client would go on asking once a second
                await self._hold_off()
            else:
                await asyncio.sleep(RECONNECT_S * self._chance())

    async def _hold_off(self) -> None:
        """Wait after a refusal, or until there are other credentials."""
        self._refusals += 1
        seconds = hold_off(self._refusals, self._chance())
        log.warning("the broker does not let this host in; it is asked again in %.0f s", seconds)
        loop, before = asyncio.get_running_loop(), _mark(self.config)
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK_S)):
                    await self._ended.wait()
            if self._ended.is_set() or _mark(self.config) != before:
                self._refusals = 0
                return

    async def rejoin(self, config: HostConfig) -> None:
        """Connect anew, as `config` and the newest credentials say; nothing is lost but the time that takes."""
        self.config = config
        with heeding_cancellation():
            await self.close()
        self._ended.set()

    async def close(self) -> None:
        """Send what is still in the buffers, and disconnect."""
        nc, self._nc = self._nc, None
        if nc is not None:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await nc.flush()
            await disconnect(nc)

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
        return await direct_get(nc, self._stream_of(subject), subject)

    async def follow(self, key: str) -> None:
        """Hear of this roster from now on, over every connection."""
        if key not in self._keys:
            self._keys.add(key)
            if self._nc is not None:
                await self._listen(self._nc, key)

    async def _listen(self, nc: Client, key: str) -> None:
        async def heard(message: Msg) -> None:
            self._heard(key, message.data)

        with contextlib.suppress(nats.errors.Error):  # it is ending, and the next one listens too
            await nc.subscribe(subjects.rosters(self.config.workspace, key), cb=heard)

    async def own_desired(self) -> tuple[bytes, dict[str, str]] | None:
        """The host's own last desired state, or None where there is none. Raises Refused(BLOB_MISSING)."""
        return await self.get(self._subject)

    async def probe(
        self, seconds: float, config: HostConfig | None = None, jwt: Callable[[], str] | None = None
    ) -> bool:
        """Whether a new connection, made now, is answered within so many seconds with this host's own permissions.

        With `config` and `jwt`: as the host would be by these.
        """
        config = config or self.config
        subject = subjects.desired(config.workspace, config.host)
        try:
            async with asyncio.timeout(seconds):
                nc = Client()
                try:
                    with heeding_cancellation():
                        await nc.connect(
                            **self._options(config, jwt),
                            allow_reconnect=False,
                            connect_timeout=max(1, int(seconds)),
                            max_reconnect_attempts=0,
                        )
                    await direct_get(nc, subjects.workspace_stream(config.workspace), subject)
                finally:
                    await disconnect(nc)  # also one that was cut off while it was made: its socket would stay
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

        async def told(message: Msg) -> None:
            self._told(message.data)

        async def closed() -> None:
            if self._nc is nc:
                self._refused = is_refusal(nc.last_error)
                self._nc = None
                self._ended.set()

        async def noted(error: Exception) -> None:
            await _noted(error)
            if is_refusal(error):
                self._refused = True
                if self._nc is not nc:
                    raise error  # out of connect(), which would ask again by itself
                self._ended.set()

        async def lost() -> None:
            log.warning("the connection to the broker is lost; what is promoted goes on")

        lasting: dict[str, Any] = {
            "max_reconnect_attempts": -1,
            "connect_timeout": CONNECT_S,
            "reconnect_time_wait": RECONNECT_S * (1 + self._chance()),
            "ping_interval": PING_S,
            "max_outstanding_pings": 2,
            "reconnected_cb": joined,
            "disconnected_cb": lost,
            "closed_cb": closed,
            "error_cb": noted,
        }
        nc = Client()
        try:
            async with asyncio.timeout(ATTEMPT_S):
                with heeding_cancellation():
                    await nc.connect(**self._options(self.config) | lasting)
            for what, callback in (("desired", arrived), ("identity", told)):
                subject = subjects.to_host(self.config.workspace, self.config.host, what)
                await nc.subscribe(subject, cb=callback)
            listening: set[str] = set()
            while more := self._keys - listening:  # `follow` may name others meanwhile
                for key in more:
                    await self._listen(nc, key)
                listening |= more
        except BaseException:
            await disconnect(nc)  # also one that was cut off while it was made: its socket would stay
            raise
        self._nc = nc
        self._joined()

    def _options(self, config: HostConfig, jwt: Callable[[], str] | None = None) -> dict[str, Any]:
        return {
            "servers": [self.config.url],
            **natsjwt.sign_in(jwt or self._jwt, self._key),
            "inbox_prefix": subjects.inbox(config.host).encode(),
            "name": f"host {config.host}",
            "error_cb": _noted,
            **tls.options(self.config.url, self.config.ca),
        }

    def _stream_of(self, subject: str) -> str:
        if subject.startswith("lb.blob."):
            return subjects.STREAM_BLOBS
        if subject.startswith("lb.tuf."):
            return subjects.STREAM_TUF
        rosters = subjects.parse(subject).area in ("roster", "slice")
        return subjects.STREAM_ROSTERS if rosters else self._stream


def hold_off(refusals: int, chance: float) -> float:
    """Seconds to wait after so many refusals in a row; `chance` from 0 to 1 is the jitter.

    Exponential with equal jitter: whoever was refused together does not come back together.
    """
    longest: float = min(REFUSED_LONGEST_S, REFUSED_FIRST_S * 2 ** min(refusals - 1, 16))
    return longest * (1 + chance) / 2


def is_refusal(error: Exception | None) -> bool:
    """Whether the broker does not want this host, as opposed to not being there."""
    words = str(error or "").lower()
    return any(said in words for said in ("authorization", "authentication"))


def _mark(config: HostConfig) -> tuple[int, ...]:
    """Another one where the credentials file is."""
    try:
        found = config.creds.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size)


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


def _taken(answer: bytes) -> bool:
    """Whether an acknowledgement says so. Raises Refused(ENVELOPE_TOO_LARGE) where it says never."""
    try:
        error = msgspec.json.decode(answer, type=_Ack).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    if error is not None and error.err_code == _TOO_LARGE:
        raise Refused(Code.ENVELOPE_TOO_LARGE, f"the broker does not take it: {error.description}")
    return error is None


async def direct_get(nc: Client, stream: str, subject: str) -> tuple[bytes, dict[str, str]] | None:
    """The last stored message of a subject, or None. Raises Refused(BLOB_MISSING) while it is out of reach."""
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
