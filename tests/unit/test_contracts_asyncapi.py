"""The published AsyncAPI document is what the code says, complete and without loose ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

from golden_contracts import subject_table

from loopback.contracts import asyncapi, messages, reports

FILE = Path(__file__).parents[2] / "docs" / "asyncapi.json"


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(references(value) for value in node))
    return set()


def test_the_published_document_is_what_the_code_says() -> None:
    assert FILE.read_text() == asyncapi.text(), (
        "run: python -m loopback.contracts.asyncapi > docs/asyncapi.json"
    )


def test_every_reference_leads_somewhere() -> None:
    document = asyncapi.document()
    for reference in references(document):
        node: Any = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
        assert node


def test_every_command_and_report_has_a_channel() -> None:
    carried = {kind for channel in asyncapi.CHANNELS for kind in channel.carries}
    wanted = {
        *get_args(messages.AnyCommand),
        *get_args(reports.AnyReport),
        messages.Result,
        messages.Verdict,
        messages.Offer,
    }
    assert wanted <= carried


def test_the_addresses_are_the_subjects_that_the_code_makes() -> None:
    """Each kind of subject of the golden table fits exactly one channel's address."""
    plain = {
        name: re.sub(r"\{[a-z]+\}", "X", asyncapi.address(c)) for c in asyncapi.CHANNELS for name in [c.id]
    }
    names = {
        "result",
        "journal",
        "rollout",
        "desired",
        "record",
        "offer",
        "verdict",
        "presence",
        "catalog",
        "blob",
        "tuf",
        "view",
    }
    for name in names:
        subject = subject_table()[name]
        pattern = re.escape(plain[name]).replace("X", "[^.]+")
        assert re.fullmatch(pattern, subject), name


def test_channel_parameters_are_those_of_the_address() -> None:
    for channel in json.loads(asyncapi.text())["channels"].values():
        assert set(re.findall(r"\{([a-z]+)\}", channel["address"])) == set(channel["parameters"])
