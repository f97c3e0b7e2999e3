"""Whoever has one token, used or not, or one host, asks without end: everybody else still becomes and stays a host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from support import Place
from support_identity import Enrolling, enrolling

from loopback.cli import enrol
from loopback.contracts import hostrecord, subjects
from loopback.contracts.identity import Enrol
from loopback.contracts.keys import SigningKey
from loopback.services.eligibility import identities

pytestmark = pytest.mark.broker

FLOOD = 4000  # claims; at some four questions to the broker each they take eligibility half a minute
PATIENCE_S = 4.0  # of one attempt to enrol


@pytest.fixture
async def world(broker: Place) -> AsyncIterator[Enrolling]:
    async with enrolling(broker) as made:
        yield made


@pytest.mark.parametrize("defended", [False, True], ids=["without the defence", "defended"])
async def test_a_flood_of_claims_with_one_token_keeps_nobody_else_waiting(
    world: Enrolling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    thief, honest = await world.invite("web-1"), await world.invite("web-2")
    if not defended:
        monkeypatch.setattr(identities.Pace, "admits", lambda *_: True)
    key = SigningKey.generate()
    signed = hostrecord.claim_to(thief.invite, thief.host, thief.workspace, thief.key, key, datetime.now(UTC))
    request = msgspec.json.encode(Enrol(claim=signed, root=thief.root_version))
    nc = await enrol._connect(thief, 60.0, [])
    try:
        for _ in range(FLOOD):
            await nc.publish(
                subjects.enrol(thief.key.keyid), request, f"{subjects.enrol_inbox(thief.key.keyid)}.x"
            )
        await nc.flush()
        began = time.monotonic()
        claiming = asyncio.create_task(world.enrol(honest, tmp_path / "web-2"))
        done, _ = await asyncio.wait({claiming}, timeout=PATIENCE_S)
        if not defended:
            assert not done, f"it should have waited: {time.monotonic() - began:.1f} s"
            claiming.cancel()
            return
        await claiming
    finally:
        await nc.close()


def test_each_sender_has_a_pace_of_its_own_and_the_memory_of_senders_is_bounded() -> None:
    at = 0.0
    pace = identities.Pace(lambda: at)
    admitted = sum(pace.admits("flood") for _ in range(1000))
    assert admitted == identities.BURST
    assert pace.admits("other")
    at += 1.0
    assert sum(pace.admits("flood") for _ in range(1000)) == identities.PER_S
    for number in range(3 * identities.SENDERS):
        pace.admits(str(number))
    assert len(pace) <= identities.SENDERS
