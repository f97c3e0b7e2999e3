"""The shadow: what another policy would have done to live packets, counted by the rules that decide. See docs/adr/0023.

The programs report one in N packets beside judging them (`fw_slot.shadow`). Here each is asked about again, by the program's
own probe, under both policies. Only where the policy in force says of the packet, as rebuilt from its report, what was really
done to it, is the other one's answer compared; all else counts as unsure, so that no mistake here passes for a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from loopback.bpf import layout
from loopback.modules.firewall.events import address
from loopback.modules.firewall.model import Direction, Packet
from loopback.modules.firewall.packets import ICMP, ICMPV6, TCP, Verdict

MAX_PAIRS: Final = 1000  # kept apart; a policy of 100k rules could make billions
EXAMPLES: Final = 3  # of each pair
_SYN, _ACK, _RST = 0x02, 0x10, 0x04
_REQUEST_OF: Final = {(ICMP, 0): 8, (ICMPV6, 129): 128}  # echo reply → what it answers
_ERRORS: Final = {(ICMP, t) for t in (3, 4, 5, 11, 12)} | {(ICMPV6, t) for t in (1, 2, 3, 4)}
_BY_RULES: Final = ("rule", "default")
_BY_FLOW: Final = ("flow", "revoked")

Judge = Callable[[Sequence[Packet]], Sequence[Verdict]]


class Pair(msgspec.Struct, frozen=True):
    """What two policies do to the same packets, by which rules (None: the default)."""

    direction: str
    before: str
    rule_before: str | None
    after: str
    rule_after: str | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A pair with its samples, about how many packets they stand for, and some of them, as `explain` reads packets."""

    pair: Pair
    samples: int
    packets: int
    examples: tuple[dict[str, str | int], ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Where a shadow stands. `judged` = same + changed; `unsure` and `unasked` samples were not compared.

    unsure: the policy in force, asked again, does not say what was done (a limit was used up, a set changed, a connection was
    adopted). unasked: the policy does not decide (later fragments, ICMP errors about flows, neighbour discovery, what is
    truncated or cannot be parsed), or the policy changed since.
    """

    judged: int
    same: int
    changed: int
    unsure: int
    unasked: int
    more_pairs: int
    differences: tuple[Difference, ...]


def question(event: layout.Event, devices: Mapping[int, str]) -> Packet | None:
    """The packet that decides about a reported one: itself, or the first of its flow. None where no rule is asked."""
    reason = layout.REASONS[event.reason] if event.reason < len(layout.REASONS) else ""
    if event.family not in (4, 6) or event.packet & layout.LATER_FRAGMENT:
        return None
    src, dst = (address(event.family, bytes(a)) for a in (event.source, event.destination))
    sport, dport, kind, code = event.source_port, event.destination_port, event.icmp_type, event.icmp_code
    direction, device, state = Direction(event.direction & 1), event.ifindex, "new"
    if reason in _BY_FLOW:
        direction, device, code = Direction(event.asked & layout.ASKED_EGRESS), event.origin, 0
        if event.asked & layout.ASKED_REPLY:
            src, dst, sport, dport = dst, src, dport, sport
            kind = _REQUEST_OF.get((event.protocol, kind), kind)
    elif reason in _BY_RULES:
        opening = event.tcp_flags & (_SYN | _ACK | _RST) == _SYN
        if (
            (event.protocol == TCP and not opening)
            or (event.protocol, kind) in _REQUEST_OF
            or (event.protocol, kind) in _ERRORS
        ):
            state = "invalid"
    else:
        return None
    return Packet(
        direction=direction,
        src=src,
        dst=dst,
        protocol=event.protocol,
        sport=sport if event.protocol not in (ICMP, ICMPV6) else 0,
        dport=dport if event.protocol not in (ICMP, ICMPV6) else 0,
        icmp_type=kind,
        icmp_code=code,
        tcp_flags=event.tcp_flags if event.protocol == TCP and reason in _BY_RULES else None,
        iface=devices.get(device, ""),
        state=state,
    )


def _by_rule(event: layout.Event, now: Verdict) -> bool:
    """Whether a rule decided where now the default would, or the other way round: a limit that was used up, for one."""
    reason = layout.REASONS[event.reason]
    return reason in _BY_RULES and (now.rule is None) != (reason == "default")


class Shadow:
    """One shadow, from its beginning to its end. `now` and `then` ask the policy in force and the other one."""

    def __init__(self, now: Judge, then: Judge) -> None:
        self._now, self._then = now, then
        self._same = self._changed = self._unsure = self._unasked = self._more = 0
        self._pairs: dict[Pair, tuple[int, int, list[dict[str, str | int]]]] = {}

    def judge(self, events: Sequence[layout.Event], devices: Mapping[int, str], one_in: int) -> None:
        """Ask about reported packets, each of which stands for `one_in`. Raises what the judges raise."""
        asked = [(event, packet) for event in events if (packet := question(event, devices)) is not None]
        self._unasked += len(events) - len(asked)
        packets = [packet for _, packet in asked]
        for (event, packet), now, then in zip(asked, self._now(packets), self._then(packets), strict=True):
            if now.generation & 0xFFFF != event.epoch & 0xFFFF:
                self._unasked += 1
            elif now.action != event.verdict or _by_rule(event, now):
                self._unsure += 1
            elif now.action is then.action:
                self._same += 1
            else:
                self._changed += 1
                self._count(packet, now, then, one_in)

    def _count(self, packet: Packet, now: Verdict, then: Verdict, one_in: int) -> None:
        pair = Pair(
            packet.direction.name.lower(),
            now.action.name.lower(),
            now.rule,
            then.action.name.lower(),
            then.rule,
        )
        if pair not in self._pairs and len(self._pairs) >= MAX_PAIRS:
            self._more += 1
            return
        samples, packets, examples = self._pairs.get(pair, (0, 0, []))
        example = plain(packet)
        if len(examples) < EXAMPLES and example not in examples:
            examples = [*examples, example]
        self._pairs[pair] = samples + 1, packets + one_in, examples

    def skip(self, samples: int) -> None:
        """Samples that came and were not asked about."""
        self._unasked += samples

    def report(self) -> Report:
        """Where it stands, the most packets first."""
        found = [
            Difference(pair=pair, samples=samples, packets=packets, examples=tuple(examples))
            for pair, (samples, packets, examples) in self._pairs.items()
        ]
        return Report(
            judged=self._same + self._changed,
            same=self._same,
            changed=self._changed,
            unsure=self._unsure,
            unasked=self._unasked,
            more_pairs=self._more,
            differences=tuple(sorted(found, key=lambda one: one.packets, reverse=True)),
        )


def plain(packet: Packet) -> dict[str, str | int]:
    """A packet as `loopback firewall explain` reads it, without what is not said of it."""
    found: dict[str, str | int] = {
        "direction": packet.direction.name.lower(),
        "src": packet.src,
        "dst": packet.dst,
        "proto": packet.protocol,
    }
    if packet.protocol in (ICMP, ICMPV6):
        found |= {"icmp_type": packet.icmp_type, "icmp_code": packet.icmp_code}
    else:
        found |= {"sport": packet.sport, "dport": packet.dport}
    if packet.tcp_flags is not None:
        found["tcp_flags"] = packet.tcp_flags
    if packet.iface:
        found["iface"] = packet.iface
    if packet.state != "new":
        found["state"] = packet.state
    return found


def words(pair: Pair) -> str:
    """A pair in a few words: `ingress: accept by web → drop by the default`."""
    before, after = (rule or "the default" for rule in (pair.rule_before, pair.rule_after))
    return f"{pair.direction}: {pair.before} by {before} → {pair.after} by {after}"


def rate_for(rate: int, samples: int, budget: int) -> int:
    """The rate to go on with after a second with so many samples: halved in number until they fit the budget."""
    while samples > budget and rate < layout.MAX_SHADOW:
        rate, samples = min(rate * 2, layout.MAX_SHADOW), samples // 2
    return rate


#: Samples that are judged in a second: each costs two runs of the probe, some 20 µs with all around them.
BUDGET: Final = 500
