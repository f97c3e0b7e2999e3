"""Packages: one form, every deviation refused by name, and nothing written outside or left behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support_trust import archive, manifest

from loopback.contracts.codes import Code, Refused
from loopback.trust import package
from loopback.trust.package import DIGESTS, MANIFEST, extract, header, inspect
from loopback.trust.tree import digest_of_tree

segments = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,30}", fullmatch=True)
paths = st.lists(segments, min_size=1, max_size=4).map("/".join)
contents = st.binary(max_size=2000)
FILES = {"lib/loopback/__init__.py": b"", "bpf/firewall.bpf.o": bytes(600), "bin/run": b"#!/bin/sh\n"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    return folder


def as_built(files: dict[str, bytes]) -> bool:
    try:
        package.build(files, manifest())
    except Refused:
        return False
    return True


file_sets = st.dictionaries(paths, contents, max_size=8).filter(as_built)


@given(file_sets, st.randoms())
def test_the_same_files_give_the_same_bytes_in_any_order(files: dict[str, bytes], random: object) -> None:
    shuffled = list(files.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis's own Random
    assert package.build(dict(shuffled), manifest()) == package.build(files, manifest())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(file_sets)
def test_what_was_built_is_unpacked_and_verifies(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("p")
    (folder / "p.lbm").write_bytes(package.build(files, manifest()))
    info = extract(folder / "p.lbm", folder / "out")
    assert info == inspect(folder / "p.lbm")
    assert info.manifest == manifest()
    found = {p.relative_to(folder / "out").as_posix(): p for p in (folder / "out").rglob("*") if p.is_file()}
    assert {n: p.read_bytes() for n, p in found.items() if n not in (MANIFEST, DIGESTS)} == files
    assert all(
        p.stat().st_mode & 0o777 == (0o755 if n.startswith("bin/") else 0o644) for n, p in found.items()
    )
    assert digest_of_tree(folder / "out") == info.digest


def test_tar_itself_reads_a_package(place: Path) -> None:
    data = package.build(FILES, manifest())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = tar.getnames()
        assert set(names) == {*FILES, MANIFEST, DIGESTS}
        assert names == sorted(names)
        assert all((m.mtime, m.uid, m.uname) == (0, 0, "") and m.isreg() for m in tar)


@pytest.mark.parametrize("length", [99, 100, 101, 150, 190])
def test_long_paths_are_written_as_tar_reads_them(length: int, place: Path) -> None:
    name = "/".join(["d" * 40] * 4)[: length - 2] + "/x"
    name = name.replace("//", "d/")
    data = package.build({name: b"1"}, manifest())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert name in tar.getnames()
    (place / "p.lbm").write_bytes(data)
    extract(place / "p.lbm", place / "out")
    assert (place / "out" / name).read_bytes() == b"1"


def refused(data: bytes, place: Path, **options: str) -> Refused:
    """Both ways refuse it alike, and the folder stays as it was."""
    file = place / "p.lbm"
    file.write_bytes(data)
    before = everything(place.parent.parent)
    with pytest.raises(Refused) as first:
        inspect(file, **options)
    with pytest.raises(Refused) as second:
        extract(file, place / "out", **options)
    assert second.value.refusal == first.value.refusal
    assert everything(place.parent.parent) == before
    return first.value


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def raw(*members: tuple[str, bytes], tar_format: int = tarfile.USTAR_FORMAT, **changes: object) -> bytes:
    """An archive by Python's tarfile, with correct digests, in which every member has these odd fields."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members}
    files = dict(members) | {DIGESTS: json.dumps(digests, sort_keys=True, indent=0).encode()}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            if name not in (MANIFEST, DIGESTS):
                for field, value in changes.items():
                    setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return out.getvalue()


GOOD = (MANIFEST, manifest().to_toml())


