"""Commands on a real broker: every refusal has its code and is stored, every outcome is decided once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from support import Place, eventually
from support_office import ADA, LATER, SERVICE, STRANGER, VERA, Office, operator, trust

from loopback.contracts import envelope, events, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import (
    Command,
    EntitlementPut,
    RolloutPause,
    RolloutResume,
    WorkspacePut,
)
from loopback.contracts.trustdoc import Role
from loopback.services._runtime import streams
from loopback.services._runtime.bus import Conflict, Outgoing
from loopback.services._runtime.commands import Accepted, CommandContext

pytestmark = pytest.mark.broker


@pytest.fixture
async def office(broker: Place) -> AsyncIterator[Office]:
    await broker.workspace("prod")
    found = Office(broker, await broker.bus("admin"))
    try:
        await found.open()
        yield found
    finally:
        await found.close()


def pause(**changes: object) -> RolloutPause:
    at = now()
    return RolloutPause(
        **(
            {
                "id": str(uuid.uuid4()),
                "workspace": "prod",
                "issued_at": at,
                "expires_at": at + timedelta(hours=1),
                "rollout": "r1",
            }
            | changes
        )
    )


def sealed(command: Command, *keys: SigningKey) -> bytes:
    return envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(command), *(keys or (ADA,)))


async def test_an_accepted_command_has_a_result_and_a_journal_entry(office: Office) -> None:
    command = pause()
    place = await office.publish(sealed(command), event_id=command.id)
    result = await office.outcome(command.id)
    assert result.ok
    assert (result.command_type, result.service, result.sequence) == ("rollout.pause", SERVICE, place)
    assert result.detail == {"by": "ada"}
    (entry,) = await office.journal("accepted")
    assert (entry.command, entry.operators, entry.keys) == (command.id, ("ada",), (ADA.keyid,))
    assert entry.at == result.at
    stored = await office.admin.read(subjects.STREAM_COMMANDS, [subjects.commands_for(SERVICE)])
    assert (entry.sequence, entry.sha256) == (place, hashlib.sha256(stored[0].data).hexdigest())
    assert office.asked == [command.id]


async def test_the_outcome_belongs_to_the_commands_trace(office: Office) -> None:
    command = pause()
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    await office.publish(
        sealed(command),
        event_id=command.id,
        headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"},
    )
    await office.outcome(command.id)
    found = await office.admin.last("LB_WS_prod", subjects.result("prod", command.id))
    assert found is not None
    assert found.headers["traceparent"].split("-")[1] == trace_id
    assert found.headers["ce-type"] == "loopback.result"
    (span,) = await eventually(lambda: [s for s in office.spans.get_finished_spans() if s.attributes])
    assert f"{span.context.trace_id:032x}" == trace_id
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert span.name == "process lb.ws.{workspace}.cmd.activation.rollout-pause"
    assert span.attributes["loopback.rollout.id"] == "r1"
    assert span.attributes["messaging.system"] == "nats"
    assert span.attributes["loopback.outcome"] == "accepted"


def now() -> datetime:
    """The time of the test, not of the import: a whole session takes longer than the clocks' tolerance."""
    return datetime.now(UTC)


