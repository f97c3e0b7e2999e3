"""The workspace's chain on a real broker: every desired state covers the journal up to its own decision."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from activation_fleet import Fleet, fleet
from support import Place
from support_fleet import WORKSPACE
from test_activation_service import heads, start

from loopback.contracts import journal, subjects

pytestmark = pytest.mark.broker
MODULES = ("firewall", "edge", "diagnostics")


@pytest.fixture
async def place(any_broker: Place) -> AsyncIterator[Fleet]:
    async with fleet(any_broker, "h0", "h1", "h2", replicas=2) as found:
        for module in MODULES[1:]:
            await found.publish_release(module, "1.0.0", "a" * 64)
        yield found


async def test_replicas_that_race_over_several_rollouts_write_one_chain(place: Fleet) -> None:
    sent = await asyncio.gather(*(place.send(start(m, module=m)) for m in MODULES))
    assert all(result.ok for result in sent), sent
    for module in MODULES:
        await place.ended(module, "DONE")
    chain = await heads(place)
    assert (place.state.links, place.state.head) == (len(chain) - 1, chain[-1])
    stored = await place.admin.read(
        subjects.workspace_stream(WORKSPACE), [subjects.rollout(WORKSPACE, "*", "*")]
    )
    links = [journal.decode(message.data) for message in stored]
    for host in place.hosts.values():
        assert len(host.states) == len(MODULES)
        covered = [state.journal_links for state in host.states]
        assert covered == sorted(set(covered)), "a newer document covers more"
        for state in host.states:
            assert state.journal_head == chain[state.journal_links]
            told = [
                number
                for number, link in enumerate(links[: state.journal_links], 1)
                if isinstance(link.event, journal.Assigned)
                and any((a.host, a.generation) == (host.name, state.generation) for a in link.event.hosts)
            ]
            assert len(told) == 1, "the decision that told it is in what it witnesses"