def test_an_archive_by_another_tar_is_refused_even_where_its_content_is_right(place: Path) -> None:
    assert refused(raw(GOOD, ("a", b"1"), uid=1000), place).code == Code.PACKAGE_MALFORMED


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "FIFO"),
        (tarfile.DIRTYPE, "folder"),
        (tarfile.AREGTYPE, "old-style"),
        (tarfile.CONTTYPE, "extension"),
        (tarfile.GNUTYPE_SPARSE, "extension"),
    ],
)
def test_anything_but_a_plain_file_is_refused_by_its_name(kind: bytes, named: str, place: Path) -> None:
    error = refused(raw(GOOD, ("a", b""), type=kind, linkname="../../../etc/passwd"), place)
    assert error.code == Code.PACKAGE_UNSAFE_MEMBER
    assert named in error.reason
    assert "'a" in error.reason


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("../escaped", "climbs"),
        ("a/../../escaped", "climbs"),
        ("/tmp/escaped", "absolute"),
        ("./a", "characters"),
        ("a//b", "characters"),
        ("a/", "characters"),
        (".hidden", "characters"),
        ("-rf", "characters"),
        ("a b", "characters"),
        ("a\\b", "characters"),
        ("a\nb", "characters"),
        ("é", "characters"),
        ("a/" * 20 + "b", "deep"),
    ],
)
def test_an_odd_path_is_refused_when_reading_and_when_building(name: str, named: str, place: Path) -> None:
    with pytest.raises(Refused, match=named) as caught:
        package.build({name: b""}, manifest())
    assert caught.value.code == Code.PACKAGE_UNSAFE_MEMBER
    block = bytearray(header("a", 0))
    block[0:100] = name.encode("latin-1").ljust(100, b"\0")
    error = refused(checked(block) + bytes(1024), place)
    assert error.code == Code.PACKAGE_UNSAFE_MEMBER
    assert named in error.reason


