"""What tests share about OTLP: the receiver that the demo uses, and requests to send to it."""

from __future__ import annotations

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loopback.cli.otlp_receiver import OtlpReceiver, PointView, SpanView, render

__all__ = ["OtlpReceiver", "PointView", "SpanView", "metrics_request", "render", "traces_request"]


def traces_request(name: str = "work", **resource: str) -> bytes:
    """One span of half a second, its resource with these attributes (`__` stands for a dot)."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    for key, value in resource.items():
        attribute = group.resource.attributes.add()
        attribute.key = key.replace("__", ".")
        attribute.value.string_value = value
    span = group.scope_spans.add().spans.add()
    span.name = name
    span.trace_id = bytes(range(16))
    span.span_id = bytes(range(8))
    span.start_time_unix_nano = 1_000_000_000
    span.end_time_unix_nano = 1_500_000_000
    return request.SerializeToString()


def metrics_request(name: str = "level", value: float = 4.0, **resource: str) -> bytes:
    """One gauge with one value, its resource with these attributes (`__` stands for a dot)."""
    request = ExportMetricsServiceRequest()
    group = request.resource_metrics.add()
    for key, text in resource.items():
        attribute = group.resource.attributes.add()
        attribute.key = key.replace("__", ".")
        attribute.value.string_value = text
    metric = group.scope_metrics.add().metrics.add()
    metric.name = name
    metric.gauge.data_points.add().as_double = value
    return request.SerializeToString()
