"""`loopback firewall import`: rules of iptables or nftables as a policy.

Exit codes: 0 everything was said · 2 something cannot be said in our language, and each such thing was listed; with --partial
it is left out, and the policy carries it as comments.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml

from loopback.cli import firewall_import_iptables, firewall_import_nft
from loopback.cli.firewall_import_flat import CannotSay, Clause, Flat, named
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy

MAX_INPUT: Final = 32 * 1024 * 1024  # bytes; as a policy's own text
_SHOWN: Final = 20  # things that cannot be said, told one by one
_LONGEST: Final = 160  # characters of one of them
_SET_FROM: Final = 32  # addresses of a field that become a set of their own
_SAVE: Final = "save it anew: 'iptables-save | loopback firewall import -', or 'nft -j list ruleset | …'"
_DIRECTIONS: Final = (("INPUT", "ingress"), ("OUTPUT", "egress"))

Refusals = list[tuple[int, str, str]]


def translate(data: bytes) -> tuple[dict[str, Any], Refusals, list[str]]:
    """A policy as plain values, what could not be said (line, what, why), and remarks. Raises Refused(POLICY_MALFORMED)."""
    if len(data) > MAX_INPUT:
        raise Refused(
            Code.POLICY_MALFORMED,
            f"{len(data)} bytes are more than the {MAX_INPUT} allowed",
            "import less at once",
        )
    text = data.decode(errors="replace").lstrip()
    nft = text.startswith("{")
    families = frozenset((4, 6))
    if nft:
        read = firewall_import_nft.read(data)
    else:
        if "*filter" not in text.splitlines():
            raise Refused(
                Code.POLICY_MALFORMED,
                "it is neither what 'nft -j list ruleset' prints nor iptables-save's table filter",
                _SAVE,
            )
        families = frozenset((6,) if _is_six(text) else (4,))
        read = firewall_import_iptables.read(text, min(families))
    refused = list(read.refused)
    rules: list[dict[str, Any]] = []
    for name, direction in _DIRECTIONS:
        if name not in read.chains:
            continue
        flat = Flat(read.chains, direction)
        try:
            flat.chain(name, Clause(families=families), read.defaults.get(name, "accept"))
        except CannotSay as error:
            refused.append((0, f"the chain {name}", str(error)))
            continue
        rules += flat.rules
        refused += [(line, read.texts.get(line, ""), why) for line, why in flat.refused]
    forwarded = read.chains.get("FORWARD")
    if forwarded:
        refused.append(
            (
                forwarded[0].line,
                "the chain of forwarded packets",
                "it has rules, and a policy is about the host itself",
            )
        )
    named(rules)
    plain: dict[str, Any] = {
        "version": 1,
        "default": {direction: read.defaults.get(name, "accept") for name, direction in _DIRECTIONS},
    }
    sets = _sets(rules)
    if sets:
        plain["sets"] = sets
    plain["rules"] = rules
    return plain, sorted(refused), _remarks(families, text)


def _is_six(text: str) -> bool:
    return (
        "ip6tables-save" in text.split("\n", 1)[0]
        or re.search(r" -[sd] [0-9a-f]*:| -p ipv6-icmp ", text) is not None
    )


def _remarks(families: frozenset[int], text: str) -> list[str]:
    remarks = [
        "packets of connections that were accepted pass before any rule, whatever the rules say of 'established'"
    ]
    if "REJECT" in text or '"reject"' in text:
        remarks.append("REJECT became drop: nobody is told that a packet was refused")
    if len(families) == 1:
        other = "IPv6" if 4 in families else "IPv4"
        remarks.append(
            f"these rules say nothing of {other}: it gets the default; import the rules of {other} too"
        )
    return remarks


def _sets(rules: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Long lists of addresses as sets, each once."""
    found: dict[tuple[str, ...], str] = {}
    for rule in rules:
        for side in ("from", "to"):
            listed = tuple(rule.get(side, ()))
            if len(listed) > _SET_FROM:
                rule[side] = f"@{found.setdefault(listed, f'set-{len(found) + 1}')}"
    return {name: list(listed) for listed, name in found.items()}


def command(
    file: Annotated[
        Path, typer.Argument(help="What iptables-save or 'nft -j list ruleset' printed; - is stdin.")
    ],
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out what cannot be said, and carry it as comments.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the policy as JSON instead of YAML.")
    ] = False,
) -> None:
    """Print the rules of iptables or nftables as a policy, exactly, or say what in them cannot be said."""
    name = "stdin" if str(file) == "-" else str(file)
    plain, refused, remarks = translate(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    told = [_told(name, one) for one in refused]
    for line in told[:_SHOWN]:
        typer.echo(line, err=True)
    if len(told) > _SHOWN:
        typer.echo(f"… and {len(told) - _SHOWN} more", err=True)
    if refused and not partial:
        raise Refused(
            Code.POLICY_INVALID,
            f"{len(refused)} of its parts cannot be said exactly, so nothing was translated",
            "with --partial they are left out and carried as comments; read the policy before it is used",
        )
    policy.parse(policy.to_json(plain), "the translation")
    for remark in remarks:
        typer.echo(f"note: {remark}", err=True)
    if as_json:
        typer.echo(json.dumps(plain))
        return
    head = [f"# Translated from {Path(name).name}."]
    head += [f"# {remark}" for remark in remarks]
    head += [f"# LEFT OUT: {line}" for line in told]
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=1000)
    typer.echo("\n".join(head) + "\n" + text, nl=False)


def _told(name: str, refused: tuple[int, str, str]) -> str:
    line, what, why = refused
    what = what if len(what) <= _LONGEST else what[: _LONGEST - 1] + "…"
    what = "".join(c if c.isprintable() else " " for c in what)
    return (
        f"{name}:{line}: {what}: cannot be said: {why}" if line else f"{name}: {what}: cannot be said: {why}"
    )
