"""What a signature permits, said before it is given. Whether it is true of a host is tried in the stolen-activation tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from activation_world import T0, start_command

from loopback.contracts import exposure
from loopback.contracts.exposure import Exposure
from loopback.contracts.messages import Selector
from loopback.contracts.trustdoc import Floor, WorkspaceRules

FREE = WorkspaceRules()
STRICT = WorkspaceRules(
    regulated=True, publishers={"firewall": ("f" * 64,)}, floors={"firewall": Floor("0.9.0")}
)


def of(
    rules: WorkspaceRules = FREE, hosts: tuple[str, ...] = ("h2", "h1"), **changes: Any
) -> dict[str, Exposure]:
    found = exposure.exposure(start_command("r1", T0, **changes), rules, hosts)
    assert len({e.id for e in found}) == len(found)
    return {e.id: e for e in found}


def test_every_id_belongs_to_one_side_and_can_occur() -> None:
    seen = of(STRICT)
    assert {e.id for e in seen.values() if e.can} == set(exposure.CAN)
    assert {e.id for e in seen.values() if not e.can} == set(exposure.CANNOT)


def test_it_names_hosts_times_package_and_policy() -> None:
    item = of()["change-at-once"]
    assert item.values["hosts"] == ["h1", "h2"]
    assert (item.values["version"], item.values["package"]) == ("1.0.0", "a" * 64)
    assert item.values["from"] == "2026-11-01T11:54:00+00:00", "five minutes before the scope begins"
    assert item.values["until"] == "2026-11-02T12:00:00+00:00"
    assert item.values["needs_approval"] is False
    for part in (
        "2 hosts (h1, h2)",
        "firewall 1.0.0",
        "aaaaaaaaaaaa",
        "serial 1",
        "11:54:00 UTC",
        "2026-11-02",
    ):
        assert part in item.says


def test_the_way_back_ends_a_day_after_the_scope_or_needs_an_operators_abort() -> None:
    assert of()["way-back"].values == {"until": "2026-11-03T12:00:00+00:00", "needs_abort": False}
    halting = of(on_failure="halt")["way-back"]
    assert halting.values == {"until": None, "needs_abort": True}
    assert "only with a 'rollout abort'" in halting.says


def test_rules_of_the_workspace_limit_it_and_are_named_only_where_they_hold() -> None:
    assert not {"unapproved", "below-floor", "unpinned-publisher"} & of().keys()
    strict = of(STRICT)
    assert strict["change-at-once"].says.startswith("once another operator has approved it")
    assert strict["below-floor"].values == {"floor": "0.9.0", "refused": False}
    below = of(WorkspaceRules(floors={"firewall": Floor("1.0.1")}))["below-floor"]
    assert below.values["refused"] is True and "hosts refuse 1.0.0" in below.says
    assert "hosts refuse every package" in of(WorkspaceRules(regulated=True))["unpinned-publisher"].says


def test_named_hosts_are_all_there_is_and_labels_may_come_to_match_others() -> None:
    assert "other-matching-hosts" not in of(selector=Selector(hosts=("h1",)))
    assert "role=web" in of(selector=Selector(labels={"role": "web"}))["other-matching-hosts"].says


def test_taking_a_module_away_has_no_trial_and_no_package() -> None:
    found = of(STRICT, absent=True, version="", policy=None, policy_serial=0)
    assert "take firewall away" in found["change-at-once"].says
    assert (
        not {"stretch-trial", "skip-trial", "below-floor", "unpinned-publisher", "older-policy"}
        & found.keys()
    )
    assert "install any version" in found["other-content"].says


def test_the_end_of_the_calendar_is_no_trouble() -> None:
    edge = datetime.max.replace(tzinfo=UTC)
    assert of(not_after=edge)["way-back"].values["until"] == edge.isoformat()


def test_a_version_below_the_floor_is_told_from_one_that_is_not() -> None:
    assert exposure.is_below("1.9.0", "1.10.0")
    assert not exposure.is_below("1.10.0", "1.10.0")
    assert exposure.is_below("1.10.0rc1", "1.10.0")
    assert exposure.is_below("latest", "1.0")
