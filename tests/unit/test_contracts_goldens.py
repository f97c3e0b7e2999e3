"""Stored bytes still mean what they meant: nothing that a service or host of an earlier day sends may stop being read."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from golden_contracts import FOLDER, KEY, Golden, code_list, goldens, subject_table

from loopback.contracts import abi, envelope, messages
from loopback.contracts.codes import Code, Refused

ALL = {golden.file: golden for golden in goldens()}
COMMANDS = sorted(kind.__struct_config__.tag for kind in get_args(messages.AnyCommand))
JSON = sorted(name for name in ALL if name.endswith(".json"))
#: Whose senders must be told of a field that nobody understands, rather than be half obeyed.
STRICT = {f"{tag}{form}.json" for tag in COMMANDS for form in ("", ".minimal")} | {
    "policy.json", "policy.minimal.json", "policy.blob.json", "trustdocument.json", "trustdocument.minimal.json",
    "claim.json", "claim.minimal.json",
}  # fmt: skip


def stored(golden: Golden) -> bytes:
    return (FOLDER / golden.file).read_bytes()


def inside(old: Any, new: Any) -> bool:
    """Whether all that was said is still said, with the same words; new fields may stand beside it."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(
            key in new and inside(value, new[key]) for key, value in old.items()
        )
    if isinstance(old, list):
        return isinstance(new, list) and len(old) == len(new) and all(map(inside, old, new))
    return type(old) is type(new) and old == new


def test_every_message_has_its_golden_and_every_golden_its_message() -> None:
    there = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert there == {*ALL, "subjects.json", "codes.txt"}, "run: python tests/golden_contracts.py"


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_stored_message_is_read_and_written_as_it_was(name: str) -> None:
    golden = ALL[name]
    data = stored(golden)
    value = golden.decode(data)
    again = golden.encode(value)
    if name.endswith(".json"):
        assert inside(json.loads(data), json.loads(again))
    else:
        old, new = (msgspec.msgpack.decode(bytes.fromhex(d.decode())[4:]) for d in (data, again))
        assert inside(old, new)
    assert golden.decode(again) == value


@pytest.mark.parametrize("name", sorted(set(JSON) - STRICT))
def test_a_field_that_is_not_known_yet_is_ignored_in_what_services_and_hosts_say(name: str) -> None:
    golden = ALL[name]
    plain = json.loads(stored(golden))
    wider = {**plain, "a_field_of_tomorrow": {"x": [1]}}
    if isinstance(plain.get("event"), dict):
        wider["event"] = {**plain["event"], "a_field_of_tomorrow": 1}
    assert golden.decode(json.dumps(wider).encode()) == golden.decode(stored(golden))


@pytest.mark.parametrize("name", sorted(STRICT))
def test_a_field_that_is_not_known_is_refused_in_what_operators_sign(name: str) -> None:
    golden = ALL[name]
    wider = {**json.loads(stored(golden)), "a_field_of_tomorrow": 1}
    with pytest.raises(msgspec.ValidationError, match="a_field_of_tomorrow"):
        golden.decode(json.dumps(wider).encode())


@pytest.mark.parametrize("inner", [("scope",), ("scope", "selector"), ("gates",), ("waves", 0)])
def test_nor_may_it_hide_inside_a_rollout(inner: tuple[str | int, ...]) -> None:
    plain = json.loads(stored(ALL["rollout.start.json"]))
    node: Any = plain
    for step in inner:
        node = node[step]
    node["a_field_of_tomorrow"] = 1
    with pytest.raises(msgspec.ValidationError, match="a_field_of_tomorrow"):
        messages.decode_command(json.dumps(plain).encode())


@pytest.mark.parametrize(
    "name", sorted(set(JSON) - {"policy.json", "policy.minimal.json", "policy.blob.json"})
)
def test_a_value_of_another_type_is_refused_by_name(name: str) -> None:
    golden = ALL[name]
    plain = json.loads(stored(golden))
    for key in plain:
        broken = {**plain, key: [[{"neither": "nor"}]]}
        with pytest.raises((msgspec.ValidationError, Refused)) as caught:
            golden.decode(json.dumps(broken).encode())
        assert key in str(caught.value)


@pytest.mark.parametrize("name", sorted(name for name in ALL if name.endswith(".hex")))
def test_a_newer_module_or_agent_may_say_more_in_a_frame(name: str) -> None:
    raw = bytes.fromhex(stored(ALL[name]).decode())
    plain = msgspec.msgpack.decode(raw[4:])
    plain["body"]["a_field_of_tomorrow"] = 1
    assert abi.decode(msgspec.msgpack.encode(plain)) == ALL[name].decode(stored(ALL[name]))


@pytest.mark.parametrize("name", sorted(name for name in ALL if name.endswith(".hex")))
def test_a_frame_cut_short_is_refused(name: str) -> None:
    raw = bytes.fromhex(stored(ALL[name]).decode())
    for length in range(4, len(raw)):
        with pytest.raises(Refused) as caught:
            abi.decode(raw[4:length])
        assert caught.value.code is Code.MODULE_ABI


@pytest.mark.parametrize(
    "kind", [envelope.COMMAND, envelope.POLICY, envelope.DESIRED, envelope.REPORT, envelope.CLAIM]
)
def test_a_stored_signature_still_holds_and_only_for_its_type(kind: str) -> None:
    name = f"envelope.{kind.split('.')[-1].split('+')[0]}.json"
    found = envelope.parse(stored(ALL[name]))
    keys = {KEY.keyid: KEY.public}
    assert envelope.open_envelope(found, kind, keys) == (b'{"type":"example"}', (KEY.keyid,))
    for other in {envelope.COMMAND, envelope.POLICY, envelope.DESIRED, envelope.REPORT, envelope.CLAIM} - {
        kind
    }:
        with pytest.raises(Refused) as caught:
            envelope.open_envelope(found, other, keys)
        assert caught.value.code is Code.ENVELOPE_TYPE
        relabelled = msgspec.structs.replace(found, payloadType=other)
        with pytest.raises(Refused) as caught:
            envelope.open_envelope(relabelled, other, keys)
        assert caught.value.code is Code.SIGNATURE_INVALID


def test_no_refusal_code_was_taken_away_or_renamed() -> None:
    before = (FOLDER / "codes.txt").read_text().split()
    now = code_list().split()
    assert [code for code in before if code not in now] == []
    assert len(now) == len(set(now))
    assert [code for code in now if code not in before] == [], (
        "add the new ones to contracts/goldens/codes.txt"
    )


def test_subjects_are_where_they_were() -> None:
    assert json.loads((FOLDER / "subjects.json").read_bytes()) == subject_table()
