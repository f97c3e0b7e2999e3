"""An operator, delivery and activation in one, for tests of the host: real keys, signatures, packages and metadata."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from support import Place, eventually
from support_trust import described

from loopback.contracts import envelope, reports, subjects, trustdoc
from loopback.contracts.desired import DesiredModule, DesiredState, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Blob, Command, HostPut, Policy, RolloutStart, Scope, Selector, Wave
from loopback.contracts.reports import AnyReport, ModuleStatus, Phase, Status
from loopback.contracts.trustdoc import Operator, Role, TrustDocument
from loopback.host.agent import Agent
from loopback.host.config import Allow, HostConfig
from loopback.host.link import signing_key
from loopback.services._runtime.bus import Conflict
from loopback.services._runtime.wire import Outgoing
from loopback.trust import blobs, signing
from loopback.trust.manifest import HealthTable, LimitsTable, Manifest, ModuleTable
from loopback.trust.repository import target_path

WORKSPACE = "prod"
TINY = (Path(__file__).parent / "fixtures_modules" / "tiny.py").read_bytes()


def agent_command(config: Path) -> list[str]:
    """What runs a real agent with this host.toml."""
    return [sys.executable, "-P", "-m", "loopback.cli.main", "host", "run", "--config", str(config)]


class Signers:
    """Everybody who signs: one operator with every role, activation, and the TUF roles."""

    def __init__(
        self, module: str = "tiny", clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.module = module
        self.clock = clock
        self.operator = SigningKey.generate()
        self.activation = SigningKey.generate()
        names = ("root", "targets", "snapshot", "timestamp", signing.delegated_role(module))
        self.tuf = {name: SigningKey.generate() for name in names}
        self.document = TrustDocument(
            version=1,
            operators=(Operator("ada", self.operator.public.text, {"*": tuple(Role)}),),
            services={"activation": (self.activation.public.text,)},
        )
        self.trust = trustdoc.Trust(self.document)
        self._numbers = 0

    def times(self) -> dict[str, Any]:
        """The fields that every command has."""
        self._numbers += 1
        now = self.clock()
        return {
            "id": f"c{self._numbers}", "workspace": WORKSPACE, "issued_at": now, "expires_at": now + timedelta(hours=1)
        }  # fmt: skip

    def command(self, command: Command, *keys: SigningKey) -> Envelope:
        """A command as an operator signs it."""
        return envelope.seal(envelope.COMMAND, msgspec.json.encode(command), *(keys or (self.operator,)))

    def record(self, host: str, public_key: str, **labels: str) -> Envelope:
        """A host's record."""
        return self.command(HostPut(**self.times(), host=host, public_key=public_key, labels=labels))

    def rollout(self, target: Running | None, rollout: str = "r1", **changes: Any) -> RolloutStart:
        """The command that allows `target`, or its absence."""
        now = self.clock()
        scope = Scope(
            workspace=WORKSPACE,
            module=self.module,
            packages={target.version: target.package} if target else {},
            policy=target.policy if target else None,
            policy_serial=target.policy_serial if target else 0,
            selector=Selector(),
            not_before=now - timedelta(minutes=1),
            not_after=now + timedelta(hours=1),
            absent=target is None,
        )
        scope = msgspec.structs.replace(scope, **changes.pop("scope", {}))
        fields = self.times() | {
            "rollout": rollout,
            "module": self.module,
            "version": target.version if target else "",
            "waves": (Wave(name="all"),),
            "scope": scope,
            "trial_s": 0.3,
        }
        return RolloutStart(**fields | changes)

    def entry(self, target: Running | None, generation: int, **changes: Any) -> DesiredModule:
        """An entry inside the scope of a fresh rollout."""
        start = self.rollout(target, changes.get("rollout", "r1"), **changes.pop("start", {}))
        fields = {
            "module": self.module,
            "running": target,
            "generation": generation,
            "rollout": start.rollout,
            "scope": self.command(start),
            "trial_s": start.trial_s,
        }
        return DesiredModule(**fields | changes)

    def desired(
        self, name: str, signed_record: Envelope | None, *entries: DesiredModule, **changes: Any
    ) -> DesiredState:
        """A host's document; its generation is that of its newest entry."""
        fields: dict[str, Any] = {
            "host": name, "workspace": WORKSPACE, "generation": max((e.generation for e in entries), default=1),
            "modules": entries, "issued_at": self.clock(), "record": signed_record,
        }  # fmt: skip
        return DesiredState(**fields | changes)

    def sealed(self, document: DesiredState, *keys: SigningKey) -> Envelope:
        """The document as activation signs it."""
        return envelope.seal(envelope.DESIRED, msgspec.json.encode(document), *(keys or (self.activation,)))

    def policy(
        self, serial: int, plain: Mapping[str, object] | None = None, **changes: Any
    ) -> tuple[bytes, str]:
        """A signed policy's bytes and their digest."""
        policy = Policy(
            workspace=WORKSPACE,
            module=self.module,
            name="p",
            serial=serial,
            content=msgspec.Raw(msgspec.json.encode(plain or {"serial": serial})),
            issued_at=datetime.now(UTC),
        )
        policy = msgspec.structs.replace(policy, **changes)
        data = envelope.seal_bytes(envelope.POLICY, msgspec.json.encode(policy), self.operator)
        return data, hashlib.sha256(data).hexdigest()

    def apart(self, serial: int, content: bytes, **changes: Any) -> tuple[bytes, str]:
        """A signed policy that names its content, which lies elsewhere."""
        blob = Blob(hashlib.sha256(content).hexdigest(), len(content))
        return self.policy(serial, **({"content": msgspec.Raw(b"null"), "blob": blob} | changes))


