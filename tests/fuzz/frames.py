"""`python -m tests.fuzz.frames`: malformed, truncated and mutated frames against the real programs. Root only.

    --executions N   in all (default 100,000)   --seed S   the same frames again   --jobs N   processes   --json

Every frame is read by a plain parser, too. The probe must agree on its kind, verdict and rule; each hook gives one of its two
answers, counts as many truncated, unreadable and essential frames as there were, and lets nothing else pass than what a rule, a
flow or a related error accounts for. The kernel's log must stay as it was. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from operator import truediv
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' helpers

import plain_frames
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from loopback.bpf import layout
from loopback.cli.firewall_judge import object_file
from loopback.contracts.codes import Refused
from loopback.modules.firewall import packets, policy
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import Action, Direction

BATCH: Final = 500  # frames between two looks at the counters
SHORTEST: Final = 15  # bytes that TEST_RUN asks for
#: TEST_RUN of a TC program refuses shorter ones of these types itself: an IP header is missing. XDP and the probe get them.
SHORTEST_TC: Final = {b"\x08\x00": 14 + 20, b"\x86\xdd": 14 + 40}
LONGEST: Final = packets.LONGEST_FRAME
JUMBO: Final = 9_000
XDP, TC = {1: False, 2: True}, {2: False, 0xFFFFFFFF: True}  # answers, and whether they let pass
HOOKS: Final = {
    "fw_xdp": (XDP, Direction.INGRESS, False),
    "fw_tc_ingress": (TC, Direction.INGRESS, False),
    "fw_tc_egress": (TC, Direction.EGRESS, False),
    "fw_l3_ingress": (TC, Direction.INGRESS, True),
    "fw_l3_egress": (TC, Direction.EGRESS, True),
}
#: Why a hook may let pass what no rule does; the others are told by the frame alone.
BY_STATE: Final = ("flow", "related", "fragment", "adoption")
BY_FRAME: Final = ("essential", "truncated", "unparsed")
POLICY: Final = b"""
version: 1
default: {ingress: drop, egress: accept}
rules:
  - {name: dns, from: 10.0.0.0/8, proto: udp, ports: 53, action: accept}
  - {name: web, to: [10.77.0.0/16, "fd77::/64"], proto: tcp, ports: [80, "8000-8999"], action: accept}
  - {name: ping, proto: icmp, icmp: echo-request, action: accept}
  - {name: ping6, proto: icmpv6, icmp: [echo-request, packet-too-big], action: accept}
  - {name: sctp, from: "fd77::/64", proto: sctp, source_ports: "1-4000", action: accept}
  - {name: lite, proto: [udplite, dccp], ports: 53, action: accept}
  - {name: tunnels, from: [10.77.0.2, "fd77::2"], proto: [gre, esp, ipip], action: accept}
  - {name: odd, proto: 253, action: accept}
  - {name: noisy, direction: egress, to: [10.77.0.2, "fd77::2"], proto: [udp, tcp], ports: "7000-7999", action: drop}
  - {name: nobody, direction: egress, to: ["192.0.2.0/24", "2001:db8::/32"], action: drop}
  - {name: mute, direction: egress, proto: [icmp, icmpv6], action: drop}
