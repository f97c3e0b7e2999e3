"""Who fills a set: what a host believes of a roster, whoever sends it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts import envelope, roster
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostPut, PoolPut
from loopback.contracts.roster import Member, Roster, Slice, Source
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.host.roster import Followed, Known, accept, missing, opened, slice_members

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
ADMIN, BALANCER, STRANGER, ACTIVATION = (SigningKey.from_raw(bytes([n]) * 32) for n in (1, 2, 3, 4))
WEB, SHOP = Source(labels={"role": "web"}), Source(pool="shop")
TRUST = Trust(
    TrustDocument(
        version=1,
        operators=(
            Operator("ann", ADMIN.public.text, {"prod": (Role.ADMIN,)}),
            Operator("lb", BALANCER.public.text, {"prod": (Role.BALANCER,)}, ("shop",)),
        ),
        services={"activation": (ACTIVATION.public.text,)},
    )
)


def fields(minutes: float) -> dict[str, Any]:
    at = NOW + timedelta(minutes=minutes)
    return {"id": f"c{minutes}", "workspace": "prod", "issued_at": at, "expires_at": at + timedelta(hours=1)}


def host(name: str, at: float = -60, key: SigningKey = ADMIN, **changed: Any) -> Member:
    known = {"public_key": "00" * 32, "labels": {"role": "web"}, "addresses": ("10.0.0.7/24",), "host": name}
    command = HostPut(**fields(at) | known | changed)
    return Member(envelope.seal(envelope.COMMAND, msgspec.json.encode(command), key))


def pool(serial: int, key: SigningKey = BALANCER, **changed: Any) -> Member:
    command = PoolPut(
        **fields(-60) | {"pool": "shop", "serial": serial, "addresses": ("10.0.0.9",)} | changed
    )
    return Member(envelope.seal(envelope.COMMAND, msgspec.json.encode(command), key))


def made(source: Source, *members: Member, at: float = 0) -> tuple[Roster, dict[str, bytes]]:
    """A roster with one slice, and the slice by its digest."""
    data = msgspec.json.encode(Slice(members=members)) if members else b""
    digests = roster.digests([data])
    found = Roster(workspace="prod", source=source, slices=digests, issued_at=NOW + timedelta(minutes=at))
    return found, {digests[0]: data} if data else {}


def take(before: Followed, *members: Member, at: float = 0) -> Followed:
    """What a host makes of it, by every check but that of activation's signature."""
    found, slices = made(before.source, *members, at=at)
    read = {
        digest: slice_members(slices[digest], digest, before.source, "prod", TRUST, before.by_digest)
        for digest in missing(before, found).values()
    }
    return accept(before, found, read)


