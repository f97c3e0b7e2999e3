"""The same policy for nftables, in three forms, each with first match kept exactly, and with or without `ct state` in front.

* `linear`: one rule after another, the whole language but for limits per source.
* `layered`: verdict maps of source . destination . protocol . source port . port, as intervals (the kernel's pipapo). Elements
  must not overlap, so each rule stands one map behind the last earlier rule that it overlaps; the maps are asked in turn.
* `tree`: verdict maps of single fields that jump to chains, down to a few rules in a row. A field is split at every edge that
  rules have there; a chain is made once for each set of rules that can still match.

The last two are for rules over the five fields and raise Unfit for others. That they say the same is shown by sending the same
packets to all forms and to the plain evaluator (tests/kernel/test_rulesets_differential.py). One difference is known: a
packet that ends within the first four bytes behind its IP header matches no element of `layered` and gets the default.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import Final, Literal

import nftforms
from nftforms import Words
from nftwords import Unfit, merged, rule_matches, set_name

from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Prefix
from loopback.modules.firewall.policy_fields import show

Form = Literal["linear", "layered", "tree"]
Hook = Literal["ingress", "prerouting", "input"]
FORMS: Final[tuple[Form, ...]] = ("linear", "layered", "tree")
TABLE: Final = "loopback_peer"
ESTABLISHED: Final = "ct state established,related accept"
PLAIN: Final = Words()


def ruleset(
    policy: FirewallPolicy,
    form: Form = "linear",
    *,
    hook: Hook = "prerouting",
    device: str = "",
    stateful: bool = False,
    words: Words = PLAIN,
) -> str:
    """An nft file with the policy's ingress rules in one table, TABLE. `device` is wanted for the ingress hook.

    Raises Unfit where the form cannot say the policy, and for `stateful` on the ingress hook, which knows no connections.
    """
    inside = "\n".join([words.chains, *judge(policy, form, words=words)])
    return _table(inside, "goto judge", hook, device, stateful)


def million(
    prefixes: Iterable[Prefix], *, hook: Hook = "prerouting", device: str = "", stateful: bool = False
) -> str:
    """An nft file that drops what comes from any of these IPv4 prefixes and accepts the rest."""
    held = ", ".join(show(p) for p in prefixes)
    inside = f" set held {{ type ipv4_addr; flags interval; elements = {{ {held} }} }}"
    return _table(inside, "ip saddr @held drop", hook, device, stateful)


def _table(inside: str, rule: str, hook: Hook, device: str, stateful: bool) -> str:
    if hook == "ingress" and stateful:
        raise Unfit("netdev ingress comes before connection tracking")
    place = f'hook ingress device "{device}"' if hook == "ingress" else f"hook {hook}"
    front = f"  {ESTABLISHED}\n" if stateful else ""
    return (
        f"table {_family(hook)} {TABLE} {{\n{inside}\n"
        f" chain base {{\n  type filter {place} priority 0; policy accept;\n{front}  {rule}\n }}\n}}\n"
    )


def _family(hook: Hook) -> str:
    return "netdev" if hook == "ingress" else "inet"


def judge(
    policy: FirewallPolicy, form: Form, *, words: Words = PLAIN, direction: Direction = Direction.INGRESS
) -> Iterator[str]:
    """The chain `judge` with what it needs. Raises Unfit."""
    rules = [(index, rule) for index, rule in enumerate(policy.rules) if rule.direction is direction]
    default = policy.default[direction]
    if form == "linear":
        yield from _named_sets(policy)
        yield " chain judge {"
        for index, rule in rules:
            for family in (4, 6):
                yield from (
                    f"  {match} {words.rule(rule.action, index)}"
                    for match in rule_matches(rule, policy, family)
                )
        yield f"  {words.rule(default, None)}"
        yield " }"
        return
    boxes = [nftforms.box(index, rule) for index, rule in rules]
    make = nftforms.layers if form == "layered" else nftforms.tree
    families = [f for f in (4, 6) if any(one.family in (None, f) for one in boxes)]
    for family in families:
        yield from make([one for one in boxes if one.family in (None, family)], family, default, words)
    yield " chain judge {"
    yield from (f"  meta protocol {'ip' if family == 4 else 'ip6'} goto judge{family}" for family in families)
    yield f"  {words.rule(default, None)}"
    yield " }"


def _named_sets(policy: FirewallPolicy) -> Iterator[str]:
    used = {name for rule in policy.rules for name in (*rule.source_sets, *rule.destination_sets)}
    for name in sorted(used):
        for family, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
            if held := [p for p in policy.sets[name] if p.family == family]:
                elements = ", ".join(merged(held))
                yield f" set {set_name(name, family)} {{ type {kind}; flags interval; elements = {{ {elements} }} }}"


def load(text: str, namespace: str | None = None, *, timeout_s: float = 600) -> float:
    """Load a file with `nft -f` in a named network namespace, or here: the seconds it took. Raises RuntimeError."""
    within = ["ip", "netns", "exec", namespace] if namespace else []
    began = time.perf_counter()
    done = subprocess.run(
        [*within, "nft", "-f", "-"],
        input=text,
        text=True,
        capture_output=True,
        check=False,
        timeout=timeout_s,
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"nft: {done.stderr[:2000]}")
    return took


def remove(hook: Hook = "prerouting", namespace: str | None = None) -> None:
    """Remove the table of `ruleset`; not an error where there is none."""
    load(f"add table {_family(hook)} {TABLE}\ndelete table {_family(hook)} {TABLE}\n", namespace)


__all__ = [
    "FORMS",
    "TABLE",
    "Action",
    "Form",
    "Hook",
    "Unfit",
    "Words",
    "judge",
    "load",
    "million",
    "remove",
    "ruleset",
]
