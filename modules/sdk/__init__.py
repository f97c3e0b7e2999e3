"""Write a module in Python: subclass `Module`, override what it needs, and call `run`.

The SDK speaks the module ABI (contracts/abi.py) on the socket that the agent hands over: it says hello, answers every
request, turns refusals and exceptions into `Failed`, bounds the queue of events, and ends the process when the agent goes
away, leaving in the kernel what enforces. It imports only contracts. See docs/module-author.md for a module of thirty lines.
"""

from loopback.modules.sdk.module import Module, package_dir, run

__all__ = ["Module", "package_dir", "run"]
