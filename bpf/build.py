"""Compile an eBPF program with clang when a package is built. No host needs a compiler: what was signed is what runs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from loopback.contracts.codes import Code, Refused

TIMEOUT_S: Final = 120
#: v3 has atomics (kernel 5.12), which token buckets need.
FLAGS: Final = (
    "-O2",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
    "-target",
    "bpf",
    "-mcpu=v3",
)
#: Debug information names files relative to here, so that no path of this machine gets into an object.
_ANYWHERE: Final = ("-fdebug-compilation-dir=.",)
_WORDS: Final = 4000  # characters of the compiler's complaint that are passed on


def compile_object(source: Path, out: Path) -> tuple[Path, ...]:
    """Compile `source` (a .bpf.c file, its headers beside it) to the object file `out`; every file that went in.

    The same sources and compiler give the same bytes wherever they lie and whoever compiles: of the environment clang sees
    only PATH. `out` appears only when everything succeeded; an older one is left alone otherwise.
    Raises Refused(PACKAGE_MALFORMED) with clang's words.
    """
    clang = _clang(source.name)
    if not source.is_file():
        raise Refused(Code.PACKAGE_MALFORMED, f"there is no eBPF source {source}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A failed run of clang deletes its output: never let it write to the real one.
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=".", suffix=".o")
    os.close(handle)
    listing = f"{temporary}.d"
    try:
        found = subprocess.run(
            [
                clang,
                *FLAGS,
                *_includes(),
                *_ANYWHERE,
                "-MD",
                "-MF",
                listing,
                "-MT",
                "object",
                "-c",
                source.name,
                "-o",
                temporary,
            ],
            cwd=source.parent,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if found.returncode != 0:
            raise Refused(Code.PACKAGE_MALFORMED, f"clang refuses {source}:\n{found.stderr.strip()[:_WORDS]}")
        inputs = tuple(source.parent / name for name in _listed(Path(listing).read_text()))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(out)
        return inputs
    except subprocess.TimeoutExpired:
        raise Refused(
            Code.PACKAGE_MALFORMED, f"clang was not done with {source} after {TIMEOUT_S} s"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
        Path(listing).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The exact versions of what objects are made with: clang, and the headers of libbpf and Linux.

    Raises Refused(PACKAGE_MALFORMED) where there is no clang.
    """
    said = subprocess.run(
        [_clang("eBPF"), "--version"],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    ).stdout
    found = {"clang": said.partition("\n")[0].strip()}
    for name, header, macros in (
        ("libbpf-headers", "bpf/libbpf_version.h", ("LIBBPF_MAJOR_VERSION", "LIBBPF_MINOR_VERSION")),
        (
            "linux-headers",
            "linux/version.h",
            ("LINUX_VERSION_MAJOR", "LINUX_VERSION_PATCHLEVEL", "LINUX_VERSION_SUBLEVEL"),
        ),
    ):
        path = Path("/usr/include") / header
        if path.is_file():
            defined = dict(re.findall(r"#define\s+(\w+)\s+(\d+)\s", path.read_text()))
            found[name] = ".".join(defined.get(macro, "?") for macro in macros)
    return found


def _clang(what: str) -> str:
    clang = shutil.which("clang")
    if clang is None:
        raise Refused(Code.PACKAGE_MALFORMED, f"cannot compile {what}: there is no clang", "install clang")
    return clang


def _environment() -> dict[str, str]:
    """CPATH, SOURCE_DATE_EPOCH, a locale and the like would change what comes out."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _listed(rule: str) -> list[str]:
    """The files in a dependency rule of make, as clang writes it."""
    _, _, names = rule.replace("\\\n", " ").partition(":")
    return [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", names)]


def _includes() -> list[str]:
    """Debian keeps asm/ below a folder named for the architecture, which clang leaves out for another target."""
    folder = Path("/usr/include") / f"{platform.machine()}-linux-gnu"
    return [f"-I{folder}"] if folder.is_dir() else []
