"""The firewall's process killed and started at the worst moments: in a commit, while devices come and go, between releases."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_datapath import HOST4, UDP, World, inside, to_host
from support_firewall import Process, running, until

from loopback.bpf import hooks, rtnl
from loopback.bpf.loader import Map
from loopback.contracts import abi
from loopback.contracts.codes import Code
from loopback.modules.build import build_module
from loopback.modules.firewall import counting
from loopback.modules.firewall import module as firewall

pytestmark = pytest.mark.kernel

SOURCE = Path(firewall.__file__).parent
ROOT = SOURCE.parent.parent
DROP = b'{"version":1,"default":{"ingress":"drop","egress":"accept"}}'
PASS = b'{"version":1,"default":{"ingress":"accept","egress":"accept"}}'
#: Segments of a connection whose flow was lost match no rule of it.
STRICT = (
    b'{"version":1,"default":{"ingress":"drop","egress":"drop"},"rules":[{"name":"web","proto":"tcp","ports":8080,'
    b'"state":"new","action":"accept"}]}'
)
DENIED = bytes(to_host(UDP(sport=4000, dport=7777)) / (b"x" * 18))
WAIT_S = 60


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def build(folder: Path, version: str, overlay: dict[str, str]) -> Path:
    place = folder / f"overlay-{version}"
    for name, text in overlay.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    built = build_module(SOURCE, version=version, overlay=place if overlay else None, out=folder)
    with tarfile.open(built.path) as tar:
        tar.extractall(folder / version)
    return folder / version


def edited(text: str, *changes: tuple[str, str]) -> str:
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    return text


def older_sources() -> dict[str, str]:
    """An older release: other sizes, another program, others by another name, some structures in another shape."""
    maps = edited(
        (ROOT / "bpf/programs/maps.h").read_text(),
        ("__uint(max_entries, 65536);", "__uint(max_entries, 16384);"),
        ("__uint(max_entries, 256 * 1024);", "__uint(max_entries, 64 * 1024);"),
    )
    program = edited(
        (ROOT / "bpf/programs/firewall.bpf.c").read_text(),
        ('#include "maps.h"', maps),
        ("fw_l3_ingress", "fw_tun_ingress"),
        ('char LICENSE[] SEC("license")', 'SEC("tc")\nint fw_old(struct __sk_buff *skb)\n{\n\treturn enter(skb, 0);\n}\n\n'
         'char LICENSE[] SEC("license")'),
    )  # fmt: skip
    return {
        "bpf/programs/firewall.bpf.c": program,
        "lib/loopback/bpf/sharing.py": edited(
            (ROOT / "bpf/sharing.py").read_text(),
            ("fromkeys(HELD, 1) | {", 'fromkeys(HELD, 1) | {"fragments": 9, "config": 9,'),
        ),
        "lib/loopback/modules/firewall/pins.py": edited(
            (SOURCE / "pins.py").read_text(), ('"fw_l3_ingress"', '"fw_tun_ingress", "fw_old"')
        ),
        "lib/loopback/modules/firewall/attach.py": edited(
            (SOURCE / "attach.py").read_text(), ('"fw_l3_ingress"', '"fw_tun_ingress"')
        ),
    }  # fmt: skip


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("older"), "0.9.0", older_sources())


@pytest.fixture(scope="session")
def present(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("present"), "1.0.0", {})


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        yield made


def passes(world: World) -> bool:
    return world.arriving(to_host(UDP(dport=9)))[0]


def devices(module: Process) -> set[str]:
    return {one.split("=")[0] for one in module.health.detail["devices"].split(", ")}


def ip(world: World, *words: str, check: bool = True) -> None:
    subprocess.run(["ip", "-n", world.host, *words], check=check, capture_output=True)


# ── agent and module killed together ──────────────────────────────────────────────────────────────────────────────────────────


def test_killed_between_staging_and_commit_nothing_has_changed(world: World, present: Path) -> None:
    with running(world, present) as module:
        module.enforce(DROP)
        module.done(abi.Stage(digest=digest(PASS), serial=2, content=PASS))
        module.kill()
    assert not passes(world)
    with running(world, present) as module:
        assert (module.health.state, module.health.policy) == ("ok", digest(DROP))
        answer = module.ask(abi.Commit(digest=digest(PASS), trial_s=5))
        assert isinstance(answer, abi.Failed) and answer.code == Code.MODULE_ABI, (
            "what was staged died with him"
        )
        module.enforce(PASS)
        assert passes(world)


def test_killed_at_any_moment_of_a_commit_the_kernel_alone_returns_to_what_held(
    world: World, present: Path
) -> None:
    """Module and agent's end of its socket go at once, some milliseconds after the order to commit."""
    committed = 0
    for turn in range(8):
        with running(world, present) as module:
            module.enforce(DROP)
            module.done(abi.Stage(digest=digest(PASS), serial=2, content=PASS))
            frame = abi.Frame(id=10_000, body=abi.Commit(digest=digest(PASS), trial_s=1.5))
            module.socket.sendall(abi.encode(frame))
            time.sleep(turn * 0.003)
            module.kill()
        committed += passes(world)
        until(lambda: not passes(world), WAIT_S)
        with running(world, present) as module:
            health = module.health
            assert (health.state, health.enforcing, health.policy) == ("ok", True, digest(DROP))
    assert committed > 0, "some of them had committed"