ELSEWHERE = subjects.command("prod", SERVICE, "rollout-resume")
REFUSALS = [
    ("too large", Code.ENVELOPE_TOO_LARGE, lambda: b" " * (envelope.MAX_ENVELOPE + 1), ""),
    ("no envelope", Code.ENVELOPE_MALFORMED, lambda: b"{}", ""),
    ("not JSON", Code.ENVELOPE_MALFORMED, lambda: b"\xff\x00", ""),
    ("deep nesting", Code.ENVELOPE_MALFORMED, lambda: b'{"payload":' + b"[" * 100_000, ""),
    (
        "another type",
        Code.ENVELOPE_TYPE,
        lambda: envelope.seal_bytes(envelope.POLICY, msgspec.json.encode(pause()), ADA),
        "",
    ),
    (
        "payload is no command",
        Code.COMMAND_MALFORMED,
        lambda: envelope.seal_bytes(envelope.COMMAND, b'{"type":"nonsense"}', ADA),
        "",
    ),
    (
        "unknown field",
        Code.COMMAND_MALFORMED,
        lambda: envelope.seal_bytes(
            envelope.COMMAND,
            msgspec.json.encode({**msgspec.to_builtins(pause()), "force": True}),
            ADA,
        ),
        "",
    ),
    ("no time zone", Code.COMMAND_MALFORMED, lambda: sealed(pause(issued_at=now().replace(tzinfo=None))), ""),
    ("empty id", Code.COMMAND_MALFORMED, lambda: sealed(pause(id="")), ""),
    ("endless id", Code.COMMAND_MALFORMED, lambda: sealed(pause(id="x" * 500)), ""),
    ("wrong verb", Code.COMMAND_WRONG_SUBJECT, lambda: sealed(pause()), ELSEWHERE),
    ("wrong workspace", Code.COMMAND_WRONG_SUBJECT, lambda: sealed(pause(workspace="other")), ""),
    (
        "not this service's",
        Code.COMMAND_UNKNOWN,
        lambda: sealed(
            RolloutResume(
                id="u1", workspace="prod", issued_at=now(), expires_at=now() + timedelta(hours=1), rollout="r"
            )
        ),
        ELSEWHERE,
    ),
    (
        "unsigned",
        Code.ENVELOPE_UNSIGNED,
        lambda: msgspec.json.encode(
            msgspec.structs.replace(
                envelope.seal(envelope.COMMAND, msgspec.json.encode(pause())), signatures=()
            )
        ),
        "",
    ),
    ("unknown key", Code.SIGNATURE_UNKNOWN_KEY, lambda: sealed(pause(), STRANGER), ""),
    (
        "changed after signing",
        Code.SIGNATURE_INVALID,
        lambda: msgspec.json.encode(
            msgspec.structs.replace(
                envelope.seal(envelope.COMMAND, msgspec.json.encode(pause(rollout="other")), ADA),
                payload=envelope.seal(envelope.COMMAND, msgspec.json.encode(pause())).payload,
            )
        ),
        "",
    ),
    ("wrong role", Code.COMMAND_UNAUTHORISED, lambda: sealed(pause(), VERA), ""),
    (
        "a year long",
        Code.COMMAND_MALFORMED,
        lambda: sealed(pause(expires_at=now() + timedelta(days=365))),
        "",
    ),
    (
        "from the future",
        Code.COMMAND_NOT_YET_VALID,
        lambda: sealed(pause(issued_at=now() + timedelta(minutes=9))),
        "",
    ),
    (
        "expired",
        Code.COMMAND_EXPIRED,
        lambda: sealed(pause(issued_at=now() - timedelta(hours=2), expires_at=now() - timedelta(minutes=9))),
        "",
    ),
]


