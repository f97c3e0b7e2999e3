"""What `iptables-save` and `ip6tables-save` print, as chains of steps."""

from __future__ import annotations

import ipaddress
import re
import shlex
from typing import Any, Final, NamedTuple

from loopback.cli.firewall_import_flat import CannotSay, Clause, Network, Ports, Step, but, but_ports
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, Wrong

_STATES: Final = {"NEW": "new", "ESTABLISHED": "established", "RELATED": "related", "INVALID": "invalid"}
_KNOWN_MATCHES: Final = ("tcp", "udp", "sctp", "dccp", "udplite", "icmp", "icmp6", "icmpv6", "multiport", "conntrack",
                         "state", "comment", "limit")  # fmt: skip
_UNITS: Final = {"s": "s", "m": "m", "h": "h", "d": "d"}


class Read(NamedTuple):
    """A ruleset: for each base chain its default, the steps of all chains, and what was not read: (line, text, why)."""

    defaults: dict[str, str]
    chains: dict[str, list[Step]]
    refused: list[tuple[int, str, str]]
    texts: dict[int, str]


def read(text: str, family: int) -> Read:
    """The filter table. What our language cannot say is in `refused`. Raises Refused(POLICY_MALFORMED) for a cut text."""
    found = Read({}, {}, [], {})
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line == "COMMIT":
            table = ""
            continue
        found.texts[number] = line
        if line.startswith("*"):
            if table:
                break
            table = line[1:]
        elif line.startswith(":"):
            name, _, rest = line[1:].partition(" ")
            policy = rest.split(" ")[0]
            if table == "filter":
                found.chains[name] = []
                if policy in ("ACCEPT", "DROP"):
                    found.defaults[name] = policy.lower()
            elif policy not in ("ACCEPT", "-"):
                found.refused.append(
                    (number, line, f"the table {table} is not about what a host lets in and out")
                )
        elif not table:
            found.refused.append((number, line, "it stands in no table"))
        elif table != "filter":
            found.refused.append(
                (number, line, f"the table {table} is not about what a host lets in and out")
            )
        else:
            try:
                chain, step = _rule(line, number, family)
                found.chains.setdefault(chain, []).extend([step] if step else [])
            except CannotSay as error:
                found.refused.append((number, line, str(error)))
    if table:
        raise Refused(
            Code.POLICY_MALFORMED,
            f"the table {table} does not end with COMMIT: the text was cut, and rules may be missing",
            "save it anew: 'iptables-save > FILE'",
        )
    return found


