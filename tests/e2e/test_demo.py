"""The demo is the product's promise in one command, so it is a test: everything it counts must be as the README says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.kernel,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="the demo makes network namespaces and needs root"),
]
HOSTS = {"web-1", "web-2", "web-3", "web-4"}


def play(out: Path, *before: str) -> tuple[int, str, dict[str, Any]]:
    done = subprocess.run(
        [*before, sys.executable, "-m", "loopback.cli.main", "demo", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    told = done.stdout + done.stderr
    assert (out / "summary.json").exists(), told
    return done.returncode, told, json.loads((out / "summary.json").read_text())


def assert_one_tree(spans: list[dict[str, Any]]) -> None:
    """From the operator's event to the attach in each kernel: who is whose parent, as the receiver got them."""
    by_id = {span["span_id"]: span for span in spans}

    def service(span: dict[str, Any]) -> str:
        return str(span["resource"]["service.name"])

    def parent(span: dict[str, Any]) -> dict[str, Any]:
        return by_id[span["parent"]]

    def named(name: str, maker: str) -> list[dict[str, Any]]:
        return [span for span in spans if span["name"].startswith(name) and service(span) == maker]

    (root,) = [span for span in spans if not span["parent"]]
    assert (root["name"], service(root)) == ("send rollout.start", "loopback-cli")
    assert {span["parent"] for span in spans if span["parent"]} <= set(by_id), "no span is an orphan"
    (accepted,) = named("process lb.ws.{workspace}.cmd.activation", "loopback-activation")
    assert parent(accepted) is root
    for judge in ("loopback-eligibility", "loopback-delivery"):
        (judged,) = named("process lb.ws.{workspace}.rollout", judge)
        assert parent(judged) is accepted
    decisions = named("decide ", "loopback-activation")
    assert decisions and all(parent(decision) is root for decision in decisions)
    applied = {span["resource"]["host.name"]: span for span in named("apply firewall", "loopback-host")}
    assert set(applied) == HOSTS
    assert all(parent(span)["name"] == "decide assigned" for span in applied.values())
    for attach in named("attach", "loopback-host"):
        assert parent(attach) is applied[attach["resource"]["host.name"]]
    assert len(named("attach", "loopback-host")) == len(HOSTS)
    for seen in named("process lb.ws.{workspace}.from", "loopback-telemetry"):
        assert service(parent(seen)) == "loopback-host"
    assert all("loopback.rollout.id" in span["attributes"] for span in (*decisions, *applied.values(), root))


def test_the_demo_plays_every_act_and_every_promise_holds(tmp_path: Path) -> None:
    code, told, summary = play(tmp_path / "demo")
    assert code == 0, told

    assert {host["id"] for host in summary["hosts"]} == HOSTS
    for host in summary["hosts"]:
        assert host["enforcing"] and host["version"] == "1.0.0" and host["policy"] and host["generation"] > 0

    traffic = summary["traffic"]
    assert traffic["allowed_ok"] > 0 and traffic["allowed_failed"] == 0
    assert traffic["denied_blocked"] > 0 and traffic["denied_leaked"] == 0

    assert summary["swap"]["packets"] > 100_000
    assert summary["swap"]["commits"] >= 8
    assert summary["swap"]["mixed_verdicts"] == 0

    first, second = summary["rollouts"]
    assert (first["version"], first["state"]) == ("1.0.0", "DONE")
    assert [wave["state"] for wave in first["waves"]] == ["DONE", "DONE"]
    assert [len(wave["hosts"]) for wave in first["waves"]] == [1, 3]
    assert (second["version"], second["state"]) == ("1.1.0", "ROLLED_BACK")
    assert second["waves"][1]["state"] == "PENDING"

    assert summary["crash"]["packets_sent"] > 1000
    assert summary["crash"]["leaked"] == 0
    assert summary["crash"]["adopted"]

    assert summary["trace"]["spans"] > 40
    assert summary["trace"]["services"] == ["activation", "delivery", "eligibility", "telemetry"]
    assert set(summary["trace"]["hosts"]) == HOSTS
    assert_one_tree(json.loads((tmp_path / "demo" / "trace.json").read_text()))
    assert summary["residue"] == []
    assert summary["duration_s"] < 300


def test_without_permission_for_ebpf_the_same_demo_says_degraded_and_the_agents_stay_up(
    tmp_path: Path,
) -> None:
    wrapper = str(Path(__file__).with_name("without_bpf.py"))
    code, told, summary = play(tmp_path / "demo", sys.executable, wrapper)
    assert "degraded: kernel" in told
    assert code == 0, told
    assert summary["enforcement"].startswith("degraded: kernel")
    assert {host["id"] for host in summary["hosts"]} == HOSTS
    assert not any(host["enforcing"] for host in summary["hosts"])
    assert [rollout["state"] for rollout in summary["rollouts"]] == ["CANCELED", "ROLLED_BACK"]
    assert "eligibility.kernel-feature" in told
    assert summary["residue"] == []
