"""Building packages: the same bytes for the same sources, and every mistake named by file and field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loopback.contracts.codes import Code, Refused
from loopback.modules.build import BuiltPackage, build_module
from loopback.trust import package

MANIFEST = """
[module]
name = "tiny"
version = "1.0.0"
entry = ["{python}", "-m", "loopback.contracts"]
[build]
python = ["loopback/contracts", "loopback/trust/manifest.py"]
bpf = ["bpf/programs/tiny.bpf.c"]
"""
PROGRAM = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "tiny.h"
SEC("xdp") int tiny(struct xdp_md *ctx) { return VERDICT; }
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    programs = folder / "bpf" / "programs"
    programs.mkdir(parents=True)
    (folder / "module.toml").write_text(MANIFEST)
    (programs / "tiny.bpf.c").write_text(PROGRAM)
    (programs / "tiny.h").write_text("#define VERDICT XDP_PASS\n")
    return folder


def contents(built: BuiltPackage, folder: Path) -> dict[str, bytes]:
    package.extract(built.path, folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_package_holds_python_objects_and_manifest_and_verifies(source: Path, tmp_path: Path) -> None:
    built = build_module(source, out=tmp_path / "out")
    assert built.path == tmp_path / "out" / "tiny-1.0.0.lbm"
    info = package.inspect(built.path, sha256=built.digest)
    assert (info.size, info.manifest.build.python) == (built.size, ())
    files = contents(built, tmp_path / "unpacked")
    assert files["bpf/tiny.bpf.o"].startswith(b"\x7fELF")
    for name in ("__init__.py", "contracts/codes.py", "trust/__init__.py", "trust/manifest.py"):
        assert f"lib/loopback/{name}" in files
    assert "lib/loopback/trust/package.py" not in files
    assert not [name for name in files if "__pycache__" in name]


def test_the_same_sources_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first, second = (build_module(source, out=tmp_path / name) for name in ("one", "two"))
    assert first.path.read_bytes() == second.path.read_bytes()
    other = build_module(source, version="1.1.0", out=tmp_path / "three.lbm")
    assert (other.path.name, other.manifest.version) == ("three.lbm", "1.1.0")
    assert other.digest != first.digest


def test_an_overlay_replaces_packaged_files_and_programs_before_they_are_compiled(
    source: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay"
    (overlay / "lib/loopback/contracts").mkdir(parents=True)
    (overlay / "lib/loopback/contracts/codes.py").write_text("broken = True\n")
    (overlay / "bpf/programs").mkdir(parents=True)
    (overlay / "bpf/programs/tiny.bpf.c").write_text(PROGRAM.replace("VERDICT", "VERDICT + 1"))
    plain = contents(build_module(source, out=tmp_path / "plain"), tmp_path / "a")
    broken = contents(build_module(source, overlay=overlay, out=tmp_path / "broken"), tmp_path / "b")
    assert {name for name in plain if plain[name] != broken[name]} == {
        "bpf/tiny.bpf.o",
        "digests.json",
        "lib/loopback/contracts/codes.py",
    }
    assert (source / "bpf/programs/tiny.bpf.c").read_text() == PROGRAM


def test_an_overlay_that_replaces_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "typo.py").write_text("")
    with pytest.raises(Refused, match=r"overlay/typo\.py replaces nothing"):
        build_module(source, overlay=overlay, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_program_that_does_not_compile_is_refused_with_line_and_the_earlier_package_stays(
    source: Path, tmp_path: Path
) -> None:
    before = build_module(source, out=tmp_path / "out").path.read_bytes()
    (source / "bpf/programs/tiny.h").write_text("#define VERDICT nonsense\n")
    with pytest.raises(Refused, match=r"tiny\.bpf\.c:5") as caught:
        build_module(source, out=tmp_path / "out")
    assert caught.value.code == Code.PACKAGE_MALFORMED
    assert (tmp_path / "out" / "tiny-1.0.0.lbm").read_bytes() == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tiny-1.0.0.lbm"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (('"loopback/contracts"', '"loopback/absent"'), r"build\.python.*absent"),
        (('"loopback/contracts"', '"../../etc"'), r"build\.python.*etc"),
        (('"loopback/contracts"', '"/etc"'), r"build\.python.*etc"),
        (("tiny.bpf.c", "absent.bpf.c"), r"build\.bpf.*absent"),
        (("bpf/programs/tiny.bpf.c", "../tiny.bpf.c"), r"build\.bpf"),
        (("bpf/programs/tiny.bpf.c", "bpf/programs/tiny.h"), r"build\.bpf"),
        (('version = "1.0.0"', ""), r"version"),
    ],
)
def test_a_mistake_in_the_manifest_is_refused_with_file_and_field(
    change: tuple[str, str], named: str, source: Path, tmp_path: Path
) -> None:
    (source / "module.toml").write_text(MANIFEST.replace(*change, 1))
    with pytest.raises(Refused, match=named) as caught:
        build_module(source, out=tmp_path / "out")
    assert "module.toml" in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [lambda d: (d / "module.toml").unlink(), lambda d: (d / "module.toml").write_bytes(b"\xff")],
)
def test_a_folder_without_a_readable_manifest_is_refused(
    spoil: Callable[[Path], object], source: Path, tmp_path: Path
) -> None:
    spoil(source)
    with pytest.raises(Refused) as caught:
        build_module(source, out=tmp_path / "out")
    assert caught.value.code == Code.MANIFEST_INVALID
