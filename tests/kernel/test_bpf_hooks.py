"""Programs on devices, against a real kernel: no gap in a replacement, other processes take over, three rights are enough.

Each test has a network namespace of its own, left again at its end; pins lie in a bpf file system of the test's own.
"""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support_bpf import FRAME, ONLY_THREE, counts, in_process, wait_for

from loopback.bpf import hooks
from loopback.bpf.flood import Flood
from loopback.bpf.hooks import TC_EGRESS, TC_INGRESS, SlotTaken, XdpLink
from loopback.bpf.loader import Loaded
from loopback.bpf.objects import Map, Program
from loopback.contracts.codes import Refused

pytestmark = pytest.mark.kernel


# ── XDP ──


def test_a_link_is_native_where_the_driver_can_and_generic_elsewhere(
    tiny: Loaded, veth: tuple[int, int]
) -> None:
    native = XdpLink.create(veth[1], tiny.programs["xdp_first"])
    generic = XdpLink.create(socket.if_nametoindex("lo"), tiny.programs["xdp_first"])
    try:
        assert (native.mode, generic.mode) == ("native", "generic")
        assert (native.ifindex, native.program_id) == (veth[1], tiny.programs["xdp_first"].id)
    finally:
        native.close()
        generic.close()


def test_a_taken_interface_says_so(tiny: Loaded, veth: tuple[int, int]) -> None:
    first = XdpLink.create(veth[1], tiny.programs["xdp_first"])
    try:
        with pytest.raises(SlotTaken):
            XdpLink.create(veth[1], tiny.programs["xdp_second"])
    finally:
        first.close()
    XdpLink.create(veth[1], tiny.programs["xdp_second"]).close()


def test_the_link_of_a_device_that_went_says_zero(tiny: Loaded, veth: tuple[int, int]) -> None:
    link = XdpLink.create(veth[1], tiny.programs["xdp_first"])
    try:
        subprocess.run(["ip", "link", "del", "va"], check=True)
        assert link.ifindex == 0
    finally:
        link.close()


def alternate(there: Loaded, names: tuple[str, str], replace: Callable[[Program], None]) -> None:
    """Replace one program by the other, 40 times, each time until the new one has met a packet."""
    place = {"xdp_first": 0, "xdp_second": 1, "tc_first": 2, "tc_second": 3}
    for turn in range(40):
        name = names[(turn + 1) % 2]
        before = counts(there)[place[name]]
        replace(there.programs[name])
        wait_for(lambda at=place[name], was=before: counts(there)[at] > was)


def test_no_packet_passes_between_two_programs_of_a_link(tiny: Loaded, veth: tuple[int, int]) -> None:
    link = XdpLink.create(veth[1], tiny.programs["xdp_first"])
    try:
        hooks.tc_attach(veth[1], TC_INGRESS, tiny.programs["tc_first"])  # counts what gets past XDP
        with Flood(veth[0], FRAME) as flood:
            flood.start()
            alternate(tiny, ("xdp_first", "xdp_second"), link.update)
            assert link.program_id == tiny.programs["xdp_first"].id
            flood.stop()
        first, second, passed, _ = counts(tiny)
        assert first > 0
        assert second > 0
        assert passed == 0
        link.close()
        with Flood(veth[1], FRAME, into=True) as flood:  # and it would have counted it
            flood.send(100)
        assert counts(tiny)[2] == 100
    finally:
        link.close()


# ── TC ──


def test_a_filter_is_found_again_and_goes_with_the_last_discipline(
    tiny: Loaded, veth: tuple[int, int]
) -> None:
    assert hooks.tc_program(veth[1], TC_INGRESS) == 0
    hooks.tc_attach(veth[1], TC_INGRESS, tiny.programs["tc_first"])
    hooks.tc_attach(veth[1], TC_EGRESS, tiny.programs["tc_second"])
    assert hooks.tc_program(veth[1], TC_INGRESS) == tiny.programs["tc_first"].id
    assert hooks.tc_program(veth[1], TC_EGRESS) == tiny.programs["tc_second"].id
    hooks.tc_detach(veth[1], TC_INGRESS)
    assert hooks.tc_program(veth[1], TC_INGRESS) == 0
    assert hooks.tc_program(veth[1], TC_EGRESS) == tiny.programs["tc_second"].id
    hooks.tc_detach(veth[1], TC_EGRESS)
    hooks.tc_detach(veth[1], TC_EGRESS)
    shown = subprocess.run(["tc", "qdisc", "show", "dev", "vb"], capture_output=True, text=True, check=True)
    assert "clsact" not in shown.stdout


def test_a_neighbours_filter_and_its_discipline_stay(tiny: Loaded, veth: tuple[int, int]) -> None:
    # classic BPF is the one kind of filter that every kernel here has
    for words in (
        ["qdisc", "add", "dev", "vb", "clsact"],
        [
            "filter",
            "add",
            "dev",
            "vb",
            "ingress",
            "prio",
            "50",
            "bpf",
            "bytecode",
            "1,6 0 0 4294967295",
            "flowid",
            "1:1",
        ],
    ):
        subprocess.run(["tc", *words], check=True)
    hooks.tc_attach(veth[1], TC_INGRESS, tiny.programs["tc_first"])
    hooks.tc_detach(veth[1], TC_INGRESS)
    shown = subprocess.run(
        ["tc", "filter", "show", "dev", "vb", "ingress"], capture_output=True, text=True, check=True
    )
    assert "pref 50 bpf" in shown.stdout
    assert "direct-action" not in shown.stdout  # ours is


