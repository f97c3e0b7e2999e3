"""What `loopback rollout plan` admits of a stolen activation really is possible, and what it denies is not.

One test for each id of `contracts/exposure.py`: `test_can_…` shows the thing happening on hosts, with the figures that the
plan prints at their edges; `CANNOT` names the attacks that fail for what is denied.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
import pytest
from support_attacks import ATTACKS
from support_decide import Host
from support_host import WORKSPACE, tiny
from support_stolen import NEW, NOW, OLD, Thief, outcome

from loopback.contracts import envelope, exposure, reports, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import DesiredModule, DesiredState
from loopback.contracts.envelope import Envelope
from loopback.contracts.exposure import CAN, Exposure
from loopback.contracts.messages import Gates, RolloutAbort, RolloutStart, Selector, Wave
from loopback.contracts.reports import Status
from loopback.contracts.roster import Roster, Source
from loopback.contracts.trustdoc import Floor, WorkspaceRules
from loopback.host import install, status, transitions
from loopback.host.config import Allow, HostConfig
from loopback.host.decide import Accepted, check_desired
from loopback.host.roster import Followed, Known, accept
from loopback.host.scope import Answer, Identity
from loopback.trust import package

SECOND = timedelta(seconds=1)
_replace = msgspec.structs.replace

CANNOT: Final[dict[str, tuple[str, ...]]] = {
    "unapproved": (
        "unapproved", "removal-unapproved", "approved-by-the-releaser", "approved-by-an-author", "approved-elsewhere",
        "approved-under-another-name", "approval-of-another-start",
    ),
    "below-floor": ("below-the-floor",),
    "unpinned-publisher": (),  # test_a_package_by_no_pinned_publisher_is_refused
    "other-content": ("other-version", "swapped-package", "other-policy", "no-policy", "other-serial", "removal",
        "removals-scope", "scope-of-another-version", "start-of-another-version"),
    "other-module": ("another-module", "other-modules-scope", "other-modules-start"),
    "other-workspace": ("other-workspaces-document", "other-workspaces-scope", "other-workspaces-start"),
    "other-hosts": ("other-hosts-document", "other-hosts-scope", "other-labels-scope", "record-by-activation"),
    "outside-times": ("after-the-scope", "before-the-scope", "clock-set-back"),
    "older-policy": ("replayed-policy",),
    "older-rollout": ("older-rollout", "removed-module"),
    "put-in": (),  # test_stolen_sets.py
    "skip-trial": ("no-trial",),
    "retry-failed": ("what-failed-here",),
    "owner-allow-list": ("module-not-allowed",),  # and test_a_capability_that_the_owner_does_not_allow_is_refused
    "generation-jump": ("huge-generation",),
}  # fmt: skip


class Member(Host):
    """One of several hosts that the same people sign for."""

    def __init__(self, thief: Thief, name: str, **labels: str) -> None:
        super().__init__()
        self.name = name
        self.signers = thief.signers
        self.record = thief.signers.record(name, self.key.public.text, **({"role": "web"} | labels))

    def check(self, signed: Envelope, now: datetime = NOW) -> Accepted:
        identity = Identity(host=self.name, workspace=WORKSPACE, key=self.key.public, modules=self.modules)
        return check_desired(signed, identity, self.state, {"tiny": self.own}, self.signers.trust, now)

    def document(self, *entries: DesiredModule, **changes: Any) -> DesiredState:
        return self.signers.desired(self.name, self.record, *entries, **changes)


def admitted(start: RolloutStart, hosts: tuple[str, ...] = ("h1",), **rules: Any) -> dict[str, Exposure]:
    return {one.id: one for one in exposure.exposure(start, WorkspaceRules(**rules), hosts)}


def command(entry: DesiredModule) -> RolloutStart:
    return msgspec.json.decode(envelope.payload_of(entry.scope), type=RolloutStart)


def test_every_id_has_its_test_and_the_plan_prints_it() -> None:
    tests = {name.removeprefix("test_can_").replace("_", "-") for name in globals() if "test_can_" in name}
    assert tests == set(CAN)
    assert set(CANNOT) == set(exposure.CANNOT)
    start = command(Thief().entry())
    said = admitted(start, regulated=True, floors={"tiny": Floor("1.0")})
    assert set(said) == set(CAN) | set(exposure.CANNOT)
    assert all(one.can == (one.id in CAN) for one in said.values())


# What is possible


def test_can_change_at_once() -> None:
    thief = Thief()
    fleet = [Member(thief, f"h{n}") for n in range(4)]
    entry = thief.entry(start={"scope": {"not_before": NOW, "selector": Selector(labels={"role": "web"})}})
    said = admitted(command(entry))["change-at-once"].values
    first, last = (datetime.fromisoformat(str(said[key])) for key in ("from", "until"))
    for now in (first, NOW, last - timedelta(microseconds=1)):
        answers = [member.ask(entry, now=now) for member in fleet]
        # A host's clock is never behind a time that was signed: what was signed before the scope begins starts then.
        assert answers == [Answer.CHANGE] * 4, now
    assert {member.ask(entry, now=last) for member in fleet} == {Code.SCOPE_EXPIRED}
    later = thief.entry(start={"issued_at": NOW - timedelta(hours=1), "scope": {"not_before": NOW}})
    thief.signers.clock = lambda: NOW - timedelta(hours=1)
    early = Member(thief, "h9")
    assert early.ask(later, now=first) is Answer.CHANGE
    assert early.ask(later, now=first - timedelta(microseconds=1)) == Code.SCOPE_EXPIRED


def test_can_other_matching_hosts() -> None:
    thief = Thief()
    entry = thief.entry(start={"scope": {"selector": Selector(labels={"role": "web"})}})
    assert "other-matching-hosts" in admitted(command(entry), ("h1",))
    assert Member(thief, "h-new").ask(entry) is Answer.CHANGE
    assert Member(thief, "h-new", role="db").ask(entry) == Code.SCOPE_VIOLATION
    named = thief.entry(start={"scope": {"selector": Selector(hosts=("h1",))}})
    assert "other-matching-hosts" not in admitted(command(named), ("h1",))
    assert Member(thief, "h-new").ask(named) == Code.SCOPE_VIOLATION


def test_can_skip_pacing() -> None:
    thief = Thief()
    waves = (
        Wave(name="canary", hosts=("h0",), soak_s=86400.0),
        Wave(name="rest", hosts=("h1", "h2", "h3"), soak_s=86400.0),
    )
    entry = thief.entry(start={"waves": waves, "gates": Gates(max_failed=0.0), "max_unavailable": 0.25})
    fleet = [Member(thief, f"h{n}") for n in range(4)]
    assert [member.ask(entry) for member in reversed(fleet)] == [Answer.CHANGE] * 4


def test_can_ignore_steering() -> None:
    thief = Thief()
    entry = thief.entry()
    aborted = thief.signers.command(RolloutAbort(**thief.signers.times(), rollout="r1"))
    assert thief.ask(entry) is Answer.CHANGE
    assert thief.ask(_replace(entry, abort=aborted)) is Answer.CHANGE, (
        "an abort opens the way back, and closes nothing"
    )


@pytest.mark.parametrize("on_failure", ["rollback", "halt"])
def test_can_way_back(on_failure: str) -> None:
    thief = Thief()
    entry = thief.entry(start={"scope": {"on_failure": on_failure}})
    said = admitted(command(entry))["way-back"].values
    back = thief.promote(entry)
    if said["needs_abort"]:
        assert thief.ask(back) == Code.SCOPE_VIOLATION
        at = NOW + timedelta(days=3)
        aborted = thief.signers.command(
            RolloutAbort(**thief.signers.times() | {"issued_at": at}, rollout="r1")
        )
        back, until = _replace(back, abort=aborted), at + timedelta(hours=24)
    else:
        until = datetime.fromisoformat(str(said["until"]))
    assert thief.ask(back, now=until - SECOND) is Answer.CHANGE
    assert thief.ask(back, now=until) == Code.SCOPE_EXPIRED
    assert back.running == OLD


def test_can_back_and_forth() -> None:
    thief = Thief()
    entry = thief.entry()
    for _ in range(3):
        assert thief.ask(entry) is Answer.CHANGE
        back = thief.promote(entry)
        assert thief.ask(back) is Answer.CHANGE
        thief.promote(back)
        assert thief.own.promoted == OLD
        entry = _replace(entry, generation=back.generation + 1)


@pytest.mark.parametrize("signed", [0.3, 7200.0])
def test_can_stretch_trial(signed: float) -> None:
    thief = Thief()
    entry = thief.entry(start={"trial_s": signed})
    longest = admitted(command(entry))["stretch-trial"].values["longest_s"]
    assert isinstance(longest, float)
    assert thief.ask(_replace(entry, trial_s=longest)) is Answer.CHANGE
    assert thief.ask(_replace(entry, trial_s=longest + 0.1)) == Code.SCOPE_VIOLATION
    assert thief.ask(_replace(entry, trial_s=signed - 0.1)) == Code.SCOPE_VIOLATION


def test_can_withhold() -> None:
    """A document that is silent about a module leaves it as it is, and so does no document at all."""
    thief = Thief()
    accepted = thief.check(thief.signers.sealed(thief.document(generation=5)))
    assert accepted.entries == ()
    assert thief.own.promoted == OLD
    found = status.module(thief.own, None)
    assert (found.promoted, found.generation) == (OLD, 4), "and the host goes on saying so"


def test_can_leave_out() -> None:
    """A roster without a host is taken, and so is one that shows the last word but one to whoever heard no later one."""
    web, shop = Source(labels={"role": "web"}), Source(pool="shop")
    one, other = Known("d1", 1, ("10.0.0.1",)), Known("d2", 2, ("10.0.0.2",))
    known = Followed(source=web, slices={"a": {"h1": one, "h2": other}})
    without = Roster(workspace=WORKSPACE, source=web, slices=("b",), issued_at=NOW)
    assert accept(known, without, {"b": {"h2": other}}).addresses == ["10.0.0.2"]
    earlier = Roster(workspace=WORKSPACE, source=shop, slices=("c",), issued_at=NOW)
    assert accept(Followed(source=shop), earlier, {"c": {"shop": one}}).addresses == ["10.0.0.1"]


def test_can_misreport() -> None:
    """The journal is activation's; what a host says of itself is not, and bears another signature."""
    thief = Thief()
    lie = Status(
        host="h1", workspace=WORKSPACE, incarnation="i1", seq=1, at=NOW, agent="ok", generation=9,
        modules=(status.module(_replace(thief.own, promoted=NEW), None),),
    )  # fmt: skip
    subject = subjects.from_host(WORKSPACE, "h1", "status")
    data = envelope.seal_bytes(envelope.REPORT, msgspec.json.encode(lie), thief.signers.activation)
    with pytest.raises(Refused) as caught:
        reports.open_report(data, subject, lambda workspace, host: thief.key.public)
    assert caught.value.code == Code.REPORT_IMPERSONATION
    own = envelope.seal_bytes(envelope.REPORT, msgspec.json.encode(lie), thief.key)
    assert reports.open_report(own, subject, lambda workspace, host: thief.key.public) == lie


