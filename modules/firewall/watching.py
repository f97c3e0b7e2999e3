"""What the programs report of packets: to the agent, to whoever observes, and to the shadow of a policy that is staged."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from loopback.bpf import layout
from loopback.bpf.ring import Ring
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import events, shadow
from loopback.modules.firewall.attach import present
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.observing import Observers
from loopback.modules.firewall.shadow import Shadow

EVENTS_PER_SECOND: Final = 50  # more sampled packets than that are counted and not sent to the agent
BATCH_S: Final = 0.2  # samples of a shadow are judged together
DEFAULT_SHADOW: Final = 16  # one in so many packets of each rule

log = logging.getLogger("loopback.firewall")

Work = Callable[[Callable[[Datapath], Any]], Awaitable[Any]]


class Watch:
    """The one reader of the ring buffer. `tell` gets what the agent is to hear, `do` works with the datapath, alone."""

    def __init__(self, tell: Callable[..., None], do: Work) -> None:
        self._tell_agent, self._do = tell, do
        self._ring: Ring | None = None
        self._observers = Observers(lambda _rate: self._sample())
        self._window: tuple[int, int] = (0, 0)  # second, events sent in it
        self._own = 0  # one in so many packets is judged by the staged policy; 0: no shadow
        self._samples: list[layout.Event] = []
        self._skipped = 0
        self._sampling: asyncio.Task[None] | None = None
        self._datapath: Datapath | None = None
        self.unsent_events = 0
        self.report: shadow.Report | None = None  # of the last shadow, or the one that goes on

    def start(self, datapath: Datapath, folder: Path) -> None:
        """Read the ring, and let observers in. Raises Refused."""
        self._datapath = datapath
        names: dict[int, str] = {}
        datapath.sample(0)  # whoever ran before us may have died with a shadow

        def on_record(record: bytes) -> None:
            self._hear(record, names)

        def on_ring() -> None:
            names.clear()
            names.update(datapath.rule_names())
            if self._ring is not None:
                self._ring.consume()

        self._ring = Ring(datapath.events, on_record)
        asyncio.get_running_loop().add_reader(self._ring.fileno(), on_ring)
        self._observers.start(folder)

    def _hear(self, record: bytes, names: dict[int, str]) -> None:
        event = layout.Event.from_buffer_copy(record)
        if event.why & layout.SHADOWED and self._own:
            if len(self._samples) < shadow.BUDGET * BATCH_S:
                self._samples.append(event)
            else:
                self._skipped += 1
        logged = event.why & layout.LOGGED and self._may_tell()
        if logged or self._observers:
            attributes = events.decode(record, names)
            self._observers.tell(event.why, record, attributes)
            if logged:
                self._tell_agent(events.PACKET, **attributes)

    def _may_tell(self) -> bool:
        second = int(asyncio.get_running_loop().time())
        window, sent = self._window
        sent = sent if window == second else 0
        if sent >= EVENTS_PER_SECOND:
            self.unsent_events += 1
            return False
        self._window = (second, sent + 1)
        return True

    # ── shadow ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sample(self) -> None:
        """Have the programs sample as often as somebody wants it: now, and under the policies that follow."""
        if self._sampling is None or self._sampling.done():
            self._sampling = asyncio.get_running_loop().create_task(self._keep_sampling())

    def _wanted(self) -> int:
        return min((rate for rate in (self._own, self._observers.shadow) if rate), default=0)

    async def _keep_sampling(self) -> None:
        try:
            while True:
                one_in = self._wanted()
                await self._do(functools.partial(Datapath.sample, one_in=one_in))
                if one_in:
                    await asyncio.sleep(BATCH_S)
                elif not self._wanted():  # nobody came while it was turned off
                    return
        except Refused as problem:
            log.warning("no shadow: %s", problem.reason)

    async def shadow(self, seconds: float, one_in: int) -> shadow.Report:
        """Let the staged policy judge one in N packets for some seconds. Raises Refused."""
        self._samples, self._skipped, self._own = [], 0, one_in
        loop = asyncio.get_running_loop()
        datapath = self._datapath
        if datapath is None:
            raise Refused(Code.MODULE_ABI, "the module is not configured")
        made = Shadow(
            lambda asked: datapath.explain(asked, slot=layout.PROBE_ACTIVE),
            lambda asked: datapath.explain(asked),
        )
        self.report = made.report()
        self._sample()
        try:
            end, second, seen = loop.time() + seconds, loop.time() + 1.0, 0
            while (left := end - loop.time()) > 0:
                await asyncio.sleep(min(BATCH_S, left))
                samples, self._samples = self._samples, []
                skipped, self._skipped = self._skipped, 0
                seen += len(samples) + skipped
                made.skip(skipped)
                rate = self._own
                devices = {device.index: device.name for device in present()}
                await self._do(_judging(made, samples, devices, rate))
                self.report = made.report()
                if loop.time() >= second:
                    self._own = shadow.rate_for(self._own, seen, shadow.BUDGET)
                    second, seen = loop.time() + 1.0, 0
        finally:
            self._own = 0
        return self.report

    async def stop(self) -> None:
        """Read no more. The programs go on without samples."""
        loop = asyncio.get_running_loop()
        self._own = 0
        await self._observers.close()
        if self._sampling is not None:
            await self._sampling
        if self._ring is not None:
            loop.remove_reader(self._ring.fileno())
            self._ring.close()
            self._ring = None


def _judging(
    made: Shadow, samples: list[layout.Event], devices: dict[int, str], rate: int
) -> Callable[[Datapath], None]:
    return lambda _: made.judge(samples, devices, rate)


def summary(report: shadow.Report) -> dict[str, str]:
    """A shadow as details of a report: short words, the most frequent differences first."""
    found = {"shadow": f"{report.changed} of {report.judged} sampled packets would be judged otherwise"}
    if report.unsure or report.unasked:
        found["shadow_left_out"] = f"{report.unsure} unsure, {report.unasked} that no rule decides"
    for number, one in enumerate(report.differences[:5], 1):
        found[f"shadow_{number}"] = f"{shadow.words(one.pair)}: {one.samples}"
    return found
