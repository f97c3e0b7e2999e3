"""Kill the agent anywhere: what is promoted is the old or the new state, and everything in hand comes to an end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import eventually

from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import DesiredModule, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.reports import FINAL, Phase
from loopback.host import proc, transitions, watchdog
from loopback.host.disk import Disk
from loopback.host.state import HostState, ModuleState, ModuleStore, Store, version_name

NOW = datetime(2026, 11, 1, tzinfo=UTC)
OLD = Running(version="1.0", package="a" * 64, policy="b" * 64, policy_serial=1)
NEW = Running(version="1.1", package="c" * 64, policy="d" * 64, policy_serial=2)
FAULT = Refusal(Code.MODULE_UNHEALTHY, "it is not well")

Change = Callable[[ModuleState], ModuleState]


def entry(
    running: Running | None, generation: int, *, returning: bool = False, rollout: str = "r1"
) -> DesiredModule:
    return DesiredModule(
        module="tiny", running=running, generation=generation, rollout=rollout, scope=Envelope("", "", ()),
        returning=returning,
    )  # fmt: skip


def forward(target: Running, generation: int, *, returning: bool = False) -> list[Change]:
    """The writes of a change that passes, in order."""
    return [
        lambda s: transitions.accept(s, entry(target, generation, returning=returning)),
        lambda s: transitions.step(s, "download", Phase.DOWNLOADING),
        lambda s: transitions.step(s, "verify", Phase.VERIFYING),
        lambda s: transitions.signed(s, target.package, ("f" * 64,)),
        lambda s: transitions.step(s, "stage", Phase.STAGED),
        lambda s: transitions.begin_trial(s, 1.0),
        lambda s: transitions.trial_process(s, 7, 9),
        lambda s: transitions.step(s, "commit", Phase.TRIAL),
        lambda s: transitions.step(s, "confirm", Phase.TRIAL),
        transitions.promote,
    ]


def failing(target: Running, generation: int) -> list[Change]:
    """The writes of a change that fails on trial."""
    return [
        *forward(target, generation)[:-1],
        lambda s: transitions.roll_back(s, FAULT),
        transitions.undo,
    ]


def removal(generation: int) -> list[Change]:
    return [
        lambda s: transitions.accept(s, entry(None, generation)),
        lambda s: transitions.step(s, "remove", Phase.ACCEPTED),
        transitions.removed,
    ]


def start(promoted: Running | None) -> ModuleState:
    if promoted is None:
        return ModuleState(module="tiny")
    return ModuleState(
        module="tiny", generation=1, phase=Phase.PROMOTED, target=promoted, promoted=promoted, serial_floor=1
    )


@pytest.mark.parametrize("promoted", [None, OLD])
@pytest.mark.parametrize("kill", range(12))
def test_a_kill_between_any_two_writes_of_a_change_ends_in_old_or_new(
    promoted: Running | None, kill: int
) -> None:
    state = start(promoted)
    writes = forward(NEW, 2)
    for write in writes[:kill]:
        state = write(state)
    after = transitions.recover(state)
    assert after.trial is None
    assert after.promoted == (NEW if kill >= len(writes) else promoted)
    if kill == 0 or kill >= len(writes):
        assert after == state
    elif state.trial is None:
        assert after.phase not in FINAL, "nothing was done yet, so it goes on when asked again"
        assert after.attempts == 1
    else:
        assert (after.phase, after.quarantine) == (Phase.UNCONFIRMED, ())
        assert transitions.recover(after) == after


@pytest.mark.parametrize("kill", range(13))
def test_a_kill_while_rolling_back_still_ends_in_the_decision_that_was_taken(kill: int) -> None:
    state = start(OLD)
    writes = failing(NEW, 2)
    for write in writes[:kill]:
        state = write(state)
    after = transitions.recover(state)
    assert (after.promoted, after.trial) == (OLD, None)
    if kill >= len(writes) - 1:
        assert (after.phase, after.refusal) == (Phase.ROLLED_BACK, FAULT)
        assert transitions.quarantined(after, NEW) is not None
        assert transitions.quarantined(after, OLD) is None


def test_a_removal_that_was_interrupted_goes_on() -> None:
    state = start(OLD)
    for write in removal(2)[:2]:
        state = write(state)
    after = transitions.recover(state)
    assert (after.promoted, after.step, transitions.finished(after)) == (OLD, "remove", False)
    assert transitions.removed(after).promoted is None


def test_a_target_that_is_interrupted_again_and_again_is_given_up() -> None:
    state = start(OLD)
    for generation in range(2, 2 + transitions.MAX_ATTEMPTS):
        for write in forward(NEW, generation)[:7]:
            state = write(state)
        state = transitions.recover(state)
    assert (state.phase, state.promoted) == (Phase.LOOP_ABORTED, OLD)
    assert state.refusal is not None
    assert state.refusal.code == Code.HOST_LOOP


def test_another_target_starts_with_a_clean_count() -> None:
    state = start(OLD)
    for write in forward(NEW, 2)[:7]:
        state = write(state)
    state = transitions.accept(transitions.recover(state), entry(OLD, 3))
    assert state.attempts == 0


def test_a_target_that_was_never_tried_is_not_given_up_for_another_ones_interruptions() -> None:
    state = msgspec.structs.replace(start(OLD), target=NEW, attempts=transitions.MAX_ATTEMPTS)
    other = msgspec.structs.replace(NEW, version="1.2", package="e" * 64)
    refused = transitions.reject(state, Refusal(Code.HOST_EXPECTED, "x"), entry(other, 3))
    assert (refused.target, refused.attempts) == (other, 0)
    same = transitions.reject(state, Refusal(Code.HOST_LOOP, "x"), entry(NEW, 3))
    assert same.attempts == transitions.MAX_ATTEMPTS, "asking again does not forgive it"
    assert transitions.settle(state, entry(OLD, 3, rollout="r3")).attempts == 0


def test_a_reason_is_kept_no_longer_than_a_report_has_room_for() -> None:
    state = transitions.reject(start(OLD), Refusal(Code.MODULE_DIED, "x" * 10**6, "\udcff" * 10**4))
    assert state.refusal is not None
    assert len(state.refusal.reason) == len(state.refusal.next_step) == transitions.MAX_REASON
    assert len(msgspec.json.encode(state)) < 10_000


@given(st.data())
def test_no_walk_of_changes_kills_and_returns_ends_between_two_states(data: st.DataObject) -> None:
    """Any sequence of changes, each cut off anywhere by a kill, by a failure, or not at all."""
    state, generation = start(None), 1
    targets = [
        Running(version=f"1.{n}", package=str(n) * 64, policy=str(n) * 64, policy_serial=n)
        for n in range(1, 6)
    ]
    for _ in range(data.draw(st.integers(1, 8))):
        generation += 1
        before = state.promoted
        kind = data.draw(st.sampled_from(["pass", "fail", "remove", "return"]))
        if kind == "return":
            if not state.previous_rollout:
                continue
            target = state.previous
        else:
            target = data.draw(st.sampled_from(targets))
        if kind == "remove" or target is None:
            writes, after_all = removal(generation), None
        elif kind == "fail":
            writes, after_all = failing(target, generation), before
        else:
            writes, after_all = forward(target, generation, returning=kind == "return"), target
        cut = data.draw(st.integers(0, len(writes)))
        for write in writes[:cut]:
            state = write(state)
            assert state.promoted in (before, after_all)
            assert msgspec.json.decode(msgspec.json.encode(state), type=ModuleState) == state
        if cut < len(writes) or data.draw(st.booleans()):
            state = transitions.recover(state)
        assert state.promoted == (after_all if cut == len(writes) else before)
        assert state.trial is None
        assert state.generation in (generation, generation - 1) or cut == 0
        assert state.serial_floor >= max((state.promoted.policy_serial if state.promoted else 0), 0)


def test_the_way_back_is_remembered_for_the_rollout_that_changed_it() -> None:
    state = start(OLD)
    for write in forward(NEW, 2):
        state = write(state)
    assert (state.previous, state.previous_rollout) == (OLD, "r1")
    for write in forward(OLD, 3, returning=True):
        state = write(state)
    assert (state.promoted, state.previous, state.previous_rollout) == (OLD, None, "")
    assert state.serial_floor == 2, "coming back does not lower the floor"


@pytest.mark.parametrize(
    ("promoted", "code", "policy"),
    [
        (None, Code.MODULE_DIED, None),
        (OLD, Code.MODULE_DIED, None),
        (OLD, Code.POLICY_INVALID, NEW.policy),
        (msgspec.structs.replace(OLD, package=NEW.package), Code.MODULE_UNHEALTHY, NEW.policy),
    ],
)
def test_quarantine_names_the_package_or_the_pair(
    promoted: Running | None, code: Code, policy: str | None
) -> None:
    state = start(promoted)
    for write in forward(NEW, 2)[:-1]:
        state = write(state)
    state = transitions.undo(transitions.roll_back(state, Refusal(code, "x")))
    (found,) = state.quarantine
    assert (found.package, found.policy) == (NEW.package, policy)


@pytest.mark.parametrize("code", [Code.HOST_DISK, Code.HOST_UNCONFIRMED, Code.KERNEL_UNSUPPORTED])
def test_what_is_nobodys_fault_quarantines_nothing(code: Code) -> None:
    state = start(OLD)
    for write in forward(NEW, 2)[:-1]:
        state = write(state)
    state = transitions.undo(transitions.roll_back(state, Refusal(code, "x")))
    assert state.quarantine == ()
    assert state.phase is (Phase.UNCONFIRMED if code is Code.HOST_UNCONFIRMED else Phase.ROLLED_BACK)


# the disk


class Killed(BaseException):
    """SIGKILL, as far as the code below can see."""


class DyingDisk(Disk):
    """Dies before its n-th change, or fails at it with an error of the disk."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left = at
        self.error = error

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def write(self, path: Path, data: bytes) -> None:
        self._count()
        super().write(path, data)

    def link(self, path: Path, target: str | None) -> None:
        self._count()
        super().link(path, target)


