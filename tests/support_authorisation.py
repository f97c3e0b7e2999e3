"""Who may do what on the bus, written down by intent and not read off the permissions: one row for each grant, with its reason.

A cell is one credential, one subject, and publishing or subscribing. The host is `web-1` in the workspace `prod`; `other` and
`web-2` are what is not its own. The subjects are every kind that the contracts know, and every JetStream and system request
that the very server program knows, for every stream: a newer server brings its new requests into the matrix by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from golden_contracts import SHA

from loopback.contracts import subjects, view

OPERATOR, HOST, ENROL = "operator", "host", "enrol"  # `enrol`: whoever holds the token of an invitation
SERVICES = subjects.SERVICES
EVERYBODY = (OPERATOR, HOST, ENROL, *SERVICES)
#: `admin` makes the streams and is used by nobody else; it may do everything, and there is nothing to compare.
STREAMS = (
    subjects.STREAM_COMMANDS, subjects.STREAM_FLEET, subjects.STREAM_REPORTS, subjects.STREAM_OTLP, subjects.STREAM_CATALOG,
    subjects.STREAM_BLOBS, subjects.STREAM_TUF, subjects.STREAM_ROSTERS, view.STREAM, "LB_WS_prod", "LB_WS_other",
    "LB_WS_global", "ANOTHER",
)  # fmt: skip
WORKSPACE_STREAMS = ("LB_WS_prod", "LB_WS_other", "LB_WS_global", "ANOTHER")


class Row(NamedTuple):
    """Those `who` may do it (`publish`, `subscribe`) with subjects that match `pattern`, because of `why`."""

    verb: str
    pattern: str
    who: tuple[str, ...]
    why: str


def matches(pattern: str, subject: str) -> bool:
    """NATS's own rule: `*` is one token, `>` one or more at the end. The subject may be a wildcard, which must lie inside."""
    wanted, found = pattern.split("."), subject.split(".")
    for place, token in enumerate(wanted):
        if token == ">":
            return len(found) > place
        if place >= len(found) or found[place] == ">" or (token != "*" and token != found[place]):
            return False
    return len(wanted) == len(found)


def reads(who: tuple[str, ...], stream: str, why: str) -> Iterator[Row]:
    """Reading a stream: single messages, and a consumer of one's own."""
    for verb in (
        "STREAM.INFO.{}", "STREAM.MSG.GET.{}", "DIRECT.GET.{}", "DIRECT.GET.{}.>", "CONSUMER.CREATE.{}.>",
        "CONSUMER.INFO.{}.>", "CONSUMER.MSG.NEXT.{}.>",
    ):  # fmt: skip
        yield Row("publish", f"$JS.API.{verb.format(stream)}", who, why)


def works(service: str, durable: str) -> Iterator[Row]:
    """Sharing work: acknowledging on the service's own consumer, and on no other's. Making it and asking it is reading."""
    yield Row("publish", f"$JS.ACK.*.{durable}.>", (service,), f"{service}'s replicas share this work")


