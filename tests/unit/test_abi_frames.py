"""Frames of the module ABI: what was sent is what arrives, and garbage is refused without a crash."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused

TEXT = st.text(max_size=20)
SETTINGS = st.dictionaries(
    TEXT, TEXT | st.integers(-(2**60), 2**60) | st.booleans() | st.lists(TEXT, max_size=3), max_size=3
)
BODIES = st.one_of(
    st.builds(abi.Hello, module=TEXT, version=TEXT, abi=st.integers(0, 99), adopted=st.booleans(), policy=st.none() | TEXT),
    st.builds(abi.Configure, host=TEXT, workspace=TEXT, state_dir=TEXT, settings=SETTINGS),
    st.builds(abi.Stage, digest=TEXT, serial=st.integers(0, 2**40), content=st.binary(max_size=100)),
    st.builds(abi.Commit, digest=TEXT, trial_s=st.floats(0, 1e6)),
    st.builds(abi.Confirm, digest=TEXT),
    st.builds(abi.Stop, remove=st.booleans()),
    st.sampled_from([abi.Revert(), abi.Health(), abi.Metrics(), abi.Drain()]),
    st.builds(abi.Done, metrics=st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=3)),
    st.builds(abi.Done, health=st.builds(abi.HealthReport, state=st.sampled_from(["ok", "degraded", "failed"]))),
    st.builds(abi.Failed, code=TEXT, reason=TEXT, next_step=TEXT),
    st.builds(abi.Event, kind=TEXT, attributes=st.dictionaries(TEXT, TEXT | st.booleans(), max_size=3)),
)  # fmt: skip


@given(number=st.integers(0, 2**31), body=BODIES)
def test_what_is_sent_is_what_arrives(number: int, body: abi.Body) -> None:
    frame = abi.Frame(id=number, body=body)
    data = abi.encode(frame)
    assert abi.length_of(data[:4]) == len(data) - 4
    assert abi.decode(data[4:]) == frame
    assert abi.id_of(data[4:]) == number


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_never_crashes(data: bytes) -> None:
    for read in (abi.decode, abi.id_of):
        try:
            read(data)
        except Refused as refused:
            assert refused.code == Code.MODULE_ABI


@given(body=BODIES, cut=st.integers(0, 400), at=st.integers(0, 400), flip=st.integers(1, 255))
def test_a_damaged_frame_is_refused_or_another_frame_and_never_crashes(
    body: abi.Body, cut: int, at: int, flip: int
) -> None:
    data = bytearray(abi.encode(abi.Frame(id=1, body=body))[4:])
    data[at % len(data)] ^= flip
    try:
        abi.decode(bytes(data[: max(1, len(data) - cut)]))
    except Refused as refused:
        assert refused.code == Code.MODULE_ABI


def test_deep_nesting_is_refused() -> None:
    nested = b"\x91" * 100_000 + b"\x90"
    with pytest.raises(Refused):
        abi.decode(b"\x82\xa2id\x01\xa4body" + nested)


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(Refused) as caught:
        abi.length_of((abi.MAX_FRAME + 1).to_bytes(4, "big"))
    assert caught.value.code == Code.MODULE_ABI
    big = abi.Stage(digest="d", serial=1, content=bytes(abi.MAX_FRAME))
    with pytest.raises(Refused):
        abi.encode(abi.Frame(id=1, body=big))


#: Frames as version 1 wrote them; they must decode for as long as the ABI is 1.
STORED = {
    "82a26964 00 a4626f6479 84a476657262a568656c6c6f a66d6f64756c65a474696e79 a776657273696f6ea3312e30 a361626901":
        abi.Frame(id=0, body=abi.Hello(module="tiny", version="1.0", abi=1)),
    "82a26964 01 a4626f6479 81a476657262a66865616c7468": abi.Frame(id=1, body=abi.Health()),
    "82a26964 02 a4626f6479 82a476657262a473746f70 a672656d6f7665c3": abi.Frame(id=2, body=abi.Stop(remove=True)),
    "82a26964 03 a4626f6479 84a476657262a57374616765 a6646967657374a164 a673657269616c05 a7636f6e74656e74c4027b7d":
        abi.Frame(id=3, body=abi.Stage(digest="d", serial=5, content=b"{}")),
}  # fmt: skip


@pytest.mark.parametrize("stored", list(STORED))
def test_frames_of_old_modules_keep_their_meaning(stored: str) -> None:
    assert abi.decode(bytes.fromhex(stored)) == STORED[stored]


def test_fields_from_the_future_are_ignored() -> None:
    data = msgspec.msgpack.encode({"id": 4, "body": {"verb": "done", "colour": "red"}, "priority": 3})
    assert abi.decode(data) == abi.Frame(id=4, body=abi.Done())
