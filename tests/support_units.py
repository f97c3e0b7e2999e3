"""Running a unit's command as systemd would, as far as that goes without systemd: its user, capabilities, system calls, files.

The sets of system calls are systemd's own (`systemd-analyze syscall-filter`); the filter is made by the library that systemd
uses, too.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from loopback.host import seccomp
from loopback.host.confine import CAPABILITIES

UNITS = Path(__file__).parents[1] / "deploy" / "systemd"
NOBODY = 65534

#: Runs with the unit's capabilities already: takes the rest, then becomes the program.
LAUNCH = """
import ctypes, os, sys
from pathlib import Path
from loopback.host import confine
program, writable, mdwe, *command = sys.argv[1:]
confine.no_new_privileges()
if mdwe == "yes":
    assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0, "PR_SET_MDWE"
devices = [Path(f"/dev/{n}") for n in ("null", "zero", "random", "urandom")]
assert confine.fence(confine.Fence(write=(*map(Path, writable.split(":")), *devices)))
confine.filter_calls(Path(program).read_bytes())
os.execv(command[0], command)
"""


class Unit:
    """A unit file: its settings by name, each with every value it was given."""

    def __init__(self, name: str) -> None:
        self.settings: dict[str, list[str]] = {}
        for line in (UNITS / name).read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self.settings.setdefault(key, []).append(value)

    def yes(self, key: str) -> bool:
        return self.settings.get(key, [""])[-1] == "yes"

    def argv(self, **places: str) -> list[str]:
        """ExecStart with specifiers and paths replaced."""
        text = self.settings["ExecStart"][0]
        for old, new in places.items():
            text = text.replace(old, new)
        return shlex.split(text)

    def command(self, argv: list[str], writable: list[Path], scratch: Path) -> list[str]:
        """The command line that gives everything up that the unit takes away, then becomes `argv`."""
        program = scratch / "filter.bpf"
        program.write_bytes(self.filter())
        program.chmod(0o644)
        names = self.settings["CapabilityBoundingSet"][0].split()
        assert set(names) <= set(CAPABILITIES)
        kept = "".join(f",+{n.removeprefix('CAP_').lower()}" for n in names)
        user = (
            ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
            if "User" in self.settings
            else []
        )
        return [
            "setpriv", f"--bounding-set=-all{kept}", *user, "--",
            sys.executable, "-P", "-c", LAUNCH, str(program), ":".join(map(str, writable)),
            "yes" if self.yes("MemoryDenyWriteExecute") else "no", *argv,
        ]  # fmt: skip

    def filter(self) -> bytes:
        """Its SystemCallFilter, RestrictAddressFamilies and RestrictNamespaces as one program."""
        allowed: set[str] = set(expanded("@default"))
        for value in self.settings["SystemCallFilter"]:
            names = {name for word in value.lstrip("~").split() for name in expanded(word)}
            allowed = allowed - names if value.startswith("~") else allowed | names
        library = seccomp._library()
        assert library is not None
        context = library.seccomp_init(seccomp._ERRNO | errno.EPERM)
        families = [
            int(getattr(socket, name)) for name in self.settings["RestrictAddressFamilies"][0].split()
        ]
        conditions: dict[str, list[tuple[int, int, int, int]]] = {
            "socket": [(0, 4, family, 0) for family in families],
            "clone": [(0, 7, seccomp._NAMESPACES, 0)] if self.yes("RestrictNamespaces") else [],
        }
        for name in sorted(allowed - {"clone3", "unshare", "setns"}):
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number == -1:
                continue
            for row in conditions.get(name) or [None]:
                rows = (seccomp._Comparison * 1)(seccomp._Comparison(*row)) if row else None
                status = library.seccomp_rule_add_array(
                    context, seccomp._ALLOW, number, 1 if row else 0, rows
                )
                assert status in (0, -errno.EDOM), (name, status)
        clone3 = library.seccomp_syscall_resolve_name(b"clone3")
        library.seccomp_rule_add_array(context, seccomp._ERRNO | errno.ENOSYS, clone3, 0, None)
        try:
            return seccomp._exported(library, ctypes.c_void_p(context))  # type: ignore[arg-type]
        finally:
            library.seccomp_release(context)


@functools.cache
def expanded(name: str) -> frozenset[str]:
    """A system call, or all of a set of systemd's."""
    if not name.startswith("@"):
        return frozenset({name})
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter", name], capture_output=True, text=True, check=True
    )
    found: set[str] = set()
    for line in done.stdout.splitlines()[1:]:
        word = line.strip()
        if word and not word.startswith("#"):
            found |= expanded(word)
    return frozenset(found)


def environment() -> dict[str, str]:
    """What a system service finds: hardly anything."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
