"""Ctrl-C comes at any instant, and each time a person reads the same words."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import typer

from loopback.cli import firewall_observe, interrupts
from loopback.cli.firewall_stream import Heard
from loopback.cli.interrupts import CtrlC

EVENT = {
    "verdict": "drop", "direction": "ingress", "interface": "eth0", "rule": "ssh", "reason": "rule", "boot_ns": 1,
    "proto": "udp", "src": "192.0.2.1", "dst": "192.0.2.2", "sport": 1, "dport": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def pythons_own_answer() -> Iterator[None]:
    """Also where whoever started the tests has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressed_at(number: int, work: Callable[[], object]) -> bool:
    """Do it, with Ctrl-C before the instruction of that number; whether there are so many."""
    left = number

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (firewall_observe.__file__, interrupts.__file__):
            return None
        frame.f_trace_opcodes = True
        if kind == "opcode":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return left <= 0


def test_an_observer_tells_its_sum_at_whichever_instruction_ctrl_c_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class View:
        def __enter__(self) -> View:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events_lost(self) -> int:
            return 0

    place = SimpleNamespace(data=Path("nowhere"), view=View)
    monkeypatch.setattr(firewall_observe, "find", lambda *_: place)
    monkeypatch.setattr(
        firewall_observe, "listen", lambda *_: iter([None, Heard(EVENT, b""), 3, None, Heard(EVENT, b"")])
    )

    def observe() -> None:
        firewall_observe.command(
            verdict=None, rule=None, src=None, dst=None, proto=None, port=None, device=None, direction=None,
            count=None, for_s=None, every=0, config=None, pins=None, data=None, as_json=False,
        )  # fmt: skip

    told = 0
    for number in range(1, 100_000):
        with pytest.raises((KeyboardInterrupt, typer.Exit)) as ended:
            pressed_at(number, observe)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        said = capsys.readouterr().err
        if ended.type is typer.Exit:
            assert said.endswith(
                "2 shown, 3 missed, 0 lost in the kernel's ring\nthe firewall's module has ended\n"
            )
            break  # there are not so many instructions
        assert said.count(" shown, ") == (1 if "observing" in said else said.count(" shown, ")), (
            number,
            said,
        )
        told += " shown, " in said
    assert told > 100


def test_the_second_ctrl_c_does_not_cut_off_what_the_first_one_led_to() -> None:
    told: list[str] = []
    with CtrlC() as ctrl_c:
        assert ctrl_c.call(lambda: signal.raise_signal(signal.SIGINT) or "whole", "cut") == "cut"
        signal.raise_signal(signal.SIGINT)
        told.append("the sum")
        assert ctrl_c.pressed and ctrl_c.call(lambda: told.append("never"), None) is None
    assert told == ["the sum"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_where_ctrl_c_is_ignored_it_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with CtrlC() as ctrl_c:
        assert ctrl_c.call(lambda: signal.raise_signal(signal.SIGINT) or "whole", "cut") == "whole"
        assert not ctrl_c.pressed
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_while_the_command_is_still_being_read_is_told_without_a_traceback() -> None:
    """As when `loopback` is ended in its first tenth of a second."""
    code = (
        "import signal, sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from loopback.cli.entry import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "firewall", "schema"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
