"""The loader against a real kernel: objects, maps, programs, rings; and what it says where the kernel refuses."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys
from pathlib import Path

import pytest
from support_bpf import FRAME, ONLY_THREE, WITHOUT_BPF, counts, in_process, key, value

from loopback.bpf import kernel, libbpf, loader, objects
from loopback.bpf.build import compile_object
from loopback.bpf.hooks import XdpLink
from loopback.bpf.loader import Loaded
from loopback.bpf.objects import Map, Program
from loopback.bpf.ring import Ring
from loopback.contracts.codes import Code, Refused

pytestmark = pytest.mark.kernel


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
        table.update(key(2), value(0), objects.BPF_NOEXIST)
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
        inner = Map.create(objects.MAP_HASH, "inner", 4, 8, 4)
        inner.update(key(7), value(number))
        tiny.maps["outer"].update_fd(0, inner)
        inner.close()
        assert tiny.programs["look_inside"].run(FRAME)[0] == number


def test_a_prefix_map_answers_with_the_longest_match() -> None:
    trie = Map.create(objects.MAP_LPM, "trie", 8, 8, 8, objects.NO_PREALLOC)
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
        assert select.select([ring.fileno()], [], [], 60)[0]
        assert ring.consume() == 3
        assert got == [20, 30, 40]
    finally:
        ring.close()


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
    assert len(refusal.value.reason) < libbpf.MAX_LOG + 200


def test_of_an_object_that_is_refused_no_program_stays_in_the_kernel(tmp_path: Path) -> None:
    turns = "volatile int i = 0; " + "i++; " * loader.SHORT
    body = "\n".join(
        f'SEC("xdp") int {name}(struct xdp_md *xdp) {{ {turns} return {what}; }}'
        for name, what in (("fine", "i"), ("bad", "*(unsigned char *)(long)xdp->data"), ("too", "i"))
    )
    data = compiled(tmp_path, body)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with pytest.raises(Refused, match="invalid access to packet"):
        loader.load(data)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


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
    assert len(refusal.value.reason) < libbpf.MAX_LOG + 200


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
    assert kernel.why_unsupported() == ""
    forbidden = [sys.executable, str(WITHOUT_BPF)]
    said = in_process("from loopback.bpf import kernel; print(kernel.why_unsupported())", wrapper=forbidden)
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


def test_importing_and_asking_why_need_no_libbpf() -> None:
    script = """
import ctypes
real = ctypes.CDLL
def without(name, *given, **named):
    if name and "bpf" in name:
        raise OSError(f"{name}: cannot open shared object file")
    return real(name, *given, **named)
ctypes.CDLL = without
from loopback.bpf import flood, hooks, kernel, loader, ring
print(kernel.why_unsupported())
"""
    assert "libbpf cannot be reached" in in_process(script)


def test_a_place_where_no_folder_can_be_made_is_refused_in_words() -> None:
    with pytest.raises(Refused, match="no bpf file system at /proc/loopback/bpf") as refusal:
        kernel.ensure_bpffs(Path("/proc/loopback/bpf"))
    assert "mount -t bpf" in refusal.value.next_step


def test_mounting_without_the_right_to_is_refused_in_words(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from loopback.bpf import kernel
from loopback.contracts.codes import Refused
try:
    kernel.ensure_bpffs(Path(sys.argv[1]))
except Refused as refusal:
    print(refusal.reason)
"""
    said = in_process(script, tmp_path / "bpf", wrapper=ONLY_THREE)
    assert said.startswith(f"kernel: no bpf file system at {tmp_path / 'bpf'}")
