"""Every kind of credential, every kind of subject and request, tried against the real server: no grant that is not meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nats.aio.client
import pytest
from golden_contracts import SHA
from support import Place, settled
from support_authorisation import ENROL, EVERYBODY, HOST, WIDE, meant, rows, subjects_of, unknown_requests

from loopback.services._runtime.broker import server_program
from loopback.services._runtime.settings import read_identity

pytestmark = pytest.mark.broker
BATCH = 500  # subjects between two looks at what was refused
ROWS = list(rows())
SUBJECTS = subjects_of()


class Probe:
    """A bare connection that notes what the server refuses. nats-py hands its words on in lower case."""

    def __init__(self) -> None:
        self.nc = nats.aio.client.Client()
        self.refused: set[tuple[str, str]] = set()

    async def connect(self, place: Place, identity: str) -> Probe:
        async def note(problem: Exception) -> None:
            words = str(problem)
            verb = "publish" if "publish to" in words else "subscribe"
            self.refused.add((verb, words.split('"')[1]))

        path = place.home / "creds" / f"{identity}.creds"
        await self.nc.connect(
            place.url,
            user_credentials=str(path),
            inbox_prefix=f"_INBOX.{'enrol.' * identity.startswith('guest')}{read_identity(path).name}",
            error_cb=note,
        )
        return self

    async def allowed(self, verb: str, subjects: list[str]) -> set[str]:
        """Those that the server let through."""
        found: set[str] = set()
        for start in range(0, len(subjects), BATCH):
            some = subjects[start : start + BATCH]
            self.refused.clear()
            if verb == "publish":
                for subject in some:
                    await self.nc.publish(subject, b"")
                await settled(self.nc)
            else:
                made: list[Any] = [await self.nc.subscribe(subject) for subject in some]
                await settled(self.nc)
                for subscription in made:
                    await subscription.unsubscribe()
            found |= {s for s in some if (verb, s.lower()) not in self.refused}
        return found


@pytest.mark.parametrize("who", EVERYBODY)
async def test_each_identity_may_do_what_is_meant_and_nothing_else(broker: Place, who: str) -> None:
    identity = {HOST: lambda: broker.host("prod", "web-1"), ENROL: lambda: broker.guest(SHA)}.get(
        who, lambda: who
    )()
    probe = await Probe().connect(broker, identity)
    try:
        for verb, tried in (("publish", SUBJECTS), ("subscribe", [*SUBJECTS, *WIDE])):
            allowed = await probe.allowed(verb, tried)
            wanted = {s for s in tried if meant(who, verb, s, ROWS)}
            unintended, missing = sorted(allowed - wanted), sorted(wanted - allowed)
            assert not unintended, f"{who} may {verb}, and nobody meant it to: {unintended[:20]}"
            assert not missing, f"{who} may not {verb}: {missing[:20]}"
    finally:
        await probe.nc.close()


async def test_a_grant_too_many_would_be_seen(broker: Place) -> None:
    """The same comparison, for an identity that may do everything, taken for a host."""
    probe = await Probe().connect(broker, "admin")
    try:
        tried = [s for s in SUBJECTS if s.startswith("lb.")]
        allowed = await probe.allowed("publish", tried)
        assert {s for s in tried if not meant(HOST, "publish", s, ROWS)} & allowed
    finally:
        await probe.nc.close()


def test_the_matrix_holds_every_request_that_this_server_knows() -> None:
    """The names are read from the server's program: one that a newer server brings has to be thought about."""
    assert unknown_requests(Path(server_program())) == []
    assert len(SUBJECTS) > 1500


def test_no_row_is_idle_and_every_row_says_why() -> None:
    for row in ROWS:
        assert row.why
        assert any(
            meant(who, row.verb, subject, [row]) for who in row.who for subject in [*SUBJECTS, *WIDE]
        ), f"no subject of the matrix shows that {row} is needed"
