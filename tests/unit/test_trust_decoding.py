"""Bytes that nobody's encoder makes are refused like any other nonsense, never with an exception of another kind."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from loopback.contracts import abi, desired, envelope, journal, messages, reports, trustdoc, view
from loopback.contracts.codes import Refused

DECODERS: dict[str, Callable[[bytes], object]] = {
    "envelope": envelope.parse,
    "command": messages.decode_command,
    "policy": messages.decode_policy,
    "desired state": desired.decode,
    "report": reports.decode,
    "journal": journal.decode,
    "view": view.decode,
    "trust": trustdoc.Trust.decode,
    "ABI frame": abi.decode,
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "data",
    [
        b'{"type":"\xff"}',
        b'{"\xff":1,"payload":"\xff","host":"\xc3("}',
        b'{"type":"workspace.put","id":"\xed\xa0\x80"}',
        b"\x82\xa2id\x01\xa4body\x81\xa4verb\xa1\xff",
    ],
)
def test_text_that_is_not_utf8_is_refused_as_what_does_not_decode(name: str, data: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, Refused)):
        DECODERS[name](data)
