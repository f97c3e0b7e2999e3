"""The demo's timeline: one line for each thing that happened, with the seconds since the start."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape


class Timeline:
    """Prints to standard output, in colour on a terminal and plainly elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def act(self, letter: str, title: str) -> None:
        """A new act begins."""
        self.console.print(f"\n[bold]({letter}) {escape(title)}[/bold]")

    def line(self, mark: str, style: str, text: str) -> None:
        """One line: `mark` in `style`, then the text."""
        self.console.print(f"[dim]{self.elapsed:6.1f}s[/dim] [{style}]{mark}[/{style}] {escape(text)}")

    def say(self, text: str) -> None:
        """Something happened."""
        self.line("·", "dim", text)

    def good(self, text: str) -> None:
        """Something that had to happen did."""
        self.line("✓", "green", text)

    def bad(self, text: str) -> None:
        """Something that must not happen did."""
        self.line("✗", "bold red", text)

    def check(self, good: bool, text: str) -> bool:
        """`good` or `bad`, and which it was."""
        (self.good if good else self.bad)(text)
        return good

    def command(self, words: str) -> None:
        """A command that anybody could type."""
        self.line("$", "cyan", words.replace(f"{Path.cwd()}/", ""))

    def output(self, text: str) -> None:
        """What a command printed, indented."""
        for one in text.rstrip().splitlines():
            self.console.print(f"          [dim]{escape(one)}[/dim]")
