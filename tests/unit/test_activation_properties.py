"""What holds for every rollout, whatever its hosts do."""

from __future__ import annotations

from typing import Any

from activation_world import World
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback.contracts import journal
from loopback.contracts.codes import Code
from loopback.contracts.desired import Running
from loopback.contracts.messages import Gates, Wave
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import FINAL, Rollout, Standing, State, WaveState, Workspace
from loopback.services.activation import decide as rules

OLD = Running("1.0.0", "a" * 64, "d" * 64, 1)
NEW = Running("1.1.0", "b" * 64, "d" * 64, 1)

shapes = st.sampled_from(
    [
        (Wave(name="canary", count=1), Wave(name="rest", percent=100)),
        (Wave(name="all", percent=100, soak_s=30),),
        (Wave(name="one", count=1, soak_s=60), Wave(name="half", percent=50, soak_s=5), Wave(name="b", percent=100)),
    ]
)  # fmt: skip
Walk = tuple[World, Rollout, dict[str, Running | None]]


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    """A rollout from OLD to NEW whose hosts do whatever hosts may do, driven until it ends."""
    world = World(draw(st.integers(1, 7)))
    world.begin("r0")
    world.finish("r0")
    world.most_in_flight = 0
    rollout = world.begin(
        "r1",
        version="1.1.0",
        waves=draw(shapes),
        gates=Gates(
            max_failed=draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])), min_sample=draw(st.integers(1, 3))
        ),
        max_unavailable=draw(st.sampled_from([0.1, 0.4, 1.0])),
        host_deadline_s=100.0,
    )
    has: dict[str, Running | None] = dict.fromkeys(world.labels, OLD)
    for _ in range(60):
        if rollout.state in FINAL:
            break
        if rollout.state is State.PAUSED:
            world.write("r1", draw(st.sampled_from([journal.Resumed(), journal.RollingBack(reason="no")])))
        elif rollout.state is State.RUNNING and draw(st.integers(0, 9)) == 0:
            world.write("r1", journal.Paused(reason="person", operators=("ada",)))
        for host in list(rollout.hosts):
            _act(draw, world, rollout, host, has)
        world.decide()
        world.wait(draw(st.sampled_from([1, 40, 101])))
    while rollout.state not in FINAL:  # the walk was long; from here on everybody obeys
        if rollout.state is State.PAUSED:
            world.write("r1", journal.RollingBack(reason="enough"))
        for host, progress in rollout.hosts.items():
            if progress.standing in (Standing.ASSIGNED, Standing.RETURNING):
                has[host] = world.wanted(host)
                world.report(host, Phase.PROMOTED, has[host])
        world.wait(101)
    return world, rollout, has


def _act(draw: st.DrawFn, world: World, rollout: Rollout, host: str, has: dict[str, Running | None]) -> None:
    progress = rollout.hosts[host]
    wanted = world.wanted(host)
    if progress.standing is Standing.ASSIGNED:
        match draw(
            st.sampled_from(["good"] * 4 + ["back", "unconfirmed", "reject", "expected", "silent", "lost"])
        ):
            case "good":
                has[host] = wanted
                world.report(host, Phase.PROMOTED, wanted)
            case "back":
                world.report(host, Phase.ROLLED_BACK, has[host], code=Code.MODULE_DIED)
            case "unconfirmed":
                world.report(host, Phase.UNCONFIRMED, has[host], code=Code.HOST_UNCONFIRMED)
            case "reject":
                world.report(host, Phase.REJECTED, has[host], code=Code.HOST_DISK)
            case "expected":
                world.report(host, Phase.REJECTED, has[host], code=Code.HOST_EXPECTED)
            case "lost":
                world.lose(host)
            case _:
                pass
    elif progress.standing is Standing.RETURNING:
        if draw(st.integers(0, 3)):
            has[host] = wanted
            world.report(host, Phase.PROMOTED, wanted)
    elif progress.standing is Standing.PROMOTED and draw(st.integers(0, 15)) == 0:
        world.report(host, Phase.PROMOTED, has[host], health="degraded")


