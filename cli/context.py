"""What every command of the operator shares: the installation's home, the operator's key and a session on the bus."""

from __future__ import annotations

import asyncio
import os
import tomllib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import nats
import nats.aio.client
import nats.errors
import nats.js.api
import nats.js.errors
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from loopback.cli import connecting, keyring, uploading
from loopback.cli.home import default_home as default_home
from loopback.cli.home import home as home
from loopback.cli.home import invocation
from loopback.cli.home import set_home as set_home
from loopback.contracts import envelope, events, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Command, Result
from loopback.services._runtime.settings import authority, read_identity
from loopback.trust import blobs, tls
from loopback.trust.repository import write_durably

RESULT_TIMEOUT_S: Final = (
    30.0  # covers the eight seconds that a NATS leader election may take, and a service's restart
)
CONNECT_S: Final = 30.0  # for all servers and attempts together
COMMAND_VALIDITY: Final = timedelta(hours=1)
FETCH_S: Final = 5.0  # one wait for messages; a rollout that soaks says nothing for much longer


class Context(NamedTuple):
    """An installation as an operator sees it, read from `<home>/context.toml`."""

    home: Path
    url: str
    creds: Path
    operator_key: Path
    ca: Path | None = None

    @property
    def key(self) -> SigningKey:
        """The operator's signing key; an encrypted one asks for its passphrase once per invocation."""
        return keyring.ring().open(self.operator_key)


def load() -> Context:
    """Read `context.toml`. Raises Refused where there is no installation or a line is wrong."""
    base = home()
    path = base / "context.toml"
    try:
        found = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise Refused(
            Code.NAME_INVALID,
            f"there is no installation in {base}",
            "run 'loopback up' first, or name the installation with --home",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refused(
            Code.NAME_INVALID, f"{path}: {error}", "restore it, or run 'loopback up' anew"
        ) from None
    missing = [name for name in ("url", "creds", "operator_key") if not isinstance(found.get(name), str)]
    if missing:
        raise Refused(Code.NAME_INVALID, f"{path}: the entry {missing[0]!r} is missing or no text")
    ca = base / str(found["ca"]) if "ca" in found else authority(base)
    key = invocation().operator_key
    return Context(base, found["url"], base / found["creds"], key or base / found["operator_key"], ca)


def save(base: Path, *, url: str, creds: str, operator_key: str) -> None:
    """Write `context.toml`; paths may be relative to the home."""
    lines = [
        f'{name} = "{value}"'
        for name, value in (("url", url), ("creds", creds), ("operator_key", operator_key))
    ]
    (base / "context.toml").write_text("\n".join(lines) + "\n")


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all, and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode(), 0o600)


def new_command_fields(workspace: str) -> dict[str, Any]:
    """id, workspace, issued_at and expires_at for a new command."""
    now = datetime.now(UTC)
    return {
        "id": str(uuid.uuid4()),
        "workspace": workspace,
        "issued_at": now,
        "expires_at": now + COMMAND_VALIDITY,
    }


class Message(NamedTuple):
    """One stored message."""

    subject: str
    data: bytes
    sequence: int
    time: datetime


