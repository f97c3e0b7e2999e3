"""Work done at once by one caller, who gets every result or the first failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results, in order. Where one fails the others are ended, and its exception is raised as it is.

    Not a TaskGroup: that wraps the exception, so that a caller who expects it does not catch it; and where a task of one
    fails, Python 3.11 leaves the task that waited for it marked as being cancelled, and its next `asyncio.timeout` that runs
    out ends it. Whoever lives on after a failure, as a host or a service does, needs neither.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
