"""A base image without a registry: this machine's own Debian packages, with all that they depend on, as an archive."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path
from typing import Final

#: What an image with Python 3.11 and its venv module has; the rest follows from dependencies.
PACKAGES: Final = ("base-files", "bash", "coreutils", "dash", "python3", "python3-venv")
_MERGED: Final = ("bin", "sbin", "lib", "lib64")  # links to /usr since Debian 12


def root(archive: Path) -> None:
    """Write a root folder of these packages into `archive`."""
    files: set[str] = set()
    for package in _closure():
        files.update(_said("dpkg", "-L", package).split("\n"))
    with tarfile.open(archive, mode="w") as tar:
        for name in _MERGED:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
        for name in sorted({_merged(one) for one in files if one.startswith("/") and one != "/."}):
            if os.path.lexists(name) and name.lstrip("/") not in _MERGED:
                tar.add(name, arcname=name.lstrip("/"), recursive=False)
        for name in ("/etc/ld.so.cache", "/etc/passwd", "/etc/group"):
            tar.add(name, arcname=name.lstrip("/"))


def _merged(name: str) -> str:
    top = name.split("/")[1]
    return f"/usr{name}" if top in _MERGED else name


def _closure() -> list[str]:
    """The packages and, of those installed here, everything that they depend on."""
    needs: dict[str, str] = {}
    provided: dict[str, str] = {}
    for line in _said(
        "dpkg-query", "-W", "-f=${Package}\t${Provides}\t${Pre-Depends}, ${Depends}\n"
    ).splitlines():
        package, provides, depends = line.split("\t")
        needs[package] = depends
        for one in filter(None, map(_name, provides.split(","))):
            provided.setdefault(one, package)
    found: set[str] = set()
    todo = list(PACKAGES)
    while todo:
        package = todo.pop()
        package = package if package in needs else provided.get(package, "")
        if package and package not in found:
            found.add(package)
            for group in needs[package].split(","):
                todo += [one for one in map(_name, group.split("|")) if one in needs or one in provided][:1]
    return sorted(found)


def _name(relation: str) -> str:
    return relation.split("(")[0].split(":")[0].strip()


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
