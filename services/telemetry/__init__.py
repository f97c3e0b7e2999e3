"""How the fleet is: verified reports folded into one view per host, silence noticed, hosts' OpenTelemetry passed on.

In: signed reports and OTLP, host records. Out: the bucket LB_VIEW, presence, metrics, OTLP over HTTP. Imports the contracts and
the runtime; knows no other service. Read `decide.py` first.
"""
