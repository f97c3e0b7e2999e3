"""Which firewall of this machine a command means: its pins, and the folder of its module, which knows the rules by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from loopback.contracts.codes import Code, Refused
from loopback.contracts.subjects import token
from loopback.host import config
from loopback.modules.firewall.reading import View

PINS: Final = Path("/sys/fs/bpf/loopback")  # the firewall's default; `bpf_root` in host.toml says otherwise
CONFIG: Final = Path("/etc/loopback/host.toml")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="The file that the agent was started with.", show_default=str(CONFIG)),
]
RootOption = Annotated[
    Path | None,
    typer.Option("--pins", help="The firewall's folder in the bpf file system, instead of asking --config."),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="The firewall module's own folder: names of rules, policy in force, where to observe."
    ),
]


class Place(NamedTuple):
    """Where a firewall is. `data` is None where nobody said it: rules then have numbers for names."""

    pins: Path
    data: Path | None

    def view(self) -> View:
        """Look at it. Raises Refused."""
        return View(self.pins, self.data)


def find(path: Path | None, pins: Path | None, data: Path | None) -> Place:
    """The firewall that these options mean. Raises Refused(HOST_LOST) where none or several can be meant."""
    if path is not None or (pins is None and CONFIG.exists()):
        host = config.load(path or CONFIG)
        root = host.modules.get("firewall", {}).get("bpf_root")
        data = data or host.state_dir / "modules" / "firewall" / "data"
        pins = pins or Path(root if isinstance(root, str) else PINS) / token(host.host) / "firewall"
    if pins is None:
        try:
            found = sorted(PINS.glob("*/firewall"))
        except OSError as error:
            raise Refused(Code.HOST_LOST, f"{PINS}: {error.strerror}", "ask as root") from None
        if len(found) != 1:
            what = f"{len(found)} firewalls are" if found else "no firewall is"
            raise Refused(
                Code.HOST_LOST,
                f"{what} pinned under {PINS} for you to see",
                ("" if os.geteuid() == 0 else "ask as root, and ")
                + "name the host's file with --config or the firewall's folder with --pins",
            )
        pins = found[0]
    return Place(pins, data)
