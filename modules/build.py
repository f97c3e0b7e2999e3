"""Building a module's package: Python sources, eBPF objects compiled by clang, manifest, digests.

Input is a module's folder with its `module.toml`; output one `.lbm` file, the same bytes for the same sources and compiler.
Sources are found where the package `loopback` was imported from, so it works in a checkout and from a wheel.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

import loopback
from loopback.bpf import build as bpf
from loopback.contracts.codes import Code, Refused
from loopback.trust import attest, package
from loopback.trust import manifest as manifests
from loopback.trust.manifest import Manifest
from loopback.trust.repository import write_durably

COMPILE_S: Final = 120  # for all of a package's Python, which takes under a second
_WORDS: Final = 2000  # characters of the compiler's complaint that are passed on


class BuiltPackage(msgspec.Struct, frozen=True):
    """A package on disk: `digest` is its SHA-256 in hex, `size` in bytes."""

    path: Path
    digest: str
    size: int
    manifest: Manifest


def build_module(
    source_dir: Path, *, version: str | None = None, overlay: Path | None = None, out: Path
) -> BuiltPackage:
    """Build the module in `source_dir`.

    `version` replaces the manifest's. `overlay` is a folder whose files replace those at the same path in the package
    (`lib/loopback/modules/…`), or an eBPF source at its path in `[build].bpf` before it is compiled. `out` is a folder,
    or a file whose name ends in `.lbm`; it is written only once everything succeeded.
    Raises Refused naming file, line or field: MANIFEST_*, PACKAGE_* (also with the words of clang).
    """
    data, manifest = pack(source_dir, version=version, overlay=overlay)
    path = (
        out if out.suffix == package.SUFFIX else out / f"{manifest.name}-{manifest.version}{package.SUFFIX}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
    return BuiltPackage(path, hashlib.sha256(data).hexdigest(), len(data), manifest)


def pack(
    source_dir: Path, *, version: str | None = None, overlay: Path | None = None
) -> tuple[bytes, Manifest]:
    """The same in memory: the package's bytes and its manifest."""
    described = source_dir / package.MANIFEST
    try:
        text = described.read_bytes()
        manifest = manifests.parse(text, str(described))
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(
            Code.MANIFEST_INVALID,
            f"{source_dir} has no {package.MANIFEST}",
            "name a module's folder, for example modules/firewall",
        ) from None
    if version is not None:
        manifest = manifest.with_version(version)
    overlaid = _files_below(overlay) if overlay else {}
    files = _python(manifest, described)
    sources = {name.removeprefix("lib/"): data for name, data in files.items()}
    headers: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="loopback-build-") as scratch:
        for index, program in enumerate(manifest.build.bpf):
            place = Path(scratch) / str(index)
            name, data, inputs = _object(source_dir, described, program, overlaid, place)
            files[name] = data
            for where, found in ((sources, inputs.own), (headers, inputs.system)):
                where.update(found)
    for name, data in overlaid.items():
        if name in manifest.build.bpf:
            continue
        if name not in files:
            raise Refused(
                Code.MANIFEST_INVALID,
                f"{overlay}/{name} replaces nothing: the package has no such file",
                "give it the path that the file has in the package",
            )
        files[name] = data
        sources[name.removeprefix("lib/")] = data
    with tempfile.TemporaryDirectory(prefix="loopback-build-") as scratch:
        files |= _bytecode({name: d for name, d in files.items() if name.endswith(".py")}, Path(scratch))
    sources[package.MANIFEST] = text
    tools = {"python": platform.python_version(), **(bpf.versions() if manifest.build.bpf else {})}
    record = attest.Build(
        sources=_digests(sources),
        headers=_digests(headers),
        tools=tools,
        flags=bpf.FLAGS if manifest.build.bpf else (),
        overlay=tuple(sorted(overlaid)),
        license=manifest.build.license,
    )
    return package.build(files, manifest, record), manifest


class _Inputs(msgspec.Struct, frozen=True):
    """What a compiler read: files of the module, and the system's headers, each by a name that no machine changes."""

    own: dict[str, bytes]
    system: dict[str, bytes]


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _package_root() -> Path:
    assert loopback.__file__ is not None
    return Path(loopback.__file__).parent


