"""What a host knows of itself, on disk: the only truth. Written before each step is taken, and durable when written.

    state_dir/state.json                        HostState
    state_dir/tuf/  trust/  downloads/  policies/<digest>.json
    state_dir/contents/<digest>                 of policies that name their content instead of holding it
    state_dir/policies/<digest>.sets.json       what fills a policy's sets, as its module took it last
    state_dir/sets/<workspace>.<source>.json    roster.Followed
    state_dir/modules/<module>/state.json       ModuleState, shared with the watchdog under `lock`
    state_dir/modules/<module>/versions/<version>-<digest12>/
    state_dir/modules/<module>/current, trial   links into versions/, derived from state.json
    state_dir/modules/<module>/data/            the module's own

Reading never fails for a missing file: that is a new host, with a new incarnation.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import Running
from loopback.contracts.reports import Phase, Witness
from loopback.host.disk import Disk

_S = TypeVar("_S", bound=msgspec.Struct)
SEQUENCE_BLOCK: Final = 1024  # report numbers reserved by one write, so that a report costs no fsync


class Trial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change on trial. `pid` and `pid_start` (clock ticks since boot) name the process that runs it."""

    running: Running
    generation: int
    trial_s: float
    package_changed: bool
    pid: int = 0
    pid_start: int = 0


