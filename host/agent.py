"""The core agent: `loopback host run`. It joins, obeys what was signed, keeps what is promoted running, and reports.

One desired state at a time, one module after the other. Nothing here waits for the broker: without it, promoted modules
run from verified disk, and what there is to report waits. Stopping the agent stops modules but not what they enforce.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import platform
import random
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from opentelemetry import context, trace

import loopback
from loopback.contracts import abi, envelope
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import DesiredModule
from loopback.contracts.reports import Heartbeat, Inventory, Status
from loopback.host import decide, inventory, otel, status, transitions
from loopback.host.apply import Change, Means
from loopback.host.config import HostConfig
from loopback.host.decide import Answer, Checked
from loopback.host.disk import Disk
from loopback.host.link import Link, signing_key
from loopback.host.reporting import Reporter
from loopback.host.state import ModuleState, Store
from loopback.host.supervisor import Supervisor
from loopback.host.trusted import HostTrust

LOOK_S: Final = 60.0  # between looks at the own desired state, with as much again of jitter
FRESH_S: Final = 10.0  # metadata younger than this is not renewed before a change
METRICS_S: Final = 10.0  # between OTLP figures
FIGURES_S: Final = 5.0  # a status that differs only in counters is sent this often at most
WAITING: Final = 16  # desired states not looked at yet; the oldest give way
MAX_DECLINED: Final = 16  # modules outside the allow-list that are answered for at one time
FLUSH_S: Final = 2.0  # for the last reports at the end

log = logging.getLogger("loopback.host")

#: While the metadata is in this state, nothing new is started; what is promoted stays, and so does the way back.
_NO_CHANGES: Final = frozenset({Code.TUF_EXPIRED, Code.TUF_INVALID})
#: Refusals that newer trust may lift.
_STALE_TRUST: Final = frozenset(
    {Code.SIGNATURE_UNKNOWN_KEY, Code.COMMAND_UNAUTHORISED, Code.ENVELOPE_UNSIGNED}
)


class Agent:
    """One host. `run` lives until `stop` is called or a signal comes."""

    def __init__(self, config: HostConfig, disk: Disk | None = None) -> None:
        self.config = config
        self.key = signing_key(config)
        self.store = Store(disk or Disk(), config.state_dir)
        self.states: dict[str, ModuleState] = {}
        self.supervisors: dict[str, Supervisor] = {}
        self.refusal: Refusal | None = None
        self._stopping = asyncio.Event()
        self._arrived: asyncio.Queue[tuple[bytes, dict[str, str]]] = asyncio.Queue(WAITING)
        self._joined = asyncio.Event()
        self._change: Change | None = None
        self._said = self._counted = b""
        self._declined: list[str] = []
        self._events = self._faults = 0
        self._said_at = 0.0
        self._refreshed_at = -FRESH_S

    def stop(self) -> None:
        """Have `run` end."""
        self._stopping.set()

    async def run(self) -> None:
        """Run until stopped. Raises Refused where configuration, credentials or the state directory are unusable."""
        self.store.disk.folder(self.config.state_dir)
        with alone(self.store):
            self.state = self.store.open(lambda: uuid.uuid4().hex)
            self.features = await asyncio.to_thread(inventory.features)
            self.link = Link(self.config, self._on_join, self._on_desired)
            self.reporter = Reporter(
                self.link, self.key, self.config.host, self.config.workspace,
                self.state.incarnation, self.state.reports, self._reserve,
            )  # fmt: skip
            send = self.reporter.otlp if self.config.otel else (lambda kind, payload: None)
            spans = otel.provider(self.config.host, self.config.workspace, send)
            self.tracer = spans.get_tracer("loopback.host", loopback.__version__)
            root = self._read_root()
            self.trust = HostTrust(self.store, root, self.link.get, lambda: self.link.connected)
            await self.trust.load()
            self._recover()
            try:
                with stopping_signals(self._stopping):
                    await self._live()
            finally:
                await asyncio.to_thread(spans.shutdown)
                await asyncio.sleep(0)  # the last spans are handed over by the loop
                await self.reporter.flush(FLUSH_S if self.link.connected else 0)
                await self.link.close()

    def _read_root(self) -> bytes:
        try:
            return self.config.root.read_bytes()
        except OSError as error:
            raise Refused(
                Code.CONFIG_INVALID, f"the pinned root {self.config.root} cannot be read: {error.strerror}",
                "copy root.json beside host.toml",
            ) from None  # fmt: skip

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
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            work.cancel()
            await asyncio.wait({work})
            for supervisor in self.supervisors.values():
                with contextlib.suppress(Refused):
                    await supervisor.end()

    async def _work(self, processes: asyncio.TaskGroup) -> None:
        """Everything that ends before the module processes do."""
        async with asyncio.TaskGroup() as group:
            self._processes, self._group = processes, group
            for name in self.states:
                self._supervisor(name)
            group.create_task(self.link.run())
            group.create_task(self.reporter.run())
            group.create_task(self._reconcile_all())
            group.create_task(self._look())
            group.create_task(self._beat())
            group.create_task(self._measure())
            self._changed()

    def _supervisor(self, module: str) -> Supervisor:
        found = self.supervisors.get(module)
        if found is None:
            found = Supervisor(
                module, self.store, self.config, self.features, self._processes, self._changed, self._on_event
            )
            found.end_leftover()
            self.supervisors[module] = found
            self._group.create_task(found.keep())
        return found

    # What arrives

    def _on_join(self) -> None:
        log.info("joined as %s in %s", self.config.host, self.config.workspace)
        self._joined.set()
        self.reporter.send(self._inventory())
        self._said = b""
        self._changed()

    async def _on_desired(self, data: bytes, headers: dict[str, str]) -> None:
        while self._arrived.full():
            self._arrived.get_nowait()
        self._arrived.put_nowait((data, headers))

    def _on_event(self, module: str, event: abi.Event) -> None:
        self._events += 1
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
            try:
                await self._reconcile(data, headers)
                self._changed()
            except decide.Older as refused:
                log.info("%s", refused)
            except Refused as refused:
                log.warning("desired state refused: %s", refused)
                self._refuse(refused.refusal)
            except Exception as error:
                # Whatever one document meets, the next one may be the cure: this task must not end.
                log.exception("a desired state ended in a fault of this agent")
                self._faults += 1
                self._refuse(transitions.fault(error))

    def _refuse(self, refusal: Refusal) -> None:
        """Say why the desired state is not obeyed, where that can be said."""
        self.refusal = transitions.brief(refusal)
        try:
            self._changed()
        except Exception:
            log.exception("the refusal cannot be reported")
            self._faults += 1

    async def _reconcile(self, data: bytes, headers: dict[str, str]) -> None:
        signed = envelope.parse(data)
        accepted = await self._checked(signed)
        if accepted.state != self.state:
            kept = msgspec.structs.replace(accepted.state, reports=self.state.reports)
            self.store.save(kept)
            self.state = kept
        self.refusal = None
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
        identity = decide.Identity(
            host=self.config.host,
            workspace=self.config.workspace,
            key=self.key.public,
            modules=self.config.allow.modules,
        )
        states = {name: self.store.module(name).read() for name in self.store.modules()}
        return decide.check_desired(
            signed, identity, self.state, states, self.trust.trust, datetime.now(UTC)
        )  # fmt: skip

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
                self.states[entry.module] = own.change(
                    lambda state: transitions.settle(state, entry.generation, entry.rollout, entry.returning)
                )
                self._changed()
        elif checked.answer is Answer.CHANGE:
            assert self.trust.trust is not None
            supervisor = self._supervisor(entry.module)
            means = Means(
                get=self.link.get,
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
        self._say(figures=False)

    def _say(self, *, figures: bool) -> None:
        """Send a status where it says something new; where only counters moved, not too often."""
        modules = status.modules(self.states, self.supervisors)
        agent = status.agent(modules)
        refusal = self.refusal or self._expired()
        plain = tuple(msgspec.structs.replace(m, metrics={}) for m in modules)
        said = msgspec.json.encode((agent, self.state.generation, plain, refusal))
        counted = msgspec.json.encode([m.metrics for m in modules])
        now = asyncio.get_running_loop().time()
        news = said != self._said
        if not news and not (figures and counted != self._counted and now - self._said_at >= FIGURES_S):
            return
        self._said, self._counted, self._said_at = said, counted, now
        report = Status(
            **self.reporter.fields(),  # type: ignore[arg-type]  # the fields that every report has
            agent=agent,
            generation=self.state.generation,
            modules=modules,
            refusal=refusal,
        )
        self.reporter.send(status.fitted(report), otel.traceparent())

    def _expired(self) -> Refusal | None:
        """Why nothing new is believed, where that is so."""
        problem = self.trust.problem
        return transitions.brief(problem) if problem is not None and problem.code in _NO_CHANGES else None

    def _inventory(self) -> Inventory:
        return Inventory(
            **self.reporter.fields(),  # type: ignore[arg-type]  # the fields that every report has
            kernel=platform.release(),
            architecture=platform.machine(),
            agent_version=loopback.__version__,
            abi_min=abi.ABI_VERSION,
            abi_max=abi.ABI_VERSION,
            features=tuple(sorted(self.features)),
            python=platform.python_version(),
            boot_id=inventory.boot_id(),
            modules=self.config.allow.modules,
        )

    async def _beat(self) -> None:
        interval = self.config.heartbeat_s
        while True:
            modules = status.modules(self.states, self.supervisors)
            await self.reporter.heartbeat(
                Heartbeat(
                    **self.reporter.fields(),  # type: ignore[arg-type]  # the fields that every report has
                    generation=self.state.generation,
                    agent=status.agent(modules),
                    interval_s=interval,
                )
            )
            await asyncio.sleep(interval * (0.9 + 0.1 * random.random()))  # noqa: S311  jitter, not a secret

    async def _measure(self) -> None:
        sent = 0.0
        while True:
            await asyncio.sleep(1.0)
            self._say(figures=True)
            now = asyncio.get_running_loop().time()
            if not self.config.otel or now - sent < METRICS_S or not self.link.connected:
                continue
            sent = now
            by_module = {name: s.metrics for name, s in self.supervisors.items() if s.metrics}
            own = {
                "loopback_host_generation": float(self.state.generation),
                "loopback_host_module_events_total": float(self._events),
                "loopback_host_reports_dropped_total": float(self.reporter.dropped),
                "loopback_host_faults_total": float(self._faults),
            }
            payload = otel.figures(self.config.host, self.config.workspace, by_module, own)
            self.reporter.otlp(envelope.OTLP_METRICS, payload)

    def _reserve(self, upto: int) -> None:
        self.state = msgspec.structs.replace(self.state, reports=upto)
        try:
            self.store.save(self.state)
        except Refused as refused:
            log.error("report numbers cannot be written down: %s", refused)


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Hold the state directory; two agents on one would undo each other. Raises Refused(HOST_DISK)."""
    path = store.dir / "agent.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(
            Code.HOST_DISK, f"{path}: {error.strerror}", "choose a state_dir that can be written"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                Code.HOST_DISK,
                f"another agent uses {store.dir}",
                "stop it first, or choose another state_dir",
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def stopping_signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set the event, where this thread may take signals at all."""
    loop = asyncio.get_running_loop()
    taken = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, stop.set)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
