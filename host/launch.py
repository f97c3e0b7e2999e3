"""How a module's process is started: its command line, its surroundings and its limits, all from its own manifest."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import msgspec

from loopback.trust import manifest
from loopback.trust.manifest import Manifest


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """`argv[0]` is a program, `memory_mib` bounds its private data, `tasks` its processes and threads, `stop_s` its farewell.

    `package` is the digest of the package that it comes from.
    """

    module: str
    version: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: Path
    log: Path
    package: str = ""
    capabilities: tuple[str, ...] = ()
    memory_mib: int = 256
    tasks: int = 64
    stop_s: float = 5.0


def launch(found: Manifest, package: str, folder: Path, data: Path, log_file: Path) -> Launch:
    """How to start the version that is unpacked in `folder`; `data` is the module's own folder."""
    return Launch(
        module=found.name,
        version=found.version,
        argv=command(found, folder),
        env=environment(folder, data),
        cwd=data,
        log=log_file,
        package=package,
        capabilities=found.module.capabilities,
        memory_mib=found.limits.memory_mib,
        tasks=found.limits.tasks,
        stop_s=found.limits.stop_s,
    )


def command(found: Manifest, folder: Path) -> tuple[str, ...]:
    """The command line of an unpacked module; `{python}` is the agent's own interpreter, `bin/…` lies in the package."""
    argv = [sys.executable if a == manifest.PYTHON else a for a in found.module.entry]
    if argv[0].startswith("bin/"):
        argv[0] = str(folder / argv[0])
    return (shutil.which(argv[0]) or argv[0], *argv[1:])


def environment(folder: Path, data: Path) -> dict[str, str]:
    """Everything that a module finds in its environment but the descriptor of its socket."""
    return {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "LANG": "C.UTF-8",
        "HOME": str(data),
        "PYTHONPATH": str(folder / "lib"),
        # The tree is compared with its digest before every start: nothing may be added to it.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "LOOPBACK_PACKAGE_DIR": str(folder),
    }