def test_no_packet_passes_between_two_programs_of_a_filter(tiny: Loaded, veth: tuple[int, int]) -> None:
    def replace(program: Program) -> None:
        hooks.tc_attach(veth[1], TC_INGRESS, program)
        assert hooks.tc_program(veth[1], TC_INGRESS) == program.id

    replace(tiny.programs["tc_first"])
    with Flood(veth[1], FRAME, into=True) as flood:
        flood.start()
        alternate(tiny, ("tc_first", "tc_second"), replace)
        sent = flood.stop()
    *_, first, second = counts(tiny)
    assert first > 0
    assert second > 0
    assert first + second == sent


def test_a_device_that_is_not_there_is_refused(tiny: Loaded, veth: tuple[int, int]) -> None:
    with pytest.raises(Refused):
        XdpLink.create(9999, tiny.programs["xdp_first"])
    with pytest.raises(Refused):
        hooks.tc_attach(9999, TC_INGRESS, tiny.programs["tc_first"])
    assert hooks.tc_program(9999, TC_INGRESS) == 0
    hooks.tc_detach(9999, TC_INGRESS)


# ── the flood ──


def test_a_flood_sends_exactly_what_was_asked_and_varies_what_was_masked(
    tiny: Loaded, veth: tuple[int, int]
) -> None:
    link = XdpLink.create(veth[1], tiny.programs["xdp_first"])
    try:
        with Flood(veth[0], FRAME) as flood:
            flood.send(1000)
            assert flood.sent == 1000
            wait_for(lambda: counts(tiny)[0] == 1000)
    finally:
        link.close()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.bind(("vb", 0))
        tap.settimeout(60)
        with Flood(veth[1], FRAME, into=True, vary=(34, 0x0FFF0000)) as flood:
            flood.send(50)
        frames = [tap.recv(2048) for _ in range(50)]
    ports = {struct.unpack_from("!H", frame, 34)[0] for frame in frames}
    assert len(ports) > 10
    assert all(port & 0xF000 == 0x1000 for port in ports)
    assert {frame[:34] + frame[36:] for frame in frames} == {FRAME[:34] + FRAME[36:]}


@pytest.mark.parametrize(("frame", "vary"), [(b"", None), (bytes(5000), None), (FRAME, (61, 1))])
def test_a_flood_of_what_is_no_frame_is_refused(frame: bytes, vary: tuple[int, int] | None) -> None:
    with pytest.raises(Refused):
        Flood(1, frame, vary=vary)


# ── pins, other processes, few rights ──

BEGIN = """
import ctypes, socket, struct, sys
from pathlib import Path
from loopback.bpf import hooks, kernel, loader, objects
from loopback.bpf.ring import Ring
pins, vb = Path(sys.argv[2]), socket.if_nametoindex("vb")
rights = Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0]
assert int(rights, 16) == 1 << 12 | 1 << 38 | 1 << 39, rights
assert kernel.why_unsupported() == ""
tiny = loader.load(Path(sys.argv[1]).read_bytes())
for name in ("table", "seen"):
    tiny.maps[name].pin(pins / name)
tiny.programs["xdp_second"].pin(pins / "program")
tiny.maps["table"].update(struct.pack("=I", 9), struct.pack("=Q", 99))
inner = objects.Map.create(objects.MAP_HASH, "inner", 4, 8, 4)
tiny.maps["outer"].update_fd(0, inner)
tiny.maps["word"].store_word(1)
ring = Ring(tiny.maps["events"], lambda record: None)
assert tiny.programs["stamp"].run(bytes(64))[0] == 3
assert ring.consume() == 1
ring.close()
link = hooks.XdpLink.create(vb, tiny.programs["xdp_first"])
link.pin(pins / f"vb-{link.mode}")
hooks.tc_attach(vb, hooks.TC_INGRESS, tiny.programs["tc_first"])
link.close(), inner.close(), tiny.close()
"""
ADOPT = """
import socket, struct, sys
from pathlib import Path
from loopback.bpf import hooks, loader, objects
pins, vb = Path(sys.argv[2]), socket.if_nametoindex("vb")
table, seen = objects.Map.pinned(pins / "table"), objects.Map.pinned(pins / "seen")
assert table.lookup(struct.pack("=I", 9)) == struct.pack("=Q", 99)
link = hooks.XdpLink.pinned(pins / "vb-native")
assert (link.mode, link.ifindex) == ("native", vb)
program = objects.Program.pinned(pins / "program")
assert link.program_id != program.id
link.update(program)
assert link.program_id == program.id
again = loader.load(Path(sys.argv[1]).read_bytes(), reuse={"seen": seen})
old = hooks.tc_program(vb, hooks.TC_INGRESS)
assert old > 0
hooks.tc_attach(vb, hooks.TC_INGRESS, again.programs["tc_second"])
assert hooks.tc_program(vb, hooks.TC_INGRESS) == again.programs["tc_second"].id != old
again.close(), program.close(), link.close(), table.close(), seen.close()
"""


def test_three_rights_are_enough_to_begin_and_for_another_process_to_take_over(
    tiny_object: Path, pins: Path, veth: tuple[int, int]
) -> None:
    in_process(BEGIN, tiny_object, pins, wrapper=ONLY_THREE)
    seen = Map.pinned(pins / "seen")
    there = Loaded({"seen": seen}, {})
    try:
        with Flood(veth[0], FRAME) as flood:
            flood.send(64)
            wait_for(lambda: counts(there) == [64, 0, 0, 0])
            in_process(ADOPT, tiny_object, pins, wrapper=ONLY_THREE)
            flood.send(64)
            wait_for(lambda: counts(there) == [64, 64, 0, 0])
        with Flood(veth[1], FRAME, into=True) as flood:
            flood.send(64)
        wait_for(lambda: counts(there) == [64, 64, 0, 64])
    finally:
        there.close()
