"""Hosts refuse a scope older than the newest they obeyed for a module. No honest flow of activation sends one forward."""

from __future__ import annotations

from datetime import datetime, timedelta

from activation_world import World, start_command
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loopback.contracts import journal
from loopback.contracts.codes import Code, Refused
from loopback.contracts.envelope import payload_of
from loopback.contracts.messages import RolloutStart, Selector, Wave, decode_command
from loopback.contracts.reports import Phase
from loopback.contracts.rolloutstate import Standing, State
from loopback.services.activation import checks

ALL = (Wave(name="all", percent=100),)
HOSTS = ("h0", "h1", "h2")


def begin(world: World, name: str, hosts: tuple[str, ...], signed: datetime, *, checked: bool = True) -> bool:
    """Start a rollout as the command handler does; whether it was accepted."""
    selector = Selector(hosts=hosts)
    start = start_command(name, signed, selector=selector, waves=ALL)
    try:
        checks.peers(world.workspace, start, hosts)
        if checked:
            checks.order(world.workspace, start, hosts)
    except Refused as refused:
        assert refused.code is Code.COMMAND_CONFLICT
        return False
    world.begin(name, selector=selector, waves=ALL, issued_at=signed)
    return True


def forward(world: World, host: str) -> list[datetime]:
    """When each start was signed that this host was asked to go forward by, in the order in which it was asked."""
    found = []
    for state in world.desired.get(host, []):
        for entry in state.modules:
            if entry.generation == state.generation and not entry.returning:
                start = decode_command(payload_of(entry.scope))
                assert isinstance(start, RolloutStart)
                found.append(start.issued_at)
    return found


def test_two_starts_that_arrive_in_another_order_than_they_were_signed_in() -> None:
    for checked in (False, True):
        world = World(1)
        signed = world.now
        assert begin(world, "later", ("h0",), signed, checked=checked)
        world.finish("later")
        accepted = begin(world, "earlier", ("h0",), signed - timedelta(seconds=30), checked=checked)
        assert accepted is not checked
        told = forward(world, "h0")
        assert (told == sorted(told)) is checked, "without the check the host is sent an older scope"


def test_a_host_that_lost_its_disk_is_told_again_by_the_rollout_that_told_it_last() -> None:
    world = World(1)
    begin(world, "r1", ("h0",), world.now)
    world.finish("r1")
    world.wait(60)
    begin(world, "r2", ("h0",), world.now)
    world.finish("r2")
    world.report("h0", Phase.IDLE, None, incarnation="two", empty=True)
    world.decide()
    last = world.desired["h0"][-1].modules[0]
    assert last.rollout == "r2"
    assert not world.rollout("r1").again


def test_a_resumed_rollout_goes_on_with_its_own_scope_and_nobody_came_between() -> None:
    world = World(2)
    begin(world, "r1", ("h0", "h1"), world.now)
    world.write("r1", journal.Paused(reason="lunch", operators=("ada",)))
    world.wait(60)
    assert not begin(world, "r2", ("h0",), world.now), "a paused rollout holds its hosts"
    world.write("r1", journal.Resumed(operators=("ada",)))
    world.finish("r1")
    assert begin(world, "r3", ("h0",), world.now)
    told = forward(world, "h0")
    assert told == sorted(told)


KINDS = ["start"] * 5 + ["obey"] * 5 + [
    "fail", "reborn", "pause", "resume", "abort", "wait", "expect", "push",
]  # fmt: skip
steps = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.integers(0, 120)), min_size=5, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(steps)
@example([("start", 0, 0), ("obey", 0, 0), ("start", 0, 10)])  # fails without `checks.order`
def test_whatever_happens_no_host_is_asked_forward_by_an_older_scope(
    taken: list[tuple[str, int, int]],
) -> None:
    world = World({host: {} for host in HOSTS})
    lives = dict.fromkeys(HOSTS, 0)
    for number, (step, which, amount) in enumerate(taken):
        host = HOSTS[which]
        live = [r for r in world.workspace.rollouts.values() if r.state in (State.RUNNING, State.PAUSED)]
        match step:
            case "start":
                hosts = HOSTS[which:] if amount % 2 else (host,)
                begin(world, f"r{number}", hosts, world.now - timedelta(seconds=amount))
            case "obey":
                world.obey(host)
            case "fail":
                for rollout in live:
                    progress = rollout.hosts.get(host)
                    if progress and progress.standing is Standing.ASSIGNED:
                        world.report(host, Phase.ROLLED_BACK, progress.origin, code=Code.MODULE_DIED,
                                     incarnation=str(lives[host]))  # fmt: skip
            case "expect":
                world.report(
                    host, Phase.REJECTED, None, code=Code.HOST_EXPECTED, incarnation=str(lives[host])
                )
            case "reborn":
                lives[host] += 1
                world.report(host, Phase.IDLE, None, empty=True, document=0, incarnation=str(lives[host]))
            case "push":
                world.report(host, Phase.IDLE, None, document=10_000 * number, incarnation=str(lives[host]))
            case "pause" if live and live[0].state is State.RUNNING:
                world.write(live[0].id, journal.Paused(reason="p", operators=("ada",)))
            case "resume" if live and live[0].state is State.PAUSED:
                world.write(live[0].id, journal.Resumed(operators=("ada",)))
            case "abort" if live:
                world.write(live[0].id, journal.RollingBack(reason="a", operators=("ada",)))
            case "wait":
                world.wait(amount * 5)
            case _:
                pass
        world.decide()
    for host in HOSTS:
        told = forward(world, host)
        assert told == sorted(told)
