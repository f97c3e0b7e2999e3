"""The operator's command, `loopback`. It talks to the services over NATS only and imports none of them.

`main.py` finds an area's file only when it is used, `context.py` holds what all areas share: the installation's home, the
operator's key and one session on the bus.
"""
