"""Chains of another firewall as one list of rules of which the first match decides: exactly, or not at all.

A clause is a conjunction of positive fields, as a rule of our language is. A jump is followed with the clause that leads there.
Where a chain returns on a condition, what comes after the jump is written out once more for the packets that return, so no rule
needs to say "and not".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Ports = tuple[tuple[int, int], ...]
MAX_MADE: Final = 20_000  # rules that chains may multiply to
MAX_DEPTH: Final = 16  # jumps within jumps; iptables and nftables allow as many
MAX_RETURNS: Final = 150  # conditional returns on the way of one packet, each of which begins a recursion
MAX_COMPLEMENT: Final = 128  # prefixes that "everything but" may become
ALL: Final = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}


class CannotSay(Exception):
    """What our language cannot say, and why."""


class Clause(msgspec.Struct, frozen=True, kw_only=True):
    """What a packet must be; None is anything. Addresses of one family only; ports are of both ends included."""

    families: frozenset[int] = frozenset((4, 6))
    src: tuple[Network, ...] | None = None
    dst: tuple[Network, ...] | None = None
    proto: frozenset[int] | None = None
    ports: Ports | None = None
    source_ports: Ports | None = None
    icmp: frozenset[tuple[int, int | None]] | None = None
    state: frozenset[str] | None = None
    iface: frozenset[str] | None = None

    def both(self, other: Clause) -> Clause | None:
        """What matches this and the other; None where nothing can."""
        made = Clause(
            families=self.families & other.families,
            src=_meet(self.src, other.src, _networks),
            dst=_meet(self.dst, other.dst, _networks),
            proto=_meet(self.proto, other.proto, frozenset.intersection),
            ports=_meet(self.ports, other.ports, _ranges),
            source_ports=_meet(self.source_ports, other.source_ports, _ranges),
            icmp=_meet(self.icmp, other.icmp, _icmp),
            state=_meet(self.state, other.state, frozenset.intersection),
            iface=_meet(self.iface, other.iface, frozenset.intersection),
        )
        return made.possible()

    def possible(self) -> Clause | None:
        """The clause with what its fields imply for each other; None where nothing can match."""
        families = self.families
        for side in (self.src, self.dst):
            if side is not None:
                families &= {network.version for network in side}
        proto = self.proto
        if self.ports is not None or self.source_ports is not None:
            proto = WITH_PORTS if proto is None else proto & WITH_PORTS
        if proto is not None and families != {4, 6} and len(families) == 1:
            proto -= {ICMPV6 if 4 in families else ICMP}
        some = (self.src, self.dst, proto, self.ports, self.source_ports, self.icmp, self.state, self.iface)
        if not families or any(field is not None and not field for field in some):
            return None
        return msgspec.structs.replace(self, families=families, proto=proto)


def _meet(one: Any, other: Any, both: Any) -> Any:
    return other if one is None else one if other is None else both(one, other)


def _networks(one: Iterable[Network], other: Iterable[Network]) -> tuple[Network, ...]:
    met: dict[Network, None] = {}
    for a in one:
        for b in other:
            if a.version == b.version:
                if a.subnet_of(b):  # type: ignore[arg-type]  # both of one version
                    met[a] = None
                elif b.subnet_of(a):  # type: ignore[arg-type]  # both of one version
                    met[b] = None
    return tuple(met)


def _ranges(one: Ports, other: Ports) -> Ports:
    met = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple(sorted({pair for pair in met if pair[0] <= pair[1]}))


def _icmp(
    one: Iterable[tuple[int, int | None]], other: Iterable[tuple[int, int | None]]
) -> frozenset[tuple[int, int | None]]:
    return frozenset(
        (a, b if b is not None else d)
        for a, b in one
        for c, d in other
        if a == c and (b is None or d is None or b == d)
    )


def but(networks: Iterable[Network], families: Iterable[int]) -> tuple[Network, ...]:
    """Every address but these, of these families. Raises CannotSay where that is a long list."""
    left: list[Network] = [ALL[family] for family in sorted(families)]
    for out in networks:
        kept: list[Network] = []
        for network in left:
            if network.version != out.version or not network.overlaps(out):
                kept.append(network)
            elif out.subnet_of(network) and out != network:  # type: ignore[arg-type]  # both of one version
                kept += network.address_exclude(out)  # type: ignore[arg-type]  # both of one version
        left = kept
        if len(left) > MAX_COMPLEMENT:
            raise CannotSay(f"'everything but' these would be more than {MAX_COMPLEMENT} prefixes")
    return tuple(sorted(left, key=lambda n: (n.version, n)))


def but_ports(ranges: Ports) -> Ports:
    """Every port but these."""
    left, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            left.append((at, low - 1))
        at = max(at, high + 1)
    return (*left, (at, 65_535)) if at <= 65_535 else tuple(left)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One statement of a chain: what it matches, what it does (accept, drop, jump, goto, return, log), and where it stands."""

    clause: Clause
    verb: str
    target: str = ""
    limit: dict[str, Any] | None = None
    name: str = ""
    line: int = 0


