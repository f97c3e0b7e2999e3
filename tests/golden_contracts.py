"""Golden bytes of the contracts: how they are made, and what each file is decoded with.

`python tests/golden_contracts.py` (with `tests` as the folder) writes the files that are missing and never touches one that
is there: a stored file is what some older service or host sends for ever. To change a golden on purpose before a release,
delete it first. Values come from the types themselves, so a new message cannot be forgotten: a test asks for its golden.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from loopback.contracts import (
    abi,
    codes,
    desired,
    envelope,
    hostrecord,
    identity,
    journal,
    messages,
    reports,
    roster,
    subjects,
    trustdoc,
    view,
)
from loopback.contracts.keys import SigningKey

FOLDER = Path(__file__).parent.parent / "contracts" / "goldens"
KEY = SigningKey.from_raw(bytes(range(32)))  # signs goldens and nothing else
AT = datetime(2026, 11, 23, 20, 30, 0, 250_000, tzinfo=UTC)
SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

#: What a field of this name holds, where its type alone would make an odd example.
NAMED: dict[str, Any] = {
    "host": "web-1.example", "workspace": "prod", "module": "firewall", "version": "1.2.0", "package": SHA, "policy": SHA,
    "digest": SHA, "sha256": SHA, "prev": SHA, "journal_head": SHA, "rollout": "web-2026-11", "name": "canary",
    "kernel": "6.18.0", "architecture": "x86_64", "agent_version": "0.1.0", "python": "3.11.2", "channel": "stable",
    "versions": ">=1.0,<2", "modules": ("firewall",), "incarnation": "01JD7Z", "service": "activation",
    "public_key": KEY.public.text,
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "event": "rollout-start",
    "target": "modules/firewall/1.2.0/firewall-1.2.0.lbm", "subject": "lb.ws.prod.cmd.activation.rollout-start",
    "command": "01JD7ZC0", "id": "01JD7ZC0", "keyids": (KEY.keyid,), "keys": (KEY.keyid,), "operators": ("ada",),
    "features": ("btf", "xdp"), "addresses": ("203.0.113.7",), "labels": {"role": "web"},
    "max_failed": 0.02, "max_unavailable": 0.1, "percent": 25.0, "policy_name": "web.yaml", "reason": "too many failed",
    "next_step": "look at web-1.example", "hosts": ("web-1.example",), "packages": {"1.2.0": SHA},
    "architectures": ("x86_64",), "capabilities": ("CAP_BPF",), "metadata": {"2.root.json": "e30="},
}  # fmt: skip


#: What has a golden of its own, because it excludes another field.
APART: set[tuple[Any, str]] = {(messages.Policy, "blob")}


def example(kind: Any, field: str = "", *, full: bool, default: Any = None) -> Any:
    """A value of a type: every optional field filled, or with `full` false only what must be there."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        some = [each for each in arguments if each is not type(None)]
        if len(some) < len(arguments) and not full:
            return None
        return example(some[0], field, full=full, default=default)
    named = NAMED.get(field)
    if named is not None and (isinstance(kind, type) or origin is not None):
        try:
            return msgspec.convert(named, kind, strict=True)
        except (msgspec.ValidationError, TypeError):
            pass  # the field has another type here: the type decides
    if origin is Literal:
        return next(word for word in arguments if word != default)
    if origin is tuple:
        return (example(arguments[0], field, full=full),) if full else ()
    if origin is list:
        return [example(arguments[0], field, full=full)]
    if origin is dict:
        key = example(arguments[0], "", full=full)
        return {key: example(arguments[1], field, full=full)} if full else {}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return struct(kind, full=full)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(word for word in kind if word != default)
    if kind is msgspec.Raw:
        return msgspec.Raw(b'{"version":1,"default":{"ingress":"drop","egress":"accept"}}')
    values = {str: field or "some", int: 7, float: 1.5, bool: True, bytes: b"\x00\xff policy", datetime: AT}
    return values[kind]


def struct(kind: Any, *, full: bool) -> Any:
    """An instance of a struct."""
    if kind is envelope.Envelope:
        return envelope.seal(envelope.COMMAND, b'{"type":"example"}', KEY)
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: example(hints[field.name], field.name, full=full, default=field.default)
            for field in msgspec.structs.fields(kind)
            if (full or field.required) and (kind, field.name) not in APART
        }
    )


class Golden(NamedTuple):
    """One stored file: its name, what it is decoded with, and how today's code would write it."""

    file: str
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    make: Callable[[], Any]


def _json(kind: Any, decode: Callable[[bytes], Any] | None = None) -> Iterator[Golden]:
    name = getattr(kind.__struct_config__, "tag", None) or kind.__name__.lower()
    read = decode or msgspec.json.Decoder(kind).decode
    yield Golden(f"{name}.json", read, _pretty, lambda: struct(kind, full=True))
    yield Golden(f"{name}.minimal.json", read, _pretty, lambda: struct(kind, full=False))


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _link(event: Any, full: bool) -> journal.Link:
    return journal.Link(
        rollout="web-2026-11", workspace="prod", seq=1, prev="", at=AT, event=struct(event, full=full)
    )


