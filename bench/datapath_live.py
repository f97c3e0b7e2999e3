"""The figures that are about change: how long one takes, and what packets meet while policies, programs and processes go."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import datapath_ours as ours
import datapath_sets as sets
import nftpeers
import rulesets
from datapath_figures import million_file
from datapath_kernel import UDP, Tuple, frame
from datapath_limited import Limited
from datapath_run import CannotMeasure, Goal, Run, median, median_figure, progress, replacing, spread
from datapath_veth import Side, inside, nft_load
from report import Figure

from loopback import modules
from loopback.bpf.flood import Flood
from loopback.contracts import abi
from loopback.host.launch import launch
from loopback.host.process import ModuleProcess
from loopback.modules.build import build_module
from loopback.modules.firewall.model import FirewallPolicy
from loopback.trust import manifest
from loopback.trust.package import extract

KIND: Final = "acl1"  # the set whose change is timed
MIXED_PACKETS, MIXED_COMMITS = 10_000_000, 1_000
LEAK_PACKETS, LEAK_CHANGES = 1_000_000, 100
SEEN, SEEN_S = 10_000, 20.0  # packets that must reach the stack while nothing denies them, and in what time
SWAPS: Final = 25  # commits between two looks at the counters
MILLION_ROUNDS: Final = 3  # a load by nft takes seconds
SLOW_S: Final = 5.0  # a form that takes longer to load is loaded once, where another is faster
MOST_COMMITS: Final = 50_000  # so many without the packets: the generator stands still
SOURCE: Final = Path(next(iter(modules.__path__))) / "firewall"
_DIGEST: Final = "ab" * 32


# ── change ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _changes(run: Run) -> tuple[str, list[dict[str, float]], dict[str, list[float]]]:
    """(the form that nft loads fastest, ms of our steps by round, ms of each nft form by round)."""
    name, fives = run.set10k(KIND)
    policy = sets.dropping(fives)
    with Side("ours") as own, Limited(own.host) as process, contextlib.ExitStack() as stack:
        progress(f"change of one rule: {name}")
        process(ours.attach, run.program, own.root, own.state, _changed_file(run, policy, 0))
        peers: dict[str, Side] = {}
        times: dict[str, list[float]] = {}
        for form in ("layered", "tree"):
            peer = stack.enter_context(Side(f"nft {form}"))
            try:
                first = peer.nft(run.nft_text(name, policy, form), run.folder)
            except (RuntimeError, nftpeers.Unfit) as problem:
                progress(f"change: nft {form}: {problem}")
                continue
            if first > SLOW_S and peers:
                times[form] = [first * 1e3]  # once is enough to see that it is not the fastest
            else:
                peers[form], times[form] = peer, []
        if not peers:
            raise CannotMeasure("nftables loads no form of this policy")
        steps: list[dict[str, float]] = []
        for number in range(1, run.rounds + 1):
            path = _changed_file(run, policy, number)
            steps.append(process(ours.change, path))
            for form, peer in peers.items():
                text = run.folder / "changed.nft"
                text.write_text(run.nft_text(name, sets.changed(policy, number), form))
                began = time.perf_counter()
                nft_load(peer.host, text)
                times[form].append((time.perf_counter() - began) * 1e3)
    return min(peers, key=lambda form: median(times[form])), steps, times


def _changed_file(run: Run, policy: FirewallPolicy, number: int) -> Path:
    return run.shelf.write("changed", rulesets.plain(sets.changed(policy, number)) | {"tests": sets.proofs()})


def change_ms(run: Run, goal: Goal) -> Figure:
    """ms from the file of 10k rules with one changed to its commit: read, parse, compile, proof, write, grace."""
    _, steps, _ = _changes(run)
    runs = [step["all"] for step in steps]
    words = ", ".join(
        f"{name} {median([s[name] for s in steps]):.1f}" for name in ("parse", "stage", "commit")
    )
    return median_figure(goal, runs, f"{words} ms; {sets.PROOFS} proofs {spread(runs)}")


def change_vs_nft(run: Run, goal: Goal) -> Figure:
    """The same ÷ `nft -f` of the same policy."""
    best, steps, times = _changes(run)
    runs = [step["all"] / other for step, other in zip(steps, times[best], strict=True)]
    words = ", ".join(f"nft {form} {median(ms):.0f} ms" for form, ms in times.items())
    return median_figure(goal, runs, f"÷ {best}, the form that loads fastest; {words}")


# ── a million prefixes ────────────────────────────────────────────────────────────────────────────────────────────────────


def million_load_vs_nft(run: Run, goal: Goal) -> Figure:
    """Load of a million-prefix set, from its text ÷ nft's load of the same."""
    count = 20_000 if run.quick else 1_000_000
    own_file = million_file(run, count)
    text = run.folder / "million.nft"
    text.write_text(replacing(nftpeers.million(rulesets.million(count), stateful=True)))
    mine, theirs = [], []
    with Side("nft million") as peer:
        for number in range(min(run.rounds, MILLION_ROUNDS)):
            progress(f"a set of {count} prefixes: load {number + 1}")
            mine.append(run.limited(ours.load, run.program, own_file))
            began = time.perf_counter()
            nft_load(peer.host, text)
            theirs.append(time.perf_counter() - began)
    runs = [a / b for a, b in zip(mine, theirs, strict=True)]
    return median_figure(goal, runs, f"{statistics.median(mine):.2f} s ÷ {statistics.median(theirs):.2f} s")


