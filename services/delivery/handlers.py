"""What happens on a command and on a rollout; every method bears being called again with the same message."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec
from opentelemetry import metrics, trace

from loopback.contracts import envelope, events, journal, subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.messages import Blob, Command, MetadataPublish, Release, ReleasePublish, Verdict
from loopback.services._runtime import tracing
from loopback.services._runtime.bus import Bus, Conflict, Outgoing, Stored
from loopback.services._runtime.commands import Accepted, CommandContext
from loopback.services._runtime.trustsource import TrustSource
from loopback.services.delivery import decide
from loopback.services.delivery.store import Store
from loopback.trust import blobs, package
from loopback.trust.manifest import Manifest
from loopback.trust.repository import target_path

log = logging.getLogger(__name__)

NAME: Final = "delivery"
REMEMBERED: Final = 256  # digests of content that was found whole; blobs never change once stored

#: A rollout's verdict waits for these to pass, instead of being no.
_PASSING: Final = frozenset({Code.TUF_UNREACHABLE, Code.TUF_EXPIRED, Code.HOST_DISK})


class Handlers:
    """The service's hands."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        trust: TrustSource,
        scratch: Path,
        tracer: trace.Tracer,
        meter: metrics.Meter,
    ) -> None:
        self._bus = bus
        self._store = store
        self._trust = trust
        self._scratch = scratch
        self._tracer = tracer
        self._whole: OrderedDict[str, None] = OrderedDict()
        self._releases = meter.create_counter("loopback_delivery_releases", description="Releases published")
        self._verdicts = meter.create_counter(
            "loopback_delivery_verdicts", description="Verdicts on rollouts, by outcome"
        )

    async def publish_release(self, context: CommandContext) -> Accepted:
        """A release: package first, then signatures, then one batch of metadata, then the catalog."""
        command = context.command
        assert isinstance(command, ReleasePublish)
        _require_global(command)
        incoming = decide.incoming(command.metadata)
        manifest = await self._inspect(command.digest, command.size, described=True)
        decide.check_package(command, manifest)
        path = target_path(command.module, command.version)
        await self._store.publish(incoming, command)
        release = decide.release(command, manifest, tuple(context.operators), context.now)
        await self._list(release, command)
        return Accepted(detail={"target": path, "digest": command.digest, "channel": command.channel})

    async def publish_metadata(self, context: CommandContext) -> Accepted:
        """New roots, targets or a new trust document."""
        command = context.command
        assert isinstance(command, MetadataPublish)
        _require_global(command)
        incoming = decide.incoming(command.metadata)
        await self._store.publish(incoming)
        await self._trust.refresh()  # so that the next command is judged by it
        return Accepted(detail={"files": " ".join(sorted(incoming))})

    async def on_created(self, stored: Stored) -> None:
        """A rollout was created: say whether its release and policy are completely there. Said once, whoever says it."""
        try:
            link = journal.decode(stored.data)
        except (msgspec.MsgspecError, RecursionError) as error:
            log.error(
                "%s (sequence %d) is dropped: it is no link: %s", stored.subject, stored.sequence, error
            )
            return
        created = link.event
        if not isinstance(created, journal.Created):
            return
        with tracing.consume_span(
            self._tracer,
            stored,
            group=NAME,
            attributes={
                "loopback.rollout.id": link.rollout,
                "loopback.module": created.module,
                "loopback.module.version": created.version,
            },
        ) as span:
            refusal = await self._judge(link.workspace, created)
            span.set_attribute("loopback.outcome", refusal.code if refusal else "given")
            now = await self._bus.now()
            verdict = Verdict(
                rollout=link.rollout, workspace=link.workspace, service=NAME, at=now, refusal=refusal
            )
            subject = subjects.verdict(link.workspace, link.rollout, NAME)
            event_id = f"verdict-{subjects.token(link.workspace)}-{subjects.token(link.rollout)}-{NAME}"
            headers = events.headers(
                event_id=event_id,
                source=NAME,
                event_type="verdict",
                subject=subjects.token(link.rollout),
                at=now,
            )
            try:
                await self._bus.publish(
                    Outgoing(subject, msgspec.json.encode(verdict), headers, expected_subject_seq=0)
                )
            except Conflict:
                return
            self._verdicts.add(1, {"outcome": "refused" if refusal else "given"})

    async def _judge(self, workspace: str, created: journal.Created) -> Refusal | None:
        if created.target is None:
            return None  # taking a module away needs no package
        try:
            await self._trust.refresh()
            path = target_path(created.module, created.version)
            target = await asyncio.to_thread(self._trust.repository.find, path)
            if (refusal := decide.judge_release(created, target)) is not None:
                return refusal
            assert target is not None
            if target.sha256 not in self._whole:
                await self._inspect(target.sha256, target.length)
                self._remember(target.sha256)
            if created.policy is None:
                return None
            data = await blobs.read(self._store.blob_message, created.policy, max_size=envelope.MAX_ENVELOPE)
            policy = decide.check_policy(created, workspace, data, await self._trust.current())
            if policy.blob is not None and policy.blob.sha256 not in self._whole:
                await self._look_through(policy.blob)
                self._remember(policy.blob.sha256)
        except Refused as refused:
            if refused.code in _PASSING:
                raise  # ours, not the rollout's: the message comes again
            return refused.refusal
        return None

    async def _inspect(self, digest: str, size: int, *, described: bool = False) -> Manifest:
        """Fetch a package from the bus and verify it whole, where `described` with its SBOM and provenance.

        Raises Refused(BLOB_* | PACKAGE_* | MANIFEST_*).
        """
        await asyncio.to_thread(self._scratch.mkdir, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            path = Path(folder) / "package.lbm"
            await blobs.download(
                self._store.blob_message, digest, max_size=package.MAX_PACKAGE, into=path, size=size
            )
            info = await asyncio.to_thread(package.inspect, path, sha256=digest)
            if described:
                await asyncio.to_thread(package.check_described, path, info)
        return info.manifest

    async def _look_through(self, blob: Blob) -> None:
        """Whether a policy's content is completely there, and what its digest says. Raises Refused(BLOB_*)."""
        await asyncio.to_thread(self._scratch.mkdir, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            place = Path(folder) / "content"
            await blobs.download(
                self._store.blob_message, blob.sha256, max_size=blob.size, size=blob.size, into=place
            )

    async def _list(self, release: Release, command: Command) -> None:
        """Write the catalog's entry, unless it says so already."""
        subject = subjects.catalog(release.module, release.digest)
        known = await self._bus.last(subjects.STREAM_CATALOG, subject)
        if known is not None and decide.same_release(msgspec.json.decode(known.data, type=Release), release):
            return
        headers = events.headers(
            event_id=f"release-{command.id}",
            source=NAME,
            event_type="release",
            subject=f"{release.module}/{release.version}",
            at=release.published_at,
        )
        await self._bus.publish(
            Outgoing(
                subject,
                msgspec.json.encode(release),
                headers,
                expected_subject_seq=known.sequence if known else 0,
            )
        )
        self._releases.add(1)

    def _remember(self, digest: str) -> None:
        self._whole[digest] = None
        while len(self._whole) > REMEMBERED:
            self._whole.popitem(last=False)


def _require_global(command: Command) -> None:
    if command.workspace != subjects.GLOBAL_WORKSPACE:
        raise Refused(
            Code.COMMAND_WRONG_SUBJECT,
            f"releases and trust belong to the workspace {subjects.GLOBAL_WORKSPACE!r}, not {command.workspace!r}",
            "sign the command for that workspace",
        )
