"""Loopback Modules: optional, signed agent modules for fleets of Linux hosts, over NATS.

The code folders at the top of the repository (`contracts`, `trust`, `services`, `host`, `modules`, `bpf`, `cli`)
appear here through symbolic links, so that a checkout and an installed wheel have one namespace, `loopback`.
"""

__version__ = "0.1.0"
