"""DSSE envelopes: the one way in which anything is signed on the bus.

The signature covers the pre-authentication encoding of payload type and payload (DSSE v1.0.2, "PAE"), so a payload
signed as one type can never pass as another.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.keys import PublicKey, SigningKey

COMMAND: Final = "application/vnd.loopback.command+json"
POLICY: Final = "application/vnd.loopback.policy+json"
DESIRED: Final = "application/vnd.loopback.desired+json"
ROSTER: Final = "application/vnd.loopback.roster+json"
REPORT: Final = "application/vnd.loopback.report+json"
CLAIM: Final = "application/vnd.loopback.claim+json"
RENEW: Final = "application/vnd.loopback.renew+json"
OTLP_TRACES: Final = "application/vnd.loopback.otlp-traces+protobuf"
OTLP_METRICS: Final = "application/vnd.loopback.otlp-metrics+protobuf"

MAX_ENVELOPE: Final = 768 * 1024  # bytes; below NATS's default max_payload of 1 MiB with room for headers
MAX_SIGNATURES: Final = 16


class Signature(msgspec.Struct, frozen=True):
    """`sig` is base64."""

    keyid: str
    sig: str


class Envelope(msgspec.Struct, frozen=True):
    """A DSSE envelope; `payload` is base64."""

    payload: str
    payloadType: str
    signatures: tuple[Signature, ...]


_DECODER = Decoder(msgspec.json.Decoder(Envelope))


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is actually signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(payload_type: str, payload: bytes, *keys: SigningKey) -> Envelope:
    """Sign `payload` with every key."""
    message = pae(payload_type, payload)
    return Envelope(
        base64.b64encode(payload).decode(),
        payload_type,
        tuple(Signature(key.keyid, base64.b64encode(key.sign(message)).decode()) for key in keys),
    )


def seal_bytes(payload_type: str, payload: bytes, *keys: SigningKey) -> bytes:
    """The same, as the JSON bytes that travel."""
    return msgspec.json.encode(seal(payload_type, payload, *keys))


def parse(data: bytes) -> Envelope:
    """Read an envelope's JSON. Raises Refused(ENVELOPE_MALFORMED | ENVELOPE_TOO_LARGE)."""
    if len(data) > MAX_ENVELOPE:
        raise Refused(Code.ENVELOPE_TOO_LARGE, f"{len(data)} bytes are more than the {MAX_ENVELOPE} allowed")
    try:
        return _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise Refused(
            Code.ENVELOPE_MALFORMED,
            f"not a DSSE envelope: {error}",
            "send the JSON object {payload, payloadType, signatures}",
        ) from None
    except RecursionError:
        raise Refused(Code.ENVELOPE_MALFORMED, "not a DSSE envelope: nested too deeply") from None


def payload_of(envelope: Envelope) -> bytes:
    """The payload, unverified. Raises Refused(ENVELOPE_MALFORMED)."""
    try:
        return base64.b64decode(envelope.payload, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(Code.ENVELOPE_MALFORMED, "the envelope's payload is not base64") from None


KeySource = Mapping[str, PublicKey] | Callable[[str], PublicKey | None]


def open_envelope(envelope: Envelope, payload_type: str, keys: KeySource) -> tuple[bytes, tuple[str, ...]]:
    """Verify an envelope and return its payload and the ids of the known keys whose signatures hold.

    Every signature by a known key must hold; signatures by unknown keys are ignored as DSSE says, but at least one must
    be known. Raises Refused with ENVELOPE_TYPE, ENVELOPE_UNSIGNED, SIGNATURE_UNKNOWN_KEY or SIGNATURE_INVALID.
    """
    if envelope.payloadType != payload_type:
        raise Refused(
            Code.ENVELOPE_TYPE, f"the envelope holds {envelope.payloadType[:80]!r}, not {payload_type!r}"
        )
    if not envelope.signatures:
        raise Refused(
            Code.ENVELOPE_UNSIGNED, "the envelope carries no signature", "sign it with an operator's key"
        )
    if len(envelope.signatures) > MAX_SIGNATURES:
        raise Refused(Code.ENVELOPE_MALFORMED, f"more than {MAX_SIGNATURES} signatures")
    payload = payload_of(envelope)
    message = pae(payload_type, payload)
    find = keys if callable(keys) else keys.get
    good: list[str] = []
    for signature in envelope.signatures:
        key = find(signature.keyid)
        if key is None:
            continue
        try:
            raw = base64.b64decode(signature.sig, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(Code.SIGNATURE_INVALID, "a signature is not base64") from None
        if not key.verifies(raw, message):
            raise Refused(
                Code.SIGNATURE_INVALID,
                f"the signature by key {signature.keyid[:12]} does not match the content",
                "sign the content again; it was changed after signing or signed with another key",
            )
        good.append(signature.keyid)
    if not good:
        named = ", ".join(s.keyid[:12] for s in envelope.signatures)
        raise Refused(
            Code.SIGNATURE_UNKNOWN_KEY,
            f"none of the signing keys is known here ({named})",
            "use a key that the trust document names",
        )
    return payload, tuple(dict.fromkeys(good))