@given(at=st.integers(0, 40))
@settings(max_examples=41, deadline=None)
def test_a_kill_before_any_change_of_the_disk_leaves_old_or_new_and_links_that_agree(
    tmp_path_factory: pytest.TempPathFactory, at: int
) -> None:
    folder = tmp_path_factory.mktemp("walk")
    calm = Store(Disk(), folder)
    calm.open(lambda: "i", NOW)
    calm.module("tiny").change(lambda _: start(OLD))
    dying = Store(DyingDisk(at, Killed()), folder).module("tiny")
    finished = False
    try:
        for write in forward(NEW, 2):
            dying.change(write)
        finished = True
    except Killed:
        pass
    own = calm.module("tiny")
    state = own.change(transitions.recover)
    assert state.promoted in (OLD, NEW)
    assert not finished or state.promoted == NEW
    assert os.readlink(own.folder / "current") == f"versions/{version_name(state.promoted)}"  # noqa: PTH115  as it is
    assert not (own.folder / "trial").is_symlink()


def test_a_full_disk_is_a_refusal_and_leaves_what_was_there(tmp_path: Path) -> None:
    calm = Store(Disk(), tmp_path)
    calm.open(lambda: "i", NOW)
    calm.module("tiny").change(lambda _: start(OLD))
    before = calm.module("tiny").read()

    class Full(Disk):
        def write(self, path: Path, data: bytes) -> None:
            super().write(Path("/dev/full/x"), data)

    with pytest.raises(Refused) as caught:
        Store(Full(), tmp_path).module("tiny").change(forward(NEW, 2)[0])
    assert caught.value.code == Code.HOST_DISK
    assert calm.module("tiny").read() == before


