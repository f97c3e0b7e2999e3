"""`loopback bus init` on a broker that runs by itself, and services that were started before it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support import EmbeddedPlace, eventually
from test_deploy_cluster import NAMES, Cluster

from loopback.cli import supervise
from loopback.contracts import subjects
from loopback.services._runtime import streams
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.service import PORT_FILE

pytestmark = [pytest.mark.broker, pytest.mark.e2e]


class Bare(EmbeddedPlace):
    """Keys, credentials and a broker: what 'keys init' and a unit or container make, and no stream."""

    async def prepare(self) -> None:
        supervise.prepare(self.home, "127.0.0.1:0")
        (self.home / "context.toml").unlink(missing_ok=True)
        await self.start()


@pytest.fixture
async def bare(tmp_path: Path) -> AsyncIterator[Bare]:
    found = Bare(tmp_path / "home")
    try:
        await found.prepare()
        yield found
    finally:
        await found.close()


async def loopback(home: Path, *words: str) -> tuple[int, str]:
    """Exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loopback.cli.main", "--home", str(home), *words),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def inventory(bus: Bus) -> dict[str, tuple[str, int, int]]:
    """Of every stream: when it was made, its last sequence, on how many servers it is kept."""
    found: list[dict[str, Any]] = (await bus.api("STREAM.LIST"))["streams"]
    return {
        one["config"]["name"]: (one["created"], one["state"]["last_seq"], one["config"]["num_replicas"])
        for one in found
    }


async def test_it_makes_the_streams_and_first_metadata_and_a_repeat_changes_nothing(bare: Bare) -> None:
    bus = await bare.bus()
    assert await inventory(bus) == {}
    assert set(await streams.missing(bus)) >= {subjects.STREAM_COMMANDS, subjects.STREAM_TUF, "LB_WS_global"}
    code, said = await loopback(bare.home, "bus", "init", "--url", bare.url)
    assert code == 0, said
    assert "each on 1 server," in said and "next: loopback workspace put" in said
    once = await inventory(bus)
    assert await streams.missing(bus) == []
    assert await bus.last(subjects.STREAM_TUF, subjects.tuf("timestamp.json")) is not None
    assert f'url = "{bare.url}"' in (bare.home / "context.toml").read_text(), "other commands find it now"
    assert (await loopback(bare.home, "bus", "init", "--url", bare.url))[0] == 0
    assert await inventory(bus) == once


async def test_what_a_person_gets_wrong_is_said_in_words(bare: Bare, tmp_path: Path) -> None:
    code, said = await loopback(bare.home, "bus", "init", "--url", bare.url, "--replicas", "3")
    assert (code, "Traceback" in said) == (2, False)
    assert "[config.invalid]" in said and "--replicas 1" in said
    assert await inventory(await bare.bus()) == {}
    code, said = await loopback(tmp_path / "elsewhere", "bus", "init", "--url", bare.url)
    assert (code, "Traceback" in said) == (2, False)
    assert "give --home" in said


@contextlib.contextmanager
def service(place: Bare, name: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [
                *(sys.executable, "-m", "loopback.cli.main", "--home", str(place.home)),
                *("service", name, "--url", place.url),
            ],
            stdout=out,
            stderr=out,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


async def ready(place: Bare, name: str) -> tuple[int, str]:
    """What its /readyz says; (0, "") while it does not serve."""
    path = place.settings(name).state(name) / PORT_FILE
    if not path.exists() or not path.read_text():
        return 0, ""
    with contextlib.suppress(aiohttp.ClientError):
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{int(path.read_text())}/readyz") as answer,
        ):
            return answer.status, await answer.text()
    return 0, ""


async def test_services_that_start_first_say_once_what_they_wait_for_and_go_on_when_it_is_there(
    bare: Bare, tmp_path: Path
) -> None:
    logs = {name: tmp_path / f"{name}.log" for name in subjects.SERVICES}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(service(bare, name, log)) for name, log in logs.items()]

        def all_wait() -> bool:
            return all("waits: the broker has no stream" in log.read_text() for log in logs.values())

        await eventually(all_wait, 60)
        for name in logs:
            status, words = await ready(bare, name)
            assert (status, "loopback bus init" in words) == (503, True), (name, words)
        assert (await loopback(bare.home, "bus", "init", "--url", bare.url))[0] == 0

        async def all_ready() -> bool:
            return all([(await ready(bare, name))[0] == 200 for name in logs])

        await eventually(all_ready, 60)
        assert [process.poll() for process in processes] == [None] * len(processes), (
            "nobody had to start again"
        )
    for name, log in logs.items():
        text = log.read_text()
        assert text.count("waits: the broker has no stream") == 1, text
        assert "next: run 'loopback bus init" in text and "goes on: the streams are there" in text
        assert "Traceback" not in text and " ERROR " not in text, (name, text)


async def test_in_a_cluster_streams_are_kept_on_as_many_servers_as_it_is_told(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        for name in NAMES:
            cluster.start(name)
        supervise.prepare(cluster.home, "127.0.0.1:0")
        (cluster.home / "tls").symlink_to(tmp_path / "tls")

        async def made(*words: str) -> bool:
            code, said = await loopback(cluster.home, "bus", "init", "--url", cluster.url, *words)
            assert "Traceback" not in said, said
            return code == 0

        await eventually(lambda: made("--replicas", "3"), 120)
        async with await cluster.bus() as bus:
            once = await inventory(bus)
            assert {replicas for _, _, replicas in once.values()} == {3}
            assert await made()
            assert await inventory(bus) == once, "a repeat that names no number leaves it"
            await streams.ensure_workspace(bus, "prod")
            assert (await inventory(bus))["LB_WS_prod"][2] == 3
            await eventually(lambda: made("--replicas", "1"), 60)
            after = await inventory(bus)
            assert {replicas for _, _, replicas in after.values()} == {1}
            assert {name: one[:2] for name, one in after.items() if name in once} == {
                name: one[:2] for name, one in once.items()
            }, "nothing was lost"
    finally:
        for name in list(cluster.processes):
            cluster.end(name)
