"""A stolen activation against a real broker, a real agent and a real module: what it asks for, and what enforces afterwards.

Here too each attack first reaches its target with one defence taken out of the running agent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Place, eventually
from support_host import WORKSPACE, World
from support_stolen import forgetful, nothing

from loopback.contracts import envelope
from loopback.contracts.codes import Code
from loopback.contracts.desired import DesiredModule, Running
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import RolloutApprove
from loopback.contracts.reports import ModuleStatus, Phase
from loopback.contracts.trustdoc import Floor, Operator, Role, Trust, WorkspaceRules
from loopback.host import decide, install, scope
from loopback.host.agent import Agent
from loopback.trust import signing

pytestmark = pytest.mark.broker


class Regulated(World):
    """A host in a workspace whose rules the trust document knows, with an approver."""

    def __init__(self, place: Place, tmp_path: Path) -> None:
        super().__init__(place, tmp_path)
        self.eve = SigningKey.generate()

    async def rule(self, **rules: Any) -> None:
        """Prepare everything, with these rules in the trust document."""
        document = self.signers.document
        self.signers.document = msgspec.structs.replace(
            document,
            operators=(
                *document.operators,
                Operator("eve", self.eve.public.text, {WORKSPACE: (Role.APPROVER,)}),
            ),
            workspaces={WORKSPACE: WorkspaceRules(**rules)},
        )
        self.signers.trust = Trust(self.signers.document)
        await self.prepare()

    @property
    def publisher(self) -> str:
        """The id of the key that signs the tiny module's releases."""
        return self.signers.tuf[signing.delegated_role("tiny")].keyid

    async def ask(self, target: Running | None, approved: bool = False, **changes: Any) -> ModuleStatus:
        """Ask for it as activation would, and wait for the host's answer."""
        rollout = f"r{self.generation + 1}"
        entry = self.signers.entry(target, self.generation + 1, **{"rollout": rollout} | changes)
        if approved:
            entry = self.approve(entry)
        return await self.send(entry)

    async def send(self, entry: DesiredModule) -> ModuleStatus:
        """Publish an entry as it is, and wait for the host's answer."""
        self.generation, self.last = entry.generation, entry
        document = self.signers.desired(self.host, self.record, entry)
        await self.publish(self.signers.sealed(document))
        return await self.reached(self.generation)

    def back(self, came_from: Running) -> DesiredModule:
        """The way back from what was asked for last."""
        return msgspec.structs.replace(
            self.last,
            running=came_from,
            expected=self.last.running,
            generation=self.generation + 1,
            returning=True,
        )

    def approve(self, entry: DesiredModule) -> DesiredModule:
        """With eve's signature."""
        start = hashlib.sha256(envelope.payload_of(entry.scope)).hexdigest()
        command = RolloutApprove(**self.signers.times(), rollout=entry.rollout, start=start)
        return msgspec.structs.replace(entry, approvals=(self.signers.command(command, self.eve),))

    def enforced(self) -> str | None:
        """The policy in what the module takes for its kernel."""
        path = self.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
        found = json.loads(path.read_text())["policy"]
        assert found is None or isinstance(found, str)
        return found


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[Regulated]:
    yield Regulated(broker, tmp_path)


def code(found: ModuleStatus) -> Code | None:
    return found.refusal.code if found.refusal else None


