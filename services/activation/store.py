"""One workspace's rollouts on the bus: folded from its stream, written to it in atomic batches under compare-and-set.

The stream's last sequence is the revision of the state. Every batch expects it, so of two replicas that decide at once one
stores and the other folds what was stored and decides again. Nothing is kept in memory that the stream does not hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from loopback.contracts import subjects
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import Workspace
from loopback.services._runtime.bus import Bus, Conflict, Outgoing, Stored, StreamReplaced
from loopback.services._runtime.wire import ApiError
from loopback.services.activation.documents import Draft

log = logging.getLogger(__name__)
AGAIN_S: Final = 1.0  # after the broker's API refused to let the stream be read
MAX_LINK: Final = 900 * 1024  # bytes; NATS's default max_payload is 1 MiB, headers included


class Store:
    """The state of a workspace, and the one way to change it. `state` is replaced when its stream was."""

    def __init__(self, bus: Bus, workspace: str, sourced: Callable[[], None] = lambda: None) -> None:
        """`sourced` is called when a policy with new sources was accepted."""
        self.bus = bus
        self.workspace = workspace
        self.stream = subjects.workspace_stream(workspace)
        self.state = Workspace(workspace)
        self.revision = 0
        self.caught_up = asyncio.Event()
        self.changed = asyncio.Event()  # for whoever decides: something was folded
        self._tick = asyncio.Event()
        self._sourced, self._sources = sourced, 0

    async def run(self) -> None:
        """Fold until cancelled. Desired states are not read back: every batch ends with a link."""
        prefix = f"lb.ws.{subjects.token(self.workspace)}"
        filters = [f"{prefix}.rollout.>", f"{prefix}.result.*", f"{prefix}.journal.>"]
        while True:
            try:
                await self.bus.fold(
                    self.stream, filters, self._fold, caught_up=self.caught_up, after=self._folded
                )
            except StreamReplaced as replaced:
                # The hosts' own generations tell them not to follow an older plan; here it is said loudly.
                log.error("workspace %s: %s; its rollouts are folded anew", self.workspace, replaced)
            except ApiError as error:
                if self.bus.nc.is_closed:
                    raise
                log.error("workspace %s: %s; its rollouts are folded anew", self.workspace, error)
                await asyncio.sleep(AGAIN_S)
            self.caught_up.clear()
            self.state = Workspace(self.workspace)
            self.revision = 0

    def _fold(self, stored: Stored) -> None:
        parts = stored.subject.split(".")
        if parts[3] == "rollout":
            try:
                link = fold(self.state, stored.data)
            except (msgspec.MsgspecError, RecursionError) as error:
                # What does not read as a link cannot continue a chain: the next good link shows the gap.
                log.error("%s (sequence %d) is no link: %s", stored.subject, stored.sequence, error)
            else:
                if link is None:
                    log.error("%s (sequence %d) does not continue its chain", stored.subject, stored.sequence)
        self.revision = stored.sequence

    def _folded(self) -> None:
        self.changed.set()
        if len(self.state.sources) != self._sources:
            self._sources = len(self.state.sources)
            self._sourced()
        self._tick.set()
        self._tick = asyncio.Event()

    async def reached(self, sequence: int) -> None:
        """Wait until everything up to this sequence is folded."""
        while self.revision < sequence or not self.caught_up.is_set():
            await self._tick.wait()

    async def synced(self) -> None:
        """Wait until everything is folded that was stored when this was called."""
        revision = await self.bus.revision(self.stream)
        heed_cancellation()
        await self.reached(revision)

    async def write(self, drafts: Sequence[Draft], revision: int) -> None:
        """Store a decision made on `revision`, and wait until it is folded here. The last draft must be a link.

        Raises Conflict, after whatever came before is folded.
        """
        outs = [Outgoing(d.subject, d.data, d.headers) for d in drafts]
        try:
            stored = await self.bus.batch(outs, expected_last=revision)
        except Conflict:
            await self.synced()
            raise
        heed_cancellation()  # the fold that is waited for now may have ended already
        await self.reached(stored)


def heed_cancellation() -> None:
    """End where this task was asked to: in Python 3.11 `wait_for`, in which NATS requests wait, can lose that.

    It does so when the answer arrives in the same turn of the loop (python/cpython#86296, mended in 3.12).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
