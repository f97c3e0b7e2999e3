"""How much of what others say goes into a journal: short reasons, short versions, links that the broker takes.

Pure. Whatever a host or a service writes about itself is read by people, carried on into desired states and kept for ever,
so its length is ours to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from loopback.contracts import journal
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import Running
from loopback.contracts.messages import Verdict
from loopback.contracts.reports import ModuleStatus

MAX_REASON: Final = 1024  # bytes of a reason, and of a next step
MAX_VERSION: Final = 200  # bytes
MAX_DIGEST: Final = 64  # a SHA-256 in hex; anything longer is none
LINK_HOSTS: Final = 500  # observations in one link
AROUND: Final = 8 * 1024  # bytes of a link besides its list of hosts
_BRIEF_REASON: Final = 100

T = TypeVar("T")


def text(said: str, most: int) -> str:
    """At most this many bytes of UTF-8, and nothing that a terminal would obey."""
    if not said.isprintable():
        said = "".join(c if c.isprintable() else " " for c in said)
    data = said.encode()
    return said if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"


def refusal(said: Refusal, most: int = MAX_REASON) -> Refusal:
    """A refusal in so many bytes."""
    return Refusal(said.code, text(said.reason, most), text(said.next_step, most))


def running(said: Running | None) -> Running | None:
    """What somebody says it runs, with no more than a version and two digests have."""
    if said is None:
        return None
    policy = text(said.policy, MAX_DIGEST) if said.policy is not None else None
    return Running(
        text(said.version, MAX_VERSION), text(said.package, MAX_DIGEST), policy, said.policy_serial
    )


def report(said: ModuleStatus) -> ModuleStatus:
    """A host's word on one module, as it may be journaled."""
    return msgspec.structs.replace(
        said,
        promoted=running(said.promoted),
        refusal=refusal(said.refusal) if said.refusal is not None else None,
    )


def bounded(event: journal.AnyEvent, most: int) -> journal.AnyEvent:
    """The same event in a link of at most `most` bytes. What does not fit is still news, or undecided, afterwards."""
    match event:
        case journal.Observed(hosts=hosts):
            return msgspec.structs.replace(event, hosts=tuple(_fitting(hosts[:LINK_HOSTS], most)))
        case journal.Assigned(hosts=assignments):
            return msgspec.structs.replace(event, hosts=tuple(_fitting(assignments, most)))
        case journal.PresenceSeen(lost=lost):
            return msgspec.structs.replace(event, lost=tuple(_fitting(lost, most)))
        case journal.VerdictGiven(verdict=verdict):
            return journal.VerdictGiven(verdict=_verdict(verdict, most))
        case _:
            return event


def _fitting(items: Iterable[T], most: int) -> Iterator[T]:
    """As many of them as fit, but one in any case."""
    left = most - AROUND
    for number, item in enumerate(items):
        left -= len(msgspec.json.encode(item)) + 1
        if number and left < 0:
            return
        yield item


def _verdict(verdict: Verdict, most: int) -> Verdict:
    """A verdict cannot be given in parts: its reasons become shorter, and where that is not enough it is a no."""
    said = verdict.refusal
    for length in (MAX_REASON, _BRIEF_REASON):
        shorter = msgspec.structs.replace(
            verdict,
            refusal=refusal(said) if said is not None else None,
            refused={host: refusal(why, length) for host, why in verdict.refused.items()},
        )
        if len(msgspec.json.encode(shorter)) <= most - AROUND:
            return shorter
    too_many = Refusal(
        Code.ROLLOUT_INVALID,
        f"{verdict.service} refuses {len(verdict.refused)} of its hosts, more than can be written down",
        "select fewer hosts",
    )
    return msgspec.structs.replace(verdict, refusal=too_many, refused={})