# ── the module as the host starts it ──────────────────────────────────────────────────────────────────────────────────────


@cache
def _package(folder: Path, version: str) -> tuple[Path, manifest.Manifest]:
    """A release, unpacked as the agent keeps it. Releases differ in their programs, so one takes over from the other."""
    overlay = folder / f"overlay-{version}"
    program = overlay / "bpf" / "programs" / "firewall.bpf.c"
    program.parent.mkdir(parents=True)
    text = (SOURCE.parent.parent / "bpf" / "programs" / "firewall.bpf.c").read_text()
    mark = f'const volatile char bench_release[] = "{version}";\n'
    program.write_text(text + mark)
    built = build_module(SOURCE, version=version, overlay=overlay, out=folder)
    place = folder / version
    extract(built.path, place)
    return place, built.manifest


async def _started(
    side: Side | _Names,
    place: Path,
    found: manifest.Manifest,
    group: asyncio.TaskGroup,
    at: list[float] | None = None,
) -> ModuleProcess:
    """The module's process, configured, in the namespace of the thread that starts it. `at` gets the times of both steps."""
    how = launch(found, "b" * 64, place, side.state, side.state / "module.log")
    process = await ModuleProcess.start(how, group)
    if at is not None:
        at.append(time.perf_counter())
    settings: dict[str, Any] = {"interfaces": ["*"], "bpf_root": str(side.bpf)}
    await process.request(
        abi.Configure(host="host", workspace="bench", state_dir=str(side.state), settings=settings)
    )
    if at is not None:
        at.append(time.perf_counter())
    return process


