"""Spans and figures of the host, as OTLP over its own subject: hosts need no way out but the bus."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import loopback
from loopback.contracts import envelope

_LABEL = re.compile(r'(\w+)="([^"]*)"')
_PROPAGATOR = TraceContextTextMapPropagator()

Send = Callable[[str, bytes], None]


class LinkExporter(SpanExporter):
    """Hands encoded spans to the event loop; never blocks and never fails: a trace is not worth a host."""

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Send) -> None:
        self._loop = loop
        self._send = send

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called by the processor's thread."""
        payload = encode_spans(spans).SerializeToString()
        if self._loop.is_closed():
            return SpanExportResult.FAILURE
        self._loop.call_soon_threadsafe(self._send, envelope.OTLP_TRACES, payload)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held."""


def provider(host: str, workspace: str, send: Send) -> TracerProvider:
    """A tracer provider whose spans travel over `send`; call `shutdown` (blocking) in the end."""
    made = TracerProvider(resource=Resource.create(_resource(host, workspace)), shutdown_on_exit=False)
    exporter = LinkExporter(asyncio.get_running_loop(), send)
    made.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    return made


def figures(
    host: str, workspace: str, by_module: Mapping[str, Mapping[str, float]], agent: Mapping[str, float]
) -> bytes:
    """One OTLP metrics request: every module's counters and the agent's own, as they stand now."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    for key, value in _resource(host, workspace).items():
        resource.resource.attributes.add(key=key).value.string_value = value
    scope = resource.scope_metrics.add()
    scope.scope.name = "loopback.host"
    now = time.time_ns()
    known: dict[str, Metric] = {}
    for module, values in (("", agent), *by_module.items()):
        for label, number in values.items():
            name, labels = parts(label)
            metric = known.get(name)
            if metric is None:
                metric = known[name] = scope.metrics.add(name=name)
            if name.endswith("_total"):
                metric.sum.is_monotonic = True
                metric.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
                point = metric.sum.data_points.add()
            else:
                point = metric.gauge.data_points.add()
            point.time_unix_nano = now
            point.as_double = number
            if module:
                labels["loopback.module"] = module
            for key, value in labels.items():
                point.attributes.add(key=key).value.string_value = value
    return request.SerializeToString()


def parts(label: str) -> tuple[str, dict[str, str]]:
    """A metric's name and labels, from `name` or `name{label="value",…}` as modules report them."""
    name, _, rest = label.partition("{")
    return name, dict(_LABEL.findall(rest))


def parent(headers: Mapping[str, str]) -> context.Context:
    """The trace context that a message carries; an empty one where it carries none."""
    return _PROPAGATOR.extract({k.lower(): v for k, v in headers.items()}, context.Context())


def traceparent() -> str:
    """The current span as a header; empty where there is none."""
    carrier: dict[str, str] = {}
    if trace.get_current_span().get_span_context().is_valid:
        _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def _resource(host: str, workspace: str) -> dict[str, str]:
    return {
        "service.name": "loopback-host",
        "service.version": loopback.__version__,
        "host.name": host,
        "loopback.workspace": workspace,
    }
