"""`loopback demo`: the whole product on one machine, with real hosts, packets and a real kernel.

`network.py` makes namespaces and cleans up, `traffic.py` is the process that sends and receives in them, `story.py` plays the
acts, `summary.py` counts, `show.py` prints the timeline, `app.py` is the command.
"""
