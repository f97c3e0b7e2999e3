"""The token of an invitation: one line with everything that a machine needs to become a host.

A secret until it is used: whoever has it first is the host. It also says whom to believe: the digest of the TUF root, and the
certificate authority of the bus where that has one of its own. So nothing that the host fetches over the network is taken on
trust.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Final

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey

PREFIX: Final = "lbt1."  # so that people and secret scanners know one when they see it
MAX_TOKEN: Final = 32 * 1024  # characters; a chain of certificates is a few thousand
_CHECK: Final = (
    4  # bytes of SHA-256 at the end: a token that was cut or mistyped is told from one that is refused
)


class Token(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """`seed` is the 32 secret bytes of the token's key, `jwt` lets it connect, `invite` is the invitation's command.

    `root` is the SHA-256 of the TUF root of version `root_version`, `ca` a PEM text or empty.
    """

    url: str
    host: str
    workspace: str
    invite: str
    seed: bytes
    jwt: str
    root: bytes
    root_version: int
    ca: str = ""

    @property
    def key(self) -> SigningKey:
        """The token's key."""
        return SigningKey.from_raw(self.seed)


def write(token: Token) -> str:
    """The line."""
    data = msgspec.msgpack.encode(token)
    return PREFIX + base64.urlsafe_b64encode(data + _check(data)).rstrip(b"=").decode()


def read(text: str) -> Token:
    """The token behind a line. Raises Refused(IDENTITY_TOKEN) for one that is not whole."""
    line = text.strip()
    if not line.startswith(PREFIX) or len(line) > MAX_TOKEN:
        raise _broken(f"it does not begin with {PREFIX}")
    try:
        packed = line.removeprefix(PREFIX)
        data = base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True)
        if _check(data[:-_CHECK]) != data[-_CHECK:]:
            raise _broken("its checksum does not match")
        found = msgspec.msgpack.decode(data[:-_CHECK], type=Token)
    except (binascii.Error, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _broken(str(error)) from None
    if len(found.seed) != 32:
        raise _broken("its key has another length")
    return found


def _check(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK]


def _broken(why: str) -> Refused:
    return Refused(
        Code.IDENTITY_TOKEN,
        f"this is no whole token: {why}",
        "copy the line that 'loopback host invite' printed again",
    )
