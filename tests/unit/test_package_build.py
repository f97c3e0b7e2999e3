"""Building packages: the same bytes for the same sources, and every mistake named by file and field."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loopback.bpf.build import compile_object
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
        f"lib/loopback/contracts/__pycache__/codes.{sys.implementation.cache_tag}.pyc",
        "lib/loopback/contracts/codes.py",
        "provenance.json",
        "sbom.cdx.json",
    }
    assert (source / "bpf/programs/tiny.bpf.c").read_text() == PROGRAM


def test_python_comes_compiled_since_every_start_would_do_it_again(source: Path, tmp_path: Path) -> None:
    built = build_module(source, out=tmp_path)
    package.extract(built.path, tmp_path / "unpacked")
    lib = tmp_path / "unpacked/lib"
    (lib / "loopback/contracts/codes.py").write_text("raise SystemExit('compiled again')\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from loopback.contracts import codes; print(codes.__file__)"],
        env={"PYTHONPATH": str(lib), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{lib}/loopback/contracts/codes.py\n", "")


def test_python_that_is_none_is_refused_with_file_and_line(source: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay/lib/loopback/contracts"
    overlay.mkdir(parents=True)
    (overlay / "codes.py").write_text("fine = 1\nbroken =\n")
    with pytest.raises(Refused, match=r'"lib/loopback/contracts/codes\.py", line 2') as caught:
        build_module(source, overlay=tmp_path / "overlay", out=tmp_path / "out")
    assert caught.value.code == Code.PACKAGE_MALFORMED
    assert not (tmp_path / "out").exists()


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


def test_what_went_in_is_named_with_its_digest_and_the_exact_tools(source: Path, tmp_path: Path) -> None:
    built = build_module(source, out=tmp_path)
    info = package.inspect(built.path)
    found = package.check_described(built.path, info)
    assert found.tools["python"] == platform.python_version()
    assert re.fullmatch(r".*clang version \d+\.\d+\.\d+.*", found.tools["clang"])
    assert {"clang", "libbpf-headers", "linux-headers", "python"} == found.tools.keys()
    assert not [v for v in found.tools.values() if "?" in v or not v]
    statement = json.loads(package.read(built.path, info, "provenance.json", most=1 << 20))
    inputs = {
        r["name"]: r["digest"]["sha256"]
        for r in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        if "digest" in r
    }
    for name in ("module.toml", "bpf/programs/tiny.bpf.c", "bpf/programs/tiny.h"):
        assert inputs[f"source/{name}"] == hashlib.sha256((source / name).read_bytes()).hexdigest()
    helpers = Path("/usr/include/bpf/bpf_helpers.h").read_bytes()
    assert inputs["header/bpf/bpf_helpers.h"] == hashlib.sha256(helpers).hexdigest()
    assert f"source/loopback/{'contracts/codes.py'}" in inputs
    (source / "bpf/programs/tiny.h").write_text("#define VERDICT XDP_PASS /* said otherwise */\n")
    again = build_module(source, out=tmp_path / "again")
    changed = package.inspect(again.path)
    assert {n for n in info.digests if info.digests[n] != changed.digests[n]} == {
        "digests.json",
        "provenance.json",
    }, "a change that makes no other object is still seen in the digest of the sources"


CHILD = """
import os, sys
from pathlib import Path
from loopback.modules.build import build_module
from loopback.bpf.build import versions
uid = int(sys.argv[3])
os.umask(int(sys.argv[4], 8))
if uid:
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
print(build_module(Path(sys.argv[1]), out=Path(sys.argv[2])).digest)
"""
NAMES = ("contracts", "trust", "bpf", "modules", "src")


def checkout(place: Path) -> Path:
    """The code that packages are made of, copied to another place; the folder to import it from."""
    top = Path(__file__).parents[2]
    for name in NAMES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(top / name, place / name, symlinks=True, ignore=ignored)
    return place / "src"


def test_the_same_sources_give_the_same_bytes_on_any_machine() -> None:
    """By whomever, wherever, whenever and under whatever settings: umask, locale, time zone, hash seed, user, checkout's path,
    order and times of files, variables that compilers read, the folder that one stands in.
    """
    manifest = (Path(__file__).parents[2] / "modules/firewall/module.toml").read_text()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        top.chmod(0o755)
        (top / "trap").mkdir()
        (top / "trap/stdbool.h").write_text("#error this machine has other headers\n")

        def built(
            name: str, where: str, uid: int = 0, umask: str = "022", cwd: str = "/", **env: str
        ) -> None:
            place = top / where
            if not place.exists():
                place.mkdir(parents=True)
                checkout(place)
                (place / "module").mkdir()
                (place / "module/module.toml").write_text(manifest)
            out = top / f"out-{len(found)}"
            out.mkdir()
            os.chown(out, uid, uid)
            environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(place / "src"), **env}
            done = subprocess.run(
                [sys.executable, "-B", "-c", CHILD, str(place / "module"), str(out), str(uid), umask],
                env=environment, cwd=cwd, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            found[name] = done.stdout.strip()

        built("plain", "one")
        built("another checkout, deeper and with a blank", "two/a b/c")
        for path in sorted((top / "two").rglob("*"), reverse=True):
            os.utime(path, (1, 1), follow_symlinks=False)
            if path.is_file():  # made anew, in another order, with other modes
                content = path.read_bytes()
                path.unlink()
                path.write_bytes(content)
                path.chmod(0o755)
        built("other times, modes and order", "two/a b/c", cwd=str(top))
        built("umask", "one", umask="077")
        built("user", "one", uid=65534)
        built("locale and time zone", "one", LC_ALL="tr_TR.UTF-8", LANG="de_DE", TZ="Pacific/Kiritimati")
        built("hash seed", "one", PYTHONHASHSEED="1")
        built("another hash seed", "one", PYTHONHASHSEED="4242")
        built("Python's settings", "one", PYTHONUTF8="0", PYTHONOPTIMIZE="2", PYTHONIOENCODING="latin-1")
        trap = str(top / "trap")
        built(
            "the compiler's settings",
            "one",
            CPATH=trap,
            C_INCLUDE_PATH=trap,
            SOURCE_DATE_EPOCH="1",
            CCC_OVERRIDE_OPTIONS="+-O0",
        )
    assert len(found) == 10
    assert len(set(found.values())) == 1, found


def test_the_module_of_the_authors_page_is_built_and_holds_its_own_code(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/module-author.md").read_text()
    (tmp_path / "hello").mkdir()
    code, described = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("python", "toml"))
    (tmp_path / "hello/hello.py").write_text(code)
    (tmp_path / "hello/module.toml").write_text(described)
    built = build_module(tmp_path / "hello", out=tmp_path)
    files = contents(built, tmp_path / "unpacked")
    assert files["lib/hello.py"].decode() == code
    assert package.check_described(built.path, package.inspect(built.path)).license == "Apache-2.0"
    done = subprocess.run(
        [sys.executable, "-B", "-P", "-c", "import hello; print(hello.Hello.name)"],
        env={"PYTHONPATH": str(tmp_path / "unpacked/lib"), "PATH": os.environ["PATH"]},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("hello\n", ""), "what it imports lies beside it"


def test_an_object_holds_no_path_of_the_machine_that_compiled_it(source: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "another" / "and deeper"]
    objects = []
    for folder in folders:
        shutil.copytree(source / "bpf/programs", folder)
        inputs = compile_object(folder / "tiny.bpf.c", folder / "out" / "tiny.o")
        assert {p.name for p in inputs if p.parent == folder} == {"tiny.bpf.c", "tiny.h"}
        objects.append((folder / "out" / "tiny.o").read_bytes())
    assert objects[0] == objects[1]
    assert str(tmp_path).encode() not in objects[0]
    assert b"tiny.bpf.c" in objects[0], "debug information is there, and names the source"
