"""Who did what in a workspace: acts, from the signed commands themselves, held against what services say of them. Pure.

A service's journal entry is its word; the command in LB_CMD, a record's envelope and the envelope inside a rollout's link are
signed by people. Every one of them is verified here again. Entries are not chained, because three services write them at once:
what would be lost with one is in the signed command, and a command without an outcome, or an outcome without its command, is
reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import msgspec

from loopback.cli.evidence import RECORDS, Evidence, Stored
from loopback.contracts import envelope, journal, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.envelope import Envelope
from loopback.contracts.messages import AnyCommand, Command, JournalEntry, Result, decode_command
from loopback.contracts.trustdoc import Role, Trust
from loopback.contracts.verbs import VERBS

SKEW: Final = timedelta(minutes=2)  # twice what services allow between an operator's clock and the broker's
#: A command may wait for its service; once the service has worked on a later one, and so long after, its outcome is missed.
ANSWERED: Final = timedelta(minutes=10)

_ENTRIES: Final = Decoder(msgspec.json.Decoder(JournalEntry))
_RESULTS: Final = Decoder(msgspec.json.Decoder(Result))

Standing = Literal["ok", "past", "role", "unknown", "bad", "gone"]
STANDINGS: Final[Mapping[Standing, str]] = {
    "ok": "signature ok",
    "past": "signature ok, by a key that no longer counts",
    "role": "signature ok, by somebody who may not do this now",
    "unknown": "not verifiable: by a key that no trust document here names",
    "bad": "the signature does not hold",
    "gone": "not verifiable: the command is older than the stream keeps",
}


class Signed(NamedTuple):
    """What an envelope's signatures are worth: the names and keys of those whose signatures hold."""

    standing: Standing
    operators: tuple[str, ...] = ()
    keyids: tuple[str, ...] = ()
    said: str = ""


