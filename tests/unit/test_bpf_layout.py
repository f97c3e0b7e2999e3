"""The Python views, the header and what clang makes of it are one layout; building is repeatable and refuses in words."""

from __future__ import annotations

import ctypes as ct
import re
import shutil
from pathlib import Path

import pytest

from loopback.bpf import btf, build, layout, sharing
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.pins import CORE

PROGRAMS = Path(build.__file__).parent / "programs"
#: Names of the header that only programs use.
PRIVATE = {"MAX_VLANS", "MAX_EXTENSIONS", "STEPS", "SET_STEPS"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("object") / "firewall.bpf.o"
    build.compile_object(PROGRAMS / "firewall.bpf.c", out)
    return out


def header() -> str:
    return re.sub(r"/\*.*?\*/", "", (PROGRAMS / "firewall.h").read_text(), flags=re.DOTALL)


def enumerators(name: str) -> dict[str, int]:
    found = re.search(rf"enum {name} \{{(.*?)\}}", header(), re.DOTALL)
    assert found, name
    pairs = re.findall(r"(\w+) = (\w+)", found[1])
    assert pairs, name
    return {key: int(value, 0) for key, value in pairs}


def test_every_shared_structure_lies_in_memory_as_its_view_does(compiled: Path) -> None:
    assert layout.check_against_btf(compiled) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("__u32 identity; /* counter slot", "__u64 identity; /* counter slot", "struct fw_match: identity at 4, 4"),
        ("__u8 source_set; /* number of a set, or 0 */\n\t__u8 destination_set;",
         "__u8 destination_set;\n\t__u8 source_set;", "source_set"),
        ("struct fw_flow_side sides[2];", "struct fw_flow_side sides[2];\n\t__u64 more;", "more at 96, 8 bytes"),
        ("__u64 past_deadline;", "__u64 after_deadline;", "after_deadline"),
    ],
)  # fmt: skip
def test_a_header_that_moved_on_alone_is_noticed(tmp_path: Path, old: str, new: str, said: str) -> None:
    folder = tmp_path / "programs"
    shutil.copytree(PROGRAMS, folder)
    text = (folder / "firewall.h").read_text()
    assert text.count(old) == 1
    (folder / "firewall.h").write_text(text.replace(old, new))
    (folder / "shapes.bpf.c").write_text('#include "maps.h"\nchar LICENSE[] SEC("license") = "GPL";\n')
    build.compile_object(folder / "shapes.bpf.c", tmp_path / "shapes.bpf.o")
    assert said in "\n".join(layout.check_against_btf(tmp_path / "shapes.bpf.o"))


def test_a_structure_without_a_view_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "lone.bpf.c").write_text("struct fw_lone { int one; };\nstruct fw_lone here;\n")
    build.compile_object(tmp_path / "lone.bpf.c", tmp_path / "lone.bpf.o")
    said = layout.check_against_btf(tmp_path / "lone.bpf.o")
    assert "struct fw_lone: no view here" in said
    assert "struct fw_rule: not in the object" in said


def test_constants_are_those_of_the_header() -> None:
    found = dict(re.findall(r"#define FW_(\w+) (0x\w+|\d+)", header()))
    assert len(found) > 10
    for name in found.keys() - PRIVATE:
        value = getattr(layout, name)
        assert (value if isinstance(value, int) else len(value)) == int(found[name].rstrip("u"), 0), name


@pytest.mark.parametrize(
    "name", ["fw_direction", "fw_verdict", "fw_state", "fw_rule_flag", "fw_slot_flag", "fw_entry_flag"]
)
def test_enumerators_are_those_of_the_header(name: str) -> None:
    for key, value in enumerators(name).items():
        assert getattr(layout, key.removeprefix("FW_")) == value, key


@pytest.mark.parametrize(
    ("name", "prefix", "words"),
    [
        ("fw_reason", "FW_BY_", layout.REASONS),
        ("fw_parsed", "FW_", layout.PARSED),
        ("fw_flow_stage", "FW_FLOW_", layout.FLOW_STAGES),
    ],
)
def test_words_stand_at_the_place_that_their_enumerator_names(
    name: str, prefix: str, words: tuple[str, ...]
) -> None:
    found = {key.removeprefix(prefix).lower(): value for key, value in enumerators(name).items()}
    assert found == {word: index for index, word in enumerate(words)}


