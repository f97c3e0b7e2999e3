"""Spans over messages, and their export. One instrumentation: OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.util.types import AttributeValue

import loopback
from loopback.services._runtime.wire import Stored

EXPORT_DELAY_MS = 500  # a rollout is watched live; the SDK's own five seconds are too long for that
EXPORT_TIMEOUT_S = 5


def resource(name: str, instance: str) -> Resource:
    """Who reports."""
    return Resource.create(
        {
            "service.name": f"loopback-{name}",
            "service.version": loopback.__version__,
            "service.instance.id": f"{name}-{instance}",
        }
    )


def setup(name: str, instance: str, endpoint: str) -> TracerProvider:
    """A provider of tracers; without an endpoint spans have context but go nowhere. Shut it down to flush."""
    provider = TracerProvider(resource=resource(name, instance), shutdown_on_exit=False)
    if endpoint:
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_DELAY_MS))
    return provider


def template_of(subject: str) -> str:
    """A subject with its workspace, host and ids taken out: few values, so it may be a label or a span's name."""
    parts = subject.split(".")
    if parts[:2] == ["lb", "ws"] and len(parts) > 4:
        area, rest = parts[3], parts[4:]
        kept = {
            "cmd": rest,
            "journal": rest,
            "rollout": ["{rollout}", *rest[1:]],
            "verdict": ["{rollout}", *rest[1:]],
            "from": ["{host}", *rest[1:]],
            "to": ["{host}", *rest[1:]],
            "record": [rest[0], "{name}"],
        }.get(area, ["{id}"])
        return ".".join(["lb.ws.{workspace}", area, *kept])
    if len(parts) > 2 and parts[0] == "lb":
        return ".".join([*parts[:2], *("{id}" for _ in parts[2:])])
    return subject


@contextmanager
def consume_span(
    tracer: trace.Tracer,
    stored: Stored,
    *,
    group: str = "",
    operation: str = "process",
    attributes: Mapping[str, AttributeValue] | None = None,
    links: Sequence[trace.Link] | None = None,
    parent: str | None = None,
) -> Iterator[trace.Span]:
    """The span of handling one message, a child of the message's own `traceparent` (or of `parent`, another one).

    Exceptions are recorded on it, with `error.type`. Publishes inside it carry its context.
    """
    found: dict[str, AttributeValue] = {
        "messaging.system": "nats",
        "messaging.operation.name": operation,
        "messaging.operation.type": "process",
        "messaging.destination.name": stored.subject,
        "messaging.destination.template": template_of(stored.subject),
        "messaging.message.body.size": len(stored.data),
    }
    if group:
        found["messaging.consumer.group.name"] = group
    if event := stored.headers.get("ce-id"):
        found["messaging.message.id"] = event
        found["cloudevents.event_id"] = event
    for name in ("source", "type"):
        if value := stored.headers.get(f"ce-{name}"):
            found[f"cloudevents.event_{name}"] = value
    found |= attributes or {}
    context = propagate.extract({"traceparent": parent or stored.headers.get("traceparent", "")})
    with tracer.start_as_current_span(
        f"{operation} {template_of(stored.subject)}",
        context=context,
        kind=trace.SpanKind.CONSUMER,
        attributes=found,
        links=links,
    ) as span:
        try:
            yield span
        except Exception as error:
            span.set_attribute("error.type", type(error).__name__)
            raise


def traceparent() -> str:
    """The current span's context as a header's value; empty outside any span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")
