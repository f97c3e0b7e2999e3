"""What `nft -j list ruleset` prints, as chains of steps. Its JSON is described by libnftables-json(5)."""

from __future__ import annotations

import ipaddress
import itertools
import json
from typing import Any, Final

import msgspec

from loopback.cli.firewall_import_flat import CannotSay, Clause, Network, Ports, Step, but, but_ports
from loopback.cli.firewall_import_iptables import Read
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, PROTOCOLS, STATES, Wrong

_FAMILIES: Final = {"ip": frozenset((4,)), "ip6": frozenset((6,)), "inet": frozenset((4, 6))}
_VERDICTS: Final = ("accept", "drop", "return", "jump", "goto")
_HOOKS: Final = {"input": "INPUT", "output": "OUTPUT", "forward": "FORWARD"}
MAX_ELEMENTS: Final = 20_000  # steps that one map or concatenation may become


def read(text: bytes) -> Read:
    """The ruleset; base chains are called INPUT and OUTPUT here. Raises Refused(POLICY_MALFORMED) for what is no ruleset."""
    try:
        listed = msgspec.json.decode(text, type=dict[str, list[dict[str, Any]]])["nftables"]
    except (msgspec.MsgspecError, ValueError, KeyError, RecursionError):
        raise Refused(
            Code.POLICY_MALFORMED, "it is not what 'nft -j list ruleset' prints", "nft -j list ruleset > FILE"
        ) from None
    found = Read({}, {}, [], {})
    names: dict[tuple[Any, ...], str] = {}
    sets: dict[tuple[Any, ...], Any] = {}
    for number, item in enumerate(listed, 1):
        for kind, body in item.items():
            if not isinstance(body, dict):
                raise Refused(
                    Code.POLICY_MALFORMED,
                    f"entry {number} of the ruleset is no {kind}",
                    "nft -j list ruleset > FILE",
                )
            place = _place(body, body.get("chain") or body.get("name"))
            if kind == "chain":
                _chain(found, names, number, place, body)
            elif kind in ("set", "map"):
                sets[place] = body
    for number, item in enumerate(listed, 1):
        for kind, body in item.items():
            place = _place(body, body.get("chain"))
            if kind in ("metainfo", "table", "chain", "set", "map") or (
                kind == "rule" and place not in names
            ):
                continue  # of chains that see no packet of this host their entry tells
            said = json.dumps(body.get("expr", body))
            found.texts[number] = f"{kind} in chain {place[2]}, handle {body.get('handle')}: {said}"
            try:
                if kind != "rule":
                    raise CannotSay(f"a {kind}")
                steps = _Rule(place, body, number, names, sets).steps()
                found.chains[names[place]].extend(steps)
            except CannotSay as error:
                found.refused.append((number, found.texts[number], str(error)))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                found.refused.append((number, found.texts[number], "it has a form that is not known here"))
    return found


def _place(body: dict[str, Any], name: Any) -> tuple[str, str, str]:
    return str(body.get("family")), str(body.get("table")), str(name)


def _chain(
    found: Read, names: dict[tuple[Any, ...], str], number: int, place: tuple[Any, ...], body: dict[str, Any]
) -> None:
    said = f"chain {place[2]} of table {place[0]} {place[1]}"
    hook = str(body.get("hook") or "")
    if not hook:
        name = " ".join(map(str, place))
    elif body.get("type") == "filter" and hook in _HOOKS and place[0] in _FAMILIES:
        name = _HOOKS[hook]
        if name in found.chains:
            why = "a second chain at this hook; what both accept cannot be said in one list"
            found.refused.append((number, said, why))
            return
        found.defaults[name] = str(body.get("policy", "accept"))
    else:
        found.refused.append((number, said, f"a chain of type {body.get('type')} at the hook {hook}"))
        return
    names[place] = name
    found.chains[name] = []


