"""`loopback host invite`, `invites` and `enroll`: a host makes its own key, and a one-time token lets it say so."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import nats
import nats.errors
import typer
from nats.aio.client import Client

from loopback.cli import connecting, context, fleetio, hostfolder, token
from loopback.cli.token import Token
from loopback.contracts import envelope, hostrecord, identity, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.identity import Enrol, Granted
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostInvite, Record, decode_command
from loopback.host import config
from loopback.trust import natsjwt, tls

CONNECT_S: Final = 3.0  # one connection, where there is a server
ANSWER_S: Final = 5.0  # one attempt; a claim may be sent again as often as one likes
AGAIN_S: Final = 0.5
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def invite_command(
    host: Annotated[str, typer.Argument(help="The host's name.")],
    workspace: Annotated[str | None, typer.Option("--workspace", help="The host's workspace.")] = None,
    label: fleetio.Labels = None,
    address: Annotated[
        list[str] | None, typer.Option(metavar="IP", help="One of its addresses. May be repeated.")
    ] = None,
    valid: Annotated[
        str, typer.Option(metavar="TIME", help="How long the token may be used: 30m, 24h, 7d.")
    ] = "24h",
    url: Annotated[
        str | None, typer.Option(help="Where the host finds the bus, if not where this command does.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the authority that signed the bus's certificate; travels in the token."
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="The host is known: let it come with a new key.")
    ] = False,
) -> None:
    """Invite a host: print a one-time token with which that machine makes a key of its own and joins.

    Neither you nor any service ever sees the key. The token is a secret until it is used, so hand it over as one:

      umask 077
      loopback host invite web-1 --workspace prod --label role=web --address 192.0.2.7 > token
      ssh web-1 loopback host enroll --token-file /dev/stdin --out /etc/loopback < token

    A host that has its key already, and is to get a new one: the same with --replace; its old key counts until then.
    """

    async def run() -> tuple[str, datetime]:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            made, until = await invite(
                session, host=host, workspace=place, labels=fleetio.labels(label), addresses=address or [],
                valid=duration(valid), url=url, ca=ca, replace=replace,
            )  # fmt: skip
            return token.write(made), until

    line, until = asyncio.run(run())
    typer.echo(
        f"{host} may join once with this token until {until:%Y-%m-%d %H:%M} UTC. It is a secret and is not shown again.\n"
        f"There: loopback host enroll --token-file FILE --out DIR"
        + (f" --replace\nThen, here: loopback host revoke {host} --old-keys" if replace else ""),
        err=True,
    )
    typer.echo(line)


async def invite(
    session: context.Session,
    *,
    host: str,
    workspace: str,
    labels: dict[str, str],
    addresses: list[str],
    valid: timedelta = timedelta(hours=24),
    url: str | None = None,
    ca: Path | None = None,
    replace: bool = False,
) -> tuple[Token, datetime]:
    """Invite a host: its token, and until when that may be used. Raises Refused."""
    hostfolder.check(host, workspace, addresses)
    root = hostfolder.pinned_root(session.context.home)
    if not replace and any(h.host == host for h in await fleetio.hosts(session, workspace)):
        raise Refused(
            Code.NAME_INVALID,
            f"{host!r} is already a host of {workspace!r}",
            "choose another name, or let it come with a new key with --replace",
        )
    key = SigningKey.generate()
    command = HostInvite(
        **context.new_command_fields(workspace),
        host=host,
        claim_key=key.public.text,
        claim_before=datetime.now(UTC) + valid,
        labels=labels,
        addresses=tuple(addresses),
    )
    result = await session.send(command, "eligibility")
    try:
        version = int(msgspec.json.decode(root)["signed"]["version"])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
        raise Refused(Code.TUF_INVALID, "the pinned root.json does not read", "restore it") from None
    authority = ca or session.context.ca
    made = Token(
        url=url or session.context.url,
        host=host,
        workspace=workspace,
        invite=command.id,
        seed=key.raw,
        jwt=result.detail["jwt"],
        root=hashlib.sha256(root).digest(),
        root_version=version,
        ca=await asyncio.to_thread(authority.read_text) if authority else "",
    )
    return made, command.claim_before


async def take_back(session: context.Session, workspace: str, host: str) -> None:
    """Withdraw the open invitation of a host. Raises Refused(IDENTITY_TOKEN) where there is none."""
    found = next((i for i, _ in await opened(session, workspace) if i.host == host), None)
    if found is None:
        raise Refused(
            Code.IDENTITY_TOKEN,
            f"no invitation is open for {host!r} in {workspace!r}",
            "see 'loopback host invites'",
        )
    await session.send(
        msgspec.structs.replace(found, **context.new_command_fields(workspace), absent=True), "eligibility"
    )


async def opened(session: context.Session, workspace: str) -> list[tuple[HostInvite, Record]]:
    """Invitations that may still be taken, by workspace and host. `*`: of every workspace."""
    known = {
        (record.workspace, record.name): record.sequence
        for record in await fleetio.stored_records(session, hostrecord.KIND, workspace)
    }
    found = []
    for record in await fleetio.stored_records(session, hostrecord.INVITE, workspace):
        command = decode_command(envelope.payload_of(record.envelope))
        taken = known.get((record.workspace, record.name), 0) >= record.sequence
        if isinstance(command, HostInvite) and not command.absent and not taken:
            found.append((command, record))
    return [(c, r) for c, r in found if c.claim_before > datetime.now(UTC)]


def invites_command(
    workspace: Annotated[str | None, typer.Option("--workspace", help="Only this workspace's.")] = None,
    withdraw: Annotated[
        str | None,
        typer.Option("--withdraw", metavar="HOST", help="Take back the one that is open for this host."),
    ] = None,
    json: fleetio.Json = False,
) -> None:
    """Invitations that nobody has taken yet; or take one back: its token opens nothing any more.

    loopback host invites
    loopback host invites --withdraw web-1
    """

    async def run() -> list[tuple[HostInvite, Record]]:
        async with context.connect() as session:
            if withdraw is not None:
                await take_back(session, await fleetio.only_workspace(session, workspace), withdraw)
                return []
            return await opened(session, await fleetio.any_workspace(session, workspace))

    rows = asyncio.run(run())
    if withdraw is not None:
        typer.echo(f"the invitation of {withdraw} is taken back", err=True)
        return
    if json:
        fleetio.print_json(
            [
                {
                    "host": i.host, "workspace": i.workspace, "until": i.claim_before, "labels": i.labels,
                    "addresses": i.addresses, "invitation": i.id, "by": record.operators,
                }
                for i, record in rows
            ]
        )  # fmt: skip
        return
    fleetio.table(
        ("HOST", "WORKSPACE", "UNTIL", "BY", "LABELS"),
        [
            (
                i.host,
                i.workspace,
                f"{i.claim_before:%Y-%m-%d %H:%M}Z",
                ", ".join(r.operators),
                fleetio.label_text(i.labels),
            )
            for i, r in rows
        ],
    )
    if not rows:
        typer.echo("no invitation is open; make one with 'loopback host invite'", err=True)


def enroll_command(
    given: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOKEN]", help="The token; better in a file, where no process list shows it."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for this host's key, credentials and host.toml.")] = Path(
        "/etc/loopback"
    ),
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File with the token that only you may read; /dev/stdin reads it from a pipe.",
        ),
    ] = None,
    interface: fleetio.Interfaces = None,
    heartbeat: fleetio.Heartbeat = config.HEARTBEAT_S,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="This folder holds a host: give it a new key, keep its settings."),
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the bus and eligibility.")] = 30.0,
) -> None:
    """Make this machine a host, with the token of 'loopback host invite'.

    The key is made here, written before anything is sent, and never leaves this machine. What is fetched is checked against
    the token before it is written. A second run with the same token and folder goes on where the first one ended:

      loopback host enroll --token-file token --out /etc/loopback --interface eth0
      loopback host run --config /etc/loopback/host.toml
    """
    if (given is None) == (token_file is None):
        raise Refused(
            Code.IDENTITY_TOKEN, "one token is needed", "name --token-file FILE, or give the TOKEN itself"
        )
    text = given if given is not None else _read(token_file or Path())
    firewall: dict[str, config.Setting] = {"interfaces": list(interface)} if interface else {}
    path = asyncio.run(
        enrol(token.read(text), out, firewall=firewall, heartbeat_s=heartbeat, replace=replace, wait_s=wait)
    )
    typer.echo(f"this machine is a host now; start it with 'loopback host run --config {path}'", err=True)
    typer.echo(path)


def _read(path: Path) -> str:
    """The token in a file that nobody else may read, who could join in this machine's place. Raises Refused(IDENTITY_TOKEN)."""
    if str(path) in ("-", "/dev/stdin"):
        return sys.stdin.read(token.MAX_TOKEN)
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
                raise Refused(
                    Code.IDENTITY_TOKEN,
                    f"others may read the token file {path}",
                    f"chmod 600 {path}; if somebody may have read it, have it taken back ('loopback host invites --withdraw') "
                    "and ask for another",
                )
            return file.read(token.MAX_TOKEN)
    except UnicodeDecodeError:
        raise Refused(Code.IDENTITY_TOKEN, f"{path} holds no token", "name the right file") from None


