"""What each identity can do on the bus, tried on the real server: what it needs, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import nats
import nats.errors
import pytest
from support import Place, eventually, settled

from loopback.cli import creds
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.services._runtime import streams
from loopback.services._runtime.bus import Bus, Outgoing
from loopback.services._runtime.settings import read_identity

pytestmark = pytest.mark.broker
W = "prod"
STREAM = "LB_WS_prod"


class Client:
    """A bare connection that notes what the server refuses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.refused: list[str] = []
        self.nc = nats.aio.client.Client()

    async def connect(self, place: Place, identity: str) -> Client:
        async def error(problem: Exception) -> None:
            self.refused.append(str(problem))

        await self.nc.connect(
            place.url,
            user_credentials=str(place.home / "creds" / f"{identity}.creds"),
            inbox_prefix=f"_INBOX.{read_identity(place.home / 'creds' / f'{identity}.creds').name}",
            error_cb=error,
        )
        return self

    async def may_publish(self, all_of: Sequence[str]) -> dict[str, bool]:
        """Which of these subjects the server lets it publish to."""
        self.refused.clear()
        for subject in all_of:
            await self.nc.publish(subject, b"{}", reply=self.nc.new_inbox())
        await settled(self.nc)
        return {
            s: not any(f'publish to "{s.lower()}"' in refusal for refusal in self.refused) for s in all_of
        }

    async def may_subscribe(self, all_of: Sequence[str]) -> dict[str, bool]:
        """Which of these subjects the server lets it subscribe to."""
        self.refused.clear()
        subscriptions = [await self.nc.subscribe(subject) for subject in all_of]
        await settled(self.nc)
        answer = {
            s: not any(f'subscription to "{s.lower()}"' in refusal for refusal in self.refused)
            for s in all_of
        }
        for subscription in subscriptions:
            await subscription.unsubscribe()
        return answer


@pytest.fixture
async def place(broker: Place) -> Place:
    await broker.workspace(W)
    return broker


@pytest.fixture
async def client(place: Place):
    made: list[Client] = []

    async def connect(identity: str) -> Client:
        made.append(await Client(identity).connect(place, identity))
        return made[-1]

    yield connect
    for one in made:
        await one.nc.close()


OWN_HOST = [
    "lb.ws.prod.from.web-1.status",
    "lb.ws.prod.from.web-1.inventory",
    "lb.ws.prod.from.web-1.heartbeat",
    "lb.ws.prod.from.web-1.otlp",
    "$JS.API.DIRECT.GET.LB_WS_prod.lb.ws.prod.desired.web-1",
    "$JS.API.DIRECT.GET.LB_BLOB.lb.blob.00ff.0",
    "$JS.API.DIRECT.GET.LB_TUF.lb.tuf.timestamp_2ejson",
]
NOT_A_HOSTS = [
    "lb.ws.prod.from.web-2.status",
    "lb.ws.other.from.web-1.status",
    "lb.ws.prod.to.web-1.desired",
    "lb.ws.prod.to.web-2.desired",
    "lb.ws.prod.desired.web-1",
    "lb.ws.prod.cmd.activation.rollout-start",
    "lb.ws.prod.result.x",
    "lb.ws.prod.rollout.r.created",
    "lb.ws.prod.record.host.web-1",
    "lb.ws.prod.verdict.r.eligibility",
    "lb.blob.00ff.0",
    "lb.tuf.timestamp_2ejson",
    "lb.catalog.firewall.00ff",
    "$KV.LB_VIEW.prod.web-1",
    "_INBOX.web-2.x",
    "$SRV.PING",
    "$JS.API.INFO",
    "$JS.API.DIRECT.GET.LB_WS_prod.lb.ws.prod.desired.web-2",
    "$JS.API.DIRECT.GET.LB_WS_prod.lb.ws.other.desired.web-1",
    "$JS.API.DIRECT.GET.LB_WS_prod.lb.ws.prod.rollout.r.created",
    "$JS.API.DIRECT.GET.LB_WS_prod",
    "$JS.API.DIRECT.GET.LB_FROM.lb.ws.prod.from.web-1.status",
    "$JS.API.STREAM.INFO.LB_WS_prod",
    "$JS.API.STREAM.MSG.GET.LB_WS_prod",
    "$JS.API.STREAM.CREATE.X",
    "$JS.API.STREAM.DELETE.LB_WS_prod",
    "$JS.API.STREAM.PURGE.LB_WS_prod",
    "$JS.API.STREAM.UPDATE.LB_WS_prod",
    "$JS.API.CONSUMER.CREATE.LB_WS_prod",
    "$JS.API.CONSUMER.CREATE.LB_WS_prod.x",
    "$JS.API.CONSUMER.CREATE.LB_WS_prod.x.lb.ws.prod.desired.web-1",
    "$JS.API.CONSUMER.DURABLE.CREATE.LB_WS_prod.x",
    "$JS.API.CONSUMER.MSG.NEXT.LB_FROM.activation-status",
    "$JS.ACK.LB_FROM.activation-status.1.1.1.1.1",
    "$SYS.REQ.SERVER.PING",
]


