"""The firewall's package as the agent runs it: its own files and three capabilities. Killed, adopted, upgraded, removed."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_datapath import HOST4, PEER4, UDP, World, inside, to_host
from support_firewall import Process, running, until

from loopback.bpf import hooks, kernel, layout, rtnl, sharing
from loopback.bpf.objects import Map
from loopback.contracts import abi
from loopback.contracts.codes import Code
from loopback.modules.build import build_module
from loopback.modules.firewall import counting
from loopback.modules.firewall import module as firewall
from loopback.modules.firewall import policy as policies

pytestmark = pytest.mark.kernel

SOURCE = Path(firewall.__file__).parent
DROP = b'{"version":1,"default":{"ingress":"drop","egress":"accept"}}'
PASS = b'{"version":1,"default":{"ingress":"accept","egress":"accept"}}'
SAMPLED = (
    b'{"version":1,"default":{"ingress":"drop","egress":"accept"},"rules":[{"name":"seen","proto":"udp",'
    b'"ports":9,"action":"drop","log":{"sample":1}}]}'
)
DIGEST = {content: hashlib.sha256(content).hexdigest() for content in (DROP, PASS, SAMPLED)}


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
        assert len(list(world.root.glob("set-*"))) == 1
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
        assert module.process.wait(60) == 0
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


def test_of_many_rules_metrics_name_a_hundred_as_an_agent_keeps_no_more(
    world: World, packages: dict[str, Path]
) -> None:
    many = {
        "version": 1,
        "default": {"ingress": "drop", "egress": "accept"},
        "rules": [
            {"name": f"r{n}", "from": f"10.0.0.{n}", "action": "accept" if n % 2 else "drop"}
            for n in range(200)
        ],
    }
    with running(world, packages["1.0.0"]) as module:
        module.enforce(policies.to_json(many))
        named = [
            m for m in module.done(abi.Metrics()).metrics if m.startswith("loopback_firewall_rule_packets")
        ]
        assert len(named) == firewall.METRIC_RULES


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
    assert not kernel.is_bpffs(tmp_path)
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


HEAD = b'{"version":1,"default":{"ingress":"accept","egress":"accept"},'
BAD = {
    "unknown field": (b'"rulez":[]}', Code.POLICY_INVALID, ":1:"),
    "two of a name": (b'"rules":[{"name":"a","action":"drop"},{"name":"a","action":"drop"}]}',
                      Code.POLICY_INVALID, "rules[1].name"),
    "a key twice": (b'"rules":[],"rules":[]}', Code.POLICY_MALFORMED, "is there twice"),
    "empty range": (b'"rules":[{"name":"a","action":"drop","proto":"tcp","ports":"9-1"}]}',
                    Code.POLICY_INVALID, "rules[0].ports"),
    "a set over its limit": (b'"sets":{"web":{"labels":{"role":"web"},"within":["10.0.0.0/8"],"max":1,'
                             b'"prefixes":["10.1.0.0/16","10.2.0.0/16"]}}}',
                             Code.POLICY_INVALID, "sets.web.prefixes"),
    "more entries than there is room for": (
        b'"rules":[{"name":"every","action":"drop","proto":["tcp","udp"],"ports":[%s],"source_ports":[%s]}]}'
        % ((b",".join(b"%d" % port for port in range(1, 2000, 2)),) * 2),
        Code.POLICY_INVALID, "rule 'every': with this rule the policy needs more than",
    ),
    "more interfaces than there are bits": (
        b'"rules":[' + b",".join(b'{"name":"r%d","action":"drop","iface":"eth%d"}' % (n, n) for n in range(70)) + b"]}",
        Code.POLICY_INVALID, "rule 'r63': iface",
    ),
    "an absurd number": (b'"rules":[{"name":"a","action":"drop","proto":"tcp","ports":1e308}]}',
                         Code.POLICY_INVALID, "rules[0].ports"),
    "an endless number": (b'"rules":[' + b"9" * 5000 + b"]}", Code.POLICY_MALFORMED, ":1:"),
    "NUL in a name": (b'"rules":[{"name":"a\\u0000b","action":"drop"}]}', Code.POLICY_INVALID, "rules[0].name"),
    "half a character": (b'"rules":[{"name":"\\ud800","action":"drop"}]}', Code.POLICY_INVALID, "rules[0].name"),
    "no UTF-8": (b'"rules":[{"name":"\xff","action":"drop"}]}', Code.POLICY_MALFORMED, "0xff"),
    "a hundred thousand deep": (b'"rules":' + b"[" * 100_000, Code.POLICY_MALFORMED, "nested"),
    "a test that fails": (b'"tests":[{"packet":{"src":"10.0.0.1","dst":"10.0.0.2","proto":"udp"},"expect":"drop"}]}',
                          Code.POLICY_TEST_FAILED, "test 1"),
}  # fmt: skip


def test_whatever_is_wrong_with_a_policy_it_is_refused_before_anything_changes(
    world: World, packages: dict[str, Path]
) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(DROP)
        generation = module.health.detail["generation"]
        for what, (rest, code, said) in BAD.items():
            digest = hashlib.sha256(rest).hexdigest()
            answer = module.ask(abi.Stage(digest=digest, serial=2, content=HEAD + rest))
            assert isinstance(answer, abi.Failed), what
            assert (answer.code, said in answer.reason) == (code, True), (what, answer)
            refused = module.ask(abi.Commit(digest=digest, trial_s=5))
            assert isinstance(refused, abi.Failed) and refused.code == Code.MODULE_ABI, what
            health = module.health
            assert (health.policy, health.detail["generation"]) == (DIGEST[DROP], generation), what
            assert not passes(world), what
        module.enforce(PASS)
        assert passes(world)


# ── nothing leaks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

PACKETS, CHANGES = 1_000_000, 100
DENIED = bytes(to_host(UDP(sport=4000, dport=7777)) / (b"x" * 18))


def counted(world: World) -> dict[str, int]:
    """What the programs counted, whoever is alive."""
    pinned = Map.pinned(next(world.root.glob("set-*")) / f"totals-{sharing.fingerprint('totals')}")
    try:
        return counting.totals(pinned)
    finally:
        pinned.close()


def test_a_packet_that_leaks_would_be_seen_in_both_counts(world: World, packages: dict[str, Path]) -> None:
    with running(world, packages["1.0.0"]) as module:
        module.enforce(PASS)
        with world.flooded(DENIED):
            until(lambda: counted(world)["ingress.default.accept"] > 0 and world.received() > 0)
            module.done(abi.Stop(remove=True))
            before = world.received()
            until(lambda: world.received() > before)


def test_of_a_million_denied_packets_none_passes_a_hundred_replacements(
    world: World, packages: dict[str, Path]
) -> None:
    """Module killed, agent gone, release or program replaced, room grown: by the stack's count and by the programs' own."""
    changes = dict.fromkeys(("killed", "agent gone", "release", "grown", "program"), 0)
    module = Process(world, packages["1.0.0"])
    module.enforce(DROP)
    passed = world.received()
    with world.flooded(DENIED):
        try:
            for number in range(36):
                what = ("killed", "agent gone", "release")[number % 3]
                if what == "killed":
                    module.kill()
                elif what == "agent gone":
                    module.end()
                else:
                    module.done(abi.Stop())
                    module.end()
                changes[what] += 1
                release = "1.1.0" if changes["release"] % 2 else "1.0.0"
                module = Process(world, packages[release])
                if what == "release":
                    module.enforce(DROP)
                assert module.health.enforcing
        finally:
            module.kill()
        datapath = world.open()
        world.enforce(policies.parse(DROP, "policy.json"), datapath)
        with inside(world.host):
            while datapath._pins.half < layout.MAX_HALF:  # the programs are verified for no more
                datapath._grow(datapath._pins.half * 2, datapath._pins.counters)
                changes["grown"] += 1
        again = datapath._pins.load(reuse=datapath._maps)
        with inside(world.host):
            turns = [again.programs, datapath._programs]
            while sum(changes.values()) < CHANGES or counted(world)["ingress.default.drop"] < PACKETS:
                assert not [a for a in datapath._hooks.put(turns[changes["program"] % 2]) if a.problem]
                changes["program"] += 1
            datapath._hooks.put(datapath._programs)
        again.close()
    totals = counted(world)
    print(
        f"{totals['ingress.default.drop']} packets denied, {world.received() - passed} leaked, changes: {changes}"
    )
    assert totals["ingress.default.drop"] >= PACKETS
    assert world.received() == passed
    passing = {n for n, c in totals.items() if n.startswith("ingress.") and n.endswith(".accept") and c}
    assert passing <= {"ingress.essential.accept"}, "neighbour discovery, and nothing else"
    assert totals["ingress.broken.drop"] == 0
    assert sum(changes.values()) >= CHANGES


def test_a_change_that_cuts_the_agent_or_an_operator_is_refused_and_a_restoration_is_not(
    world: World, packages: dict[str, Path]
) -> None:
    digest = DIGEST[DROP]
    with running(world, packages["1.0.0"]) as module, contextlib.ExitStack() as stack:
        module.enforce(PASS)
        with inside(world.host):
            listening = stack.enter_context(socket.create_server((HOST4, 22)))
        with inside(world.peer):
            operator = stack.enter_context(socket.create_connection((HOST4, 22), 60))
        session = stack.enter_context(listening.accept()[0])
        session.settimeout(60)
        answer = module.ask(abi.Stage(digest=digest, serial=2, content=DROP, control=[]))
        assert isinstance(answer, abi.Failed) and answer.code == Code.POLICY_TEST_FAILED, answer
        assert "a session at port 22 would end" in answer.reason
        refused = module.ask(abi.Commit(digest=digest, trial_s=5))
        assert isinstance(refused, abi.Failed) and refused.code == Code.MODULE_ABI
        operator.sendall(b"still here")
        assert session.recv(100) == b"still here"
        assert module.health.policy == DIGEST[PASS]
        module.done(abi.Stage(digest=digest, serial=2, content=DROP))
    with running(world, packages["1.0.0"], management_ports=["2222"]) as module:
        module.done(abi.Stage(digest=digest, serial=2, content=DROP, control=[]))


def test_a_session_that_a_policy_ends_by_name_is_told_and_wrong_networks_are_refused(
    world: World, packages: dict[str, Path]
) -> None:
    banned = (
        b'{"version":1,"default":{"ingress":"accept","egress":"accept"},"rules":'
        b'[{"name":"banned","from":"%s","action":"drop"}]}' % PEER4.encode()
    )
    stage = abi.Stage(digest="ab" * 32, serial=2, content=banned, control=[])
    with running(world, packages["1.0.0"]) as module, contextlib.ExitStack() as stack:
        module.enforce(PASS)
        with inside(world.host):
            stack.enter_context(socket.create_server((HOST4, 22)))
        with inside(world.peer):
            stack.enter_context(socket.create_connection((HOST4, 22), 10))
        assert module.done(stage).detail["ends"] == f"{PEER4} at port 22"
        module.kill()
        with running(world, packages["1.0.0"], management_from=["10.77.0.0/24"]) as second:
            answer = second.ask(stage)
            assert isinstance(answer, abi.Failed) and "rule 'banned' drops ingress" in answer.reason
    for wrong in (["10.77.0.1/24"], ["nowhere"], [], ""):
        with running(world, packages["1.0.0"], management_from=wrong) as module:
            assert isinstance(module.configured, abi.Failed)
            assert module.configured.code == Code.CONFIG_INVALID
            assert "management_from" in module.configured.reason
