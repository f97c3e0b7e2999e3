"""Attacks on who a host is. Each reaches its target with the defence taken out, and fails with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from support import EmbeddedPlace, Place, eventually, settled
from support_decide import NOW, Host
from support_host import World
from support_identity import Enrolling, enrolling

from loopback.cli import context, creds
from loopback.contracts import envelope, hostrecord, reports, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.identity import Enrol, Granted
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostInvite, HostPut, Record
from loopback.contracts.reports import Status
from loopback.host import identity
from loopback.host.agent import Agent
from loopback.host.decide import Answer
from loopback.services._runtime.bus import Bus
from loopback.services._runtime.settings import read_identity
from loopback.services._runtime.wire import Outgoing
from loopback.services.activation.fleet import Fleet
from loopback.services.eligibility import decide, identities
from loopback.services.telemetry import decide as telemetry
from loopback.services.telemetry.store import FleetStore
from loopback.trust import natsjwt

pytestmark = pytest.mark.broker
PROD = "prod"
BOTH = pytest.mark.parametrize("defended", [False, True], ids=["the-attack", "the-defence"])


@pytest.fixture
async def enrolled(broker: Place) -> AsyncIterator[Enrolling]:
    async with enrolling(broker) as made:
        yield made


@pytest.fixture
async def world(broker: Place, tmp_path: Path) -> AsyncIterator[World]:
    world = World(broker, tmp_path)
    await world.prepare()
    yield world


def key_of(record: Record | None) -> str:
    assert record is not None
    return hostrecord.of(record).public_key


# Tokens and claims


@BOTH
async def test_a_stolen_token_used_a_second_time(
    enrolled: Enrolling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    given = await enrolled.invite("web-1")
    await enrolled.enrol(given, tmp_path / "web-1")
    first = key_of(await enrolled.record("web-1"))
    if not defended:
        monkeypatch.setattr(identities, "judge_claim", lambda _k, claim, *_: (hostrecord.peek(claim), False))
        await enrolled.enrol(given, tmp_path / "thief")
        assert key_of(await enrolled.record("web-1")) != first, "the thief is the host now"
        return
    with pytest.raises(Refused) as refused:
        await enrolled.enrol(given, tmp_path / "thief")
    assert refused.value.code is Code.IDENTITY_TOKEN
    assert key_of(await enrolled.record("web-1")) == first


def forged(place: Place, invite: HostInvite, signed: envelope.Envelope, thief: SigningKey) -> Record:
    """What a stolen eligibility writes: a genuine invitation, and a claim of its own making, for it has no token."""
    claim = hostrecord.claim(invite, SigningKey.generate(), thief, datetime.now(UTC))
    return Record(
        kind="host",
        name=invite.host,
        workspace=PROD,
        envelope=signed,
        claim=claim,
        at=datetime.now(UTC),
        sequence=1,
    )


def believe_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostrecord, "open_claim", lambda signed, _: hostrecord.peek(signed))


@BOTH
async def test_a_stolen_eligibility_that_binds_its_own_key_to_an_invitation(
    broker: Place, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    host, thief = Host(), SigningKey.generate()
    invite = HostInvite(
        **host.signers.times(),
        host="h1",
        claim_key=SigningKey.generate().public.text,
        claim_before=NOW + timedelta(days=1),
    )
    signed = host.signers.command(invite)
    record = forged(broker, invite, signed, thief)
    eligibility = await broker.bus("eligibility")
    subject = subjects.record(PROD, "host", "h1")
    await eligibility.publish(Outgoing(subject, msgspec.json.encode(record)))
    if not defended:
        believe_claims(monkeypatch)

    fleet, store = Fleet(), FleetStore(logging.getLogger("test"))
    await fleet.refresh(await broker.bus("activation"), PROD, "h1")
    stored = await (await broker.bus("telemetry")).last(subjects.STREAM_FLEET, subject)
    assert stored is not None
    store.fold_record(stored)
    known = [fleet.key(PROD, "h1"), store.keys.get((PROD, "h1"))]
    # The host that the thief makes of himself, and the host that was invited and asks for its own record.
    host.record, host.key = signed, thief
    answer = host.ask(claim=record.claim)
    if defended:
        assert known == [None, None]
        assert answer is Code.IDENTITY_CLAIM
    else:
        assert [k.text for k in known if k] == [thief.public.text] * 2
        assert answer is Answer.CHANGE


async def guest(place: Place, given: Any) -> tuple[Client, list[str]]:
    said: list[str] = []

    async def note(error: Exception) -> None:
        said.append(str(error))

    nc = Client()
    await nc.connect(
        place.url,
        **natsjwt.sign_in(lambda: given.jwt, given.key),
        inbox_prefix=subjects.enrol_inbox(given.key.keyid),
        error_cb=note,
    )
    return nc, said


@BOTH
async def test_a_token_that_is_used_for_anything_but_its_own_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    if not defended:
        monkeypatch.setattr(creds, "ENROL", creds.Permissions((">",), (">",)))
    place = EmbeddedPlace(tmp_path / "home")
    try:
        await place.prepare()
        async with enrolling(place) as enrolled:
            given, other = await enrolled.invite("web-1"), await enrolled.invite("web-2")
            nc, said = await guest(place, given)
            heard: list[str] = []

            async def hear(message: Any) -> None:
                heard.append(message.subject)

            await nc.subscribe("lb.>", cb=hear)
            await nc.subscribe(f"{subjects.enrol_inbox(other.key.keyid)}.>", cb=hear)
            for subject in (
                subjects.enrol(other.key.keyid),
                subjects.record(PROD, "host", "web-9"),
                "$JS.API.INFO",
            ):
                await nc.publish(subject, b"x")
            await settled(nc)
            await enrolled.put("web-3", SigningKey.generate())
            written = await (await place.bus()).last(
                subjects.STREAM_FLEET, subjects.record(PROD, "host", "web-9")
            )
            if defended:
                assert len(said) == 5
                assert (heard, written) == ([], None)
            else:
                await eventually(lambda: subjects.record(PROD, "host", "web-3") in heard)
                assert written is not None
            await nc.close()
    finally:
        await place.close()


@BOTH
async def test_a_claim_that_wants_its_answer_where_only_eligibility_may_write(
    enrolled: Enrolling, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """The broker does not check reply subjects: the service would write for whoever asks it."""
    given, target = await enrolled.invite("web-1"), subjects.record(PROD, "host", "web-2")
    claim = hostrecord.claim_to(
        given.invite, "web-1", PROD, given.key, SigningKey.generate(), datetime.now(UTC)
    )
    request = msgspec.json.encode(Enrol(claim=claim))
    if not defended:
        monkeypatch.setattr(
            subjects, "enrol_inbox", lambda _: subjects.record(PROD, "host", "x").rpartition(".")[0]
        )
    nc, _ = await guest(enrolled.place, given)
    await nc.publish(subjects.enrol(given.key.keyid), request, reply=target)
    admin = await enrolled.place.bus()

    async def landed() -> bool:
        return await admin.last(subjects.STREAM_FLEET, target) is not None

    if not defended:
        assert await eventually(landed)
    else:
        answer = await nc.request(subjects.enrol(given.key.keyid), request, timeout=60)  # later, and answered
        assert msgspec.json.decode(answer.data, type=Granted).jwt
        assert not await landed()
    await nc.close()


# A stolen host


async def stolen(place: Place, name: str = "web-1") -> tuple[Client, list[str]]:
    """A connection with a host's own credentials, in a thief's hands."""
    said: list[str] = []

    async def note(error: Exception) -> None:
        said.append(str(error))

    path = place.home / "creds" / f"{place.host(PROD, name)}.creds"
    nc = Client()
    await nc.connect(
        place.url,
        user_credentials=str(path),
        inbox_prefix=f"_INBOX.{read_identity(path).name}",
        error_cb=note,
    )
    return nc, said


@BOTH
async def test_a_stolen_host_that_lands_a_forged_report_on_anothers_subject_by_reply_subject(
    broker: Place, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """What it can have the broker send there is what is stored; here a report that it forged and had stored as content."""
    victim, thief = SigningKey.generate(), SigningKey.generate()
    lie = Status(
        host="web-2",
        workspace=PROD,
        incarnation="i",
        seq=9,
        at=datetime.now(UTC),
        agent="degraded",
        generation=3,
    )
    subject = subjects.from_host(PROD, "web-2", "status")
    admin = await broker.bus()
    await broker.workspace(PROD)
    sealed = envelope.seal_bytes(envelope.REPORT, msgspec.json.encode(lie), thief)
    await admin.publish(Outgoing(subjects.blob("ab" * 32, 0), sealed))
    nc, said = await stolen(broker)
    await nc.publish(subject, sealed)
    await settled(nc)
    assert len(said) == 1, "it cannot write there itself"
    await nc.publish(
        subjects.direct_get(subjects.STREAM_BLOBS, subjects.blob("ab" * 32, 0)), b"", reply=subject
    )

    async def landed() -> Any:
        return await admin.last(subjects.STREAM_REPORTS, subject)

    stored = await eventually(landed)
    assert stored.data == sealed, "but the broker does"
    if not defended:
        monkeypatch.setattr(
            reports, "open_signed", lambda data, *_: envelope.payload_of(envelope.parse(data))
        )
        report = reports.open_report(stored.data, stored.subject, lambda *_: victim.public)
        view = telemetry.fold_view(None, report, stored.time)
        assert view is not None
        assert (view.host, view.state) == ("web-2", "degraded"), "the fleet view shows the lie"
    else:
        with pytest.raises(Refused) as refused:
            reports.open_report(stored.data, stored.subject, lambda *_: victim.public)
        assert refused.value.code is Code.REPORT_IMPERSONATION
    await nc.close()


@BOTH
async def test_a_stolen_host_that_has_a_consumer_deliver_to_anothers_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    if not defended:
        known = creds.HOST
        monkeypatch.setattr(
            creds, "HOST", creds.Permissions((*known.publish, "$JS.API.CONSUMER.CREATE.>"), known.subscribe)
        )
    place = EmbeddedPlace(tmp_path / "home")
    try:
        await place.prepare()
        await place.workspace(PROD)
        admin = await place.bus()
        await admin.publish(Outgoing(subjects.desired(PROD, "web-9"), b"another host's document"))
        victim, _ = await stolen(place, "web-2")
        heard: list[bytes] = []

        async def hear(message: Any) -> None:
            heard.append(message.data)

        await victim.subscribe(subjects.to_host(PROD, "web-2", "desired"), cb=hear)
        await victim.flush()
        nc, said = await stolen(place)
        wanted = {
            "stream_name": "LB_WS_prod",
            "config": {
                "deliver_subject": subjects.to_host(PROD, "web-2", "desired"),
                "ack_policy": "none",
                "name": "x",
            },
        }
        await nc.publish(
            "$JS.API.CONSUMER.CREATE.LB_WS_prod.x", msgspec.json.encode(wanted), reply=nc.new_inbox()
        )
        await settled(nc)
        if defended:
            assert len(said) == 1
            assert "permissions violation" in said[0]
            info = await admin.api("CONSUMER.LIST.LB_WS_prod", {})
            assert (info["total"], heard) == (0, [])
        else:
            await eventually(lambda: b"another host's document" in heard)
        await nc.close()
        await victim.close()
    finally:
        await place.close()


@BOTH
@pytest.mark.parametrize("what", ["another key", "another workspace", "an older one"])
async def test_credentials_that_a_stolen_host_lands_on_anothers_identity_subject(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool, what: str
) -> None:
    """By a direct get with a reply subject: whatever is stored can be made to arrive there."""
    home = world.place.home
    account = natsjwt.public("account", creds.read_key(home, "account").public)
    role, now = creds.read_key(home, "role-host"), datetime.now(UTC)
    key = SigningKey.generate().public if what == "another key" else world.key.public
    tag = "ws:lab" if what == "another workspace" else "ws:prod"
    at = now - timedelta(days=9) if what == "an older one" else now + timedelta(seconds=5)
    wrong = natsjwt.user(role, account, key, subjects.token(world.host), (tag,), at, now + timedelta(hours=1))
    stored = subjects.blob("cd" * 32, 0)
    await world.bus.publish(Outgoing(stored, msgspec.json.encode(Granted(at=now, jwt=wrong))))
    if not defended:
        monkeypatch.setattr(identity, "check_jwt", lambda *_: None)

        async def taken(*_: Any) -> bool:
            return True

        real = natsjwt.read
        monkeypatch.setattr("loopback.host.link.Link.probe", taken)
        monkeypatch.setattr(
            natsjwt,
            "read",
            lambda token: msgspec.structs.replace(real(token), iat=2**32) if token == wrong else real(token),
        )
    kept = world.config.state_dir / "identity.json"
    async with world.agent() as agent:
        await eventually(lambda: hasattr(agent, "link") and agent.link.connected)
        before = agent.identity.jwt()
        nc, _ = await stolen(world.place, "thief")
        target = subjects.to_host(PROD, world.host, "identity")
        await nc.publish(subjects.direct_get(subjects.STREAM_BLOBS, stored), b"", reply=target)
        await nc.flush()
        if not defended:
            await eventually(lambda: kept.exists() and wrong.encode() in kept.read_bytes())
        else:
            seen: list[bytes] = []
            whole = agent.keeper._take

            async def take(data: bytes) -> None:
                try:
                    await whole(data)
                finally:
                    seen.append(data)

            agent.keeper._take = take  # type: ignore[method-assign]
            await nc.publish(subjects.direct_get(subjects.STREAM_BLOBS, stored), b"", reply=target)
            await eventually(lambda: seen)
            assert not kept.exists()
            assert agent.identity.jwt() == before
            assert agent.link.connected
        await nc.close()


# Replays, and hosts that are not what they were


@BOTH
async def test_a_replayed_command_that_would_bring_a_revoked_host_back(
    enrolled: Enrolling, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    key = SigningKey.generate()
    command = HostPut(**context.new_command_fields(PROD), host="web-1", public_key=key.public.text)
    await enrolled.session.send(command, "eligibility")
    admin = await enrolled.place.bus()
    sent = subjects.command(PROD, "eligibility", "host-put")
    genuine = await admin.last(subjects.STREAM_COMMANDS, sent)
    assert genuine is not None
    await enrolled.put("web-1", key, absent=True)
    if not defended:
        whole = Bus.last

        async def forgetful(self: Bus, stream: str, subject: str) -> Any:
            return (
                None
                if ".result." in subject and self.name == "eligibility"
                else await whole(self, stream, subject)
            )

        monkeypatch.setattr(Bus, "last", forgetful)
        batch, publish = Bus.batch, Bus.publish

        def later(out: Outgoing, **changes: Any) -> Outgoing:
            """As it would be after the broker's two minutes of remembering message ids."""
            headers = {k: v for k, v in out.headers.items() if k != "Nats-Msg-Id"}
            return msgspec.structs.replace(out, headers=headers, **changes)

        async def careless(self: Bus, outs: Any, *, expected_last: int | None = None) -> int:
            outs = [later(out, expected_subject_seq=None) for out in outs]
            return await batch(self, outs, expected_last=expected_last)

        async def published(self: Bus, out: Outgoing) -> int:
            return await publish(self, later(out))

        monkeypatch.setattr(Bus, "batch", careless)
        monkeypatch.setattr(Bus, "publish", published)
        monkeypatch.setattr(decide, "check_newer", lambda command, before: None)  # it is the older word, too
    operator = await enrolled.place.bus("operator")
    place = await operator.publish(Outgoing(sent, genuine.data))

    async def back() -> bool:
        record = await enrolled.record("web-1")
        return record is not None and not hostrecord.of(record).absent

    if not defended:
        assert await eventually(back)
        return

    async def refused() -> bool:
        return any(
            e.refusal is not None and e.refusal.code is Code.COMMAND_REPLAYED
            for e in await enrolled.journal("refused")
        )

    assert await eventually(refused)
    assert place > genuine.sequence
    assert not await back()