def test_can_generation_step() -> None:
    thief = Thief()
    step = admitted(command(thief.entry()))["generation-step"].values["step"]
    assert isinstance(step, int)
    for _ in range(5):
        highest = thief.state.generation + step
        thief.state = thief.check(
            thief.signers.sealed(thief.document(generation=highest, incarnation="i1"))
        ).state
        assert thief.state.generation == highest
    above = thief.entry(generation=thief.state.generation + 1)
    assert thief.ask(above) is Answer.CHANGE, "activation goes on from the host's own report"


# What is not


@pytest.mark.parametrize(("what", "name"), [(i, name) for i, names in CANNOT.items() for name in names])
def test_what_the_plan_denies_fails(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ATTACKS[name].run(monkeypatch)


def config(tmp_path: Any, **allow: Any) -> HostConfig:
    return HostConfig(
        host="h1", workspace=WORKSPACE, url="nats://127.0.0.1:1", creds=tmp_path, root=tmp_path, state_dir=tmp_path,
        allow=Allow(**{"modules": ("tiny",)} | allow),
    )  # fmt: skip


def refused(call: Any, *arguments: Any) -> Code | None:
    try:
        call(*arguments)
    except Refused as refusal:
        return refusal.code
    return None


def inspected(tmp_path: Any, **module: Any) -> Any:
    path = tmp_path / "p.lbm"
    path.write_bytes(tiny("1.1", **module))
    return package.inspect(path).manifest


def test_a_package_by_no_pinned_publisher_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, signers, pinned = (
        inspected(tmp_path),
        ("a" * 64,),
        WorkspaceRules(publishers={"tiny": ("b" * 64,)}),
    )
    check = install.check_allowed
    for rules in (pinned, WorkspaceRules(regulated=True)):
        with monkeypatch.context() as lenient:
            lenient.setattr(install, "check_publishers", lambda *_, **__: None)
            assert refused(check, found, signers, config(tmp_path), rules) is None
        assert refused(check, found, signers, config(tmp_path), rules) == Code.HOST_PUBLISHER
    assert refused(check, found, ("b" * 64,), config(tmp_path), pinned) is None
    assert refused(check, found, signers, config(tmp_path)) is None, (
        "on the way back no rule of the workspace is asked"
    )


def test_a_capability_that_the_owner_does_not_allow_is_refused(tmp_path: Any) -> None:
    found = inspected(tmp_path, capabilities=("CAP_NET_ADMIN",))
    allowed = config(tmp_path, capabilities=("CAP_NET_ADMIN",))
    assert refused(install.check_allowed, found, (), allowed) is None
    assert refused(install.check_allowed, found, (), config(tmp_path)) == Code.MANIFEST_CAPABILITY


def test_what_was_undone_here_once_is_quarantined_for_the_pair_that_failed() -> None:
    """`retry-failed`, from the failure itself: the trial fails, and the same is asked for again."""
    thief = Thief()
    entry = thief.entry()
    tried = transitions.begin_trial(transitions.accept(thief.own, entry), 0.3)
    refusal = Refused(Code.MODULE_UNHEALTHY, "it is not well").refusal
    thief.own = transitions.undo(transitions.roll_back(tried, refusal))
    assert thief.own.promoted == OLD
    _, why = outcome(thief, thief.signers.sealed(thief.document(_replace(entry, generation=6))))
    assert why is not None
    assert why.code == Code.HOST_QUARANTINED