def test_a_damaged_state_is_refused_and_not_taken_for_a_new_host(tmp_path: Path) -> None:
    store = Store(Disk(), tmp_path)
    first = store.open(lambda: "first", NOW)
    assert store.open(lambda: "second", NOW) == first == HostState(incarnation="first", since=NOW)
    (tmp_path / "state.json").write_bytes(b'{"incarnation": "fi')
    with pytest.raises(Refused) as caught:
        store.open(lambda: "third", NOW)
    assert caught.value.code == Code.HOST_DISK


def test_a_write_replaces_a_file_as_a_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    disk = Disk()
    disk.write(tmp_path / "a", b"1")
    disk.write(tmp_path / "a", b"2")
    assert disk.read(tmp_path / "a") == b"2"
    assert disk.names(tmp_path) == ["a"]
    assert disk.read(tmp_path / "b") is None
    disk.remove(tmp_path / "b")
    disk.link(tmp_path / "l", "a")
    disk.link(tmp_path / "l", "b")
    assert not disk.exists(tmp_path / "l")
    disk.link(tmp_path / "l", None)
    assert disk.names(tmp_path) == ["a"]


# the watchdog


@pytest.fixture
def on_trial(tmp_path: Path) -> ModuleStore:
    store = ModuleStore(Disk(), tmp_path / "tiny", "tiny")
    store.change(lambda _: start(OLD))
    for write in forward(NEW, 2)[:6]:
        store.change(write)
    return store


