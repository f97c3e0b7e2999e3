"""A small OTLP/HTTP receiver: it keeps spans and metrics in memory and draws a trace as a tree.

For the demo and the tests, which look at what really crossed the wire: it decodes real protobuf. It keeps the newest
MAX_SPANS spans, so it may run for long, but it is no store.
"""

from __future__ import annotations

import gzip
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Self

from aiohttp import web
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

MAX_SPANS: Final = 100_000
MAX_POINTS: Final = 100_000
MAX_REQUEST: Final = 8 * 1024 * 1024  # bytes, as they come over the wire
GAP_MS: Final = 50.0  # silence between two spans of one parent that is worth a word
_KINDS: Final = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}

Value = str | int | float | bool


class SpanView(NamedTuple):
    """One span as it arrived; ids in hex, times in seconds since 1970. `parent` is empty for a root."""

    trace_id: str
    span_id: str
    parent: str
    name: str
    kind: str
    start: float
    end: float
    error: str
    attributes: dict[str, Value]
    resource: dict[str, Value]

    @property
    def service(self) -> str:
        """Who made it: the service, and the host where it says one."""
        service = str(self.resource.get("service.name", "?"))
        host = self.resource.get("host.name")
        return f"{service}@{host}" if host else service

    @property
    def duration_ms(self) -> float:
        """How long it took."""
        return (self.end - self.start) * 1000


class PointView(NamedTuple):
    """One number of a metric. Of a histogram it is the sum."""

    name: str
    value: float
    attributes: dict[str, Value]
    resource: dict[str, Value]


class OtlpReceiver:
    """Receives at `endpoint` while its context is open; `spans` and `metrics` are what came, oldest first."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None
        self._spans: deque[SpanView] = deque(maxlen=MAX_SPANS)
        self._points: deque[PointView] = deque(maxlen=MAX_POINTS)
        self.requests = 0
        self.answer_with = 200  # tests make it fail with this

    @property
    def endpoint(self) -> str:
        """The base address to configure as OTLP endpoint."""
        return f"http://{self._host}:{self._port}"

    @property
    def spans(self) -> list[SpanView]:
        """Every span kept."""
        return list(self._spans)

    @property
    def metrics(self) -> list[PointView]:
        """Every point kept."""
        return list(self._points)

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=MAX_REQUEST)
        app.router.add_post("/v1/traces", self._traces)
        app.router.add_post("/v1/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def trace(self, trace_id: str) -> list[SpanView]:
        """The spans of one trace, by start."""
        return sorted((s for s in self._spans if s.trace_id == trace_id), key=lambda s: (s.start, s.end))

    def rollout_traces(self, rollout: str) -> list[str]:
        """The traces in which this rollout is named, in order of arrival."""
        found = (s.trace_id for s in self._spans if s.attributes.get("loopback.rollout.id") == rollout)
        return list(dict.fromkeys(found))

    def render_tree(self, trace_id: str) -> str:
        """A trace as an indented tree: see `render`."""
        return render(self.trace(trace_id))

    async def _traces(self, request: web.Request) -> web.Response:
        self.requests += 1
        if self.answer_with != 200:
            return web.Response(status=self.answer_with)
        try:
            found = ExportTraceServiceRequest.FromString(await _body(request))
        except (DecodeError, OSError, EOFError, zlib.error):
            return web.Response(status=400)
        for group in found.resource_spans:
            resource = _values(group.resource.attributes)
            for scope in group.scope_spans:
                self._spans.extend(_view(span, resource) for span in scope.spans)
        return web.Response(content_type="application/x-protobuf")

    async def _metrics(self, request: web.Request) -> web.Response:
        self.requests += 1
        if self.answer_with != 200:
            return web.Response(status=self.answer_with)
        try:
            found = ExportMetricsServiceRequest.FromString(await _body(request))
        except (DecodeError, OSError, EOFError, zlib.error):
            return web.Response(status=400)
        for group in found.resource_metrics:
            resource = _values(group.resource.attributes)
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    for number in (*metric.gauge.data_points, *metric.sum.data_points):
                        value = number.as_double if number.HasField("as_double") else float(number.as_int)
                        self._points.append(
                            PointView(metric.name, value, _values(number.attributes), resource)
                        )
                    for spread in metric.histogram.data_points:
                        self._points.append(
                            PointView(metric.name, spread.sum, _values(spread.attributes), resource)
                        )
        return web.Response(content_type="application/x-protobuf")


async def _body(request: web.Request) -> bytes:
    data = await request.read()
    return gzip.decompress(data) if request.headers.get("Content-Encoding") == "gzip" else data


def _value(value: AnyValue) -> Value:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "array_value":
            return ", ".join(str(_value(v)) for v in value.array_value.values)
        case _:
            return ""


def _values(attributes: Iterable[KeyValue]) -> dict[str, Value]:
    return {a.key: _value(a.value) for a in attributes}


def _view(span: Span, resource: dict[str, Value]) -> SpanView:
    failed = span.status.code == Status.STATUS_CODE_ERROR
    return SpanView(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        kind=_KINDS.get(span.kind, "internal"),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        error=(span.status.message or "error") if failed else "",
        attributes=_values(span.attributes),
        resource=resource,
    )


def render(spans: Sequence[SpanView]) -> str:
    """One trace as an indented tree, a line per span: name, who made it, how long, and when since the trace began.

    A line of its own says where nothing happened for GAP_MS or longer between the children of one span. Spans whose
    parent never came stand at the left, marked with `?`.
    """
    if not spans:
        return "(no spans)"
    known = {s.span_id: s for s in spans}
    began = min(s.start for s in spans)
    children: dict[str, list[SpanView]] = {}
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        children.setdefault(span.parent if span.parent in known else "", []).append(span)
    lines = [f"trace {spans[0].trace_id} · {len(spans)} spans · {_ms(max(s.end for s in spans) - began)}"]
    drawn: set[str] = set()

    def draw(span: SpanView, prefix: str, branch: str, below: str) -> None:
        if span.span_id in drawn:
            return
        drawn.add(span.span_id)
        lost = "? " if span.parent and span.parent not in known else ""
        error = f"  ✗ {span.error.splitlines()[0]}" if span.error else ""
        lines.append(
            f"{prefix}{branch}{lost}{span.name}  [{span.service}]  {_ms(span.end - span.start)}"
            f"  +{_ms(span.start - began)}{error}"
        )
        level(children.get(span.span_id, []), prefix + below)

    def level(siblings: list[SpanView], prefix: str) -> None:
        quiet_since = None
        for index, span in enumerate(siblings):
            if quiet_since is not None and (span.start - quiet_since) * 1000 >= GAP_MS:
                lines.append(f"{prefix}┆  {_ms(span.start - quiet_since)} of silence")
            last = index == len(siblings) - 1
            draw(span, prefix, "└─ " if last else "├─ ", "   " if last else "│  ")
            end = _end_of(span, children)
            quiet_since = end if quiet_since is None else max(quiet_since, end)

    level(children.get("", []), "")
    return "\n".join(lines)


def _end_of(span: SpanView, children: dict[str, list[SpanView]]) -> float:
    """When a span and everything below it was over."""
    latest, waiting, seen = span.end, [span], {span.span_id}
    while waiting:
        for child in children.get(waiting.pop().span_id, []):
            if child.span_id not in seen:
                seen.add(child.span_id)
                latest = max(latest, child.end)
                waiting.append(child)
    return latest


def _ms(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
