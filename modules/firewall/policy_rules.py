"""What the fields of a rule or of a set mean together: the checks that no single field can make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.filling import inside
from loopback.modules.firewall.model import Action, Direction, FilledSet, Prefix, PrefixTable, Rule
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS, Wrong
from loopback.modules.firewall.policy_tables import FILLED_SET, read_table
from loopback.modules.firewall.policy_text import quote

Sets = Mapping[str, PrefixTable]
_BOTH: Final = frozenset((4, 6))
_FAMILY_OF: Final = {ICMP: 4, ICMPV6: 6}
_FEW: Final = 16  # prefixes of a set that decide on its families; a longer one may be filled with the other


def filled_set(plain: dict[str, Any]) -> FilledSet:
    """A set that is filled by hosts' labels or by a pool, with its bounds. Raises Wrong."""
    found = read_table(plain, FILLED_SET, "set that is filled")
    if ("labels" in found) == ("pool" in found):
        raise Wrong(
            "a set that is filled needs 'labels' or 'pool', and not both",
            "for example labels: {role: web}, or pool: shop",
        )
    own: PrefixTable = found.get("prefixes", PrefixTable())
    if "prefixes" in plain:
        listed = plain["prefixes"] if isinstance(plain["prefixes"], list) else [plain["prefixes"]]
        if len(listed) > found["max"]:
            raise Wrong(
                f"{len(listed)} prefixes are more than the set's own max of {found['max']}", "", ("prefixes",)
            )
        if not all(any(inside(prefix, outer) for outer in found["within"]) for prefix in own):
            for index, text in enumerate(listed):  # once more, in the order of the text
                prefix = fields.prefix(text)
                if not any(inside(prefix, outer) for outer in found["within"]):
                    raise Wrong(
                        f"{fields.show(prefix)} lies outside the set's own 'within'", "", ("prefixes", index)
                    )
    return FilledSet(
        labels=found.get("labels", {}),
        pool=found.get("pool", ""),
        within=found["within"],
        max=found["max"],
        prefixes=own,
    )


def parted(
    read: Mapping[str, PrefixTable | FilledSet],
) -> tuple[dict[str, PrefixTable], dict[str, FilledSet], dict[str, PrefixTable]]:
    """Sets as they were read: their prefixes so far, those that others fill, and what any of them may ever hold.

    The last is for the question which address families a rule can match.
    """
    filled = {name: one for name, one in read.items() if isinstance(one, FilledSet)}
    sets = {name: one.prefixes if isinstance(one, FilledSet) else one for name, one in read.items()}
    bounds = {name: PrefixTable.of(one.within) for name, one in filled.items()}
    return sets, filled, {**sets, **bounds}


def rule(read: Mapping[str, Any], sets: Sets, line: int) -> Rule:
    """A rule from its fields, once they make sense together; `line` is where it stands. Raises Wrong."""
    protocols: tuple[int, ...] = read.get("proto", ())
    for key in ("ports", "source_ports"):
        if key in read and (not protocols or not WITH_PORTS.issuperset(protocols)):
            given = ", ".join(fields.PROTOCOL_NAMES.get(p, str(p)) for p in protocols if p not in WITH_PORTS)
            raise Wrong(
                f"{given} has no ports" if given else "ports need a protocol that has them",
                "write 'proto: tcp', 'proto: udp' or 'proto: [tcp, udp]'", (key,),
            )  # fmt: skip
    icmp: tuple[tuple[int, int | None], ...] = ()
    if "icmp" in read:
        if protocols not in ((ICMP,), (ICMPV6,)):
            raise Wrong(
                "types have other numbers in icmp and icmpv6, so the rule must name one of them",
                "write 'proto: icmp' or 'proto: icmpv6', and one rule for each where both are meant", ("icmp",),
            )  # fmt: skip
        try:
            icmp = fields.many(read["icmp"], lambda item: fields.icmp(item, protocols[0]))
        except Wrong as error:
            raise Wrong(error.message, error.hint, ("icmp", *error.path)) from None
    if "limit" in read and read["action"] is not Action.ACCEPT:
        raise Wrong(
            "a rule that drops only so many packets lets the others on to later rules",
            "drop without a limit, or limit the rule that accepts",
            ("limit",),
        )
    sources, source_sets = endpoints(read.get("from", ()), sets, "from")
    destinations, destination_sets = endpoints(read.get("to", ()), sets, "to")
    made = Rule(
        name=read["name"], direction=read.get("direction", Direction.INGRESS), sources=sources, source_sets=source_sets,
        destinations=destinations, destination_sets=destination_sets, protocols=protocols, ports=read.get("ports", ()),
        source_ports=read.get("source_ports", ()), icmp=icmp, states=read.get("state", frozenset()),
        interfaces=read.get("iface", ()), action=read["action"], log_sample=read["log"]["sample"] if "log" in read else 0,
        limit=read.get("limit"), line=line,
    )  # fmt: skip
    check_families(made, sets)
    return made


def endpoints(
    read: tuple[Prefix | str, ...], sets: Sets, key: str
) -> tuple[tuple[Prefix, ...], tuple[str, ...]]:
    """The prefixes and the sets of one address field, `key`. Raises Wrong for a set that is not there."""
    if len(read) == 1 and isinstance(read[0], Prefix):
        return (read[0],), ()
    literal: list[Prefix] = []
    named: list[str] = []
    for index, item in enumerate(read):
        if isinstance(item, Prefix):
            literal.append(item)
        elif item in sets:
            named.append(item)
        else:
            known = ", ".join(list(sets)[:8]) or "none is defined"
            raise Wrong(
                f"there is no set {quote(item)}", fields.near(item, sets, "@") or f"sets: {known}",
                (key, index) if len(read) > 1 else (key,),
            )  # fmt: skip
    return tuple(literal), tuple(dict.fromkeys(named))


def set_families(prefixes: PrefixTable) -> frozenset[int]:
    """The address families that a rule which names this set can match."""
    return (
        prefixes.families if 0 < len(prefixes) <= _FEW else _BOTH
    )  # empty, or long: it may be filled with the other


def check_families(rule: Rule, sets: Sets) -> None:
    """Refuse a rule that can match nothing because its parts are of different address families. Raises Wrong."""
    sources, destinations = rule.sources, rule.destinations
    if len(sources) == 1 and len(destinations) == 1 and not rule.source_sets and not rule.destination_sets:
        both = frozenset[int]((sources[0].family,)) & {destinations[0].family}
    else:
        both = families(sources, rule.source_sets, sets) & families(destinations, rule.destination_sets, sets)
    if not both:
        raise Wrong(
            "'from' and 'to' are of different address families: nothing matches both",
            "write one rule per family",
            ("to",),
        )
    if (
        len(rule.protocols) != 1
        or rule.protocols[0] not in _FAMILY_OF
        or _FAMILY_OF[rule.protocols[0]] in both
    ):
        return
    number = rule.protocols[0]
    other = fields.PROTOCOL_NAMES[ICMPV6 if number == ICMP else ICMP]
    raise Wrong(
        f"{fields.PROTOCOL_NAMES[number]} is IPv{_FAMILY_OF[number]}'s, and no address of this rule is",
        f"write 'proto: {other}'",
        ("proto",),
    )


def families(prefixes: tuple[Prefix, ...], names: tuple[str, ...], sets: Sets) -> frozenset[int]:
    """The address families that a field with these prefixes and sets can match."""
    if not prefixes and not names:
        return _BOTH
    return frozenset(prefix.family for prefix in prefixes).union(
        *(set_families(sets[name]) for name in names)
    )
