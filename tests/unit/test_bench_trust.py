"""The bench of trust's cost runs and writes what it measured. How long that takes is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "trust.py"


def test_the_bench_measures_every_figure_and_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "trust.json"
    done = subprocess.run(
        [sys.executable, BENCH, "--rounds", "2", "--each", "2", "--out", out],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(out.read_bytes())
    assert found["machine"].keys() == {"cpu", "cpus", "kernel", "python", "load"}
    goals = {
        "command_ms": 0.5, "desired_ms": 0.5, "desired_again_ms": 0.5, "signature_ms": None,
        "tuf_cold_ratio": 3.0, "tuf_cold_ms": None, "tuf_bare_ms": None, "tuf_flush_ms": None,
    }  # fmt: skip
    assert {key: f["goal"] for key, f in found["figures"].items()} == goals
    for key, figure in found["figures"].items():
        assert figure.keys() == {"value", "goal", "unit", "runs"}
        assert figure["value"] > 0 and figure["runs"], key
        assert figure["unit"] == ("×" if key == "tuf_cold_ratio" else "ms")
        assert min(figure["runs"]) <= figure["value"] <= max(figure["runs"])
        assert key in done.stdout
    assert done.stdout.count("goal ≤") == sum(goal is not None for goal in goals.values())
    assert [p.name for p in tmp_path.iterdir()] == ["trust.json"], "it leaves nothing else"
