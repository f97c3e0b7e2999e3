"""The firewall's parsers: policies, packets, captures, and the rules of other firewalls."""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from loopback.cli import firewall_import, firewall_packets, firewall_pcap
from loopback.modules.firewall import policy as policies
from loopback.modules.firewall import policy_fast, policy_text
from loopback.modules.firewall.compile import assign, compile_policy
from loopback.modules.firewall.policy_fields import Wrong

from .registry import MALFORMED, Made, target

POLICIES: Final = (
    b"""version: 1
default: {ingress: drop, egress: accept}
sets:
  office: [203.0.113.0/24, "2001:db8::/32"]
  web: [10.1.0.0/16]
rules:
  - {name: ssh, direction: ingress, from: "@office", proto: tcp, ports: 22, action: accept,
     limit: {rate: 10/s, burst: 20, per: source}, log: {sample: 100}}
  - {name: dns, direction: ingress, from: [10.0.0.0/8], to: [10.1.0.0/16], proto: udp,
     source_ports: "1024-65535", ports: [53, "8000-8100"], action: accept}
tests:
  - {packet: {src: 198.51.100.7, dst: 10.1.0.5, proto: tcp, dport: 22}, expect: drop}
""",
    b'{"version":1,"default":{"ingress":"drop","egress":"accept"},"rules":[{"name":"a","proto":"icmp","icmp":[8],"action":"accept"}]}',
)


@target("policy-text", "policy")
def _policy_text() -> Made:
    return (lambda data: policies.parse(data)), POLICIES


@target("policy-content", "json")
def _policy_content() -> Made:
    """As a host gets it: JSON, parsed and compiled to the datapath's slot."""

    def run(data: bytes) -> None:
        policy = policies.parse(data, "policy.json")
        compile_policy(policy, assign({}, [rule.name for rule in policy.rules]))

    return run, tuple(policies.to_json(policies.loads(text).plain) for text in POLICIES)


@target("packet", "policy")
def _packet() -> Made:
    return (lambda data: policies.read_packet(data)), (
        b'{"src": "198.51.100.7", "dst": "10.1.0.5", "proto": "tcp", "dport": 22}',
        b"src: 2001:db8::1\ndst: 2001:db8::2\nproto: icmp\nicmp: 8/0\n",
    )


@target("policy-quick", "json")
def _policy_quick() -> Made:
    """The quick reader, warm from whatever came before, held to the slow one."""

    def run(data: bytes) -> None:
        quick = policy_fast.read(data)
        slow = policies._read(policy_text.Source(data, "policy.json"))
        assert quick is None or quick == slow

    return run, tuple(policies.to_json(policies.loads(text).plain) for text in POLICIES)


@target("packet-lines", "json", *MALFORMED, ValueError, OSError, Wrong, firewall_packets._Other)
def _packet_lines() -> Made:
    def run(data: bytes) -> None:
        found = firewall_packets.quick(data)
        lines = [line for line in data.split(b"\n") if line.strip()]
        if len(found) == len(lines):  # JSON may hold line breaks between its words
            assert found == [firewall_packets.read_one(line, "lines") for line in lines]

    return run, (
        b'{"src":"198.51.100.7","dst":"10.1.0.5","proto":"tcp","dport":22}\n{"src":"::1","dst":"::2","proto":58,"icmp_type":8}\n',
        b'{"direction":"egress","src":"10.0.0.1","dst":"10.0.0.2","proto":"udp","sport":null,"iface":"eth0","state":"invalid"}',
    )


@target("pcap", "bytes")
def _pcap() -> Made:
    frame = bytes.fromhex("02000000000102000000000208004500001400010000400600000a0000010a000002")
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    pcap = head + struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame
    section = struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    device = struct.pack("<IIHHIHH4sI", 1, 28, 1, 0, 0, 2, 4, b"eth0", 28)
    body = struct.pack("<IIIII", 0, 0, 0, len(frame), len(frame)) + frame + bytes(-len(frame) % 4)
    body += struct.pack("<HHI", 2, 4, 2)
    block = struct.pack("<II", 6, len(body) + 12) + body + struct.pack("<I", len(body) + 12)
    return (lambda data: list(firewall_pcap.read(data))), (pcap, section + device + block)


def _import(data: bytes) -> None:
    plain, _, _ = firewall_import.translate(data)
    policies.parse(policies.to_json(plain))


@target("import-iptables", "text")
def _import_iptables() -> Made:
    return _import, (
        b"""*filter
:INPUT DROP [0:0]
:OUTPUT ACCEPT [0:0]
:web - [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT ! -s 10.0.0.0/8 -i lo -p tcp -m multiport --dports 80,8000:8100 -j web
-A INPUT -p icmp -m icmp --icmp-type 3/4 -m limit --limit 5/sec --limit-burst 9 -j ACCEPT
-A INPUT -p udp -m udp ! --sport 53 -m comment --comment "a b" -j REJECT --reject-with icmp-port-unreachable
-A web -s 192.168.1.5/32 -j RETURN
-A web -s 192.168.0.0/16 -j LOG --log-prefix x
-A web -s 192.168.0.0/16 -j DROP
COMMIT
""",
    )


@target("import-nft", "json")
def _import_nft() -> Made:
    def match(left: dict[str, Any], right: Any, op: str = "==") -> dict[str, Any]:
        return {"match": {"op": op, "left": left, "right": right}}

    port = {"payload": {"protocol": "tcp", "field": "dport"}}
    source = {"payload": {"protocol": "ip", "field": "saddr"}}
    of = {"family": "inet", "table": "f"}
    exprs: list[list[Any]] = [
        [match({"ct": {"key": "state"}}, ["established", "related"], "in"), {"accept": None}],
        [match(source, "@bad"), {"counter": {"packets": 0, "bytes": 0}}, {"drop": None}],
        [match(source, {"prefix": {"addr": "10.0.0.0", "len": 8}}, "!="), {"jump": {"target": "web"}}],
        [
            {
                "vmap": {
                    "key": port,
                    "data": {
                        "set": [[22, {"accept": None}], [{"range": [30, 40]}, {"goto": {"target": "web"}}]]
                    },
                }
            }
        ],
        [match({"concat": [source, port]}, {"set": [{"concat": ["1.2.3.4", 25]}]}), {"accept": None}],
        [
            match({"meta": {"key": "iifname"}}, "lo"),
            {"limit": {"rate": 5, "burst": 5, "per": "second"}},
            {"accept": None},
        ],
    ]
    listed: list[dict[str, Any]] = [
        {"chain": {**of, "name": "web", "handle": 1}},
        {
            "chain": {
                **of,
                "name": "input",
                "handle": 2,
                "type": "filter",
                "hook": "input",
                "prio": 0,
                "policy": "drop",
            }
        },
        {
            "set": {
                **of,
                "name": "bad",
                "type": "ipv4_addr",
                "handle": 3,
                "elem": ["9.9.9.9", {"range": ["8.0.0.1", "8.0.0.9"]}],
            }
        },
        {"rule": {**of, "chain": "web", "handle": 4, "expr": [match(port, 80), {"return": None}]}},
        *({"rule": {**of, "chain": "input", "handle": 5, "expr": expr}} for expr in exprs),
    ]
    return _import, (msgspec.json.encode({"nftables": listed}),)
