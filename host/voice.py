"""What an agent says of itself: statuses when there is news, its inventory, heartbeats, and figures over OTLP."""

from __future__ import annotations

import asyncio
import platform
import random
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

import loopback
from loopback.contracts import abi, envelope
from loopback.contracts.reports import Heartbeat, Inventory, Status, Witness
from loopback.host import inventory, otel, status
from loopback.host.config import HostConfig
from loopback.host.control import AgentStatus
from loopback.host.reporting import Reporter

METRICS_S: Final = 10.0  # between OTLP figures
REPEAT_S: Final = 10.0  # older documents have a status repeated this often at most
#: What a host is, runs and witnessed is said again this often although nothing changed: the bus lets go of a report after a
#: week, and nobody could verify a quiet host's word any more.
AGAIN_S: Final = 24 * 3600.0
FIGURES_S: Final = 5.0  # a status that differs only in counters is sent this often at most


class Voice:
    """Speaks through the reporter. What is said is asked for each time, from the agent that it belongs to."""

    def __init__(
        self,
        reporter: Reporter,
        config: Callable[[], HostConfig],
        features: Callable[[], frozenset[str]],
        now: Callable[[], AgentStatus],
        witnesses: Callable[[], tuple[Witness, ...]],
        metrics: Callable[[], Mapping[str, Mapping[str, float]]],
    ) -> None:
        self.events = self.faults = 0  # counted by the agent
        self._reporter = reporter
        self._config = config
        self._features = features
        self._now = now
        self._witnesses = witnesses
        self._metrics = metrics
        self._said = self._counted = b""
        self._said_at = 0.0

    def forget(self) -> None:
        """Whatever is said next is news."""
        self._said = b""

    def repeat(self) -> None:
        """Say the same once more: whoever sends an older document may not know where this host stands."""
        if asyncio.get_running_loop().time() - self._said_at >= REPEAT_S:
            self.forget()
            self.say()

    def say(self, *, figures: bool = False) -> None:
        """Send a status where it says something new; where only counters moved, not too often."""
        known = self._now()
        agent = status.agent(known.modules)
        plain = tuple(msgspec.structs.replace(m, metrics={}) for m in known.modules)
        said = msgspec.json.encode((agent, known.generation, plain, known.refusal))
        counted = msgspec.json.encode([m.metrics for m in known.modules])
        now = asyncio.get_running_loop().time()
        news = said != self._said
        if not news and not (figures and counted != self._counted and now - self._said_at >= FIGURES_S):
            return
        self._said, self._counted, self._said_at = said, counted, now
        witnesses = self._witnesses()
        report = Status(
            **self._reporter.fields(),  # type: ignore[arg-type]  # the fields that every report has
            agent=agent,
            generation=known.generation,
            modules=known.modules,
            refusal=known.refusal,
            witness=witnesses[-1] if witnesses else None,
            witnesses=witnesses[:-1],
        )
        self._reporter.send(status.fitted(report), otel.traceparent())

    def introduce(self) -> None:
        """Say what this host is."""
        self._reporter.send(
            Inventory(
                **self._reporter.fields(),  # type: ignore[arg-type]  # the fields that every report has
                kernel=platform.release(),
                architecture=platform.machine(),
                agent_version=loopback.__version__,
                abi_min=abi.ABI_VERSION,
                abi_max=abi.ABI_VERSION,
                features=tuple(sorted(self._features())),
                python=platform.python_version(),
                boot_id=inventory.boot_id(),
                modules=self._config().allow.modules,
            )
        )

    async def beat(self) -> None:
        """Heartbeats, until cancelled."""
        interval = self._config().heartbeat_s
        while True:
            known = self._now()
            await self._reporter.heartbeat(
                Heartbeat(
                    **self._reporter.fields(),  # type: ignore[arg-type]  # the fields that every report has
                    generation=known.generation,
                    agent=status.agent(known.modules),
                    interval_s=interval,
                )
            )
            await asyncio.sleep(interval * (0.9 + 0.1 * random.random()))  # noqa: S311  jitter, not a secret

    async def measure(self) -> None:
        """Figures, until cancelled."""
        sent = 0.0
        again = asyncio.get_running_loop().time() + AGAIN_S
        while True:
            await asyncio.sleep(1.0)
            self.say(figures=True)
            now, config, known = asyncio.get_running_loop().time(), self._config(), self._now()
            if now >= again:
                again = now + AGAIN_S * (0.9 + 0.1 * random.random())  # noqa: S311  jitter, not a secret
                self.introduce()
                self.forget()
                self.say()
            if not config.otel or now - sent < METRICS_S or not known.connected:
                continue
            sent = now
            own = {
                "loopback_host_generation": float(known.generation),
                "loopback_host_module_events_total": float(self.events),
                "loopback_host_reports_dropped_total": float(self._reporter.dropped),
                "loopback_host_faults_total": float(self.faults),
            }
            payload = otel.figures(config.host, config.workspace, self._metrics(), own)
            self._reporter.otlp(envelope.OTLP_METRICS, payload)
