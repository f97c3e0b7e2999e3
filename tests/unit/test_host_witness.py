"""What a host remembers of its workspace's journal, and what it makes of a desired state that contradicts it."""

from __future__ import annotations

import hashlib
import random
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_decide import NEW, NOW, OLD, Host

from loopback.contracts.codes import Code
from loopback.contracts.desired import DesiredState
from loopback.contracts.reports import Witness
from loopback.host import witness
from loopback.host.decide import Answer


def head(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def covering(links: int, name: object = "") -> DesiredState:
    return DesiredState(
        host="h1", workspace="prod", generation=1, modules=(), issued_at=NOW, journal_links=links,
        journal_head=head(name or links),
    )  # fmt: skip


def told(
    host: Host, generation: int, links: int, name: object = "", **entry: Any
) -> tuple[Answer, Code | None]:
    """The host is asked on the ground of this journal; it remembers what it learnt."""
    host.own = msgspec.structs.replace(host.own, generation=generation - 1)
    document = host.document(
        host.entry(generation=generation, **entry), journal_links=links, journal_head=head(name or links)
    )
    accepted = host.check(host.signers.sealed(document))
    host.state = accepted.state
    (checked,) = accepted.entries
    return checked.answer, accepted.doubt.code if accepted.doubt else None


def test_a_host_keeps_the_newest_head_of_its_journal() -> None:
    host = Host()
    assert told(host, 5, 7) == (Answer.CHANGE, None)
    assert told(host, 6, 9) == (Answer.CHANGE, None)
    assert [(w.links, w.head) for w in host.state.witnesses] == [(7, head(7)), (9, head(9))]


def test_nothing_new_is_begun_on_a_journal_that_was_cut_until_it_is_longer_again() -> None:
    host = Host()
    told(host, 5, 9)
    document = host.signers.sealed(
        host.document(host.entry(generation=6), journal_links=8, journal_head=head(8))
    )
    for _ in range(2):  # read once more, it is no better
        accepted = host.check(document)
        assert [c.refusal.code for c in accepted.entries if c.refusal] == [Code.JOURNAL_REWRITTEN]
        host.state = accepted.state
    assert told(host, 7, 9, "another") == (Answer.REFUSED, Code.JOURNAL_REWRITTEN)
    assert [w.links for w in host.state.witnesses] == [9]
    assert told(host, 8, 10, "restored") == (Answer.CHANGE, None), (
        "an operator goes on after a restored backup"
    )
    assert [(w.links, w.head) for w in host.state.witnesses] == [(9, head(9)), (10, head("restored"))]


def test_the_way_back_stays_open_whatever_became_of_the_journal() -> None:
    host = Host()
    told(host, 5, 9)
    host.own = msgspec.structs.replace(host.own, promoted=NEW, previous=OLD, previous_rollout="r1")
    back = {"target": OLD, "returning": True, "expected": NEW}
    assert told(host, 6, 3, **back) == (Answer.CHANGE, Code.JOURNAL_REWRITTEN)


def test_the_same_document_read_again_is_no_contradiction() -> None:
    host = Host()
    told(host, 5, 9)
    document = covering(9)
    assert witness.contradiction(host.state.witnesses, document) is None


def test_a_sender_without_a_journal_is_obeyed_and_teaches_nothing() -> None:
    host = Host()
    told(host, 5, 9)
    host.own = msgspec.structs.replace(host.own, generation=5)
    accepted = host.check(host.signers.sealed(host.document(host.entry(generation=6))))
    assert [c.answer for c in accepted.entries] == [Answer.CHANGE]
    assert [w.links for w in accepted.state.witnesses] == [9]


@pytest.mark.parametrize(
    ("links", "name"), [(-1, head(1)), (2**53, head(1)), (1, ""), (1, "x" * 64), (1, head(1) * 10_000)]
)
def test_a_head_that_is_none_is_refused_and_never_kept(links: int, name: str) -> None:
    host = Host()
    document = host.document(host.entry(), journal_links=links, journal_head=name)
    assert host.refused(host.signers.sealed(document)) is Code.ENVELOPE_MALFORMED


def test_a_flood_of_documents_pushes_no_older_witness_out() -> None:
    known: tuple[Witness, ...] = ()
    for day in range(30):
        known = witness.kept(known, covering(day + 1), NOW + timedelta(days=day))
    before = set(known)
    flood = NOW + timedelta(days=29, hours=1)
    for number in range(5000):
        known = witness.kept(known, covering(1000 + number), flood + timedelta(milliseconds=number))
    assert len(known) == witness.MAX_EARLIER + 1
    assert known[-1].links == 5999
    lost = before - set(known)
    assert len(lost) <= 2, "only what the flood's own first and last take the place of"
    assert covering(30).journal_head in {w.head for w in known}, "the last before the flood is there"


@given(st.integers(0, 2**32), st.integers(2, 200))
def test_witnesses_stay_few_in_order_and_reach_back_to_the_first(seed: int, count: int) -> None:
    chance = random.Random(seed)
    known: tuple[Witness, ...] = ()
    now, links = NOW, 0
    for _ in range(count):
        now += timedelta(seconds=chance.choice([-3600, 0, 0.1, 60, 3600, 86400]))
        links += chance.randint(1, 9)
        known = witness.kept(known, covering(links), now)
    assert len(known) == min(count, witness.MAX_EARLIER + 1)
    assert [w.links for w in known] == sorted({w.links for w in known})
    assert known[-1].links == links
    if count > 1:
        assert known[0].links <= 9
