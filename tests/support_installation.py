"""A whole installation in one process: four services on a real broker, the operator's command line, and real agents.

Hosts run the `tiny` module (fixtures_modules) in processes of its own. Nothing is faked but the kernel that the module says it
changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from support import Place, eventually
from support_host import tiny

from loopback.cli import context, keys, main
from loopback.contracts import envelope, reports, subjects
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import Status
from loopback.host import config
from loopback.host.agent import Agent
from loopback.host.config import Allow
from loopback.services._runtime import service
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.settings import read_identity
from loopback.services.activation import app as activation
from loopback.services.delivery import app as delivery
from loopback.services.eligibility import app as eligibility
from loopback.services.telemetry import app as telemetry

APPS = {"delivery": delivery, "eligibility": eligibility, "telemetry": telemetry, "activation": activation}
ROLLOUT = """\
rollout: {name}
workspace: {workspace}
module: tiny
version: {version}
policy: {policy}
waves:
  - {{name: canary, count: 1}}
  - {{name: rest, percent: 100}}
trial: 300ms
host_deadline: 30s
"""


class Said(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Installation:
    """`loopback(...)` is the operator's command line; `host(name)` adds a host and runs its agent."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        self.folder = folder
        self.bus: Bus
        self.configs: dict[str, config.HostConfig] = {}
        self.agents: dict[str, tuple[Agent, asyncio.Task[None]]] = {}
        self._stop: asyncio.Event
        self._services: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """The services."""
        self._stop = asyncio.Event()

        async def run() -> None:
            async with asyncio.TaskGroup() as group:
                for name, app in APPS.items():
                    settings = self.place.settings(name)
                    group.create_task(service.run(name, settings, app.start, stop=self._stop))

        self._services = asyncio.create_task(run())

    async def stop(self) -> None:
        """Stop the services; the broker goes on."""
        self._stop.set()
        if self._services is not None:
            await self._services
        self._services = None

    async def __call__(self, *words: str, operator: str = "admin", code: int | None = 0) -> Said:
        """Run one command in a thread, as a process of its own would, and check how it ended (None: don't)."""
        said = await asyncio.to_thread(self._run, words, operator)
        assert "Traceback" not in said.err, said.err
        assert code is None or said.code == code, (words, said)
        return said

    def _run(self, words: tuple[str, ...], operator: str) -> Said:
        home = self.place.home
        key = f"keys/operators/{subjects.token(operator)}.pem"
        context.save(home, url=self.place.url, creds="creds/operator.creds", operator_key=key)
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main.main(["--home", str(home), *words])
            except SystemExit as end:
                code = int(end.code or 0)
        return Said(code, out.getvalue(), err.getvalue())

    # The operator's things

    async def release(self, version: str, how: str = "healthy", **module: Any) -> None:
        """Build and publish the tiny module."""
        path = self.folder / f"tiny-{version}.lbm"
        path.write_bytes(tiny(version, how, **module))
        await self("module", "publish", str(path))

    def rollout_file(
        self,
        name: str,
        version: str = "1.0",
        policy: dict[str, Any] | None = None,
        hosts: tuple[str, ...] = (),
        more: str = "",
    ) -> str:
        """A rollout of the tiny module to these hosts or every one: one canary, then the rest."""
        content = self.folder / f"{name}-policy.json"
        content.write_text(json.dumps(policy or {"rollout": name}))
        path = self.folder / f"{name}.yaml"
        text = ROLLOUT.format(name=name, workspace="prod", version=version, policy=content.name)
        if hosts:
            text += f"selector: {{hosts: [{', '.join(hosts)}]}}\n"
        path.write_text(text + more)
        return str(path)

    async def roll_out(
        self, name: str, version: str = "1.0", *, code: int = 0, operator: str = "admin"
    ) -> Said:
        """Start a rollout and watch it to its end."""
        return await self(
            "rollout", "start", self.rollout_file(name, version), "--watch", code=code, operator=operator
        )

    # Hosts

    async def host(self, name: str, *labels: str, run: bool = True, **changes: Any) -> None:
        """Add a host with its record and run its agent."""
        out = self.folder / "hosts" / name
        words = ["host", "add", name, "--workspace", "prod", "--out", str(out), "--heartbeat", "0.3"]
        for label in labels:
            words += ["--label", label]
        await self(*words)
        found = config.load(out / "host.toml")
        self.configs[name] = msgspec.structs.replace(
            found, allow=Allow(modules=("tiny",), capabilities=()), otel=False, **changes
        )
        if run:
            self.run_host(name)
            await eventually(lambda: self.said(name))

    def run_host(self, name: str) -> None:
        """Run the agent of a host that was added."""
        agent = Agent(self.configs[name])
        self.agents[name] = (agent, asyncio.create_task(agent.run()))

    async def stop_host(self, name: str) -> None:
        """Stop an agent as SIGTERM would."""
        agent, task = self.agents.pop(name)
        agent.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def said(self, name: str) -> Status | None:
        """The newest status of a host; its signature is not looked at."""
        found = await self.bus.last(subjects.STREAM_REPORTS, subjects.from_host("prod", name, "status"))
        if found is None:
            return None
        report = reports.decode(_payload(found.data))
        assert isinstance(report, Status)
        return report

    async def witnessed(self, name: str) -> int:
        """How many links of the journal a host has reported to have witnessed."""
        found = await self.said(name)
        return found.witness.links if found and found.witness else 0

    async def links(self) -> int:
        """How many links the journal has."""
        found = await self.bus.read(subjects.workspace_stream("prod"), [subjects.rollout("prod", "*", "*")])
        return len(found)


def _payload(data: bytes) -> bytes:
    return envelope.payload_of(envelope.parse(data))


@asynccontextmanager
async def installation(place: Place, folder: Path, *hosts: str) -> AsyncIterator[Installation]:
    """An installation with the workspace prod, the family tiny, its release 1.0, and these hosts running."""
    identity = read_identity(place.settings("activation").creds)
    keys.init_keys(place.home, SigningKey.from_nkey(identity.seed).public.text)
    found = Installation(place, folder)
    found.bus = await place.bus()
    await found.start()
    try:
        await found("workspace", "put", "prod")
        await found("keys", "family", "tiny")
        await found("entitlement", "put", "tiny", "--workspace", "prod", "--module", "tiny")
        await found.release("1.0")
        for host in hosts:
            await found.host(host)
        yield found
    finally:
        for name in list(found.agents):
            await found.stop_host(name)
        await found.stop()
