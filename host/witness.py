"""What a host remembers of its workspace's journal, so that nobody can rewrite it without a witness. Pure.

Each desired state names the head of the workspace's chain after so many links. A host keeps the newest, and of those before a
few that are spread over all of its time: whoever can sign desired states could send many of them, but cannot push the older
ones out. `loopback audit` compares what hosts report with the journal itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import DesiredState
from loopback.contracts.reports import Witness

#: Kept beside the newest: about 1.5 KiB in every status, and after a year still one for each few weeks and every recent hour.
MAX_EARLIER: Final = 12
_FRESH_S: Final = 3600.0  # among witnesses of the last hour, age makes no difference


def contradiction(known: Sequence[Witness], document: DesiredState) -> Refusal | None:
    """Why this newer document cannot stand on the journal that this host witnessed; None where it may.

    Every decision adds a link, so a newer document covers more links than any before it. Nothing is said of a document that
    covers more: what it covers the host cannot see.
    """
    if not known or not document.journal_links:
        return None
    newest = known[-1]
    if document.journal_links > newest.links or (document.journal_links, document.journal_head) == (
        newest.links,
        newest.head,
    ):
        return None
    how = (
        f"has another head after {newest.links} links"
        if document.journal_links == newest.links
        else f"has {document.journal_links} links, where this host witnessed {newest.links}"
    )
    return Refusal(
        Code.JOURNAL_REWRITTEN,
        f"the journal behind this desired state {how}: it was cut or rewritten",
        "see 'loopback audit'; this host begins nothing until the journal is longer, or activation's key was replaced "
        "('loopback keys rotate activation')",
    )


def kept(known: tuple[Witness, ...], document: DesiredState, now: datetime) -> tuple[Witness, ...]:
    """The witnesses after a document that contradicts none of them."""
    if not document.journal_links or (known and document.journal_links <= known[-1].links):
        return known
    found = [*known, Witness(document.journal_links, document.journal_head, now)]
    while len(found) > MAX_EARLIER + 1:
        del found[_most_crowded(found, now)]
    return tuple(found)


def _most_crowded(found: Sequence[Witness], now: datetime) -> int:
    """The one between others whose neighbours are closest, measured by its own age: many of one hour count as few."""

    def room(index: int) -> float:
        age = _age(found[index], now)
        return (_age(found[index - 1], now) - _age(found[index + 1], now)) / (age + _FRESH_S)

    return min(range(1, len(found) - 1), key=room)


def _age(one: Witness, now: datetime) -> float:
    return max((now - one.at).total_seconds(), 0.0) if one.at else 0.0
