"""How a host gets its identity on the bus, and new credentials for it: what it asks, and what eligibility answers.

A host asks for its first credentials with a claim to an invitation (`hostrecord`), on the one subject that the invitation's
token opens; later with a signed `Renew` on its own `from` subject. Both are answered with `Granted`: on the inbox of whoever
enrols, and on `to_host(…, "identity")`, where a host is told of a move as well. Nothing in an answer is secret: a JWT is worth
nothing without the key that it names, and that never leaves the host.
"""

from __future__ import annotations

from typing import Final

import msgspec

from loopback.contracts.codes import Refusal
from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.envelope import Envelope

MAX_ENROL: Final = 16 * 1024  # bytes of a request; a claim has well below 2 KiB
MAX_RENEW: Final = 4 * 1024


class Enrol(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="enrol", omit_defaults=True):
    """Whoever holds an invitation's token: let this key be that host. `root`: which version of the TUF root goes with it."""

    claim: Envelope
    root: int = 1


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="renew"):
    """A host asks for new credentials for its key. Envelope type `envelope.RENEW`, signed with that key."""

    host: str
    workspace: str
    at: Time


class Granted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="granted", omit_defaults=True):
    """The answer: `jwt` for the host's own key, or `refusal`.

    `root` is the TUF root that was asked for. `move` is the operator-signed HostMove by which the host belongs to another
    workspace now; `jwt` is for that one then.
    """

    at: Time
    jwt: str = ""
    refusal: Refusal | None = None
    root: str = ""
    move: Envelope | None = None


_ENROL: Final[Decoder[Enrol]] = Decoder(msgspec.json.Decoder(Enrol))
_RENEW: Final[Decoder[Renew]] = Decoder(msgspec.json.Decoder(Renew))
_GRANTED: Final[Decoder[Granted]] = Decoder(msgspec.json.Decoder(Granted))


def decode_enrol(data: bytes) -> Enrol:
    """Decode a request. Raises msgspec.MsgspecError."""
    return _ENROL.decode(data)


def decode_renew(data: bytes) -> Renew:
    """Decode a signed request's payload. Raises msgspec.MsgspecError."""
    return _RENEW.decode(data)


def decode_granted(data: bytes) -> Granted:
    """Decode an answer. Raises msgspec.MsgspecError."""
    return _GRANTED.decode(data)
