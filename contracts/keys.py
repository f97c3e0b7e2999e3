"""Ed25519 keys as they appear in envelopes, trust documents and NATS identities.

A key id is the SHA-256, in hex, of the 32 raw bytes of the public key. NATS identities (nkeys) are Ed25519 keys too, so
a host or service signs its reports with the very key that is its identity on the bus.

Verification is libsodium's (PyNaCl, which nkeys brings along): it takes little more than half of OpenSSL's time, which decides
whether a desired state with four signatures is verified in half a millisecond, and it refuses keys of small order,
under which one signature holds for every message. Signing and key files are `cryptography`'s.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Final, NamedTuple, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from loopback.contracts import pem
from loopback.contracts.codes import Code, Refused

LOCKED_NEXT: Final = (
    "run it on a terminal, which asks for the passphrase, or name a file that holds it: --passphrase-file, "
    "LOOPBACK_PASSPHRASE_FILE"
)

KNOWN_KEYS: Final = (
    4096  # answers that are remembered, 32 bytes each; an installation has a few dozen keys with rights
)

_PUBLIC: Final = "public key:"
_KEYID: Final = "key id:"
_BLOCK: Final = re.compile(rb"-----BEGIN (?P<encrypted>ENCRYPTED )?PRIVATE KEY-----")
_CLAIM: Final = re.compile(_PUBLIC.encode() + rb" (?P<public>[0-9a-f]{64})\n")


class PublicKey:
    """A key that verifies. `raw` is its 32 bytes, `text` the same in hex, `keyid` its id."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != 32:
            raise Refused(Code.ENVELOPE_MALFORMED, f"an Ed25519 public key has 32 bytes, not {len(raw)}")
        self.raw = raw
        self.text = raw.hex()
        self.keyid = hashlib.sha256(raw).hexdigest()
        self._key = VerifyKey(raw)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the hex form. Raises Refused(ENVELOPE_MALFORMED)."""
        try:
            return cls(bytes.fromhex(text))
        except ValueError:
            raise Refused(Code.ENVELOPE_MALFORMED, "a public key is 64 hex digits") from None

    def sound(self) -> Self:
        """This key, where it may be trusted with anything: checked before it is given a right, since not every library that
        verifies looks.

        Raises Refused(SIGNATURE_WEAK_KEY) where it is no point of the group's prime order.
        """
        if not is_sound(self.raw):
            raise Refused(
                Code.SIGNATURE_WEAK_KEY,
                f"the key {self.text[:16]}… is none that a private key has: anybody could sign for it",
                "name the public key that 'loopback keys show' or its key file says, and ask who gave you this one",
            )
        return self

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` over `message` was made with this key."""
        try:
            self._key.verify(message, signature)
        except (BadSignatureError, ValueError):  # the latter where it is not 64 bytes
            return False
        return True


@functools.lru_cache(KNOWN_KEYS)
def is_sound(raw: bytes) -> bool:
    """Whether these 32 bytes are a point of prime order in its one encoding (libsodium; 82 µs, remembered).

    Under a key of small order one signature holds for many messages or all, for whoever computes it.
    """
    return len(raw) == 32 and crypto_core_ed25519_is_valid_point(raw)


class SigningKey:
    """A key that signs; `public` is its other half."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())
        self.keyid = self.public.keyid

    @classmethod
    def generate(cls) -> Self:
        """A new random key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_raw(cls, seed: bytes) -> Self:
        """From the 32 secret bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def from_nkey(cls, seed: str) -> Self:
        """From an nkey seed (`SU…`): base32 of two prefix bytes, 32 secret bytes and a checksum of two."""
        raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
        return cls.from_raw(raw[2:34])

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> Self:
        """From a PKCS#8 PEM file. Raises Refused(SIGNATURE_INVALID) if this opens no Ed25519 key in it."""
        try:
            data = path.read_bytes()
            file = KeyFile.parse(path, data)
            # A plain key needs no passphrase, and the library refuses a needless one.
            key = serialization.load_pem_private_key(data, password=passphrase if file.encrypted else None)
        except FileNotFoundError:
            raise Refused(
                Code.SIGNATURE_INVALID, f"there is no key file {path}", "make one with 'loopback keys init'"
            ) from None
        except TypeError:
            raise Refused(Code.SIGNATURE_INVALID, f"{path} is encrypted", LOCKED_NEXT) from None
        except ValueError as error:
            raise Refused(Code.SIGNATURE_INVALID, f"{path} is not a readable private key: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise Refused(Code.SIGNATURE_INVALID, f"{path} holds another kind of key than Ed25519")
        found = cls(key)
        if file.public is not None and file.public.raw != found.public.raw:
            raise Refused(Code.SIGNATURE_INVALID, f"{path} says that it holds another key than it does")
        return found

    def save(self, path: Path, passphrase: bytes | None = None) -> None:
        """Write a PKCS#8 PEM file readable by its owner only, encrypted where there is a passphrase; whole or not at all,
        and durably.

        The folder is made when missing. The public key stands before the PEM block, where readers of PEM skip it
        (RFC 7468 §2), so that a key can be found without its passphrase.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if passphrase is None:
            block = self._key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        else:
            block = pem.encrypted(self._key, passphrase)
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(f"{_PUBLIC} {self.public.text}\n{_KEYID} {self.keyid}\n".encode() + block)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # else a medium that is unplugged now may hold nothing under this name
        finally:
            os.close(folder)

    @property
    def raw(self) -> bytes:
        """The 32 secret bytes."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of the signature."""
        return self._key.sign(message)


class KeyFile(NamedTuple):
    """What a key file says without its passphrase; `public` is its own claim, None where it makes none."""

    path: Path
    public: PublicKey | None
    encrypted: bool

    @classmethod
    def read(cls, path: Path) -> Self:
        """A plain key is opened, which makes `public` sure. Raises Refused(SIGNATURE_INVALID) where it is no private key."""
        try:
            found = cls.parse(path, path.read_bytes())
        except FileNotFoundError:
            raise Refused(Code.SIGNATURE_INVALID, f"there is no key file {path}") from None
        return found if found.encrypted else found._replace(public=SigningKey.load(path).public)

    @classmethod
    def parse(cls, path: Path, data: bytes) -> Self:
        """The same of its bytes, opening nothing."""
        match = _BLOCK.search(data)
        if match is None:
            raise Refused(
                Code.SIGNATURE_INVALID, f"{path} is not a readable private key: it has no PEM block"
            )
        claim = _CLAIM.search(data[: match.start()])
        public = PublicKey.parse(claim["public"].decode()) if claim else None
        return cls(path, public, match["encrypted"] is not None)