"""
_NASTY: Final = (
    0,
    1,
    2,
    4,
    5,
    6,
    7,
    8,
    17,
    20,
    40,
    41,
    43,
    44,
    50,
    51,
    58,
    59,
    60,
    63,
    64,
    127,
    128,
    129,
    132,
    136,
    253,
    254,
    255,
)
_TYPES: Final = (0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8, 0x9100, 0x88CC, 0x0000, 0xFFFF)
_KINDS: Final = (0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 8)  # of mutation, see `mutated`
_TROUBLE: Final = re.compile(rb"WARNING|BUG|Oops|bpf", re.IGNORECASE)


def seeds() -> list[bytes]:
    """Frames of every kind that the programs read."""
    four, six = IP(src="10.77.0.2", dst="10.77.0.1"), IPv6(src="fd77::2", dst="fd77::1")
    inner4 = bytes(IP(src="10.77.0.1", dst="10.77.0.2") / UDP(sport=53, dport=53))[:28]
    inner6 = bytes(IPv6(src="fd77::1", dst="fd77::2") / UDP(sport=53, dport=53))[:48]
    bodies: list[Packet] = [
        four / UDP(sport=4000, dport=53) / Raw(b"x" * 18), four / TCP(sport=4000, dport=80, flags="S"),
        four / TCP(sport=80, dport=4000, flags="SA"), four / TCP(sport=4000, dport=8080, flags="R"),
        IP(src="10.77.0.2", dst="10.77.0.1", options=b"\x07\x0b\x04" + bytes(9)) / TCP(dport=22, flags="A"),
        four / ICMP(type=8) / Raw(b"abcdefgh"), four / ICMP(type=0), four / ICMP(type=3, code=3) / Raw(inner4),
        four / ICMP(type=11) / Raw(inner4), four / GRE() / Raw(bytes(20)), four / SCTP(sport=9, dport=9),
        IP(src="10.77.0.2", dst="10.77.0.1", flags="MF", id=7) / UDP(dport=53) / Raw(bytes(16)),
        IP(src="10.77.0.2", dst="10.77.0.1", frag=3, id=7, proto=17) / Raw(bytes(16)),
        IP(src="10.77.0.2", dst="10.77.0.1", frag=1, id=7, proto=6) / Raw(bytes(16)),
        IP(src="10.77.0.2", dst="10.77.0.1", proto=253) / Raw(bytes(8)),
        six / UDP(sport=4000, dport=53) / Raw(bytes(8)), six / TCP(dport=80, flags="S"), six / SCTP(sport=9, dport=9),
        six / ICMPv6EchoRequest(), six / ICMPv6PacketTooBig() / Raw(inner6),
        IPv6(src="fd77::2", dst="fd77::1", hlim=255) / ICMPv6ND_NS(tgt="fd77::1"),
        IPv6(src="fd77::2", dst="fd77::1", hlim=64) / ICMPv6ND_NA(tgt="fd77::1"),
        six / IPv6ExtHdrHopByHop() / UDP(dport=53), six / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting() / TCP(dport=80, flags="S"),
        six / IPv6ExtHdrFragment(m=1, id=5) / UDP(dport=53) / Raw(bytes(8)), six / IPv6ExtHdrFragment(offset=2, id=5, nh=17),
        six / AH(nh=17, payloadlen=4, icv=bytes(12)) / UDP(dport=53),
        six / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrDestOpt() / ICMPv6EchoRequest(),
        *(IP(src="10.77.0.2", dst="10.77.0.1", proto=kind) / Raw(b"\x0f\xa0\0\x35" + bytes(8)) for kind in (33, 132, 136)),
        *(IPv6(src="fd77::2", dst="fd77::1", nh=kind) / Raw(b"\x0f\xa0\0\x35" + bytes(8)) for kind in (33, 132, 136)),
        *(six / reduce(truediv, [IPv6ExtHdrDestOpt() for _ in range(count)]) / UDP(dport=53) for count in (7, 8, 9)),
    ]  # fmt: skip
    ether = Ether(src="02:77:00:00:00:02", dst="02:77:00:00:00:01")
    made = [bytes(ether / body) for body in bodies]
    made += [bytes(ether / Dot1Q(vlan=7) / body) for body in bodies[::3]]
    made += [bytes(ether / Dot1AD(vlan=7) / Dot1Q(vlan=8) / body) for body in bodies[::4]]
    made += [
        bytes(ether / Dot1Q() / Dot1Q() / Dot1Q() / bodies[0]),
        bytes(ether / ARP()),
        bytes(ether) + b"\x88\xcc" * 20,
    ]
    return made


def mutated(random: Random, pool: list[bytes]) -> bytes:
    """A frame near one of the seeds."""
    frame = bytearray(random.choice(pool))
    while True:
        kind = random.choice(_KINDS)
        at = random.randrange(min(len(frame), 120))
        if kind == 0:
            frame[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            frame[at] = random.choice(_NASTY)
        elif kind == 2:
            del frame[random.randrange(len(frame)) :]
        elif kind == 3:
            frame += random.randbytes(random.choice((1, 8, 46, 300)))
        elif kind == 4:
            frame[12:14] = struct.pack(">H", random.choice(_TYPES))
        elif kind == 5:
            frame[12:12] = struct.pack(">HH", random.choice(_TYPES[3:6]), random.randrange(4096))
        elif kind == 6:
            other = random.choice(pool)
            frame[at:] = other[random.randrange(len(other)) :]
        elif kind == 7:
            frame[at : at + 4] = random.randbytes(4)
        else:
            del frame[at : at + random.choice((1, 2, 4, 8, 40))]
        if len(frame) < SHORTEST:
            frame += bytes(SHORTEST - len(frame))
        if random.random() < 0.45:
            return bytes(frame[:LONGEST])


class Tried(NamedTuple):
    """`findings` are the first that differed; `kinds` says how many frames were what."""

    executions: int
    seconds: float
    kinds: dict[str, int]
    findings: list[str]


class Bench:
    """The programs, a plain reader, and what differed between them."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.pool = seeds()
        self.policy = policy.parse(POLICY)
        self.datapath = Datapath(object_file(), flows=4096)
        self.datapath.stage(self.policy)
        self.datapath.commit(0)
        self.probe = self.datapath._programs["fw_probe"].repeated(packets.MOST_ASKED)
        self.kinds: Counter[str] = Counter()
        self.findings: list[str] = []
        self.done = 0

    def close(self) -> None:
        self.datapath.close()

    def differs(self, what: str, frame: bytes) -> None:
        if len(self.findings) < 20:
            self.findings.append(f"{what}: {frame.hex()}")

    def ask(self, frame: bytes, direction: Direction, network: bool) -> None:
        """One frame to the probe, which tells all of its answer."""
        asked = packets.question(frame, direction=direction, network=network)
        found = packets.answer(self.probe(asked))
        kind, said = plain_frames.read(frame, network=network)
        self.done += 1
        self.kinds[kind] += 1
        if layout.PARSED[found.parsed] != kind:
            self.differs(f"the program says {layout.PARSED[found.parsed]}, not {kind}", frame)
            return
        verdict: tuple[Action, int | None]
        if said is None:
            verdict = Action.ACCEPT if kind == "essential" else Action.DROP, None
            if kind == "unparsed":
                verdict = self.policy.default[direction], None
        else:
            verdict = plain_frames.judge(self.policy, said, direction)
        order = found.order if found.order < len(self.policy.rules) else None
        if (Action(found.verdict), order) != verdict:
            self.differs(f"the program answers {found.verdict} by {order}, not {verdict} to {said}", frame)

    def through(self, name: str, frames: list[bytes]) -> None:
        """Frames through a hook, with what it counted."""
        answers, direction, network = HOOKS[name]
        run, before = self.datapath._programs[name].run, self.datapath.totals()
        expected: Counter[str] = Counter()
        surprises = 0
        if answers is TC:
            frames = [frame for frame in frames if len(frame) >= SHORTEST_TC.get(frame[12:14], 0)]
        for frame in frames:
            kind, said = plain_frames.read(frame, network=network)
            self.kinds[kind] += 1
            answer = run(frame)[0]
            if answer not in answers:
                self.differs(f"{name} answers {answer:#x}", frame)
                continue
            if said is None:
                expected[kind] += 1
                should = kind == "essential" or (
                    kind == "unparsed" and self.policy.default[direction] is Action.ACCEPT
                )
                if answers[answer] is not should:
                    self.differs(f"{name}: {kind} and passed: {answers[answer]}", frame)
                continue
            should = plain_frames.judge(self.policy, said, direction)[0] is Action.ACCEPT
            if should and not answers[answer]:
                self.differs(f"{name} drops what a rule accepts: {said}", frame)
            surprises += answers[answer] and not should
        self.done += len(frames)
        after = self.datapath.totals()
        gained = {key: after[key] - before[key] for key in after}
        way = direction.name.lower()
        for reason in BY_FRAME:
            counted = gained[f"{way}.{reason}.accept"] + gained[f"{way}.{reason}.drop"]
            if counted != expected[reason]:
                self.differs(f"{name} counts {counted} {reason}, not {expected[reason]}", b"")
        if surprises > sum(gained[f"{way}.{reason}.accept"] for reason in BY_STATE):
            self.differs(f"{name} let {surprises} pass that neither a rule nor a flow accounts for", b"")
        if gained[f"{way}.broken.drop"] or gained[f"{way}.broken.accept"]:
            self.differs(f"{name} found its slot broken", b"")

    def round(self) -> None:
        """A batch to the probe, and one to a hook."""
        for frame in self.frames():
            network = self.random.random() < 0.3
            self.ask(frame[14:] or b"\0" if network else frame, self.random.choice((*Direction,)), network)
        name = self.random.choice((*HOOKS,))
        network, made = HOOKS[name][2], list(self.frames())
        if network:
            made = [frame[14:].ljust(SHORTEST, b"\0") for frame in made]
        if name == "fw_xdp":
            made[0] += bytes(JUMBO - len(made[0]))
        self.through(name, made)

    def frames(self) -> Iterator[bytes]:
        for _ in range(BATCH):
            yield mutated(self.random, self.pool)


