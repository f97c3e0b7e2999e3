"""The Python views, the header and what clang makes of it are one layout; building is repeatable and refuses in words."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from loopback.bpf import btf, build, layout
from loopback.contracts.codes import Code, Refused

PROGRAMS = Path(build.__file__).parent / "programs"
#: Names of the header that only programs use.
PRIVATE = {"MAX_VLANS", "MAX_EXTENSIONS"}


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
        ("__u32 identity; /* counter slot", "__u64 identity; /* counter slot", "struct fw_rule: identity at 0, 4"),
        ("__u16 source_set;\n\t__u16 destination_set;", "__u16 destination_set;\n\t__u16 source_set;", "source_set"),
        ("struct fw_flow_side sides[2];", "struct fw_flow_side sides[2];\n\t__u64 more;", "more at 40, 8 bytes"),
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
    "name", ["fw_direction", "fw_verdict", "fw_state", "fw_family_bit", "fw_rule_flag", "fw_slot_flag"]
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


def test_the_fingerprint_is_one_word_for_the_whole_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    before = layout.fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", before)
    assert layout.fingerprint() == before
    monkeypatch.setattr(layout, "LAYOUT", layout.LAYOUT + 1)
    assert layout.fingerprint() != before


@pytest.mark.parametrize("word", [(0, 0, 0), (1, 0, 0), (0xFFFF, 0xFFFE, 0xFFFFFFFF), (7, 6, 1)])
def test_the_active_word_comes_apart_as_it_was_put_together(word: tuple[int, int, int]) -> None:
    assert layout.split_word(layout.active_word(*word)) == word
