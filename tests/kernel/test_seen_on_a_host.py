"""`loopback firewall stats | observe | diff | shadow` as root meets them: the real command, the real module, real packets."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_datapath import ICMP, PEER4, UDP, World, inside, program, to_host, to_peer
from support_firewall import Process, running, until

from loopback.contracts import abi
from loopback.contracts.codes import Refused
from loopback.modules.build import build_module
from loopback.modules.firewall import module as firewall
from loopback.modules.firewall.reading import View

pytestmark = pytest.mark.kernel

OLD = b"""{"version":1,"default":{"ingress":"drop","egress":"accept"},"rules":[
{"name":"seen","proto":"udp","ports":9,"action":"drop","log":{"sample":1}},
{"name":"talk","proto":"udp","ports":[53,5353],"action":"accept"},
{"name":"ping","proto":"icmp","action":"accept"},
{"name":"few","proto":"udp","ports":123,"action":"accept","limit":{"rate":"1/h","burst":1,"per":"rule"}}]}"""
NEW = b"""{"version":1,"default":{"ingress":"drop","egress":"accept"},"rules":[
{"name":"seen","proto":"udp","ports":9,"action":"accept"},
{"name":"talk","proto":"udp","ports":53,"action":"accept"},
{"name":"ping","proto":"icmp","action":"accept"},
{"name":"few","proto":"udp","ports":123,"action":"accept","limit":{"rate":"1/h","burst":1,"per":"rule"}}]}"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    built = build_module(Path(firewall.__file__).parent, version="1.0.0", out=folder)
    with tarfile.open(built.path) as tar:
        tar.extractall(folder / "it")
    return folder / "it"


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


class Command:
    """`loopback firewall VERB` on the host, as root."""

    def __init__(self, world: World, *words: object, stderr: int = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{world.host}", "env", "--default-signal=INT", sys.executable,
             "-m", "loopback.cli.main", "firewall", *map(str, words), "--pins", str(world.root), "--data", str(world.state)],
            stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        assert "Traceback" not in (err or ""), err
        return self.process.returncode, out, err


def told(world: World, *words: object, code: int = 0) -> Any:
    found, out, err = Command(world, *words, "--json").end()
    assert found == code, err
    return json.loads(out)


def udp(world: World, port: int, sport: int = 4000) -> bool:
    return world.arriving(to_host(UDP(sport=sport, dport=port)))[0]


@contextlib.contextmanager
def observing(world: World, module: Process, *words: object) -> Iterator[Command]:
    """A command that listens already. While it lives, the module must be asked for nothing: it is not waited for."""
    command = Command(world, *words)
    try:
        assert command.process.stderr is not None
        line = command.process.stderr.readline()
        assert "observing" in line, line + command.process.stderr.read()
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


def test_stats_says_what_each_rule_did_also_when_the_module_is_dead(world: World, package: Path) -> None:
    with running(world, package) as module:
        module.enforce(OLD)
        assert [udp(world, port) for port in (9, 9, 53, 7)] == [False, False, True, False]
        living = told(world, "stats")
        module.kill()
    dead = told(world, "stats")
    for found in (living, dead):
        rules = {rule["rule"]: rule["packets"] for rule in found["rules"]}
        assert rules == {"seen": 2, "talk": 1, "ping": 0, "few": 0}
        assert [rule["rule"] for rule in found["rules"]][:2] == ["seen", "talk"]
        assert found["drops"]["rule"] == 2 and found["drops"]["default"] >= 1
        assert found["flows"]["live"] == 1 and found["enforcing"] and found["deadline_s"] is None
        (device,) = found["devices"]
        assert (device["device"], device["ingress"], device["egress"]) == ("eth0", "native", True)
    code, out, _ = Command(world, "stats").end()
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    assert not udp(world, 9), "it still enforces"


def test_stats_tells_a_trial_and_changes_nothing(world: World, package: Path) -> None:
    with running(world, package) as module:
        module.enforce(OLD, 60, confirm=False)
        found = told(world, "stats")
        assert 0 < found["deadline_s"] <= 60 and found["fallback"] == 0
        before = module.health
        told(world, "stats")
        assert module.health == before


