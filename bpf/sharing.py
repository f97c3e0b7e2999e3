"""Which maps two versions of the programs may share: those whose content means the same to both."""

from __future__ import annotations

import ctypes as ct
import hashlib
from typing import Final

from loopback.bpf import layout

_TABLE: Final = (layout.FlowKey, layout.FlowSide, layout.Flow, layout.FlowTags, layout.FlowSeed)
_SLOTS: Final = (
    layout.Match, layout.Entry4, layout.Entry6, layout.Rule, layout.Tuple4, layout.Tuple6, layout.Table,
    layout.Classifier, layout.Set, layout.Slot,
)  # fmt: skip
#: The structures of each map. Two versions share a map when these, and its number in CHANGED, are the same in both.
HELD: Final[dict[str, tuple[type[ct.Structure], ...]]] = {
    "arena": _SLOTS,
    "interfaces": _SLOTS,
    "fence": (),
    "config": (layout.Config,),
    "flows": _TABLE,
    "flow_tags": _TABLE,
    "flow_seed": _TABLE,
    "fragments": (layout.FragmentKey, layout.Fragment),
    "buckets": (layout.BucketKey,),
    "counters": (layout.Counter,),
    "totals": (layout.Totals,),
    "events": (layout.Event,),
    "active": (),
}
#: The LAYOUT with which the meaning of a map's content changed last. Whoever counts LAYOUT up says here for which maps.
CHANGED: Final = dict.fromkeys(HELD, 1) | {
    "arena": 5, "interfaces": 2, "events": 4, "flows": 3, "flow_tags": 3, "flow_seed": 3,
}  # fmt: skip


def fingerprint(name: str) -> str:
    """What two versions must have in common to share the map `name`: 12 hex digits over every field's place.

    Epochs are everywhere, so a map is shared only by versions that agree on the active word as well.
    """
    text = [f"{name} {CHANGED[name]} {CHANGED['active']}"]
    for struct in HELD[name]:
        text.append(f"{struct.__name__} {ct.sizeof(struct)}")
        for field in struct._fields_:
            place = getattr(struct, field[0])
            text.append(f" {field[0]} {place.offset} {place.size}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]