def _rule(line: str, number: int, family: int) -> tuple[str, Step | None]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise CannotSay(f"it does not read: {error}") from None
    while words and words[0].startswith("["):  # counters of iptables-save -c
        words.pop(0)
    if len(words) < 2 or words[0] not in ("-A", "--append"):
        raise CannotSay("it is no rule")
    chain = words[1]
    made: dict[str, Any] = {"families": frozenset((family,))}
    verb = target = name = ""
    limit: dict[str, Any] | None = None
    at = 2
    negated = False

    def value() -> str:
        nonlocal at
        at += 1
        if at >= len(words):
            raise CannotSay(f"{words[at - 1]} needs a value")
        return words[at]

    while at < len(words):
        word = words[at]
        if word == "!":
            negated = True
            at += 1
            continue
        if word in ("-s", "--source", "-d", "--destination"):
            networks = tuple(_network(part) for part in value().split(","))
            made["src" if word in ("-s", "--source") else "dst"] = (
                but(networks, (family,)) if negated else networks
            )
            negated = False
        elif word in ("-p", "--protocol"):
            proto = _protocol(value())
            every = frozenset(range(256))
            if proto is not None:
                made["proto"] = every - {proto} if negated else frozenset((proto,))
            negated = False
        elif word in ("-i", "--in-interface", "-o", "--out-interface"):
            interface = value()
            if negated or "+" in interface:
                raise CannotSay("'everything but' and patterns of interfaces; name each interface")
            if (chain == "INPUT" and word[1] == "o") or (chain == "OUTPUT" and word[1] == "i"):
                raise CannotSay("that interface is never known in this chain")
            made["iface"] = frozenset((interface,))
        elif word in ("--dport", "--dports", "--destination-port", "--sport", "--sports", "--source-port"):
            ports = _ports(value())
            made["ports" if "d" in word[2:4] else "source_ports"] = but_ports(ports) if negated else ports
            negated = False
        elif word in ("--ctstate", "--state"):
            given = value().split(",")
            if not set(given) <= _STATES.keys():
                raise CannotSay(
                    "of the states of a connection only NEW, ESTABLISHED, RELATED and INVALID are known"
                )
            states = frozenset(_STATES[one] for one in given)
            made["state"] = frozenset(_STATES.values()) - states if negated else states
            negated = False
        elif word in ("--icmp-type", "--icmpv6-type"):
            if negated:
                raise CannotSay("'everything but' a type of ICMP")
            kind = value()
            if kind != "any":
                made["icmp"] = frozenset((_icmp(kind, ICMP if word == "--icmp-type" else ICMPV6),))
        elif word in ("-m", "--match"):
            module = value()
            if module not in _KNOWN_MATCHES:
                hint = "; give the set's prefixes under 'sets' and write '@name'" if module == "set" else ""
                raise CannotSay(f"the match {module!r}{hint}")
        elif word == "--comment":
            name = value()
        elif word == "--limit":
            rate = re.fullmatch(r"([0-9]+)/([smhd])[a-z]*", value())
            if rate is None:
                raise CannotSay("a limit of this form")
            limit = {"rate": f"{rate[1]}/{_UNITS[rate[2]]}", "burst": (limit or {}).get("burst", 5)}
        elif word == "--limit-burst":
            burst = value()
            if not (burst.isascii() and burst.isdecimal() and len(burst) < 10):
                raise CannotSay("a burst of this form")
            limit = {**(limit or {}), "burst": int(burst)}
        elif word in ("-j", "--jump", "-g", "--goto"):
            target = value()
            verb = {
                "ACCEPT": "accept",
                "DROP": "drop",
                "REJECT": "drop",
                "RETURN": "return",
                "LOG": "log",
            }.get(target, "goto" if word in ("-g", "--goto") else "jump")
            if verb in ("jump", "goto") and target.isupper() and target in ("MARK", "QUEUE", "NFQUEUE", "DNAT", "SNAT",
                    "MASQUERADE", "CT", "NFLOG", "CONNMARK", "TCPMSS", "REDIRECT", "NOTRACK", "ULOG", "AUDIT"):  # fmt: skip
                raise CannotSay(f"the target {target}")
        elif word in ("--reject-with", "--log-prefix", "--log-level"):
            value()
        elif word in ("--log-uid", "--log-tcp-options", "--log-ip-options", "--log-tcp-sequence"):
            pass
        elif word in ("--syn", "--tcp-flags"):
            raise CannotSay("TCP flags; for packets that open a connection write 'state: new'")
        else:
            raise CannotSay(f"{word!r}")
        if negated:
            raise CannotSay(f"'!' before {word!r}")
        at += 1
    if limit is not None and "rate" not in limit:
        raise CannotSay("a burst without a limit")
    if not verb:
        return chain, None  # it counts, and decides nothing
    for side in ("src", "dst"):
        if any(network.version != family for network in made.get(side, ())):
            raise CannotSay(
                f"an address that is not IPv{family}; give the rules of each family in a file of its own"
            )
    clause = Clause(**made).possible()
    if clause is None:
        return chain, None
    if clause.icmp is not None and not (clause.proto or frozenset()) & {ICMP, ICMPV6}:
        raise CannotSay("a type of ICMP without its protocol")
    return chain, Step(
        clause=clause,
        verb=verb,
        target=target if verb in ("jump", "goto") else "",
        limit=limit,
        name=name,
        line=number,
    )


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise CannotSay(f"the address {text!r}: {error}") from None


def _protocol(text: str) -> int | None:
    if text in ("all", "0"):
        return None
    try:
        return fields.protocol({"ipv6-icmp": "icmpv6", "icmp6": "icmpv6"}.get(text, text))
    except Wrong as error:
        raise CannotSay(error.message) from None


def _ports(text: str) -> Ports:
    found = []
    for part in text.split(","):
        low, _, high = part.partition(":")
        if not (low or "0").isdecimal() or not (high or "0").isdecimal():
            raise CannotSay(f"the port {part!r}; number it (iptables-save does)")
        first = int(low or "0")
        last = int(high) if high else (65_535 if ":" in part else first)
        if not first <= last <= 65_535:
            raise CannotSay(f"the ports {part!r}")
        found.append((first, last))
    return tuple(found)


def _icmp(text: str, of: int) -> tuple[int, int | None]:
    try:
        return fields.icmp(text, of)
    except Wrong as error:
        raise CannotSay(error.message) from None