def test_watched_figures_grow_until_the_firewall_goes(world: World, package: Path) -> None:
    with running(world, package) as module:
        module.enforce(OLD)
        command = Command(world, "stats", "--watch", "--every", "0.2", "--json")
        assert command.process.stdout is not None
        assert json.loads(command.process.stdout.readline())["rules"][0]["packets"] == 0
        udp(world, 9)
        end = time.monotonic() + 60
        while json.loads(command.process.stdout.readline())["rules"][0]["packets"] < 1:
            assert time.monotonic() < end
        module.done(abi.Stop(remove=True))
    code, _, err = command.end()
    assert code == 1 and "gone" in err


def test_two_observe_and_neither_they_nor_the_agent_lose_an_event(world: World, package: Path) -> None:
    with running(world, package) as module:
        module.enforce(OLD)
        with (
            observing(world, module, "observe", "--count", "3", "--json") as one,
            observing(
                world,
                module,
                "observe",
                "--verdict",
                "drop",
                "--rule",
                "seen",
                "--src",
                PEER4,
                "--count",
                "3",
            ) as two,
        ):
            for _ in range(3):
                assert not udp(world, 9)
            code, out, err = one.end()
            assert code == 0 and err.endswith("3 shown, 0 missed, 0 lost in the kernel's ring\n")
            events = [json.loads(line) for line in out.splitlines()]
            assert [(e["verdict"], e["rule"], e["src"], e["dport"], e["interface"]) for e in events] == [
                ("drop", "seen", PEER4, 9, "eth0")
            ] * 3
            code, out, _ = two.end()
            assert code == 0 and all(
                f"udp {PEER4}:4000 → 10.77.0.1:9 (rule)" in line for line in out.splitlines()
            )

        def agent() -> bool:
            module.done(abi.Health())
            return sum(e.kind == "firewall.packet" for e in module.events) == 3

        until(agent)


def test_a_filter_hides_and_a_sample_shows_rules_that_log_nothing(world: World, package: Path) -> None:
    with running(world, package) as module:
        module.enforce(OLD)
        with observing(
            world, module, "observe", "--sample", "1", "--rule", "talk", "--json", "--count", "2"
        ) as command:
            until(lambda: told(world, "stats")["shadow"] == 1)
            assert [udp(world, port) for port in (9, 53, 53)] == [False, True, True]
            _, out, _ = command.end()
            assert [json.loads(line)["reason"] for line in out.splitlines()] == ["rule", "flow"]
        until(lambda: told(world, "stats")["shadow"] == 0)


def test_ctrl_c_ends_an_observer_with_its_sum_and_the_modules_end_is_told(
    world: World, package: Path
) -> None:
    with running(world, package) as module:
        module.enforce(OLD)
        with observing(world, module, "observe") as command:
            code, _, err = command.end(signal.SIGINT)
            assert code == 130 and err.endswith(
                "0 shown, 0 missed, 0 lost in the kernel's ring\n\ninterrupted\n"
            )
        with observing(world, module, "observe") as command:
            module.kill()
            code, _, err = command.end()
            assert code == 1 and "has ended" in err
    code, _, err = Command(world, "observe").end()
    assert code == 2 and "no firewall module listens" in err and "next:" in err


def test_diff_names_the_flows_that_a_policy_would_end(world: World, package: Path, tmp_path: Path) -> None:
    new, built = tmp_path / "new.json", tmp_path / "firewall.bpf.o"
    new.write_bytes(NEW)
    built.write_bytes(program())
    with running(world, package) as module:
        module.enforce(OLD)
        assert udp(world, 53) and udp(world, 5353, 4001) and udp(world, 5353, 4002)
        for dead in (False, True):
            if dead:
                module.kill()
            found = told(world, "diff", "--policy", new, "--object", built, code=1)
            assert [one["rule"] for one in found["rules"]["changed"]] == ["seen", "talk"]
            assert (found["flows"]["tracked"], found["flows"]["changed"]) == (3, 2)
            (pair,) = found["flows"]["pairs"]
            assert (pair["before"], pair["rule_before"], pair["after"], pair["rule_after"]) == (
                "accept",
                "talk",
                "drop",
                None,
            )
            assert {e["sport"] for e in pair["examples"]} == {4001, 4002}
    assert udp(world, 5353, 4001), "asking changed nothing"
    new.write_bytes(OLD)
    assert told(world, "diff", "--policy", new, "--object", built)["same"]


