"""Encrypted private keys as PKCS#8 files (RFC 5958, RFC 8018): what `cryptography` writes itself derives its key far too fast.

`cryptography` 50 derives with 2048 rounds of PBKDF2, less than a millisecond for each guess at a passphrase. The same format
with more rounds is read by it and by `openssl pkey`, so a key can be used without this program.
"""

from __future__ import annotations

import base64
import os
from typing import Final

from cryptography.hazmat.primitives import hashes, padding, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

#: Rounds of PBKDF2-HMAC-SHA256: OWASP's password storage cheat sheet (2023); about 0.15 s for each guess.
ROUNDS: Final = 600_000

_SEQUENCE, _INTEGER, _OCTETS, _NULL, _OID = 0x30, 0x02, 0x04, b"\x05\x00", 0x06
_PBES2: Final = bytes.fromhex("2a864886f70d01050d")
_PBKDF2: Final = bytes.fromhex("2a864886f70d01050c")
_HMAC_SHA256: Final = bytes.fromhex("2a864886f70d0209")
_AES256_CBC: Final = bytes.fromhex("60864801650304012a")


def encrypted(key: Ed25519PrivateKey, passphrase: bytes, *, rounds: int = ROUNDS) -> bytes:
    """The PEM text of a key, encrypted with AES-256-CBC under PBKDF2 (PBES2 of RFC 8018)."""
    plain = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    salt, nonce = os.urandom(16), os.urandom(16)
    derived = PBKDF2HMAC(hashes.SHA256(), 32, salt, rounds).derive(passphrase)
    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(derived), modes.CBC(nonce)).encryptor()
    content = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
    derivation = _tlv(
        _SEQUENCE,
        _tlv(_OID, _PBKDF2),
        _tlv(
            _SEQUENCE,
            _tlv(_OCTETS, salt),
            _tlv(_INTEGER, rounds.to_bytes(rounds.bit_length() // 8 + 1, "big")),
            _tlv(_SEQUENCE, _tlv(_OID, _HMAC_SHA256), _NULL),
        ),
    )
    cipher = _tlv(_SEQUENCE, _tlv(_OID, _AES256_CBC), _tlv(_OCTETS, nonce))
    algorithm = _tlv(_SEQUENCE, _tlv(_OID, _PBES2), _tlv(_SEQUENCE, derivation, cipher))
    text = base64.b64encode(_tlv(_SEQUENCE, algorithm, _tlv(_OCTETS, content))).decode()
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return "\n".join(
        ("-----BEGIN ENCRYPTED PRIVATE KEY-----", *lines, "-----END ENCRYPTED PRIVATE KEY-----\n")
    ).encode()


def _tlv(tag: int, *parts: bytes) -> bytes:
    """One DER element; everything here is shorter than 256 bytes."""
    content = b"".join(parts)
    size = len(content)
    return bytes((tag, size) if size < 128 else (tag, 0x81, size)) + content