@pytest.mark.parametrize("cut", [0, 3, 64, 5000])
def test_an_object_cut_short_is_refused(compiled: Path, cut: int) -> None:
    with pytest.raises(Refused) as refusal:
        btf.structures(compiled.read_bytes()[:cut])
    assert refusal.value.code is Code.PACKAGE_MALFORMED


def test_the_same_sources_give_the_same_bytes_in_any_folder(tmp_path: Path, compiled: Path) -> None:
    elsewhere = tmp_path / "a" / "longer path"
    shutil.copytree(PROGRAMS, elsewhere)
    build.compile_object(elsewhere / "firewall.bpf.c", tmp_path / "again.bpf.o")
    assert (tmp_path / "again.bpf.o").read_bytes() == compiled.read_bytes()
    assert b"longer path" not in compiled.read_bytes() + (tmp_path / "again.bpf.o").read_bytes()


def test_a_failed_compilation_says_clangs_words_and_leaves_the_older_object(tmp_path: Path) -> None:
    out = tmp_path / "broken.bpf.o"
    out.write_bytes(b"the older one")
    (tmp_path / "broken.bpf.c").write_text("int main(void) { return missing; }\n")
    with pytest.raises(Refused, match="use of undeclared identifier 'missing'") as refusal:
        build.compile_object(tmp_path / "broken.bpf.c", out)
    assert refusal.value.code is Code.PACKAGE_MALFORMED
    assert out.read_bytes() == b"the older one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.bpf.c", "broken.bpf.o"]


def test_without_clang_the_refusal_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="no clang") as refusal:
        build.compile_object(PROGRAMS / "flood.bpf.c", tmp_path / "flood.bpf.o")
    assert "install" in refusal.value.next_step


def test_a_maps_fingerprint_follows_its_own_structures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: sharing.fingerprint(name) for name in sharing.HELD}
    assert all(re.fullmatch("[0-9a-f]{12}", print_) for print_ in before.values())
    assert len(set(before.values())) == len(before)

    class Longer(ct.Structure):
        _fields_ = (*layout.Counter._fields_, ("more", ct.c_uint64))

    monkeypatch.setitem(sharing.HELD, "counters", (Longer,))
    monkeypatch.setitem(sharing.CHANGED, "flows", 99)
    assert {n for n in sharing.HELD if sharing.fingerprint(n) != before[n]} == {"counters", "flows"}


def test_what_depends_on_epochs_is_not_shared_with_another_kind_of_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {name: sharing.fingerprint(name) for name in sharing.HELD}
    monkeypatch.setitem(sharing.CHANGED, "active", 99)
    assert all(sharing.fingerprint(name) != before[name] for name in sharing.HELD)


def test_every_map_of_the_object_says_what_it_holds() -> None:
    source = (PROGRAMS / "maps.h").read_text()
    assert set(re.findall(r"^} (\w+) SEC\(\"\.maps\"\);", source, re.MULTILINE)) == {CORE, *sharing.HELD}
    assert set(sharing.CHANGED) == set(sharing.HELD)
    assert max(sharing.CHANGED.values()) == layout.LAYOUT


@pytest.mark.parametrize(
    ("need", "half"),
    [(1, layout.MIN_HALF), (layout.MIN_HALF, 2 * layout.MIN_HALF), (1_000_000, 1 << 21), (900_000, 1 << 20)],
)
def test_a_slot_gets_a_power_of_two_with_some_to_spare(need: int, half: int) -> None:
    assert layout.half_for(need) == half


@pytest.mark.parametrize("word", [(0, 0, 0), (1, 0, 0), (0xFFFF, 0xFFFE, 0xFFFFFFFF), (7, 6, 1)])
def test_the_active_word_comes_apart_as_it_was_put_together(word: tuple[int, int, int]) -> None:
    assert layout.split_word(layout.active_word(*word)) == word
