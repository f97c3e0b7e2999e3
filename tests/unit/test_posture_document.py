"""The posture document: its published schema, and Markdown that nobody's words can break."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.cli import posturedoc, posturemd
from loopback.cli.posturedoc import (
    Environment,
    Host,
    JournalPart,
    Module,
    Posture,
    Question,
    Rules,
    Use,
)

DOCS = Path(__file__).parents[2] / "docs"
AT = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


def posture(**changes: object) -> Posture:
    fields = {
        "version": 1, "workspace": "prod", "at": AT, "written_by": "loopback 0", "modules": (), "hosts": (), "rollouts": (),
        "people": (), "keys": (), "questions": (),
        "environment": Environment(name="production", description="", since=AT, signed_by=("ada",), source="record"),
        "rules": Rules(regulated=False, publishers={}, floors={}, source="trust"),
        "journal": JournalPart(intact=True, links=0, confirming=0, asked=0, verdict=(), findings=(), source="audit"),
    }  # fmt: skip
    return Posture(**fields | changes)  # type: ignore[arg-type]


def host(name: str, **changes: object) -> Host:
    fields = {
        "name": name, "labels": {}, "state": "ok", "verified": True, "last_seen": AT, "kernel": "6.1", "architecture": "x86_64",
        "agent": "0.1.0", "modules": (), "problems": (), "journal": "confirms it", "source": "status",
    }  # fmt: skip
    return Host(**fields | changes)  # type: ignore[arg-type]


def test_the_published_schema_is_what_the_code_says() -> None:
    assert (DOCS / "posture.schema.json").read_bytes() == posturedoc.schema(), (
        "run: python -c 'from loopback.cli import posturedoc; print(posturedoc.schema().decode(), end=str())'"
        " > docs/posture.schema.json"
    )


def test_the_manual_names_every_field_of_the_document() -> None:
    text = (DOCS / "posture.md").read_text()
    for name in Posture.__struct_fields__:
        assert re.search(rf"`{name}[`\[]", text) or f'"{name}"' in text, name


def test_a_document_survives_the_way_through_json() -> None:
    found = posture(hosts=(host("web-1"),), questions=(Question(about="a", because="b"),))
    assert posturedoc.decode(msgspec.json.encode(found)) == found


def test_a_document_of_a_version_that_is_not_known_is_refused() -> None:
    data = msgspec.json.encode(posture()).replace(b'"version":1', b'"version":2')
    with pytest.raises(msgspec.ValidationError):
        posturedoc.decode(data)


def test_a_host_that_is_unwell_is_named_with_each_reason() -> None:
    text = posturemd.render(
        posture(hosts=(host("web-1"), host("web-2", problems=("lost", "cloned"), state="lost")))
    )
    assert "| Hosts | 2: 1 lost, 1 ok |" in text
    assert "- **web-2**\n  - lost\n  - cloned" in text


def test_a_journal_that_is_not_intact_cannot_be_overlooked() -> None:
    journal = JournalPart(
        intact=False,
        links=9,
        confirming=1,
        asked=2,
        verdict=("web-2 has another head",),
        findings=(),
        source="audit",
    )
    text = posturemd.render(posture(journal=journal))
    assert "| Journal | NOT INTACT, see below; 1 of 2 hosts confirm it |" in text
    assert "- web-2 has another head" in text


@given(st.text(min_size=1, max_size=60))
def test_words_of_others_stay_words(said: str) -> None:
    """A refusal's reason comes from a host; it adds no line, no table cell and no HTML."""
    plain = posturemd.render(posture(hosts=(host("web-1", problems=("x",)),)))
    text = posturemd.render(posture(hosts=(host("web-1", problems=(said,)),)))
    assert len(text.split("\n")) == len(plain.split("\n"))
    line = next(one for number, one in enumerate(text.split("\n")) if plain.split("\n")[number] == "  - x")
    assert not re.search(r"(?<!\\)[<>`\[\]]", line.removeprefix("  - "))


def test_what_brought_a_version_is_unknown_then_so_is_whether_it_needed_an_approval() -> None:
    text = posturemd.render(
        posture(hosts=(host("web-1"),), modules=(_module((_use(rollout=""), _use(rollout="long-ago"))),))
    )
    rows = [line for line in text.split("\n") if line.startswith("| 1.0.0 |")]
    assert len(rows) == 2
    assert all(row.endswith("| not known |") for row in rows)


def test_where_nothing_runs_nothing_is_said_to_run_as_signed() -> None:
    text = posturemd.render(posture(hosts=(host("web-1"),), modules=(_module(()),)))
    assert "| Running what was signed | no package is promoted on any host |" in text
    runs = posturemd.render(posture(hosts=(host("web-1"),), modules=(_module((_use(rollout="r"),)),)))
    assert "| Running what was signed | yes, every promoted package has the digest that was signed |" in runs


def _use(**changes: object) -> Use:
    fields = {
        "version": "1.0.0", "digest": "d" * 64, "policy": None, "policy_serial": 0, "policy_signed_by": (), "hosts": ("web-1",),
        "enforcing": ("web-1",), "rollout": "", "since": None, "started_by": (), "approved_by": (), "as_signed": True,
        "source": "status",
    }  # fmt: skip
    return Use(**fields | changes)  # type: ignore[arg-type]


def _module(uses: tuple[Use, ...]) -> Module:
    return Module(name="firewall", summary="", uses=uses, releases=(), requirement=None, blast=None)