async def enrol(
    given: Token,
    out: Path,
    *,
    firewall: dict[str, config.Setting] | None = None,
    heartbeat_s: float = config.HEARTBEAT_S,
    replace: bool = False,
    wait_s: float = 30.0,
) -> Path:
    """Take an invitation; the path of the `host.toml` that it led to. Raises Refused, and OSError for the folder."""
    folder = hostfolder.Folder(out)
    key = await asyncio.to_thread(folder.key_for, given.invite, given.host, given.workspace, replace)
    granted = await claim(given, key, wait_s)
    root = check(given, key, granted)
    return await asyncio.to_thread(
        folder.complete, given, key, granted.jwt, root, firewall or {}, heartbeat_s
    )


async def claim(given: Token, key: SigningKey, wait_s: float) -> Granted:
    """Claim to be the token's host, until there is an answer. Raises Refused with eligibility's words, or where none comes."""
    said: list[str] = []
    nc = await _connect(given, wait_s, said)
    said.clear()
    try:
        signed = hostrecord.claim_to(
            given.invite, given.host, given.workspace, given.key, key, datetime.now(UTC)
        )
        request = msgspec.json.encode(Enrol(claim=signed, root=given.root_version))
        deadline = time.monotonic() + wait_s
        while True:
            try:
                answer = await nc.request(subjects.enrol(given.key.keyid), request, timeout=ANSWER_S)
                break
            except (nats.errors.Error, TimeoutError) as error:
                # A server lets a token in up to the end of its last second, and closes the connection then.
                said.append(str(nc.last_error or ""))
                late = time.monotonic() > deadline
                if _turned_away(said) and (late or nc.is_closed or _over(given)):
                    raise _spent() from None
                if nc.is_closed:
                    raise Refused(
                        Code.COMMAND_UNKNOWN,
                        f"the bus ended the connection before eligibility answered: {_last(said, error)}",
                        "repeat this command: nothing is lost",
                    ) from None
                if late:
                    raise Refused(
                        Code.COMMAND_UNKNOWN,
                        f"the bus answers, but eligibility did not within {wait_s:.0f} s",
                        "check that it runs, and repeat this command: nothing is lost",
                    ) from None
                await asyncio.sleep(AGAIN_S)
    finally:
        await nc.close()
    try:
        granted = identity.decode_granted(answer.data)
    except msgspec.MsgspecError as error:
        raise Refused(Code.IDENTITY_CLAIM, f"the answer does not read: {error}") from None
    if granted.refusal is not None:
        raise Refused(granted.refusal.code, granted.refusal.reason, granted.refusal.next_step)
    return granted


