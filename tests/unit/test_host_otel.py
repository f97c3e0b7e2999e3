"""A module's counters as OTLP: names and labels apart, totals as monotonic sums."""

from __future__ import annotations

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from loopback.host import otel


def test_a_counter_per_rule_becomes_one_metric_with_a_point_per_rule() -> None:
    counters = {
        'loopback_firewall_rule_packets_total{rule="web"}': 3.0,
        'loopback_firewall_rule_packets_total{rule="names, too"}': 4.0,
        "loopback_firewall_generation": 7.0,
    }
    request = ExportMetricsServiceRequest.FromString(
        otel.figures("h1", "lab", {"firewall": counters}, {"loopback_agent_modules": 1.0})
    )
    metrics = {m.name: m for m in request.resource_metrics[0].scope_metrics[0].metrics}
    assert set(metrics) == {
        "loopback_firewall_rule_packets_total",
        "loopback_firewall_generation",
        "loopback_agent_modules",
    }
    total = metrics["loopback_firewall_rule_packets_total"]
    assert total.sum.is_monotonic
    found = {
        tuple(sorted((a.key, a.value.string_value) for a in point.attributes)): point.as_double
        for point in total.sum.data_points
    }
    assert found == {
        (("loopback.module", "firewall"), ("rule", "web")): 3.0,
        (("loopback.module", "firewall"), ("rule", "names, too")): 4.0,
    }
    assert metrics["loopback_firewall_generation"].gauge.data_points[0].as_double == 7.0
    assert not metrics["loopback_agent_modules"].gauge.data_points[0].attributes
