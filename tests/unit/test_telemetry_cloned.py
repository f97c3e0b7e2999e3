"""Two agents that speak at once under one key are two machines; one that is started again is not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts.reports import Heartbeat
from loopback.contracts.view import HostView
from loopback.services.telemetry import decide

T0 = datetime(2026, 1, 1, tzinfo=UTC)
Said = tuple[str, int, float]  # run, seq, seconds


def beat(run: str, seq: int, incarnation: str = "i1") -> Heartbeat:
    return Heartbeat(
        host="web-1", workspace="prod", incarnation=incarnation, seq=seq, at=T0, generation=1, agent="ok", interval_s=10,
        run=run,
    )  # fmt: skip


def folded(said: list[Said], incarnations: dict[str, str] | None = None) -> HostView:
    view: HostView | None = None
    for run, seq, seconds in said:
        report = beat(run, seq, (incarnations or {}).get(run, "i1"))
        view = decide.fold_view(view, report, T0 + timedelta(seconds=seconds)) or view
    assert view is not None
    return view


ORIGINAL = [("a", n, n * 10.0) for n in range(1, 8)]
COPY = [("b", n, n * 10.0 + 33.0) for n in range(1, 5)]


def test_an_agent_started_again_and_again_is_one_machine() -> None:
    runs = [(f"r{n}", n * 2 + half, n * 20.0 + half * 10) for n in range(8) for half in (0, 1)]
    view = folded(runs)
    assert not view.cloned
    assert [run.id for run in view.runs] == ["r7", "r6", "r5", "r4"]


def test_last_words_that_arrive_a_moment_after_the_next_run_began_are_no_clone() -> None:
    assert not folded([("a", 1, 0.0), ("b", 2, 10.0), ("a", 1, 11.5), ("b", 3, 20.0)]).cloned


@given(st.permutations(ORIGINAL + COPY))
def test_a_copy_is_found_in_whatever_order_its_words_are_handled(said: list[Said]) -> None:
    assert folded(said).cloned
    assert folded(said).runs == folded(ORIGINAL + COPY).runs


@given(st.permutations(ORIGINAL + COPY))
def test_a_copy_that_noticed_and_took_another_incarnation_is_still_found(said: list[Said]) -> None:
    assert folded(said, {"b": "i2"}).cloned


def test_clones_are_counted_by_workspace() -> None:
    figures = decide.figures([folded(ORIGINAL + COPY), folded(ORIGINAL)])
    assert figures.cloned == {"prod": 1}


def test_agents_of_before_that_name_no_run_are_never_taken_for_clones() -> None:
    assert not folded([("", 1, 0.0), ("", 2, 10.0), ("", 1, 20.0)]).cloned
