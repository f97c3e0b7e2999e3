"""The host's identity on the bus as it changes: renewed credentials, a move to another workspace, a machine that is another.

The key never changes here and never leaves the host; what changes is the JWT that vouches for it, and by a move the workspace.
Both are kept in the state directory, since neither the credentials file nor host.toml may be writable: so an empty state
directory is the host as its folder says. Who sends an answer is not looked at: a JWT has to be for this very key and has to
open the bus before it takes the old one's place, and a move has to be signed by admins of both workspaces.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from loopback.contracts import envelope, events, hostrecord, identity, subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.decoding import Decoder
from loopback.contracts.envelope import Envelope
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.identity import Granted
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.contracts.messages import HostMove, decode_command
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import Trust
from loopback.host.config import HostConfig
from loopback.host.disk import Disk
from loopback.host.inventory import boot_id
from loopback.host.link import Link, heeding_cancellation
from loopback.host.state import HostState, ModuleState
from loopback.trust import natsjwt

MAX_ANSWER: Final = 64 * 1024  # bytes; a move with its signatures has a few thousand
WAITING: Final = 8  # answers not looked at yet; the oldest give way
SHORTEST_S: Final = 1.0  # between two requests, and
LONGEST_S: Final = 600.0  # at most; a fortnight is left when a month's credentials are first asked for anew
TRY_S: Final = 10.0  # a new connection with new credentials
AGAIN_S: Final = 30.0  # an answer that could not be tried, because the bus was away

log = logging.getLogger("loopback.host")


class Kept(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`identity.json`: the newest JWT, and where the host moved, by which command. `workspace` is empty until it does."""

    jwt: str
    workspace: str = ""
    move: Envelope | None = None


_KEPT: Final[Decoder[Kept]] = Decoder(msgspec.json.Decoder(Kept))


class Identity:
    """Who this host is on the bus. `config` is host.toml, with the workspace that the host moved to."""

    def __init__(self, config: HostConfig, key: SigningKey, disk: Disk) -> None:
        self.config = config
        self.key = key
        self._disk = disk
        self._path = config.state_dir / "identity.json"
        self.kept = self._read()
        self._last = ""
        if self.kept is not None and self.kept.workspace:
            self.config = replace(config, workspace=self.kept.workspace)

    def _read(self) -> Kept | None:
        """What was kept, if it is this key's: after a new enrolment the credentials file says who the host is."""
        data = self._disk.read(self._path)
        if data is None:
            return None
        try:
            kept = _KEPT.decode(data)
            claims = natsjwt.read(kept.jwt)
        except (Refused, msgspec.MsgspecError) as error:
            raise Refused(
                Code.HOST_DISK, f"{self._path} is damaged: {error}", "restore it, or enrol anew and remove it"
            ) from None
        return kept if claims.sub == natsjwt.public("user", self.key.public) else None

    def jwt(self) -> str:
        """The newest JWT for this key and workspace. The credentials file is read anew each time: it may have been replaced.

        Raises Refused(SIGNATURE_INVALID) where there never was one.
        """
        try:
            self._last = self._newest()
        except (OSError, UnicodeDecodeError, Refused) as error:
            if not self._last:
                raise Refused(Code.SIGNATURE_INVALID, f"{self.config.creds}: {error}") from None
        return self._last

    def _newest(self) -> str:
        text, _ = natsjwt.read_creds(self.config.creds.read_text())
        own, tag = natsjwt.public("user", self.key.public), f"ws:{subjects.token(self.config.workspace)}"
        known = [
            (natsjwt.read(token), token) for token in (text, self.kept.jwt if self.kept else "") if token
        ]
        # None that fits: the server says no, and the agent goes on asking for one that does.
        return max(known, key=lambda one: (one[0].sub == own and tag in one[0].tags, one[0].iat))[1]

    def keep(self, kept: Kept) -> None:
        """Make this the host's identity, durably. Raises Refused(HOST_DISK)."""
        self._disk.write(self._path, msgspec.json.encode(kept))
        self.kept = kept
        if kept.workspace:
            self.config = replace(self.config, workspace=kept.workspace)

    def renewed(self, jwt: str) -> Kept:
        """What to keep with a new JWT for the same workspace."""
        return replace(self.kept, jwt=jwt) if self.kept else Kept(jwt=jwt)


