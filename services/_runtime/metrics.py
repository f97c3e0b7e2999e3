"""Metrics: recorded once through OpenTelemetry, read by Prometheus on /metrics and pushed as OTLP where that is configured."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from prometheus_client import CollectorRegistry, generate_latest

from loopback.services._runtime import tracing

PUSH_MS = 10_000


class Metrics:
    """One process's meters; each has a registry of its own, so that several can live in one test."""

    def __init__(self, name: str, instance: str, endpoint: str) -> None:
        self._registry = CollectorRegistry()
        readers: list[MetricReader] = [
            PrometheusMetricReader(registry=self._registry, scope_info_enabled=False)
        ]
        if endpoint:
            exporter = OTLPMetricExporter(
                f"{endpoint.rstrip('/')}/v1/metrics", timeout=tracing.EXPORT_TIMEOUT_S
            )
            readers.append(PeriodicExportingMetricReader(exporter, export_interval_millis=PUSH_MS))
        self.provider = MeterProvider(
            readers, resource=tracing.resource(name, instance), shutdown_on_exit=False
        )

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def shutdown(self) -> None:
        """Push what is left."""
        self.provider.shutdown()