class Session:
    """A connection with the operator's credentials and key."""

    def __init__(self, context: Context, nc: nats.aio.client.Client) -> None:
        self.context = context
        self.nc = nc
        self.js = nc.jetstream(timeout=10)

    async def send(self, command: Command, service: str) -> Result:
        """Sign a command, publish it and wait for its stored outcome.

        Raises Refused with the service's own words, or COMMAND_UNKNOWN when no service answered in time.
        """
        kind = str(command.__struct_config__.tag)
        subject = subjects.command(command.workspace, service, kind.replace(".", "-"))
        key = await asyncio.to_thread(lambda: self.context.key)  # a person may be asked for a passphrase
        data = envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(command), key)
        with operator_span(
            f"send {kind}", {"messaging.system": "nats", "cloudevents.event_id": command.id}
        ) as carrier:
            rollout = getattr(command, "rollout", None)
            if rollout:
                trace.get_current_span().set_attribute("loopback.rollout.id", rollout)
            headers = events.headers(
                event_id=command.id,
                source="cli",
                event_type=kind,
                subject=command.workspace,
                at=command.issued_at,
                traceparent=carrier.get("traceparent", ""),
            )
            try:
                await self.js.publish(subject, data, headers=headers)
            except nats.js.errors.NoStreamResponseError:
                raise Refused(
                    Code.COMMAND_UNKNOWN,
                    "the bus keeps no commands: its streams are missing",
                    "start the services with 'loopback up'",
                ) from None
        result = await self.result(command.workspace, command.id)
        if result.refusal is not None:
            raise Refused(result.refusal.code, result.refusal.reason, result.refusal.next_step)
        return result

    async def result(self, workspace: str, command_id: str, timeout: float = RESULT_TIMEOUT_S) -> Result:
        """The stored outcome of a command: read from the stream, since what was refused there must not be seen.

        A core message on the result subject is only the hint to look again.
        """
        # The outcome of a command for a workspace that nobody made is in the global one.
        places = list(dict.fromkeys((workspace, subjects.GLOBAL_WORKSPACE)))
        hint = asyncio.Event()

        async def noticed(_: Any) -> None:
            hint.set()

        subscriptions = [
            await self.nc.subscribe(subjects.result(place, command_id), cb=noticed) for place in places
        ]
        try:
            async with asyncio.timeout(timeout):
                while True:
                    hint.clear()
                    for place in places:
                        found = await self.last(
                            subjects.workspace_stream(place), subjects.result(place, command_id)
                        )
                        if found is not None:
                            return msgspec.json.decode(found, type=Result)
                    try:
                        await asyncio.wait_for(hint.wait(), 0.5)
                    except TimeoutError:
                        continue
        except TimeoutError:
            raise Refused(
                Code.COMMAND_UNKNOWN,
                f"the command was stored, but no service answered within {timeout:.0f} s",
                "check that the services run ('loopback up'); the command is kept and will be worked on then",
            ) from None
        finally:
            for subscription in subscriptions:
                await subscription.unsubscribe()

    async def last(self, stream: str, subject: str) -> bytes | None:
        """The last stored message of a subject, from the stream's leader; None where there is none."""
        try:
            found = await self.js.get_last_msg(stream, subject)
        except nats.js.errors.NotFoundError:
            return None
        return found.data or b""

    async def read(self, stream: str, filters: Sequence[str], *, last: bool = False) -> list[Message]:
        """Everything stored now under these subjects, oldest first; with `last`, the newest of each subject."""
        async with aclosing(self.follow(stream, filters, last=last, forever=False)) as messages:
            return [message async for message in messages]

    async def follow(
        self, stream: str, filters: Sequence[str], *, last: bool = False, forever: bool = True
    ) -> AsyncGenerator[Message]:
        """What is stored, oldest first, and then, with `forever`, what comes."""
        try:
            subscription = await self.js.pull_subscribe(
                subjects_or_first(filters),
                stream=stream,
                config=nats.js.api.ConsumerConfig(
                    filter_subjects=list(filters) if len(filters) > 1 else None,
                    deliver_policy=nats.js.api.DeliverPolicy.LAST_PER_SUBJECT
                    if last
                    else nats.js.api.DeliverPolicy.ALL,
                    ack_policy=nats.js.api.AckPolicy.NONE,
                    inactive_threshold=60.0,
                    mem_storage=True,
                ),
            )
        except nats.js.errors.NotFoundError:
            if forever:
                raise Refused(
                    Code.WORKSPACE_UNKNOWN, f"there is no stream {stream}", "check the workspace's name"
                ) from None
            return
        info = await subscription.consumer_info()
        pending = info.num_pending or 0
        try:
            while forever or pending > 0:
                try:
                    batch = await subscription.fetch(
                        min(500, pending) if pending > 0 else 100, timeout=FETCH_S
                    )
                except TimeoutError:  # nats-py raises its own, which is a subclass, or this one
                    if pending > 0:
                        raise Refused(
                            Code.COMMAND_UNKNOWN,
                            f"the bus holds {pending} more messages of {stream}, but sent none for {FETCH_S:.0f} s",
                            "check that 'loopback up' runs, and repeat the command",
                        ) from None
                    continue
                for message in batch:
                    pending = message.metadata.num_pending if not forever else 0
                    yield Message(
                        message.subject,
                        message.data,
                        message.metadata.sequence.stream,
                        message.metadata.timestamp,
                    )
        finally:
            await subscription.unsubscribe()

    async def blob(
        self, sha256: str, size: int | None = None, *, max_size: int = blobs.MAX_IN_MEMORY
    ) -> bytes:
        """Content by its digest, verified: of exactly `size` bytes where that is known, else of `max_size` at most.

        Raises Refused(BLOB_*, PACKAGE_TOO_LARGE).
        """

        async def get(subject: str) -> tuple[bytes, dict[str, str]] | None:
            try:
                found = await self.js.get_last_msg(subjects.STREAM_BLOBS, subject)
            except nats.js.errors.NotFoundError:
                return None
            return found.data or b"", dict(found.headers or {})

        return await blobs.read(get, sha256, max_size=max_size if size is None else size, size=size)

    async def put_blob(self, data: bytes, progress: Callable[[int], None] = lambda _: None) -> str:
        """Store content under its SHA-256, which is returned; see `uploading.store`. Raises Refused(BLOB_DIGEST)."""
        return await uploading.store(self.js, data, progress)


