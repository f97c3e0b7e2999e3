"""`loopback tuf-client` against the repository on a real broker, with a host's own credentials."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

import pytest
from support import Place
from support_host import World

from loopback.cli import tufclient
from loopback.trust.repository import target_path

pytestmark = pytest.mark.broker


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def inode(file: Path) -> int:
    return file.stat().st_ino


def change(file: Path) -> None:
    file.write_bytes(b"changed")


async def run(world: World, place: Path, *arguments: str, creds: Path | None = None) -> int:
    common = ["--metadata-url", world.place.url, "--creds", str(creds or world.config.creds)]
    return await asyncio.to_thread(
        tufclient.run, [*common, "--metadata-dir", str(place / "metadata"), *arguments]
    )


async def test_metadata_and_content_come_over_the_bus_as_a_host_reads_them(
    broker: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(broker, tmp_path)
    await world.prepare()
    release = await world.release("1.0")
    assert await run(world, tmp_path, "init", str(world.config.root)) == 0
    assert await run(world, tmp_path, "refresh") == 0
    found = [
        *("--target-name", target_path("tiny", "1.0")),
        "--target-dir",
        str(tmp_path / "out"),
        "download",
    ]
    capsys.readouterr()
    assert await run(world, tmp_path, *found) == 0
    file = Path(capsys.readouterr().out.strip())
    assert digest(file) == release.package
    before = inode(file)
    assert await run(world, tmp_path, *found) == 0
    assert inode(file) == before, "what is here and right stays"
    change(file)
    assert await run(world, tmp_path, *found) == 0
    assert digest(file) == release.package
    other = ["--target-name", target_path("tiny", "9.9"), "--target-dir", str(tmp_path / "out"), "download"]
    assert await run(world, tmp_path, *other) == 1
    assert "nobody entitled to has signed" in capsys.readouterr().err


async def test_what_is_wrong_with_the_bus_is_said(
    broker: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(broker, tmp_path)
    await world.prepare()
    assert await run(world, tmp_path, "init", str(world.config.root)) == 0
    assert await run(world, tmp_path, "refresh", creds=tmp_path / "none.creds") == 1
    assert "there is no credentials file" in capsys.readouterr().err
    await (
        world.bus.close()
    )  # a client that reconnects while its loop ends can forget that it was cancelled (asyncio 3.11)
    await broker.kill()
    assert await run(world, tmp_path, "refresh") == 1
    assert "error:" in capsys.readouterr().err


async def test_the_program_works_over_the_bus_too(broker: Place, tmp_path: Path) -> None:
    world = World(broker, tmp_path)
    await world.prepare()
    program = str(Path(sys.executable).with_name("loopback"))
    place = ["--metadata-dir", str(tmp_path / "metadata")]
    bus = ["--metadata-url", world.place.url, "--creds", str(world.config.creds)]
    for arguments in (["init", str(world.config.root)], [*bus, "refresh"]):
        process = await asyncio.create_subprocess_exec(program, "tuf-client", *place, *arguments)
        assert await process.wait() == 0
    assert (tmp_path / "metadata" / "targets.json").exists()
