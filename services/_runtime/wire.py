"""What travels between the bus and its callers, and the broker's words for what went wrong."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from nats.aio.msg import Msg

API_LEVEL: Final = 5  # of NATS Server 2.15; an older server silently ignores what it does not know
MAX_BATCH: Final = 1000  # messages in one atomic batch, the server's own limit

# Error codes of the JetStream API (server/errors.json of nats-server).
WRONG_LAST_SEQUENCE: Final = 10071
SUBJECT_FULL: Final = 10077
DUPLICATE_IN_BATCH: Final = 10201
BATCH_INCOMPLETE: Final = 10176
NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
STREAM_NAME_TAKEN: Final = 10058  # with another configuration; the same again is no error
STREAM_OVERLAP: Final = 10065
REPLICAS_UNSUPPORTED: Final = 10074  # more than one, on a server without a cluster
NO_PEERS: Final = 10005  # fewer servers in the cluster than replicas


class Outgoing(msgspec.Struct, frozen=True):
    """A message to be stored. `expected_subject_seq`: the sequence that must be the subject's last (0: there is none yet)."""

    subject: str
    data: bytes
    headers: dict[str, str] = {}
    expected_subject_seq: int | None = None


class Stored(msgspec.Struct, frozen=True):
    """A message as the broker stored it. `time` is the broker's, in UTC; `delivered` counts deliveries, from 1."""

    subject: str
    data: bytes
    headers: dict[str, str]
    sequence: int
    time: datetime
    stream: str
    delivered: int = 1


class Conflict(Exception):
    """A compare-and-set was lost, or the message id is taken: nothing was stored. Read again and decide again."""


class Unavailable(Exception):
    """The broker did not confirm in time. What was sent may or may not be stored; sending it again is harmless."""


class TooLarge(Unavailable):
    """A message is over what the broker takes. Sending it again is of no use, so it is not tried."""


class Forbidden(Exception):
    """The broker refuses this subject to these credentials."""


class StreamReplaced(Exception):
    """A stream is not the one that was folded: wiped or restored from an older backup. What was folded is void."""


class ApiError(Exception):
    """The JetStream API's own refusal. `code` is its fine error code, `status` the HTTP-like one."""

    def __init__(self, status: int, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.status = status
        self.code = code
        self.description = description


class Ack(msgspec.Struct, frozen=True):
    """The broker's answer to a publish."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: dict[str, Any] | None = None


_ACK: Final = msgspec.json.Decoder(Ack)


def read_ack(data: bytes) -> Ack:
    """Decode an acknowledgement. Raises Conflict, ApiError."""
    ack = _ACK.decode(data)
    if ack.error is None:
        return ack
    error = api_error(ack.error)
    if error.code in (WRONG_LAST_SEQUENCE, SUBJECT_FULL, DUPLICATE_IN_BATCH):
        raise Conflict(str(error), ack.stream)
    raise error


def api_error(found: Mapping[str, Any]) -> ApiError:
    """The exception for an API answer's `error`."""
    return ApiError(
        int(found.get("code", 0)), int(found.get("err_code", 0)), str(found.get("description", ""))
    )


def from_delivery(message: Msg) -> Stored:
    """A message that a consumer delivered."""
    metadata = message.metadata
    return Stored(
        message.subject,
        message.data,
        dict(message.headers or {}),
        metadata.sequence.stream,
        metadata.timestamp,
        metadata.stream,
        metadata.num_delivered,
    )


def from_store(stream: str, found: Mapping[str, Any]) -> Stored:
    """A message as STREAM.MSG.GET returns it."""
    return Stored(
        found["subject"],
        base64.b64decode(found.get("data", "")),
        read_headers(base64.b64decode(found.get("hdrs", ""))),
        found["seq"],
        datetime.fromisoformat(found["time"]).astimezone(UTC),
        stream,
    )


def read_headers(raw: bytes) -> dict[str, str]:
    """NATS's header block as a mapping; of repeated names the last counts.

    Any publisher chooses these bytes, and the broker keeps what is not UTF-8: it is replaced, as the client library does.
    """
    found = {}
    for line in raw.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            found[name] = value.strip()
    return found
