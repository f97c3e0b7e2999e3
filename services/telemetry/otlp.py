"""What hosts send as OTLP: stamped with who they are, and forwarded to any OTLP/HTTP endpoint."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

import aiohttp
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused

HOST_ATTRIBUTE: Final = "host.name"
WORKSPACE_ATTRIBUTE: Final = "loopback.workspace"

ATTEMPTS: Final = 5  # at one message, about six seconds in all; then it is dropped and counted
FIRST_WAIT_S: Final = 0.2
LONGEST_WAIT_S: Final = 3.0
REQUEST_TIMEOUT_S: Final = 10.0
_TRY_AGAIN: Final = frozenset({408, 429, 502, 503, 504})  # OTLP 1.x, "retryable response codes", and 408

Outcome = Literal["forwarded", "no-endpoint", "refused", "unreachable"]
PATHS: Final = {envelope.OTLP_TRACES: "/v1/traces", envelope.OTLP_METRICS: "/v1/metrics"}


def stamp(payload: bytes, payload_type: str, host: str, workspace: str) -> bytes:
    """The same OTLP request with every resource saying, truly, which host it came from.

    Whatever the host itself said under these two names is gone. Raises Refused(REPORT_MALFORMED) for what is no OTLP.
    """
    try:
        if payload_type == envelope.OTLP_TRACES:
            traces = ExportTraceServiceRequest.FromString(payload)
            for spans in traces.resource_spans:
                _stamp(spans.resource, host, workspace)
            return traces.SerializeToString()
        metrics = ExportMetricsServiceRequest.FromString(payload)
        for measured in metrics.resource_metrics:
            _stamp(measured.resource, host, workspace)
        return metrics.SerializeToString()
    except DecodeError as error:
        raise Refused(Code.REPORT_MALFORMED, f"{host!r} sent no OTLP: {error}") from None


def _stamp(resource: Resource, host: str, workspace: str) -> None:
    truth = {HOST_ATTRIBUTE: host, WORKSPACE_ATTRIBUTE: workspace}
    kept = [attribute for attribute in resource.attributes if attribute.key not in truth]
    del resource.attributes[:]
    resource.attributes.extend(kept)
    for key, value in truth.items():
        added = resource.attributes.add()
        added.key = key
        added.value.string_value = value


def waits(attempts: int, jitter: Callable[[], float]) -> Sequence[float]:
    """How long to wait between attempts: doubling, at most LONGEST_WAIT_S, scaled by a jitter of 0.5–1."""
    return [
        min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) * (0.5 + jitter() / 2) for number in range(attempts - 1)
    ]


class Forwarder:
    """Posts OTLP to one endpoint, a base address such as `http://collector:4318`; empty means nowhere."""

    def __init__(
        self,
        endpoint: str,
        session: aiohttp.ClientSession,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._session = session
        self._sleep = sleep
        self._jitter = jitter

    async def forward(self, payload: bytes, payload_type: str) -> Outcome:
        """Deliver one request, trying again for a while; says how it ended, and raises nothing."""
        if not self._endpoint:
            return "no-endpoint"
        for wait in (*waits(ATTEMPTS, self._jitter), None):
            status = await self._post(payload, PATHS[payload_type])
            if status is not None and status < 300:
                return "forwarded"
            if status is not None and status not in _TRY_AGAIN:
                return "refused"
            if wait is not None:
                await self._sleep(wait)
        return "unreachable"

    async def _post(self, payload: bytes, path: str) -> int | None:
        try:
            async with self._session.post(
                self._endpoint + path,
                data=payload,
                headers={"Content-Type": "application/x-protobuf"},
                timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
                allow_redirects=False,
            ) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
