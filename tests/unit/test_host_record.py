"""What a host asks of its own record before it obeys: an operator's word, and its own where that word was an invitation."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from support_decide import NOW, Host

from loopback.contracts import hostrecord
from loopback.contracts.codes import Code
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostInvite, HostMove
from loopback.host.decide import Answer

TOKEN, THIEF = SigningKey.generate(), SigningKey.generate()


def invite(host: Host, **changes: Any) -> HostInvite:
    fields = {
        "host": "h1",
        "claim_key": TOKEN.public.text,
        "claim_before": NOW + timedelta(days=1),
        "labels": {"role": "web"},
    }
    return HostInvite(**host.signers.times(), **fields | changes)


def test_a_host_that_took_an_invitation_obeys_under_it() -> None:
    host = Host()
    command = invite(host)
    host.record = host.signers.command(command)
    assert host.ask() is Code.ELIGIBILITY_NO_RECORD, "an invitation alone makes no host"
    assert host.ask(claim=hostrecord.claim(command, TOKEN, host.key, NOW)) is Answer.CHANGE


def test_a_claim_of_another_key_does_not_make_this_host() -> None:
    host = Host()
    command = invite(host)
    host.record = host.signers.command(command)
    assert host.ask(claim=hostrecord.claim(command, TOKEN, THIEF, NOW)) is Code.SCOPE_VIOLATION
    assert host.ask(claim=hostrecord.claim(command, THIEF, host.key, NOW)) is Code.IDENTITY_CLAIM


def test_a_host_that_moved_away_obeys_nobody_here() -> None:
    host = Host()
    move = HostMove(**host.signers.times(), host="h1", public_key=host.key.public.text, to="lab")
    host.record = host.signers.command(move)
    assert host.ask() is Code.ELIGIBILITY_NO_RECORD
