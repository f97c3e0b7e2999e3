"""What the real nft and iptables print of rules that were loaded into them, as a policy."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from loopback.cli.firewall_import import translate
from loopback.modules.firewall import oracle, policy, policy_tables

NFT = """
table inet f {
  set bad { type ipv4_addr; flags interval; elements = { 172.16.0.0/12, 192.168.1.1-192.168.1.7 } }
  map services { type inet_service : verdict; elements = { 22 : accept, 23 : drop } }
  chain web {
    ip saddr 10.1.0.0/16 return
    tcp dport { 80, 8000-8100 } counter accept comment "web in"
  }
  chain input {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iifname "lo" accept
    ip saddr @bad drop
    jump web
    tcp dport vmap @services
    ip saddr . tcp dport { 1.2.3.4 . 25, 5.6.7.0/24 . 80-90 } accept
    meta l4proto { tcp, udp } th dport 53 accept
    icmpv6 type echo-request accept
    ip6 saddr != fe80::/10 udp sport 546 reject
    udp sport 546 accept
  }
  chain output { type filter hook output priority 0; policy accept; tcp dport 25 drop; }
}
"""
SIX = {"src": "2001:db8::1", "dst": "2001:db8::2"}
NFT_SAYS: list[tuple[dict[str, Any], str]] = [
    ({"state": "established"}, "accept"), ({"iface": "lo"}, "accept"), ({"iface": "eth0"}, "drop"),
    ({"src": "172.16.9.9", "dport": 22}, "drop"), ({"src": "192.168.1.7", "dport": 22}, "drop"),
    ({"src": "192.168.1.8", "dport": 22}, "accept"), ({"dport": 23}, "drop"), ({"dport": 80}, "accept"),
    ({"dport": 8100}, "accept"), ({"src": "10.1.2.3", "dport": 80}, "drop"), ({"src": "10.1.2.3", "dport": 22}, "accept"),
    ({"src": "10.1.2.3", "dport": 53, "proto": "udp"}, "accept"), ({"src": "1.2.3.4", "dport": 25}, "accept"),
    ({"src": "1.2.3.5", "dport": 25}, "drop"), ({"src": "5.6.7.8", "dport": 90}, "accept"),
    ({"src": "5.6.8.8", "dport": 90}, "drop"),
    ({**SIX, "proto": "icmpv6", "icmp_type": 128}, "accept"), ({**SIX, "proto": "icmpv6", "icmp_type": 129}, "drop"),
    ({**SIX, "proto": "udp", "sport": 546}, "drop"), ({**SIX, "src": "fe80::1", "proto": "udp", "sport": 546}, "accept"),
    ({**SIX, "dport": 8000}, "accept"), ({**SIX, "dport": 22}, "accept"), ({"direction": "egress", "dport": 25}, "drop"),
    ({"direction": "egress", "dport": 26}, "accept"),
]  # fmt: skip
IPTABLES = """*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:web - [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp -m multiport --dports 80,443,8000:8100 -j web
-A INPUT ! -s 10.0.0.0/8 -p udp --dport 53 -m comment --comment "dns from outside" -j DROP
-A INPUT -p udp --dport 53 -j ACCEPT
-A INPUT -p icmp --icmp-type echo-request -m limit --limit 5/sec --limit-burst 10 -j ACCEPT
-A INPUT -p tcp --dport 443 -j REJECT
-A web -s 192.168.1.5/32 -j RETURN
-A web -s 192.168.0.0/16 -j ACCEPT
COMMIT
"""
IPTABLES_SAYS: list[tuple[dict[str, Any], str]] = [
    ({"state": "related"}, "accept"), ({"iface": "lo"}, "accept"), ({"src": "192.168.1.5", "dport": 80}, "drop"),
    ({"src": "192.168.1.6", "dport": 80}, "accept"), ({"src": "192.168.1.6", "dport": 443}, "accept"), ({"dport": 443}, "drop"),
    ({"src": "10.0.0.1", "proto": "udp", "dport": 53}, "accept"), ({"src": "11.0.0.1", "proto": "udp", "dport": 53}, "drop"),
    ({"proto": "icmp", "icmp_type": 8}, "accept"), ({"proto": "icmp", "icmp_type": 0}, "drop"),
    ({"direction": "egress"}, "accept"),
]  # fmt: skip


def printed(load: list[str], rules: str, show: list[str]) -> bytes:
    """What a namespace of its own prints of rules that were loaded there."""
    script = f"{' '.join(load)} && {' '.join(show)}"
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script], input=rules.encode(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("load", "rules", "show", "says"), [
    (["nft", "-f", "-"], NFT, ["nft", "-j", "list", "ruleset"], NFT_SAYS),
    (["iptables-restore"], IPTABLES, ["iptables-save"], IPTABLES_SAYS),
])  # fmt: skip
def test_what_the_kernel_was_told_comes_out_as_a_policy_of_the_same_verdicts(
    load: list[str], rules: str, show: list[str], says: list[tuple[dict[str, Any], str]]
) -> None:
    plain, refused, _ = translate(printed(load, rules, show))
    assert refused == []
    found = policy.parse(policy.to_json(plain))
    for given, expected in says:
        packet = policy_tables.packet({"src": "198.51.100.1", "dst": "192.0.2.2", "proto": "tcp", **given})
        judged = oracle.judge(found, packet)
        assert judged.verdict.name.lower() == expected, (given, judged)
