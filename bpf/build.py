"""Compile an eBPF program with clang when a package is built. No host needs a compiler: what was signed is what runs."""

from __future__ import annotations

import os
import platform
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
_WORDS: Final = 4000  # characters of the compiler's complaint that are passed on


def compile_object(source: Path, out: Path) -> None:
    """Compile `source` (a .bpf.c file, its headers beside it) to the object file `out`.

    The same sources and compiler give the same bytes wherever they lie. `out` appears only when everything succeeded; an
    older one is left alone otherwise. Raises Refused(PACKAGE_MALFORMED) with clang's words.
    """
    clang = shutil.which("clang")
    if clang is None:
        raise Refused(
            Code.PACKAGE_MALFORMED, f"cannot compile {source.name}: there is no clang", "install clang"
        )
    if not source.is_file():
        raise Refused(Code.PACKAGE_MALFORMED, f"there is no eBPF source {source}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A failed run of clang deletes its output: never let it write to the real one.
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=".", suffix=".o")
    os.close(handle)
    try:
        found = subprocess.run(
            [clang, *FLAGS, *_includes(), "-fdebug-compilation-dir=.", "-c", source.name, "-o", temporary],
            cwd=source.parent,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if found.returncode != 0:
            raise Refused(Code.PACKAGE_MALFORMED, f"clang refuses {source}:\n{found.stderr.strip()[:_WORDS]}")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(out)
    except subprocess.TimeoutExpired:
        raise Refused(
            Code.PACKAGE_MALFORMED, f"clang was not done with {source} after {TIMEOUT_S} s"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _includes() -> list[str]:
    """Debian keeps asm/ below a folder named for the architecture, which clang leaves out for another target."""
    folder = Path("/usr/include") / f"{platform.machine()}-linux-gnu"
    return [f"-I{folder}"] if folder.is_dir() else []
