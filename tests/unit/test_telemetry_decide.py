"""The fleet view does not depend on the order of reports; loss is silence by the broker's clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts import view as views
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.envelope import OTLP_TRACES, REPORT, seal_bytes
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import (
    AnyReport,
    Heartbeat,
    Inventory,
    ModuleStatus,
    Phase,
    Status,
    open_report,
)
from loopback.contracts.subjects import from_host
from loopback.contracts.view import HostView
from loopback.services.telemetry import decide

T0 = datetime(2026, 1, 1, tzinfo=UTC)
HOST = {"host": "web-1", "workspace": "prod"}


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def heartbeat(
    seq: int = 1, incarnation: str = "i1", interval_s: float = 10.0, agent: str = "ok"
) -> Heartbeat:
    return Heartbeat(
        **HOST, incarnation=incarnation, seq=seq, at=T0, generation=1, agent=agent, interval_s=interval_s
    )


def status(seq: int = 1, incarnation: str = "i1", modules: tuple[ModuleStatus, ...] = ()) -> Status:
    return Status(
        **HOST, incarnation=incarnation, seq=seq, at=T0, agent="ok", generation=seq, modules=modules
    )


def inventory(seq: int = 1, incarnation: str = "i1") -> Inventory:
    return Inventory(
        **HOST, incarnation=incarnation, seq=seq, at=T0, kernel=f"6.{seq}", architecture="x86_64",
        agent_version="0.1", abi_min=1, abi_max=1,
    )  # fmt: skip


def firewall(
    phase: Phase = Phase.TRIAL, *, generation: int = 1, rollout: str = "r1", **more: object
) -> ModuleStatus:
    return ModuleStatus(module="firewall", phase=phase, generation=generation, rollout=rollout, **more)


def fold(stamped: list[tuple[AnyReport, datetime]], start: HostView | None = None) -> HostView | None:
    view = start
    for report, stamp in stamped:
        view = decide.fold_view(view, report, stamp) or view
    return view


reports = st.builds(
    lambda make, incarnation, seq: make(seq=seq, incarnation=incarnation),
    st.sampled_from([heartbeat, status, inventory]),
    st.sampled_from(["i1", "i2", "i3"]),
    st.integers(1, 6),
)
stamped_reports = st.lists(st.tuples(reports, st.integers(0, 8).map(at)), min_size=1, max_size=14)


@given(stamped_reports, st.randoms(use_true_random=False), st.data())
def test_any_order_and_any_repetition_of_reports_gives_the_same_view(stamped, random, data):
    again = stamped + data.draw(st.lists(st.sampled_from(stamped), max_size=6))
    random.shuffle(again)
    assert fold(again) == fold(stamped)


@given(stamped_reports, st.integers(0, 8), st.randoms(use_true_random=False))
def test_whether_a_lost_host_is_back_does_not_depend_on_order_either(stamped, lost, random):
    start = fold([(heartbeat(), at(0))])
    assert start is not None
    start = msgspec.structs.replace(start, lost_at=at(lost))
    shuffled = list(stamped)
    random.shuffle(shuffled)
    assert fold(shuffled, start) == fold(stamped, start)


@given(stamped_reports)
def test_a_report_that_says_nothing_new_changes_nothing(stamped):
    view = fold(stamped)
    assert all(decide.fold_view(view, report, stamp) is None for report, stamp in stamped[-1:])


def test_the_view_survives_its_own_json():
    view = fold(
        [(inventory(1), at(0)), (status(2, modules=(firewall(),)), at(1)), (heartbeat(3, "i2"), at(2))]
    )
    assert view is not None
    assert views.decode(msgspec.json.encode(view)) == view


def test_within_an_incarnation_the_hosts_own_numbering_beats_the_brokers_order():
    view = fold([(status(7), at(1)), (status(6), at(2))])
    assert view is not None and view.status is not None
    assert view.status.seq == 7
    assert view.last_at == at(2)


def test_a_new_incarnation_starts_from_nothing():
    view = fold([(inventory(9), at(1)), (heartbeat(1, "i2"), at(2))])
    assert view is not None
    assert (view.current.id, view.inventory) == ("i2", None)


def test_three_missed_heartbeats_are_a_loss_and_two_are_not():
    view = fold([(heartbeat(interval_s=10), at(0))])
    assert view is not None
    assert decide.mark_lost(view, at(29.9)) is None
    lost = decide.mark_lost(view, at(30))
    assert lost is not None and lost.state == "lost" and lost.lost_at == at(30)
    assert decide.mark_lost(lost, at(99)) is None


def test_a_lost_host_is_back_with_its_next_word_but_not_with_one_from_before():
    view = fold([(heartbeat(), at(0))])
    assert view is not None
    lost = decide.mark_lost(view, at(30))
    late = decide.fold_view(lost, status(2), at(29))
    assert late is not None and late.state == "lost"
    back = decide.fold_view(late, heartbeat(3), at(31))
    assert back is not None and back.lost_at is None


@pytest.mark.parametrize("claimed", [0.0, -5.0, 1e12])
def test_a_host_cannot_hide_its_loss_or_cause_a_storm_by_its_claimed_interval(claimed):
    view = fold([(heartbeat(interval_s=claimed), at(0))])
    assert view is not None
    assert views.MIN_INTERVAL_S <= view.interval_s <= views.MAX_INTERVAL_S


def test_the_one_timer_waits_for_the_first_host_that_could_be_lost():
    slow, fast = fold([(heartbeat(interval_s=60), at(0))]), fold([(heartbeat(interval_s=10), at(5))])
    assert slow is not None and fast is not None
    assert decide.next_deadline([slow, fast]) == at(35)
    assert decide.next_deadline([]) is None
    assert decide.next_deadline([msgspec.structs.replace(fast, lost_at=at(99))]) is None


def test_only_a_change_of_phase_within_a_rollout_belongs_into_its_trace():
    first = status(
        1, modules=(firewall(Phase.DOWNLOADING), ModuleStatus(module="edge", phase=Phase.IDLE, generation=1))
    )
    before = decide.fold_view(None, first, at(0))
    assert before is not None
    assert [m.phase for m in decide.changed_phases(None, before, first)] == [Phase.DOWNLOADING]
    same = status(2, modules=(firewall(Phase.DOWNLOADING, health="ok"),))
    after = decide.fold_view(before, same, at(1))
    assert after is not None
    assert decide.changed_phases(before, after, same) == ()
    moved = status(3, modules=(firewall(Phase.STAGED),))
    later = decide.fold_view(after, moved, at(2))
    assert later is not None
    assert len(decide.changed_phases(after, later, moved)) == 1
    assert decide.changed_phases(later, later, same) == ()  # came late: the view did not take it
    assert decide.changed_phases(after, later, heartbeat(9)) == ()


def test_fleet_figures_count_and_sum_without_naming_a_host():
    runs = Running(version="1.2.0", package="ab" * 32)
    module = firewall(
        Phase.PROMOTED,
        promoted=runs,
        health="ok",
        enforcing=True,
        metrics={"packets_total": 5.0, "bad name": 1.0},
    )
    one = fold([(status(1, modules=(module,)), at(0))])
    assert one is not None
    two = msgspec.structs.replace(one, host="web-2")
    gone = msgspec.structs.replace(one, host="web-3", lost_at=at(9))
    found = decide.figures([one, two, gone])
    assert found.hosts == {("prod", "ok"): 2, ("prod", "lost"): 1}
    assert found.modules == {decide.ModuleCount("firewall", "1.2.0", "ok", True): 2}
    assert found.metrics == {("firewall", "packets_total"): 10.0}
    assert "web-" not in repr(found)


def test_a_module_cannot_flood_the_metrics_with_names():
    noisy = firewall(metrics={f"m{i}": 1.0 for i in range(1000)})
    view = fold([(status(1, modules=(noisy,)), at(0))])
    assert view is not None
    assert len(decide.figures([view]).metrics) == decide.MAX_MODULE_METRICS


KEYS = {("prod", "web-1"): SigningKey.generate(), ("prod", "web-2"): SigningKey.generate()}


def opened(report: AnyReport, subject: str, signer: SigningKey, payload_type: str = REPORT) -> AnyReport:
    data = seal_bytes(payload_type, msgspec.json.encode(report), signer)
    return open_report(data, subject, lambda w, h: KEYS[w, h].public if (w, h) in KEYS else None)


def test_a_host_that_reports_for_itself_is_believed():
    report = heartbeat()
    assert opened(report, from_host("prod", "web-1", "heartbeat"), KEYS["prod", "web-1"]) == report


@pytest.mark.parametrize(
    ("subject", "signer", "code"),
    [
        (
            ("prod", "web-1", "heartbeat"),
            ("prod", "web-2"),
            Code.REPORT_IMPERSONATION,
        ),  # another's subject, own key
        (
            ("prod", "web-2", "heartbeat"),
            ("prod", "web-2"),
            Code.REPORT_IMPERSONATION,
        ),  # own subject, another's name
        (("staging", "web-1", "heartbeat"), ("prod", "web-1"), Code.REPORT_UNKNOWN_HOST),
        (("prod", "web-1", "status"), ("prod", "web-1"), Code.REPORT_MALFORMED),
    ],
)
def test_a_stolen_host_cannot_speak_for_another(subject, signer, code):
    with pytest.raises(Refused) as caught:
        opened(heartbeat(), from_host(*subject), KEYS[signer])
    assert caught.value.code is code


def test_what_was_signed_as_something_else_is_no_report():
    with pytest.raises(Refused) as caught:
        opened(heartbeat(), from_host("prod", "web-1", "heartbeat"), KEYS["prod", "web-1"], OTLP_TRACES)
    assert caught.value.code is Code.REPORT_MALFORMED


def test_a_changed_report_is_an_impersonation():
    subject = from_host("prod", "web-1", "heartbeat")
    key = KEYS["prod", "web-1"]
    good = msgspec.json.decode(seal_bytes(REPORT, msgspec.json.encode(heartbeat()), key))
    other = msgspec.json.decode(seal_bytes(REPORT, msgspec.json.encode(heartbeat(2)), key))
    data = msgspec.json.encode({**good, "payload": other["payload"]})
    with pytest.raises(Refused) as caught:
        open_report(data, subject, lambda w, h: key.public)
    assert caught.value.code is Code.REPORT_IMPERSONATION
