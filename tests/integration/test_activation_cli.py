"""`loopback rollout` as a process, against activation on a real broker and hosts that sign what they say."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from activation_fleet import Fleet, fleet, until
from support import Place
from support_fleet import OPERATOR

from loopback.cli import context
from loopback.contracts.codes import Code
from loopback.contracts.reports import Phase

pytestmark = pytest.mark.broker

POLICY = """\
version: 1
default: {ingress: drop, egress: accept}
rules:
  - {name: ssh, direction: ingress, proto: tcp, ports: 22, action: accept}
"""
ROLLOUT = """\
rollout: NAME
workspace: prod
module: firewall
version: VERSION
policy: web.yaml
waves:
  - {name: canary, count: 1}
  - {name: rest, percent: 100}
trial: 1s
"""


class Answer(NamedTuple):
    code: int
    out: str
    err: str


class Desk:
    """An operator's desk: a folder with files, and the command line."""

    def __init__(self, found: Fleet, folder: Path) -> None:
        self.fleet = found
        self.folder = folder
        OPERATOR.save(found.place.home / "operator.pem")
        context.save(
            found.place.home,
            url=found.place.url,
            creds="creds/operator.creds",
            operator_key="operator.pem",
        )
        self.write("web.yaml", POLICY)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def rollout(self, name: str, version: str = "1.0.0") -> str:
        return str(self.write(f"{name}.yaml", ROLLOUT.replace("NAME", name).replace("VERSION", version)))

    async def run(self, *arguments: str) -> Answer:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loopback.cli.main", "--home", str(self.fleet.place.home), "rollout", *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert "Traceback" not in err.decode(), err.decode()
        assert process.returncode is not None
        return Answer(process.returncode, out.decode(), err.decode())

    async def json(self, *arguments: str) -> Any:
        answer = await self.run(*arguments, "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)


@pytest.fixture
async def desk(broker: Place, tmp_path: Path) -> AsyncIterator[Desk]:
    async with fleet(broker, "h0", "h1", "h2") as found:
        yield Desk(found, tmp_path)


async def test_an_operator_plans_starts_and_watches_a_rollout(desk: Desk) -> None:
    path = desk.rollout("r1")
    plan = await desk.run("plan", path)
    assert plan.code == 0, plan.err
    assert "canary: 1 hosts" in plan.out
    assert "these 3 hosts at once, with this policy (serial 1)" in plan.out
    assert desk.fleet.links == [], "a plan changes nothing"

    done = await desk.run("start", path, "--watch")
    assert done.code == 0, done.err
    lines = [line.split("  ", 1)[1] for line in done.out.splitlines()]
    assert lines[0] == "created: firewall 1.0.0 for 3 hosts by ada"
    assert lines[-1] == "DONE"
    assert any(line.startswith("wave 'canary' is done") for line in lines)
    promoted = {host.promoted["firewall"] for host in desk.fleet.hosts.values()}
    assert {(p.version, p.policy_serial) for p in promoted if p} == {("1.0.0", 1)}

    shown = await desk.json("show", "r1")
    assert shown["state"] == "DONE"
    assert [(w["name"], w["state"], len(w["hosts"])) for w in shown["waves"]] == [
        ("canary", "DONE", 1),
        ("rest", "DONE", 2),
    ]
    assert len(shown["trace_id"]) == 32
    assert {h["standing"] for h in shown["host_states"].values()} == {"promoted"}
    assert [r["rollout"] for r in await desk.json("list")] == ["r1"]
    assert "DONE" in (await desk.run("list")).out
    assert (await desk.run("watch", "r1")).code == 0


async def test_a_rollout_that_rolls_back_is_exit_code_3_and_says_why(desk: Desk) -> None:
    assert (await desk.run("start", desk.rollout("r1"), "--watch")).code == 0
    for host in desk.fleet.hosts.values():
        host.behave = lambda host, module: (Phase.ROLLED_BACK, Code.MODULE_DIED)
    answer = await desk.run("start", desk.rollout("r2", "1.1.0"), "--watch")
    assert answer.code == 3, answer.err
    assert "wave 'canary' failed: 1 of 1 answers, 0 may" in answer.out
    assert "ROLLED_BACK" in answer.err
    assert "module.died" in answer.err
    watched = await desk.run("watch", "r2", "--json")
    assert watched.code == 3
    assert json.loads(watched.out.splitlines()[-1])["event"]["name"] == "rolled-back"
    shown = await desk.json("show", "r2")
    assert shown["policy_serial"] == 2, "the next policy's serial follows the last in use"


async def test_an_operator_pauses_resumes_and_aborts(desk: Desk) -> None:
    for host in desk.fleet.hosts.values():
        host.behave = lambda host, module: (Phase.IDLE, None)
    assert (await desk.run("start", desk.rollout("r1"))).code == 0
    await until(
        lambda: desk.fleet.state.rollouts and desk.fleet.rollout("r1").in_flight, "the canary is assigned"
    )
    assert (await desk.run("pause", "r1", "--reason", "lunch")).code == 0
    watched = await desk.run("watch", "r1")
    assert watched.code == 4
    assert "paused by ada: lunch" in watched.out
    assert (await desk.run("resume", "r1")).code == 0
    twice = await desk.run("resume", "r1")
    assert twice.code == 2
    assert "[rollout.state]" in twice.err
    assert (await desk.run("abort", "r1")).code == 0
    assert (await desk.run("watch", "r1")).code == 3


async def test_mistakes_are_one_clear_message_and_exit_code_2(desk: Desk) -> None:
    wrong = desk.write(
        "wrong.yaml", ROLLOUT.replace("VERSION", "1.0.0").replace("count: 1", "count: 1, percent: 5")
    )
    answer = await desk.run("start", str(wrong))
    assert answer.code == 2
    assert f"{wrong}:7: waves[0].percent: a wave has either count or percent, not both" in answer.err

    unknown = await desk.run("start", desk.rollout("r1", "9.9.9"))
    assert unknown.code == 2
    assert "r1.yaml:4: version: there is no release of firewall 9.9.9; published: 1.0.0, 1.1.0" in unknown.err

    desk.write(
        "web.yaml", POLICY + "  - {name: bad, direction: ingress, proto: tcp, ports: 9-1, action: accept}\n"
    )
    policy = await desk.run("start", desk.rollout("r1"))
    assert policy.code == 2
    assert "web.yaml:5" in policy.err

    missing = await desk.run("show", "nobody", "--workspace", "prod")
    assert missing.code == 2
    assert "[rollout.unknown]" in missing.err
    assert (await desk.run("plan", str(desk.folder / "none.yaml"))).code == 2
    assert desk.fleet.links == []


async def test_help_documents_the_exit_codes(desk: Desk) -> None:
    answer = await desk.run("--help")
    assert "3 ROLLED_BACK" in " ".join(answer.out.split())
