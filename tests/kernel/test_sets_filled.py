"""Sets that hosts' labels and pools fill, with real packets: joined they pass, gone they do not, and bounds hold.

First the module's own process, spoken to over its socket; then everything together: an operator signs a record or a pool, and
services, agent and module carry it into the kernel of a host in a namespace.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Place, eventually
from support_datapath import OTHER4, PEER4, UDP, World, to_host
from support_firewall import Process, running, until
from support_installation import Installation, installation

from loopback.contracts import abi
from loopback.contracts.abi import Filled
from loopback.contracts.codes import Code
from loopback.contracts.reports import ModuleStatus, Phase
from loopback.host import agent as agents
from loopback.host import filling
from loopback.host.config import Allow
from loopback.host.launch import Launch
from loopback.host.process import Child, DirectChild, confined
from loopback.modules.build import build_module
from loopback.modules.firewall import module as firewall

pytestmark = pytest.mark.kernel
SOURCE = Path(firewall.__file__).parent
PATIENCE = 60.0
CLONE_NEWNET = 0x40000000


def policy(**changed: Any) -> bytes:
    web = {"labels": {"role": "web"}, "within": ["10.77.0.0/24"], "max": 2}
    return json.dumps(
        {
            "version": 1,
            "default": {"ingress": "drop", "egress": "accept"},
            "sets": {"web": web} | changed,
            "rules": [{"name": "web", "from": "@web", "proto": "udp", "ports": 9, "action": "accept"}],
        }
    ).encode()


POLICY = policy()
DIGEST = hashlib.sha256(POLICY).hexdigest()


def web(*addresses: str) -> dict[str, Filled]:
    return {"web": Filled(labels={"role": "web"}, addresses=list(addresses))}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The firewall's package."""
    return build_module(SOURCE, version="1.0.0", out=tmp_path_factory.mktemp("package")).path


@pytest.fixture(scope="session")
def package(built: Path) -> Path:
    with tarfile.open(built) as tar:
        tar.extractall(built.parent / "unpacked")
    return built.parent / "unpacked"


@pytest.fixture
def world() -> Iterator[World]:
    """A host and a peer; this thread stays where the broker is."""
    with open("/proc/thread-self/ns/net") as home, World() as made:
        assert ctypes.CDLL(None).setns(home.fileno(), CLONE_NEWNET) == 0
        yield made


def who_passes(world: World) -> tuple[bool, bool]:
    """Whether packets of the peer and of the other address pass, each of a new flow."""
    sport = 1024 + who_passes.sport % 60_000  # type: ignore[attr-defined]
    who_passes.sport += 1  # type: ignore[attr-defined]
    peer, other = world.arriving(*(to_host(UDP(sport=sport, dport=9), src=src) for src in (PEER4, OTHER4)))
    return peer, other


who_passes.sport = 0  # type: ignore[attr-defined]


def enforce(module: Process, fills: dict[str, Filled]) -> None:
    module.done(abi.Stage(digest=DIGEST, serial=1, content=POLICY, fills=fills))
    module.done(abi.Commit(digest=DIGEST, trial_s=60))
    module.done(abi.Confirm(digest=DIGEST))


def refill(module: Process, fills: dict[str, Filled], trial_s: float = 60, *, confirm: bool = True) -> None:
    module.done(abi.Fill(digest=DIGEST, fills=fills))
    module.done(abi.Commit(digest=DIGEST, trial_s=trial_s))
    if confirm:
        module.done(abi.Confirm(digest=DIGEST))


