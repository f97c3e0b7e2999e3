"""The bus as an AsyncAPI 3 document, made from the types and subjects that the code itself uses.

`docs/asyncapi.json` is its output (`python -m loopback.contracts.asyncapi` prints it). Where a message is an envelope, its
payload is the DSSE envelope, and `x-signed-payload` says what the operator, service or host signed inside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from loopback.contracts import desired, envelope, identity, journal, messages, reports, roster, subjects, view

ASYNCAPI: Final = "3.0.0"
VERSION: Final = (
    "1.0.0"  # of the contracts: the first number changes with a change that old readers cannot bear
)
_REF: Final = "#/components/schemas/{name}"

_PARAMETERS: Final = {
    "workspace": "a workspace's token",
    "host": "a host's token",
    "rollout": "a rollout's token",
    "command": "the id of a command",
    "event": "name of a rollout's event",
    "service": "eligibility, delivery, activation or telemetry",
    "kind": "workspace, entitlement, host, invite or pool",
    "source": "32 hex digits that stand for what fills a set",
    "slice": "number of a slice, from 0",
    "keyid": "SHA-256, in hex, of an invitation's public key",
    "name": "a record's token",
    "module": "a module's token",
    "digest": "SHA-256 in hex",
    "chunk": "number of a chunk, from 0",
    "file": "token of a metadata file's name",
}


class Channel(NamedTuple):
    """One kind of subject: who writes what to it, and who reads it. `signed`: the envelope type around the messages."""

    id: str
    address: Callable[[], str]
    about: str
    carries: tuple[Any, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    signed: str = ""


def _p(parameter: str) -> str:
    """Stands for a parameter inside a subject until the subject is made; a token of itself."""
    return f"parameter-{parameter}"


def _commands(service: str, *kinds: Any) -> list[Channel]:
    def channel(kind: Any) -> Channel:
        tag = str(kind.__struct_config__.tag)
        verb = tag.replace(".", "-")
        return Channel(
            f"command.{verb}", lambda: subjects.command(_p("workspace"), service, verb), f"A command to {service}.",
            (kind,), ("operator",), (service,), envelope.COMMAND,
        )  # fmt: skip

    return [channel(kind) for kind in kinds]


def _report(kind: Any, *readers: str) -> Channel:
    tag = str(kind.__struct_config__.tag)
    return Channel(
        f"from-host.{tag}", lambda: subjects.from_host(_p("workspace"), _p("host"), tag),
        "What a host says of itself, signed with its own key.", (kind,), ("host",), readers, envelope.REPORT,
    )  # fmt: skip


CHANNELS: Final[tuple[Channel, ...]] = (
    *_commands("eligibility", messages.WorkspacePut, messages.EntitlementPut, messages.HostPut, messages.HostInvite,
              messages.HostMove, messages.PoolPut),
    *_commands("delivery", messages.ReleasePublish, messages.MetadataPublish),
    *_commands(
        "activation", messages.RolloutStart, messages.RolloutApprove, messages.RolloutPause, messages.RolloutResume,
        messages.RolloutAbort,
    ),
    Channel(
        "result", lambda: subjects.result(_p("workspace"), _p("command")), "The outcome of a command.",
        (messages.Result,), ("eligibility", "delivery", "activation"), ("operator",),
    ),
    Channel(
        "journal", lambda: subjects.journal(_p("workspace"), _p("service"), _p("event")),
        "What a service accepted or refused.", (messages.JournalEntry,), ("eligibility", "delivery", "activation", "telemetry"),
        ("operator",),
    ),
    Channel(
        "record", lambda: subjects.record(_p("workspace"), _p("kind"), _p("name")),
        "A record that eligibility accepted, with the operator's signature.", (messages.Record,), ("eligibility",),
        ("eligibility", "activation", "telemetry", "operator"),
    ),
    Channel(
        "offer", lambda: subjects.offer(_p("workspace"), _p("host")), "What one host may have, and why or why not.",
        (messages.Offer,), ("eligibility",), ("operator",),
    ),
    Channel(
        "verdict", lambda: subjects.verdict(_p("workspace"), _p("rollout"), _p("service")),
        "Eligibility's or delivery's word on a rollout, before its first wave.", (messages.Verdict,),
        ("eligibility", "delivery"), ("activation",),
    ),
    Channel(
        "rollout", lambda: subjects.rollout(_p("workspace"), _p("rollout"), _p("event")),
        "One link of a rollout's hash-chained journal.", (journal.Link,), ("activation",),
        ("activation", "eligibility", "delivery", "operator"),
    ),
    Channel(
        "desired", lambda: subjects.desired(_p("workspace"), _p("host")),
        "What one host should run. The broker republishes it, once stored, to the host's own subject.",
        (desired.DesiredState,), ("activation",), ("activation",), envelope.DESIRED,
    ),
    Channel(
        "roster", lambda: subjects.roster(_p("workspace"), _p("source")),
        "Who fills sets from one source. The broker republishes it, once stored.", (roster.Roster,), ("activation",),
        ("activation", "host"), envelope.ROSTER,
    ),
    Channel(
        "rosters", lambda: subjects.rosters(_p("workspace"), _p("source")), "Where hosts hear of it.", (roster.Roster,),
        ("broker",), ("host",), envelope.ROSTER,
    ),
    Channel(
        "slice", lambda: subjects.slice_of(_p("workspace"), _p("source"), 0).removesuffix("0") + _p("slice"),
        "Some of a roster's members, each as it was signed; the roster has its SHA-256.", (roster.Slice,), ("activation",),
        ("host",),
    ),
    Channel(
        "to-host", lambda: subjects.to_host(_p("workspace"), _p("host"), "desired"),
        "The only subject, but its inbox and rosters, on which a host listens.", (desired.DesiredState,), ("broker",),
        ("host",), envelope.DESIRED,
    ),
    Channel(
        "to-host.identity", lambda: subjects.to_host(_p("workspace"), _p("host"), "identity"),
        "A host's renewed credentials, or its move.", (identity.Granted,), ("eligibility",), ("host",),
    ),
    Channel(
        "from-host.renew", lambda: subjects.from_host(_p("workspace"), _p("host"), "renew"),
        "A host asks for new credentials, signed with its own key. No stream keeps it.", (identity.Renew,), ("host",),
        ("eligibility",), envelope.RENEW,
    ),
    Channel(
        "enrol", lambda: subjects.enrol(_p("keyid")),
        "A claim to an invitation, by whoever holds its token; answered on the sender's inbox.", (identity.Enrol,),
        ("host",), ("eligibility",),
    ),
    _report(reports.Inventory, "telemetry", "eligibility"),
    _report(reports.Status, "telemetry", "activation"),
    _report(reports.Heartbeat, "telemetry"),
    Channel(
        "from-host.otlp", lambda: subjects.from_host(_p("workspace"), _p("host"), "otlp"),
        f"A host's spans ({envelope.OTLP_TRACES}) or metrics ({envelope.OTLP_METRICS}): an OTLP request in protobuf, signed.",
        (), ("host",), ("telemetry",), envelope.OTLP_TRACES,
    ),
    Channel(
        "presence", lambda: subjects.presence(_p("workspace"), _p("host")), "A host was lost, or is back.",
        (messages.Presence,), ("telemetry",), ("activation", "operator"),
    ),
    Channel(
        "view", lambda: view.subject(_p("workspace"), _p("host")),
        "Telemetry's view of a host: an entry of the key-value bucket LB_VIEW.", (view.HostView,), ("telemetry",),
        ("operator", "telemetry"),
    ),
    Channel(
        "catalog", lambda: subjects.catalog(_p("module"), _p("digest")), "A published release.", (messages.Release,),
        ("delivery",), ("eligibility", "activation", "operator"),
    ),
    Channel(
        "blob", lambda: subjects.blob(_p("digest"), 0).removesuffix("0") + _p("chunk"),
        "A chunk of content under its SHA-256: packages, signed policies, large policies' content, TUF targets. Bytes, at most "
        "128 KiB; headers Lb-Size and Lb-Chunks.", (), ("operator", "delivery"),
        ("host", "delivery", "eligibility", "activation"),
    ),
    Channel(
        "tuf", lambda: subjects.tuf(_p("file")), "One file of the TUF repository's metadata. JSON as TUF defines it.", (),
        ("delivery",), ("host", "delivery", "eligibility", "activation", "telemetry", "operator"),
    ),
)  # fmt: skip


def address(channel: Channel) -> str:
    """The channel's subject with its parameters in braces."""
    made = channel.address()
    for parameter in _PARAMETERS:
        made = made.replace(_p(parameter), f"{{{parameter}}}")
    return made