class Keeper:
    """Asks for new credentials from half of their life on, and takes up what is answered.

    `moved` takes the host to another workspace, once everything about that was verified and tried. `trust` is the newest
    verified trust, `renew_trust` looks for a newer one, `record_at` when the newest known record was signed.
    """

    def __init__(
        self, known: Identity, link: Link, *, trust: Callable[[], Trust | None],
        renew_trust: Callable[[], Awaitable[None]], record_at: Callable[[], datetime | None],
        moved: Callable[[HostRecord, Kept], Awaitable[None]], clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self._known = known
        self._link = link
        self._trust = trust
        self._renew_trust = renew_trust
        self._record_at = record_at
        self._moved = moved
        self._clock = clock
        self._answers: asyncio.Queue[bytes] = asyncio.Queue(WAITING)
        self.refusal: Refusal | None = None

    def told(self, data: bytes) -> None:
        """Somebody said something on this host's `identity` subject."""
        if len(data) > MAX_ANSWER:
            log.warning("an answer of %d bytes about this host's identity is dropped", len(data))
            return
        while self._answers.full():
            self._answers.get_nowait()
        self._answers.put_nowait(data)

    async def run(self) -> None:
        """Ask in time and take up answers, until cancelled."""
        while True:
            with heeding_cancellation():
                await self._turn()

    async def _turn(self) -> None:
        try:
            wait = await self._ask()
            async with asyncio.timeout(wait):
                data = await self._answers.get()
        except TimeoutError:
            return
        except (Refused, OSError) as error:
            log.error("this host's identity cannot be renewed: %s", error)
            await asyncio.sleep(LONGEST_S)
            return
        try:
            await self._take(data)
        except Refused as refused:
            log.warning("what was said of this host's identity is refused: %s", refused)
        except Exception:
            # Whatever one answer meets, the next one may be good: this task must not end, and the agent with it.
            log.exception("an answer about this host's identity ended in a fault of this agent")

    async def _ask(self) -> float:
        """Ask for new credentials where it is time; how many seconds later to look again."""
        claims = natsjwt.read(self._known.jwt())
        now = self._clock()
        if claims.expires_at is None:
            return LONGEST_S
        half = claims.issued_at + (claims.expires_at - claims.issued_at) / 2
        if now < half:
            return min(max((half - now).total_seconds(), 0.05), LONGEST_S)
        config = self._known.config
        asked = identity.Renew(host=config.host, workspace=config.workspace, at=now)
        data = envelope.seal_bytes(envelope.RENEW, msgspec.json.encode(asked), self._known.key)
        headers = events.headers(
            event_id=uuid.uuid4().hex,
            source=f"host/{config.workspace}/{config.host}",
            event_type="host.renew",
            subject=config.host,
            at=now,
        )
        await self._link.publish("renew", data, headers, acknowledged=False)
        left = (claims.expires_at - now).total_seconds()
        return min(max(left / 10, SHORTEST_S), LONGEST_S)

    async def _take(self, data: bytes) -> None:
        try:
            granted = identity.decode_granted(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise Refused(Code.IDENTITY_CLAIM, f"it does not read: {error}") from None
        if granted.refusal is not None:
            if granted.refusal != self.refusal:
                log.warning("this host gets no new credentials: %s", granted.refusal.reason)
            self.refusal = granted.refusal
            return
        if granted.move is not None:
            await self._take_move(granted, granted.move, data)
            return
        config, key = self._known.config, self._known.key.public
        check_jwt(granted.jwt, config.host, config.workspace, key, self._clock())
        if natsjwt.read(granted.jwt).iat <= natsjwt.read(self._known.jwt()).iat:
            return  # this one, or an older one, which would take the newer one's place
        if not await self._link.probe(TRY_S, config, lambda: granted.jwt):
            self._later(data)
            return
        self._known.keep(self._known.renewed(granted.jwt))
        self.refusal = None
        log.info("renewed credentials until %s", natsjwt.read(granted.jwt).expires_at)
        await self._link.rejoin(config)

    async def _take_move(self, granted: Granted, signed: Envelope, data: bytes) -> None:
        config = self._known.config
        try:
            record = self._verified(signed)
        except Refused as refused:
            if refused.code not in (Code.SIGNATURE_UNKNOWN_KEY, Code.COMMAND_UNAUTHORISED):
                raise
            await self._renew_trust()  # an operator who is new, or whose role is
            record = self._verified(signed)
        check_jwt(granted.jwt, config.host, record.workspace, self._known.key.public, self._clock())
        if not await self._link.probe(
            TRY_S, replace(config, workspace=record.workspace), lambda: granted.jwt
        ):
            self._later(data)
            return
        self.refusal = None
        await self._moved(record, Kept(jwt=granted.jwt, workspace=record.workspace, move=signed))

    def _verified(self, signed: Envelope) -> HostRecord:
        config, trust = self._known.config, self._trust()
        if trust is None:
            raise Refused(Code.SIGNATURE_UNKNOWN_KEY, "nobody is trusted yet")
        return check_move(
            signed, config.host, config.workspace, self._known.key.public, self._record_at(), trust
        )

    def _later(self, data: bytes) -> None:
        log.info("new credentials do not open the bus now; they are tried again")
        asyncio.get_running_loop().call_later(AGAIN_S, self.told, data)


def check_jwt(token: str, host: str, workspace: str, key: PublicKey, now: datetime) -> None:
    """Whether a JWT is for this host and key, there. Raises Refused(IDENTITY_CLAIM, SIGNATURE_INVALID)."""
    claims = natsjwt.read(token)
    wanted = (natsjwt.public("user", key), subjects.token(host), f"ws:{subjects.token(workspace)}")
    if claims.sub != wanted[0]:
        raise Refused(Code.IDENTITY_CLAIM, "the credentials are for another key than this host's")
    if claims.name != wanted[1] or claims.tags != (wanted[2],):
        raise Refused(
            Code.IDENTITY_CLAIM, f"the credentials are for {claims.name!r} with {', '.join(claims.tags)}"
        )
    if claims.expires_at is not None and claims.expires_at <= now:
        raise Refused(Code.IDENTITY_CLAIM, "the credentials have expired")


def check_move(
    signed: Envelope, host: str, workspace: str, key: PublicKey, record_at: datetime | None, trust: Trust
) -> HostRecord:
    """The record that a move makes of this host in another workspace, with every signature checked.

    `record_at` is when the newest record that the host knows was signed: nobody can replay a move of before. Raises
    Refused: SCOPE_VIOLATION for another host's, key's or workspace's move, and whatever `hostrecord.verify` raises.
    """
    try:
        command = decode_command(envelope.payload_of(signed))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.COMMAND_MALFORMED, f"the move is malformed: {error}") from None
    if not isinstance(command, HostMove):
        raise Refused(Code.SCOPE_VIOLATION, "it is another kind of command than host.move")
    record = hostrecord.verify(signed, None, command.to, trust)
    if command.workspace != workspace or command.to == workspace:
        raise Refused(
            Code.SCOPE_VIOLATION,
            f"it leads from {command.workspace!r} to {command.to!r}; this is {workspace!r}",
        )
    if record.host != host or record.public_key.lower() != key.text:
        raise Refused(Code.SCOPE_VIOLATION, f"it is the move of {record.host!r} with another key")
    if record_at is not None and record.issued_at <= record_at:
        raise Refused(Code.SCOPE_VIOLATION, "it is not newer than the record that is known here")
    return record


# What follows for the host's own state: pure.


def elsewhere(state: HostState, workspace: str, incarnation: str, now: datetime) -> HostState:
    """The host's state in a workspace: as it is where it was kept for that, and else a new beginning.

    Reports go on counting, and the floor under the clock and the age of the newest record stay: they are the host's own.
    """
    if state.workspace in ("", workspace):
        return replace(state, workspace=workspace)
    return HostState(
        incarnation=incarnation,
        since=now,
        clock_floor=state.clock_floor,
        record_at=state.record_at,
        reports=state.reports,
        machine=state.machine,
        workspace=workspace,
    )


def resettled(module: ModuleState) -> ModuleState:
    """A module in another workspace: what is promoted and what failed here stays; rollouts, generations and policy serials
    of the old one mean nothing there."""
    return ModuleState(
        module=module.module,
        phase=Phase.PROMOTED if module.promoted else Phase.IDLE,
        target=module.promoted,
        promoted=module.promoted,
        quarantine=module.quarantine,
        signers=module.signers,
    )


def bound(
    state: HostState, machine: str, salt: str, incarnation: str, now: datetime
) -> tuple[HostState, Refusal | None]:
    """The state, bound to this machine; with a new incarnation, and what to say, where it was another's.

    `machine` names the machine; only its salted digest is kept. State that was never bound is bound as it is.
    """
    known, _, digest = state.machine.partition(".")
    if state.machine and digest == _digest(known, machine):
        return state, None
    after = replace(state, machine=f"{salt}.{_digest(salt, machine)}")
    if not state.machine:
        return after, None
    return replace(after, incarnation=incarnation, since=now, reports=0), Refusal(
        Code.HOST_CLONED,
        "the state of this host was made on another machine: it goes on as a new incarnation",
        "if both machines run, revoke the host and enrol both anew, each with a name and key of its own",
    )


def _digest(salt: str, machine: str) -> str:
    return hashlib.sha256(f"{salt}.{machine}".encode()).hexdigest()


def machine_id(path: Path = Path("/etc/machine-id")) -> str:
    """What names this machine: systemd's machine id, which a copy of a disk keeps and a new installation does not; or, where
    there is none, the boot."""
    try:
        return path.read_text().strip() or boot_id()
    except OSError:
        return boot_id()
