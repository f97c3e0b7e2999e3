"""Whether a workspace's journal is the one that hosts witnessed: chains folded, heads compared. Pure.

A rollout's links carry the hash of the one before, so a link that was changed or cut out shows in the rollout itself. A whole
rollout that is missing, a newest part that was cut off, or a chain that was hashed anew shows only in the workspace's chain:
each host keeps heads of it, and says them under its own signature. Who rewrites the journal would need the hosts' keys too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from loopback.cli import auditing
from loopback.cli.evidence import Evidence, Stored
from loopback.contracts import journal, reports, subjects, view
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.reports import Status, Witness
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import Workspace

#: Activation stamps a link with the broker's time just before it is stored; a link stored so much later was written anew.
LATE: Final = timedelta(minutes=10)

TIME: Final = "%Y-%m-%d %H:%M:%S"

Agreement = Literal["confirms", "contradicts", "cut", "nothing", "unverified"]


class HostWitness(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one host's signed status says of the journal.

    `confirms`: every head it kept is the journal's, the newest at `links`. `contradicts`: the journal has another head after
    `links` links. `cut`: the journal ends before `links`. `nothing`: it witnessed none yet. `unverified`: no status of it
    verifies, because of `why`. `agreed` is the last head of it that is the journal's, `complaint` its own word of a rewriting.
    """

    host: str
    agreement: Agreement
    links: int = 0
    head: str = ""
    at: datetime | None = None
    agreed: int = 0
    reported_at: datetime | None = None
    why: str = ""
    complaint: str = ""


class Broken(msgspec.Struct, frozen=True):
    """A rollout whose own chain does not hold, and where."""

    rollout: str
    why: str


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict. `heads[n]` is the head after n links. Words say what is wrong with the stream itself."""

    links: int
    head: str
    broken: tuple[Broken, ...]
    hosts: tuple[HostWitness, ...]
    words: tuple[str, ...]
    accepted_loss: int | None = None

    @property
    def against(self) -> list[HostWitness]:
        """Hosts whose word the journal contradicts, but for what an operator said is known to be lost."""
        return [h for h in self.hosts if h.agreement in ("contradicts", "cut") and not self._known(h)]

    @property
    def confirming(self) -> list[HostWitness]:
        """Hosts that confirm the journal."""
        return [h for h in self.hosts if h.agreement == "confirms"]

    @property
    def intact(self) -> bool:
        """Whether nothing speaks against it."""
        return not (self.broken or self.words or self.against)

    def _known(self, host: HostWitness) -> bool:
        return self.accepted_loss is not None and host.agreed >= self.accepted_loss


def examine(
    evidence: Evidence,
    key_of: Callable[[str, str], PublicKey | None],
    hosts: Iterable[str],
    accepted_loss: int | None = None,
) -> tuple[Journal, Workspace, list[journal.Link]]:
    """Fold the journal and compare it with what these hosts witnessed; also the folded workspace and its readable links.

    `key_of(workspace, host)` is the host's key by its verified record. With `accepted_loss` n, contradictions of hosts that
    agree with the journal up to n links or more do not count: the journal was restored from a backup that ended there.
    """
    state = Workspace(evidence.workspace)
    heads = [""]
    links: list[journal.Link] = []
    words = list(_stream_words(evidence))
    broken: dict[str, str] = {}
    for stored in evidence.links:
        where = f"link {len(heads)} (sequence {stored.sequence})"
        try:
            link = fold(state, stored.data)
        except (msgspec.MsgspecError, RecursionError) as error:
            words.append(f"{where} is no link: {error}")
            heads.append(state.head)
            continue
        heads.append(state.head)
        if link is None:
            name = _rollout(stored.subject)
            rollout = state.rollouts.get(name)
            broken.setdefault(
                name, rollout.broken if rollout and rollout.broken else f"{where} continues no link before it"
            )
            continue
        if stored.time - auditing.aware(link.at) > LATE:
            words.append(f"{where} says it is of {link.at:{TIME}}, but was stored at {stored.time:{TIME}}")
        links.append(link)
    for name, rollout in state.rollouts.items():
        if rollout.broken:
            broken.setdefault(name, rollout.broken)
    seen = _statuses(evidence)
    views = _views(evidence)
    found = Journal(
        links=len(heads) - 1,
        head=heads[-1],
        broken=tuple(Broken(name, why) for name, why in sorted(broken.items())),
        hosts=tuple(_host(h, seen.get(h), views.get(h), heads, key_of) for h in sorted(set(hosts))),
        words=tuple(words[:MAX_WORDS] + [f"and {len(words) - MAX_WORDS} more"] * (len(words) > MAX_WORDS)),
        accepted_loss=accepted_loss,
    )
    return found, state, links


MAX_WORDS: Final = 20  # a stream that was written anew says the same of each of its links


def _stream_words(evidence: Evidence) -> Iterable[str]:
    """What the broker's own description of the stream gives away. Nothing is ever deleted from it."""
    stream = evidence.stream(subjects.workspace_stream(evidence.workspace))
    if stream is None or stream.created is None:
        yield "the workspace has no decision stream: it was never made, or was deleted"
        return
    if stream.first > 1:
        yield f"the stream begins at message {stream.first}: what was before was deleted"
    if stream.deleted:
        yield f"{stream.deleted} messages were deleted from the middle of the stream"
    commands = evidence.stream(subjects.STREAM_COMMANDS)
    if commands is not None and commands.deleted:
        yield f"{commands.deleted} messages were deleted from the middle of {commands.name}"
    first = min((s.time for s in evidence.records if ".record.workspace." in s.subject), default=None)
    if first is not None and stream.created - first > LATE:
        yield (
            f"the workspace was recorded at {first:{TIME}}, but its stream was made at "
            f"{stream.created:{TIME}}: it was made anew"
        )


