"""What a person at a real terminal meets: prompts that do not show secrets, and a Ctrl-C that is heard the first time."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time

import pytest

READ_S = 60.0


def at_terminal(code: str, keys: bytes) -> tuple[int, str]:
    """Run this Python at a terminal of its own, type `keys` at its prompt; exit code and what the terminal showed."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown, typed = b"", False
    try:
        while True:
            assert select.select([controller], [], [], READ_S)[0], f"silence after {shown!r}"
            try:
                shown += os.read(controller, 4096)
            except OSError:  # its last user is gone
                break
            if not typed and b"? " in shown:
                typed = bool(os.write(controller, keys))
        return process.wait(READ_S), shown.decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(controller)


ASK = """
import asyncio, sys
from loopback.cli import main, keyring
async def ask():
    print(len({question}), file=sys.stderr)
try:
    asyncio.run(ask())
except KeyboardInterrupt:
    sys.exit(130)
"""
HIDDEN = ASK.format(question="keyring.ask_hidden('word? ')")


def test_a_passphrase_is_not_shown() -> None:
    code, shown = at_terminal(HIDDEN, b"secret\n")
    assert code == 0 and "secret" not in shown and "6" in shown


@pytest.mark.timeout(60)
def test_the_first_ctrl_c_ends_a_prompt_also_inside_a_running_loop() -> None:
    began = time.monotonic()
    code, shown = at_terminal(HIDDEN, b"\x03")
    assert (code, "Traceback" in shown) == (130, False), shown
    assert time.monotonic() - began < READ_S


@pytest.mark.timeout(60)
def test_without_that_it_would_go_unheard() -> None:
    deaf = HIDDEN.replace(
        "async def ask", "import contextlib\nkeyring.answering = contextlib.nullcontext\nasync def ask"
    )
    _, shown = at_terminal(deaf, b"\x03secret\n")
    assert "6" in shown, "the prompt went on as if nothing was pressed"
