"""Hosts' own telemetry: stamped with who sent it, forwarded with bounded patience, received and drawn."""

from __future__ import annotations

import aiohttp
import pytest
from support_otlp import OtlpReceiver, SpanView, metrics_request, render, traces_request

from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import OTLP_METRICS, OTLP_TRACES
from loopback.services.telemetry import otlp

LIES = {"host__name": "web-2", "loopback__workspace": "staging", "service__name": "loopback-host"}


async def no_wait(_: float) -> None:
    """Retries without their pauses."""


async def test_whatever_a_host_calls_itself_the_endpoint_sees_who_it_is():
    async with OtlpReceiver() as receiver, aiohttp.ClientSession() as session:
        forwarder = otlp.Forwarder(receiver.endpoint, session)
        for payload, kind in ((traces_request(**LIES), OTLP_TRACES), (metrics_request(**LIES), OTLP_METRICS)):
            stamped = otlp.stamp(payload, kind, "web-1", "prod")
            assert await forwarder.forward(stamped, kind) == "forwarded"
        (span,), (point,) = receiver.spans, receiver.metrics
        for resource in (span.resource, point.resource):
            assert resource == {
                "service.name": "loopback-host", "host.name": "web-1", "loopback.workspace": "prod",
            }  # fmt: skip
        assert (span.service, span.duration_ms, point.value) == ("loopback-host@web-1", 500, 4.0)


@pytest.mark.parametrize("kind", [OTLP_TRACES, OTLP_METRICS])
def test_what_is_no_otlp_is_refused(kind):
    with pytest.raises(Refused) as caught:
        otlp.stamp(b"\xff\xff not protobuf", kind, "web-1", "prod")
    assert caught.value.code is Code.REPORT_MALFORMED


@pytest.mark.parametrize(
    ("answer", "outcome", "requests"),
    [
        (200, "forwarded", 1),
        (400, "refused", 1),
        (503, "unreachable", otlp.ATTEMPTS),
        (429, "unreachable", otlp.ATTEMPTS),
    ],
)
async def test_an_endpoint_is_asked_again_only_where_that_can_help(answer, outcome, requests):
    async with OtlpReceiver() as receiver, aiohttp.ClientSession() as session:
        receiver.answer_with = answer
        forwarder = otlp.Forwarder(receiver.endpoint, session, sleep=no_wait)
        assert await forwarder.forward(traces_request(), OTLP_TRACES) == outcome
        assert receiver.requests == requests


async def test_an_endpoint_that_comes_back_in_time_loses_nothing():
    async with OtlpReceiver() as receiver, aiohttp.ClientSession() as session:
        receiver.answer_with = 503

        async def repaired(_: float) -> None:
            receiver.answer_with = 200

        forwarder = otlp.Forwarder(receiver.endpoint, session, sleep=repaired)
        assert await forwarder.forward(traces_request(), OTLP_TRACES) == "forwarded"
        assert len(receiver.spans) == 1


async def test_without_an_endpoint_or_with_a_dead_one_telemetry_goes_on():
    async with OtlpReceiver() as gone:
        endpoint = gone.endpoint
    async with aiohttp.ClientSession() as session:
        assert await otlp.Forwarder("", session).forward(b"", OTLP_TRACES) == "no-endpoint"
        dead = otlp.Forwarder(endpoint, session, sleep=no_wait)
        assert await dead.forward(traces_request(), OTLP_TRACES) == "unreachable"


def test_patience_is_bounded_and_grows():
    pauses = otlp.waits(otlp.ATTEMPTS, lambda: 1.0)
    assert list(pauses) == sorted(pauses)
    assert max(pauses) <= otlp.LONGEST_WAIT_S
    assert sum(pauses) < 10


def span(span_id: str, parent: str, start: float, end: float, name: str, error: str = "") -> SpanView:
    return SpanView("t1", span_id, parent, name, "internal", start, end, error, {}, {"service.name": "svc"})


def test_a_trace_is_drawn_as_a_tree_with_its_silences():
    drawn = render(
        [
            span("c", "a", 1.0, 1.1, "apply", error="kernel said no"),
            span("a", "", 0.0, 0.010, "send"),
            span("b", "a", 0.02, 0.03, "decide"),
            span("x", "never-came", 0.5, 0.6, "orphan"),
        ]
    )
    assert drawn.splitlines() == [
        "trace t1 · 4 spans · 1100 ms",
        "├─ send  [svc]  10 ms  +0.0 ms",
        "│  ├─ decide  [svc]  10.0 ms  +20 ms",
        "│  ┆  970 ms of silence",
        "│  └─ apply  [svc]  100 ms  +1000 ms  ✗ kernel said no",
        "└─ ? orphan  [svc]  100 ms  +500 ms",
    ]
    assert render([]) == "(no spans)"


def test_spans_that_name_each_other_as_parents_do_not_hang_the_drawing():
    assert "2 spans" in render([span("a", "b", 0, 1, "one"), span("b", "a", 0, 1, "two")])
