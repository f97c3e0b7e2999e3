"""Where parsers are entered for fuzzing, and what entries are made with."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey

from .engine import Target

Run = Callable[[bytes], object]
Made = tuple[Run, tuple[bytes, ...]]

GOLDENS: Final = Path(__file__).parents[2] / "contracts" / "goldens"
#: What the callers of a msgspec decoder catch, everywhere in this code.
MALFORMED: Final = (msgspec.MsgspecError, RecursionError)

_FACTORIES: dict[str, tuple[str, tuple[type[BaseException], ...], Callable[[], Made]]] = {}


def target(
    name: str, family: str, *allowed: type[BaseException]
) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Register a parser; `allowed` besides Refused."""

    def register(factory: Callable[[], Made]) -> Callable[[], Made]:
        assert name not in _FACTORIES
        _FACTORIES[name] = (family, (Refused, *allowed), factory)
        return factory

    return register


def names() -> list[str]:
    """Every target."""
    return list(_FACTORIES)


def make(name: str) -> Target:
    """A target, ready to run."""
    family, allowed, factory = _FACTORIES[name]
    run, seeds = factory()
    return Target(name, family, run, seeds, allowed)


def goldens(*patterns: str, without: str = "\0") -> tuple[bytes, ...]:
    """Stored messages."""
    found = sorted({p for pattern in patterns for p in GOLDENS.glob(pattern) if without not in p.name})
    assert found, patterns
    return tuple(p.read_bytes() for p in found)


def same(value: Any, decode: Callable[[bytes], Any]) -> Any:
    """What was decoded, after checking that it survives being sent on."""
    assert decode(msgspec.json.encode(value)) == value, "what was decoded encodes to something else"
    return value


#: What targets keep open; whoever makes them closes it in the end.
CLEANUP: Final = contextlib.ExitStack()
atexit.register(CLEANUP.close)

KEY: Final = SigningKey.from_raw(b"\7" * 32)
OTHER: Final = SigningKey.from_raw(b"\x08" * 32)


class InMemory:
    """A file that is no file: parsers that take a path, without the disk."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("fuzz", os.MFD_CLOEXEC)

    def holding(self, data: bytes) -> Path:
        """Its path, with this content."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        return Path(f"/proc/self/fd/{self._descriptor}")


def codes() -> set[str]:
    """Every code there is, for those who count which ones fuzzing reached."""
    return {str(code) for code in Code}
