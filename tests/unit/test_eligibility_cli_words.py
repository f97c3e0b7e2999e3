"""What the commands about the fleet print, and which input they refuse before anything is sent."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from loopback.cli import eligibility, fleetio, hostfolder, hosts
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import Running
from loopback.contracts.messages import Check, HostPut, Offer, OfferedVersion
from loopback.contracts.reports import Heartbeat, Inventory, ModuleStatus, Phase, Status
from loopback.contracts.view import HostView, IncarnationView

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WHO = {"host": "web-1", "workspace": "prod", "incarnation": "i1", "at": NOW}
RECORD = HostPut(
    id="c",
    workspace="prod",
    issued_at=NOW,
    expires_at=NOW,
    host="web-1",
    public_key="ab" * 32,
    labels={"role": "web"},
)
MODULE = ModuleStatus(
    module="firewall",
    phase=Phase.TRIAL,
    generation=2,
    rollout="r1",
    promoted=Running("1.2.0", "cd" * 32, "ef" * 32, 7),
    health="ok",
    enforcing=True,
    refusal=Refusal(Code.KERNEL_REFUSED, "the verifier said no"),
)
VIEW = HostView(
    host="web-1",
    workspace="prod",
    current=IncarnationView(
        id="i1",
        last_at=NOW,
        inventory=Inventory(
            **WHO, seq=1, kernel="6.1", architecture="x86_64", agent_version="0.1", abi_min=1, abi_max=1
        ),
        status=Status(**WHO, seq=2, agent="degraded", generation=2, modules=(MODULE,)),
    ),
)


@pytest.mark.parametrize("pairs", [["role"], ["=web"], ["role=web", "role=db"]])
def test_labels_that_are_no_pairs_or_contradict_each_other_are_refused(pairs):
    with pytest.raises(Refused) as caught:
        fleetio.labels(pairs)
    assert caught.value.code is Code.NAME_INVALID


def test_labels_may_hold_equals_signs_and_nothing():
    assert fleetio.labels(["a=b=c", "empty="]) == {"a": "b=c", "empty": ""}
    assert fleetio.labels(None) == {}


def test_a_table_has_straight_columns_and_no_trailing_space(capsys):
    fleetio.table(("A", "LONG HEAD"), [("wide cell", ""), ("x", "y")])
    assert capsys.readouterr().out == "A          LONG HEAD\nwide cell  -\nx          y\n"


def test_a_module_on_one_line_says_what_holds_and_what_is_under_way():
    assert hosts.module_text(MODULE) == "firewall 1.2.0 policy #7 efefefef enforcing ok (trial)"
    idle = ModuleStatus(module="firewall", phase=Phase.IDLE, generation=0)
    assert hosts.module_text(idle) == "firewall none not enforcing unknown"
    old = msgspec.structs.replace(MODULE, noncompliant=Refusal(Code.HOST_BELOW_FLOOR, "too old"))
    assert hosts.module_text(old).endswith("(trial) NONCOMPLIANT")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0 s ago"), (0, "0 s ago"), (119, "119 s ago"), (121, "2 min ago"), (7201, "2 h ago")],
)
def test_how_long_ago_is_said_in_the_largest_unit_that_says_enough(seconds, words):
    assert hosts.ago(NOW + timedelta(seconds=seconds), NOW) == words


def test_the_newest_word_decides_between_ok_and_degraded_and_loss_beats_both():
    assert VIEW.state == "degraded"
    beat = Heartbeat(**WHO, seq=3, generation=2, agent="ok", interval_s=10)
    better = msgspec.structs.replace(VIEW, current=msgspec.structs.replace(VIEW.current, heartbeat=beat))
    assert better.state == "ok"
    assert msgspec.structs.replace(better, lost_at=NOW).state == "lost"
    assert hosts.state(None) == "never seen"


def test_a_host_is_shown_with_its_troubles_and_what_it_may_have():
    offer = Offer(
        host="web-1",
        workspace="prod",
        at=NOW,
        versions=(OfferedVersion(module="firewall", version="1.2.0", digest="cd", rule='entitlement "fw"'),),
    )
    shown = "\n".join(hosts.details(RECORD, VIEW, offer, NOW + timedelta(seconds=5)))
    for words in (
        "degraded, last seen 5 s ago",
        "role=web",
        "the verifier said no",
        'may have   firewall 1.2.0: entitlement "fw"',
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("host", "workspace", "address"),
    [
        ("Web", "prod", "192.0.2.1"),
        ("web-1", "a b", "192.0.2.1"),
        ("web-1", "prod", "x"),
        ("", "prod", "::1"),
    ],
)
def test_what_the_host_itself_would_refuse_later_is_refused_at_once(host, workspace, address):
    with pytest.raises(Refused) as caught:
        hostfolder.check(host, workspace, [address])
    assert caught.value.code is Code.NAME_INVALID


def version(name: str, *, good: bool) -> OfferedVersion:
    refusal = None if good else Refusal(Code.ELIGIBILITY_KERNEL, "too old", "boot a newer one")
    return OfferedVersion(
        module="firewall",
        version=name,
        digest="cd",
        refusal=refusal,
        checks=(Check("kernel", good, "≥ 5.17"),),
    )


def test_without_a_version_the_newest_allowed_one_is_explained_else_the_newest():
    offer = Offer(
        host="web-1", workspace="prod", at=NOW, versions=(version("2", good=False), version("1", good=True))
    )
    assert eligibility.choose(offer, "firewall", None).version == "1"
    assert eligibility.choose(offer, "firewall", "2").refusal is not None
    none = Offer(host="web-1", workspace="prod", at=NOW, versions=(version("2", good=False),))
    assert eligibility.choose(none, "firewall", None).version == "2"
    unknown = eligibility.choose(offer, "edge", None)
    assert unknown.refusal is not None and unknown.refusal.code is Code.ELIGIBILITY_NO_RELEASE


def test_an_explanation_names_each_rule_and_what_to_do():
    shown = eligibility.render("web-1", version("2", good=False))
    assert shown.splitlines() == [
        "web-1 may NOT have firewall 2",
        "  ✗ kernel  ≥ 5.17",
        "  too old  [eligibility.kernel]",
        "  next: boot a newer one",
    ]


def test_examples_in_a_commands_help_stay_on_their_lines() -> None:
    def command() -> None:
        """Do it.

        Like this:

          loopback do it
          loopback do it again

        And so on.
        """

    wanted = "Do it.\n\nLike this:\n\n\b\n  loopback do it\n  loopback do it again\n\nAnd so on."
    assert fleetio.taught(command) == wanted