def test_who_joins_passes_and_who_leaves_does_not(world: World, package: Path) -> None:
    with running(world, package) as module:
        enforce(module, web())
        assert who_passes(world) == (False, False)
        refill(module, web(PEER4))
        assert who_passes(world) == (True, False)
        flow = to_host(UDP(sport=999, dport=9))
        assert world.arriving(flow, flow) == [True, True]
        refill(module, web(PEER4, OTHER4))
        assert who_passes(world) == (True, True)
        assert module.health.detail["sets"] == "web=2"
        metrics = module.done(abi.Metrics()).metrics
        assert metrics['loopback_firewall_set_prefixes{set="web"}'] == 2
        packets = metrics['loopback_firewall_rule_packets_total{rule="web"}']
        refill(module, web(OTHER4))
        assert who_passes(world) == (False, True)
        assert world.arriving(flow) == [False], "its live flow ends with it"
        after = module.done(abi.Metrics()).metrics['loopback_firewall_rule_packets_total{rule="web"}']
        assert after >= packets, "a rule's counter goes on"
        refill(module, web())
        assert who_passes(world) == (False, False)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (web(OTHER4, "192.0.2.1"), Code.SET_OUTSIDE),
        (web(OTHER4, "10.77.0.0/16"), Code.SET_OUTSIDE),
        (web(OTHER4, "0.0.0.0/0"), Code.SET_OUTSIDE),
        (web(OTHER4, "fd77::2"), Code.SET_OUTSIDE),
        (web(OTHER4, "no address"), Code.SET_OUTSIDE),
        (web(OTHER4, "10.77.0.8", "10.77.0.9"), Code.SET_TOO_LARGE),
        ({"web": Filled(labels={"role": "db"}, addresses=[OTHER4])}, Code.SET_UNFILLED),
        ({}, Code.SET_UNFILLED),
    ],
)
def test_beyond_its_bounds_nothing_changes_and_it_says_degraded(
    world: World, package: Path, wrong: dict[str, Filled], code: Code
) -> None:
    with running(world, package) as module:
        enforce(module, web(PEER4))
        answer = module.ask(abi.Fill(digest=DIGEST, fills=wrong))
        assert isinstance(answer, abi.Failed) and answer.code == code and "'web'" in answer.reason
        assert answer.next_step
        health = module.health
        assert (health.state, health.enforcing, health.policy, health.code) == (
            "degraded",
            True,
            DIGEST,
            code,
        )
        assert isinstance(module.ask(abi.Commit(digest=DIGEST, trial_s=60)), abi.Failed), "nothing is staged"
        assert who_passes(world) == (True, False)
        refill(module, web(OTHER4))
        assert who_passes(world) == (False, True)
        assert module.health.state == "ok"


def test_a_first_policy_beyond_its_bounds_is_not_staged(world: World, package: Path) -> None:
    with running(world, package) as module:
        for wrong, code in ((web("192.0.2.1"), Code.SET_OUTSIDE), ({}, Code.SET_UNFILLED)):
            answer = module.ask(abi.Stage(digest=DIGEST, serial=1, content=POLICY, fills=wrong))
            assert isinstance(answer, abi.Failed) and answer.code == code
        assert who_passes(world) == (True, True), "nothing is enforced"


def test_a_revert_and_a_deadline_undo_a_change_of_sets(world: World, package: Path) -> None:
    with running(world, package) as module:
        enforce(module, web(PEER4))
        refill(module, web(OTHER4), confirm=False)
        assert who_passes(world) == (False, True)
        module.done(abi.Revert())
        assert who_passes(world) == (True, False)
        assert module.health.code == Code.HOST_UNCONFIRMED
        refill(module, web(OTHER4), 0.2, confirm=False)
        until(lambda: who_passes(world) == (True, False))
        assert isinstance(module.ask(abi.Confirm(digest=DIGEST)), abi.Failed)
        module.done(abi.Revert())
        refill(module, web(OTHER4))
        assert (who_passes(world), module.health.state) == ((False, True), "ok")


def test_killed_in_the_middle_the_kernel_falls_back_and_a_successor_goes_on(
    world: World, package: Path
) -> None:
    with running(world, package) as module:
        enforce(module, web(PEER4))
        until((world.state / "promoted.json").exists)  # else its successor is given the policy again
        refill(module, web(OTHER4), 1, confirm=False)
        module.kill()
    until(lambda: who_passes(world) == (True, False))
    with running(world, package) as module:
        refill(module, web(PEER4, OTHER4))
        assert who_passes(world) == (True, True)
        assert module.health.detail["sets"] == "web=2"


def test_a_policys_own_tests_hold_for_every_content_of_its_sets(world: World, package: Path) -> None:
    content = json.loads(POLICY)
    packet = {"src": OTHER4, "dst": "10.77.0.1", "proto": "udp", "dport": 9}
    content["tests"] = [{"packet": packet, "expect": "drop"}]
    data = json.dumps(content).encode()
    digest = hashlib.sha256(data).hexdigest()
    with running(world, package) as module:
        module.done(abi.Stage(digest=digest, serial=1, content=data, fills=web(PEER4)))
        module.done(abi.Commit(digest=digest, trial_s=60))
        module.done(abi.Confirm(digest=digest))
        answer = module.ask(abi.Fill(digest=digest, fills=web(OTHER4)))
        assert isinstance(answer, abi.Failed) and answer.code == Code.POLICY_TEST_FAILED
        assert (who_passes(world), module.health.code) == ((True, False), Code.POLICY_TEST_FAILED)


def test_a_set_of_thousands_is_a_table_and_shrinks_to_entries(world: World, package: Path) -> None:
    many = policy(web={"labels": {"role": "web"}, "within": ["10.0.0.0/8"], "max": 20000})
    digest = hashlib.sha256(many).hexdigest()
    others = [f"10.9.{n >> 8}.{n & 255}" for n in range(9000)]
    with running(world, package) as module:
        for number, addresses in enumerate(([], [*others, PEER4], [OTHER4], others)):
            if number == 0:
                module.done(abi.Stage(digest=digest, serial=1, content=many, fills=web(*addresses)))
            else:
                module.done(abi.Fill(digest=digest, fills=web(*addresses)))
            module.done(abi.Commit(digest=digest, trial_s=60))
            module.done(abi.Confirm(digest=digest))
            assert who_passes(world) == (PEER4 in addresses, OTHER4 in addresses)
        assert module.health.detail["sets"] == "web=9000"


