"""The module ABI, version 1: frames between the agent and a module's process.

The agent starts the module's entry point with one connected stream socket, its descriptor number in the environment
variable `LOOPBACK_ABI_FD`. A frame is four bytes of length (big endian) and that many bytes of msgpack: a map with `id`
and `body`, where `body` is one of the structs here, tagged by `verb`. The module speaks first, with `Hello`. Then the agent
sends requests, and the module answers each with `Done` or `Failed` under the same `id`; `Event`s come with id 0 at any
time. A module may be written in any language. New verbs and optional fields may appear; unknown fields are ignored, and
an unknown verb is answered with `Failed(code="module.abi")`.

`fill` stages what fills the sets of the policy that holds, as `stage` does a policy; commit, confirm and revert follow alike.

Order: hello → configure → stage → commit → (confirm | revert); health and metrics at any time; drain → stop at the end.
`stage` prepares a policy without any effect, `commit` makes it hold on trial, `confirm` keeps it, `revert` returns to what
held before the commit. `stop` ends the process and leaves in the kernel whatever enforces; `stop` with `remove` leaves nothing.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder

ABI_VERSION: Final = 1
FD_VARIABLE: Final = "LOOPBACK_ABI_FD"
MAX_FRAME: Final = 32 * 1024 * 1024  # bytes
#: Bytes of a policy's content, wherever it is: what one frame carries, less room for the other fields of `Stage`, of which
#: `fills` may have the addresses of ten thousand hosts. What the firewall allows fits: as JSON, 100k generated rules have 10 to
#: 14 MB, a set of a million prefixes 19 MB.
MAX_CONTENT: Final = MAX_FRAME - 1024 * 1024
_LENGTH = struct.Struct(">I")


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="hello"):
    """module → agent, first of all. `adopted`: it found its programs pinned in the kernel and took them over."""

    module: str
    version: str
    abi: int
    adopted: bool = False
    policy: str | None = None  # digest of the policy that the adopted programs enforce


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="configure"):
    """Where it is and what it may use. `state_dir` is its own folder, kept between versions.

    `settings` is local configuration (from the host's own file), for the firewall `interfaces` and `bpf_root`.
    """

    host: str
    workspace: str
    state_dir: str
    settings: dict[str, str | int | float | bool | list[str]] = {}


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP connection that the agent opened: addresses as text, ports as numbers."""

    local: str
    local_port: int
    remote: str
    remote_port: int


class Filled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What fills one set now: the addresses of all hosts with these labels, or of this pool, as operators signed them."""

    labels: dict[str, str] = {}
    pool: str = ""
    addresses: list[str] = []


class Stage(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="stage"):
    """Prepare a policy. `content` is the policy's JSON, `digest` names it; the operator's signature was checked.

    `control` are the agent's own connections to the control plane: a change that would cut them, or an operator's session, is
    refused. None where a policy that held before is put back, which nothing may stand in the way of. `fills` is what fills the
    policy's sets, by their names; the policy's own bounds on it are for the module to hold.
    """

    digest: str
    serial: int
    content: bytes
    control: list[Connection] | None = None
    fills: dict[str, Filled] = {}


class Fill(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="fill"):
    """Prepare other contents of sets for policy `digest`, which holds. What is refused leaves the last contents, and `health`
    says degraded until others are committed."""

    digest: str
    fills: dict[str, Filled]
    control: list[Connection] | None = None


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="commit"):
    """Switch to the staged policy, on trial for `trial_s` seconds; unconfirmed by then, the kernel falls back."""

    digest: str
    trial_s: float


class Confirm(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="confirm"):
    """Keep what was committed."""

    digest: str


class Revert(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="revert"):
    """Return to what held before the commit."""


class Health(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="health"):
    """Ask how it is. Answered with Done(health=…)."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="metrics"):
    """Ask for its counters. Answered with Done(metrics=…): name → value, names as Prometheus wants them."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="drain"):
    """Take no new work; a stop follows."""


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="stop"):
    """End. With `remove`, take everything out of the kernel first."""

    remove: bool = False


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """`enforcing`: the kernel applies policy `policy` now."""

    state: Literal["ok", "degraded", "failed"]
    enforcing: bool = False
    policy: str | None = None
    code: str = ""
    reason: str = ""
    detail: dict[str, str] = {}


class Done(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="done"):
    """It was done; the fields that a verb asks for are filled."""

    health: HealthReport | None = None
    metrics: dict[str, float] = {}
    detail: dict[str, str] = {}


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="failed"):
    """It was not done, and nothing changed."""

    code: str
    reason: str
    next_step: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb", tag="event"):
    """module → agent: something happened (a sampled drop, an interface that appeared)."""

    kind: str
    attributes: dict[str, str | int | float | bool] = {}


Request = Configure | Stage | Fill | Commit | Confirm | Revert | Health | Metrics | Drain | Stop
Reply = Done | Failed
Body = Hello | Request | Reply | Event


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One message. A request and its answer share an `id` ≥ 1; Hello and Event have 0."""

    id: int
    body: Body


_DECODER = Decoder(msgspec.msgpack.Decoder(Frame))


def encode(frame: Frame) -> bytes:
    """The bytes of one frame, with its length in front. Raises Refused(MODULE_ABI) above MAX_FRAME."""
    body = msgspec.msgpack.encode(frame)
    if len(body) > MAX_FRAME:
        raise Refused(Code.MODULE_ABI, f"a frame of {len(body)} bytes is over the {MAX_FRAME} allowed")
    return _LENGTH.pack(len(body)) + body


def length_of(prefix: bytes) -> int:
    """The length that four prefix bytes announce. Raises Refused(MODULE_ABI) above MAX_FRAME."""
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_FRAME:
        raise Refused(Code.MODULE_ABI, f"a frame of {length} bytes is over the {MAX_FRAME} allowed")
    return int(length)


def decode(body: bytes) -> Frame:
    """Decode a frame's body. Raises Refused(MODULE_ABI) naming what is wrong."""
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.MODULE_ABI, f"not an ABI frame: {error}") from None


class _Numbered(msgspec.Struct, frozen=True):
    id: int


_NUMBERED = Decoder(msgspec.msgpack.Decoder(_Numbered))


def id_of(body: bytes) -> int:
    """The id of a frame whose verb is unknown here, so that it can be answered. Raises Refused(MODULE_ABI)."""
    try:
        return _NUMBERED.decode(body).id
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(Code.MODULE_ABI, f"not an ABI frame: {error}") from None
