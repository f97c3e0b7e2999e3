"""Which rule decides, in which order, and what a person reads about it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import Check, EntitlementPut, HostPut, Release, Requirements
from loopback.contracts.reports import Inventory
from loopback.contracts.trustdoc import Floor
from loopback.services.eligibility import decide

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FIELDS = {"id": "c1", "workspace": "prod", "issued_at": NOW, "expires_at": NOW + timedelta(hours=1)}


def host(**changed: object) -> HostPut:
    known = {**FIELDS, "host": "web-1", "public_key": "00" * 32, "labels": {"role": "web"}}
    return HostPut(**{**known, **changed})


def entitlement(**changed: object) -> EntitlementPut:
    known = {
        **FIELDS,
        "name": "fw-prod",
        "module": "firewall",
        "versions": ">=1,<2",
        "labels": {"role": "web"},
    }
    return EntitlementPut(**{**known, **changed})


def inventory(**changed: object) -> Inventory:
    known = {
        "host": "web-1",
        "workspace": "prod",
        "incarnation": "i1",
        "seq": 1,
        "at": NOW,
        "kernel": "6.1.0-18-amd64",
        "architecture": "x86_64",
        "agent_version": "0.1.0",
        "abi_min": 1,
        "abi_max": 1,
        "features": ("btf", "xdp"),
    }
    return Inventory(**{**known, **changed})


def release(**changed: object) -> Release:
    known = {
        "module": "firewall",
        "version": "1.2.0",
        "digest": "ab" * 32,
        "size": 10,
        "target": "modules/firewall/1.2.0/firewall-1.2.0.lbm",
        "channel": "stable",
        "requirements": Requirements(
            kernel="5.17", features=("btf",), architectures=("x86_64", "aarch64"), agent=">=0.1"
        ),
        "published_at": NOW,
    }
    return Release(**{**known, **changed})


def test_an_offer_names_the_entitlement_and_the_requirements_that_carried_it():
    judged = decide.judge(host(), inventory(), [entitlement()], release())
    assert judged.refusal is None
    assert judged.rule.startswith('entitlement "fw-prod"')
    assert "kernel ≥ 5.17" in judged.rule
    assert [c.rule for c in judged.checks] == [
        "record", "release", "entitlement", "labels", "version", "channel",
        "inventory", "abi", "agent", "architecture", "kernel", "feature",
    ]  # fmt: skip
    assert all(c.passed for c in judged.checks)


@pytest.mark.parametrize(
    ("code", "rule", "changed"),
    [
        (Code.ELIGIBILITY_NO_RECORD, "record", {"record": None}),
        (Code.ELIGIBILITY_NO_RECORD, "record", {"record": host(absent=True)}),
        (Code.ELIGIBILITY_NO_ENTITLEMENT, "entitlement", {"entitlements": []}),
        (Code.ELIGIBILITY_NO_ENTITLEMENT, "entitlement", {"entitlements": [entitlement(absent=True)]}),
        (Code.ELIGIBILITY_NO_ENTITLEMENT, "entitlement", {"entitlements": [entitlement(module="edge")]}),
        (Code.ELIGIBILITY_LABELS, "labels", {"record": host(labels={"role": "db"})}),
        (Code.ELIGIBILITY_VERSION, "version", {"release": release(version="2.0.0")}),
        (Code.ELIGIBILITY_VERSION, "version", {"release": release(version="not a version")}),
        (Code.ELIGIBILITY_CHANNEL, "channel", {"release": release(channel="beta")}),
        (Code.ELIGIBILITY_NO_INVENTORY, "inventory", {"inventory": None}),
        (Code.ELIGIBILITY_ABI, "abi", {"inventory": inventory(abi_min=2, abi_max=3)}),
        (Code.ELIGIBILITY_AGENT, "agent", {"inventory": inventory(agent_version="0.0.9")}),
        (Code.ELIGIBILITY_AGENT, "agent", {"inventory": inventory(agent_version="?")}),
        (Code.ELIGIBILITY_ARCHITECTURE, "architecture", {"inventory": inventory(architecture="riscv64")}),
        (Code.ELIGIBILITY_KERNEL, "kernel", {"inventory": inventory(kernel="5.10.0")}),
        (Code.ELIGIBILITY_KERNEL, "kernel", {"inventory": inventory(kernel="unknown")}),
        (Code.ELIGIBILITY_FEATURE, "feature", {"inventory": inventory(features=("xdp",))}),
    ],
)
def test_each_rule_refuses_with_its_own_code_and_says_what_to_do(code, rule, changed):
    asked = {
        "record": host(),
        "inventory": inventory(),
        "entitlements": [entitlement()],
        "release": release(),
    }
    judged = decide.judge(**{**asked, **changed})
    assert judged.refusal is not None
    assert judged.refusal.code is code
    assert judged.refusal.next_step
    assert [c.rule for c in judged.checks if not c.passed] == [rule]
    assert judged.checks[-1].rule == rule


def test_a_version_below_the_workspaces_floor_is_refused_before_anybody_asks_for_an_entitlement():
    judged = decide.judge(host(), None, [], release(), Floor("1.10.0"))
    assert judged.refusal is not None
    assert judged.refusal.code is Code.HOST_BELOW_FLOOR
    assert judged.refusal.next_step.startswith("choose 1.10.0")
    assert judged.checks[-1] == Check("floor", False, "≥ 1.10.0 (release is 1.2.0)")
    good = decide.judge(host(), inventory(), [entitlement()], release(), Floor("1.2.0"))
    assert good.refusal is None
    assert [c.rule for c in good.checks][:4] == ["record", "release", "floor", "entitlement"]


def test_a_floor_counts_for_its_own_module_only():
    (offered,) = decide.offered(host(), inventory(), [entitlement()], [release()], {"edge": Floor("9")})
    assert offered.refusal is None
    (offered,) = decide.offered(host(), inventory(), [entitlement()], [release()], {"firewall": Floor("9")})
    assert offered.refusal is not None
    low = decide.refused_hosts(
        ["web-1"], {"web-1": host()}, {"web-1": inventory()}, [entitlement()], release(), Floor("9")
    )
    assert low["web-1"].code is Code.HOST_BELOW_FLOOR


def test_everything_wrong_at_once_is_refused_by_the_first_rule_in_order():
    judged = decide.judge(
        host(labels={}),
        inventory(kernel="4.4", features=(), architecture="mips"),
        [entitlement(versions="<1", channel="beta")],
        release(),
    )
    assert judged.refusal is not None
    assert judged.refusal.code is Code.ELIGIBILITY_LABELS


def test_of_several_entitlements_the_one_that_gets_furthest_speaks():
    wrong_labels = entitlement(name="a", labels={"role": "db"})
    wrong_channel = entitlement(name="b", channel="beta")
    judged = decide.judge(host(), inventory(), [wrong_labels, wrong_channel], release())
    assert judged.refusal is not None
    assert judged.refusal.code is Code.ELIGIBILITY_CHANNEL
    allowed = decide.judge(
        host(), inventory(), [wrong_labels, wrong_channel, entitlement(name="z")], release()
    )
    assert allowed.refusal is None
    assert 'entitlement "z"' in allowed.rule


def test_a_prerelease_is_held_back_by_its_channel_and_not_by_its_name():
    beta = release(version="1.3.0rc1", channel="beta")
    assert decide.judge(host(), inventory(), [entitlement(channel="beta")], beta).refusal is None
    refusal = decide.judge(host(), inventory(), [entitlement()], beta).refusal
    assert refusal is not None
    assert refusal.code is Code.ELIGIBILITY_CHANNEL


@given(st.tuples(st.integers(0, 20), st.integers(0, 300), st.integers(0, 300)), st.data())
def test_kernels_compare_as_numbers_and_not_as_text(version, data):
    other = data.draw(st.tuples(st.integers(0, 20), st.integers(0, 300), st.integers(0, 300)))
    has = ".".join(map(str, version)) + "-7-amd64"
    needs = ".".join(map(str, other))
    judged = decide.judge(
        host(), inventory(kernel=has), [entitlement()], release(requirements=Requirements(kernel=needs))
    )
    assert (judged.refusal is None) == (version >= other)


@given(st.permutations(["1.10.0", "1.9.0", "1.2.0rc1", "1.2.0", "odd name"]))
def test_an_offer_lists_the_newest_version_first_whatever_the_order_of_publication(versions):
    offered = decide.offered(host(), inventory(), [entitlement()], [release(version=v) for v in versions])
    assert [o.version for o in offered] == ["1.10.0", "1.9.0", "1.2.0", "1.2.0rc1", "odd name"]


def test_a_host_without_a_record_is_offered_nothing():
    assert decide.offered(None, inventory(), [entitlement()], [release()]) == ()
    assert decide.offered(host(absent=True), inventory(), [entitlement()], [release()]) == ()


def test_a_repeated_inventory_changes_no_offer():
    first = decide.offered(host(), inventory(), [entitlement()], [release()])
    later = inventory(seq=9, at=NOW + timedelta(days=1))
    assert decide.offered(host(), later, [entitlement()], [release()]) == first


def test_only_the_refused_hosts_of_a_rollout_are_named():
    refused = decide.refused_hosts(
        ["web-1", "web-2", "gone"],
        {"web-1": host(), "web-2": host(host="web-2")},
        {"web-1": inventory()},
        [entitlement()],
        release(),
    )
    assert {name: r.code for name, r in refused.items()} == {
        "web-2": Code.ELIGIBILITY_NO_INVENTORY,
        "gone": Code.ELIGIBILITY_NO_RECORD,
    }


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"versions": "newest"}, "versions"),
        ({"module": ""}, "module"),
        ({"channel": ""}, "channel"),
        ({"labels": {"": "x"}}, "labels"),
        ({"labels": {"a": "x" * 200}}, "labels"),
        ({"labels": {str(i): "" for i in range(100)}}, "labels"),
    ],
)
def test_an_entitlement_that_could_never_apply_is_refused_naming_the_field(changed, field):
    with pytest.raises(Refused) as caught:
        decide.check_entitlement(msgspec.structs.replace(entitlement(), **changed))
    assert caught.value.code is Code.COMMAND_MALFORMED
    assert caught.value.reason.startswith(field)


@pytest.mark.parametrize("field", ["kernel", "agent_version", "architecture"])
@pytest.mark.parametrize("claimed", ["9" * 5000, "5." + "9" * 5000, "²", "\0", ""])
def test_nothing_that_a_host_claims_of_itself_ends_in_an_exception(field, claimed):
    judged = decide.judge(host(), inventory(**{field: claimed}), [entitlement()], release())
    assert judged.version == "1.2.0"
    if field == "agent_version":
        assert judged.refusal is not None
        assert judged.refusal.code is Code.ELIGIBILITY_AGENT


def test_a_range_with_a_number_beyond_reading_is_refused():
    with pytest.raises(Refused) as caught:
        decide.check_entitlement(msgspec.structs.replace(entitlement(), versions=">=" + "9" * 5000))
    assert caught.value.code is Code.COMMAND_MALFORMED
