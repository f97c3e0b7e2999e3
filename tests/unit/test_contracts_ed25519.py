"""Signatures as envelopes verify them: the same answers as another implementation, and stricter where that one is lax."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import msgspec
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Signature
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata

from loopback.cli import trustedit
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey, SigningKey, is_sound
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.trust import signing, updater

ORDER = 2**252 + 27742317777372353535851937790883648493  # of the group; RFC 8032 §5.1


def openssl(key: PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def test_two_implementations_agree_on_what_was_signed_and_on_every_flipped_bit() -> None:
    for number in range(20):
        key = SigningKey.generate()
        message = hashlib.sha512(bytes([number])).digest() * number
        signature = key.sign(message)
        assert key.public.verifies(signature, message) and openssl(key.public, signature, message)
        assert not key.public.verifies(signature, message + b"x")
        for at in range(0, 512, 37):
            broken = bytearray(signature)
            broken[at // 8] ^= 1 << at % 8
            assert not key.public.verifies(bytes(broken), message)
            assert not openssl(key.public, bytes(broken), message)


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_a_signature_of_another_length_is_none(length: int) -> None:
    assert not SigningKey.generate().public.verifies(bytes(length), b"message")


def test_the_same_signature_has_one_form() -> None:
    """S plus the group's order would be a second signature of the same content."""
    key = SigningKey.generate()
    signature = key.sign(b"message")
    malleated = int.from_bytes(signature[32:], "little") + ORDER
    assert not key.public.verifies(signature[:32] + malleated.to_bytes(32, "little"), b"message")


def test_a_key_of_small_order_signs_nothing() -> None:
    """The neutral point as a key: one constant signature would hold for every message."""
    neutral = (1).to_bytes(32, "little")
    key = PublicKey(neutral)
    assert openssl(key, neutral + bytes(32), b"anything"), "the other implementation takes it"
    assert not key.verifies(neutral + bytes(32), b"anything")


#: Points whose order divides 8, each in every encoding that libraries take (RFC 8032 §5.1.3; y, y + p, and the sign).
P = 2**255 - 19
Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD83D3D706A17C7
WEAK = [
    (y | sign << 255).to_bytes(32, "little") for y in (0, 1, P - 1, Y8, P - Y8, P, P + 1) for sign in (0, 1)
]


def nobodys(raw: bytes) -> bytes | None:
    """A signature under this key that holds for another message than the one it was found with; no private key is used."""
    for point in WEAK:
        signature = point + bytes(32)
        held = [n for n in range(64) if openssl(PublicKey(raw), signature, b"%d" % n)]
        if len(held) > 4:
            return signature
    return None


def test_anybody_can_sign_for_a_key_of_small_order_in_openssl_and_none_is_sound() -> None:
    assert sum(nobodys(raw) is not None for raw in WEAK) >= 8, "the attack reaches the other implementation"
    assert not any(is_sound(raw) for raw in WEAK)
    assert is_sound(SigningKey.generate().public.raw)
    assert not is_sound(b"") and not is_sound(bytes(31))
    for raw in WEAK:
        with pytest.raises(Refused) as refused:
            PublicKey(raw).sound()
        assert refused.value.code == Code.SIGNATURE_WEAK_KEY and refused.value.next_step


@pytest.mark.parametrize("whose", ["operator", "service"])
def test_a_trust_document_gives_no_right_to_a_key_for_which_anybody_signs(whose: str) -> None:
    good, weak = SigningKey.generate().public.text, (1).to_bytes(32, "little").hex()
    for operator, service in ((good, good), *([(weak, good)] if whose == "operator" else [(good, weak)])):
        found = TrustDocument(
            version=1,
            operators=(Operator("ann", operator, {"*": (Role.ADMIN,)}),),
            services={"activation": (service,)},
        )
        if operator == service:
            assert Trust.decode(msgspec.json.encode(found)).operators
            continue
        with pytest.raises(Refused) as refused:
            Trust.decode(msgspec.json.encode(found))
        assert refused.value.code == Code.SIGNATURE_WEAK_KEY
        with pytest.raises(Refused) as refused:
            if whose == "operator":
                trustedit.with_operator(found, "bob", {"*": (Role.ADMIN,)}, weak)
            else:
                trustedit.with_service_key(found, "activation", weak)
        assert refused.value.code == Code.SIGNATURE_WEAK_KEY


def test_no_role_is_delegated_to_a_key_for_which_anybody_signs() -> None:
    weak, good = PublicKey((1).to_bytes(32, "little")), SigningKey.generate()
    now = datetime(2026, 11, 25, tzinfo=UTC)
    with pytest.raises(Refused) as refused:
        signing.delegate(signing.new_targets(now, version=1, files={}), "firewall", weak)
    assert refused.value.code == Code.SIGNATURE_WEAK_KEY
    with pytest.raises(Refused) as refused:
        signing.new_root(now, root=weak, targets=good, snapshot=good, timestamp=good)
    assert refused.value.code == Code.SIGNATURE_WEAK_KEY


def test_a_release_that_nobody_signed_is_none_although_a_weak_key_is_delegated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever made the delegation was talked into that key, with other tools than ours: pins and allow-lists by its id too."""
    neutral = (1).to_bytes(32, "little")
    now = datetime(2026, 11, 25, tzinfo=UTC)
    targets = signing.new_targets(now, version=1, files={})
    with monkeypatch.context() as patch:
        patch.setattr(PublicKey, "sound", lambda self: self)
        signing.delegate(targets, "firewall", PublicKey(neutral))
    role = signing.delegated_role("firewall")
    (keyid,) = targets.get_delegated_role(role).keyids
    evil = Metadata(signing.new_targets(now, version=1, files={}))
    evil.signatures[keyid] = Signature(keyid, (neutral + bytes(32)).hex())
    targets.verify_delegate(role, evil.signed_bytes, evil.signatures)  # python-tuf itself is content
    with monkeypatch.context() as patch:
        patch.setattr(updater, "_is_weak", lambda key: False)
        updater.count_keys(targets, role, evil.signed_bytes, evil.signatures)
    with pytest.raises(UnsignedMetadataError, match="0/1 keys"):
        updater.count_keys(targets, role, evil.signed_bytes, evil.signatures)
