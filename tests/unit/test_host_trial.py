"""What a trial comes to, and what a host says of its modules."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts.abi import HealthReport
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import Running
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import WorkspaceRules
from loopback.host import status
from loopback.host.state import ModuleState
from loopback.host.trial import CONFIRM_S, Outcome, Seen, judge

NOW = datetime(2026, 11, 1, tzinfo=UTC)
TARGET = Running(version="1.0", package="a" * 64, policy="p1", policy_serial=1)
WELL = HealthReport(state="ok", enforcing=True, policy="p1")
DIED = Refusal(Code.MODULE_DIED, "it died")


def outcome(seen: Seen) -> tuple[Outcome, Code | None]:
    found, refusal = judge(seen, TARGET, trial_s=10, grace_s=3)
    return found, refusal.code if refusal else None


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (Seen(elapsed_s=1, health=WELL), (Outcome.WAIT, None)),
        (Seen(elapsed_s=9.9, health=WELL, connected=True), (Outcome.WAIT, None)),
        (Seen(elapsed_s=10, health=WELL, connected=True), (Outcome.PASSED, None)),
        (Seen(elapsed_s=10, health=WELL), (Outcome.WAIT, None)),
        (Seen(elapsed_s=10 + CONFIRM_S, health=WELL), (Outcome.UNCONFIRMED, Code.HOST_UNCONFIRMED)),
        (Seen(elapsed_s=0.1, alive=False, refusal=DIED), (Outcome.FAILED, Code.MODULE_DIED)),
        (Seen(elapsed_s=1, health=HealthReport(state="degraded")), (Outcome.WAIT, None)),
        (
            Seen(elapsed_s=3, health=HealthReport(state="degraded")),
            (Outcome.FAILED, Code.MODULE_UNHEALTHY),
        ),
        (
            Seen(elapsed_s=0.1, health=HealthReport(state="degraded", code="kernel.unsupported")),
            (Outcome.FAILED, Code.KERNEL_UNSUPPORTED),
        ),
        (
            Seen(elapsed_s=5, health=HealthReport(state="ok", enforcing=True, policy="p0")),
            (Outcome.FAILED, Code.MODULE_UNHEALTHY),
        ),
        (
            Seen(elapsed_s=5, health=HealthReport(state="ok", policy="p1")),
            (Outcome.FAILED, Code.MODULE_UNHEALTHY),
        ),
        (
            Seen(elapsed_s=5, health=HealthReport(state="failed", code="made.up")),
            (Outcome.FAILED, Code.MODULE_UNHEALTHY),
        ),
    ],
)
def test_a_trial_passes_only_when_well_and_reachable(
    seen: Seen, expected: tuple[Outcome, Code | None]
) -> None:
    assert outcome(seen) == expected


@given(
    elapsed=st.floats(0, 100), alive=st.booleans(), connected=st.booleans(),
    state=st.sampled_from(["ok", "degraded", "failed"]), enforcing=st.booleans(), policy=st.sampled_from([None, "p0", "p1"]),
)  # fmt: skip
def test_nothing_unwell_or_unreachable_is_ever_promoted_and_no_trial_waits_for_ever(
    elapsed: float, alive: bool, connected: bool, state: str, enforcing: bool, policy: str | None
) -> None:
    health = HealthReport(state=state, enforcing=enforcing, policy=policy)  # type: ignore[arg-type]
    found, _ = outcome(Seen(elapsed_s=elapsed, alive=alive, connected=connected, health=health))
    if found is Outcome.PASSED:
        assert alive
        assert connected
        assert elapsed >= 10
        assert (state, enforcing, policy) == ("ok", True, "p1")
    if found is Outcome.WAIT:
        assert elapsed < 10 + CONFIRM_S


class Process:
    def __init__(self, health: HealthReport | None = None, problem: Refusal | None = None) -> None:
        self.adopted = False
        self.health = health
        self.problem = problem
        self.unfilled: Refusal | None = None
        self.metrics: dict[str, float] = {"x_total": 1.0}


@pytest.mark.parametrize(
    ("state", "process", "agent"),
    [
        (ModuleState(module="m", phase=Phase.PROMOTED, promoted=TARGET), Process(WELL), "ok"),
        (ModuleState(module="m", phase=Phase.PROMOTED, promoted=TARGET), Process(None, DIED), "degraded"),
        (
            ModuleState(module="m", phase=Phase.PROMOTED, promoted=TARGET),
            Process(HealthReport(state="degraded")),
            "degraded",
        ),
        (
            ModuleState(module="m", phase=Phase.ROLLED_BACK, promoted=TARGET, refusal=DIED),
            Process(WELL),
            "ok",
        ),
        (ModuleState(module="m", phase=Phase.ROLLED_BACK, refusal=DIED), None, "degraded"),
        (ModuleState(module="m", phase=Phase.REMOVED), None, "ok"),
        (ModuleState(module="m", phase=Phase.REJECTED, refusal=DIED), None, "ok"),
        (
            ModuleState(module="m", phase=Phase.REJECTED, refusal=Refusal(Code.KERNEL_UNSUPPORTED, "no bpf")),
            None,
            "degraded",
        ),
        (ModuleState(module="m", phase=Phase.ROLLBACK_FAILED, promoted=TARGET), Process(WELL), "degraded"),
    ],
)
def test_the_agent_is_degraded_while_a_module_is_not_well(
    state: ModuleState, process: Process | None, agent: str
) -> None:
    found = status.modules({"m": state}, {"m": process} if process else {}, WorkspaceRules(), NOW)
    assert status.agent(found) == agent


def test_a_problem_now_is_told_even_where_the_entry_was_fine() -> None:
    state = ModuleState(module="m", phase=Phase.PROMOTED, promoted=TARGET)
    assert status.module(state, Process(None, DIED)).refusal == DIED
    told = status.module(
        state, Process(HealthReport(state="degraded", code="kernel.unsupported", reason="no bpf"))
    )
    assert told.refusal is not None
    assert (told.refusal.code, told.health) == (Code.KERNEL_UNSUPPORTED, "degraded")
