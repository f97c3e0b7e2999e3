"""What `loopback posture` says, as a document: the types of its JSON (version 1), and nothing else.

Every part names its `source`. Fields are only ever added; `docs/posture.md` describes them and `docs/posture.schema.json` is
their JSON Schema.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

VERSION = 1


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the document."""


class Environment(_Part, frozen=True, kw_only=True):
    """What the workspace is for. `signed_by` are the operators whose signature on its record holds."""

    name: str
    description: str
    since: datetime | None
    signed_by: tuple[str, ...]
    source: str


class Rules(_Part, frozen=True, kw_only=True):
    """What holds in the workspace by the trust document, whatever services say. `floors`: module → oldest version."""

    regulated: bool
    publishers: dict[str, tuple[str, ...]]
    floors: dict[str, str]
    source: str


class Power(_Part, frozen=True, kw_only=True):
    """A Linux capability that a module asks for, and what it allows."""

    name: str
    allows: str


class Release(_Part, frozen=True, kw_only=True):
    """How one release was signed. `signed`: the repository's verified target has this very digest; `signers` are key ids.

    `threshold` of `role`'s keys must sign. `pinned`: one of the publishers that the workspace's rules name signed it; None
    where they name none.
    """

    version: str
    digest: str
    published_at: datetime
    published_by: tuple[str, ...]
    signed: bool
    role: str
    threshold: int
    signers: tuple[str, ...]
    pinned: bool | None
    source: str


class Use(_Part, frozen=True, kw_only=True):
    """One version with one policy, on those hosts that say they promoted it.

    `enforcing` are those that say that it enforces. `rollout` brought it, `since` the first of them promoted it; `started_by`
    and `approved_by` are operators by verified signature. `as_signed`: hosts promoted the digest that was signed.
    """

    version: str
    digest: str
    policy: str | None
    policy_serial: int
    policy_signed_by: tuple[str, ...]
    hosts: tuple[str, ...]
    enforcing: tuple[str, ...]
    rollout: str
    since: datetime | None
    started_by: tuple[str, ...]
    approved_by: tuple[str, ...]
    as_signed: bool
    source: str


class Requirement(_Part, frozen=True, kw_only=True):
    """What a version needs of a host, and which hosts that run it do not have it (host → why)."""

    kernel: str
    features: tuple[str, ...]
    architectures: tuple[str, ...]
    agent: str
    unmet: dict[str, str]
    source: str


class Blast(_Part, frozen=True, kw_only=True):
    """What a module can touch, and how much at once.

    Limits are the manifest's. `hosts_at_once` is how many hosts the last rollout could change at the same time by its own waves
    and `max_unavailable`; `exposure` what activation in the wrong hands could do with that rollout's signature.
    """

    powers: tuple[Power, ...]
    memory_mib: int
    tasks: int
    stop_s: float
    hosts_at_once: int
    hosts_selected: int
    exposure: tuple[str, ...]
    if_it_dies: tuple[str, ...]
    source: str


class Module(_Part, frozen=True, kw_only=True):
    """One module in this workspace."""

    name: str
    summary: str
    uses: tuple[Use, ...]
    releases: tuple[Release, ...]
    requirement: Requirement | None
    blast: Blast | None


class HostModule(_Part, frozen=True, kw_only=True):
    """One module on one host, by its own word."""

    name: str
    version: str | None
    policy_serial: int
    phase: str
    health: str
    enforcing: bool


class Host(_Part, frozen=True, kw_only=True):
    """One host. `state` is "ok", "degraded", "lost" or "never seen"; `problems` why it is not as it should be.

    `verified`: its newest status was verified here with its recorded key; otherwise it is telemetry's word. `journal` says
    whether it confirms the journal.
    """

    name: str
    labels: dict[str, str]
    state: str
    verified: bool
    last_seen: datetime | None
    kernel: str
    architecture: str
    agent: str
    modules: tuple[HostModule, ...]
    problems: tuple[str, ...]
    journal: str
    source: str


class Wave(_Part, frozen=True, kw_only=True):
    """One step of a rollout; `soak_s` seconds it has to stay good."""

    name: str
    hosts: int
    soak_s: float
    state: str


class Rollout(_Part, frozen=True, kw_only=True):
    """How one rollout was, or is, staged. `broken`: its own chain does not hold."""

    name: str
    module: str
    version: str
    state: str
    created_at: datetime
    ended_at: datetime | None
    started_by: tuple[str, ...]
    approvals_needed: int
    approved_by: tuple[str, ...]
    selected: int
    waves: tuple[Wave, ...]
    max_failed: float
    min_sample: int
    max_unavailable: float
    host_deadline_s: float
    trial_s: float
    on_failure: str
    reason: str
    broken: str
    source: str


class Person(_Part, frozen=True, kw_only=True):
    """An operator, with the roles that hold in this workspace and what they allow."""

    name: str
    keyid: str
    roles: tuple[str, ...]
    may: tuple[str, ...]
    source: str


class KeyRole(_Part, frozen=True, kw_only=True):
    """A role of the TUF repository. `signers` signed the file that counts now; all of them are among `keyids`."""

    name: str
    version: int
    threshold: int
    keyids: tuple[str, ...]
    signers: tuple[str, ...]
    expires: datetime
    source: str


class JournalPart(_Part, frozen=True, kw_only=True):
    """Whether the journal is the one that hosts witnessed, and `findings` of the audit."""

    intact: bool
    links: int
    confirming: int
    asked: int
    verdict: tuple[str, ...]
    findings: tuple[str, ...]
    source: str


class Question(_Part, frozen=True, kw_only=True):
    """What this document does not answer, and why."""

    about: str
    because: str


class Posture(_Part, frozen=True, kw_only=True, tag_field="type", tag="posture"):
    """The whole document about one workspace at one time."""

    version: Literal[1]
    workspace: str
    at: datetime
    written_by: str
    environment: Environment
    rules: Rules
    modules: tuple[Module, ...]
    hosts: tuple[Host, ...]
    rollouts: tuple[Rollout, ...]
    people: tuple[Person, ...]
    keys: tuple[KeyRole, ...]
    journal: JournalPart
    questions: tuple[Question, ...]


def decode(data: bytes) -> Posture:
    """Read a document. Raises msgspec.ValidationError naming the field at fault."""
    return msgspec.json.decode(data, type=Posture)


def schema() -> bytes:
    """Its JSON Schema, indented."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Posture)), indent=2) + b"\n"
