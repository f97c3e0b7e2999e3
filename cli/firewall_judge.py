"""Who judges packets for the command line: the real program in the kernel, or the plain evaluator."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from loopback import bpf
from loopback.bpf.build import compile_object
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import oracle
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import Action, FirewallPolicy, Packet
from loopback.modules.firewall.packets import Frame

FLOWS: Final = 64  # a dry run remembers no flow; the table must only exist


class Kind(StrEnum):
    """What `--judge` may say."""

    AUTO = "auto"
    KERNEL = "kernel"
    ORACLE = "oracle"


class Verdict(NamedTuple):
    """What happens to a packet, the rule that decides (None: the default) and the generation that judged it."""

    action: Action
    rule: str | None
    generation: int


class Judge(Protocol):
    """One judge. `name` as messages call it; `why` says in brackets why it was not the program, else empty."""

    name: str
    why: str

    def judge(self, packets: Sequence[Packet]) -> list[Verdict]:
        """Judge each packet as the first of a new connection, unless its state says otherwise."""
        ...


class OracleJudge:
    """The plain Python evaluator. Its generation is 0, for it has none."""

    name = "the plain evaluator"

    def __init__(self, policy: FirewallPolicy, why: str = "") -> None:
        self._policy = policy
        self.why = why

    def judge(self, packets: Sequence[Packet]) -> list[Verdict]:
        """See `Judge`."""
        judged = (oracle.judge(self._policy, packet) for packet in packets)
        return [Verdict(action, rule, 0) for action, rule in judged]


class KernelJudge:
    """The program itself, loaded beside whatever is enforced: it is attached to nothing and pinned nowhere."""

    name = "the kernel's program"
    why = ""

    def __init__(self, policy: FirewallPolicy, data: bytes) -> None:
        """`data` is the object file. Raises Refused: KERNEL_* where this machine does not let it run."""
        self._datapath = Datapath(data, flows=FLOWS)
        try:
            # its tests are the caller's to report, not a reason to refuse the question
            self._datapath.stage(msgspec.structs.replace(policy, tests=()))
        except BaseException:
            self._datapath.close()
            raise

    def judge(self, packets: Sequence[Packet]) -> list[Verdict]:
        """See `Judge`."""
        found = self._datapath.explain(packets)
        return [Verdict(verdict.action, verdict.rule, verdict.generation) for verdict in found]

    def judge_frames(self, frames: Iterable[Frame]) -> list[Verdict]:
        """The same for frames as they were captured. Raises Refused(POLICY_INVALID) for one that is too long to ask about."""
        found = self._datapath.explain_frames(frames)
        return [Verdict(verdict.action, verdict.rule, verdict.generation) for verdict in found]

    def close(self) -> None:
        """Unload it."""
        self._datapath.close()


def object_file() -> bytes:
    """The firewall's programs, compiled from their sources. Raises Refused(PACKAGE_MALFORMED) without a compiler."""
    source = Path(bpf.__file__).parent / "programs" / "firewall.bpf.c"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "firewall.bpf.o"
        compile_object(source, built)
        return built.read_bytes()


@contextmanager
def open_kernel(policy: FirewallPolicy, object_path: Path | None = None) -> Iterator[KernelJudge]:
    """The program as a judge; raises as `open_judge` does with KERNEL."""
    judge = KernelJudge(policy, object_path.read_bytes() if object_path else object_file())
    try:
        yield judge
    finally:
        judge.close()


@contextmanager
def open_judge(
    policy: FirewallPolicy, kind: Kind = Kind.AUTO, object_path: Path | None = None
) -> Iterator[Judge]:
    """A judge for this policy; `object_path` is a compiled object to use instead of compiling one.

    With AUTO the kernel's program where it runs, else the evaluator, which then knows why. Raises Refused: KERNEL_* and
    PACKAGE_MALFORMED with KERNEL, POLICY_INVALID for a policy that the program has no room for.
    """
    if kind is Kind.ORACLE:
        yield OracleJudge(policy)
        return
    judge: Judge
    kernel: KernelJudge | None = None
    try:
        judge = kernel = KernelJudge(policy, object_path.read_bytes() if object_path else object_file())
    except Refused as error:
        unable = error.code in (Code.KERNEL_REFUSED, Code.KERNEL_UNSUPPORTED, Code.PACKAGE_MALFORMED)
        if kind is Kind.KERNEL or object_path or not unable:
            raise
        judge = OracleJudge(policy, f" ({error.reason.splitlines()[0]})")
    try:
        yield judge
    finally:
        if kernel is not None:
            kernel.close()
