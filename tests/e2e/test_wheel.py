"""What users install is the wheel, so the wheel is tried: built once, unpacked elsewhere, used without the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing of the project but the unpacked wheel."""
    out = tmp_path_factory.mktemp("wheel")
    sources = (
        out / "sources"
    )  # a copy, since a build leaves folders behind and would read those of an earlier one
    left_out = shutil.ignore_patterns(
        ".venv", ".git", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, sources, symlinks=True, ignore=left_out)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(out),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(sources)
    site = out / "site"
    with zipfile.ZipFile(next(out.glob("loopback_modules-*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed), "LOOPBACK_HOME": str(installed.parent / "home")},
    )


def test_the_wheel_holds_real_files_and_everything_that_is_needed_at_run_time(installed: Path) -> None:
    package = installed / "loopback"
    for needed in (
        "py.typed",
        "bpf/programs/firewall.bpf.c",
        "bpf/programs/firewall.h",
        "modules/firewall/module.toml",
        "modules/firewall/policy.schema.json",
        "host/agent.py",
        "services/activation/decide.py",
    ):
        assert (package / needed).is_file(), needed
    assert not [path for path in package.rglob("*") if path.is_symlink()]
    assert not (package / "tests").exists()


def test_the_command_of_the_wheel_teaches_and_every_area_imports(installed: Path) -> None:
    where = run(installed, "-c", "import loopback; print(loopback.__file__)")
    assert where.stdout.strip() == str(installed / "loopback" / "__init__.py"), where.stderr
    helped = run(installed, "-m", "loopback.cli.main", "--help")
    assert helped.returncode == 0, helped.stderr
    for area in ("up", "demo", "module", "rollout", "host", "hosts", "firewall", "eligibility"):
        assert f" {area} " in helped.stdout


def test_a_module_is_built_from_the_wheel_and_verifies(installed: Path) -> None:
    source = installed / "loopback" / "modules" / "firewall"
    out = installed.parent / "firewall.lbm"
    built = run(installed, "-m", "loopback.cli.main", "module", "build", str(source), "--out", str(out))
    assert built.returncode == 0, built.stderr
    verified = run(installed, "-m", "loopback.cli.main", "module", "verify", str(out))
    assert verified.returncode == 0, verified.stdout + verified.stderr
