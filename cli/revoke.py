"""Take an identity on the bus away: written down for good, and told to every server that runs.

The account's JWT carries the revocations. A server that is given a newer one disconnects whom it revokes and does not let them
in again; it keeps the JWT on its disk, and 'loopback up' writes the same revocations into each later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from loopback.cli import creds
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.services._runtime.settings import authority
from loopback.trust import natsjwt, tls

UPDATE: Final = "$SYS.REQ.CLAIMS.UPDATE"
ANSWER_S: Final = 15.0  # until the first server has taken it
OTHERS_S: Final = 0.5  # and then for the others of a cluster; each answers for itself


async def revoke(
    home: Path, url: str, key: PublicKey, until: datetime = creds.FOR_GOOD, *, ca: Path | None = None
) -> int:
    """Revoke a user's key: whoever is connected with it is disconnected. Returns how many servers have said so.

    0: none could be reached; it holds from their next start on this home on. Raises Refused where `home` does not hold the
    installation's keys.
    """
    creds.read_key(home, "account")
    creds.revoke(home, natsjwt.public("user", key), until)
    try:
        return await push(home, url, ca=ca)
    except (nats.errors.Error, OSError, TimeoutError):
        creds.write_account(home)
        return 0


async def push(home: Path, url: str, *, ca: Path | None = None) -> int:
    """Give every server that runs the account's JWT as it should be now; how many took it.

    Raises Refused(IDENTITY_REVOKED) where one refuses it, nats.errors.Error, OSError or TimeoutError where none answers.
    """
    token = creds.account_jwt(home)
    jwt, key = natsjwt.read_creds(creds.system_creds(home, datetime.now(UTC)))
    nc = await nats.connect(
        url.split(","),
        **natsjwt.sign_in(lambda: jwt, key),
        name="loopback-push",
        inbox_prefix=subjects.inbox("system").encode(),
        connect_timeout=3,
        allow_reconnect=False,
        max_reconnect_attempts=1,  # 0 would be for ever
        reconnect_time_wait=0.1,
        error_cb=_quiet,
        **tls.options(url, ca or authority(home)),
    )
    try:
        return await _ask_all(nc, token)
    finally:
        await nc.close()


async def _ask_all(nc: Client, token: str) -> int:
    answers: asyncio.Queue[Msg] = asyncio.Queue()
    inbox = nc.new_inbox()
    await nc.subscribe(inbox, cb=answers.put)
    await nc.publish(UPDATE, token.encode(), reply=inbox)
    taken, deadline = 0, time.monotonic() + ANSWER_S
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(TimeoutError):
            answer = await asyncio.wait_for(answers.get(), left)
            if answer.headers and answer.headers.get("Status") == "503":
                raise nats.errors.NoRespondersError
            _check(answer.data)
            taken += 1
            deadline = time.monotonic() + OTHERS_S
    if not taken:
        raise TimeoutError("no server took the account's JWT")
    return taken


def _check(data: bytes) -> None:
    found: dict[str, Any] = msgspec.json.decode(data)
    if found.get("error") or found.get("data", {}).get("code") != 200:
        said = found.get("error") or found.get("data")
        raise Refused(
            Code.IDENTITY_REVOKED,
            f"a server does not take the account's JWT: {said}",
            "check that this home is the servers' own",
        )


async def _quiet(_: Exception) -> None:
    """What matters reaches the caller as an exception."""
