"""Keeps sets filled: follows the rosters that promoted policies name, and hands modules other contents (ADR 0020).

What is heard wakes it; it reads by itself only after joining and from time to time, like desired states. New contents go
the way of a policy: staged and proven by the module, committed on trial, confirmed by a new connection to the control plane.
Whatever fails leaves the last contents, and the module "degraded" with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Final

import msgspec

from loopback.contracts import abi, envelope, subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import Running
from loopback.contracts.messages import Policy
from loopback.contracts.roster import Source
from loopback.contracts.together import together
from loopback.contracts.trustdoc import Trust
from loopback.host import fills, install, roster, transitions, trial
from loopback.host.config import HostConfig
from loopback.host.connections import own_connections
from loopback.host.fills import Fills
from loopback.host.link import Link
from loopback.host.roster import Followed, Members
from loopback.host.state import Store
from loopback.host.supervisor import Supervisor, stage

LOOK_S: Final = 60.0  # between looks at the rosters, with as much again of jitter
AGAIN_S: Final = 15.0  # after something was wrong, with as much again
SPREAD_S: Final = (
    1.0  # of jitter before the slices of a new roster are read: every host of the fleet heard of it at once
)
SLICES_AT_ONCE: Final = 8
TRIAL_S: Final = (
    30.0  # then other contents fall back by themselves; a new connection that is answered confirms them
)
PROBES: Final = 3
FIRST_S: Final = (0.5, 2.0, 5.0)  # waits for a roster that nobody has written yet: its rollout has just begun

log = logging.getLogger("loopback.host")


class _Wanted(msgspec.Struct, frozen=True):
    """What a policy wants to be filled; `digest` is the policy's."""

    digest: str | None
    workspace: str
    sources: dict[str, Source]


