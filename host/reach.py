"""Which files a module or the agent may reach, where the kernel can hold them to it (Landlock)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import loopback
from loopback.host.cgroups import mounts
from loopback.host.config import HostConfig
from loopback.host.confine import Fence
from loopback.host.launch import Launch

#: Programs and libraries.
_RUN: Final = tuple(map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")))
#: What C libraries and language runtimes read to work at all. Not /etc as a whole: others keep their secrets there.
_READ_NAMES: Final = """
        /proc /sys /etc/ld.so.cache /etc/ld.so.conf /etc/ld.so.conf.d /etc/localtime /etc/timezone /etc/ssl/certs
        /etc/ssl/openssl.cnf /etc/resolv.conf /etc/hosts /etc/host.conf /etc/nsswitch.conf /etc/gai.conf /etc/services
        /etc/protocols /etc/passwd /etc/group /etc/os-release /etc/alternatives /etc/python3 /etc/python3.11
        /etc/iproute2 /etc/mime.types /run/systemd/resolve
"""
_READ: Final = tuple(map(Path, _READ_NAMES.split()))
_DEVICES: Final = tuple(map(Path, ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")))


def reach(config: HostConfig, spec: Launch, folder: Path) -> Fence:
    """A module: reads and runs its package and the system's programs, writes its own folder; with CAP_BPF also pins.

    What the owner adds in `[allow]` comes on top.
    """
    pins: tuple[Path, ...] = ()
    if "CAP_BPF" in spec.capabilities:
        wanted = config.modules.get(spec.module, {}).get("bpf_root")
        places = [place for kind, _, place, _ in mounts() if kind == "bpf"]
        pins = tuple(p for p in places if not isinstance(wanted, str) or Path(wanted).is_relative_to(p))
    return Fence(
        write=(spec.cwd, *pins, *_DEVICES, *map(Path, config.allow.write)),
        read=(*_READ, *map(Path, config.allow.read)),
        run=(folder, *_RUN, *interpreter()),
        alone=True,
    )


def agent_reach(config: HostConfig) -> Fence:
    """The agent: writes its state directory, and the contents of its credentials; reading is left as it is."""
    return Fence(write=(config.state_dir, config.creds, *_DEVICES))


def interpreter() -> tuple[Path, ...]:
    """Where this Python and this installation's own code are, also where they are linked to."""
    package = Path(loopback.__file__).parent
    code = {path.resolve() for path in package.iterdir() if path.is_symlink()}
    paths = {Path(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path) if p}
    return (*sorted(paths), package, *sorted(code))
