"""The archive corpus: each shape first does its harm to a careless reader, then to ours nothing at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import archive_corpus as corpus
import archive_trying
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
#: What `loopback.trust.package` imports besides the standard library, with contracts and manifests.
IMPORTED = ("msgspec", "packaging", "cryptography", "pynacl")
SUPPORTED = ("3.11", "3.12", "3.13", "3.14")


@pytest.mark.parametrize("shape", corpus.SHAPES, ids=lambda shape: shape.name)
def test_a_hostile_archive_harms_a_careless_reader_and_not_ours(
    shape: archive_trying.Shape, tmp_path: Path
) -> None:
    assert archive_trying.harm_of(shape, tmp_path), "the shape is harmless: it proves nothing"
    code, same = archive_trying.refusal_of(shape, tmp_path)
    assert code == shape.code
    assert same, "something was written"


def test_shapes_have_names_of_their_own_and_cover_what_was_asked_for() -> None:
    names = [shape.name for shape in corpus.SHAPES]
    assert len(names) == len(set(names)) >= 100
    groups = {name.partition(":")[0] for name in names}
    assert groups == {
        "traversal/tar", "traversal/zip", "links", "bombs", "duplicates", "names", "extensions", "cut", "added", "kinds",
        "headers",
    }  # fmt: skip


def test_what_the_shapes_are_made_of_is_a_package_that_is_taken(tmp_path: Path) -> None:
    """So a refusal is for the shape's sake, not for something else that is wrong with all of them."""
    good = archive_trying.Shape("good", "taken", lambda place: corpus.good(), lambda data, place: None)
    assert archive_trying.refusal_of(good, tmp_path)[0] == "taken"


def pythons() -> dict[str, str]:
    """The interpreters of supported versions that are here, by version; this one is always among them."""
    found = {}
    for version in SUPPORTED:
        candidates = [
            *sorted(
                Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(
                    f"versions/{version}.*/bin/python"
                )
            ),
            shutil.which(f"python{version}"),
        ]
        for candidate in filter(None, candidates):
            done = subprocess.run(
                [str(candidate), "-c", "import sys; print(sys.version.split()[0])"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0 and done.stdout.startswith(f"{version}."):
                found[done.stdout.strip()] = str(candidate)
                break
    return {sys.version.split()[0]: sys.executable} | found


@pytest.mark.parametrize("version", pythons())
def test_the_corpus_holds_on_every_supported_python_that_is_here(version: str, tmp_path: Path) -> None:
    """Readers differ from version to version, and so does the harm: every one of them is asked."""
    interpreter = pythons()[version]
    path = [str(ROOT / "src")]
    if interpreter != sys.executable:
        path.append(str(libraries(interpreter, version)))
    done = subprocess.run(
        [interpreter, "-B", "-W", "error", str(ROOT / "tests/attacks/archive_corpus.py"), str(tmp_path)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["python"] == version
    assert len(found["shapes"]) == len(corpus.SHAPES)
    wrong = {
        n: s for n, s in found["shapes"].items() if s["code"] != s["wanted"] or not s["same"] or not s["harm"]
    }
    assert not wrong
    if found["data_filter"]:
        by_filter = [n for n, s in found["shapes"].items() if s["harm"].startswith("filtered_tar")]
        print(f"{version}: tarfile's own filter for data lets through: {by_filter}")


def libraries(interpreter: str, version: str) -> Path:
    """What another interpreter needs, installed once into build/, in the versions that are locked for this one."""
    wanted = sorted(needed())
    stamp = hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:12]
    folder = ROOT / "build" / "pythons" / f"{version}-{stamp}"
    if not (folder / "whole").exists():
        command = [
            interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
            "--only-binary", ":all:", "--upgrade", "--target", str(folder), *wanted,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, re.sub(r"https?://\S+", "…", done.stderr)
        (folder / "whole").touch()
    return folder


def needed() -> set[str]:
    """IMPORTED and what that needs itself, without extras, as `name==version`."""
    found: dict[str, str] = {}
    left = list(IMPORTED)
    while left:
        name = left.pop()
        found[name] = importlib.metadata.version(name)
        for text in importlib.metadata.requires(name) or ():
            wanted = Requirement(text)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if applies and wanted.name.lower() not in found:
                left.append(wanted.name.lower())
    return {f"{name}=={version}" for name, version in found.items()}
