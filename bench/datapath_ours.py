"""Our own side of the datapath's bench: functions for a `Limited` process, which hold the real datapath and time it."""

from __future__ import annotations

import statistics
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

from datapath_kernel import Bench, Tuple

from loopback.bpf.objects import Program
from loopback.contracts.codes import Refused
from loopback.modules.firewall import policy as policies
from loopback.modules.firewall.datapath import Datapath

MIB: Final = 1 << 20


class Task(NamedTuple):
    """What to time in one process: every policy (a JSON file), and beside them the bare program and the kernel's LPM.

    `tuples` None are uniformly random packets. `prefixes` are the peer's, (family, address, length).
    """

    program: bytes
    policies: Mapping[str, Path]
    rounds: int
    family: int = 4
    tuples: tuple[Tuple, ...] | None = None
    prefixes: Mapping[str, tuple[tuple[int, int, int], ...]] = {}


class Times(NamedTuple):
    """ns above the bare program by side, one per round; why a policy was refused; ns of the bare program and of `vary`."""

    above: dict[str, list[float]]
    refused: dict[str, str]
    bare: float
    vary: float


@contextmanager
def _holding(program: bytes, path: Path) -> Any:
    """The datapath with a policy in force, attached to no device."""
    datapath = Datapath(program)
    try:
        datapath.stage(policies.parse(path.read_bytes(), path.name), "ab" * 32)
        datapath.commit(0)
        yield datapath
    finally:
        datapath.close()


def judged(datapath: Datapath) -> dict[str, int]:
    """Packets by reason and verdict."""
    return {
        name.removeprefix("ingress."): value
        for name, value in datapath.totals().items()
        if name.startswith("ingress.") and value
    }


def _each_holding(task: Task, stack: ExitStack) -> tuple[dict[str, Datapath], dict[str, str]]:
    """A private firewall for each policy, and why others have none."""
    datapaths: dict[str, Datapath] = {}
    refused: dict[str, str] = {}
    for name, path in task.policies.items():
        try:
            datapaths[name] = stack.enter_context(_holding(task.program, path))
        except Refused as refusal:
            refused[name] = refusal.reason
    return datapaths, refused


def new_flows(task: Task) -> Times:
    """The new-flow path of each policy: parse, connection-table miss, classification, a verdict of drop."""
    with ExitStack() as stack:
        sides: dict[str, tuple[Bench, Program]] = {}
        main = stack.enter_context(Bench())
        datapaths, refused = _each_holding(task, stack)
        sides |= {name: (main, d._programs["fw_xdp"]) for name, d in datapaths.items()}
        for name, prefixes in task.prefixes.items():
            peer = stack.enter_context(Bench(prefixes))
            sides[name] = (peer, peer.program(f"lookups{task.family}"))
        for bench in {id(b): b for b, _ in sides.values()}.values():
            if task.tuples is None:
                bench.random(task.family)
            else:
                bench.tuples(task.family, task.tuples)
        times = _alternating(sides, main, task)
        for name, datapath in datapaths.items():
            found = judged(datapath)
            wrong = {
                k: v for k, v in found.items() if not k.endswith(".drop") or "broken" in k or "truncated" in k
            }
            if wrong or not found:
                raise AssertionError(f"{name}: not every packet was a new flow that is dropped: {found}")
        return times._replace(refused=refused)


def _alternating(sides: Mapping[str, tuple[Bench, Program]], main: Bench, task: Task) -> Times:
    """Every side once in each round, the bare program around it."""
    above: dict[str, list[float]] = {name: [] for name in sides}
    bare = main.program("bare")
    bares, alone = [], []
    for bench, program in sides.values():  # caches, and how long a sample must be
        bench.sample(program, task.family)
    for _ in range(task.rounds):
        alone.append(main.alone(bare, task.family))
        for name, (bench, program) in sides.items():
            before = bench.sample(bench.program("bare"), task.family)
            taken = bench.sample(program, task.family)
            after = bench.sample(bench.program("bare"), task.family)
            bares.append((before + after) / 2)
            above[name].append(taken - (before + after) / 2)
    base = statistics.median(bares)
    return Times(above, {}, statistics.median(alone), base - statistics.median(alone))


