"""The structures that the firewall's programs share with user space, as ctypes views.

They mirror programs/firewall.h; a test compares each with the object's BTF, field by field. Addresses are 16 bytes in network
order, IPv4 in its v4-mapped form.
"""

from __future__ import annotations

import ctypes as ct
import hashlib
from itertools import zip_longest
from pathlib import Path
from typing import Final

from loopback.bpf import btf

LAYOUT: Final = 1
SLOTS: Final = 2
MAX_RULES: Final = 4096
MAX_COUNTERS: Final = 8192
SET_WORDS: Final = 4
MAX_SETS: Final = 64 * SET_WORDS - 1  # number 0 is no set
RULE_PORTS: Final = 4
RULE_SOURCE_PORTS: Final = 2
RULE_PROTOCOLS: Final = 4
RULE_ICMP: Final = 4
MAX_INTERFACES: Final = 63  # bit 63 asks the program to look the bits up
NO_RULE: Final = 0xFFFFFFFF
ANY_CODE: Final = 0xFF
TICK_SHIFT: Final = 26  # a tick of the deadline is 2^26 ns of the boot clock

INGRESS, EGRESS = 0, 1
DROP, ACCEPT = 0, 1
NEW, ESTABLISHED, RELATED, INVALID = 1, 2, 4, 8
STATES: Final = {"new": NEW, "established": ESTABLISHED, "related": RELATED, "invalid": INVALID}
IPV4, IPV6 = 1, 2

SOURCE_PREFIX, SOURCE_SET, DESTINATION_PREFIX, DESTINATION_SET, INTERFACES, LIMIT_RULE, LIMIT_SOURCE = (
    1 << bit for bit in range(7)
)
USES_SETS4, USES_SETS6, USES_INTERFACES = 1, 2, 4

#: Index is `enum fw_reason`.
REASONS: Final = (
    "rule", "default", "flow", "related", "essential", "unparsed", "truncated", "revoked", "fragment", "adoption",
    "broken", "off",
)  # fmt: skip
PARSED: Final = ("parsed", "essential", "unparsed", "truncated")
FLOW_STAGES: Final = ("opening", "open", "closing", "reset")
PROBE_ACTIVE: Final = 0xFF

_address = ct.c_uint8 * 16


class Rule(ct.Structure):
    """struct fw_rule"""

    _fields_ = (
        ("identity", ct.c_uint32),
        ("order", ct.c_uint32),
        ("action", ct.c_uint8),
        ("families", ct.c_uint8),
        ("states", ct.c_uint8),
        ("flags", ct.c_uint8),
        ("source_set", ct.c_uint16),
        ("destination_set", ct.c_uint16),
        ("protocols", ct.c_uint8 * RULE_PROTOCOLS),
        ("protocol_count", ct.c_uint8),
        ("port_count", ct.c_uint8),
        ("source_port_count", ct.c_uint8),
        ("icmp_count", ct.c_uint8),
        ("ports", ct.c_uint16 * 2 * RULE_PORTS),
        ("source_ports", ct.c_uint16 * 2 * RULE_SOURCE_PORTS),
        ("icmp", ct.c_uint8 * 2 * RULE_ICMP),
        ("interfaces", ct.c_uint64),
        ("source", _address),
        ("source_mask", _address),
        ("destination", _address),
        ("destination_mask", _address),
        ("limit_interval", ct.c_uint64),
        ("limit_tolerance", ct.c_uint64),
        ("log_sample", ct.c_uint32),
        ("pad", ct.c_uint32),
    )


class SlotHead(ct.Structure):
    """struct fw_slot without its rules"""

    _fields_ = (
        ("epoch", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("first", ct.c_uint32 * 2),
        ("count", ct.c_uint32 * 2),
        ("defaults", ct.c_uint8 * 2),
        ("pad", ct.c_uint8 * 2),
        ("default_sample", ct.c_uint32),
        ("digest", ct.c_uint8 * 32),
    )


class Slot(ct.Structure):
    """struct fw_slot"""

    _fields_ = (*SlotHead._fields_, ("rules", Rule * MAX_RULES))


class SetKey4(ct.Structure):
    """struct fw_set_key4"""

    _fields_ = (("length", ct.c_uint32), ("address", ct.c_uint8 * 4))


class SetKey6(ct.Structure):
    """struct fw_set_key6"""

    _fields_ = (("length", ct.c_uint32), ("address", ct.c_uint8 * 16))


class SetValue(ct.Structure):
    """struct fw_set_value"""

    _fields_ = (("sets", ct.c_uint64 * SET_WORDS),)


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
        ("seen", ct.c_uint32),
        ("swapped", ct.c_uint8),
        ("direction", ct.c_uint8),
        ("stage", ct.c_uint8),
        ("icmp_type", ct.c_uint8),
        ("sides", FlowSide * 2),
    )


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
        ("pad", ct.c_uint32),
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
    "fw_rule": Rule,
    "fw_slot": Slot,
    "fw_set_key4": SetKey4,
    "fw_set_key6": SetKey6,
    "fw_set_value": SetValue,
    "fw_config": Config,
    "fw_flow_key": FlowKey,
    "fw_flow_side": FlowSide,
    "fw_flow": Flow,
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


def fingerprint() -> str:
    """What two versions must have in common to share maps: 16 hex digits over every field's place, and LAYOUT."""
    text = [f"layout {LAYOUT}"]
    for name, struct in STRUCTS.items():
        text.append(f"{name} {ct.sizeof(struct)}")
        for field in struct._fields_:
            place = getattr(struct, field[0])
            text.append(f" {field[0]} {place.offset} {place.size}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def active_word(epoch: int, fallback: int = 0, deadline: int = 0) -> int:
    """The active word. Epochs are cut to 16 bits; a deadline of 0 is a confirmed policy."""
    return (epoch & 0xFFFF) << 32 | (fallback & 0xFFFF) << 48 | deadline


def split_word(word: int) -> tuple[int, int, int]:
    """(epoch, fallback, deadline) of an active word."""
    return word >> 32 & 0xFFFF, word >> 48, word & 0xFFFFFFFF
