"""Who judges packets for the command line: the real program in the kernel, or the plain evaluator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple, Protocol

from loopback.modules.firewall import oracle
from loopback.modules.firewall.model import Action, FirewallPolicy, Packet


class Kind(StrEnum):
    """What `--judge` may say."""

    AUTO = "auto"
    KERNEL = "kernel"
    ORACLE = "oracle"


class Verdict(NamedTuple):
    """What happens to a packet, the rule that decides (None: the default) and the generation that judged it."""

    action: Action
    rule: str | None
    generation: int


class Judge(Protocol):
    """One judge. `name` as messages call it; `why` says in brackets why it was not the program, else empty."""

    name: str
    why: str

    def judge(self, packets: Sequence[Packet]) -> list[Verdict]:
        """Judge each packet as the first of a new connection, unless its state says otherwise."""
        ...


class OracleJudge:
    """The plain Python evaluator. Its generation is 0, for it has none."""

    name = "the plain evaluator"

    def __init__(self, policy: FirewallPolicy, why: str = "") -> None:
        self._policy = policy
        self.why = why

    def judge(self, packets: Sequence[Packet]) -> list[Verdict]:
        """See `Judge`."""
        judged = (oracle.judge(self._policy, packet) for packet in packets)
        return [Verdict(action, rule, 0) for action, rule in judged]


@contextmanager
def open_judge(policy: FirewallPolicy, kind: Kind = Kind.AUTO) -> Iterator[Judge]:
    """A judge for this policy."""
    yield OracleJudge(policy)
