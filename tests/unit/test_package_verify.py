"""`loopback module verify`: every check on its own line, with and without an installation, and rebuilt from sources."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support_trust import MemoryRepository, archive, described, manifest

from loopback.cli import context
from loopback.cli.main import main
from loopback.contracts.codes import Code
from loopback.modules.build import build_module
from loopback.trust import package, signing
from loopback.trust.capabilities import POWERS

SOURCE = """
[module]
name = "firewall"
version = "1.0.0"
entry = ["{python}", "-m", "loopback.contracts"]
[requires]
libraries = {msgspec = ">=0.19"}
[build]
python = ["loopback/contracts/codes.py"]
license = "Apache-2.0"
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, list[str]], str]:
    """Exit code, what was said by name of the check, and standard error."""
    with pytest.raises(SystemExit) as caught:
        main(["--home", "/nowhere", "module", "verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    lines: dict[str, list[str]] = {}
    for line in out.splitlines():
        lines.setdefault(line[4:16].strip(), []).append(f"{line[:2].strip()} {line[16:]}")
    return int(caught.value.code or 0), lines, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "firewall-1.0.0.lbm"
    path.write_bytes(archive())
    return path


def mirror(folder: Path, *releases: tuple[bytes, str], age: timedelta = timedelta()) -> MemoryRepository:
    """A repository of today as files in a folder, its pinned root beside it as `pinned.json`."""
    now = datetime.now(UTC) - age
    repository = MemoryRepository()
    for part in (repository.root, repository.targets, repository.releases):
        part.expires = (now + timedelta(days=300)).replace(microsecond=0)
    repository.files = {"1.root.json": signing.sign(repository.root, repository.keys["root"])}
    for data, version in releases:
        repository.add_release(data, version)
    repository.publish(now)
    folder.mkdir()
    for name, data in repository.files.items():
        (folder / name).write_bytes(data)
    (folder.parent / "pinned.json").write_bytes(repository.pinned)
    return repository


def test_every_check_is_a_line_of_its_own_without_an_installation(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, err = run(capsys, file)
    assert (code, err) == (0, "")
    assert list(lines) == [
        "form", "names", "size", "contents", "manifest", "abi", "kernel", "powers", "sbom", "provenance", "toolchain",
        "signature", "digest",
    ]  # fmt: skip
    assert {line[:2] for name, said in lines.items() for line in said if name != "signature"} == {"ok"}
    assert lines["signature"] == ["-- not checked: no installation here; name --root and --metadata"]
    assert package.inspect(file).digest in lines["digest"][0]


def test_each_capability_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("CAP_BPF", "CAP_SYS_ADMIN")
    (tmp_path / "p.lbm").write_bytes(described({"a": b""}, manifest(capabilities=asked)))
    _, lines, _ = run(capsys, tmp_path / "p.lbm")
    assert len(lines["powers"]) == 2
    for name, line in zip(asked, lines["powers"], strict=True):
        assert name in line
        assert POWERS[name] in line
    assert all(
        text == text.strip() and text[0].islower() and not text.endswith(".") for text in POWERS.values()
    )


@pytest.mark.parametrize(
    ("harm", "wrong", "held"),
    [
        (lambda d: d[:-512], "form", set()),
        (lambda d: d + b"x", "form", set()),
        (lambda d: d.replace(b"lib/loopback/__init__.py", b"../../../../__init__.py!"), "names", set()),
        (lambda d: d.replace(b"x = 1\n", b"x = 2\n"), "contents", {"form", "names", "size"}),
        (
            lambda d: package.build({"a": b""}, manifest()),
            "sbom",
            {"form", "names", "size", "contents", "manifest"},
        ),
    ],
    ids=["truncated", "longer", "climbing", "changed", "undescribed"],
)
def test_what_is_wrong_is_named_and_what_was_not_reached_is_not_called_right(
    file: Path, harm: Callable[[bytes], bytes], wrong: str, held: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(harm(file.read_bytes()))
    code, lines, err = run(capsys, file)
    assert code == 1
    assert [name for name, said in lines.items() if said[0].startswith("no")] == [wrong]
    assert held <= {name for name, said in lines.items() if said[0].startswith("ok")}
    assert "next: " in err


def test_a_file_that_is_not_there_is_a_mistake_in_the_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, err = run(capsys, tmp_path / "absent.lbm")
    assert (code, lines) == (2, {})
    assert "there is no package" in err
    (tmp_path / "p.lbm").write_bytes(archive())
    code, lines, err = run(capsys, tmp_path / "p.lbm", "--root", tmp_path / "r.json")
    assert (code, lines) == (2, {})
    assert "--metadata" in err
    code, _, err = run(capsys, tmp_path / "p.lbm", "--root", tmp_path / "r.json", "--metadata", tmp_path)
    assert (code, "cannot be read" in err) == (2, True)


def test_a_signature_is_verified_offline_from_root_and_metadata_alone(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = mirror(tmp_path / "mirror", (file.read_bytes(), "1.0.0"))
    options = ("--root", tmp_path / "pinned.json", "--metadata", tmp_path / "mirror")
    code, lines, err = run(capsys, file, *options)
    assert (code, err) == (0, "")
    assert lines["signature"][0].startswith("ok signed for modules/firewall/1.0.0/")
    assert repository.keys[repository.role].public.keyid in lines["publisher"][0], (
        "the id that host.toml wants"
    )
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("timestamp.json", "snapshot.json", "targets.json", f"{repository.role}.json"):
        version = "" if name == "timestamp.json" else f"{1 if name != f'{repository.role}.json' else 2}."
        newest = repository.snapshots if name == "snapshot.json" else None
        source = f"{newest}.{name}" if newest else f"{version}{name}"
        shutil.copy(tmp_path / "mirror" / source, kept / name)
    code, lines, _ = run(capsys, file, *options[:3], kept)
    assert (code, lines["signature"][0][:2]) == (0, "ok"), "a client's own folder serves as well"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda d, r: (d / "timestamp.json").write_bytes(b"{}"), Code.TUF_INVALID),
        (lambda d, r: (d / "1.targets.json").unlink(), Code.TUF_UNREACHABLE),
        (lambda d, r: (d.parent / "pinned.json").write_bytes(MemoryRepository().pinned), Code.TUF_INVALID),
    ],
    ids=["no metadata", "a part is missing", "another root"],
)
def test_metadata_that_does_not_verify_is_no_signature(
    file: Path, tmp_path: Path, spoil: Callable[[Path, object], object], named: Code,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    repository = mirror(tmp_path / "mirror", (file.read_bytes(), "1.0.0"))
    spoil(tmp_path / "mirror", repository)
    options = ("--root", tmp_path / "pinned.json", "--metadata", tmp_path / "mirror")
    code, lines, _ = run(capsys, file, *options)
    unreachable = named is Code.TUF_UNREACHABLE
    assert code == (2 if unreachable else 1), "not to be asked is another thing than a no"
    assert lines["signature"][0].startswith("--" if unreachable else "no")
    assert named in lines["signature"][0]
    assert "publisher" not in lines


def test_expired_metadata_another_content_and_an_unsigned_version_are_no(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(name: str, *releases: tuple[bytes, str], age: timedelta = timedelta()) -> str:
        place = tmp_path / name
        place.mkdir()
        mirror(place / "mirror", *releases, age=age)
        code, lines, _ = run(capsys, file, "--root", place / "pinned.json", "--metadata", place / "mirror")
        assert code == 1
        return lines["signature"][0]

    good = (file.read_bytes(), "1.0.0")
    assert Code.TUF_EXPIRED in asked("old", good, age=timedelta(days=60))
    assert "signed as" in asked("other", (archive(files={"a": b""}), "1.0.0"))
    assert "nobody entitled" in asked("none", (archive("2.0.0"), "2.0.0"))


def test_an_installation_that_does_not_answer_costs_the_one_check_and_no_other(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    context.save(tmp_path / "home", url="nats://127.0.0.1:1", creds="x.creds", operator_key="x.pem")
    with pytest.raises(SystemExit) as caught:
        main(["--home", str(tmp_path / "home"), "module", "verify", str(file)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert "ok  provenance" in out
    assert "--  signature   not checked: " in out
    assert "next: " in err


def test_words_of_a_package_cannot_pass_for_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A summary with an escape sequence or a line break would print a check that was never made."""
    forged = "x\nok  signature   signed for everything\x1b[2K\r\u2028\u202e"
    made = manifest(summary=forged)
    (tmp_path / "p.lbm").write_bytes(described({"a": b""}, made, tools={"python": forged}, license=forged))
    code, lines, _ = run(capsys, tmp_path / "p.lbm")
    assert code == 0
    assert lines["signature"] == ["-- not checked: no installation here; name --root and --metadata"]
    assert all(line.isprintable() for said in lines.values() for line in said)


def test_a_program_gets_the_same_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--home", "/nowhere", "module", "verify", str(file), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert caught.value.code in (0, None)
    assert (found["ok"], found["module"], found["version"]) == (True, "firewall", "1.0.0")
    assert found["digest"] == package.inspect(file).digest
    assert found["described"]["tools"] == {"python": "3.11.2"}
    assert {check["answer"] for check in found["checks"]} == {"ok", "--"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "module.toml").write_text(SOURCE)
    return folder


def test_a_package_is_built_again_from_its_sources(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build_module(source, version="1.0.7", out=tmp_path).path
    code, lines, _ = run(capsys, built, "--reproduce", source)
    assert (code, lines["reproduced"][0][:2]) == (0, "ok"), lines["reproduced"]


def test_other_sources_are_told_by_the_first_member_that_differs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(file: Path) -> str:
        code, lines, _ = run(capsys, file, "--reproduce", source)
        assert code == 1
        return lines["reproduced"][0]

    overlay = tmp_path / "overlay/lib/loopback/contracts"
    overlay.mkdir(parents=True)
    (overlay / "codes.py").write_text("x = 1\n")
    changed = build_module(source, overlay=tmp_path / "overlay", out=tmp_path / "a").path
    said = asked(changed)
    assert "lib/loopback/contracts/codes.py differs first" in said, "and not what it was compiled to"
    assert "built with an overlay of 1 files" in said
    (source / "module.toml").write_text(SOURCE.replace("[requires]", 'summary = "other"\n[requires]'))
    other = build_module(source, out=tmp_path / "b").path
    (source / "module.toml").write_text(SOURCE)
    assert "module.toml differs first" in asked(other)
    plain = build_module(source, out=tmp_path / "c").path
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    said = asked(plain)
    assert "provenance.json differs first; built with other tools: python" in said
    assert "3.99.0 here" in said
    (source / "module.toml").write_text(SOURCE.replace('"firewall"', '"other"'))
    assert "the sources of other" in asked(plain)
    shutil.rmtree(source)
    assert "no module.toml" in asked(plain)
