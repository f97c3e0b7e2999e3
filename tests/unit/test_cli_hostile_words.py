"""A stolen host, or a service, chooses words that people read: none of them moves a cursor, colours or fakes a line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_posture_document import host, posture

from loopback.cli import fleetio, main, posturemd, printing
from loopback.cli.posturedoc import HostModule
from loopback.contracts.codes import Code, Refused

CLEARS = "6.1\x1b[2J\x1b[H"  # a terminal that obeys it shows nothing of what came before
FAKES = "6.1 |\n| web-9 | ok | <img src=x> `a` **b** \x1b[31m \\| c \x9b1m \u202e"


def test_a_kernel_version_that_clears_the_screen_is_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fleetio.table(("HOST", "KERNEL"), [("web-1", CLEARS), ("web-2", "6.1\nweb-3  6.2")])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 3
    assert "6.1�[2J" in shown


def test_a_refusals_words_are_not_obeyed() -> None:
    said = main.explain(Refused(Code.NAME_INVALID, f"the service said {CLEARS}", "next\x1b]0;x\x07"))
    assert said is not None
    assert "\x1b" not in said and "\x07" not in said


@given(st.text())
def test_what_is_printed_is_printable(text: str) -> None:
    assert all(c.isprintable() for c in printing.printable(text))
    assert all(line.isprintable() for line in printing.lines(text).split("\n"))


@pytest.mark.parametrize(
    "field",
    [
        lambda said: {"kernel": said},
        lambda said: {"architecture": said},
        lambda said: {"agent": said},
        lambda said: {"journal": said},
        lambda said: {"modules": (_module(name=said),)},
        lambda said: {"modules": (_module(version=said),)},
        lambda said: {"modules": (_module(health=said),)},
        lambda said: {"problems": (said,)},
    ],
)
def test_no_field_that_a_host_fills_breaks_the_posture(field: Callable[[str], dict[str, object]]) -> None:
    plain = posturemd.render(posture(hosts=(host("web-1", **field("x")),)))
    text = posturemd.render(posture(hosts=(host("web-1", **field(FAKES)),)))
    assert len(text.split("\n")) == len(plain.split("\n"))
    assert all(line.isprintable() for line in text.split("\n"))
    assert "<img" not in text.replace("\\<", "")
    assert "**b**" not in text


def _module(**changes: object) -> HostModule:
    fields = {
        "name": "firewall", "version": "1.0.0", "policy_serial": 1, "phase": "promoted", "health": "healthy", "enforcing": True,
    }  # fmt: skip
    return HostModule(**fields | changes)  # type: ignore[arg-type]
