"""The structures that the firewall's programs share with user space, as ctypes views.

They mirror programs/firewall.h; a test compares each with the object's BTF, field by field. Addresses are 16 bytes in network
order, IPv4 in its v4-mapped form.
"""

from __future__ import annotations

import ctypes as ct
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loopback.bpf import btf

LAYOUT: Final = 5
SLOTS: Final = 2
SLACK: Final = 4096  # bytes behind the arena
TUPLES: Final = 64  # of one classifier
ENTRY_MASK: Final = 0xFFFFFF  # of a head: the place of a chain's first entry + 1
DIRECT: Final = 1 << 31  # in a root: the class itself
MIN_COUNTERS: Final = 1024
MIN_HALF: Final = 1 << 18  # bytes of a slot
MAX_HALF: Final = 1 << 26
WAYS: Final = 16  # of a bucket of the connection table
MIN_FLOWS: Final = 4 * WAYS  # of a connection table; these three are powers of two
FLOWS: Final = 65536
MAX_FLOWS: Final = 1 << 24
MAX_SETS: Final = 255  # number 0 is no set
MAX_INTERFACES: Final = 63  # bit 63 asks the program to look the bits up
NO_RULE: Final = 0xFFFFFFFF
TICK_SHIFT: Final = 26  # a tick of the deadline is 2^26 ns of the boot clock

INGRESS, EGRESS = 0, 1
DROP, ACCEPT = 0, 1
NEW, ESTABLISHED, RELATED, INVALID = 1, 2, 4, 8
STATES: Final = {"new": NEW, "established": ESTABLISHED, "related": RELATED, "invalid": INVALID}

LAST, ACCEPTS, MORE, SAMPLES, CONDITIONS = 1, 2, 4, 8, 16  # of an entry
INTERFACES, LIMIT_RULE, LIMIT_SOURCE = 1, 2, 4  # of a rule
HAS_PORTS, HAS_ICMP = 1, 2  # what an entry may need of a packet
USES_INTERFACES, USES_LIMITS = 1, 2  # of a slot

#: Index is `enum fw_reason`.
REASONS: Final = (
    "rule", "default", "flow", "related", "essential", "unparsed", "truncated", "revoked", "fragment", "adoption",
    "broken", "off",
)  # fmt: skip
PARSED: Final = ("parsed", "essential", "unparsed", "truncated")
FLOW_STAGES: Final = ("opening", "open", "closing", "reset")
FLOW_PROOFS: Final = ("one-sided", "answered", "proven")
PROBE_ACTIVE: Final = 0xFF
LOGGED, SHADOWED = 1, 2  # why a packet is reported
ASKED_EGRESS, ASKED_REPLY = 1, 2  # of an event
LATER_FRAGMENT: Final = 8  # of a packet
MAX_SHADOW: Final = 0xFFFF  # one in so many

_address = ct.c_uint8 * 16


class Match(ct.Structure):
    """struct fw_match"""

    _fields_ = (
        ("order", ct.c_uint32),
        ("identity", ct.c_uint32),
        ("ports", ct.c_uint16 * 2),
        ("source_ports", ct.c_uint16 * 2),
        ("source_shift", ct.c_uint8),
        ("destination_shift", ct.c_uint8),
        ("protocol", ct.c_uint8),
        ("protocol_mask", ct.c_uint8),
        ("needs", ct.c_uint8),
        ("flags", ct.c_uint8),
        ("source_set", ct.c_uint8),
        ("destination_set", ct.c_uint8),
    )


class Entry4(ct.Structure):
    """struct fw_entry4"""

    _fields_ = (("source", ct.c_uint32), ("destination", ct.c_uint32), ("match", Match))


class Entry6(ct.Structure):
    """struct fw_entry6"""

    _fields_ = (
        ("source", ct.c_uint64 * 2),
        ("destination", ct.c_uint64 * 2),
        ("match", Match),
        ("pad", ct.c_uint64),
    )


