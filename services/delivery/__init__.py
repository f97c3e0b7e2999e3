"""delivery: releases and trust, published so that every host can verify them without believing this service.

Input: commands `release.publish` and `metadata.publish`, created rollouts. Output: TUF metadata, the catalog, verdicts.
It holds the online keys only (snapshot, timestamp). Must not import the other services.
"""
