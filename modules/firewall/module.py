"""The firewall as a module: what the agent asks over the ABI, done with the datapath.

One process, one datapath. Every call that reaches the kernel runs in a thread, one at a time. The kernel enforces without this
process; here is only what changes it, watches over devices and reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from loopback.bpf import layout, rtnl
from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused
from loopback.contracts.subjects import token
from loopback.modules.firewall import compile as compiler
from loopback.modules.firewall import live
from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.attach import Attachment
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.filling import filled
from loopback.modules.firewall.pins import nothing_pinned
from loopback.modules.firewall.policy_fields import Wrong, near, prefix
from loopback.modules.firewall.prefixes import Prefix
from loopback.modules.firewall.watching import DEFAULT_SHADOW, Watch, summary
from loopback.modules.sdk import Module, package_dir

SETTINGS: Final = frozenset(
    ("bpf_root", "flows", "interfaces", "management_from", "management_ports", "shadow", "shadow_s")
)
DEFAULT_BPF_ROOT: Final = "/sys/fs/bpf/loopback"
OBJECT: Final = Path("bpf") / "firewall.bpf.o"
MAX_SHADOW_S: Final = 20.0  # the agent waits 30 s for a stage, and a hundred thousand rules need some of them
METRIC_RULES: Final = (
    100  # an agent keeps 256 figures of a module, and reading those of every rule could take it seconds
)
SHOWN: Final = 5  # sessions that a policy ends, in its answer
SETTLE_S: Final = 0.05  # after covering: a new device comes with a burst of messages

T = TypeVar("T")
log = logging.getLogger("loopback.firewall")


class FirewallModule(Module):
    """Settings: `interfaces` (names or patterns, default every device but loopback), `bpf_root`, `flows` (table size),
    `management_ports` (of operators' sessions that no policy may cut, as text; default "22"), `management_from` (the networks
    that operators come from; default anywhere, but for networks that a rule of the policy drops by name).

    `shadow_s` (seconds, default 0): how long a staged policy judges live packets beside the one in force before its stage is
    done, one in `shadow` of them (default 16). Its differences are in the answer, in `health` and in `metrics`.
    """

    name: ClassVar[str] = "firewall"

    def __init__(self) -> None:
        super().__init__()
        self._datapath: Datapath | None = None
        self._opening: asyncio.Task[None] | None = None
        self._memory = compiler.Memory()
        self._problem: Refused | None = None
        self._sessions: Sequence[int] = live.SSH
        self._networks: Sequence[Prefix] = ()
        self._lock = asyncio.Lock()
        self._watching = Watch(self.event, self._do)
        self._shadow = (0.0, DEFAULT_SHADOW)  # seconds, one in so many
        self._monitor: socket.socket | None = None
        self._news = False  # of devices, since they were last covered
        self._cover: asyncio.Task[None] | None = None
        self._staged: str | None = None
        self._committed: str | None = None
        self._filling = False  # what is staged or on trial are other contents of sets
        self._unfilled: Refused | None = None  # why the newest contents of sets do not hold

    async def configure(self, request: abi.Configure) -> None:
        """Open the datapath and take over what is pinned. What the kernel lacks is told by `health`, not raised."""
        root = (
            Path(str(request.settings.get("bpf_root", DEFAULT_BPF_ROOT))) / token(request.host) / "firewall"
        )
        interfaces = request.settings.get("interfaces", ["*"])
        wanted = interfaces if isinstance(interfaces, list) else [str(interfaces)]
        flows = _flows_of(request.settings)
        for name in sorted(request.settings.keys() - SETTINGS):
            # not refused: a version that is returned to must start with what its successor was given
            hint = near(name, SETTINGS) or "see docs/operate.md"
            log.warning("[modules.firewall] %s: there is no such setting; %s", name, hint)
        self._shadow = _shadow_of(request.settings)
        ports = request.settings.get("management_ports")
        if ports is not None:
            self._sessions = _ports(ports)
        networks = request.settings.get("management_from")
        if networks is not None:
            self._networks = _networks(networks)
        place = package_dir() / OBJECT
        try:
            data = place.read_bytes()
        except OSError as error:
            raise Refused(Code.PACKAGE_MALFORMED, f"cannot read {place}: {error.strerror}") from None
        first = nothing_pinned(root)
        self._opening = asyncio.create_task(
            self._open(
                lambda: Datapath(
                    data,
                    root=root,
                    state_dir=Path(request.state_dir),
                    interfaces=wanted,
                    flows=flows,
                    memory=self._memory,
                ),
                Path(request.state_dir),
            )
        )
        if first:
            return  # nothing can be taken over: the policy may come while the programs are verified
        await self._opened()
        if self._problem is not None and self._problem.code is not Code.KERNEL_UNSUPPORTED:
            raise self._problem

    async def _open(self, make: Callable[[], Datapath], state_dir: Path) -> None:
        monitor = rtnl.monitor()  # before devices are read: what comes meanwhile is news, too
        try:
            datapath = await asyncio.to_thread(make)
        except Refused as problem:
            monitor.close()
            self._problem = problem
            return
        self._datapath = datapath
        self.adopted = datapath.adopted
        self.policy = self._committed = datapath.digest
        self._watching.start(datapath, state_dir)
        self._monitor = monitor
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._on_devices)

    async def _opened(self) -> Datapath | None:
        """The datapath, once it is open."""
        if self._opening is not None:
            await asyncio.shield(self._opening)
        return self._datapath

    def _on_devices(self) -> None:
        if self._monitor is not None:
            rtnl.drain(self._monitor)
        self._news = True
        if self._cover is None or self._cover.done():
            self._cover = asyncio.get_running_loop().create_task(self._cover_devices())

    async def _cover_devices(self) -> None:
        """Again until nothing is heard while it works: that the devices are the same as before would not say that
        none came and went.
        """
        try:
            while self._news:
                self._news = False
                before = {a.ifindex for a in self._attachments()}
                for one in await self._do(lambda d: d.cover()):
                    if one.ifindex not in before:
                        self.event(
                            "firewall.device",
                            device=one.device,
                            ingress=one.ingress or "",
                            note=one.note,
                            problem=one.problem,
                        )
                await asyncio.sleep(SETTLE_S)
        except Refused as problem:
            self.event("firewall.uncovered", code=problem.code, reason=problem.reason)

    def _attachments(self) -> list[Attachment]:
        return list(self._datapath.attachments) if self._datapath else []

    async def _do(self, work: Callable[[Datapath], T]) -> T:
        """Work with the datapath, alone, in a thread. Raises Refused, as it was at the start where there is none."""
        datapath = await self._opened()
        if datapath is None:
            raise self._problem or Refused(Code.MODULE_ABI, "the module is not configured")
        async with self._lock:
            return await asyncio.to_thread(work, datapath)

    async def stage(self, request: abi.Stage) -> dict[str, str]:
        """Read, compile, write to the idle slot, run the policy's tests and the live management flows there; let it be a shadow
        where that is set.

        Raises Refused POLICY_*.
        """
        policy = await asyncio.to_thread(policies.parse, request.content, "policy.json")
        policy = await asyncio.to_thread(filled, policy, request.fills)
        self._staged, self._filling = None, False
        if self._opening is not None and not self._opening.done():
            await asyncio.to_thread(compiler.foresee, policy, self._memory)
        detail = await self._do(lambda d: d.stage(policy, request.digest))
        control = request.control
        if control is not None:
            detail |= await self._prove_live(control)
        seconds, one_in = self._shadow
        if seconds > 0 and await self._do(lambda d: d.generation != 0 and d.digest != request.digest):
            detail |= summary(await self._watching.shadow(seconds, one_in))
            if control is not None:  # a session may have begun meanwhile
                detail |= await self._prove_live(control)
        self._staged = request.digest
        return detail

    async def _prove_live(self, control: Sequence[abi.Connection]) -> dict[str, str]:
        """Which sessions end because the policy names them. Raises Refused where another would."""
        meant = await self._do(lambda d: d.prove_live(control, self._sessions, self._networks))
        if not meant:
            return {}
        shown = ", ".join(f"{live.plain(one.remote)} at port {one.local_port}" for one in meant[:SHOWN])
        return {"ends": shown + (f" and {len(meant) - SHOWN} more" if len(meant) > SHOWN else "")}

    async def fill(self, request: abi.Fill) -> dict[str, str]:
        """Stage the policy in force with other contents of its sets: no rule is read again, and none compiled
        but those that name them.

        They go the way of every change: proven in the idle slot, committed by one store, back by another. What is refused
        leaves the last contents. Raises Refused SET_*, POLICY_TEST_FAILED, MODULE_ABI where that policy is not in force.
        """
        base = await self._do(lambda d: d.known(request.digest))
        if base is None:
            raise Refused(
                Code.MODULE_ABI, f"policy {request.digest} is not in force here", "stage it with its sets"
            )
        self._staged = None
        try:
            policy = await asyncio.to_thread(filled, base, request.fills)
            detail = await self._do(lambda d: d.stage(policy, request.digest))
            if request.control is not None:
                detail |= await self._prove_live(request.control)
        except Refused as refused:
            self._unfilled = refused
            raise
        self._staged, self._filling = request.digest, True
        return detail

    async def commit(self, request: abi.Commit) -> None:
        """Attach where needed and switch. Raises Refused(MODULE_ABI) for another policy than the staged one."""
        if request.digest != self._staged:
            raise Refused(
                Code.MODULE_ABI, f"policy {request.digest} is not the staged one ({self._staged or 'none'})"
            )
        await self._do(lambda d: d.commit(request.trial_s))
        self._committed = self.policy = request.digest
        if not self._filling:
            self._unfilled = None  # it brought its sets' contents with it
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
        self._filling, self._unfilled = False, None

    async def revert(self, request: abi.Revert) -> None:
        """Back to what held before the commit."""
        if await self._opened() is None:
            return
        if self._filling:
            self._unfilled = Refused(
                Code.HOST_UNCONFIRMED, "other contents of sets were taken back: the last ones hold"
            )
        self._staged, self._filling = None, False
        await self._do(lambda d: d.revert())
        await self._refresh()

    async def _refresh(self) -> None:
        self.policy = self._committed = await self._do(lambda d: d.digest)

    async def health(self) -> abi.HealthReport:
        """Enforcing only when every device is covered and the kernel's word names the policy that was committed."""
        if await self._opened() is None:
            problem = self._problem
            return abi.HealthReport(
                state="degraded",
                code=problem.code if problem else Code.MODULE_ABI,
                reason=problem.reason if problem else "the module is not configured",
            )
        report = await self._do(self._health)
        if report.code == Code.KERNEL_REFUSED:  # no news may come of what was refused; it may be possible now
            self._on_devices()
        return report

    def _health(self, datapath: Datapath) -> abi.HealthReport:
        digest, generation = datapath.digest, datapath.generation
        detail = {
            "generation": str(generation),
            "trial": "true" if datapath.on_trial else "false",
            "devices": ", ".join(f"{a.device}={a.ingress or 'none'}" for a in datapath.attachments),
        }
        if datapath.filled:
            detail["sets"] = ", ".join(f"{name}={count}" for name, count in datapath.filled.items())
        notes = "; ".join(f"{a.device}: {a.note}" for a in datapath.attachments if a.note)
        if notes:
            detail["notes"] = notes
        if self._watching.report is not None:
            detail |= summary(self._watching.report)
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
        if self._unfilled is not None:
            reason = f"sets keep their last contents: {self._unfilled.reason}"
            return _degraded(self._unfilled.code, reason, digest, detail, enforcing=True)
        return abi.HealthReport(state="ok", enforcing=True, policy=digest, detail=detail)

    async def metrics(self) -> dict[str, float]:
        """Counters since the maps were made; per rule they survive policies and versions.

        Of METRIC_RULES rules only; `loopback firewall stats` reads all.
        """
        if await self._opened() is None:
            return {}
        return await self._do(self._metrics)

    def _metrics(self, datapath: Datapath) -> dict[str, float]:
        totals = datapath.totals()
        found: dict[str, float] = {
            "loopback_firewall_generation": datapath.generation,
            "loopback_firewall_trial": float(datapath.on_trial),
            "loopback_firewall_events_unsent_total": self._watching.unsent_events,
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
        for name, count in datapath.filled.items():
            found[f'loopback_firewall_set_prefixes{{set="{name}"}}'] = count
        report = self._watching.report
        if report is not None:
            found["loopback_firewall_shadow_judged_packets"] = report.judged
            found["loopback_firewall_shadow_changed_packets"] = report.changed
            found["loopback_firewall_shadow_unsure_packets"] = report.unsure
        for rule, (packets, size) in datapath.counters(METRIC_RULES).items():
            found[f'loopback_firewall_rule_packets_total{{rule="{rule}"}}'] = packets
            found[f'loopback_firewall_rule_bytes_total{{rule="{rule}"}}'] = size
        return found

    async def stop(self, *, remove: bool) -> None:
        """End; with `remove` nothing of ours stays in the kernel."""
        await self._opened()
        if self._cover is not None:
            self._cover.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._cover
        await self._watching.stop()
        loop = asyncio.get_running_loop()
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


def _flows_of(settings: Mapping[str, object]) -> int | None:
    """How many connections to remember. Raises Refused(CONFIG_INVALID)."""
    flows = settings.get("flows")
    if flows is None or (type(flows) is int and 0 < flows <= layout.MAX_FLOWS):
        return flows
    raise Refused(
        Code.CONFIG_INVALID,
        f"flows = {flows!r}: a whole number from 1 to {layout.MAX_FLOWS}",
        "correct the firewall's settings in host.toml",
    )


def _shadow_of(settings: Mapping[str, object]) -> tuple[float, int]:
    """Seconds and one in how many. Raises Refused(CONFIG_INVALID)."""
    seconds, one_in = settings.get("shadow_s", 0), settings.get("shadow", DEFAULT_SHADOW)
    if (
        not isinstance(seconds, int | float)
        or not 0 <= seconds <= MAX_SHADOW_S
        or not isinstance(one_in, int)
        or not 1 <= one_in <= layout.MAX_SHADOW
    ):
        raise Refused(
            Code.CONFIG_INVALID,
            f"shadow_s = {seconds!r}, shadow = {one_in!r}: 0 to {MAX_SHADOW_S:g} seconds, one in 1 to {layout.MAX_SHADOW}",
            "correct the firewall's settings in host.toml; for longer, use 'loopback firewall shadow'",
        )
    return float(seconds), one_in


def _ports(given: object) -> list[int]:
    """Ports from the host's settings. Raises Refused(CONFIG_INVALID): a session that nobody looks after is found too late."""
    texts = [str(one) for one in (given if isinstance(given, list) else [given])]
    if not all(one.isascii() and one.isdecimal() and 0 < int(one) < 65536 for one in texts):
        raise Refused(
            Code.CONFIG_INVALID,
            f"management_ports: {given!r} are not ports",
            'for example management_ports = ["22"]',
        )
    return [int(one) for one in texts]


def _networks(given: object) -> list[Prefix]:
    """Networks from the host's settings. Raises Refused(CONFIG_INVALID)."""
    found = given if isinstance(given, list) else [given]
    try:
        if not found:
            raise Wrong("an empty list: nobody's session would count")
        return [prefix(one) for one in found]
    except Wrong as wrong:
        raise Refused(
            Code.CONFIG_INVALID,
            f"management_from: {wrong.message}",
            wrong.hint or 'for example management_from = ["10.0.0.0/8"]',
        ) from None


def _degraded(
    code: Code, reason: str, policy: str | None, detail: dict[str, str], *, enforcing: bool = False
) -> abi.HealthReport:
    return abi.HealthReport(
        state="degraded", enforcing=enforcing, policy=policy, code=code, reason=reason, detail=detail
    )
