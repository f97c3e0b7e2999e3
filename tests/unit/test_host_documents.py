"""Which desired states a host listens to at all: checks 1 to 6, of the document and of the host's record."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest
from support_decide import NEW, NOW, Host

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import DesiredModule
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostPut, WorkspacePut
from loopback.host.decide import Older
from loopback.host.scope import Answer


@pytest.fixture
def host() -> Host:
    return Host()


# 1–4: the document


def test_1_only_activation_signs_desired_states(host: Host) -> None:
    document = host.document(host.entry())
    assert host.refused(host.signers.sealed(document, host.signers.operator)) == Code.SIGNATURE_UNKNOWN_KEY
    assert host.refused(host.signers.sealed(document, SigningKey.generate())) == Code.SIGNATURE_UNKNOWN_KEY
    signed = host.signers.sealed(document)
    assert host.refused(Envelope(signed.payload, signed.payloadType, ())) == Code.ENVELOPE_UNSIGNED
    other = host.signers.sealed(host.document(host.entry(generation=9)))
    assert (
        host.refused(Envelope(other.payload, other.payloadType, signed.signatures)) == Code.SIGNATURE_INVALID
    )
    report = envelope.seal(envelope.REPORT, b"{}", host.signers.activation)
    assert host.refused(report) == Code.ENVELOPE_TYPE
    garbage = envelope.seal(envelope.DESIRED, b"{}", host.signers.activation)
    assert host.refused(garbage) == Code.ENVELOPE_MALFORMED


def test_2_it_must_be_for_this_host_and_workspace(host: Host) -> None:
    sealed = host.signers.sealed
    assert host.refused(sealed(host.document(host.entry(), host="h2"))) == Code.HOST_WRONG_HOST
    assert host.refused(sealed(host.document(host.entry(), workspace="lab"))) == Code.HOST_WRONG_HOST


def test_3_it_must_be_for_this_incarnation_if_it_names_one(host: Host) -> None:
    sealed = host.signers.sealed
    assert host.refused(sealed(host.document(host.entry(), incarnation="i0"))) == Code.HOST_INCARNATION
    assert host.ask(incarnation="i1") is Answer.CHANGE


def test_4_generations_only_grow_and_each_has_one_content(host: Host) -> None:
    old = host.signers.sealed(host.document(generation=3))
    assert host.refused(old) == Code.HOST_GENERATION
    document = host.document(host.entry())
    host.state = host.check(host.signers.sealed(document)).state
    assert host.check(host.signers.sealed(document)).document == document, "a repeat is fine"
    other = host.signers.sealed(host.document(host.entry(rollout="r2")))
    assert host.refused(other) == Code.HOST_GENERATION


def test_4_no_generation_is_out_of_reach_or_beyond_its_documents(host: Host) -> None:
    def malformed(*entries: DesiredModule, **changes: Any) -> None:
        signed = host.signers.sealed(host.document(*entries, **changes))
        assert host.refused(signed) == Code.ENVELOPE_MALFORMED

    malformed(generation=2**53)
    malformed(generation=-1)
    malformed(host.entry(generation=6), generation=5)
    malformed(host.entry(generation=-1), generation=5)
    malformed(host.entry(size=-1))
    malformed(host.entry(trial_s=1e999))
    malformed(*(msgspec.structs.replace(host.entry(), module=f"m{n}") for n in range(65)))


def test_4_a_late_message_is_told_from_two_contents_of_one_generation(host: Host) -> None:
    with pytest.raises(Older):
        host.check(host.signers.sealed(host.document(generation=3)))
    host.state = host.check(host.signers.sealed(host.document(host.entry()))).state
    with pytest.raises(Refused) as caught:
        host.check(host.signers.sealed(host.document(host.entry(rollout="r2"))))
    assert not isinstance(caught.value, Older)


def test_4_a_document_names_a_module_once(host: Host) -> None:
    twice = host.document(host.entry(), host.entry(rollout="r2"))
    assert host.refused(host.signers.sealed(twice)) == Code.ENVELOPE_MALFORMED


@pytest.mark.parametrize("digest", ["", "../../../etc/x", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n"])
def test_4_what_becomes_a_path_is_a_digest(host: Host, digest: str) -> None:
    for target in (msgspec.structs.replace(NEW, package=digest), msgspec.structs.replace(NEW, policy=digest)):
        signed = host.signers.sealed(host.document(host.entry(target)))
        assert host.refused(signed) == Code.ENVELOPE_MALFORMED


@pytest.mark.parametrize("changes", [{"module": "m" * 5000}, {"module": ""}, {"rollout": "r" * 5000}])
def test_4_names_are_names(host: Host, changes: dict[str, Any]) -> None:
    entry = msgspec.structs.replace(host.entry(), **changes)
    assert host.refused(host.signers.sealed(host.document(entry))) == Code.ENVELOPE_MALFORMED


# 5, 6: the host's record


def test_5_the_record_is_signed_by_an_admin_and_not_older_than_the_one_known(host: Host) -> None:
    assert host.ask(record=None) == Code.ELIGIBILITY_NO_RECORD
    stranger = SigningKey.generate()
    put = HostPut(**host.signers.times(), host="h1", public_key=host.key.public.text)
    assert host.ask(record=host.signers.command(put, stranger)) == Code.SIGNATURE_UNKNOWN_KEY
    assert host.ask(record=host.signers.command(put, host.signers.activation)) == Code.SIGNATURE_UNKNOWN_KEY
    kind = WorkspacePut(**host.signers.times(), environment="sandbox")
    assert host.ask(record=host.signers.command(kind)) == Code.SCOPE_VIOLATION
    absent = msgspec.structs.replace(put, absent=True)
    assert host.ask(record=host.signers.command(absent)) == Code.ELIGIBILITY_NO_RECORD
    elsewhere = msgspec.structs.replace(put, workspace="lab")
    assert host.ask(record=host.signers.command(elsewhere)) == Code.SCOPE_VIOLATION
    host.state = msgspec.structs.replace(host.state, record_at=NOW + timedelta(days=1))
    assert host.ask() == Code.SCOPE_VIOLATION, "old labels cannot be brought back"


def test_5_a_host_that_was_taken_away_is_not_brought_back_by_its_old_record(host: Host) -> None:
    old = host.record
    put = HostPut(**host.signers.times(), host="h1", public_key=host.key.public.text, absent=True)
    gone = msgspec.structs.replace(put, issued_at=NOW + timedelta(hours=1))
    accepted = host.check(host.signers.sealed(host.document(generation=5, record=host.signers.command(gone))))
    host.state = accepted.state
    assert host.state.record_at == gone.issued_at
    assert host.ask(host.entry(generation=6), record=old) == Code.SCOPE_VIOLATION


def test_5_only_a_record_that_is_signed_and_this_hosts_is_remembered(host: Host) -> None:
    later = host.signers.times() | {"issued_at": NOW + timedelta(hours=1)}
    for record in (
        host.signers.command(HostPut(**later, host="h2", public_key=host.key.public.text)),
        host.signers.command(
            HostPut(**later, host="h1", public_key=host.key.public.text), SigningKey.generate()
        ),
    ):
        assert (
            host.check(host.signers.sealed(host.document(generation=5, record=record))).state.record_at
            is None
        )


def test_6_the_record_is_that_of_this_host_and_key(host: Host) -> None:
    assert (
        host.ask(record=host.signers.record("h2", host.key.public.text, role="web")) == Code.SCOPE_VIOLATION
    )
    other = SigningKey.generate().public.text
    assert host.ask(record=host.signers.record("h1", other, role="web")) == Code.SCOPE_VIOLATION