def established(task: Task) -> Times:
    """Packets of flows that a policy has allowed: `tuples` are what it accepts, once each way."""
    assert task.tuples
    with ExitStack() as stack:
        bench = stack.enter_context(Bench())
        datapaths, refused = _each_holding(task, stack)
        bench.tuples(task.family, task.tuples)
        sides = {name: (bench, d._programs["fw_xdp"]) for name, d in datapaths.items()}
        for name, (_, program) in sides.items():  # open every flow
            bench.run(program, task.family, len(task.tuples))
            before = judged(datapaths[name])
            bench.run(program, task.family, 2 * len(task.tuples))
            after = judged(datapaths[name])
            gained = {
                key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)
            }
            if set(gained) != {"flow.accept"}:
                raise AssertionError(f"{name}: packets of open flows were judged otherwise: {gained}")
        return _alternating(sides, bench, task)._replace(refused=refused)


def memory(program: bytes, path: Path) -> float:
    """MiB of maps and programs with a policy in both slots, without the connection table."""
    with _holding(program, path) as datapath:
        for _ in range(2):
            datapath.stage(policies.parse(path.read_bytes(), path.name), "cd" * 32)
            datapath.commit(0)
        found = _charged()
        for name in ("flows", "flow_tags"):
            del found["map", datapath._maps[name].id]
        return sum(found.values()) / MIB


def _charged() -> dict[tuple[str, int], int]:
    """Bytes that the kernel accounts to each map and program that this process has open."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            kind = str(link.readlink())
        except FileNotFoundError:
            continue  # the listing's own
        if kind in ("anon_inode:bpf-map", "anon_inode:bpf-prog"):
            about = dict(
                line.split(":", 1)
                for line in Path(f"/proc/self/fdinfo/{link.name}").read_text().splitlines()
                if ":" in line
            )
            word = kind.removeprefix("anon_inode:bpf-")
            found[word, int(about[f"{word}_id"])] = int(about["memlock"])
    return found


# ── on a device: pinned, so that it stays when this process goes ──────────────────────────────────────────────────────────

_open: dict[str, Datapath] = {}


def attach(program: bytes, root: Path, state: Path, path: Path) -> dict[str, str]:
    """Enforce a policy on every device of this namespace. Kept open for `change`."""
    datapath = Datapath(program, root=root, state_dir=state)
    _open["device"] = datapath
    datapath.stage(policies.parse(path.read_bytes(), path.name), "ab" * 32)
    datapath.commit(0)
    return {one.device: str(one.ingress) for one in datapath.attachments}


def change(path: Path) -> dict[str, float]:
    """A changed policy from its file to its commit; ms of each step."""
    datapath = _open["device"]
    at = [perf_counter_ns()]
    data = path.read_bytes()
    at.append(perf_counter_ns())
    found = policies.parse(data, path.name)
    at.append(perf_counter_ns())
    datapath.stage(found, "cd" * 32)
    at.append(perf_counter_ns())
    datapath.commit(0)
    at.append(perf_counter_ns())
    names = ("read", "parse", "stage", "commit")
    return {name: (b - a) / 1e6 for name, a, b in zip(names, at, at[1:], strict=False)} | {
        "all": (at[-1] - at[0]) / 1e6
    }


def seen() -> dict[str, int]:
    """Packets that the attached datapath judged, by reason and verdict."""
    return judged(_open["device"])


def load(program: bytes, path: Path) -> float:
    """s from a policy's file to its commit, with nothing in force before."""
    datapath = Datapath(program)
    try:
        began = perf_counter_ns()
        datapath.stage(policies.parse(path.read_bytes(), path.name), "ab" * 32)
        datapath.commit(0)
        return (perf_counter_ns() - began) / 1e9
    finally:
        datapath.close()


def swap(paths: Sequence[Path], commits: int) -> dict[str, int]:
    """Commit the policies in turn, so often, each time written anew; what the attached datapath judged meanwhile."""
    datapath = _open["device"]
    found = [policies.parse(path.read_bytes(), path.name) for path in paths]
    before = judged(datapath)
    for number in range(commits):
        datapath.stage(found[number % len(found)], struct.pack(">I", number).hex().rjust(64, "0"))
        datapath.commit(60)
        datapath.confirm()
    after = judged(datapath)
    return {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
