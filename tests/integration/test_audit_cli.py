"""`loopback audit` on a real installation: who did what, and what is wrong with how it is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import Place, eventually
from support_installation import Installation, installation

pytestmark = pytest.mark.broker


@pytest.fixture
async def prod(broker: Place, tmp_path: Path) -> AsyncIterator[Installation]:
    async with installation(broker, tmp_path, "web-1", "web-2") as found:
        yield found


def told(answer: Any) -> list[tuple[str, ...]]:
    return [(a["what"], ", ".join(a["who"]), a.get("outcome", "accepted")) for a in answer["acts"]]


async def test_an_audit_tells_who_did_what_and_that_hosts_confirm_it(prod: Installation) -> None:
    await prod("keys", "operator", "ben", "--role", "releaser", "--role", "author")
    await prod.roll_out("r1", operator="ben")
    await prod("rollout", "abort", "nothing", "--workspace", "prod", operator="ben", code=2)
    await prod(
        "host", "add", "web-9", "--workspace", "prod", "--out", str(prod.folder / "x"), operator="ben", code=2
    )
    await eventually(lambda: prod.witnessed("web-2"))
    answer = (await prod("audit", "--workspace", "prod", "--json")).json
    assert told(answer) == [
        ("workspace.put", "admin", "accepted"),
        ("metadata.publish", "admin", "accepted"),
        ("entitlement.put", "admin", "accepted"),
        ("release.publish", "admin", "accepted"),
        ("host.put", "admin", "accepted"),
        ("host.put", "admin", "accepted"),
        ("metadata.publish", "admin", "accepted"),
        ("rollout.start", "ben", "accepted"),
        ("rollout started", "activation", "decided"),
        ("rollout done", "activation", "decided"),
        ("rollout.abort", "ben", "refused"),
        ("host.put", "ben", "refused"),
    ]
    start, refused = answer["acts"][7], answer["acts"][-1]
    assert (start["signature"], len(start["keyids"]), start["rollout"]) == ("signature ok", 1, "r1")
    assert refused["signature"] == "signature ok, by somebody who may not do this now"
    assert refused["code"] == "command.unauthorised"
    assert answer["good"]
    assert answer["journal"]["intact"]
    assert [h["agreement"] for h in answer["journal"]["hosts"]] == ["confirms", "confirms"]
    (release,) = answer["releases"]
    assert release["signed"]
    assert release["signers"]

    async def only(*words: str) -> list[tuple[str, ...]]:
        return told((await prod("audit", "--workspace", "prod", "--json", *words)).json)

    assert {who for _, who, _ in await only("--operator", "ben")} == {"ben"}
    assert [what for what, _, _ in await only("--rollout", "r1")] == [
        "rollout.start",
        "rollout started",
        "rollout done",
    ]
    of_host = [what for what, _, _ in await only("--host", "web-1")]
    assert of_host == ["host.put", "rollout.start", "rollout started", "rollout done"]
    assert await only("--since", "2100-01-01") == []
    assert len(await only("--since", "1h")) == 12

    for_people = await prod("audit", "--workspace", "prod")
    assert "rollout.start     r1: tiny 1.0" in for_people.out
    assert "2 of 2 hosts confirm the journal" in for_people.out


async def test_what_is_asked_wrongly_is_one_clear_message(prod: Installation, tmp_path: Path) -> None:
    wrong = await prod("audit", "--since", "yesterday", code=2)
    assert "--since 'yesterday' is no time" in wrong.err
    near = await prod("audit", "--workspace", "prd", code=2)
    assert "did you mean 'prod'?" in near.err
    nothing = await prod("audit", "--from", str(tmp_path / "none.json"), code=2)
    assert "none.json" in nothing.err
    both = await prod("audit", "--from", str(tmp_path / "none.json"), "--workspace", "prod", code=2)
    assert "leave --workspace" in both.err
    stranger = tmp_path / "strange.json"
    stranger.write_text("{}")
    root = await prod("audit", "--workspace", "prod", "--root", str(stranger), code=2)
    assert "the pinned root is not TUF metadata" in root.err


async def test_hosts_that_witnessed_nothing_are_no_evidence(prod: Installation) -> None:
    said = await prod("audit", "--workspace", "prod")
    assert "2 of 2 witnessed nothing yet: web-1, web-2" in said.out
