"""The bench of the datapath runs, in small, and writes what it measured. How fast it is, is no test's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.kernel

BENCH = Path(__file__).parents[2] / "bench" / "datapath.py"
FIGURES = (
    "new_flow_vs_lpm", "growth_10k", "established_growth", "vs_nft_linear", "million_added_ns", "mixed", "memory_mib", "vary_ns"
)  # fmt: skip
GOALS = {
    "new_flow_vs_lpm": 1.25, "growth_10k": 2, "established_growth": 1.1, "vs_nft_linear": 100, "million_added_ns": 80,
    "mixed": 0, "memory_mib": 64, "vary_ns": None,
}  # fmt: skip


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH, *words], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | environment,
    )  # fmt: skip


def test_the_bench_measures_beside_its_peers_and_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "datapath.json"
    before = set(Path("/run/netns").iterdir()) if Path("/run/netns").exists() else set()
    done = run("--quick", "--out", str(out), "--only", *FIGURES, LOOPBACK_CLASSBENCH=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_bytes())
    assert found["machine"].keys() == {"cpu", "cpus", "kernel", "python", "load"}
    assert {key: figure["goal"] for key, figure in found["figures"].items()} == GOALS
    for key, figure in found["figures"].items():
        assert figure.keys() == {"value", "goal", "unit", "runs"}
        assert figure["value"] is not None, f"{key}: {done.stdout}"
        assert min(figure["runs"]) <= figure["value"] <= max(figure["runs"])
        assert key in done.stdout
    assert found["figures"]["mixed"]["value"] == 0, "the only value that is judged here: it is no time"
    assert found["figures"]["vary_ns"]["value"] > 0
    assert "acl1_10k is not there; a generated set like it is used" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["datapath.json"], "it leaves nothing else"
    ours = {p for p in Path("/run/netns").iterdir() if p.name.startswith("lbb-")} - before
    assert not ours, "no namespace stays"


def test_a_peer_that_is_not_installed_fails_the_bench(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("ip", "nsenter", "clang", "mount"):
        found = next(p for d in os.environ["PATH"].split(":") if (p := Path(d) / tool).exists())
        (folder / tool).symlink_to(found)
    done = run("--quick", "--out", str(tmp_path / "datapath.json"), PATH=str(folder))
    assert done.returncode == 1
    assert "apt-get install nftables" in done.stderr
    assert not (tmp_path / "datapath.json").exists()