def _policy_apart() -> messages.Policy:
    return msgspec.structs.replace(
        struct(messages.Policy, full=True), content=msgspec.Raw(b"null"), blob=messages.Blob(SHA, 14_009_770)
    )


def _frame(body: Any, full: bool) -> abi.Frame:
    value = struct(body, full=full)
    return abi.Frame(id=0 if isinstance(value, abi.Hello | abi.Event) else 7, body=value)


def _hex(frame: abi.Frame) -> bytes:
    return abi.encode(frame).hex(" ").encode() + b"\n"


def _unhex(data: bytes) -> abi.Frame:
    raw = bytes.fromhex(data.decode())
    assert abi.length_of(raw[:4]) == len(raw) - 4
    return abi.decode(raw[4:])


def goldens() -> Iterator[Golden]:
    """Every golden there must be."""
    for command in get_args(messages.AnyCommand):
        yield from _json(command, messages.decode_command)
    for fact in (
        messages.Policy, messages.Result, messages.JournalEntry, messages.Record, messages.Release, messages.Offer,
        messages.Verdict, messages.Presence, trustdoc.TrustDocument,
    ):  # fmt: skip
        yield from _json(fact)
    yield Golden("policy.blob.json", messages.decode_policy, _pretty, _policy_apart)
    yield from _json(desired.DesiredState, desired.decode)
    yield from _json(roster.Roster, roster.decode)
    yield from _json(roster.Slice, roster.decode_slice)
    for report in get_args(reports.AnyReport):
        yield from _json(report, reports.decode)
    yield from _json(view.HostView, view.decode)
    for event in get_args(journal.AnyEvent):
        name = f"journal.{event.__struct_config__.tag}"
        for suffix, full in (("", True), (".minimal", False)):
            yield Golden(f"{name}{suffix}.json", journal.decode, _pretty, lambda e=event, f=full: _link(e, f))
    for body in get_args(abi.Body):
        for suffix, full in (("", True), (".minimal", False)):
            yield Golden(
                f"abi.{body.__struct_config__.tag}{suffix}.hex",
                _unhex,
                _hex,
                lambda b=body, f=full: _frame(b, f),
            )
    yield from _json(hostrecord.Claim)
    yield from _json(identity.Enrol, identity.decode_enrol)
    yield from _json(identity.Renew, identity.decode_renew)
    yield from _json(identity.Granted, identity.decode_granted)
    for payload_type in (
        envelope.COMMAND,
        envelope.POLICY,
        envelope.DESIRED,
        envelope.REPORT,
        envelope.CLAIM,
        envelope.RENEW,
        envelope.ROSTER,
    ):
        short = payload_type.split(".")[-1].split("+")[0]
        yield Golden(
            f"envelope.{short}.json",
            envelope.parse,
            _pretty,
            lambda t=payload_type: envelope.seal(t, b'{"type":"example"}', KEY),
        )


def subject_table() -> dict[str, str]:
    """Every kind of subject, for names that need escaping."""
    ws, host, rollout = "Prod", "web-1.example", "web_2026.11"
    return {
        "command": subjects.command(ws, "activation", "rollout-start"),
        "commands_for": subjects.commands_for("activation"),
        "result": subjects.result(ws, "01JD7ZC0"),
        "journal": subjects.journal(ws, "activation", "refused"),
        "rollout": subjects.rollout(ws, rollout, "created"),
        "rollouts": subjects.rollout(ws, "*", "*"),
        "desired": subjects.desired(ws, host),
        "to_host": subjects.to_host(ws, host, "desired"),
        "from_host": subjects.from_host(ws, host, "status"),
        "from_hosts": subjects.from_host("*", "*", "status"),
        "record": subjects.record(ws, "host", host),
        "roster": subjects.roster(ws, "ab" * 16),
        "rosters": subjects.rosters(ws, "ab" * 16),
        "slice": subjects.slice_of(ws, "ab" * 16, 3),
        "offer": subjects.offer(ws, host),
        "verdict": subjects.verdict(ws, rollout, "delivery"),
        "presence": subjects.presence(ws, host),
        "catalog": subjects.catalog("firewall", SHA),
        "blob": subjects.blob(SHA, 3),
        "tuf": subjects.tuf("2.root.json"),
        "direct_get": subjects.direct_get("LB_WS_prod", subjects.desired(ws, host)),
        "inbox": subjects.inbox(host),
        "enrol": subjects.enrol(SHA),
        "enrol_inbox": subjects.enrol_inbox(SHA),
        "view": view.subject(ws, host),
        "workspace_stream": subjects.workspace_stream(ws),
    }


def code_list() -> str:
    """Every refusal code."""
    return "".join(f"{code}\n" for code in codes.Code)


def main() -> int:
    """Write what is missing."""
    FOLDER.mkdir(exist_ok=True)
    wanted = {g.file: g.encode(g.make()) for g in goldens()}
    wanted["subjects.json"] = _pretty(subject_table())
    wanted["codes.txt"] = code_list().encode()
    for name, data in wanted.items():
        if not (FOLDER / name).exists():
            (FOLDER / name).write_bytes(data)
            print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
