"""Who fills a set: a roster, which activation signs, made of what operators signed.

A policy may leave the content of a set to the labels of hosts or to a pool of a load balancer (`Source`). Whoever matches is
listed in one *roster* per workspace and source, the same for every host. It lists the digests of *slices*; a slice holds the
signed commands themselves, so that a host takes an address from nobody but who may say so. A change of one record changes one
slice and the roster. Like desired states, a roster reaches hosts only once it is stored.

    lb.ws.<workspace>.roster.<key>          Roster, in an envelope of activation's; republished to `rosters.<key>`
    lb.ws.<workspace>.slice.<key>.<n>       Slice, under its SHA-256 in the roster
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import msgspec

from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.envelope import Envelope

#: Members of a slice on average. A change costs each host one slice (about 1 KiB a member) and the roster (67 bytes a slice).
PER_SLICE: Final = 16
MAX_SLICES: Final = 256
MAX_SLICE: Final = 900 * 1024  # bytes; below NATS's default max_payload of 1 MiB with room for headers
MAX_SOURCES: Final = 64  # of one policy


class Source(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What fills a set: the hosts whose records carry all of `labels`, or the pool of this name. One of both."""

    labels: dict[str, str] = {}
    pool: str = ""

    @property
    def key(self) -> str:
        """Stands for the source in subjects and file names: 32 hex digits of its SHA-256."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:32]

    @property
    def words(self) -> str:
        """The source as people write it."""
        if self.pool:
            return f"pool {self.pool}"
        return "hosts with " + ", ".join(f"{k}={v}" for k, v in sorted(self.labels.items()))


class Member(msgspec.Struct, frozen=True, omit_defaults=True):
    """One signed command: a host's record, with its claim where that was an invitation, or a `PoolPut`."""

    envelope: Envelope
    claim: Envelope | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of all that was signed, in hex."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Slice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="slice"):
    """Some of the members of one roster, by name."""

    members: tuple[Member, ...]


class Roster(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="roster"):
    """The members of one source, as digests of slices (SHA-256 in hex; empty: nobody is in it).

    Of two rosters the one that was issued later holds. Signed by activation, envelope type `envelope.ROSTER`.
    """

    workspace: str
    source: Source
    slices: tuple[str, ...]
    issued_at: Time


_ROSTERS: Final[Decoder[Roster]] = Decoder(msgspec.json.Decoder(Roster))
_SLICES: Final[Decoder[Slice]] = Decoder(msgspec.json.Decoder(Slice))


def decode(payload: bytes) -> Roster:
    """Decode a roster. Raises msgspec.ValidationError naming the field at fault."""
    return _ROSTERS.decode(payload)


def decode_slice(data: bytes) -> Slice:
    """Decode a slice. Raises msgspec.ValidationError naming the field at fault."""
    return _SLICES.decode(data)


def cut(members: Mapping[str, Member]) -> list[bytes]:
    """The slices of these members, by the names of their hosts or of the pool; pure, and the same for the same members.

    Their number is a power of two that depends on how many there are, a member's slice on its name: so another member's
    coming or going leaves the other slices as they are. An empty slice is empty bytes.
    """
    count = 1
    while count * PER_SLICE < len(members) and count < MAX_SLICES:
        count *= 2
    found: list[list[Member]] = [[] for _ in range(count)]
    for name in sorted(members):
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % count
        found[place].append(members[name])
    return [msgspec.json.encode(Slice(members=tuple(one))) if one else b"" for one in found]


def digests(slices: list[bytes]) -> tuple[str, ...]:
    """What a roster says of its slices."""
    return tuple(hashlib.sha256(data).hexdigest() if data else "" for data in slices)