class Flat:
    """Rules made from chains."""

    def __init__(self, chains: Mapping[str, list[Step]], direction: str) -> None:
        self._chains = chains
        self._direction = direction
        self._limited: set[int] = set()
        self._through: dict[str, tuple[int, bool]] = {}
        self._deep = 0
        self.rules: list[dict[str, Any]] = []
        self.lines: set[int] = set()  # of steps that could not be said, with the reasons in `refused`
        self.refused: list[tuple[int, str]] = []

    def chain(self, name: str, clause: Clause, default: str) -> None:
        """Write a base chain out. Raises CannotSay where jumps go in a circle, or multiply beyond measure."""
        self._falls_through(name, MAX_DEPTH)
        self._deep = 0
        self._run(((name, 0),), clause, default, top=True)

    def _run(
        self, stack: tuple[tuple[str, int], ...], clause: Clause, default: str, *, top: bool = False
    ) -> None:
        """Rules for every packet that matches `clause` and stands at the top of the stack, to the end."""
        self._deep += 1
        if self._deep > MAX_RETURNS:
            raise CannotSay(f"more than {MAX_RETURNS} conditional returns follow each other")
        self._follow(stack, clause, default, top)
        self._deep -= 1

    def _follow(self, stack: tuple[tuple[str, int], ...], clause: Clause, default: str, top: bool) -> None:
        logged: Clause | None = None
        while stack:
            (name, at), below = stack[0], stack[1:]
            steps = self._chains.get(name)
            if steps is None:
                raise CannotSay(f"there is no chain {name!r}")
            if at >= len(steps):
                stack = below
                continue
            step = steps[at]
            stack = ((name, at + 1), *below)
            both = clause.both(step.clause)
            if both is None:
                continue
            if step.verb == "log":
                logged = both
                self._check_log(steps, at)
                continue
            whole = both == clause and step.limit is None
            if step.verb in ("accept", "drop"):
                self._emit(step, both, logged == both)
            elif step.limit is not None:
                self._refuse(step, "a limit on what only leads on to other rules")
                continue
            elif step.verb == "return":
                self._run(below, both, default)
            elif step.verb == "goto":
                self._run(((step.target, 0), *below), both, default)
            elif self._falls_through(step.target, MAX_DEPTH):
                if whole:
                    stack = ((step.target, 0), *stack)
                else:
                    self._inline(step.target, both)
                continue
            else:
                self._run(((step.target, 0), *stack), both, default)
            logged = None
            if whole:
                return
        if not top:
            self._emit(Step(clause=clause, verb=default, name="default"), clause, False)

    def _check_log(self, steps: Sequence[Step], at: int) -> None:
        """A log step must stand before a verdict on the same packets: only then is it a rule of ours."""
        decides = steps[at + 1] if at + 1 < len(steps) else None
        if decides is None or decides.clause != steps[at].clause or decides.verb not in ("accept", "drop"):
            self._refuse(steps[at], "it only logs; a rule of ours logs what it decides")

    def _inline(self, name: str, clause: Clause) -> None:
        """A chain that returns only at its end."""
        logged: Clause | None = None
        steps = self._chains[name]
        for at, step in enumerate(steps):
            both = clause.both(step.clause)
            if both is None:
                continue
            if step.verb == "log":
                logged = both
                self._check_log(steps, at)
            elif step.verb == "jump":
                if step.limit is not None:
                    self._refuse(step, "a limit on what only leads on to other rules")
                else:
                    self._inline(step.target, both)
            else:
                self._emit(step, both, logged == both)

    def _falls_through(self, name: str, depth: int) -> bool:
        if depth == 0:
            raise CannotSay("jumps go in a circle, or too deep")
        steps = self._chains.get(name)
        if steps is None:
            raise CannotSay(f"there is no chain {name!r}")
        if name not in self._through or self._through[name][0] > depth:
            onward = [
                self._falls_through(step.target, depth - 1) for step in steps if step.verb in ("jump", "goto")
            ]
            plain = all(onward) and not any(step.verb in ("return", "goto") for step in steps)
            self._through[name] = depth, plain  # with so many jumps left
        return self._through[name][1]

    def _refuse(self, step: Step, why: str) -> None:
        if step.line not in self.lines:
            self.lines.add(step.line)
            self.refused.append((step.line, why))

    def _emit(self, step: Step, clause: Clause, logged: bool) -> None:
        if step.limit is not None:
            if step.verb == "drop":
                return self._refuse(step, "a limit on what is dropped")
            if step.line in self._limited:
                return self._refuse(
                    step, "its limit would be there twice, since its chain is reached in several ways"
                )
            self._limited.add(step.line)
        for one in _sayable(clause):
            rule: dict[str, Any] = {
                "name": step.name or f"line-{step.line}",
                "direction": self._direction,
                **one,
            }
            rule["action"] = step.verb
            if logged:
                rule["log"] = {"sample": 1}
            if step.limit is not None:
                if self.rules and self.rules[-1].get("limit") is step.limit:
                    return self._refuse(step, "its limit would be there twice, once for each kind of ICMP")
                rule["limit"] = step.limit
            self.rules.append(rule)
        if len(self.rules) > MAX_MADE:
            raise CannotSay(f"the chains multiply to more than {MAX_MADE} rules")
        return None


