"""A service's process: health, metrics, spans, trust and its end; and the supervisor that keeps processes running."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from support import EmbeddedPlace, Place, eventually
from support_otlp import OtlpReceiver

from loopback.cli import keys, supervise
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.services._runtime import service
from loopback.services._runtime.service import PORT_FILE, BusLost, Service
from loopback.services._runtime.settings import read_identity
from loopback.services._runtime.trustsource import TrustSource

pytestmark = pytest.mark.broker


async def get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.text()


@asynccontextmanager
async def running(place: Place, start: service.Start, name: str = "activation") -> AsyncIterator[int]:
    """Run a service in this process; yields its HTTP port."""
    stop = asyncio.Event()
    settings = place.settings(name)
    task = asyncio.ensure_future(service.run(name, settings, start, stop=stop))
    path = settings.state(name) / PORT_FILE

    def port() -> int:
        assert not task.done(), task
        return int(path.read_text()) if path.exists() and path.read_text() else 0

    try:
        yield await eventually(port)
    finally:
        stop.set()
        await task


async def test_a_service_is_live_at_once_and_ready_once_it_works(broker: Place) -> None:
    go = asyncio.Event()

    async def start(_: Service) -> None:
        await go.wait()

    async with running(broker, start) as port:
        assert await get(port, "/livez") == (200, "ok\n")
        assert await get(port, "/readyz") == (503, "starting\n")
        go.set()

        async def ready() -> bool:
            return (await get(port, "/readyz"))[0] == 200

        await eventually(ready)
        await broker.kill()
        await eventually(lambda: _is(port, 503))
        assert (await get(port, "/livez"))[0] == 200, (
            "a service without a broker waits; a restart would not help it"
        )
        await broker.start()
        await eventually(lambda: _is(port, 200))


async def _is(port: int, status: int) -> bool:
    return (await get(port, "/readyz"))[0] == status


async def test_a_services_counters_are_served_to_prometheus(broker: Place) -> None:
    async def start(one: Service) -> None:
        one.meter.create_counter("loopback_widgets", description="Widgets").add(3, {"kind": "blue"})

    async with running(broker, start) as port:
        await eventually(lambda: _is(port, 200))
        _, text = await get(port, "/metrics")
    assert 'loopback_widgets_total{kind="blue"} 3.0' in text
    assert 'service_name="loopback-activation"' in text


async def test_services_answer_the_buss_own_questions(broker: Place) -> None:
    async def start(_: Service) -> None:
        return

    operator = await broker.bus("operator")
    async with running(broker, start):
        for question in ("$SRV.PING", "$SRV.INFO.activation", "$SRV.STATS.activation"):
            answer = json.loads((await operator.nc.request(question, b"", timeout=60)).data)
            assert answer["name"] == "activation"
            assert answer["metadata"]["instance"] == "1"


async def test_a_service_whose_task_fails_ends_with_its_error(broker: Place) -> None:
    async def start(_: Service) -> None:
        raise LookupError("a defect")

    with pytest.raises(ExceptionGroup) as group:
        await service.run("activation", broker.settings("activation"), start, stop=asyncio.Event())
    assert group.group_contains(LookupError, match="a defect")


async def test_a_service_ends_when_the_broker_closes_its_connection_for_good(broker: Place) -> None:
    caught: list[Service] = []

    async def start(one: Service) -> None:
        caught.append(one)
        await asyncio.Event().wait()

    task = asyncio.ensure_future(
        service.run("activation", broker.settings("activation"), start, stop=asyncio.Event())
    )
    await eventually(lambda: caught)
    await caught[0].bus.nc.close()
    with pytest.raises(ExceptionGroup) as group:
        await asyncio.wait_for(task, 60)
    assert group.group_contains(BusLost)


async def test_spans_and_counters_are_sent_before_a_service_is_gone(broker: Place) -> None:
    spoken = asyncio.Event()

    async def start(one: Service) -> None:
        with one.tracer.start_as_current_span("last words"):
            one.meter.create_counter("loopback_words").add(2)
        spoken.set()

    async with OtlpReceiver() as receiver:
        stop = asyncio.Event()
        settings = broker.settings("activation", otlp_endpoint=receiver.endpoint)
        task = asyncio.ensure_future(service.run("activation", settings, start, stop=stop))
        await asyncio.wait_for(spoken.wait(), 60)
        stop.set()
        await asyncio.wait_for(task, 60)
        assert [(s.name, s.service) for s in receiver.spans] == [("last words", "loopback-activation")]
        assert [(p.name, p.value) for p in receiver.metrics if p.name == "loopback_words"] == [
            ("loopback_words", 2.0)
        ]


async def test_a_dead_receiver_does_not_keep_a_service_from_ending(broker: Place) -> None:
    spoken = asyncio.Event()

    async def start(one: Service) -> None:
        with one.tracer.start_as_current_span("unheard"):
            spoken.set()

    stop = asyncio.Event()
    settings = broker.settings("activation", otlp_endpoint="http://127.0.0.1:9")
    task = asyncio.ensure_future(service.run("activation", settings, start, stop=stop))
    await asyncio.wait_for(spoken.wait(), 60)
    stop.set()
    await asyncio.wait_for(task, 60)


# Trust


async def with_repository(place: Place) -> None:
    seed = read_identity(place.home / "creds" / "activation.creds").seed
    keys.init_keys(place.home, SigningKey.from_nkey(seed).public.text)
    await supervise.seed_repository(await place.bus(), place.home)


async def test_trust_comes_through_the_verified_repository(broker: Place) -> None:
    bus = await broker.bus("eligibility")
    source = TrustSource(bus, broker.settings("eligibility"), "eligibility")
    with pytest.raises(Refused, match="there is no pinned root"):
        await source.current()
    await with_repository(broker)
    found = await source.current()
    assert [o.name for o in found.document.operators] == ["admin"]
    activation = SigningKey.from_nkey(read_identity(broker.home / "creds" / "activation.creds").seed)
    assert list(found.service_keys["activation"]) == [activation.keyid]
    assert await source.look_again() is False, "it was looked at just now"
    await source.refresh()
    assert (await source.current()).document == found.document


async def test_a_trust_document_that_was_tampered_with_is_not_believed(broker: Place) -> None:
    await with_repository(broker)
    admin = await broker.bus()
    (blob,) = (broker.home / "tuf" / "seed" / "blobs").iterdir()
    await admin.api("STREAM.PURGE.LB_BLOB")
    evil = blob.read_bytes().replace(b'"admin"', b'"evila"')
    headers = {"Lb-Size": str(len(evil)), "Lb-Chunks": "1"}
    await admin.nc.request(subjects.blob(blob.name, 0), evil, headers=headers, timeout=60)
    source = TrustSource(await broker.bus("eligibility"), broker.settings("eligibility"), "eligibility")
    with pytest.raises(Refused) as refused:
        await source.current()
    assert refused.value.code in (Code.BLOB_DIGEST, Code.TUF_INVALID)


# The supervisor


async def test_everything_runs_with_one_call_and_a_killed_service_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    async with supervise.running(
        tmp_path / "home", listen="127.0.0.1:0", services=("eligibility",), replicas=2, say=said.append
    ) as installation:
        assert set(installation.children) == {"eligibility-1", "eligibility-2"}
        victim = installation.children["eligibility-2"]
        old = victim.pid
        assert old
        os.kill(old, signal.SIGKILL)
        await eventually(lambda: victim.pid not in (None, old))
        await installation.ready()
        assert victim.restarts == 1
        with pytest.raises(Refused, match="another 'loopback up' runs"):
            async with supervise.running(tmp_path / "home", listen="127.0.0.1:0"):
                pass
        broker = installation.broker.process
        assert broker is not None
        broker.kill()
        await eventually(lambda: installation.broker.process not in (None, broker))
        await installation.ready()
        pids = [child.pid for child in installation.children.values()]
    for pid in pids:
        with pytest.raises(ProcessLookupError):  # no service outlives its supervisor
            os.kill(pid, 0)
    assert any("eligibility-2 ended with -9" in words for words in said)
    assert any("the broker ended with -9" in words for words in said)
    assert "127.0.0.1" in (tmp_path / "home" / "context.toml").read_text()


async def test_a_taken_address_is_said_in_words(tmp_path: Path) -> None:
    async with supervise.running(tmp_path / "one", listen="127.0.0.1:0", services=()) as first:
        port = first.url.rpartition(":")[2]
        with pytest.raises(Refused, match="address already in use"):
            async with supervise.running(tmp_path / "two", listen=f"127.0.0.1:{port}", services=()):
                pass


async def test_the_broker_keeps_its_address_over_restarts(tmp_path: Path) -> None:
    place = EmbeddedPlace(tmp_path / "home")
    try:
        await place.prepare()
        before = place.url
        await place.kill()
        await place.start()
        assert place.url == before
    finally:
        await place.close()