def rows() -> Iterator[Row]:
    """Every grant that is meant."""
    yield Row("publish", "lb.ws.*.cmd.>", (OPERATOR,), "operators command")
    yield Row(
        "publish", "lb.blob.*.*", (OPERATOR, "delivery"), "packages and policies; the first trust document"
    )
    yield Row(
        "publish", "lb.ws.*.result.*", ("eligibility", "delivery", "activation"), "outcomes of commands"
    )
    for service in SERVICES:
        yield Row("publish", f"lb.ws.*.journal.{service}.>", (service,), "its own journal")
        yield Row("subscribe", f"_INBOX.{service}.>", (service,), "answers to it")
        for word in ("PING", "INFO", "STATS"):
            for tail in ("", f".{service}", f".{service}.*"):
                yield Row("subscribe", f"$SRV.{word}{tail}", (service,), "NATS's questions to services")
    yield Row("publish", "_INBOX.operator.>", SERVICES, "answers to NATS's questions to services")
    yield Row("publish", "_INBOX.admin.>", SERVICES, "the same")
    yield Row("publish", "lb.ws.*.record.>", ("eligibility",), "records")
    yield Row("publish", "lb.ws.*.offer.*", ("eligibility",), "offers")
    yield Row("publish", "lb.ws.*.verdict.*.eligibility", ("eligibility",), "its verdict")
    yield Row("publish", "lb.ws.*.to.*.identity", ("eligibility",), "hosts' renewed credentials, and moves")
    yield Row("publish", "_INBOX.enrol.*.>", ("eligibility",), "answers to whoever enrols")
    # The server takes a subscription to `lb.enrol.>` for one that `lb.enrol.*` allows; nobody may publish anything deeper.
    for enrol in ("lb.enrol.*", "lb.enrol.>"):
        yield Row("subscribe", enrol, ("eligibility",), "claims to invitations")
    yield Row("subscribe", "lb.ws.*.from.*.renew", ("eligibility",), "hosts that ask for new credentials")
    yield Row("publish", f"lb.enrol.{SHA}", (ENROL,), "its claim")
    yield Row("subscribe", f"_INBOX.enrol.{SHA}.>", (ENROL,), "the answer to it")
    yield Row("publish", "lb.ws.*.verdict.*.delivery", ("delivery",), "its verdict")
    yield Row("publish", "$JS.API.STREAM.PURGE.LB_BLOB", ("delivery",), "clearing content that nobody names")
    yield Row("publish", "lb.catalog.*.*", ("delivery",), "releases")
    yield Row("publish", "lb.tuf.*", ("delivery",), "repository metadata")
    yield Row("publish", "lb.ws.*.rollout.*.*", ("activation",), "rollouts' journals")
    yield Row("publish", "lb.ws.*.desired.*", ("activation",), "desired states")
    yield Row("publish", "lb.ws.*.roster.*", ("activation",), "who fills sets")
    yield Row("publish", "lb.ws.*.slice.*.*", ("activation",), "the same, in parts")
    yield Row("publish", "lb.ws.*.presence.*", ("telemetry",), "lost hosts")
    yield Row("publish", "$KV.LB_VIEW.>", ("telemetry",), "the fleet view")
    yield Row("publish", "$JS.API.STREAM.CREATE.*", ("eligibility",), "a new workspace's stream")
    yield Row("publish", "$SRV.>", (OPERATOR,), "asking services how they are")
    for word in ("INFO", "STREAM.NAMES"):
        yield Row("publish", f"$JS.API.{word}", (OPERATOR, *SERVICES), "what server this is")
    yield Row("publish", "$JS.API.STREAM.LIST", (OPERATOR,), "an operator may look at everything")
    yield Row("subscribe", "_INBOX.operator.>", (OPERATOR,), "answers to it")
    yield Row("subscribe", "lb.ws.>", (OPERATOR,), "an operator may look at everything")
    yield Row("subscribe", "lb.catalog.>", (OPERATOR,), "an operator may look at everything")
    # What a host may do: its own, by name, and what is signed and public.
    yield Row("publish", "lb.ws.prod.from.web-1.>", (HOST,), "its own reports")
    yield Row("subscribe", "lb.ws.prod.to.web-1.>", (HOST,), "what it is told")
    yield Row("subscribe", "_INBOX.web-1.>", (HOST,), "answers to it")
    yield Row("publish", "$JS.API.DIRECT.GET.*.lb.ws.prod.desired.web-1", (HOST,), "its own desired state")
    for rosters in ("lb.ws.prod.rosters.*", "lb.ws.prod.rosters.>"):  # as with lb.enrol
        yield Row("subscribe", rosters, (HOST,), "who fills sets in its workspace")
    yield Row("publish", "$JS.API.DIRECT.GET.LB_ROSTER.lb.ws.prod.roster.*", (HOST,), "the same, read again")
    yield Row("publish", "$JS.API.DIRECT.GET.LB_ROSTER.lb.ws.prod.slice.*.*", (HOST,), "the same, in parts")
    yield Row("publish", "$JS.API.DIRECT.GET.LB_BLOB.lb.blob.>", (HOST,), "content, by its digest")
    yield Row("publish", "$JS.API.DIRECT.GET.LB_TUF.lb.tuf.>", (HOST,), "signed metadata")
    # Reading streams. Workspaces' streams share no token that a wildcard could name, so `*` stands in their place, and
    # what it would let in besides is denied.
    for stream in STREAMS:
        yield from reads((OPERATOR,), stream, "an operator may look at everything")
    for service in SERVICES:
        for stream in (subjects.STREAM_TUF, subjects.STREAM_BLOBS):
            yield from reads((service,), stream, "trust and content")
        yield Row(
            "publish", f"$JS.API.STREAM.INFO.{subjects.STREAM_COMMANDS}", (service,), "the broker's clock"
        )
        for durable in subjects.DURABLES[service]:
            yield from works(service, durable)
    shared = (
        subjects.STREAM_FLEET, subjects.STREAM_CATALOG, subjects.STREAM_COMMANDS, subjects.STREAM_ROSTERS, *WORKSPACE_STREAMS,
    )  # fmt: skip
    for service in ("eligibility", "activation"):
        for stream in (*shared, subjects.STREAM_REPORTS):
            yield from reads((service,), stream, "decisions, records, releases, reports")
    for stream in shared:
        yield from reads(("delivery",), stream, "decisions, records, releases")
    for stream in (subjects.STREAM_REPORTS, subjects.STREAM_OTLP, subjects.STREAM_FLEET, view.STREAM):
        yield from reads(("telemetry",), stream, "reports, records and its own view")


