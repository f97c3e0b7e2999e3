"""Which installation a command is about. Apart from `context`, so that what needs no bus starts without its libraries."""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Final

PASSPHRASE_VARIABLE: Final = "LOOPBACK_PASSPHRASE_FILE"  # noqa: S105 — the name of a variable
OPERATOR_VARIABLE: Final = "LOOPBACK_OPERATOR_KEY"


class Invocation:
    """One run of the command, and what its own options say; keys that it opened are remembered by it (`keyring`)."""

    def __init__(self, passphrase_file: Path | None = None, operator_key: Path | None = None) -> None:
        self.passphrase_file = passphrase_file or _named(PASSPHRASE_VARIABLE)
        self.operator_key = operator_key or _named(OPERATOR_VARIABLE)


def _named(variable: str) -> Path | None:
    found = os.environ.get(variable)
    return Path(found) if found else None


_invocation: ContextVar[Invocation | None] = ContextVar("loopback_invocation", default=None)
_home: ContextVar[Path | None] = ContextVar("loopback_home", default=None)


def default_home() -> Path:
    """`$LOOPBACK_HOME`, else `loopback` below the XDG data folder."""
    if found := os.environ.get("LOOPBACK_HOME"):
        return Path(found)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "loopback"


def set_home(home: Path | None) -> None:
    """Remember what `--home` said."""
    _home.set(home)


def begin(home: Path | None, passphrase_file: Path | None, operator_key: Path | None = None) -> None:
    """Another run of the command begins: what an earlier one of this process knew counts no longer."""
    set_home(home)
    _invocation.set(Invocation(passphrase_file, operator_key))


def invocation() -> Invocation:
    """This run of the command."""
    found = _invocation.get()
    if found is None:
        _invocation.set(found := Invocation())
    return found


def home() -> Path:
    """The installation's folder, absolute."""
    return (_home.get() or default_home()).absolute()
