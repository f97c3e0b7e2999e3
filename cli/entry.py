"""Where the installed command begins: Ctrl-C while the rest is still being imported is answered as it is later."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit."""
    try:
        from loopback.cli import main as command
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    command.main()
