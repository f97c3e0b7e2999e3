"""What the rollout commands and `module verify` say: nothing twice, and always which file is meant."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from activation_world import World

from loopback.cli import fleetio, main, rolloutfile, rolloutview
from loopback.contracts import envelope, journal, subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Record, WorkspacePut
from loopback.contracts.reports import Phase
from loopback.trust import package


class Watch:
    """What a plain `rollout watch` prints of the links that are told."""

    def __init__(self) -> None:
        self.world = World(3)
        self.rollout = self.world.begin()
        self.shown: rolloutview.Shown = {}

    def says(self, event: journal.AnyEvent) -> str:
        link = journal.Link(rollout="r1", workspace="prod", seq=1, prev="", at=self.world.now, event=event)
        return rolloutview.line(self.rollout, link, self.shown).partition("  ")[2]

    def observed(self, phase: Phase, *hosts: str, why: str = "", enforcing: bool = False) -> str:
        refusal = Refusal(Code.HOST_DISK, why) if why else None
        seen = tuple(
            journal.Observation(host=h, phase=phase, generation=1, refusal=refusal, enforcing=enforcing)
            for h in hosts
        )
        return self.says(journal.Observed(hosts=seen))


def test_a_hosts_line_is_printed_when_its_phase_or_refusal_changed_and_only_then() -> None:
    watch = Watch()
    assert watch.observed(Phase.TRIAL, "h0", "h1") == "h0, h1 trial"
    assert watch.observed(Phase.TRIAL, "h0", enforcing=True) == ""
    assert watch.observed(Phase.TRIAL, "h0", "h2") == "h2 trial"
    assert watch.observed(Phase.REJECTED, "h0", why="the disk is full") == "h0 rejected: the disk is full"
    assert watch.observed(Phase.REJECTED, "h0", why="the disk is full") == ""
    assert watch.observed(Phase.REJECTED, "h0", why="no such disk") == "h0 rejected: no such disk"


def test_the_same_phase_of_another_turn_is_printed_again() -> None:
    watch = Watch()
    watch.observed(Phase.TRIAL, "h0", "h1")
    assigned = journal.Assigned(
        wave=0, hosts=(journal.Assignment("h0", 2),), not_after=watch.world.now, returning=True
    )
    assert watch.says(assigned) == "told to return: h0"
    assert watch.observed(Phase.TRIAL, "h0", "h1") == "h0 trial"


@pytest.mark.parametrize("data", [b"rollout: \x00", b"\xff\xfe\xfa", b"a: \xc3\x28"])
def test_a_rollout_file_that_is_no_text_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bin.yaml"
    path.write_bytes(data)
    with pytest.raises(Refused) as caught:
        rolloutfile.load(path)
    assert caught.value.code is Code.ROLLOUT_INVALID
    assert str(path) in caught.value.reason
    assert "byte string" not in caught.value.reason


def test_a_folder_is_no_package_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused) as caught:
        package.inspect(tmp_path)
    assert (caught.value.code, str(tmp_path) in caught.value.reason) == (Code.PACKAGE_MALFORMED, True)
    with pytest.raises(SystemExit) as end:
        main.main(["module", "verify", str(tmp_path)])
    said = capsys.readouterr().err
    assert (end.value.code, str(tmp_path) in said) == (2, True)


class Stored:
    """A session that has these workspaces."""

    def __init__(self, *names: str) -> None:
        self.names = names

    async def read(self, stream: str, filters: list[str], *, last: bool) -> list[object]:
        world = World(1)
        key = SigningKey.from_raw(bytes(32))
        found = []
        for name in self.names:
            command = WorkspacePut(
                id="c", workspace=name, issued_at=world.now, expires_at=world.now, environment="sandbox"
            )
            sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), key)
            record = Record(
                kind="workspace", name=name, workspace=name, envelope=sealed, at=world.now, sequence=1
            )
            subject = subjects.record(name, "workspace", name)
            found.append(_Message(subject, msgspec.json.encode(record)))
        return found


class _Message(msgspec.Struct):
    subject: str
    data: bytes


@pytest.mark.parametrize("ask", [fleetio.any_workspace, fleetio.only_workspace])
async def test_an_unknown_workspace_is_refused_naming_what_is_near(ask: object) -> None:
    assert callable(ask)
    session = Stored("prod", "staging")
    assert await ask(session, "prod") == "prod"
    with pytest.raises(Refused) as caught:
        await ask(session, "prodd")
    assert caught.value.code is Code.WORKSPACE_UNKNOWN
    assert caught.value.reason == "there is no workspace 'prodd'; did you mean 'prod'?"
    with pytest.raises(Refused) as caught:
        await ask(session, "*")
    assert caught.value.reason == "there is no workspace '*'"
    assert "workspace list" in caught.value.next_step


async def test_no_workspace_named_means_every_one_where_a_listing_asks() -> None:
    assert await fleetio.any_workspace(Stored("a", "b"), None) == "*"  # type: ignore[arg-type]  # what it uses of one
