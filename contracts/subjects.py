"""Subjects and stream names: every one of them is made here and nowhere else.

Ids become subject tokens through one function, `token`, because versions and host names contain dots. Tokens are lower
case, since NATS lower-cases the tags from which a host's permissions are filled in.

Streams: LB_CMD (commands), LB_WS_<workspace> (one decision stream each: results, journal, rollouts, desired
states), LB_FLEET (records, offers, verdicts, presence), LB_ROSTER (what fills sets), LB_FROM (signed host
reports), LB_OTLP (host telemetry, in memory), LB_CATALOG, LB_BLOB and LB_TUF (releases, content, repository metadata).
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from loopback.contracts.codes import Code, Refused

MAX_TOKEN: Final = (
    200  # bytes of one escaped token; NATS itself allows far more, people's names do not need it
)
GLOBAL_WORKSPACE: Final = "global"  # commands and results that belong to no workspace (releases, trust)

EVERY: Final = "*"  # in a filter, in the place of a name

STREAM_COMMANDS: Final = "LB_CMD"
STREAM_FLEET: Final = "LB_FLEET"
STREAM_ROSTERS: Final = "LB_ROSTER"
STREAM_REPORTS: Final = "LB_FROM"
STREAM_OTLP: Final = "LB_OTLP"
STREAM_CATALOG: Final = "LB_CATALOG"
STREAM_BLOBS: Final = "LB_BLOB"
STREAM_TUF: Final = "LB_TUF"
BUCKET_VIEW: Final = "LB_VIEW"  # key-value: telemetry's fleet view, key <workspace>.<host>

SERVICES: Final = ("eligibility", "delivery", "activation", "telemetry")

#: The consumers on which the replicas of a service share its work. Whoever could ask one of them for messages, or make it anew
#: with another filter, would take that work away: so nobody but their service is let near them.
DURABLES: Final[dict[str, tuple[str, ...]]] = {
    "eligibility": (
        "eligibility-commands",
        "eligibility-created",
        "eligibility-records",
        "eligibility-releases",
        "eligibility-inventories",
    ),
    "delivery": ("delivery-commands", "delivery-created"),
    "activation": ("activation-commands", "activation-status", "activation-facts"),
    "telemetry": ("telemetry-reports", "telemetry-otlp"),
}

_ESCAPED = re.compile(r"[^a-z0-9-]")
_TOKEN = re.compile(r"(?:[a-z0-9-]|_[0-9a-f]{2})+")


def token(name: str) -> str:
    """Escape any non-empty id into one subject token of `[a-z0-9_-]`; reversed by `untoken`.

    Every byte of its UTF-8 form outside `[a-z0-9-]` becomes `_` and two hex digits.
    Raises Refused(NAME_INVALID) where the id is empty, too long or no text, and for `*`, which in a subject stands for
    every name: a thing of that name would be stored under, and read as, everybody's.
    """
    if name == EVERY:
        raise Refused(
            Code.NAME_INVALID, "the name '*' stands for every name", "choose a name with another character"
        )
    try:
        escaped = _ESCAPED.sub(lambda found: "".join(f"_{byte:02x}" for byte in found[0].encode()), name)
    except UnicodeEncodeError:  # a lone surrogate, as a shell's argument that is not UTF-8 becomes
        raise Refused(
            Code.NAME_INVALID, f"the name {name[:40]!r} is no text", "choose a name in UTF-8"
        ) from None
    if not escaped or len(escaped) > MAX_TOKEN:
        raise Refused(
            Code.NAME_INVALID,
            f"the name {name[:40]!r} is empty or longer than {MAX_TOKEN} bytes once escaped",
            "choose a shorter, non-empty name",
        )
    return escaped


def untoken(escaped: str) -> str:
    """The id behind a token. Raises Refused(NAME_INVALID) for anything `token` cannot have made."""
    if not _TOKEN.fullmatch(escaped):
        raise Refused(Code.NAME_INVALID, f"{escaped[:40]!r} is not an escaped name")
    try:
        name = re.sub(rb"_([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), escaped.encode()).decode()
    except UnicodeDecodeError:
        raise Refused(Code.NAME_INVALID, f"{escaped[:40]!r} is not UTF-8 once unescaped") from None
    if token(name) != escaped:
        raise Refused(Code.NAME_INVALID, f"{escaped[:40]!r} is not the shortest escape of its name")
    return name


def workspace_stream(workspace: str) -> str:
    """The decision stream of a workspace."""
    return f"LB_WS_{token(workspace)}"


def command(workspace: str, service: str, verb: str) -> str:
    """operator → service: a signed command."""
    return f"lb.ws.{token(workspace)}.cmd.{service}.{token(verb)}"


def commands_for(service: str) -> str:
    """Filter: every command to one service, from every workspace."""
    return f"lb.ws.*.cmd.{service}.*"


def result(workspace: str, event_id: str) -> str:
    """The outcome of the command with this event id."""
    return f"lb.ws.{token(workspace)}.result.{token(event_id)}"


def journal(workspace: str, service: str, event: str) -> str:
    """What a service accepted or refused, for people to read later."""
    return f"lb.ws.{token(workspace)}.journal.{service}.{token(event)}"


def rollout(workspace: str, rollout_id: str, event: str) -> str:
    """One link of a rollout's journal. `event` may be `*`, `rollout_id` may be `*`."""
    return f"lb.ws.{token(workspace)}.rollout.{_or_star(rollout_id)}.{_or_star(event)}"


