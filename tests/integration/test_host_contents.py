"""A host and a policy whose content is too large for its envelope: a real agent, a real module, a real broker."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import Place, eventually
from support_host import World, agent_command

from loopback.contracts import envelope, subjects
from loopback.contracts.codes import Code
from loopback.contracts.desired import Running
from loopback.contracts.reports import Phase
from loopback.host import contents, install
from loopback.host.config import write_config
from loopback.host.disk import Disk
from loopback.host.state import ModuleState, Store
from loopback.services._runtime.wire import Outgoing
from loopback.trust import blobs

pytestmark = pytest.mark.broker


def large(mark: str, size: int = 3 * envelope.MAX_ENVELOPE) -> bytes:
    """A policy's content of about this size."""
    return json.dumps({"mark": mark, "filling": "x" * size}).encode()


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "RETRIES_S", ())


def enforced(world: World) -> str | None:
    found = json.loads((world.config.state_dir / "modules" / "tiny" / "data" / "kernel.json").read_text())
    return str(found["policy"])


def kept(world: World) -> set[str]:
    """The names of what lies in the host's folder of contents."""
    return {path.name for path in (world.config.state_dir / "contents").iterdir()}


async def keeps(world: World, *wanted: bytes) -> None:
    """Until the host holds these contents and no other: what is not needed is swept after the change was reported."""
    names = {name(content) for content in wanted}
    await eventually(lambda: kept(world) == names)


def name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


async def take_away(world: World, content: bytes, *chunks: int) -> None:
    for chunk in chunks:
        await world.bus.api("STREAM.PURGE.LB_BLOB", {"filter": subjects.blob(name(content), chunk)})


async def put_back(world: World, content: bytes, *chunks: int) -> None:
    parts = list(blobs.split(content))
    for chunk in chunks:
        subject = subjects.blob(name(content), chunk)
        await world.bus.publish(Outgoing(subject, parts[chunk], blobs.headers(len(content))))


async def test_a_policy_larger_than_an_envelope_reaches_the_module_as_it_was_signed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = large("a")
    target = await world.with_content(await world.release("1.0"), 1, content)
    staged: list[bytes] = []
    honest = install.policy_content

    def watched(store: Store, running: Running) -> bytes | None:
        found = honest(store, running)
        staged.append(found or b"")
        return found

    monkeypatch.setattr(install, "policy_content", watched)
    async with world.agent():
        found = await world.reached(await world.desire(target))
        assert (found.phase, found.promoted, found.enforcing) == (Phase.PROMOTED, target, True)
    assert enforced(world) == target.policy
    assert content in staged
    assert kept(world) == {name(content)}


async def test_content_that_is_here_is_not_fetched_again_for_another_policy_that_names_it(
    world: World,
) -> None:
    content = large("a")
    old = await world.with_content(await world.release("1.0"), 1, content)
    async with world.agent():
        await world.reached(await world.desire(old))
        new = await world.with_content(old, 2, content)
        await world.bus.api("STREAM.PURGE.LB_BLOB", {"filter": subjects.blob_chunks(name(content))})
        found = await world.reached(await world.desire(new, expected=old, rollout="r2"))
        assert found.promoted == new
    assert kept(world) == {name(content)}


async def test_the_disk_holds_only_what_runs_and_what_a_way_back_needs(world: World) -> None:
    at: Running | None = None
    release = await world.release("1.0")
    each = [large(mark) for mark in "abcd"]
    async with world.agent():
        for serial, content in enumerate(each, 1):
            target = await world.with_content(release, serial, content)
            found = await world.reached(await world.desire(target, expected=at, rollout=f"r{serial}"))
            assert found.promoted == target
            at = target
            await keeps(world, *each[max(0, serial - 2) : serial])
        small = await world.with_policy(release, 5)
        scope = world.signers.command(world.signers.rollout(small, "r5"))
        await world.reached(await world.desire(small, expected=at, rollout="r5", scope=scope))
        await keeps(world, each[3])
        await world.bus.api("STREAM.PURGE.LB_BLOB")  # what a way back needs is here
        back = await world.desire(at, expected=small, rollout="r5", scope=scope, returning=True)
        assert (await world.reached(back)).promoted == at
        assert enforced(world) == at.policy if at else False
        await world.reached(await world.desire(None, expected=at, rollout="r6"))


