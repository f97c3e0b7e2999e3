"""What one host, one report or one mistake can do to a rollout, and no more than that."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest
from activation_world import OPERATOR, T0, World
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts import envelope, journal
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import WAY_BACK, Running
from loopback.contracts.messages import Gates, RolloutAbort, Verdict, Wave
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import MAX_PAST, MAX_REBIRTHS, Standing, State, WaveState
from loopback.services.activation import decide as rules
from loopback.services.activation import documents, facts, sizes
from loopback.services.activation.setbacks import FIRST_S, LONGEST_S, Setbacks
from loopback.services.activation.store import MAX_LINK

V1 = Running("1.0.0", "a" * 64, "d" * 64, 1)
EVERYBODY = (Wave(name="all", percent=100),)


def abort_envelope(world: World, rollout: str = "r1") -> envelope.Envelope:
    command = RolloutAbort(
        id="a", workspace="prod", issued_at=world.now, expires_at=world.now + timedelta(hours=1), rollout=rollout
    )  # fmt: skip
    return envelope.seal(envelope.COMMAND, msgspec.json.encode(command), OPERATOR)


# Hosts that lose their disk


@pytest.mark.parametrize("phase", [Phase.TRIAL, Phase.IDLE])
def test_a_host_that_is_reborn_again_and_again_fails_and_is_heard_no_more(phase: Phase) -> None:
    world = World(1)
    rollout = world.begin(waves=EVERYBODY, on_failure="halt")
    for turn in range(300):
        world.report("h0", phase, None, incarnation=f"i{turn}", seq=1)
        world.decide()
    progress = rollout.hosts["h0"]
    assert progress.standing is Standing.FAILED
    assert progress.failure is not None
    assert progress.failure.code is Code.HOST_INCARNATION
    assert progress.failure.next_step
    assert rollout.state is State.HALTED
    assert len(world.desired["h0"]) == 1 + MAX_REBIRTHS
    assert len(world.log) < 25
    assert len(world.workspace.hosts["h0"].past) <= MAX_PAST


def test_a_host_that_is_reborn_while_nobody_is_asked_fails_too() -> None:
    world = World(2)
    rollout = world.begin(waves=EVERYBODY)
    world.write("r1", journal.Paused(reason="lunch"))
    for turn in range(20):
        world.report("h0", Phase.IDLE, None, incarnation=f"i{turn}", seq=1)
    assert rollout.hosts["h0"].standing is Standing.FAILED
    assert "h0" not in rollout.again


def test_a_host_of_a_finished_rollout_is_told_again_three_times() -> None:
    world = World(1)
    rollout = world.begin(waves=EVERYBODY)
    assert world.finish() is State.DONE
    for turn in range(20):
        world.report("h0", Phase.IDLE, None, incarnation=f"new-{turn}", seq=1, empty=True)
        world.decide()
        world.report("h0", Phase.PROMOTED, V1, incarnation=f"new-{turn}", seq=2)
        world.decide()
    assert len(world.desired["h0"]) == 1 + MAX_REBIRTHS
    assert rollout.state is State.DONE
    assert rollout.hosts["h0"].standing is Standing.FAILED
    assert not rollout.attention


def test_a_new_rollout_counts_anew() -> None:
    world = World(1)
    world.begin(waves=EVERYBODY, on_failure="halt")
    for turn in range(10):
        world.report("h0", Phase.IDLE, None, incarnation=f"i{turn}", seq=1)
        world.decide()
    rollout = world.begin("r2", version="1.1.0", waves=EVERYBODY)
    assert world.report("h0", Phase.IDLE, None, incarnation="last", seq=1)
    world.decide()
    assert world.desired["h0"][-1].incarnation == "last"
    world.report("h0", Phase.PROMOTED, rollout.created.target, incarnation="last", seq=2)
    world.decide()
    assert rollout.state is State.DONE


def test_a_report_without_an_incarnation_is_of_the_one_that_is_known() -> None:
    world = World(1)
    world.begin()
    world.report("h0", Phase.TRIAL, None, incarnation="one", seq=5)
    for _ in range(5):
        assert not world.report("h0", Phase.TRIAL, None, incarnation="", seq=4)
    before = len(world.log)
    assert world.report("h0", Phase.PROMOTED, V1, incarnation="", seq=6)
    assert len(world.log) == before + 1


def test_old_incarnations_are_remembered_up_to_a_number() -> None:
    ledger = World(1).workspace.ledger("h0")
    for turn in range(1000):
        ledger.retire(f"i{turn}")
    assert list(ledger.past) == [f"i{n}" for n in range(1000 - MAX_PAST, 1000)]


# What is news once must not be news for ever


def test_a_host_that_vanishes_after_its_wave_is_done_is_no_news() -> None:
    world = World(4)
    rollout = world.begin()
    (canary,) = world.assigned()
    world.obey(canary)
    world.decide()
    before = len(world.log)
    world.lose(canary)
    assert len(world.log) == before, "folding it would change nothing, so it would come again"
    assert rollout.hosts[canary].standing is Standing.PROMOTED


def test_a_link_about_what_there_is_not_breaks_its_rollout_alone() -> None:
    world = World(2)
    bad = world.begin("r1")
    world.begin("r2", module="edge", policy=None)
    chain = documents.Chain.of(bad)
    for event in (
        journal.WaveStarted(wave=7),
        journal.Expired(hosts=("nobody",), refusal=Refusal(Code.HOST_LOST, "x")),
    ):
        assert fold(world.workspace, chain.seal(event, world.now, "").data) is None
    assert "link" in bad.broken
    assert "r1" not in world.workspace.attention
    assert rules.decide(world.workspace, bad, world.now, world.records) == ()
    assert world.finish("r2") is State.DONE


def test_a_wave_that_loses_its_last_success_while_it_soaks_has_failed() -> None:
    world = World(2)
    rollout = world.begin(
        waves=(Wave(name="all", percent=100, soak_s=30),), gates=Gates(max_failed=0.5), max_unavailable=1.0
    )
    good, doubtful = world.assigned()
    world.obey(good)
    world.report(doubtful, Phase.UNCONFIRMED, None, code=Code.HOST_UNCONFIRMED)
    world.decide()
    assert rollout.waves[0].state is WaveState.SOAKING
    world.report(good, Phase.PROMOTED, V1, health="degraded")
    world.wait(60)
    assert rollout.waves[0].state is WaveState.FAILED
    assert rollout.state is State.ROLLING_BACK


# Sizes


def test_what_hosts_say_is_journaled_short_and_carried_on_short() -> None:
    world = World(1)
    rollout = world.begin(waves=EVERYBODY)
    status = world.status("h0", Phase.REJECTED, Running("9" * 50_000, "p" * 50_000, "q" * 50_000, 3))
    module = msgspec.structs.replace(
        status.modules[0],
        refusal=Refusal(Code.HOST_EXPECTED, "r\x1b[31m" * 20_000, "n" * 20_000),
    )
    status = msgspec.structs.replace(status, modules=(module,))
    assert world.say(statuses=[status])
    assert len(world.log[-1]) < 8192
    world.decide()
    progress = rollout.hosts["h0"]
    assert progress.refusal is not None
    assert len(progress.refusal.reason.encode()) <= sizes.MAX_REASON
    assert "\x1b" not in progress.refusal.reason
    expected = world.desired["h0"][-1].modules[0].expected
    assert expected is not None
    assert len(expected.version.encode()) <= sizes.MAX_VERSION
    again = msgspec.structs.replace(status, seq=status.seq + 1)
    assert not world.say(statuses=[again]), "the very same, however long, is no news"


@given(st.text(max_size=3000), st.integers(8, 1024))
def test_a_shortened_text_fits_and_begins_as_it_did(said: str, most: int) -> None:
    short = sizes.text(said, most)
    assert len(short.encode()) <= most
    assert short.isprintable()
    if said.isprintable():
        assert said.startswith(short.removesuffix("…"))
        assert short == said or len(said.encode()) > most


def big(host: int) -> journal.Observation:
    return journal.Observation(
        host=f"h{host:05}", phase=Phase.REJECTED, generation=1, promoted=Running('"' * 200, "b" * 64),
        refusal=Refusal(Code.HOST_DISK, '"\\' * 512, '"\\' * 512),
    )  # fmt: skip


@pytest.mark.parametrize(
    "event",
    [
        journal.Observed(hosts=tuple(big(n) for n in range(600))),
        journal.Assigned(
            wave=0, not_after=T0,
            hosts=tuple(
                journal.Assignment(f"h{n}" * 30, n, Running('"' * 200, "b" * 64, '"' * 64, 10**400)) for n in range(900)
            ),
        ),
        journal.PresenceSeen(lost=tuple(f"{n:05}" + "ü" * 200 for n in range(4096))),
        journal.VerdictGiven(
            verdict=Verdict(
                rollout="r1", workspace="prod", service="eligibility", at=T0,
                refused={f"h{n:05}": Refusal(Code.ELIGIBILITY_KERNEL, "x" * 900) for n in range(2000)},
            )
        ),
        journal.VerdictGiven(
            verdict=Verdict(
                rollout="r1", workspace="prod", service="eligibility", at=T0,
                refused={f"h{n:05}" * 20: Refusal(Code.ELIGIBILITY_KERNEL, "x") for n in range(9000)},
            )
        ),
    ],
    ids=["observed", "assigned", "presence", "verdict", "huge verdict"],
)  # fmt: skip
def test_a_link_is_cut_by_its_bytes(event: journal.AnyEvent) -> None:
    def size(of: journal.AnyEvent) -> int:
        return len(
            journal.encode(journal.Link(rollout="r1", workspace="prod", seq=1, prev="", at=T0, event=of))
        )

    assert size(event) > MAX_LINK
    cut = sizes.bounded(event, MAX_LINK)
    assert MAX_LINK // 40 < size(cut) <= MAX_LINK or isinstance(cut, journal.VerdictGiven)
    assert size(cut) <= MAX_LINK
    if isinstance(event, journal.VerdictGiven) and isinstance(cut, journal.VerdictGiven):
        whole = cut.verdict.refused.keys() == event.verdict.refused.keys()
        assert whole or cut.verdict.refusal is not None, "no host may be let in for want of room"


def test_what_was_cut_off_is_still_news() -> None:
    world = World(600)
    rollout = world.begin(waves=EVERYBODY, max_unavailable=1.0, on_failure="halt", host_deadline_s=600.0)
    hosts = [h for h, p in rollout.hosts.items() if p.standing is Standing.ASSIGNED]
    statuses = [world.status(h, Phase.PROMOTED, rollout.created.target) for h in hosts]
    turns = 0
    while found := facts.events(world.workspace, statuses, [], []):
        world.write("r1", *(sizes.bounded(e, 40_000) for e in found["r1"]))
        turns += 1
        assert turns < 100
    assert turns > 1
    assert rollout.counts[Standing.PROMOTED] == 600


# Deadlines of whole rollouts


def test_a_draft_that_nobody_judges_is_canceled_and_says_who_was_silent() -> None:
    world = World(2)
    rollout = world.create()
    assert rules.due(rollout) == T0 + rules.VERDICTS_WITHIN
    world.say(verdicts=[Verdict(rollout="r1", workspace="prod", service="delivery", at=world.now)])
    assert world.wait(3599) == []
    world.wait(1)
    assert rollout.state is State.CANCELED
    assert rollout.refusal is not None
    assert "no word from eligibility within 60 minutes" in rollout.refusal.reason
    assert "eligibility" in rollout.refusal.next_step
    assert not world.say(
        verdicts=[Verdict(rollout="r1", workspace="prod", service="eligibility", at=world.now)]
    )


def test_a_scope_that_ends_mid_way_halts_and_takes_nobody_back() -> None:
    world = World(2)
    rollout = world.begin(not_after=T0 + timedelta(minutes=10), on_failure="rollback", host_deadline_s=30)
    (canary,) = world.assigned()
    world.now += timedelta(minutes=11)
    world.obey(canary)
    world.decide()
    assert rollout.state is State.HALTED
    assert rollout.refusal is not None
    assert rollout.refusal.code is Code.SCOPE_EXPIRED
    assert "abort r1" in rollout.refusal.next_step
    assert world.wanted(canary) == V1


@pytest.mark.parametrize("asked", [True, False])
def test_a_return_carries_the_abort_that_asked_for_it(asked: bool) -> None:
    world = World(1)
    rollout = world.begin(waves=EVERYBODY, on_failure="halt")
    sealed = abort_envelope(world) if asked else None
    world.write("r1", journal.RollingBack(reason="no", envelope=sealed))
    world.decide()
    entry = world.desired["h0"][-1].modules[0]
    assert entry.returning
    assert entry.abort == sealed
    assert world.desired["h0"][0].modules[0].abort is None
    assert rollout.abort == sealed


def test_a_rollout_that_returns_when_hosts_no_longer_may_is_over_and_names_them() -> None:
    world = World(3)
    rollout = world.begin(waves=EVERYBODY, max_unavailable=1.0, not_after=T0 + timedelta(hours=1),
                          host_deadline_s=7 * 86400.0, trial_s=1.0)  # fmt: skip
    world.obey("h0")
    world.write("r1", journal.RollingBack(reason="no", operators=("ada",)))
    world.decide()
    world.report("h0", Phase.REMOVED, None)
    end = T0 + timedelta(hours=1) + WAY_BACK
    assert rules.due(rollout) == end
    assert world.wait((end - world.now).total_seconds() - 1) == []
    (over,) = world.wait(1)
    assert isinstance(over, journal.RollbackIncomplete)
    assert sorted(over.hosts) == ["h1", "h2"]
    assert rollout.state is State.ROLLBACK_INCOMPLETE
    assert {h: str(p.standing) for h, p in rollout.hosts.items()} == {
        "h0": "returned", "h1": "stranded", "h2": "stranded",
    }  # fmt: skip
    assert "r1" not in world.workspace.attention


def test_an_abort_keeps_the_way_back_open_for_a_day_from_its_signing() -> None:
    world = World(1)
    rollout = world.begin(waves=EVERYBODY, not_after=T0 + timedelta(hours=1), on_failure="halt")
    world.report("h0", Phase.ROLLED_BACK, None, code=Code.MODULE_DIED)
    world.decide()
    assert rollout.state is State.HALTED
    world.now += timedelta(days=5)
    world.write("r1", journal.RollingBack(reason="no", operators=("ada",), envelope=abort_envelope(world)))
    (told,) = world.decide()
    assert isinstance(told, journal.Assigned) and told.returning
    world.report("h0", Phase.REMOVED, None)
    world.decide()
    assert rollout.state is State.ROLLED_BACK


# Setbacks


def test_what_fails_is_left_alone_longer_each_time_and_forgotten_when_it_went_well() -> None:
    now = 0.0
    setbacks = Setbacks(lambda: now)
    waits = [setbacks.failed("r1") for _ in range(40)]
    assert waits[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert waits[-1] == LONGEST_S == max(waits)
    assert setbacks.waits("r1")
    assert not setbacks.waits("r2")
    assert setbacks.seconds(30.0) == 30.0
    assert setbacks.seconds(1000.0) == LONGEST_S
    now = LONGEST_S
    assert not setbacks.waits("r1")
    assert setbacks.seconds(30.0) == 30.0
    setbacks.went_well("r1")
    assert setbacks.failed("r1") == FIRST_S