class Quarantined(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What failed here and is not tried again: a package with any policy (`policy` is None), or the pair."""

    package: str
    policy: str | None = None
    refusal: Refusal


class ModuleState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One module. `generation`, `rollout`, `target`, `returning`, `step` speak of the entry in hand or finished last.

    `scope` is the digest of the operator's command that the target follows from. `previous` is what `promoted` replaced during
    rollout `previous_rollout`, by the command of digest `previous_scope`; `attempts` counts how often the target was
    interrupted; `serial_floor` is the highest policy serial ever promoted here, that of `floor_policy`; `signers` maps a
    package's digest to the ids of the keys that signed its release. `scope_at` is when the newest rollout that was obeyed
    forward was signed.
    """

    module: str
    generation: int = 0
    rollout: str = ""
    scope: str = ""
    scope_at: datetime | None = None
    phase: Phase = Phase.IDLE
    step: str = ""
    target: Running | None = None
    returning: bool = False
    attempts: int = 0
    refusal: Refusal | None = None
    promoted: Running | None = None
    previous: Running | None = None
    previous_rollout: str = ""
    previous_scope: str = ""
    trial: Trial | None = None
    quarantine: tuple[Quarantined, ...] = ()
    serial_floor: int = 0
    floor_policy: str | None = None
    signers: dict[str, tuple[str, ...]] = {}


class HostState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The host. `document` is the digest of the desired state of `generation`; `reports` the numbers reserved so far.

    `clock_floor` is the latest time that an operator signed for; `record_at` that of the newest host record.
    `since` is when this incarnation began by the host's own clock (None: before agents remembered that).
    `witnesses` are heads of the workspace's journal, oldest first; the last is the newest (see `witness`),
    and `witnessed_by` the ids of the keys that signed the desired state it came with. `workspace` is where all this holds, and
    `machine` a salted digest of the machine that it was made on (see `identity`); empty before agents kept them.
    """

    incarnation: str
    since: datetime | None = None
    generation: int = 0
    document: str = ""
    witnesses: tuple[Witness, ...] = ()
    witnessed_by: tuple[str, ...] = ()
    clock_floor: datetime | None = None
    record_at: datetime | None = None
    reports: int = 0
    workspace: str = ""
    machine: str = ""


class ModuleStore:
    """One module's folder."""

    def __init__(self, disk: Disk, folder: Path, module: str) -> None:
        self.disk = disk
        self.folder = folder
        self.module = module

    def read(self) -> ModuleState:
        """The state on disk. Raises Refused(HOST_DISK) for one that cannot be read: never taken for an empty one."""
        return _decode(self.disk, self.folder / "state.json", ModuleState) or ModuleState(module=self.module)

    def change(self, decide: Callable[[ModuleState], ModuleState]) -> ModuleState:
        """Read, decide and write under the lock that the watchdog takes too. Links follow. Raises Refused(HOST_DISK)."""
        self.disk.folder(self.folder)
        with locked(self.folder / "lock"):
            before = self.read()
            after = decide(before)
            if after != before:
                self.disk.write(self.folder / "state.json", msgspec.json.encode(after))
            self.mend_links(after)
        return after

    def mend_links(self, state: ModuleState) -> None:
        """Make `current` and `trial` say what the state says."""
        self.disk.link(self.folder / "current", self._target(state.promoted))
        self.disk.link(self.folder / "trial", self._target(state.trial.running if state.trial else None))

    def version_dir(self, running: Running) -> Path:
        """Where a version is unpacked."""
        return self.folder / "versions" / version_name(running)

    @property
    def data(self) -> Path:
        """The module's own folder, kept between versions."""
        return self.folder / "data"

    def _target(self, running: Running | None) -> str | None:
        return f"versions/{version_name(running)}" if running else None


class Store:
    """The state directory."""

    def __init__(self, disk: Disk, state_dir: Path) -> None:
        self.disk = disk
        self.dir = state_dir
        self.policies = state_dir / "policies"
        self.contents = state_dir / "contents"
        self.downloads = state_dir / "downloads"
        self.tuf = state_dir / "tuf"
        self.trust = state_dir / "trust"

    def open(self, new_incarnation: Callable[[], str], now: datetime) -> HostState:
        """The host's state, made at `now` when there is none. Raises Refused(HOST_DISK)."""
        for folder in (
            self.dir,
            self.policies,
            self.contents,
            self.downloads,
            self.trust,
            self.dir / "modules",
            self.dir / "sets",
        ):
            self.disk.folder(folder)
        found = _decode(self.disk, self.dir / "state.json", HostState)
        if found is None:
            found = HostState(incarnation=new_incarnation(), since=now)
            self.save(found)
        return found

    def save(self, state: HostState) -> None:
        """Write it. Raises Refused(HOST_DISK)."""
        self.disk.write(self.dir / "state.json", msgspec.json.encode(state))

    def module(self, name: str) -> ModuleStore:
        """One module's folder; nothing is written yet."""
        return ModuleStore(self.disk, self.dir / "modules" / subjects.token(name), name)

    def modules(self) -> list[str]:
        """The modules that have a state, by name."""
        names = self.disk.names(self.dir / "modules")
        return [
            subjects.untoken(n) for n in names if self.disk.exists(self.dir / "modules" / n / "state.json")
        ]

    def policy_path(self, digest: str) -> Path:
        """Where a policy's envelope is kept."""
        return self.policies / f"{digest}.json"

    def content_path(self, digest: str) -> Path:
        """Where content is kept that a policy names instead of holding it."""
        return self.contents / digest

    def fills_path(self, policy: str) -> Path:
        """Where what fills its sets is kept."""
        return self.policies / f"{policy}.sets.json"

    def followed_path(self, workspace: str, key: str) -> Path:
        """Where a source's roster is kept."""
        return self.dir / "sets" / f"{subjects.token(workspace)}.{key}.json"

    def download_path(self, digest: str) -> Path:
        """Where a package lies until it is unpacked."""
        return self.downloads / f"{digest}.lbm"


def version_name(running: Running) -> str:
    """The folder name of a version: its version for people, its digest because versions can lie."""
    return f"{subjects.token(running.version)}-{running.package[:12]}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock; held only for one read and write, never across an await."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(Code.HOST_DISK, f"{path}: {error.strerror}", "free or repair the disk") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _decode(disk: Disk, path: Path, kind: type[_S]) -> _S | None:
    data = disk.read(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise Refused(
            Code.HOST_DISK,
            f"{path} is damaged: {error}",
            "restore it, or empty the state directory to join anew",
        ) from None
