"""The firewall's package as the agent runs it: its own files and three capabilities. Killed, adopted, upgraded, removed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support_bpf import ONLY_THREE
from support_datapath import UDP, World, inside, to_host

from loopback.bpf import hooks, loader, rtnl
from loopback.contracts import abi
from loopback.contracts.codes import Code
from loopback.modules.build import build_module
from loopback.modules.firewall import module as firewall

pytestmark = pytest.mark.kernel

SOURCE = Path(firewall.__file__).parent
DROP = b'{"version":1,"default":{"ingress":"drop","egress":"accept"}}'
PASS = b'{"version":1,"default":{"ingress":"accept","egress":"accept"}}'
SAMPLED = (
    b'{"version":1,"default":{"ingress":"drop","egress":"accept"},"rules":[{"name":"seen","proto":"udp",'
    b'"ports":9,"action":"drop","log":{"sample":1}}]}'
)
DIGEST = {DROP: "d0" * 32, PASS: "0a" * 32, SAMPLED: "5a" * 32}


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two releases, unpacked; the second has other programs."""
    folder = tmp_path_factory.mktemp("packages")
    found = {}
    for name in ("1.0.0", "1.1.0"):
        overlay = None
        if name == "1.1.0":
            overlay = folder / "overlay"
            program = overlay / "bpf" / "programs" / "firewall.bpf.c"
            program.parent.mkdir(parents=True)
            source = (SOURCE.parent.parent / "bpf" / "programs" / "firewall.bpf.c").read_text()
            changed = source.replace("#define HEADERS 256", "#define HEADERS 192")
            assert changed != source
            program.write_text(changed)
        built = build_module(SOURCE, version=name, overlay=overlay, out=folder)
        with tarfile.open(built.path) as tar:
            tar.extractall(folder / name)
        found[name] = folder / name
    return found


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


class Process:
    """A module's process, spoken to over its socket."""

    def __init__(self, world: World, package: Path, **settings: Any) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.socket.settimeout(30)
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(package / "lib"),
            abi.FD_VARIABLE: str(theirs.fileno()),
            "LOOPBACK_PACKAGE_DIR": str(package),
        }
        world.state.mkdir(exist_ok=True)
        with theirs:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{world.host}", *ONLY_THREE, sys.executable, "-P", "-W", "error", "-m",
                 "loopback.modules.firewall"],
                env=environment, pass_fds=[theirs.fileno()], cwd=world.state, stderr=subprocess.PIPE,
            )  # fmt: skip
        self.events: list[abi.Event] = []
        self._number = 0
        hello = self._frame().body
        assert isinstance(hello, abi.Hello), self.words()
        self.hello = hello
        self.configured = self.ask(
            abi.Configure(
                host="host",
                workspace="w",
                state_dir=str(world.state),
                settings={"interfaces": ["*"], "bpf_root": str(world.bpf)} | settings,
            )
        )

    def words(self) -> str:
        self.process.kill()
        return self.process.communicate()[1].decode()

    def _frame(self) -> abi.Frame:
        def exactly(size: int) -> bytes:
            data = b""
            while len(data) < size:
                more = self.socket.recv(size - len(data))
                assert more, self.words()
                data += more
            return data

        return abi.decode(exactly(abi.length_of(exactly(4))))

    def ask(self, body: abi.Request) -> abi.Done | abi.Failed:
        self._number += 1
        self.socket.sendall(abi.encode(abi.Frame(id=self._number, body=body)))
        while True:
            frame = self._frame()
            if isinstance(frame.body, abi.Event):
                self.events.append(frame.body)
            else:
                assert frame.id == self._number
                assert isinstance(frame.body, abi.Done | abi.Failed)
                return frame.body

    def done(self, body: abi.Request) -> abi.Done:
        answer = self.ask(body)
        assert isinstance(answer, abi.Done), answer
        return answer

    def enforce(self, content: bytes, trial_s: float = 60, *, confirm: bool = True) -> None:
        digest = DIGEST[content]
        self.done(abi.Stage(digest=digest, serial=1, content=content))
        self.done(abi.Commit(digest=digest, trial_s=trial_s))
        if confirm:
            self.done(abi.Confirm(digest=digest))

    @property
    def health(self) -> abi.HealthReport:
        found = self.done(abi.Health()).health
        assert found is not None
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.socket.close()
        self.process.wait(20)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def running(world: World, package: Path, **settings: Any) -> Iterator[Process]:
    process = Process(world, package, **settings)
    try:
        yield process
    finally:
        process.kill()  # harmless when it has ended


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"


def passes(world: World) -> bool:
    return world.arriving(to_host(UDP(dport=9)))[0]