class _Rule:
    """One rule, read from its expressions."""

    def __init__(
        self, place: tuple[Any, ...], body: dict[str, Any], number: int, names: dict[tuple[Any, ...], str],
        sets: dict[tuple[Any, ...], Any],
    ) -> None:  # fmt: skip
        if place[0] not in _FAMILIES:
            raise CannotSay(f"the family {place[0]}")
        self._place, self._body, self._number, self._names, self._sets = place, body, number, names, sets
        self._families = _FAMILIES[place[0]]

    def steps(self) -> list[Step]:
        clauses = [Clause(families=self._families)]
        made: list[Step] = []
        limit: dict[str, Any] | None = None
        for expr in self._body["expr"]:
            ((kind, body),) = expr.items()
            if kind == "match":
                clauses = self._and(clauses, self._match(body))
            elif kind == "limit":
                if body.get("inv") or body.get("rate_unit", "packets") != "packets" or body["per"] not in (
                    "second", "minute", "hour", "day"
                ):  # fmt: skip
                    raise CannotSay("a limit of this form")
                limit = {"rate": f"{body['rate']}/{body['per'][0]}", "burst": body.get("burst", 5) or 5}
            elif kind == "log":
                made += [self._step(clause, "log", "", None) for clause in clauses]
            elif kind in _VERDICTS or kind == "reject":
                target = self._target(body) if kind in ("jump", "goto") else ""
                verb = "drop" if kind == "reject" else kind
                if limit is not None and len(clauses) > 1:
                    raise CannotSay("one limit for several elements")
                made += [self._step(clause, verb, target, limit) for clause in clauses]
            elif kind == "vmap":
                made += self._vmap(clauses, body, limit)
            elif kind not in ("counter", "comment"):
                raise CannotSay(f"the expression {kind!r}")
        if len(made) > MAX_ELEMENTS:
            raise CannotSay(f"it becomes more than {MAX_ELEMENTS} rules")
        return made

    def _step(self, clause: Clause, verb: str, target: str, limit: dict[str, Any] | None) -> Step:
        name = str(self._body.get("comment", "")) or f"rule-{self._number}"
        return Step(clause=clause, verb=verb, target=target, limit=limit, name=name, line=self._number)

    def _target(self, body: dict[str, Any]) -> str:
        place = (*self._place[:2], body["target"])
        if place not in self._names:
            raise CannotSay(f"the chain {body['target']!r}")
        return self._names[place]

    def _and(self, one: list[Clause], other: list[Clause]) -> list[Clause]:
        if len(one) * len(other) > MAX_ELEMENTS:
            raise CannotSay(f"it becomes more than {MAX_ELEMENTS} rules")
        return [both for a in one for b in other if (both := a.both(b)) is not None]

    def _vmap(self, clauses: list[Clause], body: dict[str, Any], limit: dict[str, Any] | None) -> list[Step]:
        if limit is not None:
            raise CannotSay("one limit for several elements")
        made = []
        for key, verdict in self._elements(body["data"]):
            ((verb, target),) = verdict.items()
            if verb not in _VERDICTS:
                raise CannotSay(f"the verdict {verb!r}")
            to = self._target(target) if verb in ("jump", "goto") else ""
            for clause in self._and(clauses, self._positive(body["key"], [key])):
                made.append(self._step(clause, verb, to, None))
        # an interval map holds no key twice, so the order of its elements is nobody's
        return made

    def _elements(self, right: Any) -> list[Any]:
        if isinstance(right, str) and right.startswith("@"):
            body = self._sets.get((*self._place[:2], right[1:]))
            if body is None:
                raise CannotSay(f"the set {right}")
            if set(body.get("flags", [])) & {"dynamic", "timeout"}:
                raise CannotSay(f"the set {right} changes by itself")
            right = body.get("elem", [])
        elif isinstance(right, dict) and "set" in right:
            right = right["set"]
        listed = right if isinstance(right, list) else [right]
        return [e["elem"]["val"] if isinstance(e, dict) and "elem" in e else e for e in listed]

    def _match(self, body: dict[str, Any]) -> list[Clause]:
        op, left = body["op"], body["left"]
        values = self._elements(body["right"])
        if op == "!=":
            return [self._negative(left, values)]
        if op not in ("==", "in"):
            raise CannotSay(f"the comparison {op!r}")
        return self._positive(left, values)

    def _positive(self, left: dict[str, Any], values: list[Any]) -> list[Clause]:
        if "concat" in left:
            made: list[Clause] = []
            for value in values:
                each = [
                    self._positive(part, [v]) for part, v in zip(left["concat"], value["concat"], strict=True)
                ]
                for parts in itertools.product(*each):
                    clauses = [Clause(families=self._families)]
                    for part in parts:
                        clauses = self._and(clauses, [part])
                    made += clauses
            return made
        return [clause] if (clause := self._field(left, values, False).possible()) is not None else []

    def _negative(self, left: dict[str, Any], values: list[Any]) -> Clause:
        if "concat" in left:
            raise CannotSay("'everything but' a concatenation")
        return self._field(left, values, True)

    def _field(self, left: dict[str, Any], values: list[Any], negated: bool) -> Clause:
        ((kind, body),) = left.items()
        if kind == "payload":
            return self._payload(body["protocol"], body["field"], values, negated)
        key = body["key"]
        if kind == "ct" and key == "state":
            words = frozenset(values)
            if not words <= set(STATES):
                raise CannotSay(
                    "of the states of a connection only new, established, related and invalid are known"
                )
            return Clause(families=self._families, state=frozenset(STATES) - words if negated else words)
        if kind == "meta" and key in ("l4proto", "protocol", "nfproto"):
            if key == "l4proto":
                return Clause(families=self._families, proto=_protocols(values, negated))
            of = frozenset({"ip": 4, "ipv4": 4, "ip6": 6, "ipv6": 6}[value] for value in values)
            return Clause(families=self._families - of if negated else self._families & of)
        if kind == "meta" and key in ("iifname", "oifname", "iif", "oif"):
            towards = "INPUT" if key[0] == "i" else "OUTPUT"
            if self._names[self._place] in ("INPUT", "OUTPUT") and self._names[self._place] != towards:
                raise CannotSay("that interface is never known in this chain")
            if negated or not all(isinstance(v, str) and "*" not in v for v in values):
                raise CannotSay("'everything but' and patterns of interfaces; name each interface")
            return Clause(families=self._families, iface=frozenset(values))
        raise CannotSay(f"the expression {kind} {key}")

    def _payload(self, protocol: str, field: str, values: list[Any], negated: bool) -> Clause:
        if protocol in ("ip", "ip6") and field in ("saddr", "daddr"):
            family = 4 if protocol == "ip" else 6
            networks = tuple(n for value in values for n in _networks(value))
            if negated:
                networks = but(networks, (family,))
            sides = {"src" if field == "saddr" else "dst": networks}
            return Clause(families=self._families & {family}, **sides)  # type: ignore[arg-type]  # one of the two
        if (protocol, field) in (("ip", "protocol"), ("ip6", "nexthdr")):
            families = self._families & {4 if protocol == "ip" else 6}
            return Clause(families=families, proto=_protocols(values, negated))
        if field in ("sport", "dport"):
            ports: Ports = tuple(_port(value) for value in values)
            sides = {"source_ports" if field == "sport" else "ports": but_ports(ports) if negated else ports}  # type: ignore[dict-item]  # ports this time
            proto = None if protocol == "th" else frozenset((PROTOCOLS[protocol],))
            return Clause(families=self._families, proto=proto, **sides)  # type: ignore[arg-type]  # one of the two
        if protocol in ("icmp", "icmpv6") and field == "type" and not negated:
            of = ICMP if protocol == "icmp" else ICMPV6
            types = frozenset(_icmp(value, of) for value in values)
            return Clause(
                families=self._families & {4 if of == ICMP else 6}, proto=frozenset((of,)), icmp=types
            )
        raise CannotSay(f"the expression {protocol} {field}{' !=' if negated else ''}")


