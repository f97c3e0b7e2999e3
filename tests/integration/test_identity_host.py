"""A host's identity as it changes, with a real agent, broker and eligibility: renewed, refused, moved, copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Place, eventually
from support_host import World
from support_identity import eligible

from loopback.cli import creds
from loopback.contracts import reports, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostMove, HostPut
from loopback.contracts.reports import Status
from loopback.host.agent import Agent
from loopback.host.disk import Disk
from loopback.services._runtime.settings import Issuer
from loopback.trust import natsjwt

pytestmark = pytest.mark.broker
LIFE = timedelta(seconds=4)


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


def short_lived(world: World, life: timedelta = LIFE) -> None:
    """Credentials that end soon, for the same key, and new ones that do too."""
    home = world.place.home
    token, key = natsjwt.read_creds(world.config.creds.read_text())
    account = natsjwt.public("account", creds.read_key(home, "account").public)
    now = datetime.now(UTC)
    token = natsjwt.user(
        creds.read_key(home, "role-host"),
        account,
        key.public,
        subjects.token(world.host),
        ("ws:prod",),
        now,
        now + life,
    )
    world.config.creds.write_text(natsjwt.creds(token, natsjwt.seed("user", key)))
    path = home / "creds" / "eligibility.issuer"
    issuer = msgspec.structs.replace(Issuer.load(path), host_days=life.total_seconds() / 86400)
    path.write_bytes(msgspec.json.encode(issuer))


def put(world: World, **changes: Any) -> HostPut:
    fields = {**world.signers.times(), "host": world.host, "public_key": world.key.public.text}
    return HostPut(**fields | changes)


async def joined(agent: Agent) -> None:
    await eventually(lambda: hasattr(agent, "link") and agent.link.connected)


async def heartbeats_after(world: World, at: datetime, workspace: str = "prod") -> bool:
    subject = subjects.from_host(workspace, world.host, "heartbeat")
    found = await world.bus.last(subjects.STREAM_REPORTS, subject)
    return found is not None and found.time > at


async def test_a_host_renews_its_credentials_and_outlives_each_of_them(world: World) -> None:
    short_lived(world)
    issued: set[int] = set()
    async with eligible(world, "prod") as send:
        await send(put(world))
        before = world.config.creds.read_text()
        async with world.agent() as agent:
            await joined(agent)

            def lives() -> bool:
                issued.add(natsjwt.read(agent.identity.jwt()).iat)
                return len(issued) >= 4

            await eventually(lives)
            first_end = datetime.fromtimestamp(min(issued), UTC) + LIFE
            assert await eventually(lambda: heartbeats_after(world, first_end + timedelta(seconds=0.5)))
            assert world.config.creds.read_text() == before, (
                "the credentials file is not the agent's to write"
            )
        path = world.config.state_dir / "identity.json"
        assert path.stat().st_mode & 0o77 == 0
        async with world.agent() as agent:  # the file's own credentials have long expired
            now = datetime.now(UTC)
            assert await eventually(lambda: heartbeats_after(world, now))


async def test_a_host_whose_credentials_expired_comes_back_when_they_are_renewed_in_time_again(
    world: World,
) -> None:
    """Eligibility was away for a while: nothing on the host ends, and it is asked again and again."""
    short_lived(world, timedelta(seconds=6))
    async with world.agent() as agent:
        await joined(agent)
        async with eligible(world, "prod") as send:
            await send(put(world))
            first = natsjwt.read(agent.identity.jwt()).iat
            await eventually(lambda: natsjwt.read(agent.identity.jwt()).iat > first)


async def test_a_withdrawn_host_gets_no_new_credentials_and_knows_why(world: World) -> None:
    short_lived(world)
    async with eligible(world, "prod") as send:
        await send(put(world))
        await send(put(world, absent=True))
        async with world.agent() as agent:
            await joined(agent)
            refusal = await eventually(lambda: agent.keeper.refusal)
            assert refusal is not None
            assert refusal.code == "identity.revoked"
            ends = natsjwt.read(agent.identity.jwt()).expires_at
            assert ends is not None
            await eventually(lambda: not agent.link.connected)
            assert datetime.now(UTC) >= ends - timedelta(seconds=1)
            assert not (world.config.state_dir / "identity.json").exists()


def moving(world: World, to: str = "lab", **changes: Any) -> HostMove:
    fields = {"host": world.host, "public_key": world.key.public.text, "to": to, "labels": {"role": "web"}}
    return HostMove(**world.signers.times() | fields | changes)


def module_pid(world: World) -> int:
    found = json.loads((world.config.state_dir / "modules" / "tiny" / "process.json").read_text())
    return int(found[0])


async def reported_in(world: World, workspace: str) -> Status | None:
    """The host's newest status there."""
    subject = subjects.from_host(workspace, world.host, "status")
    found = await world.bus.last(subjects.STREAM_REPORTS, subject)
    if found is None:
        return None
    report = reports.open_report(found.data, found.subject, lambda *_: world.key.public)
    assert isinstance(report, Status)
    return report


