"""nftables' forms of a policy: what overlaps stays in order, and what a form cannot say is refused."""

from __future__ import annotations

import nftforms
import nftpeers
import pytest
import rulegen
import rulesets
from nftwords import Unfit

from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.model import PortRange, Prefix


def _meet(one: nftforms.Box, other: nftforms.Box) -> bool:
    def prefixes(a: Prefix | None, b: Prefix | None) -> bool:
        if a is None or b is None:
            return True
        beyond = (32 if a.family == 4 else 128) - min(a.length, b.length)
        return a.address >> beyond == b.address >> beyond

    def ports(a: PortRange, b: PortRange) -> bool:
        return a.low <= b.high and b.low <= a.high

    return (
        prefixes(one.source, other.source)
        and prefixes(one.destination, other.destination)
        and ports(one.source_ports, other.source_ports)
        and ports(one.ports, other.ports)
        and (not one.protocols or not other.protocols or bool({*one.protocols} & {*other.protocols}))
    )


@pytest.mark.parametrize("kind", rulegen.FAMILIES)
def test_rules_that_overlap_lie_in_layers_in_their_order(kind: str) -> None:
    made = rulesets.policy(rulegen.generate(kind, 300))
    layers = nftforms.layering([nftforms.box(at, rule) for at, rule in enumerate(made.rules)], 4)
    placed = [(at, one) for at, layer in enumerate(layers) for one in layer]
    assert len({one[3:] for _, one in placed}) == len(placed) > 250
    for at, one in placed:
        for below, other in placed:
            if one is not other and _meet(one, other):
                assert (at < below) == (one.number < other.number) and at != below


@pytest.mark.parametrize("form", ["layered", "tree"])
def test_what_is_not_over_the_five_fields_is_refused_by_the_faster_forms(form: nftpeers.Form) -> None:
    found = policies.parse(
        b'{"version":1,"default":{"ingress":"drop","egress":"drop"},'
        b'"rules":[{"name":"two","from":["10.0.0.0/8","192.0.2.0/24"],"action":"accept"}]}'
    )
    with pytest.raises(Unfit, match="'two' is not over the five fields"):
        nftpeers.ruleset(found, form)
    assert "ip saddr { 10.0.0.0/8, 192.0.2.0/24 } accept" in nftpeers.ruleset(found)


def test_the_ingress_hook_knows_no_connections() -> None:
    with pytest.raises(Unfit, match="before connection tracking"):
        nftpeers.ruleset(rulesets.simple(1), hook="ingress", device="lo", stateful=True)
