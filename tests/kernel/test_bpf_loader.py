"""The loader against a real kernel: objects, maps, links, filters, rings; and what it says where the kernel refuses.

Each test has a network namespace of its own, left again at its end; pins lie in a bpf file system of the test's own.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loopback.bpf import hooks, loader
from loopback.bpf.build import compile_object
from loopback.bpf.flood import Flood
from loopback.bpf.hooks import TC_EGRESS, TC_INGRESS, SlotTaken, XdpLink
from loopback.bpf.loader import Loaded, Map, Program
from loopback.bpf.ring import Ring
from loopback.contracts.codes import Code, Refused

pytestmark = pytest.mark.kernel

CLONE_NEWNET = 0x40000000
TINY = Path(__file__).with_name("tiny.bpf.c")
WITHOUT_BPF = Path(__file__).parents[1] / "e2e" / "without_bpf.py"
#: UDP from 192.0.2.1 to 192.0.2.2 without a checksum, in 64 bytes; its ports are at 34 and 36.
FRAME = (
    b"\xff" * 6 + b"\2" * 6 + b"\x08\0"
    + bytes.fromhex("4500003200004000401100 00c0000201c0000202".replace(" ", ""))
    + struct.pack("!HHHH", 4096, 8192, 30, 0)
    + bytes(22)
)  # fmt: skip
ONLY_THREE = [
    "setpriv", "--no-new-privs", "--bounding-set=-all,+bpf,+net_admin,+perfmon",
    "--inh-caps=-all,+bpf,+net_admin,+perfmon", "--",
]  # fmt: skip


def key(number: int) -> bytes:
    return struct.pack("=I", number)


def value(number: int) -> bytes:
    return struct.pack("=Q", number)


def counts(there: Loaded) -> list[int]:
    cpus = loader.possible_cpus()
    found = []
    for index in range(4):
        each = there.maps["seen"].lookup(key(index), 8 * cpus)
        assert each is not None
        found.append(sum(struct.unpack(f"={cpus}Q", each)))
    return found


@pytest.fixture(scope="module")
def tiny_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "tiny.bpf.o"
    compile_object(TINY, out)
    return out


@pytest.fixture
def tiny(tiny_object: Path) -> Iterator[Loaded]:
    there = loader.load(tiny_object.read_bytes())
    yield there
    there.close()


@pytest.fixture
def veth() -> Iterator[tuple[int, int]]:
    """A namespace with a veth pair; the numbers of its two ends, `va` and `vb`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            for words in ("link add va type veth peer name vb", "link set va up", "link set vb up"):
                subprocess.run(["ip", *words.split()], check=True)
            # nobody may talk but the test: neighbour discovery would be counted
            for name in ("va", "vb"):
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            yield socket.if_nametoindex("va"), socket.if_nametoindex("vb")
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "bpf"
    assert not loader.is_bpffs(place)
    assert loader.ensure_bpffs(place)
    assert loader.is_bpffs(place)
    assert not loader.ensure_bpffs(place)
    yield place
    subprocess.run(["umount", place], check=True)
    assert not loader.is_bpffs(place)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "not within 20 s"


