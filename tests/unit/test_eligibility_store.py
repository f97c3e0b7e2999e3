"""The fold of records, releases, inventories and offers: order does not matter, and nobody unproven is believed."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts import envelope, subjects
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Command, EntitlementPut, HostPut, Record, WorkspacePut
from loopback.contracts.reports import Inventory
from loopback.services._runtime.wire import Stored
from loopback.services.eligibility.store import Fleet, Source

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FIELDS = {"id": "c1", "workspace": "prod", "issued_at": NOW, "expires_at": NOW + timedelta(hours=1)}
OPERATOR = SigningKey.generate()
KEY = SigningKey.generate()
OTHER = SigningKey.generate()


def stored(subject: str, data: bytes, sequence: int = 1) -> Stored:
    return Stored(subject, data, {}, sequence, NOW, "S")


def record(kind: str, name: str, command: Command, sequence: int = 1) -> tuple[Source, Stored]:
    sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), OPERATOR)
    body = Record(kind=kind, name=name, workspace="prod", envelope=sealed, at=NOW, sequence=sequence)
    subject = subjects.record("prod", kind, name)
    return Source.RECORDS, stored(subject, msgspec.json.encode(body), sequence)


def host(key: SigningKey = KEY, sequence: int = 1, **more: object) -> tuple[Source, Stored]:
    command = HostPut(**FIELDS, host="web-1", public_key=key.public.text, **more)
    return record("host", "web-1", command, sequence)


def inventory(
    key: SigningKey = KEY, seq: int = 1, kernel: str = "6.1", name: str = "web-1"
) -> tuple[Source, Stored]:
    report = Inventory(
        host=name, workspace="prod", incarnation="i1", seq=seq, at=NOW, kernel=kernel, architecture="x86_64",
        agent_version="0.1", abi_min=1, abi_max=1,
    )  # fmt: skip
    data = envelope.seal_bytes(envelope.REPORT, msgspec.json.encode(report), key)
    return Source.INVENTORIES, stored(subjects.from_host("prod", "web-1", "inventory"), data, seq)


def folded(*messages: tuple[Source, Stored]) -> Fleet:
    fleet = Fleet(logging.getLogger("test"))
    for source, message in messages:
        fleet.fold(source, message)
    return fleet


@pytest.mark.parametrize("messages", [(host(), inventory()), (inventory(), host())])
def test_records_and_inventories_may_come_in_any_order(messages):
    assert folded(*messages).inventories["prod", "web-1"].kernel == "6.1"


@pytest.mark.parametrize("false", [inventory(OTHER), inventory(KEY, name="web-2")])
def test_an_inventory_that_the_host_did_not_sign_for_itself_is_not_believed(false):
    assert folded(host(), false).inventories == {}


def test_a_false_inventory_does_not_displace_the_true_one():
    assert (
        folded(host(), inventory(), inventory(OTHER, 9, "9.9")).inventories["prod", "web-1"].kernel == "6.1"
    )


def test_a_late_inventory_does_not_displace_a_newer_one():
    fleet = folded(host(), inventory(seq=5, kernel="6.5"), inventory(seq=4, kernel="6.4"))
    assert fleet.inventories["prod", "web-1"].kernel == "6.5"


def test_a_host_with_a_new_key_must_say_again_what_it_is():
    fleet = folded(host(), inventory(), host(OTHER, 2))
    assert fleet.inventories == {}
    fleet.fold(*inventory(OTHER, 2, "6.9"))
    assert fleet.inventories["prod", "web-1"].kernel == "6.9"


def test_changed_labels_do_not_forget_what_the_host_is():
    assert folded(host(), inventory(), host(sequence=2, labels={"a": "b"})).inventories


def test_a_key_belongs_to_one_host_until_its_record_is_withdrawn():
    fleet = folded(host())
    assert fleet.owner(KEY.public.text) == ("prod", "web-1")
    fleet.fold(*host(sequence=2, absent=True))
    assert fleet.owner(KEY.public.text) is None


def test_each_workspace_and_entitlement_is_known_by_its_own_name():
    appeared: list[str] = []
    fleet = Fleet(logging.getLogger("test"), appeared.append)
    fleet.fold(*record("workspace", "prod", WorkspacePut(**FIELDS, environment="sandbox")))
    fleet.fold(*record("entitlement", "fw", EntitlementPut(**FIELDS, name="fw", module="firewall")))
    assert appeared == ["prod"]
    assert [e.name for e in fleet.entitlements_of("prod")] == ["fw"]
    assert fleet.entitlements_of("staging") == []


@given(st.binary(max_size=40), st.sampled_from(list(Source)))
def test_whatever_lies_in_a_stream_the_fold_goes_on(data, source):
    fleet = folded((source, stored("lb.ws.prod.record.host.web-1", data, 3)), host(sequence=4))
    assert ("prod", "web-1") in fleet.hosts


@pytest.mark.parametrize("data", [b'{"kind":"\xff"}', b"[" * 5000])
def test_text_that_is_no_text_and_endless_nesting_are_left_out(data):
    for source in (Source.RECORDS, Source.OFFERS, Source.RELEASES):
        assert ("prod", "web-1") in folded(
            (source, stored("lb.ws.prod.x.y", data, 3)), host(sequence=4)
        ).hosts


@pytest.mark.parametrize("name", ["", "x" * 300, "*"])
def test_a_workspace_that_no_stream_can_be_named_after_does_not_appear(name):
    command = WorkspacePut(**FIELDS, environment="sandbox")
    sealed = envelope.seal(envelope.COMMAND, msgspec.json.encode(command), OPERATOR)
    body = Record(kind="workspace", name=name, workspace="prod", envelope=sealed, at=NOW, sequence=1)
    appeared: list[str] = []
    fleet = Fleet(logging.getLogger("test"), appeared.append)
    fleet.fold(Source.RECORDS, stored("lb.ws.prod.record.workspace.prod", msgspec.json.encode(body)))
    assert appeared == []


class Leader:
    """Answers what the newest message is."""

    def __init__(self, newest: Stored | None) -> None:
        self.newest = newest

    async def last(self, stream: str, subject: str) -> Stored | None:
        return self.newest

    async def fold(self, *_: object, **__: object) -> None:
        raise AssertionError("not asked for here")


async def test_catching_up_waits_for_what_the_leader_already_has():
    fleet = folded(host(sequence=3))
    leader = Leader(stored("x", b"", 5))
    waiting = asyncio.create_task(fleet.caught_up(leader, Source.RECORDS))
    for sequence in (4, 5):
        await asyncio.wait({waiting}, timeout=0.02)
        assert not waiting.done()
        fleet.fold(*host(sequence=sequence))
    await asyncio.wait_for(waiting, 60)
    await asyncio.wait_for(fleet.caught_up(leader, Source.RECORDS), 60)
    leader.newest = None
    await asyncio.wait_for(fleet.caught_up(leader, Source.RELEASES), 60)
