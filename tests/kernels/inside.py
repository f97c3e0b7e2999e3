"""Inside a kernel under test: load every program and ask it. Prints one line, `ANSWER` and JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from loopback.bpf import loader
from loopback.contracts.codes import Refused
from loopback.modules.firewall import oracle, packets, policy
from loopback.modules.firewall.datapath import Datapath
from loopback.modules.firewall.model import Action, Direction, Packet

POLICY = b"""
version: 1
default: {ingress: drop, egress: accept}
sets:
  many: [%b]
rules:
  - {name: ssh, from: "@many", proto: tcp, ports: 22, action: accept}
  - {name: six, from: "fd00::/8", proto: udp, ports: "1000-2000", action: accept}
  - {name: ping, proto: icmp, icmp: echo-request, limit: {rate: 10/s}, action: accept}
  - {name: other, direction: egress, to: "@many", proto: udp, action: drop}
""" % b", ".join(b"10.%d.0.0/16" % number for number in range(200))
HOOKS = {"fw_xdp": (2, False), "fw_tc_ingress": (0xFFFFFFFF, False), "fw_l3_ingress": (0xFFFFFFFF, True)}


def asked(datapath: Datapath, found: Any) -> int:
    """Ask every hook about packets, and the probe; the oracle says what is right. Raises AssertionError."""
    count = 0
    for number in range(0, 256, 5):
        for source, protocol, port in (
            (f"10.{number}.1.1", 6, 22),
            (f"10.{number}.1.1", 17, 22),
            ("fd00::1", 17, 900 + 20 * number),
            (f"11.{number}.1.1", 1, 0),
        ):
            target = "fd00::2" if ":" in source else "10.0.0.1"
            packet = Packet(
                direction=Direction.INGRESS,
                src=source,
                dst=target,
                protocol=protocol,
                sport=4000 + number,
                dport=port,
                icmp_type=8,
            )
            frame = packets.frame(packet)
            right, name = oracle.judge(found, packet)
            answer = datapath.explain([packet])[0]
            assert (answer.action, answer.rule) == (right, name), f"{packet}: {answer}"
            count += 1
            if protocol == 1:
                continue  # the limit runs out
            for hook, (passes, network) in HOOKS.items():
                result = datapath._programs[hook].run(frame[14:] if network else frame)[0]
                assert (result == passes) is (right is Action.ACCEPT), (
                    f"{hook} gives {result:#x} for {packet}"
                )
                count += 1
    assert datapath.totals()["flows_created"] and list(datapath.flows())
    return count


def main() -> dict[str, Any]:
    try:
        data = Path(sys.argv[1]).read_bytes()
        loaded = loader.load(data)
        verified = {name: program.verified for name, program in loaded.programs.items()}
        loaded.close()
        datapath = Datapath(data, flows=4096)
        found = policy.parse(POLICY)
        datapath.stage(found)
        datapath.commit(0)
        return {"ok": True, "verified": verified, "asked": asked(datapath, found)}
    except (Refused, AssertionError, OSError) as error:
        return {"ok": False, "why": str(error)[-2000:]}


if __name__ == "__main__":
    print("ANSWER " + json.dumps(main()), flush=True)
