"""Rollout files: what they mean, and that every mistake is told by file, line and field."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.cli import rolloutfile
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import Gates, Selector, Wave

FILE = Path("/somewhere/web.yaml")
GOOD = """\
rollout: web-2026-11
workspace: prod
module: firewall
version: 1.10
policy: web-policy.yaml
selector: {labels: {role: web}}
waves:
  - {name: canary, count: 1, labels: {role: web}, soak: 10m}
  - {name: quarter, percent: 25, soak: 1h30m}
  - {name: rest, percent: 100%}
gates: {max_failed: 2%, min_sample: 3}
max_unavailable: 10%
host_deadline: 5m
trial: 20s
on_failure: halt
valid: 2d
"""


def test_a_rollout_file_says_what_it_looks_like() -> None:
    found = rolloutfile.loads(GOOD.encode(), FILE)
    assert (found.rollout, found.workspace, found.module) == ("web-2026-11", "prod", "firewall")
    assert found.version == "1.10", "a version is text, whatever YAML makes of it"
    assert found.policy == Path("/somewhere/web-policy.yaml")
    assert found.selector == Selector(labels={"role": "web"})
    assert found.waves == (
        Wave(name="canary", count=1, labels={"role": "web"}, soak_s=600),
        Wave(name="quarter", percent=25, soak_s=5400),
        Wave(name="rest", percent=100),
    )
    assert found.gates == Gates(max_failed=0.02, min_sample=3)
    assert (found.max_unavailable, found.host_deadline_s, found.trial_s) == (0.1, 300, 20)
    assert (found.on_failure, found.valid, found.absent) == ("halt", timedelta(days=2), False)


def test_what_is_left_out_has_a_default() -> None:
    text = "rollout: r\nworkspace: w\nmodule: m\nversion: 1.0.0\nwaves: [{name: all, percent: 100}]\n"
    found = rolloutfile.loads(text.encode(), FILE)
    assert (found.policy, found.selector, found.gates) == (None, Selector(), Gates())
    assert (found.max_unavailable, found.on_failure, found.valid) == (1.0, "rollback", timedelta(days=1))


def test_taking_a_module_away_needs_no_version() -> None:
    text = "rollout: r\nworkspace: w\nmodule: m\nabsent: true\nwaves: [{name: all, percent: 100}]\n"
    found = rolloutfile.loads(text.encode(), FILE)
    assert found.absent
    assert found.version == ""


def changed(line: str, to: str) -> str:
    assert line in GOOD
    return GOOD.replace(line, to)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "web.yaml: the file is empty"),
        ("rollout: [", "web.yaml:1: not YAML"),
        ("- a\n", "web.yaml:1: it must be a mapping"),
        (changed("rollout: web-2026-11", "name: x"), "web.yaml:1: name: there is no such field"),
        (changed("workspace: prod\n", ""), "web.yaml:1: workspace: it is missing"),
        (
            changed("workspace: prod", "workspace: prod\nworkspace: prod"),
            "web.yaml:3: workspace: it is given twice",
        ),
        (changed("module: firewall", "module: [a]"), "web.yaml:3: module: it must be text, not a list"),
        (changed("version: 1.10", "version:"), "web.yaml:4: version: it must be text, not empty"),
        (changed("count: 1", "count: one"), "web.yaml:8: waves[0].count: 'one' is not a number"),
        (changed("count: 1", "count: 1.5"), "web.yaml:8: waves[0].count: '1.5' is not a whole number"),
        (
            changed("soak: 10m", "soak: 10 minutes"),
            "web.yaml:8: waves[0].soak: '10 minutes' is not a duration",
        ),
        (changed("percent: 25", "percent: 125"), "web.yaml:9: waves[1].percent: '125' is not a percentage"),
        (changed("percent: 25", "percnt: 25"), "web.yaml:9: waves[1].percnt: there is no such field"),
        (
            changed("max_failed: 2%", "max_failed: 200%"),
            "web.yaml:11: gates.max_failed: '200%' is not a share",
        ),
        (
            changed("max_failed: 2%", "shadow: {max_changed: 1%}"),
            "web.yaml:11: gates.shadow: there is no such field",
        ),
        (
            changed("host_deadline: 5m", "host_deadline: -5"),
            "web.yaml:13: host_deadline: '-5' is not a duration",
        ),
        (changed("on_failure: halt", "on_failure: panic"), "web.yaml:15: on_failure: 'panic' is neither"),
        (
            changed("waves:", "absent: true\nwaves:"),
            "web.yaml:4: version: a rollout that takes the module away",
        ),
        (
            "rollout: r\nworkspace: w\nmodule: m\nversion: '1'\nwaves: []\n",
            "web.yaml:5: waves: it must be a list of waves, not an empty list",
        ),
    ],
)
def test_every_mistake_is_told_by_file_line_and_field(text: str, words: str) -> None:
    with pytest.raises(Refused) as caught:
        rolloutfile.loads(text.encode(), FILE)
    assert caught.value.code is Code.ROLLOUT_INVALID
    assert caught.value.reason.startswith(f"/somewhere/{words}"), caught.value.reason
    assert caught.value.next_step


def test_a_services_refusal_is_led_back_to_the_line_of_its_field() -> None:
    found = rolloutfile.loads(GOOD.encode(), FILE)
    assert found.place("waves[1].percent: too much") == "/somewhere/web.yaml:9: waves[1].percent: too much"
    assert found.place("waves[2]: takes nobody").startswith("/somewhere/web.yaml:10: ")
    assert found.place("scope.selector.hosts: nobody").startswith("/somewhere/web.yaml:6: ")
    assert found.place("something else") == "/somewhere/web.yaml: something else"


@given(
    st.integers(0, 3_000), st.sampled_from([("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600), ("d", 86400)])
)
def test_durations_are_what_they_say(amount: int, unit: tuple[str, float]) -> None:
    text = changed("soak: 10m", f"soak: {amount}{unit[0]}")
    found = rolloutfile.loads(text.encode(), FILE)
    assert found.waves[0].soak_s == pytest.approx(amount * unit[1])


@given(st.text(max_size=200))
def test_whatever_is_in_the_file_is_read_or_refused(text: str) -> None:
    try:
        rolloutfile.loads(text.encode(errors="surrogatepass"), FILE)
    except Refused as refused:
        assert str(FILE) in refused.reason
