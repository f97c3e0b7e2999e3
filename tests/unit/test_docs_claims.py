"""What the documentation names is there: tests that hold its claims, pages, and the files of the firewall's module."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIREWALL = ROOT / "modules" / "firewall"
DOCS = sorted(
    [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), FIREWALL / "README.md", ROOT / "bench" / "README.md"]
)
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


@cache
def functions(path: Path) -> frozenset[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text())
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in found)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    for file, name in REFERENCE.findall(page.read_text()):
        assert (ROOT / file).is_file(), f"{page.name} names {file}, which is not there"
        if name:
            assert name in functions(ROOT / file), f"{page.name} names {file}::{name}, which is not there"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_file_of_the_firewall_has_its_place_in_its_readme() -> None:
    named = set(re.findall(r"`(\w+\.py)`", (FIREWALL / "README.md").read_text()))
    files = {path.name for path in FIREWALL.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert files <= named, f"not in the README: {files - named}"


def test_each_claim_of_the_threat_model_names_the_test_that_holds_it() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    claims = [line for line in text.splitlines() if re.match(r"\| \d+\.\d+ \|", line)]
    assert len(claims) >= 40
    for line in claims:
        assert REFERENCE.search(line) or "not held by a test:" in line, line
