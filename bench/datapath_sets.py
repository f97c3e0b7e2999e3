"""The policies that the datapath's bench runs: published rule sets where they are, generated ones in their place where not."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import corners
import msgspec
import rulegen
import rulesets
from datapath_kernel import TABLE, TCP, UDP, Tuple
from rulesets import Bits, Five

from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.model import FirewallPolicy, Prefix, Rule

KINDS: Final = ("acl1", "fw1", "ipc1")
FEW: Final = 10  # rules
LARGE: Final = 100_000
PROOFS: Final = 16  # packets that a changed policy must judge rightly before it is committed
CORNERS: Final = TABLE  # packets drawn from the rules' corners
FLOWS: Final = 1024  # connections that stand while established ones are timed
#: RFC 2544 keeps 198.18.0.0/15 for benches.
FLOW_SOURCE: Final = 0xC6120000


@cache
def ten_thousand(kind: str) -> tuple[str, tuple[Five, ...]]:
    """The published 10k set of a kind, or one made like it; its name."""
    found = rulesets.published().get(f"{kind}_10k")
    if found is not None:
        return f"{kind}_10k", tuple(rulesets.read(found))
    print(f"bench: {kind}_10k is not there; a generated set like it is used", file=sys.stderr)
    return f"{kind}_10k (generated)", tuple(rulegen.generate(kind, 10_000))


def a_few(fives: Sequence[Five], seed: int = 1) -> list[Five]:
    """FEW rules of a set, in its order."""
    source = Bits(seed)
    chosen: set[int] = set()
    while len(chosen) < min(FEW, len(fives)):
        chosen.add(source.below(len(fives)))
    return [fives[at] for at in sorted(chosen)]


def dropping(fives: Sequence[Five]) -> FirewallPolicy:
    """Rules that all drop, and drop by default: whichever decides, no packet makes a flow."""
    return rulesets.policy(fives, actions="drop")


def prefixes(kind: str, count: int, fives: Sequence[Five]) -> tuple[tuple[int, int, int], ...]:
    """So many different prefixes of a set's sources and destinations, (family, address, length): those of the set, and where
    it has fewer, more of a generated set of its kind. The default route is left out: it is no look-up's work."""
    found: dict[Prefix, None] = {}
    family: Literal[4, 6] = fives[0].source.family
    more, size = fives, count
    for seed in range(2, 40):
        for five in more:
            found |= {p: None for p in (five.source, five.destination) if p.length}
        if len(found) >= count:
            break
        more, size = rulegen.generate(kind, size, seed=seed, family=family), size
    return tuple((p.family, p.address, p.length) for p in list(found)[:count])


class Shelf:
    """Policies as files, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._there: dict[str, Path] = {}

    def put(self, name: str, found: FirewallPolicy, extra: Mapping[str, Any] | None = None) -> Path:
        """A policy as JSON. `extra` are fields of the document that replace or (as a list `rules`) go before its own."""
        if name not in self._there:
            plain = rulesets.plain(found)
            for key, value in (extra or {}).items():
                plain[key] = value + plain[key] if key == "rules" else value
            self._there[name] = self.write(name, plain)
        return self._there[name]

    def write(self, name: str, plain: Mapping[str, Any]) -> Path:
        """A policy's plain values as JSON, in a file of that name."""
        path = self._folder / f"{name.replace(' ', '-').replace('(', '').replace(')', '')}.json"
        path.write_bytes(policies.to_json(plain))
        return path


def flow_rule() -> dict[str, Any]:
    """A rule in front of all others that accepts the packets of `flows`."""
    return {"name": "flows", "from": ["198.18.0.0/15"], "proto": ["udp"], "action": "accept"}


def flows() -> tuple[Tuple, ...]:
    """FLOWS connections."""
    source = Bits(7)
    return tuple(
        Tuple(FLOW_SOURCE | source.bits(17), source.bits(32), 1024 + number, source.bits(16), UDP)
        for number in range(FLOWS)
    )


def corner_tuples(policy: FirewallPolicy) -> tuple[Tuple, ...]:
    """TCP and UDP packets at the corners of a policy's rules: a full table of them, or fewer where it has fewer."""
    found = []
    for _, raw in corners.raw_corners(policy, CORNERS):
        family, source, destination, protocol, first, second = raw
        if family == 4 and protocol in (TCP, UDP):
            found.append(Tuple(source, destination, first, second, protocol))
    return tuple(found)


def proofs() -> list[dict[str, Any]]:
    """Assertions for a policy that drops everything."""
    source = Bits(11)
    return [
        {
            "packet": {
                "src": rulesets.address_text(4, source.bits(32)), "dst": rulesets.address_text(4, source.bits(32)),
                "proto": "tcp", "sport": source.bits(16), "dport": source.bits(16),
            },
            "expect": "drop",
        }
        for _ in range(PROOFS)
    ]  # fmt: skip


def changed(found: FirewallPolicy, number: int) -> FirewallPolicy:
    """The policy with one rule changed: the one in its middle is about another destination, a different one for each number."""
    at = len(found.rules) // 2
    other: Rule = msgspec.structs.replace(
        found.rules[at], destinations=(Prefix(4, FLOW_SOURCE + number, 32),)
    )
    return msgspec.structs.replace(found, rules=(*found.rules[:at], other, *found.rules[at + 1 :]))
