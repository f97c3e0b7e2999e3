"""The policy language as a JSON Schema, printed from the tables that the parser itself walks.

`policy.schema.json` beside this file is its output (`python -m loopback.modules.firewall.schema` writes it again); editors use
it to complete and check policies. It says less than the parser: which fields go together, and that names are unique and known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.policy_tables import (
    DEFAULT,
    FILLED_SET,
    LIMIT,
    LOG,
    MAX_SET,
    MAX_SETS,
    PACKET,
    POLICY,
    RULE,
    TEST,
    Field,
)

FILE: Final = Path(__file__).with_name("policy.schema.json")


def _object(table: Mapping[str, Field], about: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": about,
        "properties": {key: {**field.schema, "description": field.about} for key, field in table.items()},
        "required": [key for key, field in table.items() if field.required],
        "additionalProperties": False,
    }


def document() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    packet = _object(PACKET, "a packet to judge")
    for key, described in packet["properties"].items():
        if key not in ("src", "dst", "proto"):  # null is as good as absent in packets
            about = described.pop("description")
            packet["properties"][key] = {"anyOf": [described, {"type": "null"}], "description": about}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Loopback Modules firewall policy, version 1",
        **_object(
            POLICY,
            "The first rule that matches a packet of a new connection decides; without one, the default does.",
        ),
        "$defs": {
            "default": _object(DEFAULT, "what happens to packets that no rule matches"),
            "sets": {
                "type": "object",
                "description": "named sets of prefixes, used as @name",
                "propertyNames": fields.NAME_SCHEMA,
                "maxProperties": MAX_SETS,
                "additionalProperties": {
                    "anyOf": [
                        fields.PREFIX_SCHEMA,
                        {"type": "array", "items": fields.PREFIX_SCHEMA, "maxItems": MAX_SET},
                        {
                            **_object(
                                FILLED_SET,
                                "a set that is filled by hosts' labels or a pool, within stated bounds",
                            ),
                            "oneOf": [{"required": ["labels"]}, {"required": ["pool"]}],
                        },
                    ]
                },
            },
            "rule": _object(
                RULE, "a rule matches when each of its fields does; a field that is absent matches anything"
            ),
            "limit": _object(LIMIT, "a token bucket"),
            "log": _object(LOG, "which of its packets are reported"),
            "packet": packet,
            "test": _object(TEST, "an assertion about this policy"),
        },
    }


def text() -> str:
    """The schema's file."""
    return json.dumps(document(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
