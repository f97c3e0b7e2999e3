"""A stolen broker, or a stolen activation, rewrites the journal. Each attack first goes unnoticed without the witnesses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from support import eventually
from support_installation import Installation, Said
from support_recorded import HOSTS, Thief, record, replayed, two_rollouts

from loopback.cli import audit as audit_module
from loopback.cli import auditing, evidence, witnessing
from loopback.cli.witnessing import HostWitness
from loopback.contracts import envelope, journal, subjects
from loopback.contracts.desired import DesiredState
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Gates, JournalEntry
from loopback.contracts.reports import Status
from loopback.host import witness
from loopback.services._runtime.bus import Outgoing
from loopback.services._runtime.settings import read_identity
from loopback.trust import signing

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield record(tmp_path_factory.mktemp("recorded") / "installation", two_rollouts)


@pytest.fixture
async def prod(recorded: Path, tmp_path: Path) -> AsyncIterator[Installation]:
    async with replayed(recorded, tmp_path / "copy") as found:
        yield found


@pytest.fixture
async def thief(prod: Installation) -> Thief:
    return await Thief(prod.bus).steal()


async def audit(prod: Installation) -> Said:
    return await prod("audit", "--workspace", "prod", code=None)


async def without_witnesses(prod: Installation, also: tuple[object, str] | None = None) -> Said:
    """The same audit with the defence removed: whatever hosts say, they confirm."""

    def believing(report: Status, heads: list[str]) -> HostWitness:
        return HostWitness(host=report.host, agreement="confirms", links=len(heads) - 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(witnessing, "judge", believing)
        if also is not None:
            patch.setattr(*also, lambda *_: None)
        return await audit(prod)


async def test_an_untouched_journal_is_confirmed_by_every_host(prod: Installation) -> None:
    said = await audit(prod)
    assert said.code == 0, said.out
    assert "2 of 2 hosts confirm the journal" in said.out


async def test_a_journal_that_is_copied_word_for_word_is_the_same_journal(
    prod: Installation, thief: Thief
) -> None:
    await thief.write()
    assert (await audit(prod)).code == 0


async def test_a_journal_rewritten_without_one_rollout_is_contradicted_by_every_host(
    prod: Installation, thief: Thief
) -> None:
    thief.forget_rollout("r1")
    await thief.write()
    fooled = await without_witnesses(prod)
    assert fooled.code == 0, fooled.out
    assert "r1" not in fooled.out
    said = await audit(prod)
    assert said.code == 1
    for host in HOSTS:
        assert (
            f"journal: {host} has another head at link" in said.out
            or f"journal: {host} witnessed" in said.out
        )
    assert "none of 2 hosts confirms the journal" in said.out


async def test_a_journal_whose_newest_links_are_cut_off_is_noticed(prod: Installation, thief: Thief) -> None:
    thief.forget_rollout("r2")
    await thief.write()
    assert (await without_witnesses(prod)).code == 0
    said = await audit(prod)
    assert said.code == 1
    ends, _ = thief.chain()
    for host in HOSTS:
        assert f"journal: {host} witnessed" in said.out
    assert f"but the journal ends at {ends}: it was cut, or its stream wiped or restored" in said.out


async def test_a_restored_backup_is_said_and_can_be_accepted_by_an_operator(
    prod: Installation, thief: Thief
) -> None:
    thief.forget_rollout("r2")
    await thief.write()
    ends, _ = thief.chain()
    answer = (await prod("audit", "--workspace", "prod", "--json", code=1)).json
    agreed = min(h["agreed"] for h in answer["journal"]["hosts"])
    assert 0 < agreed <= ends
    accepted = await prod("audit", "--workspace", "prod", "--known-loss", str(agreed))
    assert "you said that this is known" in accepted.out
    await prod("audit", "--workspace", "prod", "--known-loss", str(ends + 1), code=1)


async def test_another_name_in_a_link_is_noticed_by_its_signature_and_by_the_witnesses(
    prod: Installation, thief: Thief
) -> None:
    def rename(link: journal.Link) -> journal.Link:
        if link.rollout == "r1" and isinstance(link.event, journal.Created):
            return msgspec.structs.replace(
                link, event=msgspec.structs.replace(link.event, operators=("mallory",))
            )
        return link

    thief.change_links(rename)
    await thief.write()
    fooled = await without_witnesses(prod, also=(auditing.Auditor, "_envelope"))
    assert fooled.code == 0, fooled.out
    named = await without_witnesses(prod)
    assert named.code == 1
    assert "says mallory, but it was signed by admin" in named.out
    said = await audit(prod)
    assert said.code == 1
    for host in HOSTS:
        assert f"journal: {host} has another head at link" in said.out


async def test_looser_gates_in_a_stored_start_are_noticed_by_its_signature_and_by_the_witnesses(
    prod: Installation, thief: Thief
) -> None:
    """So that nobody can say afterwards that an operator had allowed half of the hosts to fail."""

    def loosen(link: journal.Link) -> journal.Link:
        if link.rollout != "r1" or not isinstance(link.event, journal.Created):
            return link
        start = msgspec.structs.replace(link.event.start(), gates=Gates(max_failed=0.5, min_sample=1))
        forged = envelope.seal(envelope.COMMAND, msgspec.json.encode(start), SigningKey.generate())
        signed = Envelope(forged.payload, forged.payloadType, link.event.envelope.signatures)
        return msgspec.structs.replace(link, event=msgspec.structs.replace(link.event, envelope=signed))

    thief.change_links(loosen)
    await thief.write()
    fooled = await without_witnesses(prod, also=(auditing.Auditor, "_envelope"))
    assert fooled.code == 0, fooled.out
    unsigned = await without_witnesses(prod)
    assert unsigned.code == 1
    assert "r1" in unsigned.out and "signature" in unsigned.out
    said = await audit(prod)
    assert said.code == 1
    for host in HOSTS:
        assert f"journal: {host} has another head at link" in said.out


async def test_a_refusal_that_is_dropped_from_the_journal_is_missed_by_its_command(
    prod: Installation, thief: Thief
) -> None:
    """Entries are not chained. The signed command in LB_CMD is what gives the gap away."""
    before = len(thief.stored)
    refused = {
        entry.command
        for s in thief.stored
        if ".journal." in s.subject
        and (entry := msgspec.json.decode(s.data, type=JournalEntry)).event == "refused"
    }
    assert len(refused) == 1
    thief.stored = [
        s
        for s in thief.stored
        if not (
            ".journal." in s.subject and msgspec.json.decode(s.data, type=JournalEntry).command in refused
        )
    ]
    await thief.write()
    assert len(thief.stored) == before - 1
    fooled = await without_witnesses(prod, also=(auditing.Auditor, "_results"))
    assert fooled.code == 0, "whoever only reads entries misses it"
    said = await audit(prod)
    assert said.code == 1
    assert "journal entry removed: activation answered rollout.abort" in said.out

    thief.stored = [s for s in thief.stored if not s.subject.endswith(f".result.{subjects.token(*refused)}")]
    await thief.write()
    with pytest.MonkeyPatch.context() as patch:  # as if it were ten minutes later
        patch.setattr(auditing, "ANSWERED", timedelta(0))
        said = await audit(prod)
    assert said.code == 1
    assert "outcome missing: rollout.abort" in said.out


async def test_a_refusal_that_is_dropped_with_its_command_leaves_no_trace(
    prod: Installation, thief: Thief
) -> None:
    """What is not protected: a command that changed nothing, gone from everywhere at once. ADR 0018 says so."""
    thief.forget_rollout("nothing")
    await thief.write()
    assert (await audit(prod)).code == 0


async def test_messages_deleted_from_the_middle_are_counted(prod: Installation, thief: Thief) -> None:
    await prod.bus.api(f"STREAM.MSG.DELETE.{subjects.STREAM_COMMANDS}", {"seq": thief.commands[2].sequence})
    said = await audit(prod)
    assert said.code == 1
    assert "1 messages were deleted from the middle of LB_CMD" in said.out


@pytest.mark.parametrize("remembering", [True, False])
async def test_a_stolen_activation_cannot_make_hosts_forget_what_they_witnessed(
    prod: Installation, thief: Thief, remembering: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rewrites the journal, and then signs newer desired states that name the new head, many of them."""
    if not remembering:
        monkeypatch.setattr(witness, "kept", lambda known, document, now: _only_newest(document, now))
    thief.forget_rollout("r1")
    while thief.chain()[0] < 60:
        thief.append("r2", journal.Observed(hosts=()))
    await thief.write()
    links, head = thief.chain()
    key = SigningKey.from_nkey(read_identity(prod.place.settings("activation").creds).seed)
    for name in HOSTS:
        prod.run_host(name)
    for number in range(40):
        for name in HOSTS:
            document = DesiredState(
                host=name, workspace="prod", generation=1000 + number, modules=(), issued_at=datetime.now(UTC),
                journal_links=links - 39 + number, journal_head=head if number == 39 else "0" * 64,
            )  # fmt: skip
            data = envelope.seal_bytes(envelope.DESIRED, msgspec.json.encode(document), key)
            await prod.bus.publish(Outgoing(subjects.desired("prod", name), data))
    for name in HOSTS:
        await eventually(lambda name=name: _witnessed(prod, name, links))
        await prod.stop_host(name)
    said = await audit(prod)
    if remembering:
        assert said.code == 1
        for host in HOSTS:
            assert f"journal: {host} has another head at link" in said.out
    else:
        assert said.code == 0, "with one head per host, the thief's last document is the only witness"