# ── devices that come and go ──────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def churning(world: World) -> Iterator[None]:
    """Pairs of devices are made, renamed and removed without pause."""
    stop = threading.Event()

    def churn() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            ip(world, "link", "add", f"n{turn}", "type", "veth", "peer", "name", f"p{turn}", check=False)
            ip(world, "link", "set", f"n{turn}", "up", check=False)
            ip(world, "link", "set", f"p{turn}", "name", f"r{turn}", check=False)
            if turn % 3:
                ip(world, "link", "del", f"n{turn}", check=False)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_restarts_race_devices_that_appear_vanish_and_change_their_names(world: World, present: Path) -> None:
    with running(world, present) as module:
        module.enforce(DROP)
    with churning(world):
        for turn in range(6):
            with running(world, present) as module:
                assert isinstance(module.configured, abi.Done)
                assert module.health.policy == digest(DROP), module.health
                assert not passes(world)
                module.enforce(DROP)
                if turn % 2:
                    module.done(abi.Stop())
                    module.end()
            assert not passes(world)
    ip(world, "link", "add", "late0", "type", "veth", "peer", "name", "late1")
    with running(world, present) as module:
        assert "late0" in devices(module), "it came while nobody was there"
        with churning(world):
            for _ in range(5):
                module.enforce(DROP)
        with inside(world.host):
            there = {one.name for one in rtnl.devices() if not one.loopback}
        # a health that is well may still be from before the last device vanished
        until(lambda: module.health.state == "ok" and devices(module) == there, WAIT_S)
        with inside(world.host):
            entries = {
                hooks.tc_program(one.index, hooks.TC_EGRESS) for one in rtnl.devices() if not one.loopback
            }
        assert "late0" in there
        assert 0 not in entries and len(entries) == 1

        def guarded() -> set[int]:
            return {int(one.name.split("-")[1]) for one in (world.root / "links").iterdir()}

        with inside(world.host):
            numbers = {one.index for one in rtnl.devices() if not one.loopback}
        until(lambda: guarded() == numbers, WAIT_S)


# ── another release ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Talk:
    """A connection from the peer to port 8080 of the host, on which somebody speaks all the time."""

    def __init__(self, world: World, stack: contextlib.ExitStack) -> None:
        with inside(world.host):
            server = stack.enter_context(socket.create_server((HOST4, 8080)))
        with inside(world.peer):
            self.client = stack.enter_context(socket.create_connection((HOST4, 8080), 10))
        self.server = stack.enter_context(server.accept()[0])
        self.client.settimeout(WAIT_S)
        self.server.settimeout(WAIT_S)
        self.turns = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak)
        self._thread.start()
        stack.callback(self.end)

    def _speak(self) -> None:
        while not self._ended.is_set():
            for speaks, hears in ((self.client, self.server), (self.server, self.client)):
                speaks.sendall(b"x")
                if hears.recv(1) != b"x":
                    return
            self.turns += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def goes_on(self) -> None:
        """Returns when a few more turns were spoken."""
        turns = self.turns
        until(lambda: self.turns > turns + 5, WAIT_S)


def flows_id(world: World) -> set[int]:
    found = set()
    for one in world.root.glob("set-*/flows-*"):
        opened = Map.pinned(one)
        found.add(opened.id)
        opened.close()
    return found


def totals(world: World) -> dict[str, int]:
    opened = Map.pinned(next(world.root.glob("set-*/totals-*")))
    try:
        return counting.totals(opened)
    finally:
        opened.close()


def web(module: Process) -> float:
    return module.done(abi.Metrics()).metrics['loopback_firewall_rule_packets_total{rule="web"}']


def over(world: World, old: Path, new: Path, how: str) -> None:
    """`new` takes over from `old`: for good, undone by it, or by its death."""
    counted = 0.0
    ip(world, "tuntap", "add", "tun0", "mode", "tun")
    with contextlib.ExitStack() as stack:
        with running(world, old) as module:
            module.enforce(STRICT)
            talk = Talk(world, stack)
            talk.goes_on()
            received = world.received()
            stack.enter_context(world.flooded(DENIED))
            until(lambda: totals(world)["ingress.default.drop"] > 1000, WAIT_S)
            before, counted = flows_id(world), web(module)
            assert counted > 10 and len(before) == 1
            module.done(abi.Stop())
        talk.goes_on()
        with running(world, new) as module:
            assert isinstance(module.configured, abi.Done)
            assert module.health.policy == digest(STRICT)
            talk.goes_on()
            module.enforce(STRICT, confirm=how == "for good")
            talk.goes_on()
            assert web(module) >= counted
            counted = web(module)
            if how == "undone":
                module.done(abi.Revert())
                talk.goes_on()
        last = new if how == "for good" else old
        with running(world, last) as module:
            assert isinstance(module.configured, abi.Done)
            until(lambda: module.health.state == "ok", WAIT_S)
            assert module.health.policy == digest(STRICT)
            talk.goes_on()
            module.enforce(STRICT)
            talk.goes_on()
            assert web(module) > counted
            sets = [one.name for one in world.root.glob("set-*")]
            assert len(sets) == 1
        assert flows_id(world) == before, "the very table"
        assert world.received() == received, "of what was denied all the while nothing came in"
        found = totals(world)
        assert found["ingress.broken.drop"] == found["egress.broken.drop"] == 0
        assert found["ingress.adoption.accept"] == found["egress.adoption.accept"] == 0


@pytest.mark.parametrize("how", ["for good", "undone", "by its death"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_another_release_takes_over_without_a_gap(
    world: World, older: Path, present: Path, way: str, how: str
) -> None:
    old, new = (older, present) if way == "up" else (present, older)
    over(world, old, new, how)
