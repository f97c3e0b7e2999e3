"""A tiny module for tests. `behaviour.txt` beside its manifest says how it misbehaves; a file stands for the kernel.

The file `kernel.json` in its state folder outlives the process, like pinned programs: what it holds is "enforced". A
commit that is not confirmed falls back at its deadline, like the firewall's datapath.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused
from loopback.modules.sdk import Module, package_dir, run


def behaviour() -> str:
    path = package_dir() / "behaviour.txt"
    return path.read_text().strip() if path.exists() else "healthy"


def hang() -> None:
    time.sleep(60)


class Tiny(Module):
    name = "tiny"

    def __init__(self) -> None:
        super().__init__()
        self.how = behaviour()
        self.kernel = Path()
        self.staged: str | None = None
        self.fills: dict[str, list[str]] = {}  # staged with it
        self.unfilled: Refused | None = None

    def load(self) -> dict[str, object]:
        found = json.loads(self.kernel.read_text()) if self.kernel.exists() else {}
        if found.get("deadline") and time.time() > found["deadline"]:
            found = {"policy": found.get("fallback"), "fills": found.get("before")}
        return found

    def save(self, **state: object) -> None:
        scratch = self.kernel.with_suffix(".new")
        scratch.write_text(
            json.dumps({key: value for key, value in state.items() if key == "policy" or value})
        )
        scratch.replace(self.kernel)

    async def configure(self, request: abi.Configure) -> None:
        self.kernel = Path(request.state_dir) / "kernel.json"
        if self.how == "dies-at-configure":
            os._exit(3)
        if self.kernel.exists():
            self.adopted = True
            self.policy = self.load().get("policy")  # type: ignore[assignment]
        else:
            self.save(policy=None)

    async def stage(self, request: abi.Stage) -> dict[str, str]:
        if self.how == "hangs-at-stage":
            hang()
        content = json.loads(request.content)
        if content.get("refuse"):
            raise Refused(Code.POLICY_INVALID, "rules[0]: it is refused", "write another one")
        self.take(request.fills, content)
        self.staged = request.digest
        return {"rules": "1"}

    def take(self, fills: dict[str, abi.Filled], content: dict[str, int]) -> None:
        found = {name: one.addresses for name, one in fills.items()}
        if any(len(one) > content.get("max", 99) for one in found.values()):
            raise Refused(Code.SET_TOO_LARGE, "set 'web': too many", "see whether they are meant")
        self.fills, self.content = found, content

    async def fill(self, request: abi.Fill) -> dict[str, str]:
        if self.how == "knows-no-fill" or self.load().get("policy") != request.digest:
            raise Refused(Code.MODULE_ABI, "fill is not a request")
        try:
            self.take(request.fills, self.content)
        except Refused as refused:
            self.unfilled = refused
            raise
        self.staged = request.digest
        return {}

    async def commit(self, request: abi.Commit) -> None:
        if self.how == "dies-at-commit":
            os._exit(4)
        assert request.digest == self.staged
        before = self.load()
        self.save(
            policy=request.digest, fallback=before.get("policy"), deadline=time.time() + request.trial_s,
            fills=self.fills, before=before.get("fills"),
        )  # fmt: skip
        if self.how == "dies-after-commit":
            os._exit(5)

    async def confirm(self, request: abi.Confirm) -> None:
        if self.load().get("policy") != request.digest:
            raise Refused(Code.MODULE_UNHEALTHY, "the datapath fell back already")
        self.save(policy=request.digest, fills=self.load().get("fills"))
        self.unfilled = None

    async def revert(self, request: abi.Revert) -> None:
        found = self.load()
        if "deadline" in found:
            self.save(policy=found.get("fallback"), fills=found.get("before"))

    async def health(self) -> abi.HealthReport:
        if self.how == "unhealthy":
            return abi.HealthReport(state="failed", code="module.unhealthy", reason="it does not feel well")
        if self.how == "no-kernel":
            return abi.HealthReport(
                state="degraded", code="kernel.unsupported", reason="kernel: bpf(2) is not permitted"
            )
        policy = self.load().get("policy")
        if self.unfilled is not None:
            code, reason = self.unfilled.code, self.unfilled.reason
            return abi.HealthReport(state="degraded", enforcing=True, policy=policy, code=code, reason=reason)  # type: ignore[arg-type]
        return abi.HealthReport(state="ok", enforcing=policy is not None, policy=policy)  # type: ignore[arg-type]

    async def metrics(self) -> dict[str, float]:
        found = {"tiny_packets_total": 7.0}
        if self.how == "talkative":
            found |= {"tiny_broken": float("inf"), "x" * 10_000: 1.0}
            found |= {f"tiny_figure_{n}_{'y' * 150}": float(n) for n in range(20_000)}
        return found

    async def stop(self, *, remove: bool) -> None:
        if self.how == "hangs-at-stop":
            hang()
        if remove:
            self.kernel.unlink(missing_ok=True)


if __name__ == "__main__":
    if behaviour() == "wrong-abi":
        abi.ABI_VERSION = 99  # type: ignore[misc]
    if behaviour() == "ends-at-once":
        raise SystemExit("a library is missing")
    if behaviour() == "silent":
        hang()
    run(Tiny)
