"""A host that lost its state: what replays to it come to, and what is left that only a signature's own time bounds.

Its generations, the newest rollout, record and policy serial, quarantines and the clock's floor are gone with the disk. What
replaces them: documents of before name another incarnation or are older than the state; a start ends with its scope; the
trust document, fetched anew, has the floors and says who is an operator; a second operator's approval is asked for again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Place, eventually
from support_host import World
from support_stolen import NEW, NOW, OLD, OTHER, Thief, decide, outcome, scope, without

from loopback.contracts import envelope, subjects
from loopback.contracts.codes import Code
from loopback.contracts.desired import DesiredModule, DesiredState
from loopback.contracts.messages import Selector
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import Floor
from loopback.host import transitions
from loopback.host.scope import Answer
from loopback.host.state import HostState, ModuleState
from loopback.services._runtime.wire import Outgoing

HOUR = timedelta(hours=1)
_replace = msgspec.structs.replace


def wipe(thief: Thief, at: timedelta = HOUR / 2) -> None:
    """The state directory was emptied, and the agent started again that much later."""
    thief.state = HostState(incarnation="i2", since=NOW + at)
    thief.own = ModuleState(module="tiny")


def ask(thief: Thief, document: DesiredState, at: timedelta = HOUR / 2) -> Answer | Code:
    answer, why = outcome(thief, thief.signers.sealed(document), at)
    return why.code if why else answer


def first(thief: Thief, **changes: Any) -> DesiredModule:
    return thief.entry(**{"expected": None} | changes)


@pytest.mark.parametrize("incarnation", ["i1", ""])
def test_what_was_said_to_the_host_of_before_does_not_reach_it(
    incarnation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker alone can replay these, without anybody's key: also the very first, which named no incarnation."""
    thief = Thief()
    old = thief.document(first(thief), incarnation=incarnation)
    wipe(thief)
    with monkeypatch.context() as lenient:
        without(decide, "_check_incarnation")(lenient)
        assert ask(thief, old) is Answer.CHANGE
    assert ask(thief, old) == Code.HOST_INCARNATION


def test_whoever_has_activations_key_too_gets_as_far_as_the_scopes_that_still_hold() -> None:
    """The residue: an older start of an operator, as long as its scope holds, since the newer one is forgotten."""
    thief = Thief()
    older, newer = first(thief, start={"issued_at": NOW - HOUR / 4}), first(thief, target=OTHER, rollout="r2")
    thief.promote(newer)
    assert ask(thief, thief.document(_replace(older, generation=9, expected=OTHER))) == Code.SCOPE_VIOLATION
    wipe(thief)
    assert ask(thief, thief.document(older, incarnation="i2")) is Answer.CHANGE
    assert ask(thief, thief.document(older, incarnation="i2"), 2 * HOUR) == Code.SCOPE_EXPIRED
    aside = _replace(older, running=OLD)
    assert ask(thief, thief.document(aside, incarnation="i2")) == Code.SCOPE_VIOLATION


def test_policy_serials_start_anew_but_only_inside_a_scope_that_holds() -> None:
    thief = Thief()
    entry = first(thief)
    thief.own = _replace(thief.own, serial_floor=5, floor_policy="9" * 64, promoted=None)
    assert ask(thief, thief.document(entry)) == Code.POLICY_SERIAL
    wipe(thief)
    assert ask(thief, thief.document(entry, incarnation="i2")) is Answer.CHANGE
    assert ask(thief, thief.document(entry, incarnation="i2"), 2 * HOUR) == Code.SCOPE_EXPIRED


def test_floors_and_approvals_come_back_with_the_trust_document(monkeypatch: pytest.MonkeyPatch) -> None:
    thief = Thief()
    wipe(thief)
    entry = first(thief)
    for rules, code, check in (
        ({"floors": {"tiny": Floor("1.2")}}, Code.HOST_BELOW_FLOOR, "_check_floor"),
        ({"regulated": True}, Code.ROLLOUT_UNAPPROVED, "_check_approved"),
    ):
        thief.rules(**rules)
        with monkeypatch.context() as lenient:
            without(scope, check)(lenient)
            assert ask(thief, thief.document(entry, incarnation="i2")) is Answer.CHANGE
        assert ask(thief, thief.document(entry, incarnation="i2")) == code


def test_an_older_record_of_the_same_key_is_believed_until_a_newer_one_is_seen() -> None:
    """The other residue: labels that an admin took away. A new key for the host (enrol it again) ends all older records."""
    thief = Thief()
    select = {"scope": {"selector": Selector(labels={"role": "web"})}}
    entry = first(thief, start=select)
    older = thief.record
    newer = msgspec.json.decode(envelope.payload_of(older))
    newer["labels"], newer["issued_at"] = {"role": "db"}, (NOW + HOUR / 4).isoformat()
    moved = envelope.seal(envelope.COMMAND, msgspec.json.encode(newer), thief.signers.operator)
    wipe(thief)
    assert ask(thief, thief.document(entry, incarnation="i2")) is Answer.CHANGE
    seen = thief.check(thief.signers.sealed(thief.document(entry, incarnation="i2", record=moved)))
    thief.state = seen.state
    later = _replace(entry, generation=6)
    assert ask(thief, thief.document(later, incarnation="i2")) == Code.SCOPE_VIOLATION


def test_the_way_back_is_not_open_to_a_host_that_remembers_no_way_here() -> None:
    thief = Thief()
    back = thief.promote(thief.entry())
    wipe(thief)
    assert ask(thief, thief.document(back, incarnation="i2")) == Code.SCOPE_VIOLATION
    thief.own = transitions.promote(transitions.begin_trial(transitions.accept(thief.own, first(thief)), 1.0))
    again = _replace(back, running=OLD, expected=NEW)
    assert ask(thief, thief.document(again, incarnation="i2")) == Code.SCOPE_VIOLATION


# The same with a real broker and a real agent


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


@pytest.mark.broker
async def test_a_real_host_that_was_wiped_takes_no_replay_and_goes_on_when_it_is_named(world: World) -> None:
    target = await world.release("1.0", policy=1)
    newer = await world.with_policy(target, 2)
    async with world.agent() as agent:
        await eventually(lambda: hasattr(agent, "state"))
        was = agent.state.incarnation
        entry = world.signers.entry(target, 1)
        document = world.signers.desired(world.host, world.record, entry, incarnation=was)
        replay = world.signers.sealed(document)
        await world.publish(replay)
        assert (await world.reached(1)).phase is Phase.PROMOTED
        second = world.signers.entry(newer, 2, expected=target, rollout="r2")
        await world.publish(
            world.signers.sealed(world.signers.desired(world.host, world.record, second, incarnation=was))
        )
        assert (await world.reached(2)).promoted == newer
    for path in sorted(world.config.state_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    async with world.agent() as agent:
        await eventually(lambda: hasattr(agent, "state"))
        assert agent.state.incarnation != was
        # What the broker republishes to a host is what was stored: the old document, with its real signature.
        await world.bus.publish(
            Outgoing(subjects.desired("prod", world.host), msgspec.json.encode(replay), {})
        )
        await eventually(lambda: agent.refusal is not None and agent.refusal.code == Code.HOST_INCARNATION)
        assert agent.states == {}
        entry = world.signers.entry(newer, 3, rollout="r3")
        document = world.signers.desired(world.host, world.record, entry, incarnation=agent.state.incarnation)
        await world.publish(world.signers.sealed(document))
        assert (await world.reached(3)).promoted == newer
