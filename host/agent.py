"""The core agent: `loopback host run`. It joins, obeys what was signed, keeps what is promoted running, and reports.

One desired state at a time, one module after the other. Nothing here waits for the broker: without it, promoted modules
run from verified disk, and what there is to report waits. Stopping the agent stops modules but not what they enforce.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from opentelemetry import context, trace

import loopback
from loopback.contracts import abi, envelope
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import DesiredModule
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.reports import ModuleStatus
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.host import control, decide, inventory, otel, status, transitions
from loopback.host import identity as identities
from loopback.host.apply import Change, Means
from loopback.host.config import HostConfig
from loopback.host.decide import Checked
from loopback.host.disk import Disk
from loopback.host.filling import Filler
from loopback.host.lifetime import alone, stopping_signals
from loopback.host.link import Link, signing_key
from loopback.host.process import direct
from loopback.host.reporting import Reporter
from loopback.host.scope import Answer, Identity
from loopback.host.spawner_client import SpawnerClient
from loopback.host.state import ModuleState, Store
from loopback.host.supervisor import Supervisor
from loopback.host.trusted import HostTrust, read_root
from loopback.host.voice import Voice

LOOK_S: Final = 60.0  # between looks at the own desired state, with as much again of jitter
FRESH_S: Final = 10.0  # metadata younger than this is not renewed before a change
WAITING: Final = 16  # desired states not looked at yet; the oldest give way
#: Between two of them: whoever signs or sends many costs this host twenty signatures, and as many writes, a second.
PACE_S: Final = 0.05
MAX_DECLINED: Final = 16  # modules outside the allow-list that are answered for at one time
FLUSH_S: Final = 2.0  # for the last reports at the end

log = logging.getLogger("loopback.host")

#: While the metadata is in this state, nothing new is started; what is promoted stays, and so does the way back.
_NO_CHANGES: Final = frozenset({Code.TUF_EXPIRED, Code.TUF_INVALID})
#: Refusals that newer trust may lift.
_STALE_TRUST: Final = frozenset(
    {
        Code.SIGNATURE_UNKNOWN_KEY,
        Code.COMMAND_UNAUTHORISED,
        Code.ENVELOPE_UNSIGNED,
        Code.ROLLOUT_UNAPPROVED,
        Code.HOST_BELOW_FLOOR,
    }
)


class Agent:
    """One host. `run` lives until `stop` is called or a signal comes."""

    def __init__(
        self, config: HostConfig, disk: Disk | None = None, spawner: SpawnerClient | None = None,
        features: frozenset[str] = frozenset(), machine: Callable[[], str] = identities.machine_id,
        listening: socket.socket | None = None,
    ) -> None:  # fmt: skip
        """`spawner` starts modules; then `features` is what was found out while there were privileges to try.

        `listening` is where people on this machine may ask (see `control`); it is closed in the end.
        """
        self.config = config
        self.spawner = spawner
        self.features = features
        self.listening = listening
        self.key = signing_key(config)
        self.machine = machine
        self.run_id = uuid.uuid4().hex
        self.store = Store(disk or Disk(), config.state_dir)
        self.states: dict[str, ModuleState] = {}
        self.supervisors: dict[str, Supervisor] = {}
        self.refusal: Refusal | None = None
        self._stopping = asyncio.Event()
        self._arrived: asyncio.Queue[tuple[bytes, dict[str, str]]] = asyncio.Queue(WAITING)
        self._joined = asyncio.Event()
        self._change: Change | None = None
        self._declined: list[str] = []
        self._refreshed_at = -FRESH_S
        self._turn = asyncio.Lock()  # one desired state at a time, and no move meanwhile

    def stop(self) -> None:
        """Have `run` end."""
        self._stopping.set()

    async def run(self) -> None:
        """Run until stopped. Raises Refused where configuration, credentials or the state directory are unusable."""
        self.store.disk.folder(self.config.state_dir)
        with alone(self.store):
            self.state = self.store.open(lambda: uuid.uuid4().hex, datetime.now(UTC))
            if self.spawner is None:
                self.features = await asyncio.to_thread(inventory.features)
            else:
                self.spawner.listen()
            self.identity = identities.Identity(self.config, self.key, self.store.disk)
            self.config = self.identity.config
            self._bind()
            self.link = Link(
                self.config, self._on_join, self._on_desired, key=self.key, jwt=self.identity.jwt,
                told=lambda data: self.keeper.told(data), heard=lambda key, data: self.filler.heard(key, data),
            )  # fmt: skip
            self.filler = Filler(
                self.store, self.link, self.supervisors, lambda: self.trust.trust, self._renew_trust,
                lambda: self.config, self._now, self._changed,
            )  # fmt: skip
            self.keeper = identities.Keeper(
                self.identity, self.link, trust=lambda: self.trust.trust, renew_trust=self._renew_trust,
                record_at=lambda: self.state.record_at, moved=self._move,
            )  # fmt: skip
            self.reporter = Reporter(
                self.link, self.key, self.config.host, self.config.workspace,
                self.state.incarnation, self.state.reports, self._reserve,
            )  # fmt: skip
            self.voice = Voice(
                self.reporter, lambda: self.config, lambda: self.features, self._status,
                lambda: self.state.witnesses, lambda: {n: s.metrics for n, s in self.supervisors.items() if s.metrics},
            )  # fmt: skip
            send = self.reporter.otlp if self.config.otel else (lambda kind, payload: None)
            spans = otel.provider(self.config.host, self.config.workspace, send)
            self.tracer = spans.get_tracer("loopback.host", loopback.__version__)
            self.trust = HostTrust(
                self.store, read_root(self.config), self.link.get, lambda: self.link.connected
            )
            await self.trust.load()
            self._recover()
            self._settle()  # a move that was cut off
            try:
                with stopping_signals(self._stopping):
                    await self._live()
            finally:
                await asyncio.to_thread(spans.shutdown)
                await asyncio.sleep(0)  # the last spans are handed over by the loop
                await self.reporter.flush(FLUSH_S if self.link.connected else 0)
                await self.link.close()
                if self.spawner is not None:
                    await self.spawner.close()

    def _bind(self) -> None:
        """Take a new incarnation where this state directory comes from another machine."""
        salt, new = uuid.uuid4().hex, uuid.uuid4().hex
        state, cloned = identities.bound(self.state, self.machine(), salt, new, datetime.now(UTC))
        if state != self.state:
            self.store.save(state)
            self.state = state
        if cloned is not None:
            log.warning("%s: %s; %s", cloned.code, cloned.reason, cloned.next_step)
            self.refusal = cloned

    async def _move(self, record: HostRecord, kept: identities.Kept) -> None:
        """Belong to another workspace from now on. What is promoted runs on; what the old one says counts no more."""
        async with self._turn:
            before = self.config.workspace
            self.identity.keep(kept)
            self.config = self.identity.config
            self.state = msgspec.structs.replace(self.state, record_at=record.issued_at)
            while True:
                try:
                    self._settle()
                    break
                except Refused as refused:  # no document is obeyed before; a restart finishes it, too
                    log.error("the move to %s is not finished: %s", self.config.workspace, refused)
                    await asyncio.sleep(identities.AGAIN_S)
            log.warning("moved from %s to %s", before, self.config.workspace)
        await self.link.rejoin(self.config)

    def _settle(self) -> None:
        """Begin anew where the state is another workspace's; done again where it was cut off."""
        after = identities.elsewhere(self.state, self.config.workspace, uuid.uuid4().hex, datetime.now(UTC))
        if after.incarnation != self.state.incarnation:
            while not self._arrived.empty():
                self._arrived.get_nowait()
            for name in self.store.modules():
                self.states[name] = self.store.module(name).change(identities.resettled)
            self.refusal = None
        if after != self.state:
            self.store.save(after)
            self.state = after
        for supervisor in self.supervisors.values():
            supervisor.config = self.config
        self.reporter.begin(self.config.workspace, after.incarnation)
        self.voice.forget()

    def _recover(self) -> None:
        """Make up for however the agent before this one ended."""
        for name in self.store.modules():
            own = self.store.module(name)
            try:
                self.states[name] = own.change(transitions.recover)
            except Refused as refused:
                log.error("%s: %s", name, refused)
                self.states[name] = transitions.recover(own.read())

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as processes:
            work = processes.create_task(self._work(processes))
            stopped = processes.create_task(self._stopping.wait())
            lost = processes.create_task(self.spawner.lost.wait()) if self.spawner else stopped
            await asyncio.wait({work, stopped, lost}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            lost.cancel()
            work.cancel()
            await asyncio.wait({work})
            for supervisor in self.supervisors.values():
                with contextlib.suppress(Refused):
                    await supervisor.end()
        if self.spawner is not None and self.spawner.lost.is_set():
            # Privileges are not to be had again: whoever started this agent starts another, and the kernel enforces.
            raise Refused(Code.MODULE_START, "the spawner of modules has ended", "start the agent again")

    async def _work(self, processes: asyncio.TaskGroup) -> None:
        """Everything that ends before the module processes do."""
        async with asyncio.TaskGroup() as group:
            self._processes, self._group = processes, group
            for name in self.states:
                self._supervisor(name)
            group.create_task(self.link.run())
            group.create_task(self.keeper.run())
            group.create_task(self.reporter.run())
            group.create_task(self._reconcile_all())
            group.create_task(self._look())
            group.create_task(self.filler.run())
            group.create_task(self.voice.beat())
            group.create_task(self.voice.measure())
            if self.listening is not None:
                asked = control.Control(self.store, self._status, self._known_rules, lambda: self.states)
                group.create_task(asked.serve(self.listening))
            self._changed()

    def _supervisor(self, module: str) -> Supervisor:
        found = self.supervisors.get(module)
        if found is None:
            found = Supervisor(
                module, self.store, self.config, self.features, self._processes, self._changed, self._on_event,
                self.spawner.start if self.spawner else direct,
            )  # fmt: skip
            found.end_leftover()
            self.supervisors[module] = found
            self._group.create_task(found.keep())
        return found

    # What arrives

    def _on_join(self) -> None:
        log.info("joined as %s in %s", self.config.host, self.config.workspace)
        self._joined.set()
        self.voice.introduce()
        self.voice.forget()
        self.filler.look()
        self._changed()

    async def _on_desired(self, data: bytes, headers: dict[str, str]) -> None:
        while self._arrived.full():
            self._arrived.get_nowait()
        self._arrived.put_nowait((data, headers))

    def _on_event(self, module: str, event: abi.Event) -> None:
        self.voice.events += 1
        log.debug("%s: %s %s", module, event.kind, event.attributes)

    async def _look(self) -> None:
        """Read the own desired state after joining, and from time to time: a message may have been missed."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S * (1 + random.random())):  # noqa: S311  jitter, not a secret
                    await self._joined.wait()
            self._joined.clear()
            if not self.link.connected:
                continue
            try:
                await self._renew_trust()
                found = await self.link.own_desired()
            except Refused as refused:
                log.info("%s", refused)
                continue
            if found is not None:
                await self._on_desired(*found)

    async def _reconcile_all(self) -> None:
        while True:
            data, headers = await self._arrived.get()
            started = asyncio.get_running_loop().time()
            try:
                async with self._turn:
                    await self._reconcile(data, headers)
                self._changed()
            except decide.Older as refused:
                log.info("%s", refused)
                self.voice.repeat()
            except Refused as refused:
                log.warning("desired state refused: %s", refused)
                self._refuse(refused.refusal)
            except Exception as error:
                # Whatever one document meets, the next one may be the cure: this task must not end.
                log.exception("a desired state ended in a fault of this agent")
                self.voice.faults += 1
                self._refuse(transitions.fault(error))
            await asyncio.sleep(max(0.0, started + PACE_S - asyncio.get_running_loop().time()))

    def _now(self) -> datetime:
        """The time, never earlier than verified metadata and signed commands were."""
        return max(filter(None, (datetime.now(UTC), self.trust.clock_floor, self.state.clock_floor)))

    def _known_rules(self) -> WorkspaceRules | None:
        """The workspace's rules; None before the first trust document."""
        return self.trust.trust.rules(self.config.workspace) if self.trust.trust else None

    def _modules(self) -> tuple[ModuleStatus, ...]:
        rules = self._known_rules() or WorkspaceRules()
        return status.modules(self.states, self.supervisors, rules, self._now())

    def _status(self) -> control.AgentStatus:
        """For whoever asks on this machine."""
        rules = self._known_rules()
        return control.AgentStatus(
            host=self.config.host,
            workspace=self.config.workspace,
            incarnation=self.state.incarnation,
            generation=self.state.generation,
            connected=self.link.connected,
            trust=self.trust.trust.document.version if self.trust.trust else 0,
            regulated=rules.regulated if rules else None,
            refusal=self.refusal or self._expired(),
            modules=self._modules(),
        )

    def _refuse(self, refusal: Refusal) -> None:
        """Say why the desired state is not obeyed, where that can be said."""
        self.refusal = transitions.brief(refusal)
        try:
            self._changed()
        except Exception:
            # Called where a fault has just been caught: one more here would end the task that obeys, and the agent with it.
            log.exception("the refusal cannot be reported")
            self.voice.faults += 1

    async def _reconcile(self, data: bytes, headers: dict[str, str]) -> None:
        signed = envelope.parse(data)
        accepted = await self._checked(signed)
        if accepted.state != self.state:
            kept = msgspec.structs.replace(accepted.state, reports=self.state.reports)
            self.store.save(kept)
            self.state = kept
        self.refusal = transitions.brief(accepted.doubt) if accepted.doubt else None
        parent = otel.parent(headers)
        for checked in accepted.entries:
            token = context.attach(parent)
            try:
                await self._obey(checked)
            finally:
                context.detach(token)

    async def _checked(self, signed: envelope.Envelope) -> decide.Accepted:
        """Check it, once more with renewed trust where that could make a difference."""
        first: decide.Accepted | Refused
        try:
            first = self._check(signed)
        except Refused as refused:
            if refused.code not in _STALE_TRUST:
                raise
            first = refused
        if isinstance(first, decide.Accepted):
            unknown = any(c.refusal is not None and c.refusal.code in _STALE_TRUST for c in first.entries)
            change = any(c.answer is Answer.CHANGE for c in first.entries)
            now = asyncio.get_running_loop().time()
            if not unknown and not (change and now - self._refreshed_at > FRESH_S):
                return first
        await self._renew_trust()
        return self._check(signed)

    def _check(self, signed: envelope.Envelope) -> decide.Accepted:
        if self.trust.trust is None:
            problem = self.trust.problem
            raise Refused(
                Code.SIGNATURE_UNKNOWN_KEY,
                "nobody is trusted yet" + (f": {problem.code}: {problem.reason}" if problem else ""),
                "check that delivery runs and the broker is reachable",
            )
        identity = Identity(
            host=self.config.host,
            workspace=self.config.workspace,
            key=self.key.public,
            modules=self.config.allow.modules,
        )
        states = {name: self.store.module(name).read() for name in self.store.modules()}
        return decide.check_desired(signed, identity, self.state, states, self.trust.trust, self._now())

    async def _renew_trust(self) -> None:
        await self.trust.refresh()
        self._refreshed_at = asyncio.get_running_loop().time()

    async def _obey(self, checked: Checked) -> None:
        entry = checked.entry
        own = self.store.module(entry.module)
        refusal = checked.refusal
        if checked.answer is Answer.CHANGE and not entry.returning:
            refusal = self._expired()
        if refusal is not None:
            if refusal.code is Code.HOST_GENERATION:
                log.warning("%s: %s: %s", entry.module, refusal.code, refusal.reason)
                self.refusal = transitions.brief(refusal)  # two writers made one generation
                return
            why = refusal
            with self._span(f"refuse {entry.module}", checked) as span:
                span.set_attribute("error.type", why.code)
                span.set_status(trace.StatusCode.ERROR, why.reason)
                if why.code is Code.HOST_NOT_ALLOWED and entry.module not in self.store.modules():
                    self._decline(entry, why)
                else:
                    self.states[entry.module] = own.change(
                        lambda state: transitions.reject(state, why, entry)
                    )
                self._changed()
        elif checked.answer is Answer.SAME:
            with self._span(f"confirm {entry.module}", checked):
                self.states[entry.module] = own.change(lambda state: transitions.settle(state, entry))
                self._changed()
        elif checked.answer is Answer.CHANGE:
            assert self.trust.trust is not None
            supervisor = self._supervisor(entry.module)
            if self.spawner is not None and entry.running is not None:
                self.spawner.prepare()
            means = Means(
                get=self.link.get,
                fills=self.filler.contents,
                probe=self.link.probe,
                repository=self.trust.repository,
                changed=self._changed,
                tracer=self.tracer,
            )
            self._change = Change(supervisor, self.store, means, entry, self.trust.trust)
            try:
                await self._change.run()
            finally:
                self._keep_state()
                self._change = None
                supervisor.wake()
                self.filler.look()

    def _decline(self, entry: DesiredModule, why: Refusal) -> None:
        """Answer for a module that may not run here; nothing of it is written, and only the newest few are remembered."""
        self._declined = [*(m for m in self._declined if m != entry.module), entry.module]
        while len(self._declined) > MAX_DECLINED:
            self.states.pop(self._declined.pop(0), None)
        self.states[entry.module] = transitions.reject(ModuleState(module=entry.module), why, entry)

    def _span(self, name: str, checked: Checked) -> Any:
        return self.tracer.start_as_current_span(
            name,
            attributes={
                "loopback.rollout.id": checked.entry.rollout,
                "loopback.module": checked.entry.module,
                "loopback.generation": checked.entry.generation,
                "loopback.host": self.config.host,
            },
        )

    # What is said

    def _keep_state(self) -> None:
        if self._change is not None:
            self.states[self._change.entry.module] = self._change.state

    def _changed(self) -> None:
        """Something may have changed: say so if it did."""
        self._keep_state()
        self.voice.say()

    def _expired(self) -> Refusal | None:
        """Why nothing new is believed, where that is so."""
        problem = self.trust.problem
        return transitions.brief(problem) if problem is not None and problem.code in _NO_CHANGES else None

    def _reserve(self, upto: int) -> None:
        self.state = msgspec.structs.replace(self.state, reports=upto)
        try:
            self.store.save(self.state)
        except Refused as refused:
            log.error("report numbers cannot be written down: %s", refused)