def _name(kind: Any) -> str:
    return str(kind.__name__)


def _message(channel: Channel, kind: Any, schema: Any) -> dict[str, Any]:
    headers = {"$ref": "#/components/schemas/CloudEventHeaders"}
    message: dict[str, Any] = {"name": _name(kind), "contentType": "application/json", "headers": headers}
    if channel.signed:
        message["payload"] = {"$ref": _REF.format(name="Envelope")}
        message["x-payload-type"] = channel.signed
        message["x-signed-payload"] = schema
    else:
        message["payload"] = schema
    return message


def _headers() -> dict[str, Any]:
    names = {
        "ce-specversion": "1.0", "ce-id": "id of the event", "ce-source": "/loopback/<who>", "ce-type": "loopback.<type>",
        "ce-time": "RFC 3339, UTC", "ce-subject": "what it is about", "Nats-Msg-Id": "equals ce-id: the broker drops repeats",
        "traceparent": "W3C trace context",
    }  # fmt: skip
    return {
        "type": "object",
        "description": "CloudEvents 1.0 in NATS's binary mode",
        "properties": {name: {"type": "string", "description": about} for name, about in names.items()},
    }


def document() -> dict[str, Any]:
    """The whole document."""
    kinds = list(dict.fromkeys(kind for channel in CHANNELS for kind in channel.carries))
    everything = [*kinds, messages.Policy, envelope.Envelope]
    schemas, components = msgspec.json.schema_components(everything, ref_template=_REF)
    by_kind = dict(zip(everything, schemas, strict=True))
    for schema in components.values():
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for channel in CHANNELS:
        subject = address(channel)
        carried = {}
        for kind in channel.carries:
            key = f"{_name(kind)}.signed" if channel.signed else _name(kind)
            described[key] = _message(channel, kind, by_kind[kind])
            carried[_name(kind)] = {"$ref": f"#/components/messages/{key}"}
        channels[channel.id] = {
            "address": subject,
            "description": channel.about,
            "parameters": {
                p: {"description": about} for p, about in _PARAMETERS.items() if f"{{{p}}}" in subject
            },
            "messages": carried,
        }
        for action, parties in (("send", channel.writers), ("receive", channel.readers)):
            for party in parties:
                operations[f"{party}.{action}.{channel.id}"] = {
                    "action": action,
                    "channel": {"$ref": f"#/channels/{channel.id}"},
                    "tags": [{"name": party}],
                }
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "Loopback Modules",
            "version": VERSION,
            "description": "Everything that crosses the bus. Names become tokens by contracts/subjects.py: bytes outside "
            "[a-z0-9-] are written as _ and two hex digits.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "localhost:4222",
                "protocol": "nats",
                "description": "NATS with JetStream, 2.15 or later",
            }
        },
        "channels": channels,
        "operations": operations,
        "components": {"messages": described, "schemas": {**components, "CloudEventHeaders": _headers()}},
    }


def text() -> str:
    """The document's file."""
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    print(text(), end="")
