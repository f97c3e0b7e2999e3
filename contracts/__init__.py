"""The only shared vocabulary: subjects, messages, envelopes, refusal codes and the module ABI.

Inputs and outputs are plain values; nothing here performs I/O, reads a clock or knows NATS's client library.
Every other package may import this one; this one imports none of them.

Evolution: new fields have defaults, types never change, tags are never reused. `goldens/` holds the stored bytes
that a test decodes with today's types.
"""