# ── everything together ───────────────────────────────────────────────────────────────────────────────────────────────────────

ROLLOUT = """\
rollout: {name}
workspace: prod
module: firewall
version: 1.0.0
policy: {name}-policy.json
waves: [{{name: all, percent: 100}}]
trial: 300ms
host_deadline: 60s
"""


async def start(prod: Installation, name: str, content: dict[str, Any]) -> None:
    (prod.folder / f"{name}-policy.json").write_text(json.dumps(content))
    (prod.folder / f"{name}.yaml").write_text(ROLLOUT.format(name=name))
    said = await prod("rollout", "start", str(prod.folder / f"{name}.yaml"), "--watch")
    assert "DONE" in said.out + said.err


@pytest.mark.broker
async def test_an_operators_word_on_a_host_or_a_pool_reaches_the_kernel_of_every_host(
    broker: Place, tmp_path: Path, world: World, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def in_namespace(launch: Launch, abi_end: int, output: int) -> Child:
        return DirectChild(
            await asyncio.create_subprocess_exec(
                "nsenter", f"--net=/run/netns/{world.host}", *confined(launch),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(abi_end,), cwd=launch.cwd,
                env={**launch.env, abi.FD_VARIABLE: str(abi_end)}, start_new_session=True,
            )
        )  # fmt: skip

    monkeypatch.setattr(agents, "direct", in_namespace)
    monkeypatch.setattr(filling, "SPREAD_S", 0.05)
    monkeypatch.setattr(filling, "AGAIN_S", 0.5)
    async with installation(broker, tmp_path) as prod:
        await prod("entitlement", "put", "fw", "--workspace", "prod", "--module", "firewall")
        await prod("module", "publish", str(built))
        await prod.host("fw-1", run=False)
        prod.configs["fw-1"] = msgspec.structs.replace(
            prod.configs["fw-1"],
            allow=Allow(modules=("firewall",), capabilities=("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")),
            modules={"firewall": {"interfaces": ["eth0"], "bpf_root": str(world.bpf)}},
        )
        prod.run_host("fw-1")
        await eventually(lambda: prod.said("fw-1"), PATIENCE)
        for name, address in (("web-1", PEER4), ("web-2", OTHER4)):
            folder = str(tmp_path / name)
            await prod("host", "add", name, "--workspace", "prod", "--address", address, "--out", folder)

        async def told(health: str, code: Code | None = None) -> ModuleStatus:
            async def check() -> ModuleStatus | None:
                said = await prod.said("fw-1")
                one = next((m for m in said.modules if m.module == "firewall"), None) if said else None
                found = one.refusal.code if one and one.refusal else None
                return one if one and (one.health, found) == (health, code) else None

            made = await eventually(check, PATIENCE)
            assert made is not None
            return made

        async def passing(*wanted: bool) -> None:
            await eventually(lambda: who_passes(world) == wanted, PATIENCE)

        content = json.loads(
            policy(
                web={"labels": {"role": "web"}, "within": ["10.77.0.0/24"], "max": 2},
                backends={"pool": "shop", "within": ["10.77.0.0/24"], "max": 2},
            )
        )
        content["rules"][0]["from"] = ["@web", "@backends"]
        await start(prod, "r1", content)
        one = await told("ok")
        assert one.phase is Phase.PROMOTED
        generation = one.generation
        await passing(False, False)

        await prod("host", "change", "web-1", "--label", "role=web")
        await passing(True, False)
        await prod("pool", "put", "shop", OTHER4)
        await passing(True, True)
        await prod("host", "change", "web-1", "--label", "role=db")
        await passing(False, True)
        await prod("pool", "remove", "shop")
        await passing(False, False)

        await prod("host", "change", "web-2", "--label", "role=web")
        await passing(False, True)
        await prod("pool", "put", "shop", "192.0.2.0/24")
        one = await told("degraded", Code.SET_OUTSIDE)
        assert one.enforcing and one.refusal is not None and "192.0.2.0/24" in one.refusal.reason
        shown = await prod("host", "show", "fw-1")
        assert Code.SET_OUTSIDE in shown.out and "192.0.2.0/24" in shown.out
        await passing(False, True)
        await prod("pool", "put", "shop", PEER4)
        await passing(True, True)
        assert (await told("ok")).generation == generation, "no rollout, and no other desired state"

        await prod("host", "revoke", "web-2", "--workspace", "prod")
        await passing(True, False)