async def test_a_host_writes_and_asks_for_its_own_and_nothing_else(place: Place, client) -> None:
    host = await client(place.host(W, "web-1"))
    assert await host.may_publish(OWN_HOST) == dict.fromkeys(OWN_HOST, True)
    assert await host.may_publish(NOT_A_HOSTS) == dict.fromkeys(NOT_A_HOSTS, False)


async def test_a_host_hears_its_own_and_nothing_else(place: Place, client) -> None:
    host = await client(place.host(W, "web-1"))
    own = ["lb.ws.prod.to.web-1.desired", "lb.ws.prod.to.web-1.>", "_INBOX.web-1.x", "_INBOX.web-1.>"]
    other = [
        ">",
        "lb.>",
        "lb.ws.prod.to.*.desired",
        "lb.ws.prod.to.web-2.desired",
        "lb.ws.*.to.web-1.desired",
        "lb.ws.other.to.web-1.desired",
        "lb.ws.prod.desired.web-1",
        "lb.ws.prod.from.web-1.status",
        "lb.ws.prod.cmd.>",
        "_INBOX.>",
        "_INBOX.web-2.>",
        "$SRV.>",
        "$JS.>",
        "$KV.>",
    ]
    assert await host.may_subscribe(own) == dict.fromkeys(own, True)
    assert await host.may_subscribe(other) == dict.fromkeys(other, False)


async def test_a_host_with_dots_in_its_name_is_one_token(place: Place, client) -> None:
    host = await client(place.host(W, "db.example.org"))
    own = subjects.from_host(W, "db.example.org", "status")
    other = "lb.ws.prod.from.db.example.org.status"
    assert await host.may_publish([own, other]) == {own: True, other: False}


async def test_a_host_reads_its_desired_state_content_and_metadata(place: Place) -> None:
    admin, host = await place.bus("admin"), await place.bus(place.host(W, "web-1"))
    wanted = {
        subjects.direct_get(STREAM, "lb.ws.prod.desired.web-1"): "lb.ws.prod.desired.web-1",
        subjects.direct_get(subjects.STREAM_BLOBS, subjects.blob("00ff", 0)): subjects.blob("00ff", 0),
        subjects.direct_get(subjects.STREAM_TUF, subjects.tuf("1.root.json")): subjects.tuf("1.root.json"),
    }
    for question, subject in wanted.items():
        await admin.publish(Outgoing(subject, subject.encode()))
        answer = await host.nc.request(question, b"", timeout=60)
        assert answer.data == subject.encode()
        assert answer.headers["Nats-Subject"] == subject


async def test_a_hosts_report_is_stored(place: Place) -> None:
    host = await place.bus(place.host(W, "web-1"))
    await host.publish(Outgoing("lb.ws.prod.from.web-1.status", b"report"))
    found = await (await place.bus("telemetry")).last("LB_FROM", "lb.ws.prod.from.web-1.status")
    assert found is not None
    assert found.data == b"report"


