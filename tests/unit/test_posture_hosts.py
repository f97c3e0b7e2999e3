"""Which hosts are not as they should be, and what a posture says of them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
from test_audit_words import NOW, TRUSTS

from loopback.cli import posturing, witnessing
from loopback.cli.audit import Examined
from loopback.cli.auditing import Audit
from loopback.cli.evidence import Evidence, Stored, Trusted
from loopback.cli.posturedoc import Host
from loopback.cli.posturing import Contents
from loopback.contracts import view
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import Running
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.reports import ModuleStatus, Phase, Status
from loopback.contracts.view import HostView, IncarnationView, RunView

RUNS = Running("1.0.0", "a" * 64)


def judged(found: HostView | None) -> Host:
    """The host `web-1` as a posture has it, by this view of it."""
    views = (
        () if found is None else (Stored(view.subject("prod", "web-1"), msgspec.json.encode(found), 1, NOW),)
    )
    evidence = Evidence(workspace="prod", at=NOW, views=views)
    record = HostRecord(
        host="web-1",
        workspace="prod",
        public_key="00" * 32,
        labels={"role": "web"},
        addresses=(),
        absent=False,
        issued_at=NOW,
    )
    journal, state, _ = witnessing.examine(evidence, lambda *_: None, ["web-1"])
    examined = Examined(
        evidence, Trusted(TRUSTS[0], (), {}, ()), journal, state, Audit((), ()), {"web-1": record}
    )
    (host,) = posturing.build(examined, Contents({}, {}), NOW).hosts
    return host


def seen(
    *modules: ModuleStatus, agent: Any = "ok", refusal: Refusal | None = None, **changes: Any
) -> HostView:
    status = Status(
        host="web-1", workspace="prod", incarnation="i", seq=1, at=NOW, agent=agent, generation=1, modules=modules,
        refusal=refusal,
    )  # fmt: skip
    current = IncarnationView(id="i", last_at=NOW, status=status)
    return HostView(host="web-1", workspace="prod", current=current, **changes)


def module(**changes: Any) -> ModuleStatus:
    fields: dict[str, Any] = {
        "module": "firewall", "phase": Phase.PROMOTED, "generation": 1, "promoted": RUNS, "health": "ok", "enforcing": True
    }  # fmt: skip
    return ModuleStatus(**fields | changes)


def test_a_host_that_never_spoke_is_said_to_be_unknown() -> None:
    host = judged(None)
    assert (host.state, host.problems, host.verified, host.labels) == (
        "never seen",
        ("never seen",),
        False,
        {"role": "web"},
    )


def test_a_cloned_host_is_named() -> None:
    early, late = NOW - timedelta(hours=2), NOW
    runs = tuple(RunView(id=name, incarnation="i", first_at=early, last_at=late) for name in ("a", "b"))
    assert any("two agents spoke at once" in p for p in judged(seen(runs=runs)).problems)
    assert not any("two agents" in p for p in judged(seen(runs=runs[:1])).problems)


def test_what_a_host_says_of_itself_is_a_problem_of_its_own() -> None:
    below = Refusal(Code.HOST_BELOW_FLOOR, "1.0.0 is below 2.0.0")
    died = Refusal(Code.MODULE_DIED, "it ended")
    problems = judged(
        seen(
            module(noncompliant=below, health="failed", refusal=died, enforcing=False),
            agent="degraded",
            refusal=died,
        )
    ).problems
    for words in (
        "degraded", "refuses what it is asked: it ended [module.died]", "not what the rules ask for: 1.0.0 is below 2.0.0",
        "firewall is failed: it ended [module.died]", "does not say that it enforces", "no release that counts",
    ):  # fmt: skip
        assert any(words in p for p in problems), (words, problems)


def test_a_lost_host_is_not_taken_for_what_it_ran_last() -> None:
    host = judged(seen(module(), lost_at=NOW))
    assert (host.state, host.problems[0]) == ("lost", "lost: nobody knows what it runs now")