class Rule(ct.Structure):
    """struct fw_rule"""

    _fields_ = (
        ("log_sample", ct.c_uint32),
        ("states", ct.c_uint8),
        ("flags", ct.c_uint8),
        ("pad", ct.c_uint8 * 2),
        ("interfaces", ct.c_uint64),
        ("limit_interval", ct.c_uint64),
        ("limit_tolerance", ct.c_uint64),
    )


class Tuple4(ct.Structure):
    """struct fw_tuple4"""

    _fields_ = (
        ("source_mask", ct.c_uint32),
        ("destination_mask", ct.c_uint32),
        ("transport_mask", ct.c_uint64),
        ("best", ct.c_uint32),
        ("seed", ct.c_uint32),
        ("class_mask", ct.c_uint32),
        ("pad", ct.c_uint32),
    )


class Tuple6(ct.Structure):
    """struct fw_tuple6"""

    _fields_ = (
        ("source_mask", ct.c_uint64 * 2),
        ("destination_mask", ct.c_uint64 * 2),
        ("transport_mask", ct.c_uint64),
        ("best", ct.c_uint32),
        ("seed", ct.c_uint32),
        ("class_mask", ct.c_uint32),
        ("pad", ct.c_uint32),
    )


class Table(ct.Structure):
    """struct fw_table"""

    _fields_ = (
        ("root", ct.c_uint32),
        ("shift", ct.c_uint32),
        ("blocks", ct.c_uint32),
        ("classes", ct.c_uint32),
        ("base", ct.c_uint64),
        ("limit", ct.c_uint64),
    )


