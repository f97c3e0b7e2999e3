"""The operator's command line against real services in this process."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest
from support import Place

from loopback.cli import context, keys, main
from loopback.contracts.keys import SigningKey
from loopback.services._runtime import service
from loopback.services._runtime.settings import read_identity
from loopback.services.delivery import app as delivery
from loopback.services.eligibility import app as eligibility
from loopback.services.telemetry import app as telemetry


@contextlib.asynccontextmanager
async def services(place: Place) -> AsyncIterator[None]:
    """Keys and trust, and the services that these commands need, in this process."""
    keys.init_keys(
        place.home, SigningKey.from_nkey(read_identity(place.settings("activation").creds).seed).public.text
    )
    context.save(
        place.home, url=place.url, creds="creds/operator.creds", operator_key="keys/operators/admin.pem"
    )
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for name, app in (("delivery", delivery), ("eligibility", eligibility), ("telemetry", telemetry)):
            group.create_task(service.run(name, place.settings(name), app.start, stop=stop))
        try:
            yield
        finally:
            stop.set()


class Operator:
    """Types commands; each answers with its exit code and what it printed."""

    def __init__(self, place: Place | Path, capsys: pytest.CaptureFixture[str]) -> None:
        """At an installation, or at the home of one."""
        self._home = str(place if isinstance(place, Path) else place.home)
        self._capsys = capsys

    async def __call__(self, *words: str) -> tuple[int, str, str]:
        """Run one command in a thread, as a process of its own would."""
        self._capsys.readouterr()
        with mock.patch("sys.stdin", io.StringIO()):
            code = await asyncio.to_thread(self._run, words)
        out, err = self._capsys.readouterr()
        return code, out, err

    def _run(self, words: tuple[str, ...]) -> int:
        try:
            main.main(["--home", self._home, *words])
        except SystemExit as end:
            return int(end.code or 0)
        return 0