def check(given: Token, key: SigningKey, granted: Granted) -> bytes:
    """The root that came with an answer, if all of it is what the token promised.

    Raises Refused(IDENTITY_CLAIM) for credentials that are not this key's, TUF_INVALID for another root.
    """
    claims = natsjwt.read(granted.jwt)
    if claims.sub != natsjwt.public("user", key.public) or claims.name != subjects.token(given.host):
        raise Refused(
            Code.IDENTITY_CLAIM,
            f"the credentials that came are for {claims.name!r} and another key",
            "do not use them; tell whoever runs the bus",
        )
    root = granted.root.encode()
    if hashlib.sha256(root).digest() != given.root:
        raise Refused(
            Code.TUF_INVALID,
            "the trust root that came is not the one that the token pins",
            "do not use it; tell whoever runs the bus",
        )
    return root


async def _connect(given: Token, wait_s: float, said: list[str]) -> Client:
    """A connection with the token's own identity; what goes wrong, then and later, is `said`.

    Raises Refused(IDENTITY_TOKEN) where the server does not let it in: at once when the token is over by this machine's clock
    as well, else after `wait_s`, because a server that has just started may not know every account yet.
    """
    options: dict[str, Any] = {
        **natsjwt.sign_in(lambda: given.jwt, given.key),
        "inbox_prefix": subjects.enrol_inbox(given.key.keyid),
        "name": f"enrol {given.host}",
        "connect_timeout": int(CONNECT_S),
        "max_reconnect_attempts": max(1, int(wait_s / 2)),
        "reconnect_time_wait": 2 if wait_s > 4 else AGAIN_S,
    }
    if given.ca or given.url.startswith("tls:"):
        try:
            options |= {"tls": tls.context(None, given.ca), "tls_handshake_first": True}
        except Refused as refused:
            raise Refused(
                Code.IDENTITY_TOKEN, f"the token's certificate authority does not read: {refused.reason}"
            ) from None
    nc = Client()
    try:
        await connecting.connect(
            nc,
            given.url,
            options,
            seconds=wait_s + CONNECT_S,
            said=said,
            hopeless=lambda: _turned_away(said) and _over(given),
        )
    except (nats.errors.Error, OSError) as error:
        if _turned_away([*said, str(error)]):
            raise _spent() from None
        raise Refused(
            Code.COMMAND_UNKNOWN,
            f"no bus answers at {given.url}: {_last([str(error), *said], error)}",
            "check the address and the network; the token is still good",
        ) from None
    return nc


def _over(given: Token) -> bool:
    """Whether its time is up by this machine's clock. The server's is the one that counts."""
    try:
        until = natsjwt.read(given.jwt).expires_at
    except Refused:
        return False
    return until is not None and until <= datetime.now(UTC)


def _turned_away(said: list[str]) -> bool:
    return any(
        sign in words.lower() for words in said for sign in ("authorization", "authentication expired")
    )


def _last(said: list[str], error: BaseException) -> str:
    return next((words for words in reversed(said) if words), type(error).__name__)


def _spent() -> Refused:
    return Refused(
        Code.IDENTITY_TOKEN,
        "the bus does not let this token in: it has expired, or was made for another installation",
        "ask an operator for a new one ('loopback host invite')",
    )


def duration(text: str) -> timedelta:
    """A time such as 90s, 30m, 24h or 7d. Raises Refused(NAME_INVALID)."""
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if found is None or not int(found[1]):
        raise Refused(Code.NAME_INVALID, f"--valid {text!r} is no time", "write it like 30m, 24h or 7d")
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])
