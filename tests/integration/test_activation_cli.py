"""`loopback rollout` as a process, against activation on a real broker and hosts that sign what they say."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import rulesets
from activation_fleet import Fleet, fleet, until
from support import Place
from support_cli import Operator as Typing
from support_fleet import OPERATOR

from loopback.cli import context
from loopback.contracts import envelope, exposure, journal
from loopback.contracts.codes import Code
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import Floor, Operator, Role, TrustDocument, WorkspaceRules
from loopback.services._runtime.bus import Outgoing
from loopback.services.activation import documents

pytestmark = pytest.mark.broker

BEN, VERA = SigningKey.generate(), SigningKey.generate()
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

    def __init__(self, found: Fleet, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
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

    async def govern(self, **rules: Any) -> None:
        """Operators ada (admin) and ben (approver), and these rules for prod."""
        operators = (
            Operator("ada", OPERATOR.public.text, {"*": (Role.ADMIN,)}),
            Operator("ben", BEN.public.text, {"prod": (Role.APPROVER,)}),
            Operator("vera", VERA.public.text, {"prod": (Role.VIEWER,)}),
        )
        await self.fleet.govern(
            TrustDocument(
                version=2, operators=operators, services={}, workspaces={"prod": WorkspaceRules(**rules)}
            )
        )

    @property
    def publisher(self) -> str:
        """The key that signed the releases."""
        repository = self.fleet.repository
        return repository.keys[repository.role].public.keyid

    def home(self, name: str, key: SigningKey) -> Path:
        """Another operator's own installation: the same bus, another key, the same pinned root."""
        home = self.folder / name
        (home / "tuf").mkdir(parents=True)
        shared = self.fleet.place.home
        (home / "tuf" / "root.json").write_bytes((shared / "tuf" / "root.json").read_bytes())
        key.save(home / "operator.pem")
        context.save(
            home,
            url=self.fleet.place.url,
            creds=str(shared / "creds" / "operator.creds"),
            operator_key="operator.pem",
        )
        return home

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def rollout(self, name: str, version: str = "1.0.0") -> str:
        return str(self.write(f"{name}.yaml", ROLLOUT.replace("NAME", name).replace("VERSION", version)))

    async def run(self, *arguments: str, home: Path | None = None, area: str = "rollout") -> Answer:
        loopback = Typing(home or self.fleet.place.home, self._capsys)
        answer = Answer(*await loopback(area, *arguments))
        assert "Traceback" not in answer.err, answer.err
        return answer

    async def json(self, *arguments: str) -> Any:
        answer = await self.run(*arguments, "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)


@pytest.fixture
async def desk(broker: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Desk]:
    async with fleet(broker, "h0", "h1", "h2") as found:
        made = Desk(found, tmp_path, capsys)
        await made.govern()
        yield made


async def test_an_operator_plans_starts_and_watches_a_rollout(desk: Desk) -> None:
    path = desk.rollout("r1")
    plan = await desk.run("plan", path)
    assert plan.code == 0, plan.err
    assert "canary: 1 hosts" in plan.out
    assert "prod is not regulated: one signature is enough" in plan.out
    assert "bring firewall 1.0.0 (package aaaaaaaaaaaa)" in plan.out
    assert "(serial 1) on 3 hosts (h0, h1, h2) at the same moment" in plan.out
    said = (await desk.json("plan", path))["exposure"]
    assert {e["id"] for e in said} <= {*exposure.CAN, *exposure.CANNOT}
    assert said[0]["id"] == "change-at-once" and said[0]["values"]["hosts"] == ["h0", "h1", "h2"]
    assert all(e["says"] in plan.out for e in said if e["id"] not in ("change-at-once", "way-back"))
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
    assert "AWAITING_APPROVAL" in answer.out


async def test_a_regulated_workspace_waits_for_a_second_operator_who_sees_what_is_signed(desk: Desk) -> None:
    assert (await desk.run("start", desk.rollout("r1"), "--watch")).code == 0
    await desk.govern(regulated=True, publishers={"firewall": (desk.publisher,)})
    desk.write(
        "web.yaml", POLICY + "  - {name: dns, direction: ingress, proto: udp, ports: 53, action: accept}\n"
    )
    path = desk.rollout("r2", "1.1.0")
    planned = await desk.run("plan", path)
    assert "prod is regulated: another operator has to approve it" in planned.out
    assert "[unapproved]" in planned.out

    started = await desk.run("start", path)
    assert started.code == 0, started.err
    assert "next: loopback rollout approve r2 --workspace prod" in started.err
    watched = await desk.run("watch", "r2")
    assert watched.code == 4
    assert "waits for another operator's approval" in watched.out
    assert "next: loopback rollout approve r2" in watched.err
    assert "AWAITING_APPROVAL" in (await desk.run("list")).out

    own = await desk.run("approve", "r2", "--yes")
    assert own.code == 2
    assert "[rollout.unapproved]" in own.err
    assert "ada signed the start too" in own.err

    ben = desk.home("ben", BEN)
    unasked = await desk.run("approve", "r2", home=ben)
    assert unasked.code == 2, "nobody confirms it, and it is no terminal"
    for part in (
        "rollout r2 in prod (regulated)", "started by ada at", "module firewall 1.1.0, package " + "b" * 64,
        f"pinned: {desk.publisher[:16]}", "policy web, serial 2", "added, 0 removed, against serial 1", '"dns"',
        "3 hosts match now: h0, h1, h2", "waves: canary (1 hosts); rest (up to 100%)", "[skip-pacing]",
    ):  # fmt: skip
        assert part in unasked.out, unasked.out + unasked.err
    assert all(host.promoted["firewall"].version == "1.0.0" for host in desk.fleet.hosts.values())

    approved = await desk.run("approve", "r2", "--yes", "--json", "--reason", "looked at", home=ben)
    assert approved.code == 0, approved.err
    said = json.loads(approved.out)
    assert (said["started_by"], said["hosts"], said["approved"]) == (["ada"], ["h0", "h1", "h2"], True)
    assert said["policy"]["authors"] == ["ada"]
    done = await desk.run("watch", "r2")
    assert done.code == 0, done.err
    assert "approved by ben" in done.out
    shown = await desk.json("show", "r2")
    assert shown["approvals"] == {"needed": 1, "by": ["ben"]}
    (entry,) = desk.fleet.hosts["h0"].states[-1].modules
    assert len(entry.approvals) == 1

    again = await desk.run("approve", "r2", "--yes", home=ben)
    assert again.code == 2
    assert "[rollout.state]" in again.err


async def test_an_approver_sees_what_changes_in_a_policy_that_no_envelope_holds(desk: Desk) -> None:
    plain = rulesets.plain(rulesets.simple(10_000))
    desk.write("web.yaml", json.dumps(plain))
    assert (await desk.run("start", desk.rollout("r1"), "--watch")).code == 0
    await desk.govern(regulated=True, publishers={"firewall": (desk.publisher,)})
    removed = plain["rules"].pop(7_000)
    plain["rules"].append({"name": "dns", "proto": "udp", "ports": 53, "action": "accept"})
    desk.write("web.yaml", json.dumps(plain))
    assert (await desk.run("start", desk.rollout("r2"))).code == 0
    asked = await desk.run("approve", "r2", "--yes", "--json", home=desk.home("ben", BEN))
    assert asked.code == 0, asked.err
    review = json.loads(asked.out)["policy"]
    assert (review["added"], review["removed"], review["before"]) == (1, 1, 1)
    for line, sign, name in zip(review["diff"], "-+", (removed["name"], "dns"), strict=True):
        assert line.startswith(f"{sign}rules: ")
        assert f'"name":"{name}"' in line


async def test_only_an_approver_approves(desk: Desk) -> None:
    await desk.govern(regulated=True, publishers={"firewall": ("f" * 64,)})
    assert (await desk.run("start", desk.rollout("r1"))).code == 0
    unpinned = await desk.run("approve", "r1", "--yes", home=desk.home("ben", BEN))
    assert unpinned.code == 2
    assert "[host.publisher]" in unpinned.err
    vera = await desk.run("abort", "r1", home=desk.home("vera", VERA))
    assert vera.code == 2
    assert "[command.unauthorised]" in vera.err


async def test_an_approver_is_not_fooled_by_what_activation_shows(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is activation's; the start in it is its operator's, and so is everything that is shown of it."""
    await desk.govern(regulated=True, publishers={"firewall": (desk.publisher,)})
    assert (await desk.run("start", desk.rollout("r1"))).code == 0
    await desk.fleet.ended("r1", "AWAITING_APPROVAL")
    created = desk.fleet.rollout("r1").created
    for replica in desk.fleet.replicas:
        await replica.stop()
    desk.fleet.replicas.clear()
    impatient = functools.partialmethod(context.Session.result, timeout=0.5)  # nobody will answer
    monkeypatch.setattr(context.Session, "result", impatient)

    async def shows(name: str, event: journal.Created) -> Answer:
        chain = documents.Chain("prod", name, 0, "")
        draft = chain.seal(event, datetime.now(UTC), "")
        await desk.fleet.admin.publish(Outgoing(draft.subject, draft.data, draft.headers))
        return await desk.run("approve", name, "--yes", home=desk.folder / "ben")

    desk.home("ben", BEN)
    other = await shows("r9", created)
    assert other.code == 2
    assert "is another command" in other.err
    lying = msgspec.structs.replace(created, version="1.1.0", package="b" * 64, operators=("zoe",))
    start = msgspec.structs.replace(created.start(), rollout="r8")
    signed = envelope.seal(envelope.COMMAND, msgspec.json.encode(start), OPERATOR)
    shown = await shows("r8", msgspec.structs.replace(lying, envelope=signed))
    assert "module firewall 1.0.0, package " + "a" * 64 in shown.out
    assert "started by ada" in shown.out and "zoe" not in shown.out
    forged = envelope.seal(envelope.COMMAND, msgspec.json.encode(start), VERA)
    assert (
        "[command.unauthorised]" in (await shows("r7", msgspec.structs.replace(created, envelope=forged))).err
    )


async def test_a_listing_of_workspaces_tells_labels_from_rules(desk: Desk) -> None:
    free = await desk.run("list", "--json", area="workspace")
    assert [(w["environment"], w["regulated"]) for w in json.loads(free.out)] == [("sandbox", False)]
    await desk.govern(regulated=True)
    listed = await desk.run("list", area="workspace")
    assert "prod       sandbox      yes" in listed.out
    (desk.fleet.place.home / "tuf" / "root.json").unlink()
    unknown = await desk.run("list", area="workspace")
    assert unknown.code == 0
    assert "prod       sandbox      ?" in unknown.out
    assert "cannot be said" in unknown.err


async def test_the_workspaces_floor_is_said_at_the_start(desk: Desk) -> None:
    await desk.govern(floors={"firewall": Floor("1.1.0")})
    planned = await desk.run("plan", desk.rollout("r1"))
    assert "hosts refuse 1.0.0" in planned.out
    started = await desk.run("start", desk.rollout("r1"))
    assert started.code == 2
    assert "[host.below-floor]" in started.err
    assert (await desk.run("start", desk.rollout("r2", "1.1.0"), "--watch")).code == 0
