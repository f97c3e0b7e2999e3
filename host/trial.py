"""The trial of a change: what is seen of it, and what that comes to.

A change passes when, for the whole trial, its module lived and was well, and a connection to the control plane that was
opened after the commit was answered (an established one proves nothing). Not well: it failed. Well, but nobody could be
reached: unconfirmed, which speaks against nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

import msgspec

from loopback.contracts.abi import HealthReport
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.desired import Running
from loopback.host.process import ModuleProcess, known_code

CONFIRM_S: Final = 3.0  # after the trial, for a connection attempt that is still under way
KERNEL_MARGIN_S: Final = (
    5.0  # the datapath falls back that long after the trial: confirming takes its time, too
)
WATCHDOG_MARGIN_S: Final = (
    20.0  # the watchdog acts that long after the trial; by then the datapath has fallen back
)
PROBE_S: Final = 2.0  # one attempt to reach the control plane on a new connection
POLL_S: Final = 1.0  # between health questions, at most

Probe = Callable[[float], Awaitable[bool]]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What is known `elapsed_s` seconds after the commit. `refusal` says why the module gave no health."""

    elapsed_s: float
    alive: bool = True
    health: HealthReport | None = None
    refusal: Refusal | None = None
    connected: bool = False


class Outcome(StrEnum):
    """What a trial comes to, or WAIT."""

    WAIT = "wait"
    PASSED = "passed"
    FAILED = "failed"
    UNCONFIRMED = "unconfirmed"


def judge(seen: Seen, running: Running, trial_s: float, grace_s: float) -> tuple[Outcome, Refusal | None]:
    """Pure: the outcome, with the refusal for FAILED and UNCONFIRMED.

    Within `grace_s` a module may still be unwell, but for a kernel that cannot do it: waiting does not change that.
    """
    if not seen.alive:
        refusal = seen.refusal or Refusal(Code.MODULE_DIED, "the module ended during its trial")
        return Outcome.FAILED, refusal
    problem = seen.refusal or unwell(seen.health, running)
    over = seen.elapsed_s >= trial_s
    if problem is not None:
        hopeless = problem.code in (Code.KERNEL_UNSUPPORTED, Code.MODULE_TIMEOUT, Code.MODULE_ABI)
        if over or hopeless or seen.elapsed_s >= grace_s:
            return Outcome.FAILED, problem
        return Outcome.WAIT, None
    if not over:
        return Outcome.WAIT, None
    if seen.connected:
        return Outcome.PASSED, None
    if seen.elapsed_s < trial_s + CONFIRM_S:
        return Outcome.WAIT, None
    return Outcome.UNCONFIRMED, Refusal(
        Code.HOST_UNCONFIRMED,
        "the module was well, but no new connection to the control plane could be made after the commit",
        "check that the policy lets the host reach the broker, and that the broker runs",
    )


def unwell(health: HealthReport | None, running: Running) -> Refusal | None:
    """Why a module that should run `running` is not well; None where it is."""
    if health is None:
        return Refusal(Code.MODULE_UNHEALTHY, "it has not said how it is")
    if health.state != "ok":
        code = known_code(health.code) if health.code else Code.MODULE_UNHEALTHY
        reason = health.reason or f"it says {health.state}"
        return Refusal(code, f"{health.state}: {reason}"[:1000])
    if running.policy is not None and (health.policy != running.policy or not health.enforcing):
        return Refusal(
            Code.MODULE_UNHEALTHY,
            f"the kernel enforces {(health.policy or 'no policy')[:12]}, not policy {running.policy[:12]}",
        )
    return None


async def watch(
    process: ModuleProcess, running: Running, trial_s: float, grace_s: float, probe: Probe,
    seen: Callable[[HealthReport], None],
) -> None:  # fmt: skip
    """Watch a committed change until it passes. `probe(seconds)` opens a new connection and says whether it was answered.

    Raises Refused: what the module said, MODULE_DIED, MODULE_TIMEOUT, or HOST_UNCONFIRMED.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    connected = asyncio.Event()

    async def connect() -> None:
        while not connected.is_set():
            if await probe(PROBE_S):
                connected.set()
            else:
                await asyncio.sleep(0.2)

    # Its own task, because a broker that does not answer must not keep the module from being watched.
    connecting = asyncio.create_task(connect())
    try:
        while True:
            health, refusal = None, None
            try:
                health = await process.health()
                seen(health)
            except Refused as refused:
                refusal = refused.refusal
            now = Seen(
                elapsed_s=loop.time() - start,
                alive=not process.exited.is_set(),
                health=health,
                refusal=refusal,
                connected=connected.is_set(),
            )
            outcome, why = judge(now, running, trial_s, grace_s)
            if outcome is Outcome.PASSED:
                return
            if outcome is not Outcome.WAIT:
                assert why is not None
                raise Refused(why.code, why.reason, why.next_step)
            left = trial_s - now.elapsed_s
            pause = min(POLL_S, max(left, 0.1), max(trial_s / 4, 0.05))
            try:
                async with asyncio.timeout(pause):
                    await process.exited.wait()
            except TimeoutError:
                continue
    finally:
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
