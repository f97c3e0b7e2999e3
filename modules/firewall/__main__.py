"""The module's entry point: `python -m loopback.modules.firewall`, started by the agent."""

import sys
from typing import Final

from loopback.modules.firewall.module import FirewallModule
from loopback.modules.sdk import run

#: How long a thread waits for the interpreter: programs are verified beside the reading of a policy, which always needs it.
SWITCH_S: Final = 0.0005

if __name__ == "__main__":
    sys.setswitchinterval(SWITCH_S)
    run(FirewallModule)