WRITES = {
    "lb.ws.prod.cmd.activation.rollout-start": {"operator"},
    "lb.ws.prod.result.c1": {"eligibility", "delivery", "activation"},
    "lb.ws.prod.journal.eligibility.accepted": {"eligibility"},
    "lb.ws.prod.journal.delivery.accepted": {"delivery"},
    "lb.ws.prod.journal.activation.accepted": {"activation"},
    "lb.ws.prod.journal.telemetry.refused": {"telemetry"},
    "lb.ws.prod.rollout.r1.created": {"activation"},
    "lb.ws.prod.desired.web-1": {"activation"},
    "lb.ws.prod.to.web-1.desired": set(),
    "lb.ws.prod.from.web-1.status": set(),
    "lb.ws.prod.record.host.web-1": {"eligibility"},
    "lb.ws.prod.offer.web-1": {"eligibility"},
    "lb.ws.prod.verdict.r1.eligibility": {"eligibility"},
    "lb.ws.prod.verdict.r1.delivery": {"delivery"},
    "lb.ws.prod.presence.web-1": {"telemetry"},
    "lb.catalog.firewall.00ff": {"delivery"},
    "lb.tuf.timestamp_2ejson": {"delivery"},
    "lb.blob.00ff.0": {"operator", "delivery"},
    "$KV.LB_VIEW.prod.web-1": {"telemetry"},
    "$JS.API.STREAM.CREATE.LB_WS_x": {"eligibility"},
    "$JS.API.STREAM.UPDATE.LB_WS_prod": set(),
    "$JS.API.STREAM.DELETE.LB_WS_prod": set(),
    "$JS.API.STREAM.PURGE.LB_WS_prod": set(),
    "$JS.API.STREAM.MSG.DELETE.LB_WS_prod": set(),
    "$JS.API.STREAM.RESTORE.LB_WS_prod": set(),
    "$JS.API.CONSUMER.DELETE.LB_CMD.activation-commands": set(),
    "$JS.API.CONSUMER.CREATE.LB_CMD.eligibility-commands": {"eligibility"},
    "$JS.API.CONSUMER.CREATE.LB_CMD.delivery-commands": {"delivery"},
    "$JS.API.CONSUMER.CREATE.LB_CMD.activation-commands": {"activation"},
    "$JS.API.CONSUMER.CREATE.LB_CMD.activation-commands.lb.ws.*.cmd.activation.*": {"activation"},
    "$JS.API.CONSUMER.MSG.NEXT.LB_CMD.activation-commands": {"activation"},
    "$JS.ACK.LB_CMD.activation-commands.1.1.1.1.1": {"activation"},
    "$JS.API.CONSUMER.CREATE.LB_OTLP.telemetry-otlp": {"telemetry"},
    "$JS.API.CONSUMER.CREATE.LB_FROM.telemetry-reports": {"telemetry"},
    "$JS.API.CONSUMER.CREATE.LB_FROM.a-reader": {"telemetry", "activation", "eligibility", "operator"},
    "$JS.API.CONSUMER.MSG.NEXT.LB_FROM.activation-status": {"activation"},
    "$JS.ACK.LB_FROM.activation-status.1.1.1.1.1": {"activation"},
    "$SYS.REQ.SERVER.PING": set(),
    "_INBOX.web-1.x": set(),
}


@pytest.mark.parametrize("identity", ["operator", *subjects.SERVICES])
async def test_an_identity_writes_what_the_flow_needs_and_nothing_else(
    place: Place, client, identity: str
) -> None:
    one = await client(identity)
    assert await one.may_publish(list(WRITES)) == {s: identity in who for s, who in WRITES.items()}


@pytest.mark.parametrize("identity", subjects.SERVICES)
async def test_a_service_hears_only_what_it_asked_for(place: Place, client, identity: str) -> None:
    one = await client(identity)
    own = [f"_INBOX.{identity}.x", "$SRV.PING", f"$SRV.INFO.{identity}", f"$SRV.STATS.{identity}.id"]
    other = [">", "lb.>", "lb.ws.prod.to.web-1.desired", "_INBOX.>", "_INBOX.operator.>", "$JS.>", "$KV.>"]
    assert await one.may_subscribe(own) == dict.fromkeys(own, True)
    assert await one.may_subscribe(other) == dict.fromkeys(other, False)


