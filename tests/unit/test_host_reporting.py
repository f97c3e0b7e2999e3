"""What a host says has bounds, and what can never be sent stands in nobody's way."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import msgspec
import nats.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually

from loopback.contracts import envelope, reports
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import ModuleStatus, Phase, Status
from loopback.host import status
from loopback.host.link import _taken, heeding_cancellation
from loopback.host.reporting import Reporter

KEY = SigningKey.generate()


class Broker:
    """Stands for the link: never takes what is too large, and keeps the rest."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.never: set[int] = set()

    async def publish(self, what: str, data: bytes, headers: dict[str, str], *, acknowledged: bool) -> bool:
        report = reports.decode(envelope.payload_of(envelope.parse(data)))
        if report.seq in self.never:
            raise Refused(Code.ENVELOPE_TOO_LARGE, "never")
        self.taken.append(data)
        return True


def reporter(broker: Broker) -> Reporter:
    return Reporter(broker, KEY, "h1", "prod", "i1", 0, lambda upto: None)  # type: ignore[arg-type]  # as far as it is used


def said(sender: Reporter, *modules: ModuleStatus, **more: Any) -> Status:
    return Status(**sender.fields(), agent="ok", generation=1, modules=modules, **more)  # type: ignore[arg-type]  # as in the agent


def module(name: str, figures: int) -> ModuleStatus:
    metrics = {f"{name}_{n}_{'x' * 150}": float(n) for n in range(figures)}
    return ModuleStatus(module=name, phase=Phase.PROMOTED, generation=1, metrics=metrics)


@given(st.dictionaries(st.text(max_size=300), st.floats(), max_size=400))
def test_figures_are_few_finite_and_named(metrics: dict[str, float]) -> None:
    found = status.bounded(metrics)
    assert len(found) <= status.MAX_METRICS
    assert all(0 < len(name) <= status.MAX_NAME and math.isfinite(value) for name, value in found.items())
    assert list(found.items()) == [i for i in metrics.items() if i in found.items()], (
        "in the module's own order"
    )
    assert status.bounded(found) == found


def test_a_status_that_is_too_large_loses_figures_before_anything_else() -> None:
    sender = reporter(Broker())
    full = said(sender, module("big", 256), module("small", 3), *(module(f"m{n}", 256) for n in range(5)))
    found = status.fitted(full)
    assert len(msgspec.json.encode(found)) <= reports.MAX_BYTES["status"]
    assert [m.module for m in found.modules] == [m.module for m in full.modules]
    assert next(m for m in found.modules if m.module == "small").metrics
    few = said(sender, module("big", 3))
    assert status.fitted(few) is few


async def test_what_is_too_large_for_a_report_is_dropped_and_the_next_one_goes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = Broker()
    sender = reporter(broker)
    sender.send(said(sender, refusal=Refusal(Code.HOST_DISK, "x" * 200_000)))
    sender.send(said(sender))
    await sender.flush(5)
    assert (len(broker.taken), sender.dropped) == (1, 1)
    assert "can never be sent" in caplog.text


async def test_what_the_broker_never_takes_does_not_block_the_queue() -> None:
    broker = Broker()
    sender = reporter(broker)
    broker.never = {1}
    sender.send(said(sender))
    sender.send(said(sender))
    sending = asyncio.create_task(sender.run())
    await eventually(lambda: len(broker.taken) == 1)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert sender.dropped == 1


def test_an_acknowledgement_says_taken_not_now_or_never() -> None:
    assert _taken(b'{"stream": "LB_FROM", "seq": 1}')
    assert not _taken(b'{"error": {"code": 503, "err_code": 10008, "description": "system unavailable"}}')
    assert not _taken(b"\xff")
    with pytest.raises(Refused) as caught:
        _taken(b'{"error": {"code": 400, "err_code": 10054, "description": "message size exceeds maximum"}}')
    assert caught.value.code == Code.ENVELOPE_TOO_LARGE


@pytest.mark.parametrize("answer", [None, nats.errors.NoRespondersError()])
async def test_a_cancellation_that_meets_the_answer_is_not_lost(answer: Exception | None) -> None:
    """Python 3.11's wait_for returns the answer then, or raises what it raised, and forgets that it was cancelled."""
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    began = asyncio.Event()

    async def ask() -> bytes:
        with heeding_cancellation():
            began.set()
            try:
                return await future
            except asyncio.CancelledError:  # what wait_for does with an answer that is there already
                if answer is not None:
                    raise answer from None
                return b"the answer"

    task = asyncio.create_task(ask())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_timeout_that_meets_the_answer_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            with heeding_cancellation(), contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
