"""What an audit makes of evidence, without a bus: signatures, entries against commands, heads against journals."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from activation_world import World

from loopback.cli import audit, auditing, witnessing
from loopback.cli.auditing import Auditor, Finding
from loopback.cli.evidence import Evidence, Stored, Stream
from loopback.contracts import envelope, journal, subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import EntitlementPut, HostPut, JournalEntry, Record, Result, RolloutPause
from loopback.contracts.reports import Status, Witness
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
ADA, BEN, GONE, STRANGER = (SigningKey.from_raw(bytes([n]) * 32) for n in range(1, 5))
KEPT = timedelta(days=30)


def trust(version: int = 2, **people: tuple[SigningKey, Role]) -> Trust:
    operators = tuple(
        Operator(name, key.public.text, {"prod": (role,)}) for name, (key, role) in people.items()
    )
    return Trust(TrustDocument(version=version, operators=operators, services={}))


TRUSTS = (
    trust(2, ada=(ADA, Role.ADMIN), ben=(BEN, Role.VIEWER)),
    trust(1, ada=(ADA, Role.ADMIN), gone=(GONE, Role.ADMIN)),
)


def command(key: SigningKey, number: int = 1, at: datetime = NOW, name: str = "fw") -> Stored:
    made = EntitlementPut(
        id=f"c{number}",
        workspace="prod",
        issued_at=at,
        expires_at=at + timedelta(hours=1),
        name=name,
        module="firewall",
    )
    data = envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(made), key)
    return Stored("lb.ws.prod.cmd.eligibility.entitlement-put", data, number, at)


def entry(stored: Stored, number: int = 1, *, event: str = "accepted", **changes: Any) -> Stored:
    fields: dict[str, Any] = {
        "service": "eligibility", "event": event, "at": stored.time, "command": f"c{number}",
        "command_type": "entitlement.put", "operators": ("ada",), "subject": stored.subject,
        "sequence": stored.sequence, "sha256": hashlib.sha256(stored.data).hexdigest(),
    }  # fmt: skip
    data = msgspec.json.encode(JournalEntry(**fields | changes))
    return Stored(f"lb.ws.prod.journal.eligibility.{event}", data, 100 + number, stored.time)


def result(stored: Stored, number: int = 1) -> Stored:
    found = Result(
        command=f"c{number}", command_type="entitlement.put", ok=True, at=stored.time, service="eligibility",
        sequence=stored.sequence,
    )  # fmt: skip
    return Stored(f"lb.ws.prod.result.c{number}", msgspec.json.encode(found), 99 + number, stored.time)


def audited(links: tuple[journal.Link, ...] = (), **parts: Any) -> auditing.Audit:
    found = Evidence(workspace="prod", at=NOW + timedelta(hours=1), **parts)
    return Auditor(found, TRUSTS, KEPT).run(links)


def whats(found: auditing.Audit) -> list[str]:
    return [f.what for f in found.findings]


@pytest.mark.parametrize(
    ("key", "signature", "who"),
    [
        (ADA, "signature ok", ("ada",)),
        (BEN, "signature ok, by somebody who may not do this now", ("ben",)),
        (GONE, "signature ok, by a key that no longer counts", ("gone",)),
        (STRANGER, "not verifiable: by a key that no trust document here names", ("nobody known",)),
    ],
)
def test_an_act_says_what_its_signature_is_worth(
    key: SigningKey, signature: str, who: tuple[str, ...]
) -> None:
    stored = command(key)
    (act,) = audited(commands=(stored,), journal=(result(stored), entry(stored, operators=who))).acts
    assert (act.what, act.who, act.signature, act.outcome) == ("entitlement.put", who, signature, "accepted")
    assert act.on == "fw: firewall any version"


def test_what_fits_together_is_no_finding() -> None:
    stored = command(ADA)
    assert whats(audited(commands=(stored,), journal=(result(stored), entry(stored)))) == []


def test_a_command_whose_bytes_changed_after_it_was_accepted_is_a_finding() -> None:
    before, after = command(ADA, name="fw"), command(ADA, name="everything")
    assert whats(audited(commands=(after,), journal=(result(before), entry(before)))) == ["command altered"]


def test_a_command_that_was_taken_away_is_a_finding_until_its_time_is_over() -> None:
    stored = command(ADA)
    assert whats(audited(journal=(result(stored), entry(stored)))) == ["command removed"]
    old = command(ADA, at=NOW - KEPT)
    found = audited(journal=(result(old), entry(old)))
    assert whats(found) == []
    assert found.acts[0].signature == "not verifiable: the command is older than the stream keeps"


def test_another_name_in_an_entry_is_a_finding() -> None:
    stored = command(ADA)
    found = audited(commands=(stored,), journal=(result(stored), entry(stored, operators=("mallory",))))
    assert found.findings == (
        Finding("another name", "eligibility says that mallory signed entitlement.put c1; it was ada"),
    )


def test_a_command_that_was_accepted_without_a_signature_that_holds_is_a_finding() -> None:
    stored = command(ADA)
    sealed = envelope.parse(stored.data)
    forged = msgspec.structs.replace(
        sealed, signatures=envelope.parse(command(ADA, name="other").data).signatures
    )
    stored = Stored(stored.subject, msgspec.json.encode(forged), 1, NOW)
    assert whats(audited(commands=(stored,), journal=(result(stored), entry(stored)))) == [
        "accepted without a signature"
    ]


def test_a_command_that_was_stored_outside_its_own_time_was_written_anew() -> None:
    signed = command(ADA)
    late = Stored(signed.subject, signed.data, 1, NOW + timedelta(hours=2))
    assert whats(audited(commands=(late,), journal=(result(late), entry(late)))) == ["stored at another time"]


def test_a_command_without_an_outcome_is_missed_once_later_ones_have_theirs() -> None:
    one, two = command(ADA), command(ADA, 2)
    assert whats(audited(commands=(one,))) == [], "its service may be down"
    later = (result(two, 2), entry(two, 2))
    assert whats(audited(commands=(one, two), journal=later)) == ["outcome missing"]


def test_a_record_whose_command_is_gone_from_everywhere_still_tells_who_signed_it() -> None:
    put = HostPut(
        id="old",
        workspace="prod",
        issued_at=NOW - 2 * KEPT,
        expires_at=NOW,
        host="web-1",
        public_key=ADA.public.text,
    )
    sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(put), GONE)
    record = Record(
        kind="host", name="web-1", workspace="prod", envelope=sealed, at=NOW - 2 * KEPT, operators=("gone",)
    )
    stored = Stored("lb.ws.prod.record.host.web-1", msgspec.json.encode(record), 1, NOW - 2 * KEPT)
    found = audited(records=(stored,))
    assert whats(found) == []
    (act,) = found.acts
    assert (act.what, act.who, act.on, act.hosts) == ("host.put", ("gone",), "web-1", ("web-1",))
    renamed = msgspec.structs.replace(record, operators=("ada",))
    stored = Stored(stored.subject, msgspec.json.encode(renamed), 1, NOW - 2 * KEPT)
    assert whats(audited(records=(stored,))) == ["another name"]


def test_a_link_that_names_an_operator_needs_a_command_of_theirs() -> None:
    event = journal.Paused(reason="lunch", operators=("ada",))
    link = journal.Link(rollout="r1", workspace="prod", seq=2, prev="", at=NOW, event=event)
    assert whats(audited((link,))) == ["another name"]
    pause = RolloutPause(
        id="p", workspace="prod", issued_at=NOW, expires_at=NOW + timedelta(hours=1), rollout="r1"
    )
    data = envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(pause), ADA)
    assert (
        whats(audited((link,), commands=(Stored("lb.ws.prod.cmd.activation.rollout-pause", data, 1, NOW),)))
        == []
    )


# Witnesses

HEADS = ["", *(hashlib.sha256(bytes([n])).hexdigest() for n in range(9))]


def status(*said: Witness, refusal: Refusal | None = None) -> Status:
    return Status(
        host="web-1", workspace="prod", incarnation="i", seq=1, at=NOW, agent="ok", generation=1, refusal=refusal,
        witness=said[-1] if said else None, witnesses=said[:-1],
    )  # fmt: skip


def test_heads_that_are_the_journals_confirm_it() -> None:
    found = witnessing.judge(status(Witness(3, HEADS[3]), Witness(7, HEADS[7])), HEADS)
    assert (found.agreement, found.links, found.agreed) == ("confirms", 7, 7)


def test_the_first_head_that_is_not_says_where_the_journal_was_rewritten() -> None:
    found = witnessing.judge(status(Witness(3, HEADS[3]), Witness(5, "f" * 64), Witness(7, HEADS[7])), HEADS)
    assert (found.agreement, found.links, found.agreed) == ("contradicts", 5, 3)


@pytest.mark.parametrize("links", [10, 2**60, 0, -1])
def test_more_links_than_there_are_were_cut(links: int) -> None:
    found = witnessing.judge(status(Witness(links, HEADS[9])), HEADS)
    assert found.agreement == "cut"


def test_a_host_that_saw_the_rewriting_itself_is_heard() -> None:
    refusal = Refusal(Code.JOURNAL_REWRITTEN, "it was cut")
    assert witnessing.judge(status(refusal=refusal), HEADS).complaint == "it was cut"


def stream_words(**changes: Any) -> tuple[str, ...]:
    facts: dict[str, Any] = {"name": subjects.workspace_stream("prod"), "created": NOW, "first": 1, "last": 9}
    found = Evidence(workspace="prod", at=NOW, streams=(Stream(**facts | changes),))
    return witnessing.examine(found, lambda *_: None, ())[0].words


def test_a_link_that_was_changed_breaks_its_rollouts_chain_and_no_other() -> None:
    world = World(2)
    world.begin("r1")
    world.finish("r1")
    world.begin("r2", version="1.1.0")
    good = [
        Stored(subjects.rollout("prod", link.rollout, link.event.name), data, number, link.at)
        for number, data in enumerate(world.log, 1)
        for link in (journal.decode(data),)
    ]
    facts = (Stream(subjects.workspace_stream("prod"), NOW, 1, len(good)),)

    def broken(links: list[Stored]) -> list[str]:
        found = Evidence(workspace="prod", at=NOW, streams=facts, links=tuple(links))
        return [b.rollout for b in witnessing.examine(found, lambda *_: None, ())[0].broken]

    assert broken(good) == []
    for number, stored in enumerate(good[:-1]):
        name = journal.decode(stored.data).rollout
        if any(journal.decode(s.data).rollout == name for s in good[number + 1 :]):
            changed = Stored(
                stored.subject, stored.data.replace(b"2026", b"2025", 1), stored.sequence, stored.time
            )
            assert broken([*good[:number], changed, *good[number + 1 :]]) == [name]
            assert broken([*good[:number], *good[number + 1 :]]) == [name]


def test_a_stream_that_was_tampered_with_gives_itself_away() -> None:
    assert stream_words() == ()
    assert "was deleted" in stream_words(first=5)[0]
    assert "3 messages were deleted" in stream_words(deleted=3)[0]
    assert "no decision stream" in stream_words(created=None)[0]


def test_times_are_read_as_people_write_them() -> None:
    assert audit.since_when("2d", NOW) == NOW - timedelta(days=2)
    assert audit.since_when("2026-11-25", NOW) == datetime(2026, 11, 25, tzinfo=UTC)
    assert audit.since_when("2026-11-25T10:00+01:00", NOW) == datetime(2026, 11, 25, 9, tzinfo=UTC)
    with pytest.raises(Refused):
        audit.since_when("soon", NOW)
    with pytest.raises(Refused):
        audit.since_when("999999w", NOW)


def test_with_no_host_left_that_could_contradict_the_audit_says_so() -> None:
    """Whoever takes the records away takes the witnesses away: silence would look like agreement."""
    found = witnessing.Journal(links=3, head="a" * 64, broken=(), hosts=(), words=())
    assert witnessing.summary(found) == ["no host is recorded: there is nobody who could confirm the journal"]
