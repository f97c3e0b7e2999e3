"""Trying a hostile archive: on a careless reader, and on ours. Only the standard library until ours is asked."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from archive_readers import (
    Harm,
    Place,
    everything,
)


class Shape(NamedTuple):
    """One hostile archive. `make(place)` makes its bytes; `harm(data, place)` says how a careless reader is harmed, or None."""

    name: str
    code: str
    make: Callable[[Place], bytes]
    harm: Harm


@contextlib.contextmanager
def tried(folder: Path) -> Iterator[Place]:
    """A fresh place in a folder."""
    place = Place(folder / "base" / "in", folder / "base" / "outside")
    place.inside.mkdir(parents=True)
    place.outside.mkdir()
    (place.outside / "victim").write_text("untouched\n")
    try:
        yield place
    finally:
        shutil.rmtree(folder / "base")


def harm_of(found: Shape, folder: Path) -> str | None:
    """What it does to a careless reader."""
    with tried(folder) as place:
        return found.harm(found.make(place), place)


def refusal_of(found: Shape, folder: Path) -> tuple[str, bool]:
    """The code with which ours refuses it, and whether everything stayed as it was."""
    from loopback.contracts.codes import Refused
    from loopback.trust import package

    with tried(folder) as place:
        data = found.make(place)
        file = folder / "package.lbm"
        file.write_bytes(data)
        before = everything(folder)
        try:
            package.extract(file, place.inside / "out")
            code = "taken"
        except Refused as refused:
            code = str(refused.code)
        same = everything(folder) == before
        file.unlink()
        return code, same