def trial(executions: int, seed: int) -> Tried:
    """So many frames of one seed. Raises Refused where the programs cannot be loaded."""
    bench = Bench(seed)
    began = time.monotonic()
    try:
        while bench.done < executions:
            bench.round()
    except Refused as error:  # it does not come back from another process
        bench.findings.append(str(error))
    finally:
        bench.close()
    return Tried(bench.done, time.monotonic() - began, dict(bench.kinds), bench.findings)


class KernelLog:
    """What the kernel has to say from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def trouble(self) -> list[str]:
        """Its new lines about trouble."""
        found = []
        while True:
            try:
                line = os.read(self._fd, 8192)
            except BlockingIOError:
                return found
            except BrokenPipeError:  # some were lost
                continue
            if _TROUBLE.search(line):
                found.append(line.decode(errors="replace").strip())

    def close(self) -> None:
        os.close(self._fd)


def tried(executions: int, seed: int, jobs: int) -> dict[str, Any]:
    """What came of so many executions in so many processes."""
    log = KernelLog()
    began = time.monotonic()
    with ProcessPoolExecutor(jobs) as pool:
        found = list(pool.map(trial, [executions // jobs] * jobs, range(seed, seed + jobs)))
    kinds: Counter[str] = Counter()
    for one in found:
        kinds.update(one.kinds)
    said = log.trouble()
    log.close()
    return {
        "executions": sum(one.executions for one in found),
        "seconds": round(time.monotonic() - began, 1),
        "kinds": dict(sorted(kinds.items())),
        "findings": [finding for one in found for finding in one.findings],
        "kernel": said,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.frames", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("only root may load the programs")
    found = tried(options.executions, options.seed, options.jobs)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        rate = found["executions"] / found["seconds"]
        print(f"{found['executions']:,} executions in {found['seconds']} s ({rate:,.0f} a second)")
        print("frames: " + ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items()))
        for line in (*found["findings"], *found["kernel"]):
            print(f"DIFFERS {line[:600]}")
        print(f"{len(found['findings'])} findings, {len(found['kernel'])} lines of the kernel")
    return 1 if found["findings"] or found["kernel"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