def _rollout(subject: str) -> str:
    """The rollout that a link's subject names, escaped where it is not one of ours."""
    token = "".join(subject.split(".")[4:5])
    try:
        return subjects.untoken(token)
    except Refused:
        return token


def _statuses(evidence: Evidence) -> dict[str, Stored]:
    """The stored status of each host, by the name that its subject claims."""
    found = {}
    for stored in evidence.reports:
        try:
            _, host, kind = reports.sender(stored.subject)
        except Refused:
            continue
        if kind == "status":
            found[host] = stored
    return found


def _views(evidence: Evidence) -> Mapping[str, Status]:
    """The newest status that telemetry's view has of each host: its word, with no signature left."""
    found: dict[str, Status] = {}
    for stored in evidence.views:
        try:
            one = view.decode(stored.data) if stored.data else None
        except (msgspec.MsgspecError, RecursionError):
            continue
        if one is not None and one.status is not None:
            found[one.host] = one.status
    return found


def _host(
    host: str,
    stored: Stored | None,
    seen: Status | None,
    heads: list[str],
    key_of: Callable[[str, str], PublicKey | None],
) -> HostWitness:
    if stored is None:
        known = (
            f"; telemetry's view has {seen.witness.links} links, unsigned" if seen and seen.witness else ""
        )
        return HostWitness(
            host=host, agreement="unverified", why=f"the bus keeps no signed status of it{known}"
        )
    try:
        report = reports.open_report(stored.data, stored.subject, key_of)
    except Refused as refused:
        return HostWitness(host=host, agreement="unverified", why=f"{refused.reason} [{refused.code}]")
    assert isinstance(report, Status)  # open_report compared it with the subject's last token
    return judge(report, heads)


def judge(report: Status, heads: list[str]) -> HostWitness:
    """Compare everything that a verified status witnesses with the journal's heads (`heads[n]`: after n links)."""
    said = [w for w in (*report.witnesses, report.witness) if w is not None]
    refusals = [report.refusal, *(m.refusal for m in report.modules)]
    complaint = next((r.reason for r in refusals if r is not None and r.code is Code.JOURNAL_REWRITTEN), "")
    if not said:
        return HostWitness(host=report.host, agreement="nothing", reported_at=report.at, complaint=complaint)
    agreement: Agreement = "confirms"
    worst = said[-1]
    agreed = 0
    for one in sorted(said, key=lambda w: w.links):
        how = _agreement(one, heads)
        if how != "confirms":
            agreement, worst = how, one
            break
        agreed = one.links
    return HostWitness(
        host=report.host, agreement=agreement, links=worst.links, head=worst.head, at=worst.at, agreed=agreed,
        reported_at=report.at, complaint=complaint,
    )  # fmt: skip


def _agreement(one: Witness, heads: list[str]) -> Agreement:
    if not 0 < one.links < len(heads):
        return "cut"
    return "confirms" if heads[one.links] == one.head else "contradicts"


def summary(found: Journal) -> list[str]:
    """The verdict in sentences, worst first."""
    lines = []
    total = len(found.hosts)
    for one in found.against:
        after = (
            f"after link {one.agreed}, the last that it confirms"
            if one.agreed
            else "somewhere from its start on"
        )
        when = f" (at {one.at:{TIME}} by its clock)" if one.at else ""
        lines.append(
            f"{one.host} has another head at link {one.links}{when}: the journal was rewritten {after}"
            if one.agreement == "contradicts"
            else f"{one.host} witnessed {one.links} links{when}, but the journal ends at {found.links}: it was cut, "
            f"or its stream wiped or restored from an older backup, {after}"
        )
    if len(found.against) == 1 and found.confirming:
        lines.append(f"only {found.against[0].host} says so: it may itself be stolen or cloned")
    for broken in found.broken:
        lines.append(f"the chain of rollout {broken.rollout} is broken: {broken.why}")
    lines += found.words
    for one in found.hosts:
        if one.complaint:
            lines.append(f"{one.host} itself says: {one.complaint}")
    known = [h for h in found.hosts if h.agreement in ("contradicts", "cut") and h not in found.against]
    if known:
        lines.append(
            f"{_names(known)} witnessed links after {found.accepted_loss} that were lost; you said that this is known"
        )
    if found.confirming:
        least = max(h.links for h in found.confirming)
        lines.append(
            f"{len(found.confirming)} of {total} hosts confirm the journal, up to link {least} of {found.links}"
        )
    elif total:
        lines.append(f"none of {total} hosts confirms the journal")
    else:
        lines.append("no host is recorded: there is nobody who could confirm the journal")
    for agreement, words in (
        ("nothing", "witnessed nothing yet"), ("unverified", "cannot be asked: no status of theirs verifies"),
    ):  # fmt: skip
        some = [h for h in found.hosts if h.agreement == agreement]
        if some:
            lines.append(f"{len(some)} of {total} {words}: {_names(some)}")
    return lines


def _names(hosts: list[HostWitness], most: int = 5) -> str:
    more = f" and {len(hosts) - most} more" if len(hosts) > most else ""
    return ", ".join(h.host for h in hosts[:most]) + more
