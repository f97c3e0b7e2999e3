"""Carries a plan out: one module, one entry, step by step, each written down before it is taken.

Before the trial a refusal ends in REJECTED, and nothing happened. From the trial on it ends in what was promoted before,
running and enforcing again. An agent that is killed anywhere in here finds on its next start what `recover` needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from opentelemetry import trace

from loopback.contracts import abi
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import DesiredModule, Running
from loopback.contracts.messages import Policy
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import Trust
from loopback.host import install, transitions, trial
from loopback.host.connections import own_connections
from loopback.host.fills import keep
from loopback.host.plan import Step, StepName, Undo, plan
from loopback.host.process import ModuleProcess
from loopback.host.state import ModuleState, ModuleStore, Store
from loopback.host.supervisor import Supervisor, stage
from loopback.trust.blobs import Get
from loopback.trust.repository import TrustedRepository

READY_S: Final = 30.0  # for the watchdog to say that it watches

log = logging.getLogger("loopback.host")

_PHASES: Final = {
    StepName.DOWNLOAD: Phase.DOWNLOADING,
    StepName.VERIFY: Phase.VERIFYING,
    StepName.STAGE: Phase.STAGED,
    StepName.REMOVE: Phase.ACCEPTED,
}
#: What a step is called in a trace, where that says more than its own name.
_SPANS: Final = {StepName.START_TRIAL: "start", StepName.CONFIGURE: "attach", StepName.WATCH_TRIAL: "trial"}


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """What a change needs of the world: content by subject, what fills sets, a probe on a new connection, verified metadata."""

    get: Get
    fills: Callable[[Policy], Awaitable[dict[str, abi.Filled]]]
    probe: trial.Probe
    repository: TrustedRepository
    changed: Callable[[], None]
    tracer: trace.Tracer


class Change:
    """One entry on its way. `state` is the newest known, also where the disk could not take it."""

    def __init__(
        self, supervisor: Supervisor, store: Store, means: Means, entry: DesiredModule, trust: Trust
    ) -> None:
        self.supervisor = supervisor
        self.store = store
        self.means = means
        self.entry = entry
        self.trust = trust
        self.own: ModuleStore = store.module(entry.module)
        self.state: ModuleState = self.own.read()
        self._undo = Undo.NOTHING  # of the last step that was written down
        self._watchdog: asyncio.subprocess.Process | None = None

    async def run(self) -> ModuleState:
        """Apply the entry; the final state. Raises nothing but cancellation, after which the disk says where it was."""
        attributes: dict[str, str | int] = {
            "loopback.rollout.id": self.entry.rollout,
            "loopback.module": self.entry.module,
            "loopback.generation": self.entry.generation,
            "loopback.host": self.supervisor.config.host,
        }
        with self.means.tracer.start_as_current_span(
            f"apply {self.entry.module}", attributes=attributes
        ) as span:
            async with self.supervisor.busy:
                try:
                    await self._apply()
                finally:
                    await self._end_watchdog()
            span.set_attribute("loopback.phase", self.state.phase)
            if self.state.refusal is not None:
                span.set_attribute("error.type", self.state.refusal.code)
                span.set_status(trace.StatusCode.ERROR, self.state.refusal.reason)
            self.means.changed()
        return self.state

    async def _apply(self) -> None:
        try:
            if self.state.trial is not None:
                self._write(transitions.undo)  # the disk refused earlier, and takes it now
                if transitions.finished(self.state):
                    return
            self._write(lambda state: transitions.accept(state, self.entry))
            self.means.changed()
            for step in await asyncio.to_thread(self._plan):
                await self._take(step)
        except Refused as refused:
            log.warning("%s: %s", self.entry.module, refused)
            await self._fail(refused.refusal)
        except Exception as error:
            # A mistake of ours ends like a refusal: in what was promoted before.
            log.exception("%s: a change ended in a fault of this agent", self.entry.module)
            await self._fail(transitions.fault(error))

    async def _fail(self, refusal: Refusal) -> None:
        if self._undo is Undo.RESTORE:
            await self._roll_back(refusal)
        else:
            self._conclude(lambda state: transitions.reject(state, refusal, self.entry))
        await self._collect()

    def _plan(self) -> tuple[Step, ...]:
        target = self.entry.running
        if target is None:
            return plan(self.state, None, unpacked=False, policy_here=False)
        return plan(
            self.state,
            target,
            unpacked=self.own.version_dir(target).is_dir(),
            policy_here=install.has_policy(self.store, target),
        )

    async def _take(self, step: Step) -> None:
        name = step.name
        with self.means.tracer.start_as_current_span(_SPANS.get(name, name)) as span:
            span.set_attribute("loopback.rollout.id", self.entry.rollout)
            if name is StepName.START_TRIAL:
                self._write(lambda state: transitions.begin_trial(state, self.entry.trial_s))
            elif name not in (StepName.PROMOTE, StepName.COLLECT):
                phase = _PHASES.get(name, Phase.TRIAL)
                self._write(lambda state: self._on_trial(transitions.step(state, name, phase), phase))
            self._undo = step.undo
            self.means.changed()
            match name:
                case StepName.DOWNLOAD:
                    await self._download()
                case StepName.VERIFY:
                    await self._verify()
                case StepName.STAGE:
                    await self._unpack()
                case StepName.REMOVE:
                    await self._remove()
                case StepName.START_TRIAL:
                    await self._start_trial()
                case StepName.CONFIGURE:
                    await self.supervisor.configure()
                case StepName.STAGE_POLICY:
                    await self._stage_policy(span)
                case StepName.COMMIT:
                    await self._commit()
                case StepName.WATCH_TRIAL:
                    await self._watch()
                case StepName.CONFIRM:
                    await self._process.request(abi.Confirm(digest=self._policy))
                case StepName.PROMOTE:
                    self._write(lambda state: transitions.promote(self._on_trial(state, Phase.TRIAL)))
                    self._undo = Undo.NOTHING
                    self.supervisor.problem = None
                case StepName.COLLECT:
                    await self._collect()

    async def _download(self) -> None:
        config = self.supervisor.config
        await install.fetch(
            self.means.get,
            self.store,
            self._target,
            self.entry.size,
            self.entry.module,
            config.workspace,
            self.trust,
        )

    async def _verify(self) -> None:
        if not self.entry.returning:
            await asyncio.to_thread(
                install.check_policy,
                self.store,
                self._target,
                self.entry.module,
                self.supervisor.config.workspace,
                self.trust,
            )
        promoted = self.state.promoted
        verified = await asyncio.to_thread(
            install.verify,
            self.means.repository,
            self.store,
            self._target,
            self.entry.module,
            self.supervisor.config,
            self.supervisor.features,
            self.trust.rules(self.supervisor.config.workspace),
            # Back leads only to what was promoted here; with another policy alone, nothing new is installed.
            kept=self.entry.returning or (promoted is not None and promoted.package == self._target.package),
        )
        # Known before it is started, and later without the repository: the owner may allow other publishers by then.
        self._write(lambda state: transitions.signed(state, self._target.package, verified.signers))

    async def _unpack(self) -> None:
        await asyncio.to_thread(install.unpack, self.store, self._target, self.entry.module)

    async def _remove(self) -> None:
        promoted = self.state.promoted
        if promoted is not None:
            if self.supervisor.alive is None:
                await self.supervisor.start(
                    promoted
                )  # only the module itself knows what it left in the kernel
            await self.supervisor.end(remove=True)
        self.supervisor.problem = None
        self._write(transitions.removed)

    async def _start_trial(self) -> None:
        begun = self.state.trial
        assert begun is not None
        if begun.package_changed:
            # The old process goes first: the kernel enforces without it, and two writers would not know of each other.
            process = await self.supervisor.launch(self._target)
        else:
            assert self.state.promoted is not None
            if self.supervisor.alive is None:
                await self.supervisor.start(self.state.promoted)
            process = self._process
        self._write(lambda state: transitions.trial_process(state, process.pid, process.pid_start))

    async def _stage_policy(self, span: trace.Span) -> None:
        content = await asyncio.to_thread(install.policy_content, self.store, self._target)
        assert content is not None
        control = await asyncio.to_thread(own_connections)
        policy = await asyncio.to_thread(install.read_policy, self.store, self._target)
        fills = await self.means.fills(policy)
        for key, value in (await stage(self._process, self._target, content, control, fills)).items():
            span.set_attribute(f"loopback.policy.{key}", value)
        if fills:  # the module took them: by them it is put back after a restart
            await asyncio.to_thread(keep, self.store, self._policy, fills)

    async def _commit(self) -> None:
        await self._start_watchdog()
        await self._process.request(
            abi.Commit(digest=self._policy, trial_s=self.entry.trial_s + trial.KERNEL_MARGIN_S)
        )

    async def _watch(self) -> None:
        if self._watchdog is None:
            await self._start_watchdog()
        manifest = self.supervisor.manifest
        assert manifest is not None
        await trial.watch(
            self._process,
            self._target,
            self.entry.trial_s,
            manifest.health.grace_s,
            self.means.probe,
            self._seen,
        )

    def _seen(self, health: abi.HealthReport) -> None:
        before, self.supervisor.health = self.supervisor.health, health
        if before != health:
            self.means.changed()

    async def _collect(self) -> None:
        with contextlib.suppress(Refused):  # what stays is swept the next time
            await asyncio.to_thread(install.collect, self.store, self.entry.module)

    async def _roll_back(self, refusal: Refusal) -> None:
        with self.means.tracer.start_as_current_span("roll-back") as span:
            span.set_attribute("error.type", refusal.code)
            span.set_attribute("loopback.rollout.id", self.entry.rollout)
            self._conclude(
                lambda state: (
                    transitions.roll_back(state, refusal)
                    if transitions.on_trial(state, self.entry.generation)
                    else state
                )
            )
            self.means.changed()
            restored = await self._restore()
            self._conclude(lambda state: transitions.undo(state, restored=restored))

    async def _restore(self) -> bool:
        """Have what was promoted run and enforce again; whether it does."""
        supervisor, promoted = self.supervisor, self.state.promoted
        trial_changed_package = promoted is None or promoted.package != self._target.package
        try:
            if promoted is None:
                # Nothing ran before, so nothing may stay in the kernel; a dead module is asked once more to see to it.
                if supervisor.alive is None:
                    await supervisor.start(self._target)
                await supervisor.end(remove=True)
                return True
            if trial_changed_package:
                await supervisor.kill()
            await supervisor.hold(promoted, revert=True)
        except Refused as refused:
            log.error("%s: %s", self.entry.module, refused)
            if promoted is None:
                await supervisor.kill()
                # It never held anything here, or its datapath falls back by itself at the commit's deadline.
                return True
            supervisor.failed(refused)
            return False
        return True

    async def _start_watchdog(self) -> None:
        try:
            self._watchdog = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "loopback.host.watchdog",
                str(self.own.folder), self.entry.module, str(self.entry.generation),
                str(self.entry.trial_s + trial.WATCHDOG_MARGIN_S),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            assert self._watchdog.stdout is not None
            async with asyncio.timeout(READY_S):
                ready = await self._watchdog.stdout.readline()
        except (OSError, TimeoutError) as error:
            raise Refused(Code.MODULE_START, f"no watchdog can be started: {error}") from None
        if ready != b"ready\n":
            raise Refused(Code.MODULE_START, "the watchdog ended at once", "see the agent's log")

    async def _end_watchdog(self) -> None:
        """Its work is over once the disk says so; where the disk still says trial, it stays and sees to it."""
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is None:
            return
        over = False
        with contextlib.suppress(Refused):
            over = self.own.read().trial is None
        if over:
            with contextlib.suppress(ProcessLookupError):
                watchdog.terminate()
            await watchdog.wait()

    def _on_trial(self, state: ModuleState, phase: Phase) -> ModuleState:
        """The state itself, unless the watchdog undid the trial in the meantime."""
        if phase is Phase.TRIAL and not transitions.on_trial(state, self.entry.generation):
            refusal = state.refusal or Refusal(Code.HOST_UNCONFIRMED, "the trial was undone by the watchdog")
            raise Refused(refusal.code, refusal.reason, refusal.next_step)
        return state

    def _write(self, decide: Callable[[ModuleState], ModuleState]) -> None:
        """Write the state down; nothing is done before it is. Raises Refused(HOST_DISK)."""
        self.state = self.own.change(decide)

    def _conclude(self, decide: Callable[[ModuleState], ModuleState]) -> None:
        """The same for an ending, which is reported even where the disk cannot take it; it is written later then."""
        try:
            self.state = self.own.change(decide)
        except Refused as refused:
            log.error("%s: %s", self.entry.module, refused)
            self.state = decide(self.state)

    @property
    def _target(self) -> Running:
        assert self.entry.running is not None
        return self.entry.running

    @property
    def _policy(self) -> str:
        assert self._target.policy is not None
        return self._target.policy

    @property
    def _process(self) -> ModuleProcess:
        process = self.supervisor.process
        if process is None:
            raise Refused(Code.MODULE_DIED, f"{self.entry.module} does not run")
        return process
