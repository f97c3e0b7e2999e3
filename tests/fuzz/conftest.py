"""Prints what fuzzing counted at the end of a run."""

from __future__ import annotations

import pytest
from _pytest.terminal import TerminalReporter

from .engine import Outcome, table
from .registry import CLEANUP

FOUND: pytest.StashKey[list[Outcome]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(FOUND, [])


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    found = terminalreporter.config.stash.get(FOUND, [])
    if found:
        terminalreporter.section("fuzzed parsers")
        terminalreporter.write_line(table(found))


def pytest_sessionfinish(session: pytest.Session) -> None:
    CLEANUP.close()
