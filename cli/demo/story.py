"""The acts of the demo, in order. Each asks the product to do something and then looks at what really happened."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Final

from loopback.cli.demo import network, policies
from loopback.cli.demo.reading import drops, firewall_of, running_of
from loopback.cli.demo.show import Timeline
from loopback.cli.demo.stage import Stage, Talker, children_of, edit_toml
from loopback.cli.demo.summary import HostLine, RolloutLine, Summary, Swap, WaveLine
from loopback.cli.otlp_receiver import OtlpReceiver

WORKSPACE: Final = "demo"
HOSTS: Final = ("web-1", "web-2", "web-3", "web-4")
SWAPS: Final = 6  # rollouts of the other policy while the flood runs; each is a commit on every host
CRASH_PACKETS: Final = 20_000
EXITS: Final = {"DONE": 0, "ROLLED_BACK": 3, "CANCELED": 6}  # of 'loopback rollout start --watch'
ROUNDS: Final = 5  # times that each target is tried
COUNTERS_S: Final = 6.0  # agents send changed counters at most every five seconds
TCP = (policies.ALLOWED_TCP, policies.DENIED_TCP)
UDP = (policies.ALLOWED_UDP, policies.DENIED_UDP, policies.MIXED_UDP)

#: 1.1.0: starts, takes a policy and dies as soon as it is committed.
BROKEN_MODULE: Final = '''"""Release 1.1.0 of the demo: it dies at the commit, as a release that was never tried would."""

import os

from loopback.modules.firewall.module import FirewallModule
from loopback.modules.sdk import run


class Broken(FirewallModule):
    async def commit(self, request):  # type: ignore[no-untyped-def]
        os._exit(41)


run(Broken())
'''


class Story:
    """Plays the acts; `summary` holds what was counted."""

    def __init__(self, stage: Stage, show: Timeline, receiver: OtlpReceiver, kernel_refuses: str) -> None:
        self.stage = stage
        self.show = show
        self.receiver = receiver
        self.kernel_refuses = kernel_refuses
        self.summary = Summary(
            enforcement=f"degraded: kernel {kernel_refuses}" if kernel_refuses else "kernel"
        )
        self.failures = 0
        self.servers: dict[str, Talker] = {}
        self.client: Talker | None = None
        self.source = Path(sys.modules["loopback"].__file__ or "").parent / "modules" / "firewall"

    def check(self, good: bool, text: str) -> bool:
        """Show one thing that had to hold, and remember if it did not."""
        self.failures += not good
        return self.show.check(good, text)

    async def play(self) -> None:
        """All acts."""
        await self.join()
        await self.publish("1.0.0")
        if self.kernel_refuses:
            await self.refused_by_the_kernel()
        else:
            await self.first_rollout()
            await self.traffic()
            await self.swap()
            await self.broken_release()
            await self.crash()
        await self.finish()

    # (a)
    async def join(self) -> None:
        """The control plane starts; four hosts are recorded, enrolled and started."""
        self.show.act("a", "Four hosts join, each in a network namespace of its own")
        stage = self.stage
        self.show.command(f"loopback up --listen {network.CONTROL_ADDRESS}:4222")
        up = [sys.executable, "-m", "loopback.cli.main", "up", "--listen", f"{network.CONTROL_ADDRESS}:4222"]
        await stage.spawn("up", up, network.CONTROL)

        async def ready() -> bool:
            if not (stage.home / "context.toml").exists():
                return False
            code, _ = await stage.loopback("workspace", "list", "--json", quiet=True, check=False)
            return code == 0

        await stage.until("the broker and the services", ready, poll=0.5)
        self.show.good("NATS with JetStream and the four services run, each with an identity of its own")
        await stage.loopback("workspace", "put", WORKSPACE, "--environment", "sandbox")
        words = [
            "--module",
            "firewall",
            "--versions",
            ">=1.0,<2",
            "--channel",
            "stable",
            "--label",
            "role=web",
        ]
        await stage.loopback("entitlement", "put", "fw-web", "--workspace", WORKSPACE, *words)
        for number, name in enumerate(HOSTS, start=1):
            out = stage.out / "hosts" / name
            words = [
                "--label",
                "role=web",
                "--address",
                network.address(number),
                "--address",
                network.address6(number),
            ]
            if name == HOSTS[-1]:
                await self._enrol(name, words, out)
            else:
                await stage.loopback(
                    "host", "add", name, "--workspace", WORKSPACE, *words, "--out", str(out), quiet=number > 1
                )
            edit_toml(out / "host.toml", {"firewall": {"interfaces": ["eth0"], "bpf_root": str(stage.bpf)}})
            await stage.start_host(name)
        self.show.command(
            f"loopback host run --config {stage.out}/hosts/web-1/host.toml        # … and the others"
        )
        await stage.until("four hosts in the fleet view", self._all_joined, poll=0.5)
        self.show.good(f"four hosts joined: {', '.join(HOSTS)}, kernel {platform.release()}")
        for name in HOSTS:
            process = await stage.spawn(
                f"server-{name}",
                [sys.executable, "-m", "loopback.cli.demo.traffic", "serve", _ports(TCP), _ports(UDP)],
                network.host_namespace(name),
                talk=True,
            )
            self.servers[name] = Talker(process)
        process = await stage.spawn(
            "client", [sys.executable, "-m", "loopback.cli.demo.traffic", "client"], network.CLIENT, talk=True
        )
        self.client = Talker(process)
        for talker in (*self.servers.values(), self.client):
            await talker.ask()

    async def _enrol(self, name: str, words: list[str], out: Path) -> None:
        """The better way in: a one-time token, and a key that is made on the host and never leaves it."""
        stage = self.stage
        _, token = await stage.loopback("host", "invite", name, "--workspace", WORKSPACE, *words)
        file = stage.out / f"{name}.token"
        file.touch(mode=0o600)
        file.write_text(token)
        enroll = ("host", "enroll", "--token-file", str(file), "--out", str(out))
        await stage.loopback(*enroll, namespace=network.host_namespace(name))

    async def _all_joined(self) -> bool:
        seen = {host["host"]: host for host in await self.stage.json("hosts", "--workspace", WORKSPACE)}
        return all(name in seen and not seen[name].get("lost") and seen[name].get("kernel") for name in HOSTS)

    async def publish(self, version: str, overlay: Path | None = None) -> None:
        """Build a release from the sources and publish it."""
        out = self.stage.out / f"firewall-{version}.lbm"
        words = ["module", "build", str(self.source), "--version", version, "--out", str(out)]
        await self.stage.loopback(*words, *(["--overlay", str(overlay)] if overlay else []))
        await self.stage.loopback("module", "publish", str(out), "--channel", "stable")
        self.show.good(
            f"firewall {version} is built, signed with the family's key and published ({out.stat().st_size // 1024} KiB)"
        )

    # (b)
    async def first_rollout(self) -> None:
        """Release 1.0.0 with a policy: one canary and then the rest."""
        self.show.act("b", "firewall 1.0.0 with a policy is rolled out: one canary, then the rest")
        await self.rollout("fw-1", "1.0.0", "even", policies.even(), expect="DONE", verbose=True)
        self.check(
            await self._enforcing("1.0.0"), "all four hosts say that their kernel enforces firewall 1.0.0"
        )

    async def refused_by_the_kernel(self) -> None:
        """(b) where eBPF is not permitted: eligibility says no, and a host that tries all the same says why it cannot."""
        self.show.act("b", "firewall 1.0.0 is rolled out on a machine that does not permit eBPF")
        await self.rollout("fw-1", "1.0.0", "even", policies.even(), expect="CANCELED", verbose=True)
        self.show.say(
            "a release that asks for no kernel feature shows what a host says when it tries all the same"
        )
        manifest = (self.source / "module.toml").read_text()
        asking_nothing = re.sub(r"(?m)^features = .*$", "features = []", manifest)
        self.source = policies.write(self.stage.out / "undemanding", "module.toml", asking_nothing).parent
        await self.publish("1.0.1")
        shown = await self.rollout(
            "fw-2", "1.0.1", "even", policies.even(), expect="ROLLED_BACK", verbose=True
        )
        canary = shown["waves"][0]["hosts"][0]

        said = shown["host_states"][canary]["failure"] or {}
        self.check(
            said.get("code") == "kernel.unsupported" and await self._all_joined(),
            f"the agents stay up; {canary} reported: degraded: {str(said.get('reason')).splitlines()[0]} [{said.get('code')}]",
        )
        self.show.bad(
            f"degraded: kernel {self.kernel_refuses}. Nothing is enforced here, so the acts in which packets are dropped are "
            "left out. Run this where root may load eBPF programs to see them."
        )

    async def rollout(
        self,
        name: str,
        version: str,
        policy: str,
        text: str,
        *,
        expect: str,
        verbose: bool = False,
        trial: str = "2s",
    ) -> dict[str, Any]:
        """Start a rollout, watch it to its end, note its journal; returns what `rollout show` says."""
        folder = self.stage.out / "operator"
        policies.write(folder, f"{policy}.yaml", text)
        soak = "2s" if verbose else "0s"
        path = policies.write(
            folder, f"{name}.yaml", policies.rollout(name, WORKSPACE, version, f"{policy}.yaml", trial, soak)
        )
        words = ["rollout", "start", str(path), "--watch"]
        code, _ = await self.stage.loopback(*words, quiet=not verbose, check=False, live=verbose)
        shown: dict[str, Any] = await self.stage.json("rollout", "show", name, "--workspace", WORKSPACE)
        waves = [WaveLine(w["name"], w["state"], list(w["hosts"])) for w in shown["waves"]]
        if verbose:
            line = RolloutLine(name, "firewall", version, shown["state"], waves, shown.get("trace_id", ""))
            self.summary.rollouts.append(line)
        if verbose or shown["state"] != expect:
            told = "; ".join(f"{w.name} {w.state} ({len(w.hosts)})" for w in waves)
            self.check(
                shown["state"] == expect and code == EXITS[expect],
                f"rollout {name}: {shown['state']}, waves: {told}",
            )
        return shown

    async def _fleet(self) -> dict[str, dict[str, Any]]:
        return {host["host"]: host for host in await self.stage.json("hosts", "--workspace", WORKSPACE)}

    async def _enforcing(self, version: str) -> bool:
        async def all_enforce() -> bool:
            fleet = await self._fleet()
            found = [firewall_of(fleet[name]) for name in HOSTS]
            return all(m.get("enforcing") and running_of(m).get("version") == version for m in found)

        return bool(await self.stage.until(f"enforcement of {version} everywhere", all_enforce, poll=0.5))

    # (c)
    async def traffic(self) -> None:
        """Real connections: what is allowed passes, what is denied does not, and the counters agree."""
        self.show.act("c", "Real TCP and UDP between namespaces, IPv4 and IPv6")
        allowed, denied_tcp, denied_udp = [], [], []
        for number in range(1, len(HOSTS) + 1):
            for to in (network.address(number), network.address6(number)):
                allowed += [("tcp", to, policies.ALLOWED_TCP), ("udp", to, policies.ALLOWED_UDP)]
                denied_tcp.append(("tcp", to, policies.DENIED_TCP))
                denied_udp.append(("udp", to, policies.DENIED_UDP))
        good = await self._probe(allowed * ROUNDS, 3.0)
        counts = self.summary.traffic
        counts.allowed_ok, counts.allowed_failed = sum(good), len(good) - sum(good)
        failed = sorted(
            {f"{p} {to} {port}" for (p, to, port), ok in zip(allowed * ROUNDS, good, strict=True) if not ok}
        )
        self.check(
            not failed,
            f"allowed: {counts.allowed_ok} of {len(good)} connections and exchanges passed"
            + (f"; not: {', '.join(failed)}" if failed else ""),
        )
        before = await self._drops_settled()
        bad = await self._probe(denied_udp * ROUNDS, 1.0)
        dropped = await self._drops_settled() - before
        # One packet is one attempt in UDP, so the kernels must have counted exactly these.
        self.check(
            dropped == len(bad),
            f"{len(bad)} denied UDP packets were sent; the kernels counted {dropped:.0f} drops",
        )
        bad += await self._probe(denied_tcp * ROUNDS, 1.5)
        arrived = sum(
            [
                await self._arrived(what)
                for what in (f"tcp/{policies.DENIED_TCP}", f"udp/{policies.DENIED_UDP}")
            ]
        )
        counts.denied_leaked = max(sum(bad), arrived)
        counts.denied_blocked = len(bad) - counts.denied_leaked
        self.check(
            not counts.denied_leaked,
            f"denied: {counts.denied_blocked} of {len(bad)} were blocked, {arrived} reached a socket",
        )

    async def _drops_settled(self) -> float:
        """The drops in the fleet view once they stand still: hosts send their counters every five seconds."""
        last, since = -1.0, self.show.elapsed

        async def still() -> bool:
            nonlocal last, since
            now = await self._drops()
            if now != last:
                last, since = now, self.show.elapsed
            return self.show.elapsed - since > COUNTERS_S

        await self.stage.until("the counters in the fleet view", still, poll=0.5)
        return last

    async def _probe(self, targets: list[tuple[str, str, int]], timeout: float) -> list[bool]:
        assert self.client is not None
        probes = [{"proto": p, "to": to, "port": port, "timeout": timeout} for p, to, port in targets]
        for probe in probes:
            six = ":" in str(probe["to"])
            probe["from"] = (network.CLIENT_ADDRESSES6 if six else network.CLIENT_ADDRESSES)[0]
        answer = await self.client.ask({"do": "probe", "probes": probes})
        return [bool(ok) for ok in answer["ok"]]

    async def _arrived(self, what: str) -> int:
        return sum([int((await server.ask({})).get(what, 0)) for server in self.servers.values()])

    async def _drops(self) -> float:
        fleet = await self._fleet()
        return sum(drops(firewall_of(fleet[name]).get("metrics", {})) for name in HOSTS)

    # (d)
    async def swap(self) -> None:
        """The policy is replaced while a flood runs; only a mixture of both would accept it."""
        self.show.act("d", "The policy is replaced under a packet flood: no packet sees half of each")
        assert self.client is not None
        mixed_before = await self._arrived(f"udp/{policies.MIXED_UDP}")
        targets = [network.address(number) for number in range(1, len(HOSTS) + 1)]
        await self.client.ask(
            {
                "do": "flood",
                "from": policies.FLOOD_SOURCE,
                "to": targets,
                "port": policies.MIXED_UDP,
                "pause_s": 0.001,
            }
        )
        commits = 0
        for turn in range(SWAPS):
            name, text = ("odd", policies.odd()) if turn % 2 == 0 else ("even", policies.even())
            await self.rollout(f"swap-{turn + 1}", "1.0.0", name, text, expect="DONE", trial="1s")
            fleet = await self._fleet()
            commits += sum(
                1 for host in HOSTS if firewall_of(fleet[host]).get("rollout") == f"swap-{turn + 1}"
            )
            self.show.say(f"policy '{name}' committed on {commits - turn * len(HOSTS)} hosts under the flood")
        sent = sum((await self.client.ask({"do": "stop"})).values())
        mixed = await self._arrived(f"udp/{policies.MIXED_UDP}") - mixed_before
        self.summary.swap = Swap(packets=sent, commits=commits, mixed_verdicts=mixed)
        self.check(
            mixed == 0 and commits == SWAPS * len(HOSTS) and sent > 0,
            f"{sent:,} packets during {commits} commits, {mixed} judged by a mixture",
        )

    # (e)
    async def broken_release(self) -> None:
        """A release that dies at the commit: the rollout halts at the canary, which returns to 1.0.0."""
        self.show.act("e", "A broken release 1.1.0 halts at the canary, and the canary returns")
        overlay = self.stage.out / "overlay"
        shutil.rmtree(overlay, ignore_errors=True)
        policies.write(overlay / "lib" / "loopback" / "modules" / "firewall", "__main__.py", BROKEN_MODULE)
        await self.publish("1.1.0", overlay)
        probing = asyncio.create_task(self._denied_until_cancelled())
        shown = await self.rollout(
            "fw-2", "1.1.0", "even", policies.even(), expect="ROLLED_BACK", verbose=True
        )
        probing.cancel()
        leaked, tried = await probing
        self.summary.traffic.denied_leaked += leaked
        self.summary.traffic.denied_blocked += tried - leaked
        touched = {host for wave in shown["waves"] if wave["state"] != "PENDING" for host in wave["hosts"]}
        self.check(len(touched) == 1, f"only the canary was touched: {', '.join(sorted(touched))}")
        self.check(await self._enforcing("1.0.0"), "every host runs 1.0.0 and its kernel enforces")
        self.check(leaked == 0, f"{tried} denied attempts during all this, {leaked} leaked")

    async def _denied_until_cancelled(self) -> tuple[int, int]:
        leaked = tried = 0
        targets = [("tcp", network.address(n), policies.DENIED_TCP) for n in range(1, len(HOSTS) + 1)]
        try:
            while True:
                answers = await asyncio.shield(asyncio.create_task(self._probe(targets, 0.5)))
                leaked, tried = leaked + sum(answers), tried + len(answers)
        except asyncio.CancelledError:
            return leaked, tried

    # (f)
    async def crash(self) -> None:
        """Agent and module of one host are killed; denied packets keep being dropped; a restart adopts the programs."""
        self.show.act("f", "Agent and module of web-2 are killed with SIGKILL while denied traffic is sent")
        assert self.client is not None
        victim = HOSTS[1]
        port = f"udp/{policies.DENIED_UDP}"
        before = int((await self.servers[victim].ask({})).get(port, 0))
        to = [network.address(2)]
        await self.client.ask(
            {
                "do": "flood",
                "from": network.CLIENT_ADDRESSES[0],
                "to": to,
                "port": policies.DENIED_UDP,
                "pause_s": 0.001,
            }
        )
        agent = self.stage.processes[f"agent-{victim}"]
        family = [agent.pid, *children_of(agent.pid)]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        await self.stage.kill_group(f"agent-{victim}")
        self.show.say(f"SIGKILL to {len(family)} processes of {victim}")
        client = self.client

        async def enough() -> bool:
            return bool(sum((await client.ask({"do": "sent"})).values()) >= CRASH_PACKETS)

        await self.stage.until(f"{CRASH_PACKETS} denied packets against a dead agent", enough)
        await self.stage.start_host(victim)

        async def adopted() -> bool:
            found = firewall_of((await self._fleet())[victim])
            return bool(found.get("adopted") and found.get("enforcing"))

        crash = self.summary.crash
        crash.adopted = bool(
            await self.stage.until("the restarted agent to adopt its programs", adopted, poll=0.5)
        )
        crash.packets_sent = sum((await self.client.ask({"do": "stop"})).values())
        crash.leaked = int((await self.servers[victim].ask({})).get(port, 0)) - before
        self.check(crash.leaked == 0, f"{crash.packets_sent:,} denied packets, {crash.leaked} leaked")
        self.check(crash.adopted, "the restarted agent found its programs pinned and adopted them")
        good = await self._probe([("tcp", network.address(2), policies.ALLOWED_TCP)] * 5, 3.0)
        self.summary.traffic.allowed_ok += sum(good)
        self.summary.traffic.allowed_failed += len(good) - sum(good)
        self.check(all(good), "allowed connections pass as before")

    async def finish(self) -> None:
        """What runs where, and the trace of the first rollout."""
        fleet = await self._fleet()
        for name in HOSTS:
            module = firewall_of(fleet[name])
            running = running_of(module)
            self.summary.hosts.append(
                HostLine(
                    id=name,
                    kernel=fleet[name].get("kernel", ""),
                    module=module.get("module", ""),
                    version=running.get("version", ""),
                    policy=running.get("policy") or "",
                    generation=int(module.get("generation", 0)),
                    enforcing=bool(module.get("enforcing")),
                )
            )
        self.show.act("·", "The fleet")
        _, out = await self.stage.loopback("hosts", "--workspace", WORKSPACE)
        self.show.output(out)
        # Without eBPF the first rollout reaches no host; the second reaches the canary.
        first = self.summary.rollouts[1 if self.kernel_refuses else 0]
        expected = {host for wave in first.waves if wave.state != "PENDING" for host in wave.hosts}

        async def whole() -> bool:
            self._trace(first.trace_id)
            trace = self.summary.trace
            return len(trace.services) >= 4 and set(trace.hosts) >= expected

        try:
            await self.stage.until("spans of all services and hosts", whole, timeout=20)
        finally:
            trace = self.summary.trace
            self.show.act("·", f"Rollout {first.id} as one trace, {first.trace_id}")
            self.show.output(self.receiver.render_tree(first.trace_id))
            spans = [span._asdict() for span in self.receiver.spans if span.trace_id == first.trace_id]
            (self.stage.out / "trace.json").write_text(json.dumps(spans, indent=1, default=str) + "\n")
            self.check(
                len(trace.services) >= 4 and set(trace.hosts) >= expected,
                f"{trace.spans} spans of {', '.join(trace.services)} and of {len(trace.hosts)} hosts",
            )

    def _trace(self, trace_id: str) -> None:
        spans = [span for span in self.receiver.spans if span.trace_id == trace_id]
        known = {"eligibility", "delivery", "activation", "telemetry"}
        trace = self.summary.trace
        trace.spans = len(spans)
        names = {str(span.resource.get("service.name", "")).removeprefix("loopback-") for span in spans}
        trace.services = sorted(names & known)
        trace.hosts = sorted({str(span.resource.get("host.name")) for span in spans} & set(HOSTS))


def _ports(ports: tuple[int, ...]) -> str:
    return ",".join(map(str, ports))
