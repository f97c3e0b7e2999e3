"""How a firewall's figures look: as one JSON document, and as text in the width there is. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from loopback.cli.printing import printable
from loopback.modules.firewall.reading import RuleCount, Stats

NARROW: Final = 60  # columns; below that lines are cut by the terminal and not by us
_NUMBERS: Final = 3 * 12  # columns of the figures beside a rule's name


def document(stats: Stats) -> dict[str, Any]:
    """Everything as values. Rules are sorted by packets, the most first."""
    found: dict[str, Any] = msgspec.to_builtins(stats)
    found["rules"] = msgspec.to_builtins(by_hits(stats))
    found["enforcing"] = stats.epoch != 0
    found["verdicts"] = stats.verdicts
    found["drops"] = drops(stats)
    return found


def by_hits(stats: Stats) -> list[RuleCount]:
    """The rules in force and those of earlier policies that were hit, the most packets first."""
    shown = [rule for rule in stats.rules if rule.order is not None or rule.packets]
    return sorted(shown, key=lambda rule: (-rule.packets, rule.order is None, rule.order or 0, rule.rule))


def drops(stats: Stats) -> dict[str, int]:
    """Dropped packets by reason, the most first."""
    found: dict[str, int] = {}
    for one in stats.reasons:
        if one.verdict == "drop":
            found[one.reason] = found.get(one.reason, 0) + one.packets
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def lines(
    stats: Stats, width: int, rows: int | None = None, before: Stats | None = None, seconds: float = 1.0
) -> list[str]:
    """The figures as text, at most `width` columns wide; `rows` cuts the rules, `before` of `seconds` ago adds rates."""
    width = max(width, NARROW)
    found = [_standing(stats), *_policy(stats, width)]
    verdicts = stats.verdicts
    said = f"packets     {_count(verdicts['accept'])} accepted, {_count(verdicts['drop'])} dropped"
    if before is not None:
        old = before.verdicts
        said += "   now " + ", ".join(
            f"{_count(round((verdicts[word] - old[word]) / seconds))}/s {done}"
            for word, done in (("accept", "accepted"), ("drop", "dropped"))
        )
    found.append(said)
    why = ", ".join(f"{reason} {_count(number)}" for reason, number in drops(stats).items())
    found += _wrapped("drops by", why or "nothing was dropped", width)
    table = stats.flows
    found.append(
        f"flows       {_count(table.live)} live, {_count(table.taken)} of {_count(table.room)} places taken "
        f"({100 * table.taken / max(table.room, 1):.1f} %)"
    )
    found += _wrapped(
        "",
        f"{_count(table.created)} created, {_count(table.evicted)} evicted, {_count(table.failed)} found no room, "
        f"{_count(table.revalidated)} judged anew",
        width,
    )
    lost = f"{_count(stats.events_lost)} lost in the ring"
    found.append(f"samples     {lost}" + (f"; a shadow takes one in {stats.shadow}" if stats.shadow else ""))
    devices = ", ".join(
        f"{printable(one.device)} {one.ingress if one.ingress != 'none' else 'OPEN'}/{'tc' if one.egress else 'OPEN'}"
        for one in stats.devices
    )
    found += _wrapped("devices", devices or "none", width)
    found.append("")
    return found + _rules(stats, width, rows, before, seconds)


def _standing(stats: Stats) -> str:
    if not stats.epoch:
        return "enforcing   NOTHING: no policy is in force"
    if stats.deadline_s is None:
        return f"enforcing   epoch {stats.epoch}, confirmed"
    if stats.deadline_s <= 0:
        return f"enforcing   epoch {stats.epoch}: the trial's deadline passed, the kernel fell back"
    back = f"epoch {stats.fallback}" if stats.fallback else "nothing"
    return f"enforcing   epoch {stats.epoch} ON TRIAL: back to {back} in {stats.deadline_s:.0f} s unless confirmed"


def _policy(stats: Stats, width: int) -> list[str]:
    return [f"policy      {stats.policy[: width - 12]}"] if stats.policy else []


def _wrapped(title: str, text: str, width: int) -> list[str]:
    found, line = [], ""
    for word in text.split(", "):
        more = f"{line}, {word}" if line else word
        if line and len(more) > width - 13:
            found.append(line + ",")
            more = word
        line = more
    return [f"{title if not n else '':12}{line}" for n, line in enumerate([*found, line])]


def _rules(stats: Stats, width: int, rows: int | None, before: Stats | None, seconds: float) -> list[str]:
    rules = by_hits(stats)
    if not rules:
        return ["no rule is known by name: name the module's folder with --data"] if stats.epoch else []
    room = width - _NUMBERS
    last = "packets/s" if before is not None else "number"
    old = {rule.rule: rule.packets for rule in before.rules} if before is not None else {}
    found = [f"{'rule':{room}}{'packets':>12}{'bytes':>12}{last:>12}"]
    for rule in rules[:rows]:
        name = cut(printable(rule.rule) + ("" if rule.order is not None else " (not in force)"), room - 1)
        end = (
            f"{_count(round((rule.packets - old.get(rule.rule, rule.packets)) / seconds)):>12}"
            if before is not None
            else f"{rule.identity:>12}"
        )
        found.append(f"{name:{room}}{_count(rule.packets):>12}{_size(rule.bytes):>12}{end}")
    if rows is not None and len(rules) > rows:
        found.append(f"… and {len(rules) - rows} more")
    return found


def cut(text: str, most: int) -> str:
    """A text in at most so many characters: its middle goes, for names differ at their ends."""
    if len(text) <= most:
        return text
    return text[: (most - 1) // 2] + "…" + text[len(text) - (most - 1 - (most - 1) // 2) :]


def _count(number: int) -> str:
    return f"{number:,}" if number < 10_000_000 else _size(number, 1000, "")


def _size(number: int, step: int = 1024, unit: str = "B") -> str:
    value, names = float(number), ("", "k", "M", "G", "T", "P", "E")
    for name in names:
        if value < step or name == names[-1]:
            break
        value /= step
    return (
        f"{value:.0f} {unit}".strip()
        if not name
        else f"{value:.1f} {name}{'i' if step == 1024 else ''}{unit}"
    )