def desired(workspace: str, host: str) -> str:
    """A host's desired state, as activation writes it; republished to `to_host(…, "desired")` once stored."""
    return f"lb.ws.{token(workspace)}.desired.{_or_star(host)}"


def to_host(workspace: str, host: str, what: str) -> str:
    """What one host may read: `desired`, or `identity` (its renewed credentials, its move)."""
    return f"lb.ws.{token(workspace)}.to.{token(host)}.{what}"


def from_host(workspace: str, host: str, what: str) -> str:
    """What one host may write: `inventory`, `status`, `heartbeat`, `otlp`, or `renew`, which no stream keeps."""
    return f"lb.ws.{_or_star(workspace)}.from.{_or_star(host)}.{what}"


def record(workspace: str, kind: str, name: str) -> str:
    """A signed record that eligibility accepted; kind is `workspace`, `entitlement`, `host`, `invite` or `pool`."""
    return f"lb.ws.{_or_star(workspace)}.record.{kind}.{_or_star(name)}"


def roster(workspace: str, key: str) -> str:
    """Who fills sets from one source, as activation writes it; republished to `rosters` once stored. `key`: Source.key."""
    return f"lb.ws.{_or_star(workspace)}.roster.{_or_star(key)}"


def rosters(workspace: str, key: str) -> str:
    """Where hosts of the workspace hear of it."""
    return f"lb.ws.{token(workspace)}.rosters.{_or_star(key)}"


def slice_of(workspace: str, key: str, number: int) -> str:
    """Slice number `number`, from 0, of a roster."""
    return f"lb.ws.{token(workspace)}.slice.{token(key)}.{number}"


def offer(workspace: str, host: str) -> str:
    """What one host may have, by eligibility."""
    return f"lb.ws.{_or_star(workspace)}.offer.{_or_star(host)}"


def verdict(workspace: str, rollout_id: str, service: str) -> str:
    """Eligibility's or delivery's word on a rollout that activation created."""
    return f"lb.ws.{_or_star(workspace)}.verdict.{_or_star(rollout_id)}.{service}"


def presence(workspace: str, host: str) -> str:
    """Telemetry's word that a host was lost or came back."""
    return f"lb.ws.{_or_star(workspace)}.presence.{_or_star(host)}"


def catalog(module: str, digest: str) -> str:
    """A published release; `digest` is the package's SHA-256 in hex."""
    return f"lb.catalog.{_or_star(module)}.{_or_star(digest)}"


def blob(sha256: str, chunk: int) -> str:
    """Chunk number `chunk`, from 0, of the content with this SHA-256 (hex)."""
    return f"lb.blob.{sha256}.{chunk}"


def blob_chunks(sha256: str) -> str:
    """Filter: every chunk of the content with this SHA-256 (hex), or of all content."""
    return f"lb.blob.{sha256}.*"


def tuf(filename: str) -> str:
    """One file of the TUF metadata repository, for example `2.root.json`."""
    return f"lb.tuf.{token(filename)}"


def tuf_files() -> str:
    """Filter: every file of the TUF metadata repository."""
    return "lb.tuf.*"


def tuf_name(subject: str) -> str | None:
    """The file behind such a subject; None for a subject that `tuf` cannot have made."""
    try:
        name = untoken(subject.removeprefix("lb.tuf."))
    except Refused:
        return None
    return name if tuf(name) == subject else None


def direct_get(stream: str, subject: str) -> str:
    """The API subject that returns the last stored message of `subject`."""
    return f"$JS.API.DIRECT.GET.{stream}.{subject}"


def inbox(host: str) -> str:
    """A client's own inbox prefix."""
    return f"_INBOX.{token(host)}"


def enrol(claim_keyid: str) -> str:
    """Where whoever holds the token of this key claims to be its host; answered on an inbox below `enrol_inbox`."""
    return f"lb.enrol.{token(claim_keyid)}"


def enrol_inbox(claim_keyid: str) -> str:
    """The inbox prefix of whoever enrols."""
    return f"_INBOX.enrol.{token(claim_keyid)}"


class Parsed(NamedTuple):
    """A workspace subject, taken apart: `lb.ws.<workspace>.<area>.<rest…>`, names unescaped."""

    workspace: str
    area: str
    rest: tuple[str, ...]


def parse(subject: str) -> Parsed:
    """Take a workspace subject apart. Raises Refused(COMMAND_WRONG_SUBJECT) if it is not one."""
    parts = subject.split(".")
    if len(parts) < 5 or parts[:2] != ["lb", "ws"]:
        raise Refused(Code.COMMAND_WRONG_SUBJECT, f"{subject[:120]!r} is not a workspace subject")
    return Parsed(untoken(parts[2]), parts[3], tuple(untoken(p) for p in parts[4:]))


def _or_star(name: str) -> str:
    return name if name == EVERY else token(name)
