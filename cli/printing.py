"""Words of others (hosts, services, packages, other operators) on somebody's terminal: shown, never obeyed. Pure."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line without a character that a terminal would obey, or that could pass for another line of ours."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    )


def lines(text: str) -> str:
    """The same for text of several lines, which stay apart."""
    return "\n".join(printable(line) for line in text.split("\n"))
