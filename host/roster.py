"""What a host makes of a roster: pure. Activation may say who fills a set; who may be in it, operators have signed.

    1 signed by activation, of this workspace and source
    2 issued later than the one before, and not in the future
    3 each slice is what the roster says it is
    4 each member is signed by an admin of this workspace (a pool: by one of its balancers), whose word counts now; what was
      believed before is not asked again, so that an operator who leaves takes nobody out of a set
    5 it belongs there: the record has the labels, the command is about the pool
    6 nobody twice, and nobody by an older word than the one known here; whoever left comes back only by a newer one

A roster is taken whole or not at all: whatever is wrong with it, the last one holds. A pool never leaves its roster: that it is
gone says a signed command too.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from loopback.contracts import envelope, hostrecord, messages, roster
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import START_SKEW
from loopback.contracts.envelope import Envelope
from loopback.contracts.roster import Member, Roster, Source
from loopback.contracts.trustdoc import Trust

ACTIVATION: Final = "activation"
MAX_LEFT: Final = 4096  # of those who left a set, the newest that are remembered
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Known(msgspec.Struct, frozen=True):
    """A member that was believed. `order` grows with each word on it: a record's time in µs, a pool's serial."""

    digest: str
    order: int
    addresses: tuple[str, ...]


Members = dict[str, Known]  # by the name of the host or pool


class Followed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One source as a host has it on disk: `slices` by their digests, `left` with the order of the last word on each."""

    source: Source
    issued_at: datetime | None = None
    slices: dict[str, Members] = {}
    left: dict[str, int] = {}

    @property
    def members(self) -> Members:
        """Everybody in it."""
        return {name: known for one in self.slices.values() for name, known in one.items()}

    @property
    def by_digest(self) -> dict[str, tuple[str, Known]]:
        """The same by what was signed."""
        return {known.digest: (name, known) for name, known in self.members.items()}

    @property
    def addresses(self) -> list[str]:
        """What fills the set: sorted, each once."""
        return sorted({address for known in self.members.values() for address in known.addresses})


def opened(
    signed: Envelope, followed: Followed, workspace: str, trust: Trust, now: datetime
) -> Roster | None:
    """The roster in an envelope; None for one that is no news (1 and 2).

    Raises Refused: ENVELOPE_*, SIGNATURE_*, ROSTER_INVALID.
    """
    payload, _ = envelope.open_envelope(signed, envelope.ROSTER, trust.service_keys.get(ACTIVATION, {}))
    try:
        found = roster.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.ROSTER_INVALID, f"the roster is malformed: {error}") from None
    if found.workspace != workspace or found.source != followed.source:
        raise Refused(
            Code.ROSTER_INVALID,
            f"it is the roster of {found.source.words} in {found.workspace!r}, "
            f"not of {followed.source.words} in {workspace!r}",
        )
    if not 0 < len(found.slices) <= roster.MAX_SLICES:
        raise Refused(Code.ROSTER_INVALID, f"it has {len(found.slices)} slices")
    if found.issued_at - now > START_SKEW:
        raise Refused(
            Code.ROSTER_INVALID,
            f"the roster of {found.source.words} is of {found.issued_at.isoformat()}, which is yet to come",
            "compare the clocks of this host and of activation",
        )
    if followed.issued_at is not None and found.issued_at <= followed.issued_at:
        return None
    return found


def slice_members(
    data: bytes,
    digest: str,
    source: Source,
    workspace: str,
    trust: Trust,
    known: Mapping[str, tuple[str, Known]],
) -> Members:
    """The members of a slice (3 to 5); `known` are those believed before, with their names, by their digests.

    Raises Refused: ROSTER_INVALID, and what is wrong with a member's signature or record.
    """
    if hashlib.sha256(data).hexdigest() != digest:
        raise Refused(Code.ROSTER_INVALID, f"the slice {digest[:12]} is something else", "it is read again")
    try:
        found = roster.decode_slice(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.ROSTER_INVALID, f"the slice {digest[:12]} is malformed: {error}") from None
    open_one = _pool if source.pool else _host
    members: Members = {}
    for member in found.members:
        name, one = known.get(member.digest) or open_one(member, source, workspace, trust)
        if name in members:
            raise Refused(Code.ROSTER_INVALID, f"{name!r} is in it twice")
        members[name] = one
    return members


