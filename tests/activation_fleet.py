"""Replicas of activation and simulated hosts on a real broker, for activation's behaviour tests.

Hosts here do what the core agent does with a desired state as far as activation can see it: they verify it, answer with
signed statuses, and keep what they promoted. What they answer is up to the test.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import nats
from opentelemetry import metrics
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support import Place, eventually
from support_fleet import OPERATOR, WORKSPACE, FakeHost, World, world
from support_trust import MemoryRepository

from loopback.contracts import desired, envelope, journal, subjects, trustdoc
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import DesiredModule, DesiredState, Running
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Command, Release, Requirements, Result, Verdict
from loopback.contracts.reports import ModuleStatus, Phase, Status
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import Rollout, Workspace
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.services._runtime.bus import Bus, Outgoing
from loopback.services._runtime.service import Service
from loopback.services._runtime.settings import read_identity
from loopback.services.activation import app
from loopback.trust import blobs, signing
from loopback.trust.repository import target_path

RELEASES = (("1.0.0", "a" * 64), ("1.1.0", "b" * 64))  # of the firewall
Behaviour = Callable[["SimHost", DesiredModule], tuple[Phase, Code | None]]


async def until(condition: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
    """`eventually`, which names what was waited for."""
    try:
        return await eventually(condition, timeout)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


class FixedTrust:
    """A TrustSource whose document never changes: one operator who may do everything."""

    def __init__(self, *roles: Role) -> None:
        person = Operator(name="ada", public_key=OPERATOR.public.text, roles={"*": roles or (Role.ADMIN,)})
        self.trust = Trust(TrustDocument(version=1, operators=(person,), services={}))

    async def current(self) -> Trust:
        return self.trust

    async def look_again(self) -> bool:
        return False

    async def wait(self) -> None:
        return


class Replica:
    """One process's worth of activation, in a task of its own. `stop` ends it as a kill would: nothing is finished."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.spans = InMemorySpanExporter()
        self._task: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()

    async def start(self) -> Replica:
        self._task = asyncio.create_task(self._run())
        await until(lambda: self.ready.is_set() or (self._task and self._task.done()), "a replica is ready")
        if self._task.done():
            self._task.result()
        return self

    async def _run(self) -> None:
        settings = self.fleet.place.settings("activation")
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        async with await Bus.connect(settings) as bus, asyncio.TaskGroup() as group:
            service = Service(
                name="activation",
                settings=settings,
                bus=bus,
                trust=self.fleet.trust,  # type: ignore[arg-type]  # it has what activation uses
                tracer=provider.get_tracer("test"),
                meter=metrics.get_meter("test"),
                group=group,
                log=logging.getLogger("test"),
                ready=self.ready,
            )
            await app.start(service)

    def check(self) -> None:
        """Raise what it died of, if it did."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def stop(self) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None


class SimHost:
    """A host that follows its desired states. `contents` holds every content it saw, by generation."""

    def __init__(self, fake: FakeHost, activation: Any) -> None:
        self.fake = fake
        self.activation = activation
        self.promoted: dict[str, Running | None] = {}
        self.done: dict[str, int] = {}
        self.statuses: dict[str, ModuleStatus] = {}
        self.contents: dict[int, set[str]] = {}
        self.states: list[DesiredState] = []
        self.behave: Behaviour = lambda host, module: (
            Phase.PROMOTED if module.running else Phase.REMOVED,
            None,
        )
        self._turn = asyncio.Lock()

    @property
    def name(self) -> str:
        return self.fake.name

    async def join(self) -> None:
        subject = subjects.to_host(self.fake.workspace, self.name, "desired")
        await self.fake.nc.subscribe(subject, cb=self._on_desired)
        await self.fake.nc.flush()

    async def _on_desired(self, message: Any) -> None:
        payload, _ = envelope.open_envelope(
            envelope.parse(message.data), envelope.DESIRED, {self.activation.keyid: self.activation}
        )
        state = desired.decode(payload)
        assert (state.host, state.workspace) == (self.name, self.fake.workspace)
        self.contents.setdefault(state.generation, set()).add(hashlib.sha256(message.data).hexdigest())
        self.states.append(state)
        async with self._turn:
            for module in state.modules:
                if module.generation > self.done.get(module.module, 0):
                    await self._apply(state, module, (message.headers or {}).get("traceparent", ""))

    async def _apply(self, state: DesiredState, module: DesiredModule, traceparent: str) -> None:
        self.done[module.module] = module.generation
        if module.returning and module.running == self.promoted.get(module.module):
            phase, code = (Phase.PROMOTED if module.running else Phase.REMOVED), None
        elif module.returning:
            phase, code = (Phase.PROMOTED if module.running else Phase.REMOVED), None
            self.promoted[module.module] = module.running
        else:
            phase, code = self.behave(self, module)
            if phase in (Phase.PROMOTED, Phase.REMOVED):
                self.promoted[module.module] = module.running
        if phase is Phase.IDLE:  # the test wants it silent
            return
        self.statuses[module.module] = ModuleStatus(
            module=module.module,
            phase=phase,
            generation=module.generation,
            rollout=module.rollout,
            promoted=self.promoted.get(module.module),
            health="ok",
            refusal=Refusal(code, "the test said so") if code else None,
        )
        await self.report(traceparent)

    async def report(self, traceparent: str = "") -> None:
        status = Status(**self.fake.fields(), agent="ok", generation=1, modules=tuple(self.statuses.values()))
        await self.fake.say(status, headers={"traceparent": traceparent} if traceparent else None)


class Fleet:
    """A broker, hosts, replicas; verdicts are given as soon as a rollout is created, unless `judge` is False."""

    def __init__(self, made: World) -> None:
        self.world = made
        self.place = made.place
        self.trust = FixedTrust()
        self.repository = MemoryRepository()
        self.hosts: dict[str, SimHost] = {}
        self.replicas: list[Replica] = []
        self.state = Workspace(WORKSPACE)
        self.links: list[journal.Link] = []
        self.headers: dict[int, dict[str, str]] = {}
        self.judge = True
        self.admin: Bus
        self.client: Any

    async def open(self) -> None:
        self.admin = await self.world.bus("admin")
        self.client = await nats.connect(
            self.place.url,
            user_credentials=str(self.place.home / "creds" / "operator.creds"),
            inbox_prefix=b"_INBOX.operator",
        )

    async def add_hosts(self, *names: str, labels: dict[str, str] | None = None) -> None:
        identity = read_identity(self.place.home / "creds" / "activation.creds")
        key = SigningKey.from_nkey(identity.seed).public
        for name in names:
            host = SimHost(await self.world.host(name, labels=labels or {}), key)
            await host.join()
            self.hosts[name] = host

    async def replica(self) -> Replica:
        made = await Replica(self).start()
        self.replicas.append(made)
        return made

    async def govern(self, document: TrustDocument) -> None:
        """Publish this trust document and the releases as delivery would, and have every replica judge by it."""
        repository = self.repository
        repository.trust = msgspec.json.encode(document)
        repository.targets.targets[trustdoc.TARGET] = signing.target(trustdoc.TARGET, repository.trust)
        repository.targets.version += 1
        for version, package in RELEASES:
            path = target_path("firewall", version)
            repository.releases.targets[path] = signing.release(path, package, 10, version, "stable")
        repository.releases.version += 1
        repository.publish(datetime.now(UTC))
        await self.put_blob(repository.trust)
        for name, data in repository.files.items():
            await self.admin.publish(Outgoing(subjects.tuf(name), data))
        root = self.place.home / "tuf" / "root.json"
        root.parent.mkdir(exist_ok=True)
        root.write_bytes(repository.pinned)
        self.trust.trust = Trust(document)

    async def put_blob(self, data: bytes) -> str:
        """Content of one chunk."""
        digest = hashlib.sha256(data).hexdigest()
        await self.admin.publish(Outgoing(subjects.blob(digest, 0), data, blobs.headers(len(data))))
        return digest

    async def publish_release(self, module: str, version: str, package: str) -> None:
        release = Release(
            module=module, version=version, digest=package, size=10, target="t", channel="stable",
            requirements=Requirements(), published_at=datetime.now(UTC),
        )  # fmt: skip
        await self.admin.publish(Outgoing(subjects.catalog(module, package), msgspec.json.encode(release)))

    async def send(self, command: Command, service: str = "activation", key: Any = OPERATOR) -> Result:
        """Publish a signed command as any NATS client would, without a single header, and read its stored outcome."""
        kind = str(command.__struct_config__.tag).replace(".", "-")
        data = envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(command), key)
        await self.client.jetstream().publish(subjects.command(command.workspace, service, kind), data)
        return await self.result(command)

    async def result(self, command: Command) -> Result:
        async def stored() -> Result | None:
            for place in (command.workspace, subjects.GLOBAL_WORKSPACE):
                subject = subjects.result(place, command.id)
                found = await self.admin.last(subjects.workspace_stream(place), subject)
                if found is not None:
                    return msgspec.json.decode(found.data, type=Result)
            return None

        # A command that races a thousand writes is decided again and again; on a busy machine that takes its time.
        found = await eventually(stored, 90)
        assert found is not None
        return found

    async def follow(self) -> None:
        """Fold the journal for the test, and give the verdicts that eligibility and delivery would give."""
        loop = asyncio.get_running_loop()
        created: asyncio.Queue[journal.Link] = asyncio.Queue()

        def on(stored: Any) -> None:
            link = fold(self.state, stored.data)
            assert link is not None, f"{stored.subject} does not continue its chain"
            self.links.append(link)
            self.headers[len(self.links) - 1] = stored.headers
            if isinstance(link.event, journal.Created):
                loop.call_soon(created.put_nowait, link)

        async def verdicts() -> None:
            while True:
                link = await created.get()
                if self.judge:
                    await self.verdict(link.rollout)

        async with asyncio.TaskGroup() as group:
            group.create_task(verdicts())
            await self.admin.fold(
                subjects.workspace_stream(WORKSPACE),
                [subjects.rollout(WORKSPACE, "*", "*")],
                on,
                caught_up=asyncio.Event(),
            )

    async def verdict(self, rollout: str, **changed: Any) -> None:
        for service in ("eligibility", "delivery"):
            verdict = Verdict(
                rollout=rollout, workspace=WORKSPACE, service=service, at=datetime.now(UTC),
                **(changed if service == "eligibility" else {}),
            )  # fmt: skip
            subject = subjects.verdict(WORKSPACE, rollout, service)
            await self.admin.publish(Outgoing(subject, msgspec.json.encode(verdict)))

    def rollout(self, name: str) -> Rollout:
        return self.state.rollouts[name]

    def _is(self, name: str, state: str) -> bool:
        for replica in self.replicas:
            replica.check()
        return name in self.state.rollouts and self.rollout(name).state == state

    async def ended(self, name: str, state: str, timeout: float = 30.0) -> Rollout:
        """Wait for a state."""
        try:
            await until(lambda: self._is(name, state), state, timeout)
        except AssertionError:
            told = [(link.rollout, link.event) for link in self.links if link.rollout == name][-8:]
            raise AssertionError(f"{name} is not {state}: {told}") from None
        return self.rollout(name)


@asynccontextmanager
async def fleet(place: Place, *hosts: str, replicas: int = 1) -> AsyncIterator[Fleet]:
    """A world with these hosts, `replicas` of activation and releases 1.0.0 and 1.1.0 of the firewall."""
    async with world(place) as made:
        found = Fleet(made)
        await found.open()
        try:
            await found.add_hosts(*hosts)
            for version, package in RELEASES:
                await found.publish_release("firewall", version, package)
            following = asyncio.create_task(found.follow())
            try:
                for _ in range(replicas):
                    await found.replica()
                yield found
            finally:
                for replica in found.replicas:
                    await replica.stop()
                following.cancel()
                ended = await asyncio.gather(following, return_exceptions=True)
                if isinstance(ended[0], Exception):
                    raise ended[0]
        finally:
            await found.client.close()