class Act(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One act. `who` are operators by verified signature, or the service that decided by itself; `on` is what it was done to.

    `outcome` is "accepted", "refused", "unanswered" or "decided" (a service's own); `source` where it is stored.
    """

    at: datetime
    what: str
    who: tuple[str, ...]
    on: str = ""
    outcome: str = "accepted"
    reason: str = ""
    code: str = ""
    signature: str = ""
    keyids: tuple[str, ...] = ()
    rollout: str = ""
    hosts: tuple[str, ...] = ()
    command: str = ""
    source: str = ""


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that does not fit together. `evidence`: it speaks of something removed, altered or invented."""

    what: str
    words: str
    evidence: bool = True


class Audit(NamedTuple):
    """Acts in order of time, and what does not fit."""

    acts: tuple[Act, ...]
    findings: tuple[Finding, ...]


def signed(sealed: Envelope, trusts: Sequence[Trust], role: Role, workspace: str) -> Signed:
    """Verify an operator's command by the current trust document (first), or by one of those before it."""
    for number, trust in enumerate(trusts):
        try:
            _, keyids = envelope.open_envelope(sealed, envelope.COMMAND, trust.operator_keys)
        except Refused as refused:
            if refused.code is Code.SIGNATURE_UNKNOWN_KEY:
                continue
            return Signed("bad", said=refused.reason)
        names = tuple(trust.operators[k].name for k in keyids)
        if number:
            return Signed("past", names, keyids)
        try:
            names = trust.authorise(keyids, role, workspace)
        except Refused as refused:
            return Signed("role", names, keyids, refused.reason)
        return Signed("ok", names, keyids)
    return Signed("unknown", keyids=tuple(s.keyid for s in sealed.signatures))


class _Command(NamedTuple):
    """A stored command, as far as it reads."""

    stored: Stored
    id: str
    kind: str
    command: AnyCommand | None
    envelope: Envelope | None
    signed: Signed


class Auditor:
    """Puts the parts together; `kept` is how long LB_CMD keeps a command."""

    def __init__(self, evidence: Evidence, trusts: Sequence[Trust], kept: timedelta) -> None:
        self.evidence = evidence
        self.trusts = trusts
        self.kept = kept
        self.acts: list[Act] = []
        self.findings: list[Finding] = []
        self.commands = [self._command(stored) for stored in evidence.commands]
        self.by_id = {c.id: c for c in self.commands if c.id}
        self._told: set[str] = set()  # commands that an act tells of

    def run(self, links: Iterable[journal.Link]) -> Audit:
        """Everything, in order of time."""
        entries = list(self._entries())
        self._results(entries)
        self._commands(entries)
        self._orphans(entries)
        for link in links:
            self._link(link)
        for stored in self.evidence.records:
            self._record(stored)
        order = sorted(self.acts, key=lambda act: (act.at, act.source))
        return Audit(tuple(order), tuple(self.findings))

    def _find(self, what: str, words: str, *, evidence: bool = True) -> None:
        self.findings.append(Finding(what, words, evidence))

    def _old(self, at: datetime) -> bool:
        """Whether a command of that time may have left LB_CMD by its age."""
        return self.evidence.at - aware(at) >= self.kept

    # Commands, and what services say of them

    def _command(self, stored: Stored) -> _Command:
        try:
            sealed = envelope.parse(stored.data)
            command = decode_command(envelope.payload_of(sealed))
        except (Refused, msgspec.MsgspecError, RecursionError) as error:
            said = error.reason if isinstance(error, Refused) else str(error)
            return _Command(stored, "", "", None, None, Signed("bad", said=f"it is no command: {said}"))
        kind = str(command.__struct_config__.tag)
        found = signed(sealed, self.trusts, VERBS[type(command)].role, command.workspace)
        return _Command(stored, command.id, kind, command, sealed, found)

    def _entries(self) -> Iterator[tuple[Stored, JournalEntry]]:
        for stored in self.evidence.journal:
            if ".journal." in stored.subject:
                try:
                    yield stored, _ENTRIES.decode(stored.data)
                except (msgspec.MsgspecError, RecursionError) as error:
                    self._find("journal entry", f"{_place(stored)} does not read: {error}")

    def _results(self, entries: Sequence[tuple[Stored, JournalEntry]]) -> None:
        """Result and entry are one batch: one without the other was removed."""
        told = {(e.service, e.command) for _, e in entries if e.command}
        for stored in self.evidence.journal:
            if ".result." not in stored.subject:
                continue
            try:
                result = _RESULTS.decode(stored.data)
            except (msgspec.MsgspecError, RecursionError) as error:
                self._find("result", f"{_place(stored)} does not read: {error}")
                continue
            if (result.service, result.command) not in told:
                self._find(
                    "journal entry removed",
                    f"{result.service} answered {result.command_type or 'command'} {result.command} at {_time(result.at)}, "
                    "but its journal has no entry of it",
                )

    def _commands(self, entries: Sequence[tuple[Stored, JournalEntry]]) -> None:
        known: dict[int, list[tuple[Stored, JournalEntry]]] = {}
        for stored, entry in entries:
            if entry.command or entry.sequence:
                known.setdefault(self._sequence(entry), []).append((stored, entry))
        last: dict[str, int] = {}
        for _, entry in entries:
            last[entry.service] = max(last.get(entry.service, 0), self._sequence(entry))
        for one in self.commands:
            answers = known.get(one.stored.sequence, [])
            service = "".join(one.stored.subject.split(".")[4:5])
            for _, entry in answers:
                self._compare(one, entry)
            decided = answers[-1][1] if answers else None
            waited = self.evidence.at - one.stored.time
            overdue = last.get(service, 0) > one.stored.sequence and waited >= ANSWERED
            if decided is None and overdue:
                self._find(
                    "outcome missing",
                    f"{one.kind or 'what is'} at {_place(one.stored)}{_by(one.signed.operators)} has no outcome, though "
                    f"{service} has answered later ones: entries were removed, or it was never looked at",
                )
            outcome = "unanswered" if decided is None else decided.event
            self._act(one, outcome, decided)

    def _act(self, one: _Command, outcome: str, entry: JournalEntry | None) -> None:
        refusal = entry.refusal if entry else None
        self._told.add(one.id)
        self.acts.append(
            Act(
                at=one.stored.time,
                what=one.kind or "malformed command",
                who=one.signed.operators or ("nobody known",),
                on=_object(one.command),
                outcome=outcome,
                reason=refusal.reason if refusal else "",
                code=str(refusal.code) if refusal else "",
                signature=_signature(one.signed),
                keyids=one.signed.keyids,
                rollout=str(getattr(one.command, "rollout", "")),
                hosts=_hosts(one.command),
                command=one.id,
                source=_place(one.stored),
            )
        )

    def _compare(self, one: _Command, entry: JournalEntry) -> None:
        """Hold an entry against the command that it is about."""
        name = f"{entry.command_type or one.kind or 'command'} {entry.command or one.id}"
        if entry.sha256 and entry.sha256 != hashlib.sha256(one.stored.data).hexdigest():
            self._find(
                "command altered",
                f"{name}: what is at {_place(one.stored)} is not what {entry.service} saw there",
            )
            return
        if entry.event != "accepted":
            return
        command = one.command
        if command is not None and not _held(command, one.stored.time):
            self._find(
                "stored at another time",
                f"{entry.service} accepted {name}, which held from {_time(command.issued_at)} to {_time(command.expires_at)}, "
                f"but it was stored at {_time(one.stored.time)}",
            )
        if one.signed.standing == "bad":
            self._find(
                "accepted without a signature", f"{entry.service} accepted {name}, but {one.signed.said}"
            )
        elif one.signed.standing in ("ok", "past", "role") and set(entry.operators) - set(
            one.signed.operators
        ):
            self._find(
                "another name",
                f"{entry.service} says that {_names(entry.operators)} signed {name}; it was {_names(one.signed.operators)}",
            )

    def _sequence(self, entry: JournalEntry) -> int:
        """The command's place in LB_CMD; services of before did not say it."""
        if entry.sequence:
            return entry.sequence
        found = self.by_id.get(entry.command)
        return found.stored.sequence if found else 0

    def _orphans(self, entries: Sequence[tuple[Stored, JournalEntry]]) -> None:
        """Entries whose command is not stored, and those that are about no command: a refused report."""
        sequences = {c.stored.sequence for c in self.commands}
        for stored, entry in entries:
            if self._sequence(entry) in sequences:
                continue
            if self.evidence.workspace != subjects.GLOBAL_WORKSPACE and _workspace(entry.subject) not in (
                self.evidence.workspace,
                subjects.GLOBAL_WORKSPACE,
            ):
                continue  # of a workspace that was not there yet: its commands were not read
            about_command = bool(entry.command)
            if about_command and not self._old(entry.at):
                self._find(
                    "command removed",
                    f"{entry.service} {entry.event} {entry.command_type or 'command'} {entry.command} at {_time(entry.at)}, "
                    f"but {subjects.STREAM_COMMANDS} has no such command",
                )
            self.acts.append(
                Act(
                    at=aware(entry.at),
                    what=entry.command_type or ("report" if not about_command else "command"),
                    who=tuple(entry.operators) if about_command else (entry.service,),
                    on=entry.subject,
                    outcome=entry.event,
                    reason=entry.refusal.reason if entry.refusal else "",
                    code=str(entry.refusal.code) if entry.refusal else "",
                    signature=STANDINGS["gone"] if about_command else "",
                    keyids=entry.keys,
                    command=entry.command,
                    source=_place(stored),
                )
            )

    # Envelopes that outlive LB_CMD

    def _envelope(self, sealed: Envelope, claimed: tuple[str, ...] | None, where: str, at: datetime) -> None:
        """Verify an envelope inside a record or a link, hold it against the command, and tell of it where that is gone."""
        try:
            command = decode_command(envelope.payload_of(sealed))
        except (Refused, msgspec.MsgspecError, RecursionError) as error:
            self._find("malformed envelope", f"{where} holds no command: {error}")
            return
        kind = str(command.__struct_config__.tag)
        found = signed(sealed, self.trusts, VERBS[type(command)].role, command.workspace)
        if found.standing == "bad":
            self._find("signature", f"{where}: {found.said}")
        elif found.standing != "unknown" and claimed is not None and set(claimed) - set(found.operators):
            self._find(
                "another name",
                f"{where} says {_names(claimed)}, but it was signed by {_names(found.operators)}",
            )
        stored = self.by_id.get(command.id)
        if stored is not None:
            if stored.envelope is not None and stored.envelope.payload != sealed.payload:
                self._find("command altered", f"{where} holds another {kind} than {_place(stored.stored)}")
        elif command.workspace == self.evidence.workspace and not self._old(at):
            self._find(
                "command removed",
                f"{where} follows from {kind} {command.id}, which {subjects.STREAM_COMMANDS} has not",
            )
        if command.id not in self._told:
            self._told.add(command.id)
            self.acts = [a for a in self.acts if a.command != command.id]  # the entry alone knew less
            self.acts.append(
                Act(
                    at=aware(command.issued_at), what=kind, who=found.operators or ("nobody known",), on=_object(command),
                    signature=_signature(found), keyids=found.keyids, rollout=str(getattr(command, "rollout", "")),
                    hosts=_hosts(command), command=command.id, source=where,
                )
            )  # fmt: skip

    def _record(self, stored: Stored) -> None:
        try:
            record = RECORDS.decode(stored.data)
        except (msgspec.MsgspecError, RecursionError) as error:
            self._find("record", f"{_place(stored)} does not read: {error}")
            return
        claimed = record.operators or None
        self._envelope(record.envelope, claimed, f"the record of {record.kind} {record.name}", stored.time)

    def _link(self, link: journal.Link) -> None:
        event = link.event
        where = f"link {link.seq} ({event.name}) of rollout {link.rollout}"
        operators: tuple[str, ...] = getattr(event, "operators", ())
        sealed: Envelope | None = getattr(event, "envelope", None)
        if sealed is not None:
            self._envelope(sealed, operators, where, link.at)
        elif operators:
            self._claim(link, operators, where)
        if isinstance(event, journal.Created):
            self._created(link, event, where)
        if not operators and event.name in DECISIONS:
            refusal = getattr(event, "refusal", None)
            self.acts.append(
                Act(
                    at=aware(link.at), what=f"rollout {event.name}", who=("activation",), on=link.rollout, outcome="decided",
                    reason=str(getattr(event, "reason", "")) or (refusal.reason if refusal else ""),
                    code=str(refusal.code) if refusal else "", rollout=link.rollout, source=where,
                )
            )  # fmt: skip

    def _claim(self, link: journal.Link, operators: tuple[str, ...], where: str) -> None:
        """A link names operators without their envelope: there must be a command of theirs."""
        asked = any(
            getattr(c.command, "rollout", None) == link.rollout
            and c.stored.time - aware(link.at) <= ANSWERED
            and set(operators) <= set(c.signed.operators)
            for c in self.commands
        )
        if not asked and not self._old(link.at):
            self._find(
                "another name", f"{where} names {_names(operators)}, but no command of theirs asks for it"
            )

    def _created(self, link: journal.Link, event: journal.Created, where: str) -> None:
        try:
            start = event.start()
        except Refused as refused:
            self._find("created", f"{where}: {refused.reason}")
            return
        package = "" if start.scope.absent else start.scope.packages.get(start.version, "")
        asked = (start.rollout, start.workspace, start.module, start.version, package, start.scope.policy)
        if (link.rollout, link.workspace, event.module, event.version, event.package, event.policy) != asked:
            self._find("created", f"{where} says other things than the command inside it")


#: What activation decides by itself and people want to read; the rest is in 'loopback rollout show'.
DECISIONS: Final = frozenset(
    {"started", "wave-failed", "wave-inconclusive", "paused", "halted", "rolling-back", "done", "rolled-back",
     "rollback-incomplete", "canceled", "refused"}
)  # fmt: skip


def chosen(
    acts: Iterable[Act], *, since: datetime | None = None, rollout: str = "", host: str = "", operator: str = "",
    members: Mapping[str, Iterable[str]] | None = None,
) -> list[Act]:  # fmt: skip
    """Those acts that were asked for. `members` are the hosts of each rollout."""
    of_host = {name for name, hosts in (members or {}).items() if host in hosts}
    return [
        act
        for act in acts
        if (since is None or act.at >= since)
        and (not rollout or act.rollout == rollout)
        and (not host or host in act.hosts or act.rollout in of_host or f".{subjects.token(host)}." in act.on)
        and (not operator or operator in act.who)
    ]


def _object(command: Command | None) -> str:
    """What a command is about, in a few words."""
    found: Any = command
    match str(command.__struct_config__.tag) if command is not None else "":
        case "workspace.put":
            return f"{found.workspace} ({found.environment})"
        case "entitlement.put":
            return f"{found.name}: {found.module} {found.versions or 'any version'}" + (
                " absent" if found.absent else ""
            )
        case "host.put" | "host.invite":
            return str(found.host) + (" absent" if found.absent else "")
        case "host.move":
            return f"{found.host} to {found.to}"
        case "release.publish":
            return f"{found.module} {found.version} ({found.digest[:12]})"
        case "metadata.publish":
            return ", ".join(sorted(found.metadata))
        case "rollout.start":
            return f"{found.rollout}: {found.module} {found.version or 'absent'}"
        case kind if kind.startswith("rollout."):
            return str(found.rollout) + (f": {found.reason}" if found.reason else "")
        case _:
            return ""


def _hosts(command: Command | None) -> tuple[str, ...]:
    named = getattr(command, "host", None)
    return (named,) if isinstance(named, str) else ()


def _signature(found: Signed) -> str:
    if found.standing == "bad":
        return f"{STANDINGS['bad']}: {found.said}"
    return STANDINGS[found.standing]


def _held(command: Command, at: datetime) -> bool:
    """Whether a command was stored while it held. Differences: a sum could leave the calendar."""
    return aware(command.issued_at) - at <= SKEW and at - aware(command.expires_at) <= SKEW


def aware(at: datetime) -> datetime:
    """A time with a zone: one that somebody wrote without is taken as UTC."""
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _workspace(subject: str) -> str:
    try:
        return subjects.parse(subject).workspace
    except Refused:
        return ""


def _place(stored: Stored) -> str:
    return f"{stored.subject} #{stored.sequence}"


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nobody known"


def _by(names: Sequence[str]) -> str:
    return f" by {_names(names)}" if names else ""