async def test_a_download_that_was_cut_off_goes_on_where_it_ended(world: World, impatient: None) -> None:
    old = await world.release("1.0", policy=1)
    content = large("a")
    new = await world.with_content(old, 2, content)
    await take_away(world, content, 12)
    async with world.agent():
        await world.reached(await world.desire(old))
        cut = await world.reached(await world.desire(new, expected=old, rollout="r2"))
        assert (cut.phase, cut.promoted, cut.enforcing) == (Phase.REJECTED, old, True)
        assert cut.refusal is not None
        assert cut.refusal.code == Code.BLOB_MISSING
        assert enforced(world) == old.policy
        assert kept(world) == {f"{name(content)}.part"}, "what arrived is kept"
        await put_back(world, content, 12)
        # All but the first, which says the size: whoever began anew would miss them.
        await take_away(world, content, *range(1, 12))
        done = await world.reached(await world.desire(new, expected=old, rollout="r3"))
        assert done.promoted == new
    assert kept(world) == {name(content)}


async def test_what_was_cut_off_is_swept_once_another_policy_is_asked_for(
    world: World, impatient: None
) -> None:
    old = await world.release("1.0", policy=1)
    content = large("a")
    async with world.agent():
        await world.reached(await world.desire(old))
        cut = await world.with_content(old, 2, content)
        await take_away(world, content, 12)
        await world.reached(await world.desire(cut, expected=old, rollout="r2"))
        new = await world.with_policy(old, 3)
        await world.reached(await world.desire(new, expected=old, rollout="r3"))
        await keeps(world)


async def test_damaged_content_on_disk_is_fetched_again(world: World) -> None:
    content = large("a")
    target = await world.with_content(await world.release("1.0"), 1, content)
    folder = world.config.state_dir / "contents"
    folder.mkdir(parents=True)
    (folder / name(content)).write_bytes(bytes(len(content)))
    async with world.agent():
        found = await world.reached(await world.desire(target))
        assert found.promoted == target
    assert (folder / name(content)).read_bytes() == content


async def test_a_full_disk_is_said_and_the_old_policy_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await world.release("1.0", policy=1)
    new = await world.with_content(old, 2, large("a"))

    async def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with world.agent():
        await world.reached(await world.desire(old))
        with monkeypatch.context() as patch:
            patch.setattr(contents.blobs, "download", full)
            found = await world.reached(await world.desire(new, expected=old, rollout="r2"))
        assert (found.phase, found.promoted, found.enforcing) == (Phase.REJECTED, old, True)
        assert found.refusal is not None
        assert found.refusal.code == Code.HOST_DISK
        again = await world.reached(await world.desire(new, expected=old, rollout="r3"))
        assert again.promoted == new, "once the disk is well, nothing is in the way"


# Killed


@contextmanager
def agent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = agent_command(tmp_path / "host.toml")
    with (tmp_path / "agent.log").open("ab") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def state(world: World) -> ModuleState:
    return Store(Disk(), world.config.state_dir).module("tiny").read()


async def test_an_agent_killed_in_the_middle_of_a_download_goes_on_after_its_restart(
    world: World, tmp_path: Path
) -> None:
    write_config(world.config, tmp_path / "host.toml")
    old = await world.release("1.0", policy=1)
    content = large("a")
    new = await world.with_content(old, 2, content)
    await take_away(world, content, 12)
    part = world.config.state_dir / "contents" / f"{name(content)}.part"
    with agent(tmp_path) as process:
        await world.reached(await world.desire(old))
        generation = await world.desire(new, expected=old, rollout="r2")
        await eventually(lambda: part.exists() and part.stat().st_size == 12 * blobs.CHUNK)
        process.kill()
        process.wait(60)
    assert (state(world).promoted, state(world).step) == (old, "download")
    await put_back(world, content, 12)
    await take_away(world, content, *range(1, 12))
    with agent(tmp_path):
        found = await world.reached(generation, 60)
        assert (found.phase, found.promoted) == (Phase.PROMOTED, new)
    assert kept(world) == {name(content)}


@pytest.mark.parametrize("step", ["stage-policy", "watch-trial"])
async def test_an_agent_killed_on_trial_of_a_large_policy_has_the_old_one_back(
    world: World, tmp_path: Path, step: str
) -> None:
    write_config(world.config, tmp_path / "host.toml")
    content, other = large("a"), large("b", 8 * 1024 * 1024)
    old = await world.with_content(await world.release("1.0"), 1, content)
    new = await world.with_content(await world.release("1.1"), 2, other)
    with agent(tmp_path) as process:
        await world.reached(await world.desire(old), 60)
        generation = await world.desire(new, expected=old, rollout="r2", start={"trial_s": 30.0})
        await eventually(
            lambda: state(world).trial is not None and state(world).step in (step, "watch-trial")
        )
        process.kill()
        process.wait(60)
    assert kept(world) == {name(content), name(other)}
    with agent(tmp_path):
        found = await world.reached(generation, 60)
        assert (found.phase, found.promoted) == (Phase.UNCONFIRMED, old)
        await eventually(lambda: enforced(world) == old.policy)
        done = await world.reached(await world.desire(new, expected=old, rollout="r3"), 60)
        assert (done.phase, done.promoted) == (Phase.PROMOTED, new)
