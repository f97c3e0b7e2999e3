"""Desired states: the one document per host that activation signs and the host obeys, within its scope."""

from __future__ import annotations

from datetime import timedelta
from typing import Final, Literal

import msgspec

from loopback.contracts.decoding import Decoder, Time
from loopback.contracts.envelope import Envelope

#: A change may be taken back so long after its scope's end, or after an operator's abort where that is later: hosts
#: refuse a later way back, and activation does not ask for one.
WAY_BACK: Final = timedelta(hours=24)
#: So much before a scope begins a host may start a change: its clock may be behind the operator's by that.
START_SKEW: Final = timedelta(minutes=5)
#: A trial longer than that (and than the one that was signed) is a mistake, or keeps a host busy on purpose.
MAX_TRIAL_S: Final = 3600.0
#: Generations stay below what every reader of JSON still counts exactly.
MAX_GENERATION: Final = 2**53
#: So far above the generation that a host obeyed last the next one may be. An honest activation writes one document after the
#: other: a million is one a minute for two years. A host without memory (generation 0) takes any below FIRST_GENERATION.
MAX_GENERATION_STEP: Final = 2**20
#: Half of all generations, so that a host whose memory is new can be pushed, and still be led on for ever.
FIRST_GENERATION: Final = 2**52
#: What activation believes of a host's own word on its generation; above it there is room for 2^32 more documents.
MAX_LEARNT_GENERATION: Final = MAX_GENERATION - 2**32


class Running(msgspec.Struct, frozen=True, omit_defaults=True):
    """One module's version, package and policy, as promoted on a host. Digests are SHA-256 in hex."""

    version: str
    package: str
    policy: str | None = None
    policy_serial: int = 0


class DesiredModule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one module should be on one host.

    `running` is None for "absent": disabled, uninstalled, nothing left in the kernel. `expected` is what the sender
    believes the host last promoted (None: nothing); a host that promoted something else refuses with HOST_EXPECTED and
    says what it has. `scope` is the operator-signed RolloutStart command, `generation` that of this module's entry.
    `returning` marks a way back: `running` must then equal what the host itself promoted last. It is open until a day after
    the scope's end; `abort`, the operator-signed RolloutAbort of this rollout, keeps it open for a day from its own signing,
    and is what opens it at all where the scope says `on_failure: halt`.
    `not_after` is the deadline by the broker's clock for starting the change. `approvals` are the operator-signed
    RolloutApprove commands of the rollout.
    """

    module: str
    running: Running | None
    generation: int
    rollout: str
    scope: Envelope
    expected: Running | None = None
    size: int = 0
    trial_s: float = 10.0
    not_after: Time | None = None
    returning: bool = False
    abort: Envelope | None = None
    approvals: tuple[Envelope, ...] = ()


class DesiredState(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="desired", omit_defaults=True
):
    """Everything one host should run. Its `generation` only grows; modules not named are left as they are.

    `record` is the operator-signed command with the host's labels and `claim` the host's own word where that was an
    invitation (see `hostrecord`). `journal_head` is the head of the workspace's chain over its `journal_links` first links
    (see `journal.chained`): hosts keep it as witnesses. Signed by activation, envelope type `envelope.DESIRED`.
    """

    host: str
    workspace: str
    generation: int
    modules: tuple[DesiredModule, ...]
    issued_at: Time
    record: Envelope | None = None
    claim: Envelope | None = None
    journal_head: str = ""
    journal_links: int = 0
    incarnation: str = ""
    environment: Literal["production", "staging", "sandbox"] = "production"


_DECODER = Decoder(msgspec.json.Decoder(DesiredState))


def decode(payload: bytes) -> DesiredState:
    """Decode a desired state. Raises msgspec.ValidationError naming the field at fault."""
    return _DECODER.decode(payload)