@pytest.mark.parametrize(("code", "data", "subject"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
async def test_a_refused_command_is_answered_and_journaled_and_changes_nothing(
    office: Office, code: Code, data: Callable[[], bytes], subject: str
) -> None:
    place = await office.publish(data(), subject=subject)
    (entry,) = await eventually(lambda: office.journal("refused"))
    assert entry.refusal is not None
    assert entry.refusal.code is code
    assert entry.refusal.reason
    assert entry.sequence == place and len(entry.sha256) == 64
    result = await office.outcome(entry.command)
    assert (result.ok, result.refusal, result.sequence) == (False, entry.refusal, place)
    assert office.asked == []
    assert await office.journal("accepted") == []


async def test_a_clock_that_is_a_little_off_is_forgiven(office: Office) -> None:
    soon = pause(issued_at=now() + timedelta(seconds=50))
    late = pause(issued_at=now() - timedelta(hours=1), expires_at=now() - timedelta(seconds=10))
    for command in (soon, late):
        await office.publish(sealed(command))
        assert (await office.outcome(command.id)).ok


async def test_a_key_that_became_known_meanwhile_is_found(office: Office) -> None:
    command = pause()
    await office.publish(sealed(command, LATER))
    assert (await office.outcome(command.id)).detail == {"by": "new"}


async def test_a_command_that_is_redelivered_is_done_once(office: Office, broker: Place) -> None:
    command = pause()
    await office.publish(sealed(command))
    first = await office.outcome(command.id)
    stored = await office.admin.last("LB_CMD", subjects.command("prod", SERVICE, "rollout-pause"))
    assert stored is not None
    desk = await office.open()
    await desk.handle(stored)  # as the broker would after a replica died behind its batch
    assert office.asked == [command.id]
    assert await office.outcome(command.id) == first
    assert len(await office.journal("accepted")) == 1
    assert await office.journal("refused") == []


async def test_a_replayed_command_is_refused_and_its_first_outcome_stays(office: Office) -> None:
    command = pause()
    data = sealed(command)
    await office.publish(data)
    first = await office.outcome(command.id)
    for _ in range(2):
        again = await office.publish(data)
        refused = await office.outcome(f"{command.id}.{again}")
        assert refused.refusal is not None
        assert refused.refusal.code is Code.COMMAND_REPLAYED
    assert await office.outcome(command.id) == first
    assert office.asked == [command.id]
    assert [e.refusal.code for e in await office.journal("refused") if e.refusal] == [
        Code.COMMAND_REPLAYED
    ] * 2


async def test_a_refused_command_cannot_be_replayed_when_it_would_be_accepted(office: Office) -> None:
    """Its role was granted meanwhile; the operator has to mean it again."""
    command = pause()
    data = sealed(command, VERA)
    await office.publish(data)
    assert not (await office.outcome(command.id)).ok
    office.trust._documents = [trust(operator("vera", VERA, Role.RELEASER))]  # granted meanwhile
    again = await office.publish(data)
    refused = await office.outcome(f"{command.id}.{again}")
    assert refused.refusal is not None
    assert refused.refusal.code is Code.COMMAND_REPLAYED
    assert office.asked == []


async def test_a_forged_copy_does_not_take_the_place_of_the_real_command(office: Office) -> None:
    """Who sees a command's id on the bus cannot have it refused by sending rubbish under that id first."""
    command = pause()
    await office.publish(sealed(command, STRANGER))
    assert not (await office.outcome(command.id)).ok
    await office.publish(sealed(command))
    await eventually(lambda: office.asked == [command.id])
    await office.done()
    assert (await office.outcome(command.id)).ok


async def test_the_workspace_that_is_missing_leaves_its_refusal_in_the_global_stream(office: Office) -> None:
    async def no(context: CommandContext) -> Accepted:
        raise Refused(Code.WORKSPACE_UNKNOWN, "there is no such workspace")

    office.answer = no
    office.trust._documents = [trust(operator("ada", ADA, Role.RELEASER, workspace="*"))]
    command = pause(workspace="ghost")
    data = sealed(command)
    where = subjects.command("ghost", SERVICE, "rollout-pause")
    await office.publish(data, subject=where)
    result = await office.outcome(command.id, place="global")
    assert result.refusal is not None
    assert result.refusal.code is Code.WORKSPACE_UNKNOWN
    assert [e.command for e in await office.journal("refused", place="global")] == [command.id]
    # And once the workspace is there, the old command is still no new one.
    await office.place.workspace("ghost")
    office.answer = office._yes
    again = await office.publish(data, subject=where)
    replay = await office.outcome(f"{command.id}.{again}", place="ghost")
    assert replay.refusal is not None
    assert replay.refusal.code is Code.COMMAND_REPLAYED
    assert office.asked == []


async def test_a_handler_that_makes_the_workspace_gets_its_result_there(office: Office) -> None:
    async def make(context: CommandContext) -> Accepted:
        await streams.ensure_workspace(office.admin, context.command.workspace)
        return Accepted()

    office.answer = make
    office.trust._documents = [trust(operator("ada", ADA, Role.ADMIN, workspace="*"))]
    fields = {"id": "w1", "workspace": "fresh", "issued_at": now(), "expires_at": now() + timedelta(hours=1)}
    command = WorkspacePut(**fields, environment="sandbox")
    await office.publish(sealed(command), subject=subjects.command("fresh", SERVICE, "workspace-put"))
    assert (await office.outcome("w1", place="fresh")).ok


async def test_what_a_handler_decides_is_stored_with_the_result_or_not_at_all(office: Office) -> None:
    """A decision on a revision that is gone is taken again, on the newest one."""
    asked: list[int] = []

    async def decide(context: CommandContext) -> Accepted:
        revision = await office.admin.revision("LB_WS_prod")
        asked.append(revision)
        if len(asked) <= 3:  # somebody else is faster
            await office.admin.publish(Outgoing("lb.ws.prod.desired.other", b"%d" % len(asked)))
        return Accepted(
            {"revision": str(revision)},
            (Outgoing("lb.ws.prod.rollout.r1.paused", b"link"), Outgoing("lb.ws.prod.desired.h1", b"paused")),
            revision,
        )

    office.answer = decide
    command = pause()
    await office.publish(sealed(command))
    result = await office.outcome(command.id)
    stored = await office.admin.read("LB_WS_prod", ["lb.ws.prod.>"])
    assert len(asked) == 4
    assert result.detail == {"revision": "3"}
    assert [s.subject.split(".")[3] for s in stored] == ["desired"] * 3 + [
        "rollout",
        "desired",
        "result",
        "journal",
    ]
    assert [s.sequence for s in stored] == list(range(1, 8))


async def test_a_handler_may_ask_to_be_called_again(office: Office) -> None:
    tries: list[int] = []

    async def busy(context: CommandContext) -> Accepted:
        tries.append(1)
        if len(tries) < 5:
            raise Conflict("somebody was faster")
        return Accepted()

    office.answer = busy
    command = pause()
    await office.publish(sealed(command))
    assert (await office.outcome(command.id)).ok
    assert len(tries) == 5


async def test_replicas_decide_each_command_once(office: Office) -> None:
    for _ in range(2):
        await office.open()
    commands = [pause() for _ in range(40)]
    await asyncio.gather(*(office.publish(sealed(c)) for c in commands))
    for command in commands:
        assert (await office.outcome(command.id)).ok
    await office.done()
    assert sorted(office.asked) == sorted(c.id for c in commands)
    assert len(await office.journal("accepted")) == 40


async def test_a_handler_that_fails_is_asked_again(office: Office) -> None:
    tries: list[str] = []

    async def flaky(context: CommandContext) -> Accepted:
        tries.append(context.command.id)
        if len(tries) == 1:
            raise RuntimeError("the disk is full")
        return Accepted()

    office.answer = flaky
    command = pause()
    await office.publish(sealed(command))
    assert (await office.outcome(command.id)).ok
    assert tries == [command.id] * 2
    assert await office.journal("refused") == []


async def test_events_headers_do_not_let_one_id_stand_for_two_messages(office: Office) -> None:
    """A result and its journal entry share a batch, so their message ids must differ."""
    command = EntitlementPut(
        id="e1",
        workspace="prod",
        issued_at=now(),
        expires_at=now() + timedelta(hours=1),
        name="n",
        module="m",
    )
    headers = events.headers(
        event_id=command.id, source="cli", event_type="entitlement.put", subject="prod", at=now()
    )
    with contextlib.suppress(KeyError):
        del headers["Nats-Msg-Id"]
    await office.publish(
        sealed(command), subject=subjects.command("prod", SERVICE, "entitlement-put"), headers=headers
    )
    result = await office.outcome("e1")
    assert result.refusal is not None
    assert result.refusal.code is Code.COMMAND_UNKNOWN
    ids = [s.headers["Nats-Msg-Id"] for s in await office.admin.read("LB_WS_prod", ["lb.ws.prod.>"])]
    assert len(ids) == len(set(ids)) == 2
