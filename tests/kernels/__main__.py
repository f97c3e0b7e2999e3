"""`python -m tests.kernels`: the firewall's programs under the kernels that Debian's packages put into /boot.

    --kernel FILE   this one (default: every /boot/vmlinuz-*)     --seconds N   for each (default 300)     --json

Each boots in qemu, without hardware virtualisation, on this machine's own files, read-only over 9p: so it runs the very code
that lies here. Inside, `inside.py` loads every program and asks it.
Exit code 0: all held · 1: one did not · 2: cannot be tried.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

BOOT: Final = Path("/boot")
HERE: Final = Path(__file__).resolve().parent
NEEDED: Final = {
    "qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "cpio": "cpio", "modprobe": "kmod",
}  # fmt: skip
DRIVERS: Final = ("virtio_pci", "9p", "9pnet_virtio")  # what it takes to reach this machine's files
MEMORY_MIB: Final = 3072
ANSWER: Final = "ANSWER "  # begins the one line that `inside.py` prints for us

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for driver in $(/bin/busybox cat /drivers/order); do /bin/busybox insmod /drivers/$driver; done
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /root
/bin/busybox mount -t devtmpfs dev /root/dev
exec /bin/busybox switch_root /root /bin/sh {script} {python} {inside} {program}
"""


class CannotTry(Exception):
    """Something that this needs is missing."""


def require() -> None:
    """Raises CannotTry naming the package of what is missing."""
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        raise CannotTry(
            f"not installed: {', '.join(missing)}; install with apt-get install {' '.join(missing)}"
        )


def kernels() -> list[Path]:
    """The kernels in /boot. Raises CannotTry where there is none."""
    found = sorted(BOOT.glob("vmlinuz-*"))
    if not found:
        raise CannotTry(f"no kernel in {BOOT}: apt-get install linux-image-amd64")
    return found


def initial(release: str, folder: Path, program: Path) -> Path:
    """The first file system: busybox, the drivers of this kernel, and a script that goes on to this machine's root."""
    root = folder / "initial"
    for name in ("bin", "proc", "dev", "root", "drivers"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    order: dict[str, None] = {}
    for driver in DRIVERS:
        listed = subprocess.run(
            ["modprobe", "-S", release, "--show-depends", driver], capture_output=True, text=True, check=True
        )
        for line in listed.stdout.splitlines():
            if line.startswith("insmod "):
                file = Path(line.split()[1])
                shutil.copy(file, root / "drivers" / file.name)
                order[file.name] = None
    (root / "drivers/order").write_text("\n".join(order))
    script = root / "init"
    script.write_text(
        _INIT.format(
            script=HERE / "inside.sh", python=sys.executable, inside=HERE / "inside.py", program=program
        )
    )
    script.chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    made = folder / "initial.cpio"
    made.write_bytes(
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"],
            cwd=root,
            input=names.encode(),
            capture_output=True,
            check=True,
        ).stdout
    )
    return made


def tried(kernel: Path, program: Path, seconds: float) -> dict[str, Any]:
    """What came of the programs under one kernel."""
    release = kernel.name.removeprefix("vmlinuz-")
    with tempfile.TemporaryDirectory(prefix="kernels-") as place:
        folder = Path(place)
        serial = folder / "serial.log"
        share = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"
        command = [
            *(
                "qemu-system-x86_64",
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
                "-smp",
                "2",
                "-m",
                str(MEMORY_MIB),
            ),
            *("-display", "none", "-no-reboot", "-serial", f"file:{serial}", "-virtfs", share),
            *("-kernel", str(kernel), "-initrd", str(initial(release, folder, program))),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        ]
        try:
            subprocess.run(command, timeout=seconds, check=False, capture_output=True)
        except subprocess.TimeoutExpired:
            return {"kernel": release, "ok": False, "why": f"no answer within {seconds:g} s"}
        said = serial.read_text(errors="replace") if serial.exists() else ""
    answers = [line.split(ANSWER, 1)[1] for line in said.splitlines() if ANSWER in line]
    if not answers:
        return {"kernel": release, "ok": False, "why": "it ended without an answer", "said": said[-2000:]}
    return {"kernel": release, **json.loads(answers[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kernel", type=Path, action="append")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from loopback.cli.firewall_judge import object_file

    try:
        require()
        wanted = options.kernel or kernels()
    except CannotTry as reason:
        print(f"cannot be tried: {reason}", file=sys.stderr)
        return 2
    found = []
    # not below /tmp: inside, that is empty
    with tempfile.NamedTemporaryFile(dir=HERE, suffix=".bpf.o") as program:
        program.write(object_file())
        program.flush()
        for kernel in wanted:
            print(f"{kernel.name}: booting, loading and asking; a minute or so", file=sys.stderr, flush=True)
            found.append(tried(kernel, Path(program.name), options.seconds))
            if not options.json:
                print(_line(found[-1]), flush=True)
    if options.json:
        print(json.dumps(found, indent=1))
    return 0 if all(one["ok"] for one in found) else 1


def _line(one: dict[str, Any]) -> str:
    if not one["ok"]:
        return f"{one['kernel']}: DOES NOT HOLD: {one['why']}\n{one.get('said', '')}".rstrip()
    walked = ", ".join(f"{name} {count:,}" for name, count in one["verified"].items() if count > 100)
    return f"{one['kernel']}: holds; {one['asked']} packets asked; the verifier walked {walked}"


if __name__ == "__main__":
    raise SystemExit(main())