async def test_an_unapproved_rollout_changes_no_host_of_a_regulated_workspace(
    world: Regulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.rule(regulated=True, publishers={"tiny": (world.publisher,)})
    one = await world.release("1.0", policy=1)
    two, three = await world.with_policy(one, 2), await world.with_policy(one, 3)
    async with world.agent():
        assert (await world.ask(one, approved=True)).promoted == one
        with monkeypatch.context() as lenient, forgetful():
            lenient.setattr(scope, "_check_approved", nothing)
            assert (await world.ask(two, expected=one)).promoted == two
        found = await world.ask(three, expected=two)
        assert (found.phase, code(found)) == (Phase.REJECTED, Code.ROLLOUT_UNAPPROVED)
        assert (found.promoted, found.enforcing, world.enforced()) == (two, True, two.policy)
        removed = await world.ask(None, expected=two)
        assert code(removed) == Code.ROLLOUT_UNAPPROVED
        assert world.enforced() == two.policy, "nor is a firewall taken away by one person"
        assert (await world.ask(three, approved=True, expected=two)).promoted == three


async def test_a_release_by_a_key_that_is_not_pinned_is_never_started(
    world: Regulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.rule(publishers={"tiny": ("5" * 64,)})
    one, two = await world.release("1.0", policy=1), await world.release("1.1", policy=2)
    async with world.agent():
        with monkeypatch.context() as lenient:
            lenient.setattr(install, "check_publishers", nothing)
            assert (await world.ask(one)).promoted == one
        found = await world.ask(two, expected=one)
        assert (found.phase, code(found)) == (Phase.REJECTED, Code.HOST_PUBLISHER)
        assert (found.promoted, found.enforcing, world.enforced()) == (one, True, one.policy)
        assert found.noncompliant is not None, "and what came in unseen is shown"
        assert found.noncompliant.code == Code.HOST_PUBLISHER


async def test_a_version_below_the_floor_comes_neither_forth_nor_back(
    world: Regulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.rule(floors={"tiny": Floor("1.1")})
    old, new = await world.release("1.0", policy=1), await world.release("1.1", policy=2)
    async with world.agent():
        with monkeypatch.context() as lenient:
            lenient.setattr(scope, "_check_floor", nothing)
            found = await world.ask(old)
            assert found.promoted == old
            assert found.noncompliant is not None, "what runs below the floor says so"
            assert found.noncompliant.code == Code.HOST_BELOW_FLOOR
        changed = await world.ask(new, expected=old)
        assert (changed.promoted, changed.noncompliant) == (new, None)
        found = await world.send(world.back(old))
        assert (found.phase, code(found)) == (Phase.REJECTED, Code.HOST_BELOW_FLOOR)
        assert (found.promoted, found.enforcing, world.enforced()) == (new, True, new.policy)


async def test_the_way_back_below_a_floor_in_force_is_not_taken(
    world: Regulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The downgrade that needs no signature of now: both rollouts are an operator's own, and the floor came after them."""
    await world.rule(floors={"tiny": Floor("1.1", datetime.now(UTC) - timedelta(hours=1))})
    old, new = await world.release("1.0", policy=1), await world.release("1.1", policy=2)
    async with world.agent():
        with monkeypatch.context() as before:
            before.setattr(scope, "_check_floor", nothing)
            assert (await world.ask(old)).promoted == old
        assert (await world.ask(new, expected=old)).promoted == new
        with monkeypatch.context() as lenient:
            lenient.setattr(scope, "_check_floor", nothing)
            found = await world.send(world.back(old))
            assert (found.promoted, found.refusal) == (old, None)
            assert world.enforced() == old.policy, "without the defence, the attack reaches its target"
        assert (await world.ask(new, expected=old)).promoted == new
        found = await world.send(world.back(old))
        assert (found.phase, code(found)) == (Phase.REJECTED, Code.HOST_BELOW_FLOOR)
        assert (found.promoted, found.enforcing, world.enforced()) == (new, True, new.policy)


async def test_one_huge_generation_does_not_freeze_a_host(
    world: Regulated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "loopback.host")
    await world.rule()
    one = await world.release("1.0", policy=1)
    two, three = await world.with_policy(one, 2), await world.with_policy(one, 3)

    async def huge(agent: Agent, refused: Callable[[], bool]) -> None:
        document = world.signers.desired(world.host, world.record, generation=2**53 - 1)
        await world.publish(world.signers.sealed(document))
        await eventually(refused)

    async with world.agent() as agent:
        assert (await world.ask(one)).promoted == one
        await huge(agent, lambda: agent.refusal is not None and agent.refusal.code == Code.HOST_GENERATION)
        assert (await world.ask(two, expected=one)).promoted == two, "activation goes on"
        assert agent.state.generation == world.generation
        with monkeypatch.context() as lenient:
            lenient.setattr(decide, "_check_generation", nothing)
            await huge(agent, lambda: agent.state.generation == 2**53 - 1)
        world.generation += 1
        entry = world.signers.entry(three, world.generation, expected=two, rollout="r9")
        await world.publish(world.signers.sealed(world.signers.desired(world.host, world.record, entry)))
        await eventually(lambda: f"generation {world.generation} is older than" in caplog.text)
        assert world.enforced() == two.policy, "without the bound nobody is obeyed again"