def refusal(*arguments: Any, **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        take(*arguments, **more)
    return caught.value


def test_addresses_come_from_what_operators_signed() -> None:
    found = take(Followed(source=WEB), host("web-1"), host("web-2", addresses=("2001:db8::7", "10.0.0.8")))
    assert found.addresses == ["10.0.0.7", "10.0.0.8", "2001:db8::7"]
    assert take(Followed(source=SHOP), pool(1, addresses=("10.1.0.0/16",))).addresses == ["10.1.0.0/16"]


@pytest.mark.parametrize(
    ("source", "member", "code"),
    [
        (WEB, host("evil", key=ACTIVATION), Code.SIGNATURE_UNKNOWN_KEY),
        (WEB, host("evil", key=STRANGER), Code.SIGNATURE_UNKNOWN_KEY),
        (WEB, host("evil", key=BALANCER), Code.COMMAND_UNAUTHORISED),
        (WEB, host("db-1", labels={"role": "db"}), Code.ROSTER_INVALID),
        (WEB, host("gone", absent=True), Code.ROSTER_INVALID),
        (WEB, host("there", workspace="lab"), Code.SCOPE_VIOLATION),
        (WEB, pool(1, key=ADMIN), Code.SCOPE_VIOLATION),
        (SHOP, pool(1, key=ACTIVATION), Code.SIGNATURE_UNKNOWN_KEY),
        (SHOP, pool(1, pool="blog"), Code.ROSTER_INVALID),
        (SHOP, pool(1, workspace="lab"), Code.ROSTER_INVALID),
        (SHOP, host("web-1"), Code.ROSTER_INVALID),
    ],
)
def test_who_does_not_belong_there_spoils_the_whole_roster(
    source: Source, member: Member, code: Code
) -> None:
    good = host("web-1", addresses=("10.0.0.1",)) if source is WEB else None
    members = [m for m in (good, member) if m is not None]
    assert refusal(Followed(source=source), *members).code is code


def test_a_balancer_speaks_for_its_own_pool_only() -> None:
    blog = Source(pool="blog")
    assert refusal(Followed(source=blog), pool(1, pool="blog")).code is Code.COMMAND_UNAUTHORISED
    assert take(Followed(source=blog), pool(1, pool="blog", key=ADMIN)).addresses == ["10.0.0.9"]


def test_an_older_word_is_refused_and_so_is_another_of_the_same_time() -> None:
    known = take(Followed(source=WEB), host("web-1", at=-30, addresses=("10.0.0.1",)))
    for at in (-40, -30):
        assert refusal(known, host("web-1", at=at, addresses=("10.0.0.2",)), at=1).code is Code.ROSTER_OLDER
    assert take(known, host("web-1", at=-29, addresses=("10.0.0.2",)), at=1).addresses == ["10.0.0.2"]
    shop = take(Followed(source=SHOP), pool(5))
    for serial in (4, 5):
        assert refusal(shop, pool(serial, addresses=("10.0.0.2",)), at=1).code is Code.ROSTER_OLDER
    assert take(shop, pool(6, absent=True, addresses=()), at=1).addresses == []


def test_who_left_comes_back_only_by_a_newer_word() -> None:
    first, second = host("web-1", at=-30), host("web-2", at=-30, addresses=("10.0.0.8",))
    left = take(take(Followed(source=WEB), first, second), second, at=1)
    assert left.addresses == ["10.0.0.8"]
    assert refusal(left, first, second, at=2).code is Code.ROSTER_OLDER
    assert take(left, host("web-1", at=-20), second, at=2).addresses == ["10.0.0.7", "10.0.0.8"]


def test_a_pool_cannot_be_left_out_once_it_is_known() -> None:
    known = take(Followed(source=SHOP), pool(1))
    assert refusal(known, at=1).code is Code.ROSTER_OLDER
    assert take(Followed(source=SHOP)).addresses == [], "a pool that nobody put has nothing"


def test_what_was_believed_is_not_asked_again_when_its_operator_leaves() -> None:
    known = take(Followed(source=WEB), host("web-1"))
    later = Trust(msgspec.structs.replace(TRUST.document, operators=TRUST.document.operators[1:]))
    _, slices = made(WEB, host("web-1"), at=1)
    ((digest, data),) = slices.items()
    assert slice_members(data, digest, WEB, "prod", later, known.by_digest) == known.members
    with pytest.raises(Refused) as caught:
        slice_members(data, digest, WEB, "prod", later, {})
    assert caught.value.code is Code.SIGNATURE_UNKNOWN_KEY


def test_a_slice_that_is_not_the_rosters_is_refused() -> None:
    data = msgspec.json.encode(Slice(members=(host("web-1"),)))
    for wrong in (b"", data + b" "):
        with pytest.raises(Refused) as caught:
            slice_members(wrong, hashlib.sha256(data).hexdigest(), WEB, "prod", TRUST, {})
        assert caught.value.code is Code.ROSTER_INVALID


def test_a_roster_is_of_its_workspace_and_source_of_activation_and_of_now() -> None:
    known = Followed(source=WEB, issued_at=NOW)

    def read(key: SigningKey = ACTIVATION, **changed: Any) -> Roster | None:
        found = msgspec.structs.replace(made(WEB, host("web-1"), at=1)[0], **changed)
        return opened(
            envelope.seal(envelope.ROSTER, msgspec.json.encode(found), key), known, "prod", TRUST, NOW
        )

    assert read() is not None
    assert read(issued_at=NOW) is None and read(issued_at=NOW - timedelta(1)) is None, "it is no news"
    for changed in (
        {"key": ADMIN}, {"key": STRANGER}, {"workspace": "lab"}, {"source": SHOP}, {"slices": ()},
        {"slices": ("",) * 257}, {"issued_at": NOW + timedelta(minutes=6)},
    ):  # fmt: skip
        with pytest.raises(Refused) as caught:
            read(**changed)
        assert caught.value.code in (Code.ROSTER_INVALID, Code.SIGNATURE_UNKNOWN_KEY)


NAMES = st.sampled_from([f"web-{n}" for n in range(8)])
#: What may come, in any order and by whomever: who is in it with the order of the word on each.
STEPS = st.lists(st.dictionaries(NAMES, st.integers(0, 5)), max_size=12)


@given(STEPS)
def test_no_sequence_of_rosters_takes_anybody_back_to_an_older_word(steps: list[dict[str, int]]) -> None:
    now, newest = Followed(source=WEB), dict[str, int]()
    for step in steps:
        members = {name: Known(f"{name}/{order}", order, (name,)) for name, order in step.items()}
        digest = hashlib.sha256(repr(sorted(step.items())).encode()).hexdigest()
        found = Roster(workspace="prod", source=WEB, slices=(digest if step else "",), issued_at=NOW)
        before = now
        try:
            now = accept(before, found, {digest: members})
        except Refused as refused:
            assert refused.code is Code.ROSTER_OLDER
            assert now is before, "taken whole or not at all"
        else:
            assert now.members == members
            for name, order in step.items():
                back = before.members.get(name)
                assert order > newest.get(name, -1) or back == members[name]
                newest[name] = max(order, newest.get(name, -1))


@given(st.sets(st.integers(0, 400), max_size=300), st.integers(401, 500))
def test_another_member_changes_one_slice_unless_their_number_changes(there: set[int], other: int) -> None:
    envelopes = envelope.seal(envelope.COMMAND, b"{}", ADMIN)
    members = {f"host-{n}": Member(envelopes) for n in there}
    before, after = roster.cut(members), roster.cut(members | {f"host-{other}": Member(envelopes)})
    assert sum(len(roster.decode_slice(data).members) for data in before if data) == len(members)
    if len(before) == len(after):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert len(before) & (len(before) - 1) == 0 and len(before) <= roster.MAX_SLICES