@pytest.mark.parametrize(
    ("identity", "stream", "filters", "written"),
    [
        ("eligibility", "LB_FLEET", ["lb.ws.*.record.>"], "lb.ws.prod.record.host.h"),
        ("eligibility", "LB_FROM", ["lb.ws.*.from.*.inventory"], "lb.ws.prod.from.h.inventory"),
        ("eligibility", "LB_CATALOG", ["lb.catalog.>"], "lb.catalog.m.00"),
        ("eligibility", STREAM, ["lb.ws.prod.rollout.*.created"], "lb.ws.prod.rollout.r.created"),
        ("delivery", STREAM, ["lb.ws.prod.rollout.*.created"], "lb.ws.prod.rollout.r.created"),
        ("delivery", "LB_CATALOG", ["lb.catalog.>"], "lb.catalog.m.00"),
        ("delivery", "LB_TUF", ["lb.tuf.>"], "lb.tuf.x"),
        ("activation", STREAM, ["lb.ws.prod.>"], "lb.ws.prod.desired.h"),
        ("activation", "LB_FLEET", ["lb.ws.*.verdict.>", "lb.ws.*.presence.*"], "lb.ws.prod.presence.h"),
        ("activation", "LB_FROM", ["lb.ws.*.from.*.status"], "lb.ws.prod.from.h.status"),
        ("telemetry", "LB_FROM", ["lb.ws.*.from.*.*"], "lb.ws.prod.from.h.heartbeat"),
        ("telemetry", "LB_OTLP", ["lb.ws.*.from.*.otlp"], "lb.ws.prod.from.h.otlp"),
        ("telemetry", "LB_FLEET", ["lb.ws.*.record.>"], "lb.ws.prod.record.host.h"),
        ("telemetry", "KV_LB_VIEW", ["$KV.LB_VIEW.>"], "$KV.LB_VIEW.prod.h"),
        ("operator", STREAM, ["lb.ws.prod.>"], "lb.ws.prod.result.c"),
        ("operator", "LB_FLEET", ["lb.ws.*.offer.*"], "lb.ws.prod.offer.h"),
        ("operator", "KV_LB_VIEW", ["$KV.LB_VIEW.>"], "$KV.LB_VIEW.prod.h"),
    ],
)
async def test_an_identity_reads_and_follows_what_the_flow_needs(
    place: Place, identity: str, stream: str, filters: list[str], written: str
) -> None:
    admin, bus = await place.bus("admin"), await place.bus(identity)
    await admin.publish(Outgoing(written, b"1"))
    assert [s.data for s in await bus.read(stream, filters)] == [b"1"]
    found = await bus.last(stream, written)
    assert found is not None
    await bus.revision(stream)
    if identity != "operator":
        assert await bus.now()
        await _work(bus, stream, filters)


async def _work(bus: Bus, stream: str, filters: list[str]) -> None:
    """Consume the one message there is, and see that the acknowledgement arrived."""
    if stream in ("KV_LB_VIEW", "LB_TUF") or (bus.name, stream) == ("telemetry", "LB_FLEET"):
        return  # these are folded, never shared
    durable = next(d for d in subjects.DURABLES[bus.name] if not d.endswith("-commands"))
    handled = asyncio.Event()

    async def handle(_: object) -> None:
        handled.set()

    task = asyncio.ensure_future(bus.consume(stream, durable, filters, handle))
    try:
        await asyncio.wait_for(handled.wait(), 60)

        async def acknowledged() -> bool:
            info = await bus.api(f"CONSUMER.INFO.{stream}.{durable}")
            return bool(info["ack_floor"]["stream_seq"])

        await eventually(acknowledged)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("service", ["eligibility", "delivery", "activation"])