#: Nobody may do this, whatever a wildcard in a row above would let in.
def denied(who: str, subject: str) -> bool:
    """Whether the subject names a consumer that another service's replicas share, or acknowledges for it."""
    tokens = subject.split(".")
    foreign = {d for service, durables in subjects.DURABLES.items() if service != who for d in durables}
    if subject.startswith("$JS.ACK."):
        return len(tokens) > 3 and tokens[3] in foreign
    if subject.startswith(("$JS.API.CONSUMER.CREATE.", "$JS.API.CONSUMER.INFO.")):
        return len(tokens) > 5 and tokens[5] in foreign
    if subject.startswith("$JS.API.CONSUMER.MSG.NEXT."):
        return len(tokens) > 6 and tokens[6] in foreign
    return False


_JETSTREAM = """
INFO ACCOUNT.PURGE.* ACCOUNT.STREAM.CANCEL_MOVE.*.* ACCOUNT.STREAM.MOVE.*.* META.LEADER.STEPDOWN META.RESCUE SERVER.EVACUATE
SERVER.REMOVE STREAM.CREATE.* STREAM.UPDATE.* STREAM.DELETE.* STREAM.INFO.* STREAM.LIST STREAM.NAMES STREAM.PURGE.*
STREAM.MSG.GET.* STREAM.MSG.DELETE.* STREAM.SNAPSHOT.* STREAM.RESTORE.* STREAM.LEADER.STEPDOWN.* STREAM.PEER.REMOVE.*
STREAM.PEER.EVACUATE.* STREAM.CANCEL_MOVE.* STREAM.TEMPLATE.CREATE.* DIRECT.GET.* DIRECT.GET.*.* CONSUMER.CREATE.*
CONSUMER.CREATE.*.* CONSUMER.DURABLE.CREATE.*.* CONSUMER.DELETE.*.* CONSUMER.INFO.*.* CONSUMER.LIST.* CONSUMER.NAMES.*
CONSUMER.LEADER.STEPDOWN.*.* CONSUMER.PAUSE.*.* CONSUMER.RESET.*.* CONSUMER.UNPIN.*.* CONSUMER.PEER.REMOVE.*.*
CONSUMER.PEER.EVACUATE.*.* CONSUMER.MSG.NEXT.*.*
"""
_SYSTEM = """
REQ.ACCOUNT.*.* REQ.ACCOUNT.*.CLAIMS.LOOKUP REQ.ACCOUNT.*.CLAIMS.UPDATE REQ.ACCOUNT.NSUBS REQ.ACCOUNT.PING.* REQ.CLAIMS.DELETE
REQ.CLAIMS.LIST REQ.CLAIMS.PACK REQ.CLAIMS.UPDATE REQ.SERVER.*.* REQ.SERVER.*.KICK REQ.SERVER.*.LDM REQ.SERVER.*.RELOAD
REQ.SERVER.PING REQ.SERVER.PING.* REQ.USER.*.INFO REQ.USER.AUTH REQ.USER.INFO DEBUG.SUBSCRIBERS
"""
#: Every JetStream and system request; a test holds this list to the server's own program.
REQUESTS = tuple([f"$JS.API.{n}" for n in _JETSTREAM.split()] + [f"$SYS.{n}" for n in _SYSTEM.split()])


def unknown_requests(server: Path) -> list[str]:
    """Requests that are written in the server's program and not above.

    Go puts strings behind each other without a gap, so a word may end in the beginning of the next one ("LIST" "NATS").
    """
    words = re.findall(
        rb"\$(?:JS\.API|SYS\.REQ|SYS\.DEBUG)(?:\.(?:[A-Z][A-Z_]+|\*|%s))+", server.read_bytes()
    )
    found = {word.decode().replace("%s", "*") for word in words}
    return sorted(
        word
        for word in found
        if not word.startswith(REQUESTS) and not any(known.startswith(word + ".") for known in REQUESTS)
    )


