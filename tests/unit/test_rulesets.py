"""Rule sets for tests and benches: the published files are read as they mean, and generated ones look like them."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import msgspec
import pytest
import rulegen
import rulesets
from corners import Raw, anywhere, corners, raw_anywhere, raw_corners
from rulesets import Five

from loopback.modules.firewall import oracle, policy
from loopback.modules.firewall.model import Action, Direction, Packet, PortRange, Prefix
from loopback.modules.firewall.policy_fields import WITH_PORTS

LINES = """\
@10.1.0.0/16\t10.2.3.4/32\t0 : 65535\t80 : 80\t0x06/0xFF\t0x1000/0x1000\t
@0.0.0.0/0\t0.0.0.0/0\t0 : 65535\t0 : 65535\t0x00/0x00\t0x0000/0x0000
@0.0.0.0/0\t10.0.0.0/8\t1024 : 65535\t0 : 65535\t0x00/0x00\t0x0000/0x0000
@0.0.0.0/0\t10.0.0.0/8\t0 : 65535\t53 : 53\t0x01/0xFF\t0x0000/0x0000
"""


def test_a_published_line_means_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "some").write_text(LINES)
    fives = rulesets.read(tmp_path / "some")
    assert fives[0] == Five(
        Prefix(4, 0x0A010000, 16), Prefix(4, 0x0A020304, 32), PortRange(0, 65535), PortRange(80, 80), 6
    )
    found = rulesets.policy(fives, default=Action.ACCEPT, actions="drop")
    first, everything, ported = found.rules
    assert (first.sources, first.destinations) == ((Prefix(4, 0x0A010000, 16),), (Prefix(4, 0x0A020304, 32),))
    assert (first.ports, first.source_ports, first.protocols) == ((PortRange(80, 80),), (), (6,))
    assert {rule.action for rule in found.rules} == {Action.DROP}
    six = Packet(direction=Direction.INGRESS, src="2001:db8::1", dst="2001:db8::2", protocol=6)
    assert not oracle.matches(everything, six, found), "ClassBench speaks of IPv4"
    assert set(ported.protocols) == WITH_PORTS, "only what has ports can have these"
    assert [rule.name for rule in found.rules] == ["r0", "r1", "r2"], "ICMP to port 53 is nothing"


def test_a_line_that_is_no_rule_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text(LINES + "@10.1.0.0/16 nonsense\n")
    with pytest.raises(ValueError, match=r"bad:5: not a ClassBench rule: '@10.1.0.0/16 nonsense'"):
        rulesets.read(tmp_path / "bad")


def test_where_the_published_sets_are_not_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOOPBACK_CLASSBENCH", str(tmp_path / "nowhere"))
    assert rulesets.published() == {}
    assert f"ClassBench: {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


def test_the_recorded_statistics_are_those_of_the_published_files() -> None:
    recorded, files = rulegen.profiles(), rulesets.published()
    assert recorded.keys() == set(rulesets.PUBLISHED)
    for name, path in files.items():
        assert rulegen.measure(rulesets.read(path)) == recorded[name], name


@pytest.mark.parametrize("name", rulesets.PUBLISHED)
def test_a_generated_set_has_the_statistics_of_the_published_one(name: str) -> None:
    wanted = rulegen.profiles()[name]
    made = rulegen.measure(rulegen.generate(name.split("_")[0], wanted.rules))
    assert made.rules == wanted.rules
    assert made.tuples == wanted.tuples, "every pair of prefix lengths is as frequent"
    for place, parts in (
        (0, ("any", "6", "17")),
        (1, ("any", "exact", "range")),
        (2, ("any", "exact", "range")),
    ):
        for part in parts:
            assert made.share(place, part) == pytest.approx(wanted.share(place, part), abs=0.03), (
                place,
                part,
            )
    assert made.duplicates <= max(5, wanted.duplicates)
    for side in ("source", "destination"):
        mine, theirs = getattr(made, side), getattr(wanted, side)
        assert mine.distinct == pytest.approx(theirs.distinct, rel=0.1), side
        assert mine.depth == pytest.approx(theirs.depth, abs=1.1), side
        assert mine.nested == pytest.approx(theirs.nested, abs=200_000), side
    assert made.pairs == pytest.approx(wanted.pairs, rel=0.4)
    for mine, theirs in zip(made.specificity, wanted.specificity, strict=True):
        assert mine == pytest.approx(theirs, abs=100), "the more specific rules come first"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("count", [10, 100, 3000])
def test_any_size_and_family_can_be_had_and_the_parser_takes_it(count: int, family: int) -> None:
    for kind in rulegen.FAMILIES:
        fives = rulegen.generate(kind, count, family=family)  # type: ignore[arg-type]  # one of the two
        assert len(fives) == count
        assert {five.source.family for five in fives} == {family}
        made = rulesets.policy(fives)
        assert policy.parse(rulesets.text(made)) == made


def test_ipv6_sets_have_the_lengths_of_address_plans_inside_the_registries_blocks() -> None:
    made = rulegen.measure(rulegen.generate("ipc1", 3000, family=6))
    assert {32, 48, 64, 128} <= made.destination.lengths.keys() <= {*rulegen.V6_LENGTHS}
    fives = rulegen.generate("ipc1", 3000, family=6)
    firsts = {five.destination.address >> 116 for five in fives if five.destination.length >= 12}
    assert firsts == set(rulegen.V6_REGISTRIES)
    assert made.destination.depth > 2


def test_the_same_seed_gives_the_same_rules_and_packets_anywhere() -> None:
    fives = rulegen.generate("fw1", 500, seed=7)
    assert fives == rulegen.generate("fw1", 500, seed=7) != rulegen.generate("fw1", 500, seed=8)
    made = rulesets.policy(fives, seed=7)
    packets = [raw for _, raw in raw_corners(made, 500, 7)] + list(raw_anywhere(500, 7))
    digest = hashlib.sha256(rulesets.text(made) + msgspec.json.encode(packets)).hexdigest()
    assert digest == "f8267cad5e0806529b1dfe705fc9d32b570acaa4003dce0c42960562b1460b14"


def test_corner_packets_meet_their_rules_and_come_close() -> None:
    made = rulesets.policy(rulegen.generate("acl1", 200))
    tried = [(rule, raw) for rule, raw in raw_corners(made, 2000)]
    packets = corners(made, 2000)
    met = sum(oracle.matches(rule, packet, made) for (rule, _), packet in zip(tried, packets, strict=True))
    assert 900 < met < 1600, "about half of them hit, the others lie just outside"
    assert {rule.name for rule, _ in tried} == {rule.name for rule in made.rules}


def test_random_packets_are_spread_over_all_addresses() -> None:
    raws = list(raw_anywhere(2000, 3))
    assert {raw.src >> 28 for raw in raws} == set(range(16))
    assert {raw.protocol for raw in raws} == {1, 6, 17, 47}
    assert all(isinstance(raw, Raw) for raw in raws)
    assert all(p.src.startswith(("2", "3")) for p in anywhere(100, family=6))


def test_a_million_prefixes_are_disjoint() -> None:
    held = rulesets.million(20_000)
    assert len(set(held)) == 20_000
    ends = [(p.address, p.address + (1 << (32 - p.length))) for p in held]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ends))
