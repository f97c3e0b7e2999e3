"""What is written together with a decision: links sealed into their chain, and the desired states that follow from them.

Pure. A desired state names every module that any rollout ever told its host about, each with the scope of its own rollout,
so that one rollout never forgets what another decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Literal

import msgspec

from loopback.contracts import envelope, events, journal, subjects
from loopback.contracts.approvals import MAX_APPROVALS
from loopback.contracts.desired import DesiredModule, DesiredState
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.rolloutfold import entry_for
from loopback.contracts.rolloutstate import Entry, Rollout, Workspace

Environment = Literal["production", "staging", "sandbox"]


#: A host's record, and its own claim to it where the record is an invitation.
Word = tuple[Envelope, Envelope | None]


class Draft(msgspec.Struct, frozen=True):
    """One message of a decision, before it is handed to the bus."""

    subject: str
    data: bytes
    headers: dict[str, str]


class Chain:
    """Seals events into links, each after the last."""

    def __init__(self, workspace: str, rollout: str, seq: int, head: str) -> None:
        self.workspace, self.rollout, self.seq, self.head = workspace, rollout, seq, head

    @classmethod
    def of(cls, rollout: Rollout) -> Chain:
        """The chain of a rollout, at the end that was folded."""
        return cls(rollout.workspace, rollout.id, rollout.seq, rollout.head)

    def seal(self, event: journal.AnyEvent, at: datetime, traceparent: str) -> Draft:
        """The next link."""
        self.seq += 1
        data = journal.encode(
            journal.Link(
                rollout=self.rollout,
                workspace=self.workspace,
                seq=self.seq,
                prev=self.head,
                at=at,
                event=event,
            )
        )
        self.head = journal.digest(data)
        return Draft(
            subjects.rollout(self.workspace, self.rollout, event.name),
            data,
            events.headers(
                event_id=f"{self.workspace}/{self.rollout}/{self.seq}/{self.head[:16]}",
                source="activation",
                event_type=f"rollout.{event.name}",
                subject=self.rollout,
                at=at,
                traceparent=traceparent,
            ),
        )


def extended(workspace: Workspace, links: Iterable[Draft]) -> tuple[int, str]:
    """How many links the workspace's chain has, and its head, once these are stored behind what was folded."""
    count, head = workspace.links, workspace.head
    for link in links:
        count, head = count + 1, journal.chained(head, journal.digest(link.data))
    return count, head


def desired(
    workspace: Workspace,
    rollout: Rollout,
    event: journal.Assigned,
    *,
    head: str,
    links: int,
    records: Callable[[str], Word | None],
    environment: Environment,
    at: datetime,
) -> Iterable[DesiredState]:
    """The desired states that an assignment means, for the state before it is folded.

    `head` is the workspace's chain after `links` links, those of this very decision included.
    """
    for assignment in event.hosts:
        ledger = workspace.hosts.get(assignment.host)
        known = ledger.modules.items() if ledger else ()
        entries = {name: module.entry for name, module in known if module.entry is not None}
        entries[rollout.created.module] = entry_for(rollout, event, assignment)
        record, claim = records(assignment.host) or (None, None)
        yield DesiredState(
            host=assignment.host,
            workspace=workspace.name,
            generation=assignment.generation,
            modules=tuple(_module(workspace.rollouts[e.rollout], e) for _, e in sorted(entries.items())),
            issued_at=at,
            record=record,
            claim=claim,
            journal_head=head,
            journal_links=links,
            incarnation=ledger.incarnation if ledger else "",
            environment=environment,
        )


def _module(rollout: Rollout, entry: Entry) -> DesiredModule:
    created = rollout.created
    wanted = entry.running is not None and entry.running.package == created.package
    return DesiredModule(
        module=entry.module,
        running=entry.running,
        generation=entry.generation,
        rollout=entry.rollout,
        scope=created.envelope,
        expected=entry.expected,
        size=created.size if wanted else 0,
        trial_s=rollout.start.trial_s,
        # The way back stays open: a host that was away for days still returns to what it came from.
        not_after=None if entry.returning else entry.not_after,
        returning=entry.returning,
        abort=rollout.abort if entry.returning else None,
        approvals=rollout.approvals[:MAX_APPROVALS],
    )


def sealed(state: DesiredState, key: SigningKey, traceparent: str) -> Draft:
    """A desired state as it is stored: signed by activation."""
    return Draft(
        subjects.desired(state.workspace, state.host),
        envelope.seal_bytes(envelope.DESIRED, msgspec.json.encode(state), key),
        events.headers(
            event_id=f"{state.workspace}/{state.host}/{state.generation}/{state.journal_head[:16]}",
            source="activation",
            event_type="desired",
            subject=state.host,
            at=state.issued_at,
            traceparent=traceparent,
        ),
    )