def subjects_or_first(filters: Sequence[str]) -> str:
    """nats-py wants one subject even where several filters are configured."""
    return filters[0] if len(filters) == 1 else ""


@asynccontextmanager
async def connect(context: Context | None = None) -> AsyncIterator[Session]:
    """A session with the operator's credentials.

    Raises nats.errors.NoServersError where nobody listens, Refused(CONFIG_INVALID) where who does is not to be believed.
    """
    context = context or load()
    if not context.creds.exists():
        raise Refused(
            Code.NAME_INVALID, f"there are no credentials in {context.creds}", "run 'loopback up' first"
        )
    read_identity(context.creds)  # says which file is no credentials file, where the client library would not

    options: dict[str, Any] = {
        "user_credentials": str(context.creds),
        "name": "loopback-cli",
        "inbox_prefix": subjects.inbox("operator").encode(),
        "connect_timeout": 3,
        "max_reconnect_attempts": 3,
        **tls.options(context.url, context.ca),
    }
    nc, said = nats.aio.client.Client(), list[str]()
    try:
        await connecting.connect(nc, context.url, options, seconds=CONNECT_S, said=said)
    except TimeoutError:
        raise Refused(
            Code.CONFIG_INVALID,
            f"no connection to {context.url} came about: {said[-1] if said else 'nobody answers'}",
            "see url and ca in context.toml: the server's certificate must be of that authority, and name the address",
        ) from None
    try:
        yield Session(context, nc)
    finally:
        await nc.close()


_provider: TracerProvider | None = None


@contextmanager
def operator_span(name: str, attributes: dict[str, str]) -> Iterator[dict[str, str]]:
    """The root span of an operator's event; yields the headers that carry its context.

    It is exported where `OTEL_EXPORTER_OTLP_ENDPOINT` is set; its context travels in any case.
    """
    global _provider
    if _provider is None:
        _provider = TracerProvider(resource=Resource.create({"service.name": "loopback-cli"}))
        if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            # a sixth of a command's start, for those who want it
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            _provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(timeout=5)))
    tracer = _provider.get_tracer("loopback.cli")
    carrier: dict[str, str] = {}
    with tracer.start_as_current_span(name, kind=trace.SpanKind.PRODUCER, attributes=attributes):
        propagate.inject(carrier)
        yield carrier