def _only_newest(document: DesiredState, now: datetime) -> tuple[witness.Witness, ...]:
    return (witness.Witness(document.journal_links, document.journal_head, now),)


async def _witnessed(prod: Installation, name: str, links: int) -> bool:
    return await prod.witnessed(name) >= links


async def test_evidence_in_a_file_is_verified_without_a_bus(
    prod: Installation, thief: Thief, tmp_path: Path
) -> None:
    kept = tmp_path / "evidence.json"
    await prod("audit", "--workspace", "prod", "--export", str(kept))
    root = (prod.place.home / "tuf" / "root.json").read_bytes()
    copy = tmp_path / "root.json"
    copy.write_bytes(root)
    await prod.place.kill()
    words = ("audit", "--from", str(kept), "--root", str(copy))
    assert "2 of 2 hosts confirm the journal" in (await prod(*words)).out

    later = await audit_module.examine(
        evidence.load(kept), root, None, datetime.now(UTC) + timedelta(days=400)
    )
    assert later.good, "what has expired since counts as of then"
    assert "expired" in later.trusted.expired

    whole = evidence.load(kept)
    for name in ("links", "commands", "records"):
        part = list(getattr(whole, name))
        del part[len(part) // 2]
        evidence.save(msgspec.structs.replace(whole, **{name: tuple(part)}), kept)
        cut = await prod(*words, code=None)
        assert cut.code == (1 if name != "records" else 0), (name, cut.out)

    strange = tmp_path / "strange.json"
    strange.write_bytes(signing.sign(signing.new_root(datetime.now(UTC), **_ROLES), _ROLES["root"]))
    refused = await prod("audit", "--from", str(kept), "--root", str(strange), code=2)
    assert "[tuf.invalid]" in refused.err
    kept.write_bytes(kept.read_bytes()[:-50])
    assert "is no evidence file" in (await prod(*words, code=2)).err


_ROLES = {name: SigningKey.generate() for name in ("root", "targets", "snapshot", "timestamp")}
