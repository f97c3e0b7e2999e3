"""The core agent: joins, installs what was signed, runs modules as processes of their own, and reports.

Inputs: desired states over NATS, the trust repository, the host's own `host.toml`. Outputs: module processes, signed
reports. Decisions (`decide`, `recovery`) are pure; the disk (`state`) is the only truth; everything else is an adapter.
Invariants: nothing unsigned ever runs; each step is on disk before it is taken; what was promoted stays, whoever is gone.
It never loads module code into itself: it imports neither modules nor bpf.
"""
