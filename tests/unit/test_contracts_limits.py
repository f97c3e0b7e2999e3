"""What contracts refuse before anybody works on it: times that no clock can compare, durations that no calendar holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from activation_world import start_command

from loopback.contracts import desired, envelope, messages, reports, rolloutplan, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import DesiredModule, DesiredState
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Wave
from loopback.contracts.reports import Heartbeat, Inventory, Status

NOW = datetime(2026, 11, 1, tzinfo=UTC)
KEY = SigningKey.from_raw(bytes(32))
SAID: dict[str, Any] = {"host": "h", "workspace": "w", "incarnation": "i", "seq": 1, "at": NOW}
REPORTS = {
    "inventory": Inventory(
        **SAID, kernel="6.1", architecture="x86_64", agent_version="1", abi_min=1, abi_max=1
    ),
    "status": Status(**SAID, agent="ok", generation=1),
    "heartbeat": Heartbeat(**SAID, agent="ok", generation=1, interval_s=1.0),
}


def without_zone(data: bytes, field: str) -> bytes:
    """The same JSON, with this time cut off before its zone."""
    name, sep, rest = data.partition(f'"{field}":"'.encode())
    assert sep
    time, quote, after = rest.partition(b'"')
    return name + sep + time.removesuffix(b"Z") + quote + after


@pytest.mark.parametrize("field", ["issued_at", "expires_at", "not_before", "not_after"])
def test_a_command_with_a_time_without_zone_does_not_decode(field: str) -> None:
    data = msgspec.json.encode(start_command("r1", NOW))
    assert messages.decode_command(data)
    with pytest.raises(msgspec.ValidationError, match=field):
        messages.decode_command(without_zone(data, field))


@pytest.mark.parametrize("field", ["issued_at", "not_after"])
def test_a_desired_state_with_a_time_without_zone_does_not_decode(field: str) -> None:
    entry = DesiredModule(
        module="firewall", running=None, generation=1, rollout="r1", not_after=NOW,
        scope=envelope.seal(envelope.COMMAND, b"{}", KEY),
    )  # fmt: skip
    data = msgspec.json.encode(
        DesiredState(host="h", workspace="w", generation=1, modules=(entry,), issued_at=NOW)
    )
    assert desired.decode(data).modules == (entry,)
    with pytest.raises(msgspec.ValidationError, match=field):
        desired.decode(without_zone(data, field))


@pytest.mark.parametrize("soak_s", [-1.0, 1e12, float("inf"), float("nan")])
def test_a_soak_that_no_calendar_holds_is_refused_by_name(soak_s: float) -> None:
    start = start_command("r1", NOW, waves=(Wave(name="all", percent=100, soak_s=soak_s),))
    with pytest.raises(Refused) as caught:
        rolloutplan.check(start)
    assert caught.value.code is Code.ROLLOUT_INVALID
    assert caught.value.reason.startswith("waves[0].soak_s")


def test_the_longest_soak_can_be_added_to_a_time() -> None:
    start = start_command("r1", NOW, waves=(Wave(name="all", percent=100, soak_s=rolloutplan.MAX_SOAK_S),))
    rolloutplan.check(start)
    assert NOW + timedelta(seconds=rolloutplan.MAX_SOAK_S) > NOW


@pytest.mark.parametrize("kind", sorted(REPORTS))
def test_a_report_over_its_size_is_refused_and_one_below_is_not(kind: str) -> None:
    def opened(padding: int) -> reports.AnyReport:
        data = msgspec.json.encode(REPORTS[kind])[:-1] + b"," + b" " * padding + b'"later":1}'
        sealed = envelope.seal_bytes(envelope.REPORT, data, KEY)
        return reports.open_report(sealed, subjects.from_host("w", "h", kind), lambda *_: KEY.public)

    assert opened(0) == REPORTS[kind]
    with pytest.raises(Refused) as caught:
        opened(reports.MAX_BYTES[kind])
    assert caught.value.code is Code.REPORT_MALFORMED
    assert str(reports.MAX_BYTES[kind]) in caught.value.reason
