"""The demo's network: one namespace for the control plane, one for each host, one for their client.

All hang on a bridge in the control namespace. Names begin with PREFIX, so that what an interrupted demo left behind is
found and removed by the next one. `ip netns exec` is not used, since it gives its child another /sys.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loopback.contracts.codes import Code, Refused

PREFIX: Final = "lbdemo-"
CONTROL: Final = PREFIX + "ctl"
CLIENT: Final = PREFIX + "client"
SUBNET: Final = "10.77.0.{}"
SUBNET6: Final = "fd77::{:x}"
CONTROL_ADDRESS: Final = SUBNET.format(1)
CLIENT_ADDRESSES: Final = (SUBNET.format(100), SUBNET.format(101))
CLIENT_ADDRESSES6: Final = (SUBNET6.format(0x100), SUBNET6.format(0x101))
_CLONE_NEWNET: Final = 0x40000000


def address(number: int) -> str:
    """IPv4 address of host `number`, from 1."""
    return SUBNET.format(10 + number)


def address6(number: int) -> str:
    """IPv6 address of host `number`, from 1."""
    return SUBNET6.format(0x10 + number)


def host_namespace(name: str) -> str:
    """The namespace of a host."""
    return PREFIX + name


def enter(namespace: str) -> list[str]:
    """The words in front of a command that make it run in a namespace, keeping /sys as it is, and end with the demo."""
    return ["setpriv", "--pdeathsig", "TERM", "nsenter", f"--net=/run/netns/{namespace}", "--"]


def move_this_process(namespace: str) -> None:
    """Move the calling thread, and every process and thread it starts from now on, into a namespace.

    Raises OSError. Python 3.12 has os.setns; the oldest supported one has not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), namespace)


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise Refused(
            Code.KERNEL_UNSUPPORTED,
            f"'ip {' '.join(words)}' failed: {done.stderr.strip()}",
            "the demo makes network namespaces and needs root; run it as root on a Linux machine",
        )
    return done.stdout


def build(hosts: Sequence[str]) -> None:
    """Make every namespace, link and address. Raises Refused(KERNEL_UNSUPPORTED) where that is not permitted."""
    for namespace in (CONTROL, CLIENT, *map(host_namespace, hosts)):
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", CONTROL, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
    _ip("-n", CONTROL, "addr", "add", f"{CONTROL_ADDRESS}/24", "dev", "br0")
    _ip("-n", CONTROL, "link", "set", "br0", "up")
    _attach(CLIENT, "client", [*CLIENT_ADDRESSES, *CLIENT_ADDRESSES6])
    for number, name in enumerate(hosts, start=1):
        _attach(host_namespace(name), name, [address(number), address6(number)])


def _attach(namespace: str, port: str, addresses: Sequence[str]) -> None:
    """A cable from the bridge to `eth0` of a namespace."""
    _ip(*f"-n {CONTROL} link add {port} type veth peer name eth0 netns {namespace}".split())
    _ip("-n", CONTROL, "link", "set", port, "master", "br0", "up")
    for one in addresses:
        six = ":" in one
        # Without duplicate-address detection an IPv6 address can be used at once.
        _ip(
            "-n",
            namespace,
            "addr",
            "add",
            one + ("/64" if six else "/24"),
            "dev",
            "eth0",
            *(["nodad"] if six else []),
        )
    _ip("-n", namespace, "link", "set", "eth0", "up")


def namespaces() -> list[str]:
    """The demo's namespaces that exist now."""
    return sorted(
        line.split()[0] for line in _ip("netns", "list", check=False).splitlines() if line.startswith(PREFIX)
    )


def remove() -> None:
    """Remove every namespace of the demo, and with it the links and filters inside."""
    for namespace in namespaces():
        _ip("netns", "del", namespace, check=False)


def mount_bpf(folder: Path) -> None:
    """Give the demo a bpffs of its own, so that its pins are apart from the machine's."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", str(folder)], check=True, capture_output=True)


def unmount_bpf(folder: Path) -> None:
    """Take it away again, with every pin that is left in it; nothing happens where none is mounted."""
    while os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def pins(folder: Path) -> list[str]:
    """What is pinned below the demo's bpffs."""
    if not os.path.ismount(folder):
        return []
    return sorted(str(found.relative_to(folder)) for found in folder.rglob("*") if not found.is_dir())


def kernel_objects() -> set[str]:
    """`kind:id:name` of every eBPF program, map and link in the kernel, for comparison before and after."""
    found: set[str] = set()
    for kind in ("prog", "map", "link"):
        done = subprocess.run(["bpftool", kind, "list"], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            head = line.split(":", 1)
            if head[0].isdigit():
                words = head[1].split()
                name = words[words.index("name") + 1] if "name" in words else (words[0] if words else "")
                found.add(f"{kind}:{head[0]}:{name}")
    return found


def name_of(kernel_object: str) -> str:
    """The name in one entry of `kernel_objects`."""
    return kernel_object.split(":", 2)[2]
