"""The firewall as a module: what the agent asks over the ABI, done with the datapath.

One process, one datapath. Every call that reaches the kernel runs in a thread, one at a time. The kernel enforces without this
process; here is only what changes it, watches over devices and reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from loopback.bpf import rtnl
from loopback.bpf.ring import Ring
from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused
from loopback.contracts.subjects import token
from loopback.modules.firewall import events
from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.attach import Attachment
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.sdk import Module, package_dir

DEFAULT_BPF_ROOT: Final = "/sys/fs/bpf/loopback"
OBJECT: Final = Path("bpf") / "firewall.bpf.o"
EVENTS_PER_SECOND: Final = 50  # more sampled packets than that are counted and not sent
SETTLE_S: Final = 0.05  # after covering: a new device comes with a burst of messages

T = TypeVar("T")
log = logging.getLogger("loopback.firewall")


class FirewallModule(Module):
    """Settings: `interfaces` (names or patterns, default every device but loopback), `bpf_root`, `flows` (table size)."""

    name: ClassVar[str] = "firewall"

    def __init__(self) -> None:
        super().__init__()
        self._datapath: Datapath | None = None
        self._problem: Refused | None = None
        self._lock = asyncio.Lock()
        self._ring: Ring | None = None
        self._monitor: socket.socket | None = None
        self._cover: asyncio.Task[None] | None = None
        self._staged: str | None = None
        self._committed: str | None = None
        self._window: tuple[int, int] = (0, 0)  # second, events sent in it
        self.unsent_events = 0

    async def configure(self, request: abi.Configure) -> None:
        """Open the datapath and take over what is pinned. What the kernel lacks is told by `health`, not raised."""
        root = (
            Path(str(request.settings.get("bpf_root", DEFAULT_BPF_ROOT))) / token(request.host) / "firewall"
        )
        interfaces = request.settings.get("interfaces", ["*"])
        wanted = interfaces if isinstance(interfaces, list) else [str(interfaces)]
        flows = request.settings.get("flows")
        place = package_dir() / OBJECT
        try:
            data = place.read_bytes()
        except OSError as error:
            raise Refused(Code.PACKAGE_MALFORMED, f"cannot read {place}: {error.strerror}") from None
        try:
            self._datapath = await asyncio.to_thread(
                Datapath,
                data,
                root=root,
                state_dir=Path(request.state_dir),
                interfaces=wanted,
                flows=int(flows) if isinstance(flows, int) else None,
            )
        except Refused as problem:
            if problem.code is not Code.KERNEL_UNSUPPORTED:
                raise
            self._problem = problem
            return
        self.adopted = self._datapath.adopted
        self.policy = self._committed = self._datapath.digest
        self._watch(self._datapath)

    def _watch(self, datapath: Datapath) -> None:
        loop = asyncio.get_running_loop()
        names: dict[int, str] = {}

        def on_record(record: bytes) -> None:
            self._tell(record, names)

        def on_ring() -> None:
            names.clear()
            names.update(datapath.rule_names())
            if self._ring is not None:
                self._ring.consume()

        self._ring = Ring(datapath.events, on_record)
        loop.add_reader(self._ring.fileno(), on_ring)
        self._monitor = rtnl.monitor()
        loop.add_reader(self._monitor.fileno(), self._on_devices)

    def _tell(self, record: bytes, names: dict[int, str]) -> None:
        second = int(asyncio.get_running_loop().time())
        window, sent = self._window
        sent = sent if window == second else 0
        if sent >= EVENTS_PER_SECOND:
            self.unsent_events += 1
            return
        self._window = (second, sent + 1)
        self.event(events.PACKET, **events.decode(record, names))

    def _on_devices(self) -> None:
        if self._monitor is not None:
            rtnl.drain(self._monitor)
        if self._cover is None or self._cover.done():
            self._cover = asyncio.get_running_loop().create_task(self._cover_devices())

    async def _cover_devices(self) -> None:
        """Again until nothing changes while it works, since news during that time start no second task."""
        known: list[rtnl.Device] = []
        while (present := rtnl.devices()) != known:
            known = present
            before = {a.ifindex for a in self._attachments()}
            try:
                found = await self._do(lambda d: d.cover())
            except Refused as problem:
                self.event("firewall.uncovered", code=problem.code, reason=problem.reason)
                return
            for one in found:
                if one.ifindex not in before:
                    self.event(
                        "firewall.device",
                        device=one.device,
                        ingress=one.ingress or "",
                        note=one.note,
                        problem=one.problem,
                    )
            await asyncio.sleep(SETTLE_S)

    def _attachments(self) -> list[Attachment]:
        return list(self._datapath.attachments) if self._datapath else []

    async def _do(self, work: Callable[[Datapath], T]) -> T:
        """Work with the datapath, alone, in a thread. Raises Refused, as it was at the start where there is none."""
        if self._datapath is None:
            raise self._problem or Refused(Code.MODULE_ABI, "the module is not configured")
        async with self._lock:
            return await asyncio.to_thread(work, self._datapath)

    async def stage(self, request: abi.Stage) -> dict[str, str]:
        """Read, compile, write to the idle slot, run the policy's tests there. Raises Refused POLICY_*."""
        policy = await asyncio.to_thread(policies.parse, request.content, "policy.json")
        detail = await self._do(lambda d: d.stage(policy, request.digest))
        self._staged = request.digest
        return detail

    async def commit(self, request: abi.Commit) -> None:
        """Attach where needed and switch. Raises Refused(MODULE_ABI) for another policy than the staged one."""
        if request.digest != self._staged:
            raise Refused(
                Code.MODULE_ABI, f"policy {request.digest} is not the staged one ({self._staged or 'none'})"
            )
        await self._do(lambda d: d.commit(request.trial_s))
        self._committed = self.policy = request.digest
        self._staged = None
        for one in self._attachments():
            self.event("firewall.device", device=one.device, ingress=one.ingress or "", note=one.note)

    async def confirm(self, request: abi.Confirm) -> None:
        """Keep it. Raises Refused(HOST_UNCONFIRMED) too late, and MODULE_ABI for another policy than the committed."""
        if request.digest != self._committed:
            raise Refused(Code.MODULE_ABI, f"policy {request.digest} is not the committed one")
        try:
            await self._do(lambda d: d.confirm())
        finally:
            await self._refresh()

    async def revert(self, request: abi.Revert) -> None:
        """Back to what held before the commit."""
        if self._datapath is None:
            return
        self._staged = None
        await self._do(lambda d: d.revert())
        await self._refresh()

    async def _refresh(self) -> None:
        self.policy = self._committed = await self._do(lambda d: d.digest)

    async def health(self) -> abi.HealthReport:
        """Enforcing only when every device is covered and the kernel's word names the policy that was committed."""
        if self._datapath is None:
            problem = self._problem
            return abi.HealthReport(
                state="degraded",
                code=problem.code if problem else Code.MODULE_ABI,
                reason=problem.reason if problem else "the module is not configured",
            )
        return await self._do(self._health)

    def _health(self, datapath: Datapath) -> abi.HealthReport:
        digest, generation = datapath.digest, datapath.generation
        detail = {
            "generation": str(generation),
            "trial": "true" if datapath.on_trial else "false",
            "devices": ", ".join(f"{a.device}={a.ingress or 'none'}" for a in datapath.attachments),
        }
        notes = "; ".join(f"{a.device}: {a.note}" for a in datapath.attachments if a.note)
        if notes:
            detail["notes"] = notes
        if not generation:
            if self._committed is not None:
                return _degraded(
                    Code.HOST_UNCONFIRMED, "unconfirmed in time: nothing is enforced", None, detail
                )
            return abi.HealthReport(state="ok", detail=detail)
        try:
            bare = datapath.uncovered()
        except Refused as problem:
            return _degraded(problem.code, problem.reason, digest, detail)
        if bare:
            return _degraded(Code.KERNEL_REFUSED, f"not covered: {', '.join(bare)}", digest, detail)
        if digest != self._committed:
            reason = "unconfirmed in time: the kernel returned to the policy before"
            return _degraded(Code.HOST_UNCONFIRMED, reason, digest, detail, enforcing=True)
        return abi.HealthReport(state="ok", enforcing=True, policy=digest, detail=detail)

    async def metrics(self) -> dict[str, float]:
        """Counters since the maps were made; per rule they survive policies and versions."""
        if self._datapath is None:
            return {}
        return await self._do(self._metrics)

    def _metrics(self, datapath: Datapath) -> dict[str, float]:
        totals = datapath.totals()
        found: dict[str, float] = {
            "loopback_firewall_generation": datapath.generation,
            "loopback_firewall_trial": float(datapath.on_trial),
            "loopback_firewall_events_unsent_total": self.unsent_events,
            "loopback_firewall_dropped_packets_total": 0,
            "loopback_firewall_accepted_packets_total": 0,
        }
        for name, value in totals.items():
            words = name.split(".")
            if len(words) == 3 and words[0] != "slot":
                direction, reason, verdict = words
                word = "dropped" if verdict == "drop" else "accepted"
                found[f"loopback_firewall_{word}_packets_total"] += value
                if value:
                    found[f"loopback_firewall_{direction}_{reason}_{word}_packets_total"] = value
            elif len(words) == 1:
                found[f"loopback_firewall_{name}_total"] = value
        for rule, (packets, size) in datapath.counters().items():
            found[f'loopback_firewall_rule_packets_total{{rule="{rule}"}}'] = packets
            found[f'loopback_firewall_rule_bytes_total{{rule="{rule}"}}'] = size
        return found

    async def stop(self, *, remove: bool) -> None:
        """End; with `remove` nothing of ours stays in the kernel."""
        if self._cover is not None:
            self._cover.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._cover
        loop = asyncio.get_running_loop()
        if self._ring is not None:
            loop.remove_reader(self._ring.fileno())
            self._ring.close()
            self._ring = None
        if self._monitor is not None:
            loop.remove_reader(self._monitor.fileno())
            self._monitor.close()
            self._monitor = None
        datapath, self._datapath = self._datapath, None
        if datapath is None:
            return
        async with self._lock:
            try:
                if remove:
                    await asyncio.to_thread(datapath.remove)
            finally:
                datapath.close()


def _degraded(
    code: Code, reason: str, policy: str | None, detail: dict[str, str], *, enforcing: bool = False
) -> abi.HealthReport:
    return abi.HealthReport(
        state="degraded", enforcing=enforcing, policy=policy, code=code, reason=reason, detail=detail
    )
