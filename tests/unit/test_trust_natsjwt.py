"""nkeys, JWTs and credentials, compared with NATS's own library."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import nkeys
import pytest

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.trust import natsjwt

AT = datetime(2026, 11, 25, tzinfo=UTC)
KEY = SigningKey.from_raw(bytes(range(32)))


@pytest.mark.parametrize("kind", ["operator", "account", "user"])
def test_our_nkeys_are_those_of_the_library(kind: str) -> None:
    prefix = getattr(nkeys, f"PREFIX_BYTE_{kind.upper()}")
    theirs = nkeys.from_seed(bytes(nkeys.encode_seed(KEY.raw, prefix)))
    assert natsjwt.seed(kind, KEY) == bytes(theirs.seed).decode()
    assert natsjwt.public(kind, KEY.public) == bytes(theirs.public_key).decode()
    assert natsjwt.parse_public(kind, natsjwt.public(kind, KEY.public)).raw == KEY.public.raw


@pytest.mark.parametrize("text", ["", "U", "!", natsjwt.public("account", KEY.public), "U" * 56, "é"])
def test_what_is_no_nkey_of_a_user_is_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        natsjwt.parse_public("user", text)
    assert refused.value.code is Code.SIGNATURE_INVALID


def test_a_jwt_reads_back_and_its_signature_is_the_issuers() -> None:
    token = natsjwt.user(KEY, "ACC", KEY.public, "web-1", ("ws:prod",), AT, AT + timedelta(days=30))
    claims = natsjwt.read(token)
    assert (claims.name, claims.tags, claims.sub) == (
        "web-1",
        ("ws:prod",),
        natsjwt.public("user", KEY.public),
    )
    assert (claims.issued_at, claims.expires_at) == (AT, AT + timedelta(days=30))
    signed, _, signature = token.rpartition(".")
    assert KEY.public.verifies(base64.urlsafe_b64decode(signature + "=="), signed.encode())


@pytest.mark.parametrize("token", ["", "a.b.c", "a." + "e30" + ".c", "x" * 5000, "a.é.c"])
def test_what_is_no_jwt_is_refused_with_words(token: str) -> None:
    with pytest.raises(Refused) as refused:
        natsjwt.read(token)
    assert refused.value.code is Code.SIGNATURE_INVALID


def test_credentials_read_back() -> None:
    text = natsjwt.creds("a.b.c", natsjwt.seed("user", KEY))
    token, key = natsjwt.read_creds(text)
    assert (token, key.public.raw) == ("a.b.c", KEY.public.raw)
    for bad in (
        "",
        text.replace("SU", "SA"),
        "-----BEGIN USER NKEY SEED-----\nSU!\n---END USER NKEY SEED---",
    ):
        with pytest.raises(Refused):
            natsjwt.read_creds(bad)


@pytest.mark.parametrize("field", ["iat", "exp"])
def test_a_time_that_is_on_no_calendar_is_refused_before_anybody_reckons_with_it(field: str) -> None:
    body = {"sub": "U", "name": "n", "iss": "A", "iat": 1, "exp": 1} | {field: 10**18}
    part = base64.urlsafe_b64encode(json.dumps(body).encode()).decode()
    with pytest.raises(Refused):
        natsjwt.read(f"e30.{part}.s")
