"""The module's entry point: `python -m loopback.modules.firewall`, started by the agent.

A firewall that starts late protects late, so the start is made short here, where it is known that nothing else runs.
"""

import gc
import sys
from typing import Final

gc.disable()  # nothing that is imported ever goes
sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # 6 ms; msgspec finds in typing what it asks there for

from loopback.modules.firewall.module import FirewallModule  # noqa: E402
from loopback.modules.sdk import run  # noqa: E402

#: How long a thread waits for the interpreter: programs are verified beside the reading of a policy, which always needs it.
SWITCH_S: Final = 0.0005

if __name__ == "__main__":
    del sys.modules["typing_extensions"]
    gc.freeze()
    gc.enable()
    sys.setswitchinterval(SWITCH_S)
    run(FirewallModule)
