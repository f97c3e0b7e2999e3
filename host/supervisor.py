"""Keeps one module running as promoted: starts it, has it enforce its policy, watches it, and starts it again.

What was promoted runs from verified disk alone: no broker, no service, no network is asked. A module that fails takes
nobody with it: the supervisor says degraded and tries again, ever more slowly, while the kernel goes on enforcing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from loopback.contracts import abi
from loopback.contracts.codes import Refusal, Refused
from loopback.contracts.desired import Running
from loopback.host import fills, install, proc, status, transitions
from loopback.host.config import HostConfig
from loopback.host.launch import launch
from loopback.host.process import REQUEST_S, ModuleProcess, Starter, direct
from loopback.host.state import Store
from loopback.trust.manifest import Manifest

BACKOFF_S: Final = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # waits between restarts; the last one repeats
STEADY_S: Final = 60.0  # a module that lived this long starts again at the shortest wait
RESTORE_TRIAL_S: Final = 30.0  # kernel deadline while a promoted policy is put back; it is confirmed at once
#: Seconds more to stage a policy, per MiB of its content. 100k rules (11 MiB) take 4 s on a machine of 2025, and have 74.
STAGE_MIB_S: Final = 4.0

log = logging.getLogger("loopback.host")


class Supervisor:
    """One module's process and what is known of it. `busy` is held by whoever changes it on purpose."""

    def __init__(
        self, module: str, store: Store, config: HostConfig, features: frozenset[str],
        group: asyncio.TaskGroup, changed: Callable[[], None], on_event: Callable[[str, abi.Event], None],
        starter: Starter = direct,
    ) -> None:  # fmt: skip
        self.module = module
        self.store = store
        self.own = store.module(module)
        self.config = config
        self.features = features
        self.group = group
        self.changed = changed
        self.on_event = on_event
        self.starter = starter
        self.busy = asyncio.Lock()
        self.process: ModuleProcess | None = None
        self.manifest: Manifest | None = None
        self.package = ""
        self.adopted = False
        self.health: abi.HealthReport | None = None
        self.problem: Refusal | None = None
        self.unfilled: Refusal | None = None  # why sets do not hold the newest contents; see filling
        self.metrics: dict[str, float] = {}
        self._failures = 0
        self._wake = asyncio.Event()

    async def start(self, running: Running) -> None:
        """Start this version and tell it where it is; any process before it is stopped, the kernel left as it is.

        Raises Refused: PACKAGE_*, MANIFEST_*, KERNEL_UNSUPPORTED, MODULE_*, or what the module says to configure.
        """
        await self.launch(running)
        await self.configure()

    async def launch(self, running: Running) -> ModuleProcess:
        """The first half of `start`: verified, started, greeted."""
        await self.end()
        manifest = await asyncio.to_thread(install.verify_unpacked, self.own, running)
        signers = self.own.read().signers.get(running.package, ())
        install.check_allowed(manifest, signers, self.config)
        install.check_requirements(manifest, self.features)
        self.store.disk.folder(self.own.data)
        folder, data = self.own.version_dir(running), self.own.data
        spec = launch(manifest, running.package, folder, data, self.own.folder / "log")

        def note(pid: int, start: int) -> None:
            self.store.disk.write(self.own.folder / "process.json", msgspec.json.encode([pid, start]))

        process = await ModuleProcess.start(
            spec, self.group, lambda event: self.on_event(self.module, event), note, self.starter
        )
        self.process, self.manifest, self.package = process, manifest, running.package
        return process

    async def configure(self) -> None:
        """The second half: it learns where it is, and takes over what is in the kernel."""
        process = self.process
        assert process is not None
        answer = await process.request(
            abi.Configure(
                host=self.config.host,
                workspace=self.config.workspace,
                state_dir=str(self.own.data),
                settings=self.config.modules.get(self.module, {}),
            )
        )
        hello = process.hello
        self.adopted = answer.detail.get("adopted") == "true" or bool(hello and hello.adopted)

    @property
    def alive(self) -> ModuleProcess | None:
        """The process, if it runs."""
        return self.process if self.process is not None and not self.process.exited.is_set() else None

    async def hold(self, running: Running, *, revert: bool = False) -> None:
        """Make a promoted state hold: its process runs, and the kernel enforces its policy.

        `revert` takes back a commit on trial first. What is right already is left alone. Raises Refused like `start`.
        """
        if self.alive is None or self.package != running.package:
            await self.start(running)
        process = self.process
        assert process is not None
        if revert:
            await process.request(abi.Revert())
        self.health = await process.health()
        if running.policy is not None and not (
            self.health.enforcing and self.health.policy == running.policy
        ):
            content = await asyncio.to_thread(install.policy_content, self.store, running)
            assert content is not None
            policy = await asyncio.to_thread(install.read_policy, self.store, running)
            await stage(process, running, content, fills=fills.kept(self.store, running.policy, policy))
            await process.request(abi.Commit(digest=running.policy, trial_s=RESTORE_TRIAL_S))
            await process.request(abi.Confirm(digest=running.policy))
            self.health = await process.health()
        self.problem = None

    async def end(self, *, remove: bool = False) -> None:
        """Stop the process, if any. Raises Refused where `remove` was asked and not done."""
        process, self.process = self.process, None
        self.health, self.adopted = None, False
        if process is not None:
            await process.stop(remove=remove)

    async def kill(self) -> None:
        """End the process without asking it."""
        process, self.process = self.process, None
        self.health, self.adopted = None, False
        if process is not None:
            await process.kill()

    def end_leftover(self) -> None:
        """End the process that an agent before this one started, if it is still there."""
        data = self.store.disk.read(self.own.folder / "process.json")
        if data is None:
            return
        try:
            pid, start = msgspec.json.decode(data, type=tuple[int, int])
        except msgspec.MsgspecError:
            return  # it was never written whole, so nothing can be known by it
        if proc.kill_group(pid, start):
            log.info("%s: ended process %d of an earlier agent", self.module, pid)

    def failed(self, refused: Refused) -> None:
        """Note that the module does not run as it should, and how often that happened in a row."""
        log.warning("%s: degraded: %s", self.module, refused)
        self.problem = transitions.brief(refused.refusal)
        self._failures += 1
        self.changed()

    async def keep(self) -> None:
        """Forever: have what is promoted run and enforce; ask for health and counters. Never raises Refused."""
        steady = asyncio.get_running_loop().time()
        while True:
            async with self.busy:
                wait = await self._tend()
            now = asyncio.get_running_loop().time()
            if self.problem is not None:
                steady = now
                wait = BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1] if self._failures else wait
            elif now - steady > STEADY_S:
                self._failures = 0
            await self._pause(wait)

    async def _tend(self) -> float:
        """One round; how many seconds until the next."""
        before = (self.health, self.problem)
        try:
            running = self.own.read().promoted
            if running is None:
                if self.problem is not None:
                    self.problem = None
                    self.changed()
                return 5.0
            if self.process is None or self.process.exited.is_set():
                if self.process is not None:
                    died = self.process
                    await self.kill()
                    if self.problem is None:
                        self.failed(died.died())
                        return 0.0
                await self.hold(running)
            else:
                self.health = await self.process.health()
                self.metrics = status.bounded((await self.process.request(abi.Metrics())).metrics)
                if running.policy is not None and self.health.policy != running.policy:
                    await self.hold(
                        running
                    )  # it drifted: somebody changed the kernel's state behind its back
                self.problem = None
        except Refused as refused:
            self.failed(refused)
            if self.process is not None and refused.code.startswith("module."):
                await self.kill()
        if before != (self.health, self.problem):
            self.changed()
        return min(self.manifest.health.interval_s, 5.0) if self.manifest else 5.0

    async def _pause(self, seconds: float) -> None:
        process = self.process
        waits = [asyncio.ensure_future(self._wake.wait())]
        if process is not None and not process.exited.is_set():
            waits.append(asyncio.ensure_future(process.exited.wait()))
        try:
            await asyncio.wait(waits, timeout=max(seconds, 0.05), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        self._wake.clear()

    def wake(self) -> None:
        """Look again now."""
        self._failures = 0
        self._wake.set()


async def stage(
    process: ModuleProcess, running: Running, content: bytes, control: list[abi.Connection] | None = None,
    fills: dict[str, abi.Filled] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Have a policy of this content staged, one that leaves the connections of `control` alone; `fills` fills its sets.

    Returns what the module says of it. Raises Refused.
    """
    assert running.policy is not None
    done = await process.request(
        abi.Stage(
            digest=running.policy,
            serial=running.policy_serial,
            content=content,
            control=control,
            fills=fills or {},
        ),
        REQUEST_S[abi.Stage] + STAGE_MIB_S * len(content) / 2**20,
    )
    return done.detail