def test_three_capabilities_are_enough(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        assert (module.hello.module, module.hello.version) == ("firewall", "1.0.0")
        assert isinstance(module.configured, abi.Done)
        assert module.configured.detail == {"adopted": "false", "policy": ""}
        assert module.health == abi.HealthReport(state="ok", detail=module.health.detail)
        module.enforce(DROP)
        assert not passes(world)
        health = module.health
        assert (health.state, health.enforcing, health.policy) == ("ok", True, DIGEST[DROP])
        assert health.detail["devices"] == "eth0=native"
        status = Path(f"/proc/{module.process.pid}/status").read_text()
        effective = next(line for line in status.splitlines() if line.startswith("CapEff"))
        assert int(effective.split()[1], 16) == 1 << 12 | 1 << 38 | 1 << 39
        assert "NoNewPrivs:\t1" in status


def test_killed_it_enforces_still_and_its_successor_adopts(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        module.kill()
    assert not passes(world)
    with running(world, packages["1.0.0"]) as module:
        assert isinstance(module.configured, abi.Done)
        assert module.configured.detail == {"adopted": "true", "policy": DIGEST[DROP]}
        assert module.health.enforcing
        module.enforce(PASS)
        assert passes(world)


def test_an_agent_that_goes_away_leaves_the_kernel_enforcing(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        module.end()
        assert module.process.returncode == 0
    assert not passes(world)


def test_killed_on_trial_the_kernel_falls_back(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(PASS)
        module.enforce(DROP, trial_s=1, confirm=False)
        module.kill()
    until(lambda: passes(world))
    with running(world, packages["1.0.0"]) as module:
        assert isinstance(module.configured, abi.Done)
        assert module.configured.detail["policy"] == DIGEST[PASS]
        assert module.health.policy == DIGEST[PASS]


def test_a_deadline_that_passes_is_told(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(PASS)
        module.enforce(DROP, trial_s=0.2, confirm=False)
        until(lambda: module.health.code == Code.HOST_UNCONFIRMED)
        assert module.health.policy == DIGEST[PASS]
        answer = module.ask(abi.Confirm(digest=DIGEST[DROP]))
        assert isinstance(answer, abi.Failed) and answer.code == Code.HOST_UNCONFIRMED
        module.done(abi.Revert())
        assert (module.health.state, module.health.enforcing) == ("ok", True)


def test_a_new_release_takes_over_without_losing_its_counters(
    world: World, packages: dict[str, Path]
) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(SAMPLED)
        assert not passes(world)
        until(
            lambda: 'loopback_firewall_rule_packets_total{rule="seen"}' in module.done(abi.Metrics()).metrics
        )
        module.done(abi.Stop())
    before = live(world)
    with running(world, packages["1.1.0"]) as module:
        assert isinstance(module.configured, abi.Done)
        assert module.configured.detail["policy"] == DIGEST[SAMPLED]
        assert live(world) == before, "nothing changes before the commit"
        module.enforce(SAMPLED)
        assert live(world) & before == set()
        assert len(list(world.root.glob("programs-*"))) == 1
        metrics = module.done(abi.Metrics()).metrics
        assert metrics['loopback_firewall_rule_packets_total{rule="seen"}'] == 1
        assert not passes(world)


def test_a_new_release_on_trial_is_undone_by_revert(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        module.done(abi.Stop())
    before = live(world)
    with running(world, packages["1.1.0"]) as module:
        module.enforce(PASS, confirm=False)
        assert passes(world)
        module.done(abi.Revert())
        assert live(world) == before
        assert not passes(world)


def test_a_new_release_that_dies_on_trial_is_undone_by_the_old_one(
    world: World, packages: dict[str, Path]
) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        module.done(abi.Stop())
    before = live(world)
    with running(world, packages["1.1.0"]) as module:
        module.enforce(PASS, confirm=False)
        module.kill()
    with running(world, packages["1.0.0"]) as module:
        assert isinstance(module.configured, abi.Done)
        assert module.configured.detail == {"adopted": "true", "policy": DIGEST[DROP]}
        assert live(world) == before
        assert not passes(world)


def live(world: World) -> set[int]:
    """The ids of the programs on the host's device."""
    with inside(world.host):
        index = next(d.index for d in rtnl.devices() if d.name == "eth0")
        link = hooks.XdpLink.pinned(next((world.root / "links").iterdir()))
        try:
            return {link.program_id, hooks.tc_program(index, hooks.TC_EGRESS)}
        finally:
            link.close()


def test_removed_it_leaves_nothing(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        module.done(abi.Stop(remove=True))
        assert module.process.wait(20) == 0
    assert passes(world)
    assert not world.root.exists()
    with inside(world.host):
        index = next(d.index for d in rtnl.devices() if d.name == "eth0")
        assert not rtnl.has_clsact(index)


def test_drops_become_events_and_metrics(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(SAMPLED)
        assert not passes(world)

        def told() -> bool:
            module.done(abi.Health())
            return any(e.kind == "firewall.packet" and e.attributes["rule"] == "seen" for e in module.events)

        until(told)
        assert any(e.kind == "firewall.device" and e.attributes["device"] == "eth0" for e in module.events)
        metrics = module.done(abi.Metrics()).metrics
        assert metrics["loopback_firewall_dropped_packets_total"] >= 1


def test_a_device_that_appears_is_covered_at_once(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        subprocess.run(
            ["ip", "-n", world.host, "link", "add", "new0", "type", "veth", "peer", "name", "new1"],
            check=True,
        )
        until(lambda: "new0=native" in module.health.detail["devices"])
        until(lambda: module.health.state == "ok")


def test_without_a_bpf_file_system_it_says_so_and_stays_up(
    world: World, packages: dict[str, Path], tmp_path: Path
) -> None:
    assert not loader.is_bpffs(tmp_path)
    with running(world, packages["1.0.0"], bpf_root=str(tmp_path)) as module:
        assert isinstance(module.configured, abi.Done)
        health = module.health
        assert (health.state, health.enforcing, health.code) == ("degraded", False, Code.KERNEL_UNSUPPORTED)
        answer = module.ask(abi.Stage(digest=DIGEST[DROP], serial=1, content=DROP))
        assert isinstance(answer, abi.Failed) and answer.code == Code.KERNEL_UNSUPPORTED


def test_a_bad_policy_is_refused_with_its_place(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        content = b'{"version":1,"default":{"ingress":"drop","egress":"accept"},"rules":[{"name":"x","prot":"tcp"}]}'
        answer = module.ask(abi.Stage(digest="ab" * 32, serial=2, content=content))
        assert isinstance(answer, abi.Failed) and answer.code == Code.POLICY_INVALID
        assert "prot" in answer.reason
        assert module.health.policy == DIGEST[DROP]