class Filler:
    """All sources that this host follows. `look` and `heard` wake it."""

    def __init__(
        self, store: Store, link: Link, supervisors: Mapping[str, Supervisor], trust: Callable[[], Trust | None],
        renew_trust: Callable[[], Awaitable[None]], config: Callable[[], HostConfig], now: Callable[[], datetime],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._store, self._link, self._supervisors = store, link, supervisors
        self._trust, self._renew_trust, self._config, self._now = trust, renew_trust, config, now
        self._changed = changed
        self._turn = asyncio.Lock()  # one roster at a time
        self._arrived: dict[str, bytes] = {}  # by key: the newest that was not looked at yet
        self._followed: dict[tuple[str, str], Followed] = {}  # by workspace and key
        self._wanted: dict[str, _Wanted] = {}  # by module, so that a long policy is not read in each round
        self._wrong: dict[str, Refusal] = {}  # by key: why its newest roster is not believed
        self._wake = asyncio.Event()
        self._look = False

    def heard(self, key: str, data: bytes) -> None:
        """A roster came."""
        self._arrived[key] = data
        self._wake.set()

    def look(self) -> None:
        """Read all rosters again, and see whether every module has them."""
        self._look = True
        self._wake.set()

    async def run(self) -> None:
        """Keep sets filled, for ever."""
        while True:
            wrong = any(one.unfilled for one in self._supervisors.values())
            try:
                async with asyncio.timeout((AGAIN_S if wrong else LOOK_S) * (1 + random.random())):  # noqa: S311  jitter
                    await self._wake.wait()
            except TimeoutError:
                self._look = True
            else:
                await asyncio.sleep(SPREAD_S * random.random())  # noqa: S311  jitter, not a secret
            self._wake.clear()
            look, self._look = self._look, False
            for supervisor in list(self._supervisors.values()):
                try:
                    await self._round(supervisor, look)
                except Refused as refused:
                    self._say(supervisor, refused.refusal)
                except Exception as error:
                    # Whatever one round meets, the next may be good: this task must not end, and the agent with it.
                    log.exception("%s: filling its sets ended in a fault of this agent", supervisor.module)
                    self._say(supervisor, transitions.fault(error))

    async def contents(self, policy: Policy) -> Fills:
        """What fills the sets of a policy that is about to be staged, as new as can be.

        Raises Refused(SET_UNFILLED) where nobody has said it yet, and what is wrong with a roster.
        """
        for name, source in policy.sources.items():
            for wait in (*FIRST_S, None):
                await self._refresh(source, look=True)
                if self._known(source).issued_at is not None:
                    break
                if wait is None:
                    wrong = self._wrong.get(source.key)
                    raise Refused(
                        wrong.code if wrong else Code.SET_UNFILLED,
                        f"set {name!r}: {wrong.reason if wrong else f'nobody has said who {source.words} are'}",
                        (wrong.next_step if wrong else "")
                        or "see whether activation runs, and start the rollout again",
                    )
                await asyncio.sleep(wait)
        return self._contents(policy.sources)

    def _contents(self, sources: Mapping[str, Source]) -> Fills:
        return {
            name: abi.Filled(labels=source.labels, pool=source.pool, addresses=self._known(source).addresses)
            for name, source in sources.items()
        }

    # One module

    async def _round(self, supervisor: Supervisor, look: bool) -> None:
        running = supervisor.own.read().promoted
        wanted = await self._wants(supervisor.module, running) if running else None
        if (
            running is None
            or wanted is None
            or not wanted.sources
            or wanted.workspace != self._config().workspace
        ):
            self._say(supervisor, None)
            return
        sources = wanted.sources.values()
        for source in sources:
            await self._refresh(source, look)
        wrong = next((self._wrong[source.key] for source in sources if source.key in self._wrong), None)
        if all(self._known(source).issued_at for source in sources):
            wrong = await self._refill(supervisor, running, wanted.sources) or wrong
        self._say(supervisor, wrong)

    async def _wants(self, module: str, running: Running) -> _Wanted:
        found = self._wanted.get(module)
        if found is None or found.digest != running.policy:
            found = _Wanted(None, "", {})
            if running.policy is not None:
                policy = await asyncio.to_thread(install.read_policy, self._store, running)
                found = _Wanted(running.policy, policy.workspace, policy.sources)
            self._wanted[module] = found
        return found

    async def _refill(
        self, supervisor: Supervisor, running: Running, sources: Mapping[str, Source]
    ) -> Refusal | None:
        """Hand a module other contents where it has not the newest; why it does not take them."""
        assert running.policy is not None
        async with supervisor.busy:
            new = self._contents(sources)
            if supervisor.own.read().promoted != running or supervisor.alive is None:
                return supervisor.unfilled  # looked at again in a moment
            if await asyncio.to_thread(fills.read, self._store, running.policy) == new:
                return None
            process = supervisor.alive
            try:
                control = await asyncio.to_thread(own_connections)
                try:
                    await process.request(abi.Fill(digest=running.policy, fills=new, control=control))
                except Refused as refused:
                    if refused.code is not Code.MODULE_ABI:
                        raise
                    content = await asyncio.to_thread(install.policy_content, self._store, running)
                    assert content is not None
                    await stage(process, running, content, control, new)  # it knows that policy no more
                try:
                    await process.request(abi.Commit(digest=running.policy, trial_s=TRIAL_S))
                    await self._probe()
                    await process.request(abi.Confirm(digest=running.policy))
                except BaseException:
                    with contextlib.suppress(Refused):
                        await process.request(abi.Revert())
                    raise
                await asyncio.to_thread(fills.keep, self._store, running.policy, new)
            except Refused as refused:
                log.warning("%s: sets keep their last contents: %s", supervisor.module, refused)
                return transitions.brief(refused.refusal)
        counts = ", ".join(f"{name}: {len(one.addresses)}" for name, one in new.items())
        log.info("%s: sets have other contents (%s)", supervisor.module, counts)
        return None

    async def _probe(self) -> None:
        for _ in range(PROBES):
            if await self._link.probe(trial.PROBE_S):
                return
            await asyncio.sleep(0.2)
        raise Refused(
            Code.HOST_UNCONFIRMED,
            "with other contents of sets no new connection to the control plane could be made",
            "see whether they let the host reach the broker, and whether the broker runs",
        )

    def _say(self, supervisor: Supervisor, wrong: Refusal | None) -> None:
        if supervisor.unfilled != wrong:
            supervisor.unfilled = wrong
            supervisor.wake()  # its health has changed as well
            self._changed()

    # One source

    def _known(self, source: Source) -> Followed:
        workspace = self._config().workspace
        found = self._followed.get((workspace, source.key))
        if found is None:
            found = self._read(workspace, source) or Followed(source=source)
            self._followed[workspace, source.key] = found
        return found

    def _read(self, workspace: str, source: Source) -> Followed | None:
        data = self._store.disk.read(self._store.followed_path(workspace, source.key))
        try:
            found = msgspec.json.decode(data, type=Followed) if data is not None else None
        except msgspec.MsgspecError as error:
            log.error("what is known of %s is damaged, and read anew: %s", source.words, error)
            return None
        return found if found is not None and found.source == source else None

    async def _refresh(self, source: Source, look: bool) -> None:
        """Take up what came of a source, or what is stored of it; what is wrong with it is in `_wrong`."""
        async with self._turn:
            await self._link.follow(source.key)
            data = self._arrived.pop(source.key, None)
            try:
                if data is None and look:
                    found = await self._link.get(subjects.roster(self._config().workspace, source.key))
                    data = found[0] if found else None
                if data is None:
                    return
                try:
                    await self._take(source, data)
                except Refused as refused:
                    # A newer roster may have replaced the slices meanwhile, or newer trust may know who signed.
                    log.info("roster of %s: %s; looking again", source.words, refused)
                    await self._renew_trust()
                    found = await self._link.get(subjects.roster(self._config().workspace, source.key))
                    await self._take(source, found[0] if found else data)
            except Refused as refused:
                if refused.code is Code.BLOB_MISSING:
                    log.info("roster of %s: %s", source.words, refused)
                else:
                    self._wrong[source.key] = transitions.brief(refused.refusal)
            else:
                self._wrong.pop(source.key, None)

    async def _take(self, source: Source, data: bytes) -> None:
        trust, workspace, before = self._trust(), self._config().workspace, self._known(source)
        if trust is None:
            raise Refused(Code.SIGNATURE_UNKNOWN_KEY, "nobody is trusted yet", "check that delivery runs")
        found = roster.opened(envelope.parse(data), before, workspace, trust, self._now())
        if found is None:
            return
        known = before.by_digest
        gate = asyncio.Semaphore(SLICES_AT_ONCE)

        async def read(number: int, digest: str) -> tuple[str, Members]:
            async with gate:
                stored = await self._link.get(subjects.slice_of(workspace, source.key, number))
                members = await asyncio.to_thread(
                    roster.slice_members,
                    stored[0] if stored else b"",
                    digest,
                    source,
                    workspace,
                    trust,
                    known,
                )
                return digest, members

        slices = dict(await together(read(n, d) for n, d in roster.missing(before, found).items()))
        after = roster.accept(before, found, slices)
        path = self._store.followed_path(workspace, source.key)
        await asyncio.to_thread(self._store.disk.write, path, msgspec.json.encode(after))
        self._followed[workspace, source.key] = after
