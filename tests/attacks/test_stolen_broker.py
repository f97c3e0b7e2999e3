"""Somebody owns the broker: may store, replace, withhold and send anything under any subject, but has nobody's key.

Each attack is first carried through with the one defence removed that is meant to stop it, against a real agent that runs a
real module; then it is tried again with the defence in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Place, eventually
from support_host import WORKSPACE, World

from loopback.contracts import abi, envelope, subjects
from loopback.contracts.codes import Code
from loopback.contracts.desired import Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import Phase
from loopback.host import decide, policies
from loopback.services._runtime.wire import Outgoing
from loopback.trust import blobs

pytestmark = pytest.mark.broker


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


def enforced(world: World) -> str | None:
    """The policy that the module's own kernel state has."""
    path = world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json"
    return json.loads(path.read_text())["policy"] if path.exists() else None


async def push(world: World, signed: Envelope) -> None:
    """What only the broker's owner can do: write to a host's own subject."""
    subject = subjects.to_host(WORKSPACE, world.host, "desired")
    await world.bus.nc.publish(subject, msgspec.json.encode(signed))
    await world.bus.nc.flush()


async def refused_with(world: World, code: Code) -> None:
    """Until the host reports that it refuses with this code."""

    async def check() -> bool:
        return any(s.refusal is not None and s.refusal.code == code for s in await world.statuses())

    await eventually(check)


def believe_anybody(monkeypatch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[None]:
    """No signature of a desired state is checked any more."""
    honest = envelope.open_envelope

    def credulous(signed: Envelope, kind: str, keys: Any) -> tuple[bytes, tuple[str, ...]]:
        if kind == envelope.DESIRED:
            return envelope.payload_of(signed), ("anybody",)
        return honest(signed, kind, keys)

    @contextlib.contextmanager
    def patched() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(envelope, "open_envelope", credulous)
            yield

    return patched()


async def test_a_desired_state_that_activation_did_not_sign_moves_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await world.release("1.0", policy=1), await world.release("1.1", policy=2)
    thief = SigningKey.generate()

    def forged(generation: int, target: Running, expected: Running | None, rollout: str) -> Envelope:
        # The scope is genuine: an operator did sign a rollout of this. Only that it is time, nobody said.
        entry = world.signers.entry(target, generation, expected=expected, rollout=rollout)
        return world.signers.sealed(world.signers.desired(world.host, world.record, entry), thief)

    async with world.agent():
        await eventually(lambda: world.statuses())
        with believe_anybody(monkeypatch):
            await push(world, forged(1, first, None, "r1"))
            assert (await world.reached(1)).promoted == first
        assert enforced(world) == first.policy, "without the defence, the attack reaches its target"

        await push(world, forged(2, second, first, "r2"))
        await refused_with(world, Code.SIGNATURE_UNKNOWN_KEY)
        found = await world.module()
        assert found is not None
        assert (found.promoted, found.generation) == (first, 1)
        assert enforced(world) == first.policy


async def test_the_document_of_another_host_moves_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await world.release("1.0", policy=1)
    other = world.signers.sealed(
        world.signers.desired("web-2.example", world.record, world.signers.entry(target, 1))
    )
    async with world.agent() as agent:
        await eventually(lambda: world.statuses())
        await push(world, other)
        await refused_with(world, Code.HOST_WRONG_HOST)
        assert enforced(world) is None

        honest = decide.check_desired

        def as_that_host(signed: Envelope, identity: decide.Identity, *rest: Any) -> decide.Accepted:
            taken = msgspec.structs.replace(identity, host="web-2.example")
            return honest(signed, taken, *rest)

        with monkeypatch.context() as patch:
            # Who this host is counts twice: in the document and in the operator's record. Both are put aside.
            patch.setattr(decide, "check_desired", as_that_host)
            patch.setattr(
                world, "record", world.signers.record("web-2.example", world.key.public.text, role="web")
            )
            entry = world.signers.entry(target, 1)
            await push(
                world, world.signers.sealed(world.signers.desired("web-2.example", world.record, entry))
            )
            assert (await world.reached(1)).promoted == target
        assert agent.config.host == world.host
        assert enforced(world) == target.policy, "without the defence, the attack reaches its target"


async def test_a_policy_that_is_swapped_in_the_store_is_not_enforced(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await world.release("1.0", policy=1)
    evil, evil_digest = world.signers.policy(1, {"serial": 1, "open": True})
    assert target.policy is not None
    await swap(world, target.policy, evil)
    async with world.agent():
        found = await world.reached(await world.desire(target))
        assert found.phase is not Phase.PROMOTED
        assert found.refusal is not None
        assert found.refusal.code == Code.BLOB_DIGEST
        assert enforced(world) is None

    # With no digest compared, neither by whoever fetches nor by whoever is about to use it, the other policy is enforced.
    def uncompared(data: bytes, target: Running, *_: Any) -> Any:
        payload, _signers = envelope.open_envelope(
            envelope.parse(data), envelope.POLICY, world.signers.trust.operator_keys
        )
        return policies.read_policy(payload)

    async with world.agent(state_dir=world.config.state_dir.with_name("state-2")):
        with monkeypatch.context() as patch:
            patch.setattr(policies, "check_policy", uncompared)
            patch.setattr(policies, "kept_policy", uncompared)
            patch.setattr(blobs, "_digest_of", lambda path: path.name.split(".")[0])
            patch.setattr(hashlib, "sha256", Uncompared(evil, target.policy))
            world.generation = 10
            found = await world.reached(await world.desire(target, rollout="r2"))
            assert found.phase is Phase.PROMOTED, found
    assert evil_digest != target.policy


async def test_whoever_is_told_nothing_stays_as_it_is(world: World) -> None:
    """Withholding is all that is left: the host goes on enforcing what it promoted, and says so when it can."""
    target = await world.release("1.0", policy=1)
    async with world.agent():
        await world.reached(await world.desire(target))
    await world.bus.api("STREAM.PURGE.LB_TUF")
    await world.bus.api("STREAM.PURGE.LB_BLOB")
    await world.bus.api(f"STREAM.DELETE.{world.stream}")
    async with world.agent() as agent:

        def health() -> abi.HealthReport | None:
            found = agent.supervisors.get("tiny")
            return found.health if found and found.alive else None

        found = await eventually(health)
        assert found is not None
        assert (found.enforcing, found.policy) == (True, target.policy)
    assert enforced(world) == target.policy


async def swap(world: World, digest: str, data: bytes) -> None:
    """Put other content under a digest: only the broker's owner can take away what was stored first."""
    await world.bus.api("STREAM.PURGE.LB_BLOB", {"filter": f"lb.blob.{digest}.>"})
    for number, chunk in enumerate(blobs.split(data)):
        await world.bus.publish(Outgoing(subjects.blob(digest, number), chunk, blobs.headers(len(data))))


class Uncompared:
    """hashlib.sha256 that takes one content for another."""

    def __init__(self, content: bytes, taken_for: str) -> None:
        self._real = hashlib.sha256
        self._content, self._taken_for = content, taken_for

    def __call__(self, data: bytes = b"") -> Any:
        made = self._real(data)
        if data == self._content:
            taken = self._taken_for

            class Same:
                def hexdigest(self) -> str:
                    return taken

                def digest(self) -> bytes:
                    return bytes.fromhex(taken)

            return Same()
        return made
