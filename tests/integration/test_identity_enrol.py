"""A host makes its own key, and a token that works once lets it say so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from support import Place
from support_cli import Operator, services
from support_identity import Enrolling, enrolling

from loopback.cli import enrol, hostfolder, token
from loopback.contracts import hostrecord, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.host import config
from loopback.trust import natsjwt

pytestmark = pytest.mark.broker


@pytest.fixture
async def world(broker: Place) -> AsyncIterator[Enrolling]:
    async with enrolling(broker) as made:
        yield made


async def test_a_machine_becomes_a_host_with_a_key_that_never_leaves_it(
    broker, capsys, tmp_path: Path
) -> None:
    loopback = Operator(broker, capsys)
    async with services(broker):
        assert (await loopback("workspace", "put", "prod"))[0] == 0
        code, line, said = await loopback(
            "host", "invite", "web-1", "--label", "role=web", "--address", "192.0.2.7", "--valid", "30m"
        )
        assert code == 0 and line.startswith("lbt1.") and line.count("\n") == 1 and "secret" in said
        assert len(line) < 1500
        code, out, _ = await loopback("host", "invites", "--json")
        assert [(i["host"], i["labels"]) for i in json.loads(out)] == [("web-1", {"role": "web"})]
        assert json.loads((await loopback("hosts", "--json"))[1]) == [], "an invitation is no host"

        assert (await loopback("host", "invite", "web-2"))[0] == 0
        assert (await loopback("host", "invites", "--withdraw", "web-2"))[0] == 0
        code, _, said = await loopback("host", "invites", "--withdraw", "web-2")
        assert code == 2
        assert "no invitation is open" in said

        file, folder = tmp_path / "token", tmp_path / "web-1"
        file.touch(0o600)
        file.write_text(line)
        code, out, said = await loopback(
            "host", "enroll", "--token-file", str(file), "--out", str(folder), "--interface", "eth7"
        )
        assert (code, out.strip()) == (0, str(folder / "host.toml")), said
        made = config.load(folder / "host.toml")
        assert (made.host, made.workspace, made.modules) == (
            "web-1",
            "prod",
            {"firewall": {"interfaces": ["eth7"]}},
        )
        assert made.root.read_bytes() == (broker.home / "tuf" / "root.json").read_bytes()
        assert made.creds.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o77 == 0
        assert not list(folder.glob("*.new"))

        (row,) = json.loads((await loopback("hosts", "--json"))[1])
        assert (row["host"], row["labels"], row["addresses"]) == ("web-1", {"role": "web"}, ["192.0.2.7"])
        assert json.loads((await loopback("host", "invites", "--json"))[1]) == []
        jwt, key = natsjwt.read_creds(made.creds.read_text())
        claims = natsjwt.read(jwt)
        assert claims.expires_at is not None
        assert claims.expires_at - claims.issued_at == timedelta(days=30)
        assert natsjwt.seed("user", key).encode() not in b"".join(
            p.read_bytes() for p in broker.home.rglob("*") if p.is_file()
        ), "the key is nowhere but on the host"
        assert (await loopback("host", "enroll", "--token-file", str(file), "--out", str(folder)))[0] == 0, (
            "again"
        )
        code, _, said = await loopback("host", "enrol", line.strip(), "--out", str(tmp_path / "thief"))
        assert code == 2 and "used already" in said and Code.IDENTITY_TOKEN in said
        assert not (tmp_path / "thief" / "host.toml").exists()


async def test_who_enrolled_reports_and_reads_as_a_host_does(world: Enrolling, tmp_path: Path) -> None:
    made = config.load(await world.enrol(await world.invite("web-1"), tmp_path / "h"))
    bus = await world.connect(made.creds)
    await bus.publish(subjects.from_host("prod", "web-1", "heartbeat"), b"x")
    await bus.flush()
    admin = await world.place.bus()
    assert await admin.last(subjects.STREAM_REPORTS, subjects.from_host("prod", "web-1", "heartbeat"))


async def test_an_enrolment_that_was_cut_off_goes_on_with_the_same_key(
    world: Enrolling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = await world.invite("web-1"), tmp_path / "h"
    whole = hostfolder.write
    left: list[int] = []

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "cut off")
        whole(path, data)

    monkeypatch.setattr(hostfolder, "write", write)
    for number in (
        1,
        2,
        2,
        3,
        4,
    ):  # before the key, then the root, the credentials, host.toml, and the end of it all
        left[:] = [number]
        with pytest.raises(OSError, match="cut off"):
            await world.enrol(given, out)
    left[:] = [100]
    path = await world.enrol(given, out)
    record = await world.record("web-1")
    _, key = natsjwt.read_creds(config.load(path).creds.read_text())
    assert record is not None
    assert hostrecord.of(record).public_key == key.public.text
    assert len(await world.journal("enrolled")) == 1


async def test_of_two_machines_with_one_token_exactly_one_becomes_the_host(
    broker: Place, tmp_path: Path
) -> None:
    async with enrolling(broker, replicas=3) as world:
        given = await world.invite("web-1")
        tries = [world.enrol(given, tmp_path / str(n)) for n in range(6)]
        answers = await asyncio.gather(*tries, return_exceptions=True)
        record = await world.record("web-1")
    won = [a for a in answers if isinstance(a, Path)]
    lost = [a for a in answers if isinstance(a, Refused)]
    assert (len(won), len(lost), {r.code for r in lost}) == (1, 5, {Code.IDENTITY_TOKEN})
    _, key = natsjwt.read_creds((won[0].parent / "host.creds").read_text())
    assert record is not None and hostrecord.of(record).public_key == key.public.text


@pytest.mark.parametrize("how", ["withdrawn", "replaced", "expired", "unknown", "recorded"])
async def test_a_token_that_opens_nothing_is_refused_in_words(
    world: Enrolling, tmp_path: Path, how: str
) -> None:
    given = await world.invite("web-1", valid=timedelta(seconds=2 if how == "expired" else 600))
    words = {
        "withdrawn": "it was withdrawn",
        "replaced": "a newer invitation took its place",
        "expired": "expired",
        "unknown": "another invitation",
        "recorded": "newer than its invitation",
    }
    match how:
        case "withdrawn":
            await enrol.take_back(world.session, "prod", "web-1")
        case "replaced":
            await world.invite("web-1")
        case "expired":
            await asyncio.sleep(2.1)  # the server's own clock is what refuses
        case "unknown":
            await world.invite("web-2")
            other = await world.invite("web-2")
            given = msgspec.structs.replace(given, host="web-2", invite=other.invite)
        case "recorded":
            await world.put("web-1", SigningKey.generate())
    with pytest.raises(Refused) as refused:
        await world.enrol(given, tmp_path / "h")
    assert refused.value.code is Code.IDENTITY_TOKEN
    assert words[how] in refused.value.reason
    assert not (tmp_path / "h" / "host.creds").exists()


async def test_a_token_that_ends_while_it_is_connected_is_told_to_have_expired(
    world: Enrolling, tmp_path: Path
) -> None:
    """The server lets it in until its last second is over, and takes the connection away then: no service ever hears of it."""
    given = await world.invite("web-1", valid=timedelta(seconds=2))
    until = natsjwt.read(given.jwt).expires_at
    assert until is not None
    await asyncio.sleep((until - datetime.now(UTC)).total_seconds() + 0.01)
    with pytest.raises(Refused) as refused:
        await world.enrol(given, tmp_path / "h")
    assert refused.value.code is Code.IDENTITY_TOKEN and "expired" in refused.value.reason
    assert not (tmp_path / "h" / "host.creds").exists()


async def test_a_token_cut_off_while_eligibility_is_away_is_told_to_have_expired(
    broker: Place, tmp_path: Path
) -> None:
    async with enrolling(broker) as world:
        given = await world.invite("web-1", valid=timedelta(seconds=3))
    with pytest.raises(Refused) as refused:
        await enrol.enrol(given, tmp_path / "h", wait_s=60.0)
    assert refused.value.code is Code.IDENTITY_TOKEN and "expired" in refused.value.reason


async def test_a_known_host_comes_with_a_new_key_and_its_old_one_counts_until_then(
    world: Enrolling, tmp_path: Path
) -> None:
    out = tmp_path / "h"
    path = await world.enrol(await world.invite("web-1"), out)
    before = await world.record("web-1")
    path.write_text(path.read_text().replace("heartbeat_s = 10.0", "heartbeat_s = 3.0"))
    with pytest.raises(Refused, match="already a host"):
        await world.invite("web-1")
    given = await world.invite("web-1", replace=True)
    assert await world.record("web-1") == before
    with pytest.raises(Refused, match="exists"):
        await world.enrol(given, out)
    await world.enrol(given, out, replace=True)
    after = await world.record("web-1")
    assert before is not None and after is not None
    assert hostrecord.of(after).public_key != hostrecord.of(before).public_key
    assert config.load(path).heartbeat_s == 3.0, "the owner's settings stay"
    with pytest.raises(Refused, match="is the folder of 'web-1'"):
        await world.enrol(await world.invite("web-2"), out, replace=True)


async def test_nothing_is_written_that_the_token_does_not_vouch_for(world: Enrolling, tmp_path: Path) -> None:
    given = await world.invite("web-1")
    for wrong, code in (
        (msgspec.structs.replace(given, root=bytes(32)), Code.TUF_INVALID),
        (msgspec.structs.replace(given, host="web-2"), Code.IDENTITY_TOKEN),
    ):
        with pytest.raises(Refused) as refused:
            await world.enrol(wrong, tmp_path / "h")
        assert refused.value.code is code
        assert not (tmp_path / "h" / "root.json").exists()


async def test_without_the_issuing_keys_invitations_are_refused_and_all_else_goes_on(broker: Place) -> None:
    path = broker.home / "creds" / "eligibility.issuer"
    path.unlink()
    async with enrolling(broker) as world:
        with pytest.raises(Refused, match="there is no such file"):
            await world.invite("web-1")
        await world.put("web-1", SigningKey.generate())


def test_a_token_that_was_cut_or_mistyped_is_told_from_one_that_is_refused() -> None:
    given = token.Token(
        url="nats://h:1",
        host="h",
        workspace="w",
        invite="i",
        seed=bytes(32),
        jwt="a.b.c",
        root=bytes(32),
        root_version=1,
    )
    line = token.write(given)
    assert token.read(f"  {line}\n") == given
    for bad in (
        "",
        line[:-3],
        line + "AAAA",
        line.replace("lbt1.", "lbt2."),
        "lbt1.é",
        "lbt1.",
        line[:20] + "A" + line[21:],
    ):
        if bad == line:
            continue
        with pytest.raises(Refused) as refused:
            token.read(bad)
        assert refused.value.code is Code.IDENTITY_TOKEN


def test_how_long_a_token_is_valid_is_written_as_people_write_it() -> None:
    assert enrol.duration("30m") == timedelta(minutes=30)
    assert enrol.duration("7d") == timedelta(days=7)
    for bad in ("", "7", "0d", "-1h", "1w"):
        with pytest.raises(Refused):
            enrol.duration(bad)


async def test_a_host_that_is_revoked_is_disconnected_and_its_new_key_is_let_in(
    world: Enrolling, capsys, tmp_path: Path
) -> None:
    loopback = Operator(world.place, capsys)
    made = config.load(await world.enrol(await world.invite("web-1"), tmp_path / "h"))
    cut = asyncio.Event()

    async def note(_: Exception | None = None) -> None:
        cut.set()

    await world.connect(made.creds, disconnected_cb=note, error_cb=note)
    code, _, said = await loopback("host", "revoke", "web-1")
    assert code == 0 and "1 server told" in said
    async with asyncio.timeout(60):
        await cut.wait()
    with pytest.raises(Refused, match="exists"):
        await world.enrol(await world.invite("web-1"), tmp_path / "h")
    again = config.load(await world.enrol(await world.invite("web-1"), tmp_path / "h", replace=True))
    await world.connect(again.creds)

    given = await world.invite("web-1", replace=True)
    before = await world.connect(again.creds, disconnected_cb=note, error_cb=note)
    await world.enrol(given, tmp_path / "h", replace=True)
    assert before.is_connected, "the operator says when the old key ends"
    cut.clear()
    code, _, said = await loopback("host", "revoke", "web-1", "--old-keys")
    assert code == 0 and "2 earlier keys" in said
    async with asyncio.timeout(60):
        await cut.wait()
    await world.connect(again.creds)
    code, _, said = await loopback("host", "revoke", "web-9")
    assert code == 2 and "no record names" in said


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
async def test_a_token_that_others_may_read_is_not_taken(broker, capsys, tmp_path: Path, mode: int) -> None:
    """Whoever reads it first becomes the host; as with passphrase files, and ssh's keys."""
    loopback, file = Operator(broker, capsys), tmp_path / "token"
    file.write_text("lbt1.nothing")
    file.chmod(mode)
    code, out, said = await loopback(
        "host", "enroll", "--token-file", str(file), "--out", str(tmp_path / "web-1")
    )
    assert (code, out) == (2, "")
    assert f"others may read the token file {file}" in said and Code.IDENTITY_TOKEN in said
    assert f"chmod 600 {file}" in said and "--withdraw" in said
    file.chmod(0o600)
    code, _, said = await loopback(
        "host", "enroll", "--token-file", str(file), "--out", str(tmp_path / "web-1")
    )
    assert code == 2 and "others may read" not in said, "what stands in it is read now"
