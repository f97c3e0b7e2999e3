"""Verification shared by hosts, services and the operator's command: TUF repository, packages, manifests, blobs.

Inputs are bytes from outside and functions that fetch them; outputs are verified values, or `Refused` with the reason.
Nothing here knows NATS or runs anything it verifies. Imports only contracts (and python-tuf).

`repository.py` follows a TUF repository, `signing.py` makes its metadata, `blobs.py` moves content addressed by digest,
`manifest.py` reads `module.toml`, `package.py` builds and unpacks `.lbm` archives, `attest.py` makes and checks the SBOM and
provenance in them, `tree.py` compares an unpacked one with what was signed, `capabilities.py` says what each of Linux's
capabilities lets a module do.
"""