def accept(followed: Followed, found: Roster, slices: Mapping[str, Members]) -> Followed:
    """The source after a roster (6); `slices` has all of its slices that are not known already.

    Raises Refused(ROSTER_INVALID, ROSTER_OLDER).
    """
    wanted = [digest for digest in found.slices if digest]
    if len(set(wanted)) != len(wanted):
        raise Refused(Code.ROSTER_INVALID, "a slice is in it twice")
    taken = {digest: slices.get(digest, followed.slices.get(digest, {})) for digest in wanted}
    before, after = followed.members, {n: k for one in taken.values() for n, k in one.items()}
    if len(after) != sum(map(len, taken.values())):
        raise Refused(Code.ROSTER_INVALID, "a member is in two of its slices")
    _check_pool_stays(found.source, before.keys() - after.keys())
    for name, known in after.items():
        last = before.get(name)
        if last != known:
            _check_newer(
                name, known, last.order if last is not None else followed.left.get(name, -1), found.source
            )
    left = {name: order for name, order in followed.left.items() if name not in after}
    left |= {name: known.order for name, known in before.items() if name not in after}
    newest = sorted(left.items(), key=lambda item: item[1])[-MAX_LEFT:]
    return Followed(source=found.source, issued_at=found.issued_at, slices=taken, left=dict(newest))


def _check_newer(name: str, known: Known, floor: int, source: Source) -> None:
    """Whether this is a newer word on somebody than the last that was heard here."""
    if known.order <= floor:
        raise Refused(
            Code.ROSTER_OLDER,
            f"the word on {name!r} is not newer than the last one known here",
            f"sign it again ('loopback {'pool put' if source.pool else 'host change'} {name}')",
        )


def _check_pool_stays(source: Source, gone: Collection[str]) -> None:
    if source.pool and gone:
        raise Refused(
            Code.ROSTER_OLDER,
            f"it does not know pool {source.pool!r} any more",
            f"put it again, or take it away with 'loopback pool remove {source.pool}'",
        )


def missing(followed: Followed, found: Roster) -> dict[int, str]:
    """The slices of a roster that are not known here, by their numbers."""
    return {n: digest for n, digest in enumerate(found.slices) if digest and digest not in followed.slices}


def _host(member: Member, source: Source, workspace: str, trust: Trust) -> tuple[str, Known]:
    record = hostrecord.verify(member.envelope, member.claim, workspace, trust)
    _check_belongs(record, source)
    order = (record.issued_at - _EPOCH) // timedelta(microseconds=1)
    addresses = _plain(record.host, record.addresses, _address)
    return record.host, Known(member.digest, order, addresses)


def _check_belongs(record: hostrecord.HostRecord, source: Source) -> None:
    if record.absent or any(record.labels.get(k) != v for k, v in source.labels.items()):
        raise Refused(Code.ROSTER_INVALID, f"the record of {record.host!r} is not one of {source.words}")


def _pool(member: Member, source: Source, workspace: str, trust: Trust) -> tuple[str, Known]:
    payload, signers = envelope.open_envelope(member.envelope, envelope.COMMAND, trust.operator_keys)
    try:
        command = messages.decode_command(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.COMMAND_MALFORMED, f"the operator's command is malformed: {error}") from None
    if not isinstance(command, messages.PoolPut) or (command.pool, command.workspace) != (
        source.pool,
        workspace,
    ):
        raise Refused(Code.ROSTER_INVALID, f"it is no word on pool {source.pool!r} of {workspace!r}")
    trust.authorise_pool(signers, command.pool, workspace)
    found = () if command.absent else command.addresses
    return source.pool, Known(
        member.digest,
        command.serial,
        _plain(command.pool, found, _network),
    )


def _plain(name: str, addresses: Iterable[str], read: Callable[[str], str]) -> tuple[str, ...]:
    try:
        return tuple(read(text) for text in addresses)
    except ValueError as error:
        raise Refused(Code.ROSTER_INVALID, f"the addresses of {name!r} are none: {error}") from None


def _address(text: str) -> str:
    return str(ipaddress.ip_interface(text).ip)


def _network(text: str) -> str:
    found = ipaddress.ip_network(text)
    return str(found) if found.num_addresses > 1 else str(found.network_address)
