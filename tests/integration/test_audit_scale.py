"""An audit of a large workspace: ten thousand links and a thousand hosts, each stream read once."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from activation_world import start_command
from support import Place, eventually
from support_installation import Installation

from loopback.cli import keys
from loopback.contracts import envelope, journal, rolloutplan, subjects
from loopback.contracts.desired import Running
from loopback.contracts.journal import Observation
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostPut, Record, RolloutStart, WorkspacePut
from loopback.contracts.reports import Inventory, ModuleStatus, Phase, Status, Witness
from loopback.services._runtime import service, streams
from loopback.services._runtime.bus import Outgoing
from loopback.services._runtime.settings import read_identity
from loopback.services.activation.documents import Chain
from loopback.services.delivery import app as delivery

pytestmark = pytest.mark.broker
LINKS = 10_000
HOSTS = 1_000
ROLLOUTS = 20
MOST_S = (
    60.0  # it takes three to five on two shared cores; what must not happen is that it grows with the square
)
TARGET = Running("1.0.0", "a" * 64)


async def test_ten_thousand_links_and_a_thousand_hosts_are_audited_in_seconds(
    broker: Place, tmp_path: Path, record_property: Any
) -> None:
    identity = read_identity(broker.settings("activation").creds)
    keys.init_keys(broker.home, SigningKey.from_nkey(identity.seed).public.text)
    found = Installation(broker, tmp_path)
    found.bus = await broker.bus()
    await streams.ensure_workspace(found.bus, "prod")
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:  # delivery publishes the repository
        group.create_task(service.run("delivery", broker.settings("delivery"), delivery.start, stop=stop))
        await eventually(lambda: found.bus.last(subjects.STREAM_TUF, subjects.tuf("timestamp.json")))
        stop.set()
    await _fill(found, SigningKey.load(broker.home / "keys" / "operators" / "admin.pem"))

    began = time.monotonic()
    said = await found("audit", "--workspace", "prod", code=None)
    audit_s = time.monotonic() - began
    assert f"{HOSTS} of {HOSTS} hosts confirm the journal, up to link {LINKS} of {LINKS}" in said.out
    began = time.monotonic()
    posture = await found("posture", "prod", "--format", "json")
    posture_s = time.monotonic() - began
    assert len(posture.json["hosts"]) == HOSTS
    record_property("audit_s", round(audit_s, 1))
    record_property("posture_s", round(posture_s, 1))
    print(f"{LINKS} links, {HOSTS} hosts: audit {audit_s:.1f} s, posture {posture_s:.1f} s")
    assert audit_s < MOST_S
    assert posture_s < MOST_S


async def _fill(found: Installation, operator: SigningKey) -> None:
    """Records, links and reports as services and hosts would have stored them over months."""
    now = datetime.now(UTC)
    names = [f"host-{n:04}" for n in range(HOSTS)]
    secrets = {name: SigningKey.generate() for name in names}
    fields = {"workspace": "prod", "issued_at": now, "expires_at": now + timedelta(hours=1)}
    records = [
        _record("workspace", "prod", WorkspacePut(id="w", environment="production", **fields), operator)
    ]
    for name in names:
        put = HostPut(id=name, host=name, public_key=secrets[name].public.text, **fields)
        records.append(_record("host", name, put, operator))
    head, links = _links(names, operator, now)
    for messages in (records, links):
        for start in range(0, len(messages), 500):
            await found.bus.batch(messages[start : start + 500])
    gate = asyncio.Semaphore(50)

    async def report(name: str) -> None:
        common = {"host": name, "workspace": "prod", "incarnation": "i", "at": now}
        module = ModuleStatus(
            module="firewall",
            phase=Phase.PROMOTED,
            generation=1,
            promoted=TARGET,
            health="ok",
            enforcing=True,
        )
        status = Status(
            **common, seq=2, agent="ok", generation=1, modules=(module,), witness=Witness(LINKS, head, now),
            witnesses=tuple(Witness(1, links_head, now) for links_head in [_first(links)]),
        )  # fmt: skip
        inventory = Inventory(
            **common,
            seq=1,
            kernel="6.1.0",
            architecture="x86_64",
            agent_version="0.1.0",
            abi_min=1,
            abi_max=1,
        )
        for kind, one in (("inventory", inventory), ("status", status)):
            data = envelope.seal_bytes(envelope.REPORT, msgspec.json.encode(one), secrets[name])
            async with gate:
                await found.bus.publish(Outgoing(subjects.from_host("prod", name, kind), data))

    await asyncio.gather(*map(report, names))


def _first(links: list[Outgoing]) -> str:
    return journal.chained("", journal.digest(links[0].data))


def _record(kind: str, name: str, command: WorkspacePut | HostPut, key: SigningKey) -> Outgoing:
    sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), key)
    record = Record(kind=kind, name=name, workspace="prod", envelope=sealed, at=command.issued_at)
    return Outgoing(subjects.record("prod", kind, name), msgspec.json.encode(record))


def _created(start: RolloutStart, names: list[str], operator: SigningKey) -> journal.Created:
    return journal.Created(
        envelope=envelope.seal(envelope.COMMAND, msgspec.json.encode(start), operator),
        command=start.id, keyids=(operator.keyid,), operators=("admin",),
        members=rolloutplan.members(start, {n: {} for n in names}), module=start.module, version=start.version,
        package=start.scope.packages[start.version],
    )  # fmt: skip


def _links(names: list[str], operator: SigningKey, now: datetime) -> tuple[str, list[Outgoing]]:
    """ROLLOUTS rollouts of every host, LINKS links in all, and the chain's head."""
    outs: list[Outgoing] = []
    head = ""
    for number in range(ROLLOUTS):
        start = start_command(f"r{number}", now, policy=None, policy_serial=0)
        chain = Chain("prod", start.rollout, 0, "")
        waves = (journal.PlannedWave(name="all", hosts=tuple(names)),)
        events: list[journal.AnyEvent] = [_created(start, names, operator), journal.Started(waves=waves)]
        events.append(journal.WaveStarted(wave=0))
        events.append(
            journal.Assigned(
                wave=0,
                hosts=tuple(journal.Assignment(n, number + 1) for n in names),
                not_after=now + timedelta(days=1),
            )
        )
        for turn in range(LINKS // ROLLOUTS - len(events) - 1):
            name = names[turn % len(names)]
            seen = Observation(
                host=name, phase=Phase.TRIAL, generation=number + 1, incarnation="i", seq=turn + 1
            )
            events.append(journal.Observed(hosts=(seen,)))
        events.append(journal.Done())
        for event in events:
            draft = chain.seal(event, now, "")
            outs.append(Outgoing(draft.subject, draft.data, draft.headers))
            head = journal.chained(head, journal.digest(draft.data))
    return head, outs