def checked(block: bytearray) -> bytes:
    """A header with a right checksum."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def blocks(*files: tuple[str, bytes]) -> bytes:
    """Canonical members as given: no digests are added, nothing is sorted."""
    parts = [header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in files]
    return b"".join(parts) + bytes(1024)


def listing(*files: tuple[str, bytes]) -> tuple[str, bytes]:
    found = {n: hashlib.sha256(d).hexdigest() for n, d in files}
    return DIGESTS, json.dumps(found, sort_keys=True, indent=0).encode()


def test_a_path_that_appears_twice_or_out_of_order_is_refused(place: Path) -> None:
    assert "twice" in refused(blocks(("a", b"1"), ("a", b"2")), place).reason
    assert "order" in refused(blocks(("b", b"1"), ("a", b"2")), place).reason


def test_a_path_that_is_a_file_and_a_folder_is_refused(place: Path) -> None:
    files = (("a", b"1"), ("a/b", b"2"), listing(GOOD, ("a", b"1"), ("a/b", b"2")), GOOD)
    assert refused(blocks(*files), place).code == Code.PACKAGE_UNSAFE_MEMBER
    with pytest.raises(Refused):
        package.build({"a": b"", "a/b": b""}, manifest())


def test_every_truncation_is_refused_and_says_so(place: Path) -> None:
    data = package.build({"a": b"1"}, manifest())
    for length in (*range(0, len(data), 512), 1, 511, 513, len(data) - 1):
        assert refused(data[:length], place).code in (Code.PACKAGE_TRUNCATED, Code.PACKAGE_MALFORMED), length
    assert refused(data[:-512], place).code == Code.PACKAGE_TRUNCATED


def test_data_behind_the_end_or_between_members_is_refused(place: Path) -> None:
    data = archive()
    assert refused(data + b"\0", place).code == Code.PACKAGE_MALFORMED
    assert refused(data + b"hidden", place).code == Code.PACKAGE_MALFORMED
    hidden = bytearray(blocks(("a", b"1")))
    hidden[600] = 1
    assert "hidden" in refused(bytes(hidden), place).reason


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_refused(place: Path, data: st.DataObject) -> None:
    good = archive()
    at = data.draw(st.integers(0, len(good) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[at] ^= bit
    (place / "p.lbm").write_bytes(bad)
    with pytest.raises(Refused):
        extract(place / "p.lbm", place / "out")
    assert not (place / "out").exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.binary(max_size=3000))
def test_arbitrary_bytes_are_refused(place: Path, data: bytes) -> None:
    (place / "p.lbm").write_bytes(data)
    with pytest.raises(Refused):
        inspect(place / "p.lbm")


def test_another_package_than_the_signed_one_is_refused_before_it_is_read(place: Path) -> None:
    data = archive()
    assert refused(data, place, sha256="0" * 64).code == Code.PACKAGE_DIGEST
    assert inspect(place / "p.lbm", sha256=hashlib.sha256(data).hexdigest()).size == len(data)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ((listing(GOOD, ("a", b"1")), GOOD), "a is listed but not there"),
        ((("a", b"1"), listing(GOOD), GOOD), "a is there but not listed"),
        ((("a", b"2"), listing(GOOD, ("a", b"1")), GOOD), "content of a was changed"),
    ],
)
def test_files_that_differ_from_the_listing_are_refused(
    files: tuple[tuple[str, bytes], ...], named: str, place: Path
) -> None:
    error = refused(blocks(*files), place)
    assert (error.code, named in error.reason) == (Code.PACKAGE_DIGEST, True)


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ((listing(("a", b"1")),), Code.PACKAGE_MALFORMED),
        ((("a", b"1"), GOOD), Code.PACKAGE_MALFORMED),
        (((DIGESTS, b"[]"), GOOD), Code.PACKAGE_MALFORMED),
        (((DIGESTS, b'{"a": "\xff"}'), GOOD), Code.PACKAGE_MALFORMED),
        (((DIGESTS, b"{" * 100_000), GOOD), Code.PACKAGE_MALFORMED),
        ((listing((MANIFEST, b"x")), (MANIFEST, b"x")), Code.MANIFEST_INVALID),
    ],
)
def test_a_package_without_proper_manifest_and_listing_is_refused(
    files: tuple[tuple[str, bytes], ...], code: Code, place: Path
) -> None:
    assert refused(blocks(*files), place).code == code


def test_a_listing_that_is_right_but_written_otherwise_is_refused(place: Path) -> None:
    """A name twice, of which readers take this or that one; or room for what nobody looks at."""
    name, text = listing(("a", b"1"), GOOD)
    for other in (
        text.replace(b"{", b'{"a": "' + b"0" * 64 + b'",', 1),
        text.replace(b"\n", b"\n  "),
        text + b" ",
        text.replace(b'"a"', b'"\\u0061"'),
    ):
        error = refused(blocks(("a", b"1"), (name, other), GOOD), place)
        assert (error.code, "one form" in error.reason) == (Code.PACKAGE_MALFORMED, True)
    (place / "p.lbm").write_bytes(blocks(("a", b"1"), (name, text), GOOD))
    inspect(place / "p.lbm")


def test_too_much_is_refused_by_what_is_announced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = header("a", package.MAX_FILE + 1) + bytes(1024)
    assert refused(big, place).code == Code.PACKAGE_TOO_LARGE
    small = archive()
    monkeypatch.setattr(package, "MAX_MEMBERS", 3)
    assert refused(blocks(*((f"f{n}", b"") for n in range(4))), place).code == Code.PACKAGE_TOO_LARGE
    monkeypatch.setattr(package, "MAX_PACKAGE", 2000)
    assert refused(small, place).code == Code.PACKAGE_TOO_LARGE
    with pytest.raises(Refused):
        package.build(FILES, manifest())


def test_a_sparse_file_of_the_size_of_a_disk_is_refused_unread(place: Path) -> None:
    with (place / "p.lbm").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Refused) as caught:
        inspect(place / "p.lbm")
    assert caught.value.code == Code.PACKAGE_TOO_LARGE


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: None])
def test_what_is_no_file_is_refused_without_waiting(make: Callable[[Path], None], place: Path) -> None:
    make(place / "p.lbm")
    with pytest.raises((Refused, IsADirectoryError)):
        inspect(place / "p.lbm")


def test_a_destination_that_exists_is_left_alone(place: Path) -> None:
    (place / "p.lbm").write_bytes(archive())
    outside = place.parent / "outside"
    outside.mkdir()
    (place / "out").symlink_to(outside)
    with pytest.raises(FileExistsError):
        extract(place / "p.lbm", place / "out")
    assert list(outside.iterdir()) == []


def test_a_failing_disk_leaves_nothing_half_unpacked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th flush fails, for every n: the destination is absent, or all flushes succeeded."""
    (place / "p.lbm").write_bytes(package.build(FILES, manifest()))
    fsync = os.fsync
    for failing in range(1, 100):
        calls = 0

        def flush(descriptor: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(5, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", flush)
        try:
            extract(place / "p.lbm", place / "out")
        except OSError:
            assert not (place / "out").exists()
            continue
        assert failing > 5 + 4  # five files, their folders, and the folder above
        return
    pytest.fail("it never succeeded")