def _sayable(clause: Clause) -> list[dict[str, Any]]:
    """A clause in the fields of our language: one rule, or one for each of ICMP's two kinds."""
    families = sorted(clause.families)
    src, dst = clause.src, clause.dst
    if src is not None and len(families) == 1:
        src = tuple(n for n in src if n.version in families)
    if dst is not None and len(families) == 1:
        dst = tuple(n for n in dst if n.version in families)
    said: dict[str, Any] = {}
    if src is not None:
        said["from"] = [str(n) for n in src]
    elif dst is None and len(families) == 1:
        said["from"] = [str(ALL[families[0]])]
    if dst is not None:
        said["to"] = [str(n) for n in dst]
    proto = clause.proto
    if proto is not None:
        said["proto"] = [fields.PROTOCOL_NAMES.get(p, p) for p in sorted(proto)]
    if clause.ports is not None:
        said["ports"] = [low if low == high else f"{low}-{high}" for low, high in clause.ports]
    if clause.source_ports is not None:
        said["source_ports"] = [low if low == high else f"{low}-{high}" for low, high in clause.source_ports]
    if clause.state is not None:
        said["state"] = sorted(clause.state, key=fields.STATES.index)
    if clause.iface is not None:
        said["iface"] = sorted(clause.iface)
    if clause.icmp is None:
        return [said]
    kinds = sorted((clause.proto or frozenset()) & {ICMP, ICMPV6})
    types = [
        t if c is None else f"{t}/{c}"
        for t, c in sorted(clause.icmp, key=lambda p: (p[0], -1 if p[1] is None else p[1]))
    ]
    return [{**said, "proto": [fields.PROTOCOL_NAMES[kind]], "icmp": types} for kind in kinds]


def named(rules: list[dict[str, Any]]) -> None:
    """Give each rule a name of its own, made of the name it has."""
    taken: set[str] = set()
    for rule in rules:
        wanted = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in rule["name"])
        wanted = wanted.strip("-._")[:56] or "rule"
        name, number = wanted, 1
        while name in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name)
        rule["name"] = name
