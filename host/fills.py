"""What fills a policy's sets, on disk: as its module took it last. A policy is put back with this, also without a broker."""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from loopback.contracts.abi import Filled
from loopback.contracts.codes import Refused
from loopback.contracts.messages import Policy
from loopback.host.state import Store

Fills = dict[str, Filled]  # by the names of sets

_DECODER: Final = msgspec.json.Decoder(Fills)
log = logging.getLogger("loopback.host")


def keep(store: Store, digest: str, fills: Fills) -> None:
    """Write down what the module of policy `digest` took. Blocking. Raises Refused(HOST_DISK)."""
    store.disk.write(store.fills_path(digest), msgspec.json.encode(fills))


def read(store: Store, digest: str) -> Fills | None:
    """What was written down; None where nothing was, or where it is damaged. Blocking."""
    try:
        data = store.disk.read(store.fills_path(digest))
        return None if data is None else _DECODER.decode(data)
    except (Refused, msgspec.MsgspecError):
        return None


def kept(store: Store, digest: str, policy: Policy) -> Fills:
    """What to put a policy back with: nothing stands in for contents that were lost, since its rules matter more."""
    if not policy.sources:
        return {}
    found = read(store, digest) or {}
    for name in policy.sources.keys() - found.keys():
        log.error("what fills set %r is not on disk any more: it is empty until it is heard of again", name)
    return {
        name: found.get(name) or Filled(labels=source.labels, pool=source.pool)
        for name, source in policy.sources.items()
    }