class Classifier(ct.Structure):
    """struct fw_classifier"""

    _fields_ = (
        ("tuples", ct.c_uint32),
        ("count", ct.c_uint32),
        ("entries", ct.c_uint32),
        ("tuple", ct.c_uint32),
        ("heads", ct.c_uint32),
        ("heads_mask", ct.c_uint32),
        ("protocols", ct.c_uint32),
        ("first", ct.c_uint32),
        ("classes", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("fields", Table * 4),  # source, destination, port, source port
    )


class Slot(ct.Structure):
    """struct fw_slot"""

    _fields_ = (
        ("epoch", ct.c_uint32),
        ("flags", ct.c_uint16),
        ("shadow", ct.c_uint16),
        ("rules", ct.c_uint32),
        ("sets", ct.c_uint32),
        ("default_sample", ct.c_uint32),
        ("defaults", ct.c_uint8 * 2),
        ("mark", ct.c_uint8 * 10),
        ("digest", ct.c_uint8 * 32),
        ("classifiers", Classifier * 2 * 2),  # direction; IPv4, IPv6
    )


class Sizes(ct.Structure):
    """struct fw_sizes"""

    _fields_ = (("half", ct.c_uint64), ("buckets", ct.c_uint32), ("weak", ct.c_uint32))


class Set(ct.Structure):
    """struct fw_set"""

    _fields_ = (
        ("root", ct.c_uint32),
        ("changes", ct.c_uint32),
        ("shift", ct.c_uint32),
        ("narrow", ct.c_uint32),
        ("filter", ct.c_uint32),
        ("filter_shift", ct.c_uint32),
        ("base", ct.c_uint64),
        ("limit", ct.c_uint64),
    )


class Config(ct.Structure):
    """struct fw_config"""

    _fields_ = tuple(
        (name, ct.c_uint32)
        for name in (
            "timeout_syn", "timeout_established", "timeout_closing", "timeout_udp", "timeout_udp_replied",
            "timeout_icmp", "timeout_other", "timeout_fragment", "touch", "adopt_until",
        )
    )  # fmt: skip


class FlowKey(ct.Structure):
    """struct fw_flow_key"""

    _fields_ = (
        ("low", _address),
        ("high", _address),
        ("low_port", ct.c_uint16),
        ("high_port", ct.c_uint16),
        ("protocol", ct.c_uint8),
        ("family", ct.c_uint8),
        ("pad", ct.c_uint8 * 2),
    )


class FlowSide(ct.Structure):
    """struct fw_flow_side"""

    _fields_ = tuple((name, ct.c_uint32) for name in ("allowed", "denied", "identity", "ifindex"))


class Flow(ct.Structure):
    """struct fw_flow"""

    _fields_ = (
        ("key", FlowKey),
        ("seen", ct.c_uint64),
        ("sequence", ct.c_uint32),
        ("life", ct.c_uint32),
        ("swapped", ct.c_uint8),
        ("direction", ct.c_uint8),
        ("stage", ct.c_uint8),
        ("proof", ct.c_uint8),
        ("number", ct.c_uint32),
        ("sides", FlowSide * 2),
        ("born", ct.c_uint64),
        ("icmp_type", ct.c_uint8),
        ("pad", ct.c_uint8 * 23),
    )


class FlowTags(ct.Structure):
    """struct fw_flow_tags"""

    _fields_ = (("word", ct.c_uint64 * (WAYS // 4)),)


class FlowSeed(ct.Structure):
    """struct fw_flow_seed"""

    _fields_ = (("word", ct.c_uint64 * 11),)


class FragmentKey(ct.Structure):
    """struct fw_fragment_key"""

    _fields_ = (
        ("source", _address),
        ("destination", _address),
        ("id", ct.c_uint32),
        ("protocol", ct.c_uint8),
        ("family", ct.c_uint8),
        ("direction", ct.c_uint8),
        ("pad", ct.c_uint8),
    )


class Fragment(ct.Structure):
    """struct fw_fragment"""

    _fields_ = (("epoch", ct.c_uint32), ("seen", ct.c_uint32))


class BucketKey(ct.Structure):
    """struct fw_bucket_key"""

    _fields_ = (("source", _address), ("identity", ct.c_uint32), ("pad", ct.c_uint32))


class Counter(ct.Structure):
    """struct fw_counter, of one CPU"""

    _fields_ = (("packets", ct.c_uint64), ("bytes", ct.c_uint64))


class Totals(ct.Structure):
    """struct fw_totals, of one CPU"""

    _fields_ = (
        ("packets", ct.c_uint64 * 2 * len(REASONS) * 2),
        ("by_slot", ct.c_uint64 * 2 * SLOTS),
        ("flows_created", ct.c_uint64),
        ("flows_failed", ct.c_uint64),
        ("flows_evicted", ct.c_uint64),
        ("revalidated", ct.c_uint64),
        ("past_deadline", ct.c_uint64),
        ("events_lost", ct.c_uint64),
    )


class Event(ct.Structure):
    """struct fw_event"""

    _fields_ = (
        ("boot_ns", ct.c_uint64),
        ("source", _address),
        ("destination", _address),
        ("epoch", ct.c_uint32),
        ("identity", ct.c_uint32),
        ("order", ct.c_uint32),
        ("ifindex", ct.c_uint32),
        ("length", ct.c_uint32),
        ("sample", ct.c_uint32),
        ("source_port", ct.c_uint16),
        ("destination_port", ct.c_uint16),
        ("family", ct.c_uint8),
        ("protocol", ct.c_uint8),
        ("direction", ct.c_uint8),
        ("verdict", ct.c_uint8),
        ("reason", ct.c_uint8),
        ("icmp_type", ct.c_uint8),
        ("icmp_code", ct.c_uint8),
        ("tcp_flags", ct.c_uint8),
        ("why", ct.c_uint8),
        ("packet", ct.c_uint8),
        ("asked", ct.c_uint8),
        ("pad", ct.c_uint8),
        ("origin", ct.c_uint32),
        ("pad2", ct.c_uint32),
    )


class Probe(ct.Structure):
    """struct fw_probe"""

    _fields_ = (
        ("interfaces", ct.c_uint64),
        ("epoch", ct.c_uint32),
        ("identity", ct.c_uint32),
        ("order", ct.c_uint32),
        ("slot", ct.c_uint8),
        ("direction", ct.c_uint8),
        ("state", ct.c_uint8),
        ("network", ct.c_uint8),
        ("verdict", ct.c_uint8),
        ("reason", ct.c_uint8),
        ("parsed", ct.c_uint8),
        ("done", ct.c_uint8),
    )


class Clock(ct.Structure):
    """struct fw_clock"""

    _fields_ = (("jiffies", ct.c_uint64), ("monotonic_ns", ct.c_uint64))


#: By their names in C.
STRUCTS: Final[dict[str, type[ct.Structure]]] = {
    "fw_match": Match,
    "fw_entry4": Entry4,
    "fw_entry6": Entry6,
    "fw_rule": Rule,
    "fw_tuple4": Tuple4,
    "fw_tuple6": Tuple6,
    "fw_table": Table,
    "fw_classifier": Classifier,
    "fw_slot": Slot,
    "fw_sizes": Sizes,
    "fw_set": Set,
    "fw_config": Config,
    "fw_flow_key": FlowKey,
    "fw_flow_side": FlowSide,
    "fw_flow": Flow,
    "fw_flow_tags": FlowTags,
    "fw_flow_seed": FlowSeed,
    "fw_fragment_key": FragmentKey,
    "fw_fragment": Fragment,
    "fw_bucket_key": BucketKey,
    "fw_counter": Counter,
    "fw_totals": Totals,
    "fw_event": Event,
    "fw_probe": Probe,
    "fw_clock": Clock,
}


def check_against_btf(built: Path) -> list[str]:
    """Where these views and the structures compiled into an object differ; empty when they agree.

    Raises Refused(PACKAGE_MALFORMED) when the object has no readable BTF, OSError when it cannot be read.
    """
    from loopback.bpf import btf  # nothing that runs on a host needs it

    compiled = {
        name: found for name, found in btf.structures(built.read_bytes()).items() if name.startswith("fw_")
    }
    found = [f"struct {name}: no view here" for name in sorted(compiled.keys() - STRUCTS.keys())]
    found += [f"struct {name}: not in the object" for name in sorted(STRUCTS.keys() - compiled.keys())]
    for name in sorted(STRUCTS.keys() & compiled.keys()):
        view = STRUCTS[name]
        fields = []
        for field in view._fields_:
            place = getattr(view, field[0])
            fields.append(btf.Field(field[0], place.offset, place.size))
        if ct.sizeof(view) != compiled[name].size:
            found.append(f"struct {name}: {ct.sizeof(view)} bytes here, {compiled[name].size} in the object")
        for mine, theirs in zip_longest(fields, compiled[name].fields):
            if mine != theirs:
                found.append(f"struct {name}: {_place(mine)} here, {_place(theirs)} in the object")
    return found


def _place(field: btf.Field | None) -> str:
    return f"{field.name} at {field.offset}, {field.size} bytes," if field else "nothing"


def size_of_slot() -> int:
    """Bytes of a slot's head."""
    return ct.sizeof(Slot)


def buckets_for(flows: int) -> int:
    """How many buckets a connection table for so many flows has: a power of two, within what there can be."""
    wanted = min(max(flows, MIN_FLOWS), MAX_FLOWS)
    return 1 << (-(-wanted // WAYS) - 1).bit_length()


def half_for(need: int) -> int:
    """The size of slots for a policy of `need` bytes: a power of two with an eighth to spare."""
    return max(MIN_HALF, 1 << (need + need // 8 - 1).bit_length())


def counters_for(rules: int) -> int:
    """The number of counters for a policy of `rules`: a power of two with an eighth to spare for rules of other policies."""
    return max(MIN_COUNTERS, 1 << (rules + rules // 8 - 1).bit_length())


def active_word(epoch: int, fallback: int = 0, deadline: int = 0) -> int:
    """The active word. Epochs are cut to 16 bits; a deadline of 0 is a confirmed policy."""
    return (epoch & 0xFFFF) << 32 | (fallback & 0xFFFF) << 48 | deadline


def split_word(word: int) -> tuple[int, int, int]:
    """(epoch, fallback, deadline) of an active word."""
    return word >> 32 & 0xFFFF, word >> 48, word & 0xFFFFFFFF
