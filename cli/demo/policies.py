"""The files that the demo's operator writes: policies and rollouts, as docs/policy.md and the README describe them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from loopback.cli.demo import network

ALLOWED_TCP: Final = 8080
DENIED_TCP: Final = 9090
ALLOWED_UDP: Final = 5353
DENIED_UDP: Final = 9999
MIXED_UDP: Final = 7777  # only a mixture of the policies "even" and "odd" lets it in
FLOOD_SOURCE: Final = network.CLIENT_ADDRESSES[1]

_BASE: Final = """\
version: 1
default: {ingress: drop, egress: accept}
sets:
  clients: [CLIENT4/32, "CLIENT6/128"]
  guests: [GUESTS]
rules:
  - {name: web, direction: ingress, from: "@clients", proto: tcp, ports: TCP, action: accept}
  - {name: names, direction: ingress, from: "@clients", proto: udp, ports: UDP, action: accept}
  - {name: guest, direction: ingress, from: "@guests", proto: udp, ports: MIXED, action: ANSWER}
  - {name: ping, direction: ingress, proto: [icmp, icmpv6], action: accept}
tests:
  - {packet: {src: CLIENT4, dst: HOST, proto: tcp, dport: TCP}, expect: accept}
  - {packet: {src: CLIENT4, dst: HOST, proto: tcp, dport: DENIED}, expect: drop}
  - {packet: {src: FLOOD, dst: HOST, proto: udp, dport: MIXED}, expect: drop}
"""


def _fill(**words: str) -> str:
    known = {
        "CLIENT4": network.CLIENT_ADDRESSES[0],
        "CLIENT6": network.CLIENT_ADDRESSES6[0],
        "FLOOD": FLOOD_SOURCE,
        "HOST": network.address(1),
        "TCP": str(ALLOWED_TCP),
        "UDP": str(ALLOWED_UDP),
        "DENIED": str(DENIED_TCP),
        "MIXED": str(MIXED_UDP),
        **words,
    }
    return re.sub(r"\b[A-Z]+[46]?\b", lambda match: known[match[0]], _BASE)


def even() -> str:
    """Guests may come in, but the flood's source is no guest: its packets are dropped by the default."""
    return _fill(GUESTS="198.51.100.0/24", ANSWER="accept")


def odd() -> str:
    """The flood's source is a guest, but guests are turned away: its packets are dropped by the rule."""
    return _fill(GUESTS=f"{FLOOD_SOURCE}/32", ANSWER="drop")


def rollout(name: str, workspace: str, version: str, policy: str, trial: str = "2s", soak: str = "1s") -> str:
    """A rollout file: one canary, then the rest."""
    return f"""\
rollout: {name}
workspace: {workspace}
module: firewall
version: {version}
policy: {policy}
waves:
  - {{name: canary, count: 1, labels: {{role: web}}, soak: {soak}}}
  - {{name: rest, percent: 100}}
gates: {{max_failed: 0%, min_sample: 1}}
host_deadline: 60s
trial: {trial}
on_failure: rollback
"""


def write(folder: Path, name: str, text: str) -> Path:
    """Write one of them and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path
