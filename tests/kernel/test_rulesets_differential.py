"""Thousands of rules, three judges: a plain evaluator, the real program, and nftables in a namespace give one verdict.

The sets are the published ClassBench ones where they are, and generated ones for IPv4 and IPv6. Half the packets are
rule corners, half random. `make test-differential` takes 100,000 of them for each set, and the sets of 10k rules as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import nftpeers
import pytest
import rulegen
import rulesets
from corners import anywhere, corners
from nftforms import Words
from support_bulk import Bulk
from support_nft import DEFAULT, NftJudge, answer, device

from loopback.cli.firewall_judge import object_file
from loopback.modules.firewall import oracle
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Packet

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1800)]

FULL = os.environ.get("LOOPBACK_FULL") == "1"
PACKETS = 100_000 if FULL else 2_000
PLAIN_ONES = (
    40  # packets that the plainest evaluator judges too: it takes 0.1 s for one against ten thousand rules
)
PUBLISHED = [name for name in rulesets.PUBLISHED if FULL or name.endswith("_1k")]
GENERATED = [f"{kind}-{count}-{f}" for kind in rulegen.FAMILIES for count in (200, 1000) for f in (4, 6)]

#: In a map only a jump says what a rule's end says.
WORDS = Words(
    rule=lambda action, index: answer(action, DEFAULT if index is None else index),
    element=lambda action: f"goto v{int(action)}",
    chains="\n".join(f" chain v{int(a)} {{\n  {answer(a, DEFAULT)}\n }}" for a in Action),
)


@pytest.fixture(scope="module")
def nft() -> Iterator[NftJudge]:
    judge = NftJudge()
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def program() -> Iterator[Datapath]:
    datapath = Datapath(object_file(), flows=64)
    yield datapath
    datapath.close()


def published(name: str) -> FirewallPolicy:
    path = rulesets.published().get(name)
    if path is None:
        pytest.skip("the published ClassBench sets are not here; LOOPBACK_CLASSBENCH names their folder")
    return rulesets.policy(rulesets.read(path))


def generated(name: str) -> FirewallPolicy:
    kind, count, family = name.split("-")
    return rulesets.policy(rulegen.generate(kind, int(count), family=4 if family == "4" else 6))


def probes(policy: FirewallPolicy, family: int) -> list[Packet]:
    return corners(policy, PACKETS // 2) + anywhere(PACKETS - PACKETS // 2, family=4 if family == 4 else 6)


def compare(policy: FirewallPolicy, packets: list[Packet], nft: NftJudge, program: Datapath) -> None:
    index = {rule.name: number for number, rule in enumerate(policy.rules)}
    expected = Bulk(policy).judge(packets)
    some = range(0, len(packets), max(1, len(packets) // PLAIN_ONES))
    plainest = [oracle.judge(policy, packets[at]) for at in some]
    assert [(v, None if r is None else index[r]) for v, r in plainest] == [expected[at] for at in some]
    nft.load_text("flush ruleset\n" + nftpeers.ruleset(
        policy, hook="ingress", device=device(Direction.INGRESS, ""), words=WORDS
    ))  # fmt: skip
    differ(packets, expected, nft.judge(packets), "nftables")
    program.stage(policy)
    said = [(v.action, None if v.rule is None else index[v.rule]) for v in program.explain(packets)]
    differ(packets, expected, said, "the program")


def differ(packets: list[Packet], one: list[object], other: list[object], who: str) -> None:  # type: ignore[type-arg]
    found = [(p, a, b) for p, a, b in zip(packets, one, other, strict=True) if a != b]
    assert found[:3] == [], f"{who} differs in {len(found)} of {len(packets)}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_three_judges_agree_on_a_published_set(name: str, nft: NftJudge, program: Datapath) -> None:
    policy = published(name)
    compare(policy, probes(policy, 4), nft, program)


@pytest.mark.parametrize("name", GENERATED)
def test_three_judges_agree_on_a_generated_set(name: str, nft: NftJudge, program: Datapath) -> None:
    policy = generated(name)
    compare(policy, probes(policy, int(name[-1])), nft, program)


@pytest.mark.parametrize("form", ["layered", "tree"])
@pytest.mark.parametrize("name", ["acl1-200-4", "fw1-200-4", "ipc1-200-4", "ipc1-200-6"])
def test_faster_forms_of_nftables_keep_the_first_match(name: str, form: nftpeers.Form, nft: NftJudge) -> None:
    policy = generated(name)
    packets = probes(policy, int(name[-1]))
    nft.load_text("flush ruleset\n" + nftpeers.ruleset(
        policy, form, hook="ingress", device=device(Direction.INGRESS, ""), words=WORDS
    ))  # fmt: skip
    verdicts = [action for action, _ in nft.judge(packets)]
    differ(packets, [action for action, _ in Bulk(policy).judge(packets)], verdicts, form)
    assert {*verdicts} == {*Action}