def picture(workspace: Workspace) -> Any:
    """Everything a workspace's state holds, as plain values."""
    plain = (str, int, float, bool, type(None), tuple, frozenset)

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): of(v) for k, v in value.items()}
        if hasattr(value, "__dict__") and not isinstance(value, plain):
            return {k: of(v) for k, v in vars(value).items()}
        if hasattr(type(value), "__slots__") and type(value).__module__.endswith("rolloutstate"):
            return {k: of(getattr(value, k)) for k in type(value).__slots__} or repr(value)
        if isinstance(value, list):
            return [of(v) for v in value]
        return repr(value)

    return of(workspace)


@settings(max_examples=150, deadline=None)
@given(walks())
def test_every_rollout_ends_with_each_host_at_old_or_new(walk: Walk) -> None:
    world, rollout, has = walk
    assert rollout.state in FINAL
    assert set(has.values()) <= {OLD, NEW}
    if rollout.state is State.ROLLED_BACK:
        assert all(has[h] == world.wanted(h) == OLD for h in rollout.hosts)
    if rollout.state is State.DONE:
        for wave in rollout.waves:
            promoted = [h for h in wave.hosts if rollout.hosts[h].standing is Standing.PROMOTED]
            assert promoted or not wave.hosts, "a wave of errors is never complete"
            assert all(has[h] == NEW for h in promoted)
            assert wave.state is WaveState.DONE
    assert world.most_in_flight <= rules.capacity(rollout)


@settings(max_examples=60, deadline=None)
@given(walks(), st.data())
def test_folding_the_journal_gives_the_same_state_however_it_is_cut_and_repeated(
    walk: Walk, data: st.DataObject
) -> None:
    world, _, _ = walk
    other = Workspace("prod")
    position = 0
    while position < len(world.log):
        size = data.draw(st.integers(1, 40))
        back = data.draw(st.integers(0, min(position, 3)))
        for link in world.log[position - back : position + size]:
            fold(other, link)
        position += size
    # The workspace's own chain is over what is stored, and a link that is stored twice is two of them.
    assert other.links >= world.workspace.links == len(world.log)
    other.links, other.head = world.workspace.links, world.workspace.head
    assert picture(other) == picture(world.workspace)


@settings(max_examples=60, deadline=None)
@given(walks())
def test_deciding_again_after_it_is_folded_says_nothing_new(walk: Walk) -> None:
    """At every prefix of the journal: decide until quiet, and then once more without effect."""
    world, _, _ = walk
    other = World(dict(world.labels))
    for data in world.log:
        fold(other.workspace, data)
        other.now = journal.decode(data).at
        for rollout in other.workspace.rollouts.values():
            once = rules.decide(other.workspace, rollout, other.now, other.records)
            assert rules.decide(other.workspace, rollout, other.now, other.records) == once
    assert other.decide() == []


@settings(max_examples=100, deadline=None)
@given(walks())
def test_counts_are_what_counting_gives(walk: Walk) -> None:
    _, rollout, _ = walk
    for wave in rollout.waves:
        for standing in Standing:
            real = sum(rollout.hosts[h].standing is standing for h in wave.hosts)
            assert wave.counts[standing] == real
    assert sum(rollout.counts.values()) == len(rollout.hosts)


def test_nine_thousand_hosts_take_time_in_proportion() -> None:
    """Counted in decisions and links rather than seconds: none of them looks at the whole fleet again and again."""
    world = World(9000)
    rollout = world.begin(
        max_unavailable=0.1, waves=(Wave(name="canary", count=1), Wave(name="rest", percent=100))
    )
    while rollout.state is State.RUNNING:
        flying = [h for _, h, g in rollout.deadlines if rollout.hosts[h].standing is Standing.ASSIGNED]
        world.say(statuses=[world.status(h, Phase.PROMOTED, world.wanted(h)) for h in flying])
        world.decide()
    assert rollout.state is State.DONE
    assert len(world.log) < 60
    assert world.most_in_flight == 900
