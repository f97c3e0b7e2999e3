"""Following a stream from the command line: what is stored, silence, and what comes after it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from support import Place

from loopback.cli import context
from loopback.contracts import subjects
from loopback.services._runtime.bus import Outgoing

pytestmark = pytest.mark.broker


async def test_a_follower_outlasts_silence_and_reads_on(
    broker: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "FETCH_S", 0.3)
    stream = await broker.workspace("quiet")
    bus = await broker.bus()
    subject = subjects.rollout("quiet", "r1", "created")
    silences = 0

    async with context.connect(
        context.Context(broker.home, broker.url, broker.home / "creds" / "operator.creds", tmp_path / "none")
    ) as session:
        await bus.publish(Outgoing(subject, b"first"))
        async with aclosing(session.follow(stream, [subject])) as messages:
            assert (await anext(messages)).data == b"first"
            coming = asyncio.ensure_future(anext(messages))
            while silences < 4:
                done, _ = await asyncio.wait({coming}, timeout=context.FETCH_S)
                assert not done, "nothing was published, so nothing may come or break"
                silences += 1
            await bus.publish(Outgoing(subject, b"second"))
            assert (await asyncio.wait_for(coming, 60)).data == b"second"
        assert [m.data for m in await session.read(stream, [subject])] == [b"first", b"second"]
        assert await session.read(stream, [subjects.rollout("quiet", "r2", "*")]) == []
