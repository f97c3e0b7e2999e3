"""The first keys and what is signed with them; and that the command line explains instead of failing."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest
from support_trust import archive

from loopback.cli import home as installation
from loopback.cli import keys, main, module
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import Role
from loopback.trust import package
from loopback.trust.repository import TrustedRepository

ACTIVATION = SigningKey.generate().public.text


@pytest.fixture
def home(tmp_path: Path) -> Path:
    keys.init_keys(tmp_path / "home", ACTIVATION)
    return tmp_path / "home"


def seed_blob(home: Path, sha256: str, size: int) -> bytes:
    data = (home / "tuf" / "seed" / "blobs" / sha256).read_bytes()
    assert len(data) == size
    return data


def repository(home: Path, changed: dict[str, bytes] | None = None) -> TrustedRepository:
    seed = keys.seed_fetch(home)
    return keys.repository_at(home, lambda name: (changed or {}).get(name) or seed(name))


def test_the_first_repository_verifies_and_names_activation_and_the_first_operator(home: Path) -> None:
    trust = repository(home).trust_document(lambda digest, size: seed_blob(home, digest, size))
    assert next(iter(trust.service_keys["activation"].values())).text == ACTIVATION
    operator = SigningKey.load(keys.operator_key(home, "admin"))
    assert trust.roles(operator.keyid, "anywhere") == frozenset(Role)


def test_every_secret_is_readable_by_its_owner_only_and_offline_and_online_are_apart(home: Path) -> None:
    secrets = {p.relative_to(home / "keys").as_posix() for p in (home / "keys").rglob("*.pem")}
    assert secrets == {
        "offline/root.pem",
        "offline/targets.pem",
        "offline/module-firewall.pem",
        "online/snapshot.pem",
        "online/timestamp.pem",
        "operators/admin.pem",
    }
    assert all(stat.S_IMODE((home / "keys" / name).stat().st_mode) == 0o600 for name in secrets)
    assert b"PRIVATE" not in b"".join(p.read_bytes() for p in (home / "tuf").rglob("*") if p.is_file())


def test_keys_are_never_overwritten_and_an_interrupted_run_keeps_what_it_made(home: Path) -> None:
    before = {p: p.read_bytes() for p in (home / "keys").rglob("*.pem")}
    with pytest.raises(Refused, match="never overwritten"):
        keys.init_keys(home, ACTIVATION)
    (home / "tuf" / "root.json").unlink()
    keys.init_keys(home, ACTIVATION)
    assert {p: p.read_bytes() for p in before} == before
    repository(home)


def test_a_new_operator_and_a_new_family_are_signed_with_the_offline_key(home: Path) -> None:
    trusted = repository(home)
    change = keys.add_operator(
        home, "ann", {"prod": [Role.RELEASER, Role.RELEASER]}, repository=trusted,
        read_blob=lambda digest, size: seed_blob(home, digest, size),
    )  # fmt: skip
    assert list(change.metadata) == ["2.targets.json"]
    (document,) = change.blobs
    assert json.loads(document)["version"] == 2
    ann = next(o for o in json.loads(document)["operators"] if o["name"] == "ann")
    assert ann["roles"] == {"prod": ["releaser"]}
    assert ann["public_key"] == SigningKey.load(keys.operator_key(home, "ann")).public.text
    family = keys.add_family(home, "edge", repository=trusted)
    assert sorted(family.metadata) == ["1.module-edge.json", "2.targets.json"]
    with pytest.raises(Refused):
        keys.add_family(home, "firewall", repository=trusted)


def test_a_release_is_signed_on_top_of_what_is_published(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.lbm"
    file.write_bytes(archive())
    signed = module.sign_release(home, repository(home), package.inspect(file))
    assert list(signed) == ["2.module-firewall.json"]
    assert hashlib.sha256(archive()).hexdigest().encode() in signed["2.module-firewall.json"]
    keys.offline_key(home, "module-firewall").unlink()
    installation.begin(None, None)  # another invocation, which has not opened the key yet
    with pytest.raises(Refused, match="loopback keys family firewall"):
        module.sign_release(home, repository(home), package.inspect(file))


def run(home: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main.main(["--home", str(home), *arguments])
    return int(ended.value.code or 0)


def test_the_command_line_makes_and_shows_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    assert run(home, "keys", "show") == 2
    assert "loopback keys init" in capsys.readouterr().err
    assert run(home, "keys", "init", "--unencrypted") == 0
    assert "offline/root.pem" in capsys.readouterr().err
    assert run(home, "keys", "init", "--unencrypted") == 2
    assert "never overwritten" in capsys.readouterr().err
    assert run(home, "keys", "show", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    root = (home / "tuf" / "root.json").read_bytes()
    assert shown["root"]["sha256"] == hashlib.sha256(root).hexdigest()
    assert "keys/offline/root.pem" in {entry["file"] for entry in shown["files"]}
    assert run(home, "keys", "show") == 0
    assert "PRIVATE" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda data: data, 0),
        (lambda data: data[:-600], 1),
        (lambda data: data.replace(b"x = 1", b"x = 2"), 1),
        (lambda data: b"", 1),
    ],
)
def test_verify_says_which_check_failed_without_a_traceback(
    spoil: object, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.lbm"
    file.write_bytes(spoil(archive()))  # type: ignore[operator]  # parametrised
    assert run(tmp_path / "home", "module", "verify", str(file)) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert ("p.lbm" in said.out and "[package." in said.out) if code else "firewall 1.0.0" in said.out


def test_building_and_publishing_nonsense_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (("module", "build", str(tmp_path)), Code.MANIFEST_INVALID),
        (("module", "publish", str(tmp_path / "absent.lbm")), Code.PACKAGE_UNKNOWN),
        (("module", "list"), Code.NAME_INVALID),
    ):
        assert run(tmp_path / "home", *arguments) == 2
        assert f"[{said}]" in capsys.readouterr().err