async def test_a_service_works_on_its_own_commands(place: Place, service: str) -> None:
    operator, bus = await place.bus("operator"), await place.bus(service)
    await operator.publish(Outgoing(subjects.command(W, service, "do"), b"signed"))
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def handle(stored: object) -> None:
        await got.put(stored.data)  # type: ignore[attr-defined]

    task = asyncio.ensure_future(
        bus.consume("LB_CMD", f"{service}-commands", [subjects.commands_for(service)], handle)
    )
    try:
        assert await asyncio.wait_for(got.get(), 60) == b"signed"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_eligibility_makes_a_workspace(place: Place) -> None:
    bus = await place.bus("eligibility")
    await streams.ensure_workspace(bus, "new.one")
    await streams.ensure_workspace(bus, "new.one")
    assert await bus.revision("LB_WS_new_2eone") == 0
    activation = await place.bus("activation")
    await activation.batch(
        [Outgoing("lb.ws.new_2eone.desired.a", b"1"), Outgoing("lb.ws.new_2eone.desired.b", b"1")]
    )


async def test_a_decision_stream_lets_nobody_delete_a_single_message(place: Place) -> None:
    admin = await place.bus("admin")
    await admin.publish(Outgoing("lb.ws.prod.rollout.r.created", b"link"))
    answer = json.loads(
        (await admin.nc.request("$JS.API.STREAM.MSG.DELETE.LB_WS_prod", b'{"seq": 1}', timeout=60)).data
    )
    assert answer["error"]["code"] == 500
    assert await admin.last(STREAM, "lb.ws.prod.rollout.r.created")


async def test_content_keeps_what_was_written_first(place: Place) -> None:
    operator = await place.bus("operator")
    await operator.publish(Outgoing(subjects.blob("00ff", 0), b"first"))
    with pytest.raises(Exception, match="maximum messages per subject"):
        await operator.publish(Outgoing(subjects.blob("00ff", 0), b"second"))
    found = await operator.last(subjects.STREAM_BLOBS, subjects.blob("00ff", 0))
    assert found is not None
    assert found.data == b"first"


async def test_nobody_connects_without_credentials(place: Place, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    creds.init_home(stranger)  # other keys, the same names
    for options in ({}, {"user_credentials": str(stranger / "creds" / "admin.creds")}):
        nc = nats.aio.client.Client()
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
            await nc.connect(place.url, allow_reconnect=False, error_cb=_quiet, **options)
        nc._transport.close()  # the client library leaves it open after a refused attempt
        with contextlib.suppress(ConnectionResetError):  # the server may be faster
            await nc._transport.wait_closed()


async def _quiet(_: Exception) -> None:
    """The exception that is raised is what counts."""


async def test_a_key_that_signs_for_hosts_cannot_make_a_service(place: Place, client) -> None:
    """Whoever adds hosts holds the hosts' signing key: what it signs is a host, whatever name it writes."""
    host = await client(place.host(W, "activation"))
    answer = await host.may_publish(["lb.ws.prod.desired.web-1", "lb.ws.prod.from.activation.status"])
    assert answer == {"lb.ws.prod.desired.web-1": False, "lb.ws.prod.from.activation.status": True}


async def test_making_the_home_again_keeps_every_identity(place: Place) -> None:
    before = {p.name: read_identity(p).seed for p in (place.home / "creds").glob("*.creds")}
    creds.init_home(place.home)
    assert {p.name: read_identity(p).seed for p in (place.home / "creds").glob("*.creds")} == before
    for path in [*place.home.rglob("*.nk"), *place.home.rglob("*.creds")]:
        if "host-" not in path.name:
            assert path.stat().st_mode & 0o777 == 0o600, path
    assert SigningKey.from_nkey(before["activation.creds"]).public.text


def test_credentials_that_do_not_read_are_refused_with_words(tmp_path: Path) -> None:
    for content in ("", "nonsense", "-----BEGIN NATS USER JWT-----\nx.y.z\n------END NATS USER JWT------\n"):
        (tmp_path / "x.creds").write_text(content)
        with pytest.raises(Refused) as refused:
            read_identity(tmp_path / "x.creds")
        assert refused.value.code is Code.SIGNATURE_INVALID
        assert "x.creds" in refused.value.reason
    with pytest.raises(Refused, match="there is no credentials file"):
        read_identity(tmp_path / "none.creds")
    with pytest.raises(Refused, match="there is no key"):
        creds.host_creds(tmp_path, W, "web-1")
