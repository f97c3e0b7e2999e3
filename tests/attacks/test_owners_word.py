"""The owner's word above any signature: modules, capabilities and publishers of host.toml, and nobody outside who changes it.

A real broker, agent and module processes; every sender has every key there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from support import Place, eventually
from support_host import TINY, World

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.host import config, install
from loopback.host.config import Allow
from loopback.trust import package, signing
from loopback.trust.manifest import Manifest, ModuleTable
from loopback.trust.repository import target_path

pytestmark = pytest.mark.broker

STRANGER = "e" * 64


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


def publisher(world: World) -> str:
    return world.signers.tuf[signing.delegated_role("tiny")].public.keyid


async def test_a_release_of_a_publisher_whom_the_owner_does_not_name_never_runs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await world.release("1.0", policy=1)
    strict = Allow(modules=("tiny",), publishers=(STRANGER,))
    with monkeypatch.context() as patch:  # without the check it runs, list or no list
        patch.setattr(install, "check_publishers", lambda *arguments, **more: None)
        async with world.agent(allow=strict, state_dir=world.config.state_dir.with_name("careless")):
            assert (await world.reached(await world.desire(target))).phase is Phase.PROMOTED
    async with world.agent(allow=strict):
        found = await world.reached(await world.desire(target, rollout="r2"))
        assert found.phase is Phase.REJECTED
        assert found.refusal is not None
        assert found.refusal.code == Code.HOST_NOT_ALLOWED
        assert publisher(world) in found.refusal.reason, "the owner has to know which key it was"
        assert "host.toml" in found.refusal.next_step
    assert not (world.config.state_dir / "modules" / "tiny" / "process.json").exists()
    async with world.agent(allow=Allow(modules=("tiny",), publishers=(STRANGER, publisher(world)))):
        found = await world.reached(await world.desire(target, rollout="r3"))
        assert (found.phase, found.refusal) == (Phase.PROMOTED, None)


async def test_a_publisher_whom_the_owner_strikes_off_is_not_started_again_nor_gone_back_to(
    world: World,
) -> None:
    """From the host's own memory of who signed: no network and no unexpired metadata is needed for it."""
    old = await world.release("1.0", policy=1)
    new = await world.with_policy(await world.release("1.1"), 2)
    allowed = Allow(modules=("tiny",), publishers=(publisher(world),))
    async with world.agent(allow=allowed) as agent:
        assert (await world.reached(await world.desire(old))).phase is Phase.PROMOTED
        assert (
            await world.reached(await world.desire(new, expected=old, rollout="r2"))
        ).phase is Phase.PROMOTED
        kept = agent.store.module("tiny").read().signers
        assert kept == {running.package: (publisher(world),) for running in (old, new)}
    struck = Allow(modules=("tiny",), publishers=(STRANGER,))
    async with world.agent(allow=struck) as agent:

        async def degraded() -> bool:
            supervisor = agent.supervisors.get("tiny")
            problem = supervisor.problem if supervisor else None
            return problem is not None and problem.code == Code.HOST_NOT_ALLOWED

        await eventually(degraded)
        assert agent.supervisors["tiny"].process is None
        assert agent.store.module("tiny").read().promoted == new, "what the kernel enforces stays"
        for back in (old, new):
            with pytest.raises(Refused, match="owner does not allow") as caught:
                install.verify(
                    agent.trust.repository,
                    agent.store,
                    back,
                    "tiny",
                    agent.config,
                    agent.features,
                    WorkspaceRules(),
                    kept=True,
                )
            assert caught.value.code == Code.HOST_NOT_ALLOWED


async def test_nothing_that_arrives_changes_what_the_owner_allows(world: World, tmp_path: Path) -> None:
    """Desired state, policy, package and frames that all speak of host.toml, from whoever has every key."""
    path = tmp_path / "etc" / "host.toml"
    path.parent.mkdir(mode=0o755)
    config.write_config(msgspec.structs.replace(world.config, allow=Allow(modules=("tiny",))), path)
    before = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
    loaded = config.load(path)
    wish = {"modules": ["tiny", "other"], "capabilities": ["CAP_SYS_ADMIN"], "publishers": []}

    greedy = await world.release("1.0", capabilities=("CAP_SYS_ADMIN",))
    files = {
        "lib/tiny.py": TINY,
        "host.toml": b"[allow]\nmodules = ['other']\n",
        "etc/host.toml": b"x",
        "allow": b"*",
    }
    table = ModuleTable(name="tiny", version="1.1", entry=("{python}", "-P", "-m", "tiny"))
    data = package.build(files, Manifest(module=table))
    world._releases.targets[target_path("tiny", "1.1")] = signing.release(
        target_path("tiny", "1.1"), await world.blob(data), len(data), "1.1", "stable"
    )
    await world._publish_metadata()
    talkative = await world.with_policy(
        msgspec.structs.replace(greedy, version="1.1", package=hashlib.sha256(data).hexdigest()),
        1,
        allow=wish,
    )

    agent_config = {name: getattr(loaded, name) for name in loaded.__struct_fields__}
    async with world.agent(**agent_config) as agent:
        found = await world.reached(await world.desire(greedy))
        assert found.refusal is not None
        assert found.refusal.code == Code.MANIFEST_CAPABILITY
        found = await world.reached(await world.desire(talkative, rollout="r2"))
        assert found.phase is Phase.PROMOTED, "there is nothing wrong with it but what it wishes for"

        # a document with fields that there are not, signed by activation
        world.generation += 1
        entry = world.signers.entry(
            None, world.generation, rollout="r3", start={"module": "other", "scope": {"module": "other"}}
        )
        plain = msgspec.to_builtins(
            world.signers.desired(world.host, world.record, msgspec.structs.replace(entry, module="other"))
        )
        forged = {**plain, "allow": wish, "config": {"allow": wish}}
        signed = envelope.seal(envelope.DESIRED, msgspec.json.encode(forged), world.signers.activation)
        await world.publish(signed)

        async def declined() -> bool:
            one = await world.module("other")
            return one is not None and one.refusal is not None and one.refusal.code == Code.HOST_NOT_ALLOWED

        await eventually(declined)
        assert agent.config.allow == Allow(modules=("tiny",))
        with pytest.raises(AttributeError):
            agent.config.allow.modules = ("tiny", "other")  # type: ignore[misc]
        unpacked = next((world.config.state_dir / "modules" / "tiny" / "versions").glob("1_2e1-*"))
        assert (unpacked / "host.toml").exists(), (
            "it lies in the package's own folder, and nobody reads it there"
        )
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert config.load(path) == loaded


async def test_a_host_whose_file_others_can_write_does_not_start(world: World, tmp_path: Path) -> None:
    path = tmp_path / "etc" / "host.toml"
    path.parent.mkdir(mode=0o755)
    config.write_config(world.config, path)
    path.chmod(0o666)
    text = path.read_text().replace('modules = ["tiny"]', 'modules = ["tiny", "other"]')
    path.write_text(text)  # as anybody could
    assert config.parse(text, path).allow.modules == ("tiny", "other"), (
        "without the look at its mode it is believed"
    )
    with pytest.raises(Refused, match="changed by everybody") as caught:
        config.load(path)
    assert caught.value.next_step == f"chmod go-w {path}"