@BOTH
async def test_a_cloned_host_obeys_nothing_that_was_made_for_the_original(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, defended: bool
) -> None:
    first = await world.release("1.0", policy=1)
    async with world.agent() as agent:
        await world.reached(await world.desire(first))
        original = agent.state.incarnation
    copied = msgspec.structs.replace(world.config, state_dir=tmp_path / "copy")
    shutil.copytree(world.config.state_dir, copied.state_dir, symlinks=True)
    if not defended:
        monkeypatch.setattr(identity, "bound", lambda state, *_: (state, None))

    second = await world.release("1.1", policy=2)
    entry = world.signers.entry(second, 2, expected=first, rollout="r2")
    document = world.signers.desired(world.host, world.record, entry, incarnation=original)
    clone = Agent(copied, machine=lambda: "the machine of the copy")
    task = asyncio.get_running_loop().create_task(clone.run())
    try:
        await eventually(lambda: hasattr(clone, "link") and clone.link.connected)
        await world.publish(world.signers.sealed(document))
        if not defended:
            await eventually(lambda: clone.states.get("tiny") and clone.states["tiny"].promoted == second)
            assert clone.state.incarnation == original
        else:
            await eventually(
                lambda: clone.refusal is not None and clone.refusal.code is Code.HOST_INCARNATION
            )
            assert clone.state.incarnation != original
            assert clone.states["tiny"].promoted == first
    finally:
        clone.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await task