def _protocols(values: list[Any], negated: bool) -> frozenset[int]:
    names = {"ipv6-icmp": "icmpv6"}
    try:
        found = frozenset(fields.protocol(names.get(v, v) if isinstance(v, str) else v) for v in values)
    except Wrong as error:
        raise CannotSay(error.message) from None
    return frozenset(range(256)) - found if negated else found


def _networks(value: Any) -> tuple[Network, ...]:
    if isinstance(value, str):
        return (ipaddress.ip_network(value),)
    if "prefix" in value:
        return (ipaddress.ip_network(f"{value['prefix']['addr']}/{value['prefix']['len']}"),)
    low, high = map(ipaddress.ip_address, value["range"])
    return tuple(ipaddress.summarize_address_range(low, high))


def _port(value: Any) -> tuple[int, int]:
    low, high = value["range"] if isinstance(value, dict) else (value, value)
    if not (isinstance(low, int) and isinstance(high, int) and 0 <= low <= high <= 65_535):
        raise CannotSay(f"the port {value!r}")
    return low, high


def _icmp(value: Any, of: int) -> tuple[int, int | None]:
    names = {"nd-neighbor-solicit": 135, "nd-neighbor-advert": 136, "nd-router-solicit": 133, "nd-router-advert": 134,
             "nd-redirect": 137, "mld-listener-query": 130, "mld-listener-report": 131, "mld-listener-done": 132,
             "mld2-listener-report": 143}  # fmt: skip
    try:
        return fields.icmp(names.get(value, value) if isinstance(value, str) else value, of)
    except Wrong as error:
        raise CannotSay(error.message) from None
