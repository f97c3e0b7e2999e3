"""The module's entry point: `python -m loopback.modules.firewall`, started by the agent."""

from loopback.modules.firewall.module import FirewallModule
from loopback.modules.sdk import run

if __name__ == "__main__":
    run(FirewallModule)
