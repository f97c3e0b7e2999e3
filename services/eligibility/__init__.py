"""Which modules and versions a host or a rollout may have, and why.

In: operators' records, releases, signed inventories, created rollouts. Out: records, offers, verdicts. Imports the
contracts and the runtime; knows no other service. Read `decide.py` first.
"""
