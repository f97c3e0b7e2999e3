"""An unpacked package is compared with the archive's own digest: whatever was done to the folder is found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_trust import manifest

from loopback.contracts.codes import Code, Refused
from loopback.trust import package, tree
from loopback.trust.package import DIGESTS, MANIFEST

FILES = {
    "lib/loopback/__init__.py": b"",
    "bpf/firewall.bpf.o": bytes(600),
    "bin/run": b"#!/bin/sh\n",
    "lib.x": b"1",
}


@pytest.fixture
def digest(tmp_path: Path) -> str:
    """That of a package that is unpacked in `tmp_path / "out"`."""
    (tmp_path / "p.lbm").write_bytes(package.build(FILES, manifest()))
    return package.extract(tmp_path / "p.lbm", tmp_path / "out").digest


def test_the_archives_digest_is_computed_again_from_the_folder(tmp_path: Path, digest: str) -> None:
    assert tree.digest_of_tree(tmp_path / "out") == digest
    tree.verify(tmp_path / "out", sha256=digest)


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,5}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.lists(names, min_size=1, max_size=4).map("/".join), st.binary(max_size=600), max_size=12
    )
)
def test_whatever_the_names_are_folder_and_archive_agree(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("p")
    try:
        (folder / "p.lbm").write_bytes(package.build(files, manifest()))
    except Refused:
        return  # a name that is a file and a folder at once
    info = package.extract(folder / "p.lbm", folder / "out")
    assert tree.digest_of_tree(folder / "out") == info.digest


def rewrite_both(folder: Path) -> None:
    """What somebody does who knows of the listing."""
    (folder / "bin/run").write_bytes(b"#!/bin/evil\n")
    listed = json.loads((folder / DIGESTS).read_bytes())
    listed["bin/run"] = hashlib.sha256(b"#!/bin/evil\n").hexdigest()
    (folder / DIGESTS).write_bytes(json.dumps(listed, sort_keys=True, indent=0).encode())


@pytest.mark.parametrize(
    ("harm", "code", "named"),
    [
        (lambda d: (d / "bin/run").write_bytes(b"#!/bin/evil\n"), Code.PACKAGE_DIGEST, "bin/run was changed"),
        (lambda d: (d / "bin/run").unlink(), Code.PACKAGE_DIGEST, "bin is empty|folder bin/ is empty"),
        (lambda d: (d / "lib.x").unlink(), Code.PACKAGE_DIGEST, "lib.x is missing"),
        (lambda d: (d / "lib/more.py").write_bytes(b""), Code.PACKAGE_DIGEST, "lib/more.py is not listed"),
        (lambda d: (d / DIGESTS).unlink(), Code.PACKAGE_DIGEST, "no digests.json"),
        (lambda d: (d / DIGESTS).write_bytes(b"[" * 9000), Code.PACKAGE_DIGEST, "digests.json"),
        (lambda d: (d / DIGESTS).write_bytes(b"{}"), Code.PACKAGE_DIGEST, "bin/run is not listed"),
        (rewrite_both, Code.PACKAGE_DIGEST, "not the one that was signed"),
        (lambda d: (d / "lib/empty").mkdir(), Code.PACKAGE_DIGEST, "lib/empty/ is empty"),
        (lambda d: (d / "lib/__pycache__").mkdir(), Code.PACKAGE_DIGEST, "__pycache__/ is empty"),
        (
            lambda d: (d / "bin/run").chmod(0o4755),
            Code.PACKAGE_UNSAFE_MEMBER,
            "bin/run has another mode than 755",
        ),
        (lambda d: (d / "lib.x").chmod(0o666), Code.PACKAGE_UNSAFE_MEMBER, "lib.x has another mode than 644"),
        (lambda d: (d / "lib").chmod(0o777), Code.PACKAGE_UNSAFE_MEMBER, "lib/ can be written to by others"),
        (lambda d: d.chmod(0o775), Code.PACKAGE_UNSAFE_MEMBER, "can be written to by others"),
        (lambda d: os.mkfifo(d / "lib/pipe"), Code.PACKAGE_UNSAFE_MEMBER, "lib/pipe is no plain file"),
        (lambda d: (d / "lib/a b").write_bytes(b""), Code.PACKAGE_UNSAFE_MEMBER, "lib/a b"),
    ],
)
def test_an_unpacked_package_that_was_touched_is_refused_by_name(
    harm: Callable[[Path], object], code: Code, named: str, tmp_path: Path, digest: str
) -> None:
    harm(tmp_path / "out")
    with pytest.raises(Refused, match=named) as caught:
        tree.verify(tmp_path / "out", sha256=digest)
    assert caught.value.code == code


def test_links_are_refused_even_where_their_content_is_right(tmp_path: Path, digest: str) -> None:
    real = tmp_path / "out/bin/run"
    real.rename(tmp_path / "moved")
    real.symlink_to(tmp_path / "moved")
    with pytest.raises(Refused) as caught:
        tree.verify(tmp_path / "out", sha256=digest)
    assert caught.value.code == Code.PACKAGE_UNSAFE_MEMBER
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(Refused):
        tree.verify(tmp_path / "link", sha256=digest)


def test_another_folder_that_is_a_whole_package_is_not_the_one_that_was_signed(
    tmp_path: Path, digest: str
) -> None:
    (tmp_path / "q.lbm").write_bytes(package.build(FILES, manifest(version="0.9.0")))
    package.extract(tmp_path / "q.lbm", tmp_path / "old")
    with pytest.raises(Refused, match="not the one that was signed"):
        tree.verify(tmp_path / "old", sha256=digest)


def test_a_tree_larger_than_any_package_is_refused_unread(tmp_path: Path, digest: str) -> None:
    with (tmp_path / "out/lib.x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Refused) as caught:
        tree.verify(tmp_path / "out", sha256=digest)
    assert caught.value.code == Code.PACKAGE_TOO_LARGE
    assert MANIFEST == "module.toml"