def _python(manifest: Manifest, described: Path) -> dict[str, bytes]:
    """The listed Python files and folders, with the `__init__.py` of every package above them, below `lib/`.

    What begins with `loopback/` is found where that package is; anything else lies in the module's own folder.
    """
    root = _package_root()
    files: dict[str, bytes] = {}
    for listed in manifest.build.python:
        relative = Path(listed)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise _field(
                described, "build.python", f"{listed!r} is no path below the module's folder or {root.name}/"
            )
        base = root.parent if relative.parts[0] == root.name else described.parent
        source = base / relative
        if source.is_file():
            found = [source]
        elif source.is_dir():
            found = sorted(p for p in source.rglob("*.py") if "__pycache__" not in p.parts)
        else:
            found = []
        if not found:
            raise _field(described, "build.python", f"there is no Python source {source}")
        above = relative.parent
        while above.parts:
            if (base / above / "__init__.py").is_file():
                found.append(base / above / "__init__.py")
            above = above.parent
        for path in found:
            files[f"lib/{path.relative_to(base).as_posix()}"] = path.read_bytes()
    return files


def _bytecode(sources: Mapping[str, bytes], place: Path) -> dict[str, bytes]:
    """The byte code of Python sources, which nobody compares with them again: the package's digest covers both.

    It is for the version of Python that builds; another one compiles at each start. An interpreter of its own makes it, since
    what else is in memory shows in which strings are shared. Raises Refused(PACKAGE_MALFORMED) naming file and line.
    """
    for name, data in sources.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    python = [sys.executable, "-s", "-S", "-P", "-m", "compileall", "-q"]
    done = subprocess.run(
        [*python, "--invalidation-mode", "unchecked-hash", "-s", str(place), str(place)],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=COMPILE_S,
        check=False,
    )
    if done.returncode != 0:
        said = done.stdout.replace(f"{place}/", "").strip()
        raise Refused(Code.PACKAGE_MALFORMED, f"this Python cannot compile a source:\n{said[:_WORDS]}")
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in sorted(place.rglob("*.pyc"))}


def _object(
    source_dir: Path, described: Path, program: str, overlaid: dict[str, bytes], place: Path
) -> tuple[str, bytes, _Inputs]:
    """One compiled eBPF program: its name below `bpf/`, its bytes and what they were made of."""
    relative = Path(program)
    if relative.is_absolute() or ".." in relative.parts or not relative.name.endswith(".bpf.c"):
        raise _field(described, "build.bpf", f"{program!r} is no path of a .bpf.c file")
    candidates = [base / relative for base in (source_dir, _package_root())]
    source = next((c for c in candidates if c.is_file()), None)
    if source is None:
        raise _field(described, "build.bpf", f"there is no eBPF source {candidates[-1]}")
    place.mkdir(parents=True)
    if program in overlaid:
        # compiled beside copies of its neighbours, so that it finds their headers
        shutil.copytree(source.parent, place / "source")
        source = place / "source" / relative.name
        source.write_bytes(overlaid[program])
    name = relative.name.removesuffix(".c") + ".o"
    own: dict[str, bytes] = {}
    system: dict[str, bytes] = {}
    for path in bpf.compile_object(source, place / name):
        if path.parent == source.parent:
            own[f"{relative.parent.as_posix()}/{path.name}"] = path.read_bytes()
        elif path.is_relative_to(source.parent):
            own[(relative.parent / path.relative_to(source.parent)).as_posix()] = path.read_bytes()
        else:
            system[_system_name(path)] = path.read_bytes()
    return f"bpf/{name}", (place / name).read_bytes(), _Inputs(own, system)


def _system_name(path: Path) -> str:
    """How `#include` names a header, wherever this machine keeps it."""
    parts = path.parts
    at = max(index for index, part in enumerate(parts) if part == "include" or index == 0)
    rest = parts[at + 1 :]
    return "/".join(rest[1:] if rest[0].endswith("-linux-gnu") else rest)


def _files_below(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise Refused(Code.MANIFEST_INVALID, f"the overlay {folder} is no folder")
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


def _field(described: Path, field: str, said: str) -> Refused:
    return Refused(Code.MANIFEST_INVALID, f"{described}: {field}: {said}", "correct the manifest")
