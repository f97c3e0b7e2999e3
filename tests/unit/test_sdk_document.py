"""The module in docs/module-author.md is a real one."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from loopback.contracts import abi
from loopback.host.process import Launch, ModuleProcess
from loopback.trust import manifest

PAGE = (Path(__file__).parents[2] / "docs" / "module-author.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


async def test_the_module_of_the_page_lives_a_whole_life(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(block("python"))
    (tmp_path / "module.toml").write_text(block("toml"))
    parsed = manifest.parse(block("toml").encode())
    launch = Launch(
        module=parsed.name,
        version=parsed.version,
        argv=(sys.executable, *parsed.module.entry[1:]),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "LOOPBACK_PACKAGE_DIR": str(tmp_path)},
        cwd=tmp_path,
        log=tmp_path / "log",
    )
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        module = await ModuleProcess.start(launch, group)
        await module.request(abi.Configure(host="h", workspace="w", state_dir=str(tmp_path)))
        done = await module.request(abi.Stage(digest="d", serial=1, content=b'{"to": "world"}'))
        assert done.detail == {"to": "world"}
        await module.request(abi.Commit(digest="d", trial_s=1))
        assert (await module.health()).policy == "d"
        await module.request(abi.Revert())
        assert not (await module.health()).enforcing
        await module.stop()


def test_the_page_keeps_its_promise_of_thirty_lines() -> None:
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert len(lines) <= 31
