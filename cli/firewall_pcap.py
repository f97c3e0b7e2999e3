"""Frames from capture files, pcap and pcapng, for questions to the program: as they were on the wire.

Our own reader of the two containers, since they are little more than lengths: the libraries that read both either bring a whole
packet workbench or hand out bytes without the interface's link type and name, which decide how a frame is asked about.
Formats: draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng; link types by tcpdump.org/linktypes.html.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple, NoReturn

from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.model import Direction
from loopback.modules.firewall.packets import LONGEST_FRAME, Frame
from loopback.modules.firewall.policy_fields import ICMP, ICMPV6, WITH_PORTS

ETHERNET, NULL, RAW, LOOP, SLL, IPV4, IPV6, SLL2 = 1, 0, 101, 108, 113, 228, 229, 276
RAW_OLD: Final = (12, 14)  # what raw IP was called in files of some systems
_SECTION: Final = 0x0A0D0D0A
_MAGIC: Final = {0xA1B2C3D4, 0xA1B23C4D}
_MOST: Final = 1 << 24  # bytes of one block or frame; nothing on a wire is as long
_OUTGOING: Final = 4  # the packet type of Linux's cooked captures
_TAGS: Final = (0x8100, 0x88A8)
_EXTENSIONS: Final = (0, 43, 44, 51, 60)


class _Link(NamedTuple):
    kind: int
    name: str


def read(data: bytes, direction: Direction = Direction.INGRESS) -> Iterator[Frame]:
    """The frames of a capture. `direction` is that of frames whose capture does not say it.

    A frame that the capture cut short is filled up with zeros to its length. Raises Refused(POLICY_MALFORMED) for what is no
    capture, ends early, has a link type that carries no IP, a frame that is too long to ask about, or one of which the capture
    kept too little to tell what its headers say.
    """
    if len(data) >= 24:
        for order in "<>":
            magic = struct.unpack_from(order + "I", data)[0]
            if magic in _MAGIC:
                return _pcap(data, order, direction)
            if magic == _SECTION:
                return _pcapng(data, direction)
    return _refuse("it is neither pcap nor pcapng")


def _refuse(what: str, number: int = 0) -> NoReturn:
    where = f"frame {number}: " if number else ""
    raise Refused(
        Code.POLICY_MALFORMED,
        f"the capture does not read: {where}{what}",
        "capture anew, e.g. tcpdump -w FILE",
    )


def _pcap(data: bytes, order: str, direction: Direction) -> Iterator[Frame]:
    link = _Link(struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF, "")
    head = struct.Struct(order + "8xII")
    at, number = 24, 0
    while at < len(data):
        number += 1
        if at + head.size > len(data):
            _refuse("the file ends within it", number)
        kept, whole = head.unpack_from(data, at)
        at += head.size
        if at + kept > len(data) or max(kept, whole) > _MOST:
            _refuse("the file ends within it", number)
        yield _frame(data[at : at + kept], whole, link, direction, number)
        at += kept


def _pcapng(data: bytes, direction: Direction) -> Iterator[Frame]:
    order = "<"
    links: list[_Link] = []
    at = number = 0
    while at < len(data):
        if at + 12 > len(data):
            _refuse("the file ends within a block")
        kind = struct.unpack_from(order + "I", data, at)[0]
        if kind == _SECTION:
            order = "<" if data[at + 8 : at + 12] == b"\x4d\x3c\x2b\x1a" else ">"
            links = []
        size = struct.unpack_from(order + "I", data, at + 4)[0]
        if size < 12 or size % 4 or size > _MOST or at + size > len(data):
            _refuse("a block's length cannot be")
        body = data[at + 8 : at + size - 4]
        at += size
        if kind == 1 and len(body) >= 8:
            links.append(_Link(struct.unpack_from(order + "H", body)[0], _name(body[8:], order)))
        elif kind == 6 and len(body) >= 20:
            number += 1
            index, kept, whole = struct.unpack_from(order + "I8xII", body)
            if index >= len(links) or 20 + kept > len(body) or whole > _MOST:
                _refuse("its lengths or its interface cannot be", number)
            flags = _option(body[20 + (kept + 3) // 4 * 4 :], 2, order)
            towards = struct.unpack(order + "I", flags)[0] & 3 if len(flags) == 4 else 0
            way = {1: Direction.INGRESS, 2: Direction.EGRESS}.get(towards, direction)
            yield _frame(body[20 : 20 + kept], whole, links[index], way, number)
        elif kind == 3 and len(body) >= 4:
            number += 1
            whole = struct.unpack_from(order + "I", body)[0]
            if not links or whole > _MOST:
                _refuse("its length or its interface cannot be", number)
            yield _frame(body[4 : 4 + whole], whole, links[0], direction, number)


def _name(options: bytes, order: str) -> str:
    name = _option(options, 2, order).split(b"\0")[0]
    return name.decode(errors="replace")


def _option(options: bytes, wanted: int, order: str) -> bytes:
    """The first option with this code; empty when there is none."""
    at = 0
    while at + 4 <= len(options):
        code, size = struct.unpack_from(order + "HH", options, at)
        if code == wanted:
            return options[at + 4 : at + 4 + size]
        if code == 0:
            break
        at += 4 + (size + 3) // 4 * 4
    return b""


def _frame(data: bytes, whole: int, link: _Link, direction: Direction, number: int) -> Frame:
    """A frame to ask about. Link headers that no device of ours has are taken off; IP itself is never touched."""
    if link.kind == ETHERNET:
        return Frame(_whole(data, whole, False, number), direction, link.name)
    before = len(data)
    if link.kind == SLL:
        direction = Direction.EGRESS if data[:2] == b"\0\4" else direction
        data = data[16:]
    elif link.kind == SLL2:
        direction = Direction.EGRESS if data[10:11] == bytes((_OUTGOING,)) else direction
        data = data[20:]
    elif link.kind in (NULL, LOOP):
        data = data[4:]
    elif link.kind not in (RAW, IPV4, IPV6, *RAW_OLD):
        _refuse(f"link type {link.kind} carries no IP that we know to find", number)
    whole -= before - len(data)
    return Frame(_whole(data, whole, True, number), direction, link.name, network=True)


def _whole(kept: bytes, whole: int, network: bool, number: int) -> bytes:
    """A frame in its length on the wire, where what was kept of it decides what the program says."""
    if max(len(kept), whole) > LONGEST_FRAME:
        _refuse(f"its {max(len(kept), whole)} bytes are more than the {LONGEST_FRAME} of a dry run", number)
    if len(kept) < whole and not _tells(kept, network):
        _refuse(f"the capture kept {len(kept)} of its {whole} bytes, too few for its headers", number)
    return kept + bytes(max(whole - len(kept), 0))


def _tells(kept: bytes, network: bool) -> bool:
    """Whether the beginning of a frame has all that rules can ask about: addresses, protocol, ports or types."""
    try:
        at, kind = 0, {4: 0x0800, 6: 0x86DD}.get(kept[0] >> 4, 0)
        if not network:
            at, kind = 14, kept[12] << 8 | kept[13]
            for _ in range(2):
                if kind in _TAGS:
                    at, kind = at + 4, kept[at + 2] << 8 | kept[at + 3]
        if kind == 0x0800:
            protocol, later = kept[at + 9], (kept[at + 6] << 8 | kept[at + 7]) & 0x1FFF
            at += 20 if later else (kept[at] & 15) * 4
        elif kind == 0x86DD:
            protocol, later, at = kept[at + 6], 0, at + 40
            while protocol in _EXTENSIONS and not later:
                units = {44: 8, 51: (kept[at + 1] + 2) * 4}.get(protocol, (kept[at + 1] + 1) * 8)
                later = protocol == 44 and (kept[at + 2] << 8 | kept[at + 3]) & 0xFFF8
                protocol, at = kept[at], at + units
        else:
            return True
    except IndexError:
        return False
    if not later:
        at += 4 if protocol in WITH_PORTS else 2 if protocol in (ICMP, ICMPV6) else 0
    return at <= len(kept)
