"""What whoever carries a change to the next key holder can hide from them: nothing, since they sign what they are shown."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from tuf.api.metadata import DelegatedRole, Targets

from loopback.cli import changeview, keychange, keyring, keys, main, trustedit, trustpublish
from loopback.cli import home as installation
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import EVERY_WORKSPACE, Role
from loopback.trust import signing
from loopback.trust.changes import Change

NOW = datetime.now(UTC)
EVIL = SigningKey.generate()
Sign = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (keyring.FILE_VARIABLE, keyring.OFFLINE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation whose keys are at hand."""
    installation.begin(tmp_path / "home", None)
    keys.init_keys(tmp_path / "home", SigningKey.generate().public.text)
    return tmp_path / "home"


@pytest.fixture
def present(home: Path) -> trustpublish.Present:
    repository = trustpublish.repository_at(home, trustpublish.seed_fetch(home))
    return trustpublish.present_of(
        repository, lambda digest, _: (home / "tuf" / "seed" / "blobs" / digest).read_bytes()
    )


@pytest.fixture
def sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Sign:
    """`loopback keys sign` of a change, in a home, with the keys of a folder; its exit code and all that it said."""

    def call(change: Change, home: Path, offline: Path | None = None) -> tuple[int, str]:
        file = tmp_path / "carried.change"
        trustpublish.write(file, change)
        before = file.read_bytes()
        with pytest.raises(SystemExit) as ended:
            main.main(
                [
                    "--home",
                    str(home),
                    "keys",
                    "sign",
                    str(file),
                    *(("--offline", str(offline)) if offline else ()),
                ]
            )
        said = capsys.readouterr()
        code = int(ended.value.code or 0)
        assert (file.read_bytes() == before) is (code != 0), "signed exactly where it did not refuse"
        return code, said.out + said.err

    return call


def taken_over(present: trustpublish.Present) -> tuple[bytes, bytes]:
    """A next root that a stranger's key may sign alone, and a root before it that makes this look like nothing new."""
    root = signing.parse(signing.Root, present.root)
    honest = signing.role_keys(root, "root")
    signing.set_keys(root, "root", [*honest.keys.values(), EVIL.public], 1)
    before = signing.sign(root, EVIL)
    return signing.unsigned(signing.renewed(root, NOW)), before


def test_a_stranger_among_the_root_keys_is_not_hidden_by_a_root_that_the_change_brings_along(
    home: Path, present: trustpublish.Present, sign: Sign, tmp_path: Path
) -> None:
    root, before = taken_over(present)
    change = Change(metadata={"2.root.json": root}, base={"root": before, "targets": present.targets})
    code, said = sign(change, home)
    assert (code, "tuf.invalid" in said) == (2, True), said
    # where nothing is known to compare with, every key is shown, and that it was not compared
    code, said = sign(change, tmp_path / "elsewhere", home / "keys" / "offline")
    assert code == 0
    assert EVIL.keyid in said
    assert "knows no root" in said


def test_a_root_without_anything_before_it_is_no_way_around(
    home: Path, present: trustpublish.Present, sign: Sign
) -> None:
    root, _ = taken_over(present)
    code, said = sign(Change(metadata={"2.root.json": root}), home)
    assert (code, "tuf.invalid" in said) == (2, True), said


def test_targets_before_that_nobody_signed_are_not_compared_with(
    home: Path, present: trustpublish.Present, sign: Sign
) -> None:
    before = signing.parse(Targets, present.targets)
    signing.delegate(before, "firewall", EVIL.public)
    change = keychange.unsigned(present, signing.renewed(before, NOW), words="renew targets")
    hidden = msgspec.structs.replace(change, base={**change.base, "targets": signing.unsigned(before)})
    code, said = sign(hidden, home)
    assert (code, "tuf.invalid" in said) == (2, True), said
    code, said = sign(change, home)
    assert code == 0
    assert f"+ {EVIL.keyid}" in said


def test_a_release_that_the_targets_keys_themselves_would_sign_is_shown(
    home: Path, present: trustpublish.Present, sign: Sign
) -> None:
    change = keychange.renew(present, ["targets"])
    (name,) = change.metadata
    targets = signing.parse(Targets, change.metadata[name])
    path = "modules/firewall/6.6.6/firewall-6.6.6.lbm"
    targets.targets[path] = signing.release(path, "6" * 64, 1000, "6.6.6", "stable")
    code, said = sign(msgspec.structs.replace(change, metadata={name: signing.unsigned(targets)}), home)
    assert code == 0
    assert path in said
    assert "6" * 64 in said


def test_a_family_that_would_sign_anothers_releases_is_shown(
    home: Path, present: trustpublish.Present, sign: Sign
) -> None:
    change = keychange.renew(present, ["targets"])
    (name,) = change.metadata
    targets = signing.parse(Targets, change.metadata[name])
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    role = targets.delegations.roles["module-firewall"]
    targets.delegations.roles["module-firewall"] = DelegatedRole(
        role.name, role.keyids, 1, terminating=True, paths=["modules/*/*/*"]
    )
    code, said = sign(msgspec.structs.replace(change, metadata={name: signing.unsigned(targets)}), home)
    assert code == 0
    assert "modules/*/*/*" in said


def test_a_trust_document_that_is_left_out_of_the_change_is_not_signed_unseen(
    home: Path, present: trustpublish.Present, sign: Sign
) -> None:
    document = trustedit.with_operator(
        present.trust.document, "mallory", {EVERY_WORKSPACE: (Role.ADMIN,)}, EVIL.public.text
    )
    change = trustedit.change(present, document, "renew targets")
    code, said = sign(msgspec.structs.replace(change, blobs=()), home)
    assert (code, "tuf.invalid" in said) == (2, True), said
    code, said = sign(change, home)
    assert code == 0
    assert "mallory" in said


def test_nothing_in_a_change_moves_the_cursor_over_what_was_shown(
    home: Path, present: trustpublish.Present
) -> None:
    document = trustedit.with_operator(
        present.trust.document, "mallory\x1b[2K\x1b[1A", {EVERY_WORKSPACE: (Role.ADMIN,)}, EVIL.public.text
    )
    change = trustedit.change(present, document, "renew targets")
    (name,) = change.metadata
    targets = signing.parse(Targets, change.metadata[name])
    targets.targets["x\x1b[2J\ny"] = signing.target("x", b"")
    change = msgspec.structs.replace(change, metadata={name: signing.unsigned(targets)})
    shown = changeview.describe(change, home)
    assert any("mallory" in line for line in shown)
    assert all(line.isprintable() for line in shown)