async def test_a_host_moves_with_what_it_runs_and_obeys_the_old_workspace_no_more(world: World) -> None:
    target = await world.release("1.0", policy=1)
    async with eligible(world, "prod", "lab") as send, world.agent() as agent:
        await send(put(world))
        await world.reached(await world.desire(target))
        pid, incarnation = module_pid(world), agent.state.incarnation
        await send(moving(world))

        async def arrived() -> Status | None:
            status = await reported_in(world, "lab")
            return status if status is not None and status.modules else None

        status = await eventually(arrived)
        assert status is not None
        assert (status.generation, status.modules[0].promoted, status.modules[0].enforcing) == (
            0,
            target,
            True,
        )
        assert status.incarnation != incarnation
        assert module_pid(world) == pid, "the module ran through it"
        assert agent.config.workspace == "lab"

        # Whatever the old workspace says, even on the new subject: the document is for another one.
        document = world.signers.desired(
            world.host, world.record, world.signers.entry(None, 9, expected=target)
        )
        await agent._on_desired(msgspec.json.encode(world.signers.sealed(document)), {})
        await eventually(lambda: agent.refusal is not None and agent.refusal.code == Code.HOST_WRONG_HOST)
        assert agent.states["tiny"].promoted == target
        told = await send(moving(world, to="prod", workspace="lab"))  # and back again, as an operator may
        assert told.ok
        await eventually(lambda: agent.config.workspace == "prod")
        again = agent.state.incarnation
        assert again not in (status.incarnation, incarnation)
    async with world.agent() as agent:
        await joined(agent)
        assert (agent.config.workspace, agent.state.incarnation) == ("prod", again)


async def test_a_host_that_was_away_hears_of_its_move_when_it_comes_back(world: World) -> None:
    async with eligible(world, "prod", "lab") as send:
        await send(put(world))
        await send(moving(world))
        async with world.agent() as agent:
            await joined(agent)
            await eventually(lambda: agent.config.workspace == "lab" and agent.link.connected)
            now = datetime.now(UTC)
            assert await eventually(lambda: heartbeats_after(world, now, "lab"))
        # An empty state directory is the host as its folder says: it is told once more.
        shutil.rmtree(world.config.state_dir)
        async with world.agent() as agent:
            await joined(agent)
            await eventually(lambda: agent.config.workspace == "lab")


@pytest.mark.parametrize("cut", [1, 2, 3])
async def test_a_move_cut_off_at_any_write_is_finished_at_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """1: nothing is kept, and the host is told again. 2: before the module's state. 3: before the host's own."""
    target = await world.release("1.0", policy=1)
    left: list[int] = []
    whole = Disk.write

    def write(self: Disk, path: Path, data: bytes) -> None:
        if left:
            left[0] -= 1
            if left[0] <= 0:
                raise Refused(Code.HOST_DISK, f"{path}: cut off")
        whole(self, path, data)

    monkeypatch.setattr(Disk, "write", write)
    async with eligible(world, "prod", "lab") as send:
        await send(put(world))
        async with world.agent() as agent:
            await world.reached(await world.desire(target))
            left[:] = [cut]
            await send(moving(world))
            await eventually(lambda: left[0] <= 0)
        left.clear()
        async with world.agent() as agent:
            await joined(agent)
            await eventually(lambda: agent.config.workspace == "lab" and agent.link.connected)
            assert (agent.state.generation, agent.state.workspace) == (0, "lab")
            module = agent.store.module("tiny").read()
            assert (module.generation, module.promoted) == (0, target)


@pytest.mark.parametrize("wrong", ["only admin here", "another key", "taken", "nowhere", "twice"])
async def test_a_move_that_may_not_be_is_refused_by_the_service(world: World, wrong: str) -> None:
    async with eligible(world, "prod", "lab") as send:
        await send(put(world))
        command, code = moving(world), Code.COMMAND_CONFLICT
        match wrong:
            case "only admin here":
                command, code = moving(world, to="elsewhere"), Code.WORKSPACE_UNKNOWN
            case "another key":
                command = moving(world, public_key=SigningKey.generate().public.text)
            case "taken":
                other = SigningKey.generate().public.text
                await send(put(world, workspace="lab", public_key=other))
            case "nowhere":
                command, code = moving(world, host="web-9"), Code.ELIGIBILITY_NO_RECORD
            case "twice":
                await send(moving(world))
                code = Code.ELIGIBILITY_NO_RECORD
        with pytest.raises(Refused) as refused:
            await send(command)
        assert refused.value.code is code