def in_process(script: str, *words: object, wrapper: list[str] | None = None) -> str:
    """Run Python code in a process of its own, in this namespace; what it printed."""
    done = subprocess.run(
        [*(wrapper or []), sys.executable, "-W", "error", "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ── maps ──


def test_maps_are_found_by_name_with_their_shape(tiny: Loaded) -> None:
    table = tiny.maps["table"]
    assert (table.name, table.key_size, table.value_size, table.max_entries) == ("table", 4, 8, 16)
    assert table.id > 0


def test_entries_are_written_read_listed_and_deleted(tiny: Loaded) -> None:
    table = tiny.maps["table"]
    assert table.lookup(key(1)) is None
    table.update(key(1), value(11))
    table.update(key(1), value(12))
    table.update_batch(key(2) + key(3), value(2) + value(3), 2)
    assert table.lookup(key(1)) == value(12)
    assert sorted(table.keys()) == [key(1), key(2), key(3)]
    table.delete(key(1))
    table.delete(key(1))
    assert table.lookup(key(1)) is None
    with pytest.raises(Refused) as refusal:
        table.update(key(2), value(0), loader.BPF_NOEXIST)
    assert refusal.value.code is Code.KERNEL_REFUSED


def test_a_full_map_refuses_one_more(tiny: Loaded) -> None:
    for number in range(16):
        tiny.maps["table"].update(key(number), value(number))
    with pytest.raises(Refused, match="writing map table"):
        tiny.maps["table"].update(key(16), value(16))


def test_keys_come_to_an_end_while_they_are_deleted(tiny: Loaded) -> None:
    table = tiny.maps["table"]
    for number in range(16):
        table.update(key(number), value(number))
    found = []
    for one in table.keys():  # noqa: SIM118  a map of the kernel, no dict
        found.append(one)
        table.delete(one)
        assert len(found) <= 64
    assert set(found) <= {key(number) for number in range(16)}


def test_a_word_stored_through_memory_is_what_the_program_reads(tiny: Loaded) -> None:
    tiny.maps["word"].store_word(0x0807060504030201)
    assert tiny.maps["word"].load_word() == 0x0807060504030201
    answer, data, duration = tiny.programs["stamp"].run(bytes(64))
    assert (answer, data) == (3, bytes(range(1, 9)) + bytes(56))  # 3 is XDP_TX
    assert duration >= 0


def test_an_inner_map_is_what_the_outer_one_shows_from_then_on(tiny: Loaded) -> None:
    assert tiny.programs["look_inside"].run(FRAME)[0] == 0xFFFFFFFF
    for number in (70, 71):
        inner = Map.create(loader.MAP_HASH, "inner", 4, 8, 4)
        inner.update(key(7), value(number))
        tiny.maps["outer"].update_fd(0, inner)
        inner.close()
        assert tiny.programs["look_inside"].run(FRAME)[0] == number


def test_a_prefix_map_answers_with_the_longest_match() -> None:
    trie = Map.create(loader.MAP_LPM, "trie", 8, 8, 8, loader.NO_PREALLOC)
    try:
        prefixes = struct.pack("=I4B", 8, 10, 0, 0, 0) + struct.pack("=I4B", 16, 10, 1, 0, 0)
        trie.update_batch(prefixes, value(8) + value(16), 2)
        assert trie.lookup(struct.pack("=I4B", 32, 10, 1, 2, 3)) == value(16)
        assert trie.lookup(struct.pack("=I4B", 32, 10, 2, 2, 3)) == value(8)
        assert trie.lookup(struct.pack("=I4B", 32, 11, 2, 2, 3)) is None
    finally:
        trie.close()


def test_a_map_can_be_resized_and_one_that_is_there_taken_over(tiny_object: Path, tiny: Loaded) -> None:
    tiny.maps["table"].update(key(5), value(55))
    again = loader.load(
        tiny_object.read_bytes(), reuse={"table": tiny.maps["table"]}, resize={"events": 8192}
    )
    try:
        assert again.maps["table"].id == tiny.maps["table"].id
        assert again.maps["table"].lookup(key(5)) == value(55)
        assert again.maps["events"].max_entries == 8192
        assert again.maps["word"].id != tiny.maps["word"].id
    finally:
        again.close()


# ── programs ──


def test_a_program_has_a_number_and_a_tag_that_follows_its_code(tiny_object: Path, tiny: Loaded) -> None:
    assert len({program.id for program in tiny.programs.values()}) == len(tiny.programs)
    assert tiny.programs["stamp"].tag != tiny.programs["look_inside"].tag
    again = loader.load(tiny_object.read_bytes())
    again.close()
    assert again.programs["stamp"].tag == tiny.programs["stamp"].tag


def test_each_run_is_counted(tiny: Loaded) -> None:
    tiny.programs["xdp_second"].run(FRAME, repeat=10)
    assert counts(tiny) == [0, 10, 0, 0]


class Sum(ctypes.Structure):
    _fields_ = (("one", ctypes.c_uint64), ("two", ctypes.c_uint64), ("answer", ctypes.c_uint64))


def test_a_system_call_program_answers_in_its_context(tiny: Loaded) -> None:
    question = Sum(one=2**40, two=2)
    assert tiny.programs["add"].run_syscall(question) == 5
    assert question.answer == 2**40 + 2


def test_records_of_a_ring_arrive_in_order_and_wake_a_poll(tiny: Loaded) -> None:
    got: list[int] = []
    ring = Ring(tiny.maps["events"], lambda record: got.append(*struct.unpack("=Q", record)))
    try:
        assert ring.consume() == 0
        for length in (20, 30, 40):
            tiny.programs["stamp"].run(bytes(length))
        assert select.select([ring.fileno()], [], [], 5)[0]
        assert ring.consume() == 3
        assert got == [20, 30, 40]
    finally:
        ring.close()


# ── refusals ──


def test_what_is_no_object_is_refused_as_malformed(tiny_object: Path) -> None:
    for data in (b"", b"no object at all", tiny_object.read_bytes()[:500]):
        with pytest.raises(Refused) as refusal:
            loader.load(data)
        assert refusal.value.code is Code.PACKAGE_MALFORMED


def compiled(folder: Path, body: str) -> bytes:
    source = folder / "made.bpf.c"
    source.write_text(
        f'#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n{body}\nchar L[] SEC("license") = "GPL";\n'
    )
    compile_object(source, folder / "made.bpf.o")
    return (folder / "made.bpf.o").read_bytes()


def test_a_program_that_is_not_safe_is_refused_in_the_verifiers_words(tmp_path: Path) -> None:
    body = 'SEC("xdp") int bad(struct xdp_md *xdp) { return *(unsigned char *)(long)xdp->data; }'
    data = compiled(tmp_path, body)
    with pytest.raises(Refused) as refusal:
        loader.load(data)
    assert refusal.value.code is Code.KERNEL_REFUSED
    assert "invalid access to packet" in refusal.value.reason
    assert len(refusal.value.reason) < loader.MAX_LOG + 200


def test_of_a_verifiers_log_of_megabytes_the_end_is_kept(tmp_path: Path) -> None:
    # every turn of the loop is in the log, and only then comes what is wrong
    body = """SEC("xdp") int bad(struct xdp_md *xdp)
{
	volatile unsigned long sum = 0;
	for (int i = 0; i < 20000; i++)
		sum += i;
	return *(unsigned char *)(long)xdp->data + sum;
}"""
    data = compiled(tmp_path, body)
    with pytest.raises(Refused) as refusal:
        loader.load(data)
    assert refusal.value.code is Code.KERNEL_REFUSED
    assert "invalid access to packet" in refusal.value.reason
    assert len(refusal.value.reason) < loader.MAX_LOG + 200


def test_messages_of_libbpf_are_not_printed(
    tmp_path: Path, tiny: Loaded, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refused):
        loader.load(b"nothing")
    assert capfd.readouterr() == ("", "")


def test_a_missing_pin_is_refused_by_its_name(pins: Path) -> None:
    for kind in (Map, Program, XdpLink):
        with pytest.raises(Refused, match="absent"):
            kind.pinned(pins / "absent")


def test_where_bpf_is_not_permitted_that_is_what_it_says() -> None:
    assert loader.why_unsupported() == ""
    forbidden = [sys.executable, str(WITHOUT_BPF)]
    said = in_process("from loopback.bpf import loader; print(loader.why_unsupported())", wrapper=forbidden)
    assert said.endswith("bpf() is not permitted (EPERM)")
    assert said.startswith(".".join(os.uname().release.split(".")[:2]) + ": ")


def test_loading_where_bpf_is_not_permitted_is_unsupported_and_says_which_rights_it_takes(
    tiny_object: Path,
) -> None:
    script = """
import sys
from pathlib import Path
from loopback.bpf import loader
from loopback.contracts.codes import Refused
try:
    loader.load(Path(sys.argv[1]).read_bytes())
except Refused as refusal:
    print(refusal.code, refusal.next_step)
"""
    said = in_process(script, tiny_object, wrapper=[sys.executable, str(WITHOUT_BPF)])
    assert said.startswith("kernel.unsupported ")
    assert "CAP_BPF" in said


def test_importing_and_asking_why_need_no_bcc() -> None:
    script = """
import sys
sys.modules["bcc"] = None
from loopback.bpf import flood, hooks, loader, ring
print(loader.why_unsupported())
"""
    assert "libbpf cannot be reached" in in_process(script)


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
        tap.settimeout(5)
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
from loopback.bpf import hooks, loader
from loopback.bpf.ring import Ring
pins, vb = Path(sys.argv[2]), socket.if_nametoindex("vb")
rights = Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0]
assert int(rights, 16) == 1 << 12 | 1 << 38 | 1 << 39, rights
assert loader.why_unsupported() == ""
tiny = loader.load(Path(sys.argv[1]).read_bytes())
for name in ("table", "seen"):
    tiny.maps[name].pin(pins / name)
tiny.programs["xdp_second"].pin(pins / "program")
tiny.maps["table"].update(struct.pack("=I", 9), struct.pack("=Q", 99))
inner = loader.Map.create(loader.MAP_HASH, "inner", 4, 8, 4)
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
from loopback.bpf import hooks, loader
pins, vb = Path(sys.argv[2]), socket.if_nametoindex("vb")
table, seen = loader.Map.pinned(pins / "table"), loader.Map.pinned(pins / "seen")
assert table.lookup(struct.pack("=I", 9)) == struct.pack("=Q", 99)
link = hooks.XdpLink.pinned(pins / "vb-native")
assert (link.mode, link.ifindex) == ("native", vb)
program = loader.Program.pinned(pins / "program")
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


def test_a_place_where_no_folder_can_be_made_is_refused_in_words() -> None:
    with pytest.raises(Refused, match="no bpf file system at /proc/loopback/bpf") as refusal:
        loader.ensure_bpffs(Path("/proc/loopback/bpf"))
    assert "mount -t bpf" in refusal.value.next_step


def test_an_error_of_a_rings_reader_reaches_who_consumes(tiny: Loaded) -> None:
    def fail(record: bytes) -> None:
        raise LookupError(len(record))

    ring = Ring(tiny.maps["events"], fail)
    try:
        tiny.programs["stamp"].run(FRAME, repeat=2)
        for _ in range(2):  # the record that failed is used up, the next one is not lost
            with pytest.raises(LookupError):
                ring.consume()
        assert ring.consume() == 0
    finally:
        ring.close()


def test_mounting_without_the_right_to_is_refused_in_words(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from loopback.bpf import loader
from loopback.contracts.codes import Refused
try:
    loader.ensure_bpffs(Path(sys.argv[1]))
except Refused as refusal:
    print(refusal.reason)
"""
    said = in_process(script, tmp_path / "bpf", wrapper=ONLY_THREE)
    assert said.startswith(f"kernel: no bpf file system at {tmp_path / 'bpf'}")