def subjects_of() -> list[str]:
    """Every subject of the matrix."""
    found: dict[str, None] = {}
    for workspace in ("prod", "other", "global"):
        for host in ("web-1", "web-2"):
            for what in ("inventory", "status", "heartbeat", "otlp", "renew"):
                found[subjects.from_host(workspace, host, what)] = None
            for what in ("desired", "identity"):
                found[subjects.to_host(workspace, host, what)] = None
            for made in (
                subjects.desired(workspace, host), subjects.offer(workspace, host), subjects.presence(workspace, host),
                subjects.record(workspace, "host", host), view.subject(workspace, host),
                subjects.direct_get("LB_WS_prod", subjects.desired(workspace, host)),
                subjects.direct_get("LB_FROM", subjects.from_host(workspace, host, "status")),
            ):  # fmt: skip
                found[made] = None
        for service in SERVICES:
            for verb in ("rollout-start", "host-put", "metadata-publish"):
                found[subjects.command(workspace, service, verb)] = None
            found[subjects.journal(workspace, service, "accepted")] = None
            found[subjects.verdict(workspace, "r1", service)] = None
        for made in (subjects.roster(workspace, SHA), subjects.slice_of(workspace, SHA, 1)):
            found[made] = None
            found[subjects.direct_get("LB_ROSTER", made)] = None
        found[subjects.rosters(workspace, SHA)] = None
        found[subjects.result(workspace, "c1")] = None
        found[subjects.rollout(workspace, "r1", "created")] = None
        for kind in ("workspace", "entitlement"):
            found[subjects.record(workspace, kind, "x")] = None
    for plain in (
        subjects.catalog("firewall", SHA), subjects.blob(SHA, 0), subjects.tuf("timestamp.json"), subjects.enrol(SHA),
        subjects.enrol("ab" * 32),
        subjects.direct_get("LB_BLOB", subjects.blob(SHA, 0)), subjects.direct_get("LB_TUF", subjects.tuf("1.root.json")),
        subjects.direct_get("LB_CMD", subjects.command("prod", "activation", "rollout-start")),
        f"{subjects.enrol_inbox(SHA)}.x",
    ):  # fmt: skip
        found[plain] = None
    for name in (*SERVICES, OPERATOR, "admin", "web-1", "web-2", "_sys"):
        found[f"_INBOX.{name}.x"] = None
    for service in SERVICES:
        for word in ("PING", "INFO", "STATS"):
            for tail in ("", f".{service}", f".{service}.id"):
                found[f"$SRV.{word}{tail}"] = None
    durables = ["a-reader", *(d for names in subjects.DURABLES.values() for d in names)]
    for pattern in REQUESTS:
        for made in _filled(pattern, durables):
            found[made] = None
    for stream in STREAMS:
        for durable in durables:
            found[f"$JS.API.CONSUMER.CREATE.{stream}.{durable}.lb.ws.prod.x"] = None
            found[f"$JS.ACK.{stream}.{durable}.1.1.1.1.1"] = None
        found[f"$JS.FC.{stream}.x.y"] = None
        found[f"$JS.SNAPSHOT.RESTORE.{stream}.x"] = None
    for internal in (
        "$JSC.SYNC", "$NRG.V.x", "$JS.EVENT.ADVISORY.API", "$SYS.ACCOUNT.x.CLAIMS.UPDATE", "$SYS.REQ.USER.AUTH",
        "$G.x", "anything.else",
    ):  # fmt: skip
        found[internal] = None
    return list(found)


#: What somebody who wants to hear everything would try.
WIDE = (
    ">", "*.>", "lb.>", "lb.ws.>", "lb.ws.*.to.>", "lb.ws.prod.>", "lb.ws.prod.to.*.desired", "lb.ws.*.to.web-1.desired",
    "lb.ws.prod.from.>", "lb.ws.*.cmd.>", "lb.ws.*.rosters.*", "lb.ws.prod.roster.*", "lb.ws.prod.rosters.>",
    "lb.blob.>", "lb.tuf.>", "lb.catalog.>", "lb.enrol.>", "_INBOX.>", "_INBOX.*.x",
    "_INBOX.web-1.>", "_INBOX.web-2.>", "_INBOX.operator.>", "$JS.>", "$JS.API.>", "$KV.>", "$SRV.>", "$SYS.>",
    "$NRG.>", "$JSC.>",
)  # fmt: skip


def _filled(pattern: str, durables: list[str]) -> Iterator[str]:
    stars = pattern.count("*")
    consumer = ".CONSUMER." in pattern
    if stars == 0:
        yield pattern
        return
    for stream in STREAMS:
        one = pattern.replace("*", stream, 1)
        if stars == 1:
            yield one
        else:
            for second in durables if consumer else ("a-reader",):
                yield one.replace("*", second)


def meant(who: str, verb: str, subject: str, table: list[Row]) -> bool:
    """Whether the rows grant this cell."""
    if verb == "publish" and denied(who, subject):
        return False
    return any(row.verb == verb and who in row.who and matches(row.pattern, subject) for row in table)
