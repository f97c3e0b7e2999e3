"""`loopback posture` on a real installation: what it answers, and what it admits not to know."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import Place, eventually
from support_installation import Installation, installation

from loopback.cli import posturedoc
from loopback.cli.posturedoc import Posture
from loopback.services._runtime import trustsource

pytestmark = pytest.mark.broker


@pytest.fixture
async def prod(broker: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Installation]:
    monkeypatch.setattr(trustsource, "LOOK_AGAIN_S", 0.0)  # an unknown key makes services look at once
    async with installation(broker, tmp_path, "web-1", "web-2", "web-3") as found:
        yield found


async def posture(prod: Installation) -> Posture:
    """The document, which decodes to its own schema, and whose Markdown names every host and every module."""
    said = await prod("posture", "prod", "--format", "json")
    found = posturedoc.decode(said.out.encode())
    markdown = (await prod("posture", "prod")).out
    for name in (
        [h.name for h in found.hosts] + [m.name for m in found.modules] + [r.name for r in found.rollouts]
    ):
        assert name in markdown
    for question in found.questions:
        assert question.because.split()[0] in markdown
    return found


async def _degraded(prod: Installation, name: str) -> bool:
    found = await prod.said(name)
    return found is not None and found.agent == "degraded"


async def test_before_anything_is_rolled_out_it_says_that_nothing_is_known(prod: Installation) -> None:
    found = await posture(prod)
    assert (found.environment.name, found.environment.signed_by) == ("production", ("admin",))
    assert not found.rules.regulated
    (tiny,) = found.modules
    assert tiny.uses == ()
    (release,) = tiny.releases
    assert (release.signed, release.threshold, len(release.signers), release.pinned) == (True, 1, 1, None)
    assert {h.journal for h in found.hosts} == {"has witnessed nothing yet"}
    assert found.rollouts == ()
    assert any("which interfaces" in q.about for q in found.questions)


async def test_a_mixed_fleet_is_told_apart_host_by_host(prod: Installation) -> None:
    """One host stays behind with the old version, one is broken, one was never seen; a rollout failed."""
    await prod.roll_out("r1")
    await prod.stop_host("web-3")
    await prod.release("1.1")
    await prod.release("1.2", "unhealthy")
    await prod.host("web-9", "role=spare", run=False)
    selected = prod.rollout_file("r2", "1.1", hosts=("web-1", "web-2"))
    await prod("rollout", "start", selected, "--watch")
    failed = prod.rollout_file("r3", "1.2", hosts=("web-1",))
    await prod("rollout", "start", failed, "--watch", code=3)
    await eventually(lambda: _lost(prod, "web-3"))
    found = await posture(prod)

    (tiny,) = found.modules
    uses = {u.version: u for u in tiny.uses}
    assert set(uses) == {"1.0", "1.1"}
    assert uses["1.1"].hosts == ("web-1", "web-2")
    assert uses["1.0"].hosts == ("web-3",)
    assert (uses["1.1"].rollout, uses["1.1"].started_by, uses["1.1"].policy_signed_by) == (
        "r2",
        ("admin",),
        ("admin",),
    )
    assert all(u.as_signed and u.since is not None for u in tiny.uses)
    assert tiny.blast is not None
    assert (tiny.blast.powers, tiny.blast.memory_mib, tiny.blast.stop_s) == ((), 256, 2.0)

    hosts = {h.name: h for h in found.hosts}
    assert (hosts["web-3"].state, hosts["web-9"].state) == ("lost", "never seen")
    assert hosts["web-9"].problems == ("never seen",)
    assert hosts["web-9"].labels == {"role": "spare"}
    assert any("lost" in p for p in hosts["web-3"].problems)
    assert hosts["web-2"].problems == ()
    assert hosts["web-2"].verified
    rollouts = {r.name: r for r in found.rollouts}
    assert (rollouts["r3"].state, rollouts["r2"].state) == ("ROLLED_BACK", "DONE")
    assert rollouts["r3"].reason
    assert [w.hosts for w in rollouts["r1"].waves] == [1, 2]
    assert any(q.about == "what web-9 runs" for q in found.questions)
    assert found.journal.intact


async def _lost(prod: Installation, name: str) -> bool:
    said = (await prod("hosts", "--workspace", "prod", "--json")).json
    return any(h["host"] == name and h["lost"] for h in said)


async def test_a_host_that_is_degraded_says_why(prod: Installation) -> None:
    await prod.release("1.3", "ends-at-once")
    path = prod.rollout_file("r1", "1.3", more="on_failure: halt\n")
    await prod("rollout", "start", path, "--watch", code=4)
    await eventually(lambda: _degraded(prod, "web-1"))
    found = await posture(prod)
    bad = [h for h in found.hosts if h.problems]
    assert [h.name for h in bad] == ["web-1"]
    assert "its agent says that it is degraded" in bad[0].problems
    assert any("[module.start]" in p for p in bad[0].problems)


async def test_a_regulated_workspace_shows_both_signatures_and_its_rules(prod: Installation) -> None:
    signer = (await posture(prod)).modules[0].releases[0].signers[0]
    await prod("keys", "operator", "ben", "--role", "approver")
    rules = ["--regulated", "--publisher", f"tiny={signer}", "--floor", "tiny=1.0"]
    await prod("keys", "workspace", "prod", *rules)
    await prod("keys", "operator", "cleo", "--role", "releaser", "--role", "author")
    await prod("rollout", "start", prod.rollout_file("r1"), operator="cleo")
    waiting = await posture(prod)
    assert (waiting.rollouts[0].state, waiting.rollouts[0].approved_by) == ("AWAITING_APPROVAL", ())
    await prod("rollout", "approve", "r1", "--yes", operator="ben")
    await prod("rollout", "watch", "r1")
    found = await posture(prod)
    assert found.rules.regulated
    assert found.rules.publishers == {"tiny": (signer,)}
    assert found.rules.floors == {"tiny": "1.0"}
    (use,) = found.modules[0].uses
    assert (use.started_by, use.approved_by) == (("cleo",), ("ben",))
    assert found.modules[0].releases[0].pinned is True
    people = {p.name: p for p in found.people}
    assert people["ben"].roles == ("approver",)
    assert people["ben"].may == ("approve a rollout that somebody else started",)
    assert all(not h.problems for h in found.hosts), found.hosts
    acts = (await prod("audit", "--workspace", "prod", "--rollout", "r1", "--json")).json["acts"]
    signed = [(a["what"], *a["who"], a.get("signature", "")) for a in acts]
    assert ("rollout.start", "cleo", "signature ok") in signed
    assert ("rollout.approve", "ben", "signature ok") in signed


async def test_a_workspace_that_is_not_there_is_one_clear_message(prod: Installation) -> None:
    said = await prod("posture", "prd", code=2)
    assert "did you mean 'prod'?" in said.err
