"""An abort meets what hosts say at the same moment."""

from __future__ import annotations

import pytest
from activation_world import World

from loopback.contracts import journal
from loopback.contracts.codes import Code
from loopback.contracts.messages import Wave
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutstate import Standing
from loopback.services.activation import decide as rules


@pytest.mark.parametrize("code", [Code.HOST_EXPECTED, Code.MODULE_DIED])
def test_a_host_that_refuses_while_its_rollout_is_aborted_is_told_to_return_once(code: Code) -> None:
    world = World(2)
    rollout = world.begin("r1", waves=(Wave(name="all", percent=100),))
    assert {p.standing for p in rollout.hosts.values()} == {Standing.ASSIGNED}
    world.write("r1", journal.RollingBack(reason="no", operators=("ada",)))
    generation = rollout.hosts["h0"].generation
    world.report("h0", Phase.REJECTED, None, code=code)
    (event,) = rules.decide(world.workspace, rollout, world.now, world.records)
    assert isinstance(event, journal.Assigned)
    assert sorted(a.host for a in event.hosts) == ["h0", "h1"]
    assert {a.host: a.generation for a in event.hosts}["h0"] == generation + 1