def test_a_shadow_counts_what_another_policy_would_do_to_live_packets(
    world: World, package: Path, tmp_path: Path
) -> None:
    new, built = tmp_path / "new.json", tmp_path / "firewall.bpf.o"
    new.write_bytes(NEW)
    built.write_bytes(program())
    with running(world, package) as module:
        module.enforce(OLD)
        with running_shadow(world, "--policy", new, "--object", built, "--one-in", "1") as command:
            for _ in range(4):
                assert not udp(world, 9)
                assert udp(world, 53)
                assert udp(world, 5353)
            assert world.leaving(to_peer(UDP(sport=5353, dport=4000))) == [True]
            assert world.arriving(to_host(ICMP())) == [True]
            assert [udp(world, 123, 4100), udp(world, 123, 4101)] == [True, False], "the limit is used up"
            assert not udp(world, 9), "the last one, which is shown once all before it were judged"
            command.shows("10 of ")
            code, out, err = command.end(signal.SIGINT)
        assert code == 1, err
        found = json.loads(out)
        pairs = {
            (d["pair"]["rule_before"], d["pair"]["before"], d["pair"]["rule_after"], d["pair"]["after"]): d[
                "samples"
            ]
            for d in found["differences"]
        }
        assert pairs == {("seen", "drop", "seen", "accept"): 5, ("talk", "accept", None, "drop"): 5}, found
        assert found["unsure"] == 1, "what the limit dropped is no difference"
        assert not udp(world, 9), "the old policy enforces"
        until(lambda: told(world, "stats")["shadow"] == 0)


class AtTerminal(Command):
    """With a terminal for what it says on stderr, where it shows how far it is."""

    def __init__(self, world: World, *words: object) -> None:
        self._terminal, theirs = pty.openpty()
        super().__init__(world, *words, stderr=theirs)
        os.close(theirs)
        self._shown = ""

    def shows(self, words: str) -> None:
        end = time.monotonic() + 60
        while words not in self._shown:
            assert self.process.poll() is None and time.monotonic() < end, self._shown
            if select.select([self._terminal], [], [], 1)[0]:
                self._shown += os.read(self._terminal, 4096).decode()

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        code, out, _ = super().end(number)
        os.close(self._terminal)
        return code, out, self._shown


@contextlib.contextmanager
def running_shadow(world: World, *words: object) -> Iterator[AtTerminal]:
    command = AtTerminal(world, "shadow", *words, "--json")
    try:
        until(lambda: told(world, "stats")["shadow"] == 1)
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


def test_a_staged_policy_is_a_shadow_before_it_is_committed(world: World, package: Path) -> None:
    """The module's own: what it would change is in the answer to `stage`, in health and in metrics."""
    with running(world, package, shadow_s=1.5, shadow=1) as module:
        module.enforce(OLD)
        frame = to_host(UDP(sport=4000, dport=9))
        with world.flooded(bytes(frame / (b"x" * 18))):
            done = module.done(abi.Stage(digest="ab" * 32, serial=2, content=NEW))
            assert not udp(world, 9), "the old policy enforces"
        assert done.detail["shadow_1"].startswith("ingress: drop by seen → accept by seen: ")
        assert module.health.detail["shadow"] == done.detail["shadow"]
        metrics = module.done(abi.Metrics()).metrics
        assert metrics["loopback_firewall_shadow_changed_packets"] > 0
        assert metrics["loopback_firewall_shadow_changed_packets"] <= 1.5 * 500 + 200, "it is bounded"
        module.done(abi.Commit(digest="ab" * 32, trial_s=0))
        assert udp(world, 9)
        assert told(world, "stats")["shadow"] == 0


def test_only_root_sees(world: World, package: Path) -> None:
    with running(world, package) as module:
        module.enforce(OLD)
        for verb in ("stats", "observe"):
            done = subprocess.run(
                ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable, "-m",
                 "loopback.cli.main", "firewall", verb, "--pins", str(world.root), "--data", str(world.state)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode != 0 and "seen" not in done.stdout and "Traceback" not in done.stderr, (
                done.stderr
            )


def test_the_views_hold_no_map_that_they_could_write(world: World, package: Path) -> None:
    with running(world, package) as module:
        module.enforce(OLD)
        with inside(world.host), View(world.root, world.state) as view:
            for one in view.maps.values():
                with pytest.raises(Refused, match="not permitted"):
                    one.update(bytes(4), bytes(one.value_size) if one.value_size < 4096 else bytes(4096))
            with pytest.raises(TypeError):
                view.maps["active"].memory()[0:8] = bytes(8)