def tiny(version: str = "1.0", how: str = "healthy", **module: Any) -> bytes:
    """A package of the tiny module that behaves as told."""
    table = ModuleTable(
        **{"name": "tiny", "version": version, "entry": ("{python}", "-P", "-m", "tiny")} | module
    )
    manifest = Manifest(
        module=table, limits=LimitsTable(stop_s=2.0), health=HealthTable(interval_s=0.2, grace_s=0.1)
    )
    return described({"lib/tiny.py": TINY, "behaviour.txt": how.encode()}, manifest)


class World:
    """A real broker with one host's surroundings. Releases and policies are published as delivery would."""

    def __init__(self, place: Place, tmp_path: Path, host: str = "web-1.example") -> None:
        self.place = place
        self.host = host
        self.signers = Signers()
        self.generation = 0
        self.seen: list[AnyReport] = []
        identity = place.host(WORKSPACE, host)
        root = tmp_path / "root.json"
        self.config = HostConfig(
            host=host,
            workspace=WORKSPACE,
            url=place.url,
            creds=place.home / "creds" / f"{identity}.creds",
            root=root,
            state_dir=tmp_path / "state",
            heartbeat_s=0.2,
            allow=Allow(modules=("tiny",), capabilities=()),
        )
        self.key = signing_key(self.config)
        self.record = self.signers.record(host, self.key.public.text, role="web")
        now = datetime.now(UTC)
        keys = self.signers.tuf
        self._root = signing.sign(
            signing.new_root(now, **{n: keys[n] for n in ("root", "targets", "snapshot", "timestamp")}),
            keys["root"],
        )
        root.write_bytes(self._root)
        self._releases = signing.new_targets(now, version=1, files={})
        self._versions = 0

    async def prepare(self) -> None:
        """The workspace, trust, and an empty repository."""
        self.bus = await self.place.bus()
        await self.place.workspace(WORKSPACE)
        self.stream = subjects.workspace_stream(WORKSPACE)
        await self._tuf("1.root.json", self._root)
        self._trust = msgspec.json.encode(self.signers.document)
        await self.blob(self._trust)
        await self._publish_metadata()

    async def blob(self, data: bytes) -> str:
        """Store content; its digest."""
        digest = hashlib.sha256(data).hexdigest()
        for number, chunk in enumerate(blobs.split(data)):
            await self.bus.publish(Outgoing(subjects.blob(digest, number), chunk, blobs.headers(len(data))))
        return digest

    async def release(
        self, version: str, how: str = "healthy", policy: int | None = None, **module: Any
    ) -> Running:
        """Publish a release, and a policy of this serial where one is wanted; what a host should run then."""
        data = tiny(version, how, **module)
        digest = await self.blob(data)
        self._releases.targets[target_path("tiny", version)] = signing.release(
            target_path("tiny", version), digest, len(data), version, "stable"
        )
        await self._publish_metadata()
        found = Running(version=version, package=digest)
        return found if policy is None else await self.with_policy(found, policy)

    async def with_policy(self, running: Running, serial: int, **content: object) -> Running:
        """The same version with another policy, published."""
        data, digest = self.signers.policy(serial, {"serial": serial, **content})
        await self.blob(data)
        return msgspec.structs.replace(running, policy=digest, policy_serial=serial)

    async def with_content(self, running: Running, serial: int, content: bytes) -> Running:
        """The same version with a policy whose content is stored apart."""
        data, digest = self.signers.apart(serial, content)
        await self.blob(data)
        with contextlib.suppress(Conflict):  # other policies may name the same content
            await self.blob(content)
        return msgspec.structs.replace(running, policy=digest, policy_serial=serial)

    async def desire(self, target: Running | None, **changes: Any) -> int:
        """Ask for a target with the next generation, which is returned."""
        self.generation += 1
        entry = self.signers.entry(target, self.generation, **changes)
        await self.publish(self.signers.sealed(self.signers.desired(self.host, self.record, entry)))
        return self.generation

    async def publish(self, signed: Envelope, **headers: str) -> None:
        """Store a desired state as activation does."""
        subject = subjects.desired(WORKSPACE, self.host)
        await self.bus.publish(Outgoing(subject, msgspec.json.encode(signed), headers))

    async def statuses(self) -> list[Status]:
        """Every status so far, its signature checked."""
        found = []
        subject = subjects.from_host(WORKSPACE, self.host, "status")
        for stored in await self.bus.read(subjects.STREAM_REPORTS, [subject]):
            keys = {self.key.keyid: self.key.public}
            payload, _ = envelope.open_envelope(envelope.parse(stored.data), envelope.REPORT, keys)
            report = reports.decode(payload)
            assert isinstance(report, Status)
            found.append(report)
        return found

    async def module(self, name: str = "tiny") -> ModuleStatus | None:
        """The module as last reported."""
        for status in reversed(await self.statuses()):
            for one in status.modules:
                if one.module == name:
                    return one
        return None

    async def reached(self, generation: int, timeout: float = 40.0) -> ModuleStatus:
        """The module's status once the host has finished with this generation."""

        async def check() -> ModuleStatus | None:
            for status in reversed(await self.statuses()):
                for one in status.modules:
                    if one.generation == generation and one.phase in reports.FINAL:
                        return one
            return None

        found = await eventually(check, timeout)
        assert found is not None
        return found

    async def phases(self, generation: int) -> list[Phase]:
        """The phases of a generation in the order in which they were reported, repeats left out."""
        found: list[Phase] = []
        for status in await self.statuses():
            for one in status.modules:
                if one.generation == generation and (not found or found[-1] is not one.phase):
                    found.append(one.phase)
        return found

    @asynccontextmanager
    async def agent(self, **changes: Any) -> AsyncIterator[Agent]:
        """A running agent, stopped in the end as SIGTERM would."""
        agent = Agent(msgspec.structs.replace(self.config, **changes))
        task = asyncio.get_running_loop().create_task(agent.run())
        try:
            yield agent
        finally:
            agent.stop()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _publish_metadata(self) -> None:
        now = datetime.now(UTC)
        self._versions += 1
        keys, number, role = self.signers.tuf, self._versions, signing.delegated_role("tiny")
        targets = signing.new_targets(
            now, version=number, files={trustdoc.TARGET: signing.target(trustdoc.TARGET, self._trust)}
        )
        signing.delegate(targets, "tiny", keys[role])
        self._releases.version = number
        signed = {
            "targets": signing.sign(targets, keys["targets"]),
            role: signing.sign(self._releases, keys[role]),
        }
        snapshot = signing.sign(signing.new_snapshot(now, version=number, files=signed), keys["snapshot"])
        for name, data in signed.items():
            await self._tuf(f"{number}.{name}.json", data)
        await self._tuf(f"{number}.snapshot.json", snapshot)
        timestamp = signing.sign(
            signing.new_timestamp(now, version=number, snapshot=snapshot), keys["timestamp"]
        )
        await self._tuf("timestamp.json", timestamp)

    async def _tuf(self, name: str, data: bytes) -> None:
        await self.bus.publish(Outgoing(subjects.tuf(name), data))
