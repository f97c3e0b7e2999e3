"""Fuzzers over every parser of bytes from outside.

`targets.py` has one line for each parser, `mutate.py` makes inputs that still look like what they came from, `engine.py` counts
and judges. Every run of the tests tries each target ten thousand times; `make fuzz` a million times, guided by coverage.
"""
