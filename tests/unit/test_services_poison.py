"""A message that nobody can make sense of is said in the log and left behind: it neither ends a service nor comes again."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from activation_world import World
from opentelemetry import metrics, trace
from support import eventually

from loopback.contracts import journal
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import Workspace
from loopback.services._runtime.wire import Stored
from loopback.services.activation.fleet import Fleet
from loopback.services.activation.workspaces import Workspaces
from loopback.services.delivery import app as delivery
from loopback.services.delivery.handlers import Handlers as Delivery
from loopback.services.eligibility.handlers import Handlers as Eligibility

ODD = (
    "lb.ws.PROD.record.workspace.prod",
    "lb.ws._zz.record.workspace.x",
    "lb.ws.prod",
    "lb.ws._61.from.h.inventory",
)
POISON = (b"", b"{}", b'{"type":"rollout","rollout":"\xff"}', b"[" * 5000)


def stored(subject: str, data: bytes = b"") -> Stored:
    return Stored(subject, data, {}, 7, datetime(2026, 1, 1, tzinfo=UTC), "S")


def handlers(kind: Any) -> Any:
    """With nothing behind it: whoever goes on with a poisoned message has an AttributeError."""
    return kind.__new__(kind)


@pytest.mark.parametrize("subject", ODD)
def test_a_workspace_whose_subject_is_none_is_left_out_by_delivery(
    subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("test")
    assert delivery.workspace_of(stored(subject), log) is None
    assert subject in caplog.text
    assert delivery.workspace_of(stored("lb.ws.prod.record.workspace.prod"), log) == "prod"


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("kind", [Delivery, Eligibility])
async def test_a_created_link_that_does_not_read_is_dropped(
    kind: Any, poison: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await handlers(kind).on_created(stored("lb.ws.prod.rollout.r1.created", poison))
    assert "is no link" in caplog.text


@pytest.mark.parametrize("subject", ODD)
async def test_an_inventory_or_record_from_nowhere_is_dropped(
    subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    eligibility = handlers(Eligibility)
    await eligibility.on_record(stored(subject))
    await eligibility.on_inventory(stored(subject))
    assert [r.levelname for r in caplog.records] == ["ERROR", "ERROR"]


@pytest.mark.parametrize("poison", POISON)
def test_a_record_that_does_not_read_is_left_out_by_activation(
    poison: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    Fleet().fold(stored("lb.ws.prod.record.host.web-1", poison))
    assert "does not read" in caplog.text


async def test_a_workspace_that_no_stream_can_be_named_after_is_left_out_by_activation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = Fleet()
    fleet.environments["x" * 300] = "production"
    fleet.changed.set()
    meter, tracer = metrics.get_meter("test"), trace.get_tracer("test")
    found = Workspaces(None, fleet, None, tracer, meter, None)  # type: ignore[arg-type]  # none of them is reached
    running = asyncio.create_task(found.run())
    await eventually(lambda: not fleet.changed.is_set())
    assert not running.done()
    running.cancel()
    assert "is left out" in caplog.text
    assert found.engines == {}


def test_a_created_link_whose_command_is_none_is_refused_as_no_link() -> None:
    world = World(1)
    world.create()
    link = journal.decode(world.log[0])
    assert isinstance(link.event, journal.Created)
    empty = msgspec.structs.replace(link.event.envelope, payload="e30=")
    bad = msgspec.structs.replace(link, event=msgspec.structs.replace(link.event, envelope=empty))
    workspace = Workspace("prod")
    with pytest.raises(msgspec.ValidationError):
        fold(workspace, journal.encode(bad))
    assert workspace.rollouts == {}
