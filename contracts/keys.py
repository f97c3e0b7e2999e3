"""Ed25519 keys as they appear in envelopes, trust documents and NATS identities.

A key id is the SHA-256, in hex, of the 32 raw bytes of the public key. NATS identities (nkeys) are Ed25519 keys too, so
a host or service signs its reports with the very key that is its identity on the bus.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from loopback.contracts.codes import Code, Refused


class PublicKey:
    """A key that verifies. `raw` is its 32 bytes, `text` the same in hex, `keyid` its id."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != 32:
            raise Refused(Code.ENVELOPE_MALFORMED, f"an Ed25519 public key has 32 bytes, not {len(raw)}")
        self.raw = raw
        self.text = raw.hex()
        self.keyid = hashlib.sha256(raw).hexdigest()
        self._key = Ed25519PublicKey.from_public_bytes(raw)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the hex form. Raises Refused(ENVELOPE_MALFORMED)."""
        try:
            return cls(bytes.fromhex(text))
        except ValueError:
            raise Refused(Code.ENVELOPE_MALFORMED, "a public key is 64 hex digits") from None

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` over `message` was made with this key."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


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
    def load(cls, path: Path) -> Self:
        """From a PKCS#8 PEM file. Raises Refused(SIGNATURE_INVALID) if it holds no unencrypted Ed25519 key."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except FileNotFoundError:
            raise Refused(
                Code.SIGNATURE_INVALID, f"there is no key file {path}", "make one with 'loopback keys init'"
            ) from None
        except (ValueError, TypeError) as error:
            raise Refused(Code.SIGNATURE_INVALID, f"{path} is not a readable private key: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise Refused(Code.SIGNATURE_INVALID, f"{path} holds another kind of key than Ed25519")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write a PKCS#8 PEM file readable by its owner only; the folder is made when missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(
            self._key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    @property
    def raw(self) -> bytes:
        """The 32 secret bytes."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of the signature."""
        return self._key.sign(message)