def test_the_watchdog_ends_exactly_the_process_on_trial_and_undoes_it_once(on_trial: ModuleStore) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        on_trial.change(lambda s: transitions.trial_process(s, process.pid, proc.started_at(process.pid)))
        assert watchdog.undo_trial(on_trial, 2)
        assert process.wait(60) == -9
    state = on_trial.read()
    assert (state.phase, state.promoted, state.trial) == (Phase.UNCONFIRMED, OLD, None)
    assert not watchdog.undo_trial(on_trial, 2)
    assert on_trial.read() == state


def test_the_watchdog_leaves_another_process_of_the_same_id_alone(on_trial: ModuleStore) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        on_trial.change(lambda s: transitions.trial_process(s, process.pid, 1))
        assert watchdog.undo_trial(on_trial, 2)
        assert process.poll() is None
        process.kill()


def test_the_watchdog_leaves_another_generation_alone(on_trial: ModuleStore) -> None:
    assert not watchdog.undo_trial(on_trial, 1)
    assert on_trial.read().trial is not None


async def test_the_watchdog_acts_when_its_agent_is_gone(on_trial: ModuleStore) -> None:
    """The agent of this story starts its watchdog and dies; nobody but the watchdog is left."""
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-P', '-m', 'loopback.host.watchdog', *sys.argv[1:]],"
        " stdout=subprocess.PIPE, start_new_session=True)\n"
        "assert p.stdout.readline() == b'ready\\n'\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [str(on_trial.folder), "tiny", "2", "0.5"]
    agent = subprocess.run([sys.executable, "-c", code, *arguments], check=False)  # noqa: ASYNC221  it is short
    assert agent.returncode == -9
    await eventually(lambda: on_trial.read().trial is None)
    state = on_trial.read()
    assert (state.phase, state.promoted) == (Phase.UNCONFIRMED, OLD)
    assert state.refusal is not None
    assert "watchdog" in state.refusal.reason
    assert transitions.recover(state) == state


async def test_the_watchdog_goes_when_the_trial_is_over(on_trial: ModuleStore) -> None:
    arguments = [str(on_trial.folder), "tiny", "2", "60"]
    command = [sys.executable, "-P", "-m", "loopback.host.watchdog", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220  it is short
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        on_trial.change(transitions.promote)
        await eventually(lambda: process.poll() is not None)
        assert process.returncode == 0
    assert on_trial.read().promoted == NEW


def test_the_state_on_disk_is_plain_json_for_people(on_trial: ModuleStore) -> None:
    found = json.loads((on_trial.folder / "state.json").read_text())
    assert found["promoted"]["version"] == "1.0"
    assert found["trial"]["running"]["version"] == "1.1"
