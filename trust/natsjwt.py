"""Identities on the bus as bytes: nkeys, the JWTs that vouch for them, and credentials files. Pure; times are passed in.

An nkey is an Ed25519 key in base32 with a kind before it and a checksum behind it (CRC-16/XMODEM, little-endian), as
nats-io/nkeys defines it. JWTs are version 2 with `alg: ed25519-nkey`, as the server's own tools make them. A JWT is worth
nothing without the key that it names: the server has it sign a nonce.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey, SigningKey

Kind = Literal["operator", "account", "user"]

UNLIMITED: Final = {"subs": -1, "data": -1, "payload": -1}
MAX_JWT: Final = 3072  # characters of a user's JWT; the server takes 4 KiB in the one line that holds it

_SEED: Final = 18 << 3
_PREFIX: Final[dict[Kind, int]] = {"operator": 14 << 3, "account": 0, "user": 20 << 3}
_BLOCK: Final = re.compile(r"-----BEGIN (?P<kind>[A-Z ]+)-----\s+(?P<body>\S+)\s+-+END [A-Z ]+-+")


#: Seconds since 1970 that are a time on the calendar: anybody may write any number.
Seconds = Annotated[int, msgspec.Meta(ge=0, le=253402300799)]


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """What a user's JWT says: whose key it is about, and what the server lets that key do. Times are seconds since 1970."""

    sub: str
    name: str
    iss: str
    iat: Seconds
    exp: Seconds = 0
    nats: dict[str, Any] = {}

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags, such as `ws:prod`."""
        found = self.nats.get("tags", [])
        return tuple(str(tag) for tag in found) if isinstance(found, list) else ()

    @property
    def issued_at(self) -> datetime:
        """When it was made."""
        return datetime.fromtimestamp(self.iat, UTC)

    @property
    def expires_at(self) -> datetime | None:
        """When the server stops taking it; None: never."""
        return datetime.fromtimestamp(self.exp, UTC) if self.exp else None


def seed(kind: Kind, key: SigningKey) -> str:
    """A key's secret half as an nkey seed (`SU…`)."""
    prefix = _PREFIX[kind]
    return _checked(bytes([_SEED | prefix >> 5, (prefix & 31) << 3]) + key.raw)


def public(kind: Kind, key: PublicKey) -> str:
    """A public key as an nkey (`U…`)."""
    return _checked(bytes([_PREFIX[kind]]) + key.raw)


def parse_public(kind: Kind, text: str) -> PublicKey:
    """The public key behind an nkey. Raises Refused(SIGNATURE_INVALID)."""
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 35 or raw[0] != _PREFIX[kind] or _checked(raw[:33]) != text:
        raise Refused(Code.SIGNATURE_INVALID, f"{text[:60]!r} is no nkey of {kind} kind")
    return PublicKey(raw[1:33])


def _checked(data: bytes) -> str:
    return base64.b32encode(data + binascii.crc_hqx(data, 0).to_bytes(2, "little")).rstrip(b"=").decode()


def encode(
    name: str, subject: str, issuer_kind: Kind, issuer: SigningKey, claims: Mapping[str, Any],
    at: datetime, until: datetime | None = None,
) -> str:  # fmt: skip
    """A JWT about `subject` (an nkey), signed by `issuer`; `claims` is its `nats` part."""
    body: dict[str, Any] = {
        "iat": int(at.timestamp()),
        "iss": public(issuer_kind, issuer.public),
        "name": name,
        "sub": subject,
        "nats": {"version": 2, **claims},
    }
    if until is not None:
        body["exp"] = int(until.timestamp())
    digest = hashlib.sha256(msgspec.json.encode(body)).digest()
    body["jti"] = base64.b32encode(digest).rstrip(b"=").decode()
    signed = f"{_base64(msgspec.json.encode({'typ': 'JWT', 'alg': 'ed25519-nkey'}))}.{_base64(msgspec.json.encode(body))}"
    return f"{signed}.{_base64(issuer.sign(signed.encode()))}"


def user(
    role: SigningKey, account: str, key: PublicKey, name: str, tags: tuple[str, ...],
    at: datetime, until: datetime | None = None,
) -> str:  # fmt: skip
    """A user's JWT, signed with the key of its role: the account's JWT says what that role may do. `account` is its nkey."""
    claims: dict[str, Any] = {"type": "user", "issuer_account": account}
    if tags:
        claims["tags"] = list(tags)
    return encode(name, public("user", key), "account", role, claims, at, until)


def read(token: str) -> Claims:
    """What a JWT says; whether it holds is for the server to judge. Raises Refused(SIGNATURE_INVALID)."""
    try:
        if len(token) > MAX_JWT:
            raise ValueError("too long")
        part = token.split(".")[1]
        return msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)), type=Claims)
    except (IndexError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise Refused(Code.SIGNATURE_INVALID, f"it is no user's JWT: {error}") from None


def creds(token: str, secret: str) -> str:
    """The text of a `.creds` file."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{secret}\n------END USER NKEY SEED------\n"
    )


def read_creds(text: str) -> tuple[str, SigningKey]:
    """The JWT and the key of a `.creds` file's text. Raises Refused(SIGNATURE_INVALID)."""
    blocks = {match["kind"]: match["body"] for match in _BLOCK.finditer(text)}
    secret = blocks.get("USER NKEY SEED", "")
    try:
        if not secret.startswith("SU"):
            raise ValueError
        key = SigningKey.from_nkey(secret)
    except (ValueError, binascii.Error):
        raise Refused(Code.SIGNATURE_INVALID, "it holds no user's nkey seed") from None
    return blocks.get("NATS USER JWT", ""), key


def sign_in(token: Callable[[], str], key: SigningKey) -> dict[str, Any]:
    """Options of the NATS client for connecting with a JWT, asked for each time, and its key: what it proves the JWT with."""
    return {
        "user_jwt_cb": lambda: token().encode(),
        "signature_cb": lambda nonce: base64.b64encode(key.sign(nonce.encode())),
    }


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