async def _enforced(process: ModuleProcess, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    await process.request(abi.Stage(digest=digest, serial=1, content=content))
    await process.request(abi.Commit(digest=digest, trial_s=60))
    await process.request(abi.Confirm(digest=digest))
    health = await process.health()
    if not health.enforcing or health.policy != digest:
        raise CannotMeasure(f"the module does not enforce: {health.reason}")


def start_s(run: Run, goal: Goal) -> Figure:
    """s from the start of the module's process, its package on disk, to a policy of 10k rules in force."""
    name, fives = run.set10k(KIND)
    contents = {
        "many": run.shelf.put(name, sets.dropping(fives)).read_bytes(),
        "few": run.shelf.put(f"{name} few", sets.dropping(sets.a_few(fives))).read_bytes(),
    }
    place, found = _package(run.folder, "1.0.0")
    steps: dict[str, list[tuple[float, ...]]] = {"many": [], "few": []}

    async def once(side: Side, content: bytes) -> tuple[float, ...]:
        async with asyncio.TaskGroup() as group:
            at = [time.perf_counter()]
            process = await _started(side, place, found, group, at)
            try:
                await _enforced(process, content)
                at.append(time.perf_counter())
                return tuple(later - at[0] for later in at[1:])
            finally:
                await process.stop(remove=True)

    progress(f"start of the module: {name}")
    with Side("start") as side, inside(side.host):
        for _ in range(run.rounds):
            for which, content in contents.items():
                steps[which].append(asyncio.run(once(side, content)))
    hello, opened, total = (median([step[n] for step in steps["many"]]) for n in range(3))
    words = (
        f"its hello {hello:.2f}, then its programs loaded {opened - hello:.2f}, then the policy {total - opened:.2f} s;"
        f" with ten rules {median([step[2] for step in steps['few']]):.2f} s in all"
    )
    return median_figure(goal, [step[2] for step in steps["many"]], words)


# ── packets meanwhile ─────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD: Final = {"version": 1, "default": {"ingress": "drop", "egress": "accept"}}
#: Each drops the packet from `PEER` to port 7777: by its set, or by its rule. Rules of one with the set of the other accept it.
PEER: Final = Tuple(0x0A4D0002, 0x0A4D0001, 4000, 7777, UDP)
FILLER: Final = 100  # rules beside them, so that writing a slot takes its time


def _halves(run: Run) -> list[Path]:
    found = []
    for name, held, port in (("even", "198.51.100.0/24", 7777), ("odd", "10.77.0.2/32", 8888)):
        filler = [
            {
                "name": f"{name}{n}",
                "from": [f"203.0.113.{n}"],
                "proto": "udp",
                "ports": 53,
                "action": "accept",
            }
            for n in range(FILLER)
        ]
        rule = {"name": "guest", "from": "@guests", "proto": "udp", "ports": port, "action": "accept"}
        found.append(run.shelf.write(name, HEAD | {"sets": {"guests": [held]}, "rules": [*filler, rule]}))
    return found


@contextlib.contextmanager
def _flooding(side: Side) -> Iterator[Flood]:
    """The packet `PEER` to the host, without pause."""
    with inside(side.peer):  # the generator's thread stays there
        flood = Flood(side.ifindex, _packet())
        flood.start()
    try:
        yield flood
    finally:
        flood.close()


def mixed(run: Run, goal: Goal) -> Figure:
    """Packets with a mixed verdict under commits that rewrite the idle slot each time."""
    packets, commits = (200_000, 50) if run.quick else (MIXED_PACKETS, MIXED_COMMITS)
    paths = _halves(run)
    with Side("mixed") as side, Limited(side.host) as process:
        process(ours.attach, run.program, side.root, side.state, paths[0])
        dropped = accepted = done = 0
        with _flooding(side):
            while dropped + accepted < packets or done < commits:
                gained = process(ours.swap, paths, SWAPS)
                done += SWAPS
                dropped += sum(v for k, v in gained.items() if k.endswith(".drop"))
                accepted += sum(v for k, v in gained.items() if k.endswith(".accept"))
                if done % 250 == 0:
                    progress(f"mixed: {accepted} of {dropped + accepted} packets in {done} commits")
                if done > MOST_COMMITS:
                    raise CannotMeasure(f"the generator sent {dropped + accepted} packets in {done} commits")
    return Figure(
        accepted, goal.unit, [accepted], goal.goal, f"of {dropped + accepted} packets in {done} commits"
    )


def _agent(side_host: str, state: Path, bpf: Path, place: Path, found: manifest.Manifest, pipe: Any) -> None:
    """What stands for the agent: the host's own code starts the module and watches over it until somebody kills this."""
    side = _Names(side_host, state, bpf)

    async def serve() -> None:
        async with asyncio.TaskGroup() as group:
            process = await _started(side, place, found, group)
            while True:
                pipe.send((process.pid, (await process.health()).enforcing))
                asked = await asyncio.to_thread(pipe.recv)
                if asked is not None:
                    await _enforced(process, asked)

    with inside(side_host):
        asyncio.run(serve())


class _Names:
    """A side as another process knows it."""

    def __init__(self, host: str, state: Path, bpf: Path) -> None:
        self.host, self.state, self.bpf = host, state, bpf


def leaked(run: Run, goal: Goal) -> Figure:
    """Denied packets that reach the stack while program, module and agent are replaced or killed."""
    packets, changes = (20_000, 9) if run.quick else (LEAK_PACKETS, LEAK_CHANGES)
    content = run.shelf.write("shut", HEAD).read_bytes()
    releases = [_package(run.folder, version) for version in ("1.0.0", "1.1.0")]
    context = multiprocessing.get_context("fork")
    count = {"program": 0, "module": 0, "agent": 0}
    with Side("leaked") as side:
        number = 0
        with _flooding(side):  # the measure itself: where nothing denies them, these packets are seen
            deadline = time.monotonic() + SEEN_S
            while side.snmp()["InReceives"] < SEEN:
                if time.monotonic() > deadline:
                    raise CannotMeasure("the packets do not reach the stack where nothing denies them")
                time.sleep(0.01)

        def agent(release: int) -> Any:
            ours_end, theirs = context.Pipe()
            child = context.Process(
                target=_agent, args=(side.host, side.state, side.bpf, *releases[release], theirs), daemon=True
            )
            child.start()
            theirs.close()
            try:
                pid, enforcing = ours_end.recv()
            except EOFError:
                raise CannotMeasure("an agent ended before its module enforced") from None
            return child, ours_end, pid, enforcing

        child, pipe, pid, _ = agent(0)
        pipe.send(content)
        pipe.recv()
        before, came = side.snmp()["InReceives"], side.received()
        release = 0
        with _flooding(side):
            while sum(count.values()) < changes or side.received() - came < packets:
                what = ("program", "module", "agent")[number % 3]
                number += 1
                if what == "program":  # a release with other programs takes over
                    release ^= 1
                os.kill(pid if what == "module" else child.pid, signal.SIGKILL)
                if what == "module":
                    child.kill()
                child.join()
                pipe.close()
                _until_gone(pid)
                child, pipe, pid, enforcing = agent(release)
                if what == "program":
                    pipe.send(content)
                    _, enforcing = pipe.recv()
                if not enforcing:
                    raise CannotMeasure(f"after the {what} the successor does not enforce")
                count[what] += 1
                if number % 15 == 0:
                    progress(
                        f"leaked: {side.snmp()['InReceives'] - before} of {side.received() - came} packets, {count}"
                    )
        arrived = side.received() - came
        found = side.snmp()["InReceives"] - before
        child.kill()
        child.join()
        pipe.close()
        _until_gone(pid)
    return Figure(found, goal.unit, [found], goal.goal, f"of {arrived} packets; replaced or killed: {count}")


def _until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def _packet() -> bytes:
    """PEER as a frame of its own: UDP without a checksum."""
    data = bytearray(frame(4))
    data[26:30], data[30:34] = PEER.source.to_bytes(4, "big"), PEER.destination.to_bytes(4, "big")
    data[34:38] = PEER.source_port.to_bytes(2, "big") + PEER.destination_port.to_bytes(2, "big")
    data[24:26] = b"\0\0"
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(14, 34, 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    data[24:26] = (~total & 0xFFFF).to_bytes(2, "big")
    return bytes(data)
